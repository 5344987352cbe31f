package nat

import (
	"io"
	"sync"

	"patchbay/stack"
)

// tryWriter takes as much of b as it can at once. n < len(b) with a nil error means "not now". It does not block.
type tryWriter = interface {
	TryWrite(b []byte) (n int, err error)
}

// async is c when it needs no goroutine to wait on it, as the gateway's connections do not, else one made of c.
func async(c stack.Conn) stack.AsyncConn {
	if a, ok := c.(stack.AsyncConn); ok {
		return a
	}
	return &waitingConn{Conn: c, room: make(chan struct{}, 1), done: make(chan struct{})}
}

// waitingConn is a stack.AsyncConn made of a Conn and a goroutine.
type waitingConn struct {
	stack.Conn
	room chan struct{}
	once sync.Once
	done chan struct{} // closed by Close and Reset
}

func (c *waitingConn) Pump(w tryWriter, end func(error)) {
	go func() {
		_, err := c.Conn.WriteTo(&waitingWriter{tryWriter: w, c: c})
		select {
		case <-c.done:
		default:
			end(err)
		}
	}()
}

func (c *waitingConn) Resume() {
	select {
	case c.room <- struct{}{}:
	default:
	}
}

// NotifyRoom is not known how.
func (c *waitingConn) NotifyRoom(func()) bool { return false }

// TryWrite takes nothing: whether Write would wait is not known.
func (c *waitingConn) TryWrite([]byte) (int, error) { return 0, nil }

func (c *waitingConn) Close() error {
	c.once.Do(func() { close(c.done) })
	return c.Conn.Close()
}

func (c *waitingConn) Reset() {
	c.once.Do(func() { close(c.done) })
	c.Conn.Reset()
}

// waitingWriter waits where a tryWriter would not.
type waitingWriter struct {
	tryWriter
	c *waitingConn
}

func (w *waitingWriter) Write(b []byte) (done int, err error) {
	for {
		n, err := w.TryWrite(b[done:])
		done += n
		if err != nil || done == len(b) {
			return done, err
		}
		select {
		case <-w.c.room:
		case <-w.c.done:
			return done, io.ErrClosedPipe
		}
	}
}
