package nat

import (
	"sync"
	"sync/atomic"

	"patchbay/stack"
)

// Sizes of the buffers that bytes from the host pass through. A flow holds one only while the container does not take what the host sent.
// Small ones serve most; a flow that fills its own gets a big one, so that netstack can send full superframes, as long as there are few of them.
const (
	smallBuf = stack.SuperPayload // what leaves as one superframe, and no crumb behind it
	bigBuf   = 4 * stack.SuperPayload
	maxBig   = 32 // in use at once, 8 MiB; beyond that flows make do with small ones
)

// buf is a lent buffer of which the first n bytes are used.
type buf struct {
	b []byte
	n int
}

// bufPool lends buffers. The zero value is ready. Safe for concurrent use.
type bufPool struct {
	small, big sync.Pool
	bigInUse   atomic.Int32
}

// get lends a small buffer, or a big one if that is asked for and there is one.
func (p *bufPool) get(big bool) *buf {
	if big {
		if p.bigInUse.Add(1) <= maxBig {
			if b, ok := p.big.Get().(*buf); ok {
				return b
			}
			return &buf{b: make([]byte, bigBuf)}
		}
		p.bigInUse.Add(-1)
	}
	if b, ok := p.small.Get().(*buf); ok {
		return b
	}
	return &buf{b: make([]byte, smallBuf)}
}

func (p *bufPool) put(b *buf) {
	b.n = 0
	if len(b.b) == bigBuf {
		p.bigInUse.Add(-1)
		p.big.Put(b)
		return
	}
	p.small.Put(b)
}
