package load

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/spin"
)

// acceptors is how many threads wait for connections, so that as many short connections are answered side by side.
const acceptors = 16

// Server answers every operation of this package on one port over TCP and UDP, and greets on the port above it.
type Server struct {
	listeners []*net.TCPListener
	udp       *net.UDPConn
	addr      netip.AddrPort
	mostHeld  int // the first descriptor that is not held any more

	mu    sync.Mutex
	conns map[int]struct{} // descriptors in use, so that the end can wake their readers
	sinks map[int64]*sinkCount
	held  []int // descriptors of Hold
	done  bool
	wg    sync.WaitGroup
}

// ServerConfig says where to serve. The zero value of a field other than Addr is its documented default.
type ServerConfig struct {
	Addr       string // host:port; with port 0 a pair of free neighbours is looked for
	Congestion string // congestion control of the TCP sockets; "" = what the network namespace has
}

// Listen opens the server's ports.
func Listen(c ServerConfig) (*Server, error) {
	host, port, err := net.SplitHostPort(c.Addr)
	if err != nil {
		return nil, err
	}
	const tries = 20
	for try := 0; ; try++ {
		s, err := listen(host, port, c.Congestion)
		if err == nil || port != "0" || try == tries {
			return s, err
		}
	}
}

func listen(host, port, congestion string) (_ *Server, err error) {
	s := &Server{conns: make(map[int]struct{}), sinks: make(map[int64]*sinkCount), mostHeld: mostHeld()}
	defer func() {
		if err != nil {
			s.closeSockets()
		}
	}()
	ctx := context.Background() // which bounds the look-up of a name alone
	lc := net.ListenConfig{Control: Control(congestion)}
	lc.SetMultipathTCP(false) // whose socket takes a congestion control for the connections to come, and never says that it is refused
	l, err := lc.Listen(ctx, "tcp", net.JoinHostPort(host, port))
	if err != nil {
		return nil, err
	}
	s.listeners = append(s.listeners, l.(*net.TCPListener))
	s.addr = l.Addr().(*net.TCPAddr).AddrPort()
	greet, err := lc.Listen(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(s.addr.Port())+1)))
	if err != nil {
		return nil, err
	}
	s.listeners = append(s.listeners, greet.(*net.TCPListener))
	u, err := net.ListenPacket("udp", net.JoinHostPort(host, strconv.Itoa(int(s.addr.Port()))))
	if err != nil {
		return nil, err
	}
	s.udp = u.(*net.UDPConn)
	_ = s.udp.SetReadBuffer(4 << 20) // the kernel's limit may be lower; what it gives is what we measure with
	return s, nil
}

// Addr is the address the server listens on.
func (s *Server) Addr() netip.AddrPort { return s.addr }

// Congestion is the congestion control of the sockets it accepts, as the listener says.
func (s *Server) Congestion() (string, error) { return CongestionOf(s.listeners[0]) }

// Serve answers until ctx ends; then it closes every socket and returns nil.
func (s *Server) Serve(ctx context.Context) error {
	spin.SetProcs(len(s.listeners) * acceptors)
	var fds []int
	for i, l := range s.listeners {
		rc, err := l.SyscallConn()
		if err != nil {
			return err
		}
		var fd int
		var ferr error
		err = rc.Control(func(p uintptr) { fd, ferr = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 0) })
		if err = errors.Join(err, ferr); err != nil {
			return err
		}
		fds = append(fds, fd)
		if err := unix.SetNonblock(fd, false); err != nil {
			return err
		}
		for range acceptors {
			s.wg.Go(func() { s.accept(fd, i == 1) })
		}
	}
	u, err := takeOver(s.udp)
	if err != nil {
		return err
	}
	s.wg.Go(func() { s.serveUDP(ctx, u) })
	<-ctx.Done()
	s.mu.Lock()
	s.done = true
	for fd := range s.conns {
		_ = unix.Shutdown(fd, unix.SHUT_RDWR) // wakes its reader, who closes it
	}
	s.mu.Unlock()
	for _, fd := range fds {
		_ = unix.Shutdown(fd, unix.SHUT_RDWR) // wakes the acceptors
	}
	_ = unix.Shutdown(u.fd, unix.SHUT_RDWR)
	s.wg.Wait()
	s.letGo()
	for _, fd := range fds {
		unix.Close(fd)
	}
	unix.Close(u.fd)
	s.closeSockets()
	return nil
}

func (s *Server) closeSockets() {
	for _, l := range s.listeners {
		l.Close()
	}
	if s.udp != nil {
		s.udp.Close()
	}
}

func (s *Server) accept(lfd int, greet bool) {
	var slice spin.Slice
	for {
		slice.Yield()
		fd, _, err := unix.Accept4(lfd, unix.SOCK_CLOEXEC)
		switch {
		case err == unix.EINTR || err == unix.ECONNABORTED:
			continue
		case err == unix.EMFILE || err == unix.ENFILE:
			time.Sleep(10 * time.Millisecond) // whoever waits is answered when somebody has gone
			continue
		case err != nil:
			return
		}
		if !s.enter(fd) {
			return
		}
		c := blockingSocket{fd}
		if greet {
			_, _ = c.Write([]byte{'!'}) // a client that is gone already is its own report
			var b [1]byte
			_, _ = c.Read(b[:]) // the client closes first, so that TIME-WAIT is its own
			s.leave(fd)
			continue
		}
		if s.short(c) {
			s.leave(fd)
			continue
		}
	}
}

// short answers a connection on the acceptor's thread if it turns out to be a short one; a stream gets a goroutine of its own and false is returned.
func (s *Server) short(c blockingSocket) bool {
	var b [2]byte
	n, err := c.Read(b[:])
	if err != nil {
		return true
	}
	switch b[0] {
	case opSource:
		s.wg.Go(func() { defer s.leave(c.fd); source(c) })
		return false
	case opHold:
		if c.fd >= s.mostHeld {
			_, _ = c.Write([]byte{'-'}) // the client that is gone does not ask
			return true
		}
		s.mu.Lock()
		s.held = append(s.held, c.fd)
		s.mu.Unlock()
		_, _ = c.Write(b[:1]) // the client that is gone is let go with the others
		return false
	case opLetGo:
		s.wg.Go(func() {
			defer s.leave(c.fd)
			if n == 1 {
				_, _ = c.Read(b[:1]) // the end is as good
			}
			s.letGo()
			_, _ = c.Write(b[:1]) // the client that is gone does not ask
		})
		return false
	case opSink, opSunk:
		s.wg.Go(func() { defer s.leave(c.fd); s.sink(c, b[0], b[1:n]) })
		return false
	case opEcho:
		if n == 2 {
			if _, err := c.Write(b[1:2]); err != nil {
				return true
			}
			if n, err = c.Read(b[:1]); n == 0 || err != nil {
				return true
			}
			_, _ = c.Write(b[:1])
		}
		s.wg.Go(func() { defer s.leave(c.fd); echo(c) })
		return false
	}
	return true
}

// letGo closes what clients have had held.
func (s *Server) letGo() {
	s.mu.Lock()
	held := s.held
	s.held = nil
	s.mu.Unlock()
	for _, fd := range held {
		s.leave(fd)
	}
}

func source(c blockingSocket) {
	buf := make([]byte, 128<<10)
	var slice spin.Slice
	for {
		slice.Yield()
		if _, err := c.Write(buf); err != nil {
			return
		}
	}
}

// sinkCount is what has come to a sink.
type sinkCount struct{ bytes, took atomic.Int64 }

// sink serves opSink and opSunk. already is what was read after the operation.
func (s *Server) sink(c blockingSocket, op byte, already []byte) {
	var raw [8]byte
	if _, err := io.ReadFull(c, raw[copy(raw[:], already):]); err != nil {
		return
	}
	id := getInt64(raw[:])
	if op == opSunk {
		n := s.sinkOf(id)
		_, _ = c.Write(append(putInt64(n.bytes.Load()), putInt64(n.took.Load())...)) // the client that is gone does not ask
		return
	}
	n := s.sinkOf(id)
	start := time.Now()
	buf := make([]byte, 128<<10)
	var slice spin.Slice
	for {
		slice.Yield()
		k, err := c.Read(buf)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return
		}
		n.bytes.Add(int64(k))
		n.took.Store(int64(time.Since(start)))
	}
	_, _ = c.Write(putInt64(n.bytes.Load())) // the client that is gone does not ask
}

// sinkOf is the count of the sink with that id, a new one at first.
func (s *Server) sinkOf(id int64) *sinkCount {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.sinks[id]
	if n == nil {
		if len(s.sinks) >= maxSessions {
			clear(s.sinks)
		}
		n = new(sinkCount)
		s.sinks[id] = n
	}
	return n
}

func echo(c blockingSocket) {
	buf := make([]byte, 64<<10)
	var slice spin.Slice
	for {
		slice.Yield()
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return
		}
	}
}

func (s *Server) enter(fd int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done {
		unix.Close(fd)
		return false
	}
	s.conns[fd] = struct{}{}
	return true
}

func (s *Server) leave(fd int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, fd)
	unix.Close(fd)
}

func putInt64(n int64) []byte { return binary.BigEndian.AppendUint64(nil, uint64(n)) }
func getInt64(b []byte) int64 { return int64(binary.BigEndian.Uint64(b)) }

// Run is Listen and Serve in one, on host:port.
func Run(ctx context.Context, addr string) error {
	s, err := Listen(ServerConfig{Addr: addr})
	if err != nil {
		return fmt.Errorf("load server on %s: %w", addr, err)
	}
	return s.Serve(ctx)
}
