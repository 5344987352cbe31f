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

// asyncConn is a connection of the stack that needs no goroutine to wait on it. The gateway's connections are such; async makes one of any other.
type asyncConn interface {
	stack.Conn
	// Pump gives what arrives to w.TryWrite, on whatever goroutine brings it, and returns at once. When w takes less than it was given nothing more comes
	// until Resume. end is called once, after the container's FIN (nil) or an error of either side, without a lock held; not after Close or Reset.
	Pump(w tryWriter, end func(error))
	// Resume says that w takes bytes again. It moves what has arrived on the caller's goroutine.
	Resume()
	// TryWrite queues as much of b as there is room for. n < len(b) with a nil error means that Write would wait.
	TryWrite(b []byte) (n int, err error)
}

func async(c stack.Conn) asyncConn {
	if a, ok := c.(asyncConn); ok {
		return a
	}
	return &waitingConn{Conn: c, room: make(chan struct{}, 1), done: make(chan struct{})}
}

// waitingConn is an asyncConn made of a Conn and a goroutine.
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
