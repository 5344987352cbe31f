package secure

import (
	"io"
	"net"
	"os"
	"sync"
	"time"
)

const maxPipe = 32 // datagrams that wait for the library

// pipe is the net.PacketConn that the DTLS library reads and writes: Run pushes what came from the peer, and send is given what goes there. A write never fails or blocks for long: for a handshake an
// error is as loss.
type pipe struct {
	send func(b []byte)

	mu       sync.Mutex
	cond     sync.Cond
	in       [][]byte
	closed   bool
	deadline time.Time
	timer    *time.Timer
}

func newPipe(send func([]byte)) *pipe {
	p := &pipe{send: send}
	p.cond.L = &p.mu
	return p
}

// push takes d, or drops it if too many wait.
func (p *pipe) push(d []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.in) < maxPipe && !p.closed {
		p.in = append(p.in, d)
		p.cond.Signal()
	}
}

func (p *pipe) ReadFrom(b []byte) (int, net.Addr, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.closed:
			return 0, nil, io.EOF
		case !p.deadline.IsZero() && !time.Now().Before(p.deadline):
			return 0, nil, os.ErrDeadlineExceeded
		case len(p.in) > 0:
			n := copy(b, p.in[0])
			p.in = p.in[1:]
			return n, peerAddr{}, nil
		}
		p.cond.Wait()
	}
}

func (p *pipe) WriteTo(b []byte, _ net.Addr) (int, error) {
	p.send(b)
	return len(b), nil
}

func (p *pipe) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed, p.in = true, nil
	if p.timer != nil {
		p.timer.Stop()
	}
	p.cond.Broadcast()
	return nil
}

func (p *pipe) LocalAddr() net.Addr { return peerAddr{} }

func (p *pipe) SetDeadline(t time.Time) error { return p.SetReadDeadline(t) }

func (p *pipe) SetReadDeadline(t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deadline = t
	if p.timer != nil {
		p.timer.Stop()
	}
	if d := time.Until(t); !t.IsZero() && d > 0 && !p.closed {
		p.timer = time.AfterFunc(d, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.cond.Broadcast()
		})
	}
	p.cond.Broadcast()
	return nil
}

func (p *pipe) SetWriteDeadline(time.Time) error { return nil }

// peerAddr stands for the peer, whose address a Link does not know.
type peerAddr struct{}

func (peerAddr) Network() string { return "patchbay" }
func (peerAddr) String() string  { return "peer" }
