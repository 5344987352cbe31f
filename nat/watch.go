package nat

import (
	"sync"

	"golang.org/x/sys/unix"

	"patchbay/stack"
)

// watch is a foreign descriptor on the loop of streams.
type watch struct {
	n    *NAT
	fd   int
	step func() error
	gone func(error)
}

// Watch has the loop that serves TCP call step whenever fd is readable, and gone, once, with the first error step returns; fd is not watched any more then. It is for the TAP of
// a network with a single container: one thread then serves both sides of NAT. step must not block. After stop has returned neither is called any more; stop must not
// be called from within them.
func (n *NAT) Watch(fd int, step func() error, gone func(error)) (stop func(), err error) {
	w := &watch{n: n, fd: fd, step: step, gone: gone}
	if err := n.streams.add(fd, unix.EPOLLIN, w); err != nil {
		return nil, err
	}
	return sync.OnceFunc(func() { n.streams.remove(fd) }), nil
}

// ready implements pollHandler.
func (w *watch) ready(uint32) {
	if err := w.step(); err != nil {
		w.n.streams.removeHere(w.fd)
		w.gone(err)
	}
}

// Later has the loop that serves TCP call h.Due 2 to 4 ms from now, or when it ends; where many ask, one timer serves all. It is false, and h is not called, when the loop does not run. It is what stack.Gateway.DelayACKs wants.
func (n *NAT) Later(h stack.Later) bool { return n.streams.later(h) }
