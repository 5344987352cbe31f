package stack

import (
	"slices"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// heldACK keeps back the bare acknowledgement that processing segments ends with until the data has been passed on. If the answer is quick,
// it carries the acknowledgement and the held one is not sent at all.
type heldACK struct {
	mu     sync.Mutex
	opened int // goroutines in process
	have   bool
	frame  frame.Frame
	buf    [wire.EthernetLen + wire.IPv6Len + 60]byte
}

func (a *heldACK) open() {
	a.mu.Lock()
	a.opened++
	a.mu.Unlock()
}

// hold is called for each packet that the connection sends, in order, with its endpoint locked. It is true when f need not be sent now.
func (a *heldACK) hold(g *Gateway, t *tx, f *frame.Frame, p *gstack.PacketBuffer) bool {
	bare := p.Data().Size() == 0 && len(f.Data) <= len(a.buf) && header.TCP(p.TransportHeader().Slice()).Flags() == header.TCPFlagAck
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.have && bare {
		// Two in a row: duplicates are a signal, so none is swallowed.
		a.have = false
		old := frame.Frame{Hdr: a.frame.Hdr, Data: slices.Clone(a.frame.Data)}
		if g.address(&old) {
			t.add(old)
		} else {
			g.hold(&old)
		}
		return false
	}
	a.have = false // what f carries is newer
	if !bare || a.opened == 0 {
		return false
	}
	a.frame = frame.Frame{Hdr: f.Hdr, Data: a.buf[:copy(a.buf[:], f.Data)]}
	a.have = true
	return true
}

// flush sends what is held, when the last goroutine leaves process.
func (a *heldACK) flush(g *Gateway) {
	a.mu.Lock()
	a.opened--
	if !a.have || a.opened > 0 {
		a.mu.Unlock()
		return
	}
	a.have = false
	t := g.tx.get()
	if t == nil {
		a.mu.Unlock()
		return
	}
	f := frame.Frame{Hdr: a.frame.Hdr, Data: t.room(len(a.frame.Data))}
	copy(f.Data, a.frame.Data)
	a.mu.Unlock()
	if g.address(&f) {
		t.add(f)
		t.flush()
	} else {
		g.hold(&f)
	}
	g.tx.put(t)
}
