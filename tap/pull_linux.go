package tap

import (
	"fmt"
	"sync"

	"patchbay/frame"
)

// Puller reads one queue for a loop that waits for other descriptors too. It is what Serve is, without a thread of its own: where one thread serves a
// container's frames and its NAT, a round trip wakes one thread and not two. It belongs to one goroutine at a time.
type Puller struct {
	r    *reader
	sink frame.Sink
	once sync.Once
}

// Pull claims queue, as Serve would, until the Puller is closed. Frames go to sink, a batch at a time, and are valid until Forward returns. The Puller must
// be closed before the Device is.
func (d *Device) Pull(queue int, sink frame.Sink) (*Puller, error) {
	if queue < 0 || queue >= len(d.queues) {
		return nil, fmt.Errorf("tap %q: no queue %d: it has %d", d.info.Name, queue, len(d.queues))
	}
	if err := d.startServe(d.queues[queue]); err != nil {
		return nil, fmt.Errorf("tap %q: queue %d: %w", d.info.Name, queue, err)
	}
	return &Puller{r: newReader(d, queue), sink: sink}, nil
}

// FD is what to wait for: it is readable when Step has something to do, level-triggered.
func (p *Puller) FD() int { return p.r.q.fd }

// Step reads one batch, forwards it and returns; it never blocks. What is left then makes FD readable still. An error means that the interface is
// gone (ErrGone) and FD must not be waited for any more.
func (p *Puller) Step() error {
	_, err := p.r.fill()
	if len(p.r.fs) > 0 {
		p.sink.Forward(p.r.fs)
	}
	if err != nil {
		return fmt.Errorf("tap %q: %w", p.r.d.info.Name, err)
	}
	return nil
}

// Close gives the queue up. No Step may be under way. Idempotent.
func (p *Puller) Close() {
	p.once.Do(func() { p.r.d.endServe(p.r.q) })
}
