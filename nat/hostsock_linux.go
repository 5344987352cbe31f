package nat

import (
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// hostSock is a connected host socket. One goroutine may read and one write; the rest may be called from anywhere.
type hostSock struct {
	file *os.File
	raw  syscall.RawConn

	mu     sync.Mutex // guards fd against use after close
	fd     int
	closed bool
}

func newHostSock(fd int) *hostSock {
	h := &hostSock{fd: fd, file: os.NewFile(uintptr(fd), "tcp")}
	h.raw, _ = h.file.SyscallConn() // fails only for a nil file
	return h
}

// read waits until there is something to read and returns it in a buffer of the pool, which the caller gives back. No buffer is held while it
// waits. At the peer's FIN it returns io.EOF.
func (h *hostSock) read(pool *bufPool, big bool) (b *buf, n int, err error) {
	werr := h.raw.Read(func(fd uintptr) bool {
		b = pool.get(big)
		for {
			n, err = unix.Read(int(fd), b.b)
			if err != unix.EINTR {
				break
			}
		}
		if err == unix.EAGAIN {
			pool.put(b)
			b = nil
			return false
		}
		return true
	})
	switch {
	case werr != nil:
		return b, 0, werr
	case err == nil && n == 0:
		return b, 0, io.EOF
	}
	return b, max(n, 0), err
}

// waitError waits, after the peer's FIN, until the peer resets the connection (true) or the socket is closed here (false).
func (h *hostSock) waitError() bool {
	var err error
	h.raw.Read(func(fd uintptr) bool {
		var b [1]byte
		_, err = unix.Read(int(fd), b[:])
		return err != nil && err != unix.EAGAIN && err != unix.EINTR
	})
	return err != nil
}

// closeWrite sends a FIN.
func (h *hostSock) closeWrite() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.closed {
		unix.Shutdown(h.fd, unix.SHUT_WR)
	}
}

// reset closes the socket with RST and unblocks whoever uses it. Idempotent.
func (h *hostSock) reset() { h.end(true) }

// close closes the socket and unblocks whoever uses it. Idempotent.
func (h *hostSock) close() { h.end(false) }

func (h *hostSock) end(reset bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return
	}
	h.closed = true
	if reset {
		resetSock(h.fd)
	}
	h.file.Close()
}

func (h *hostSock) keepAlive() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.closed {
		keepAlive(h.fd)
	}
}

// Sizes of the buffers that bytes from the host pass through. Small ones serve most flows; one that fills its buffer gets a big one, so that
// netstack can send full superframes, as long as there are few of them.
const (
	smallBuf = 64 << 10
	bigBuf   = 256 << 10
	maxBig   = 32 // in use at once, 8 MiB; beyond that flows make do with small ones
)

type buf struct{ b []byte }

// bufPool lends buffers. The zero value is ready. Safe for concurrent use.
type bufPool struct {
	small, big sync.Pool
	bigInUse   atomic.Int32
}

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
	if len(b.b) == bigBuf {
		p.bigInUse.Add(-1)
		p.big.Put(b)
		return
	}
	p.small.Put(b)
}
