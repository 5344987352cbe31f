package bypass

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Config is what New needs.
type Config struct {
	// Listener is what Install returned. It becomes the Supervisor's when New succeeds.
	Listener *os.File
	// Allow says whether a connection to dst may be made on the host, to that very address. It is called by Serve's goroutine and must not block. Required.
	Allow func(dst netip.Addr) bool
	// MaxWaiting bounds the connections that wait for an answer on sockets that block. Default 1024.
	MaxWaiting int
	// Logger gets what does not work, once each. Default: none.
	Logger *slog.Logger
}

// Stats are a Supervisor's counters.
type Stats struct {
	Sockets uint64 `json:"sockets"` // of the host, handed to the container
	Failed  uint64 `json:"failed"`  // connections on the host that could not be made, as the container was told
	Left    uint64 `json:"left"`    // connections left to the network and NAT
	Full    uint64 `json:"full"`    // refused: too many waited
	Waiting int    `json:"waiting"` // for an answer, now
}

// Supervisor answers a container's calls. See the package documentation.
type Supervisor struct {
	cfg     Config
	log     *slog.Logger
	fd      int
	cookie  uint64 // of the host's network namespace
	tasks   tasks
	options *carrier

	sockets, failed, left, full atomic.Uint64
	waiting                     atomic.Int32

	stop    *os.File // an eventfd: Close
	ctx     context.Context
	cancel  context.CancelFunc // with stop
	waiters sync.WaitGroup
	done    chan struct{} // Serve has returned
	once    sync.Once
	serving atomic.Bool

	said sync.Map // what was logged
}

// Add adds the counters of another.
func (s *Stats) Add(o Stats) {
	s.Sockets += o.Sockets
	s.Failed += o.Failed
	s.Left += o.Left
	s.Full += o.Full
	s.Waiting += o.Waiting
}

// New makes a Supervisor, or says what this kernel lacks.
func New(cfg Config) (*Supervisor, error) {
	if cfg.MaxWaiting <= 0 {
		cfg.MaxWaiting = 1024
	}
	s := &Supervisor{cfg: cfg, log: cfg.Logger, options: newCarrier(), tasks: tasks{byTID: map[int]*task{}, epollMade: time.Now()}, done: make(chan struct{})}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if err := s.probe(); err != nil {
		return nil, err
	}
	e, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	s.stop = os.NewFile(uintptr(e), "stop")
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.fd = int(cfg.Listener.Fd())
	// One core then hands over to the other side and back without waking another one (Linux 6.6).
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(s.fd), unix.SECCOMP_IOCTL_NOTIF_SET_FLAGS, unix.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
	return s, nil
}

// probe looks for what every connection needs.
func (s *Supervisor) probe() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	if s.cookie, err = netnsCookie(fd); err != nil {
		return fmt.Errorf("SO_NETNS_COOKIE: %w; it needs Linux 5.14 or newer", err)
	}
	_, _, no := unix.Syscall6(unix.SYS_KCMP, uintptr(os.Getpid()), uintptr(os.Getpid()), 0, uintptr(fd), uintptr(fd), 0)
	if no != 0 {
		return fmt.Errorf("kcmp: %w; the kernel is built without CONFIG_KCMP, or a sandbox refuses it", no)
	}
	return nil
}

// Stats takes a picture.
func (s *Supervisor) Stats() Stats {
	return Stats{Sockets: s.sockets.Load(), Failed: s.failed.Load(), Left: s.left.Load(), Full: s.full.Load(), Waiting: int(s.waiting.Load())}
}

// notification and its like are of linux/seccomp.h.
type notification struct {
	id    uint64
	pid   uint32
	flags uint32
	data  struct {
		nr   int32
		arch uint32
		ip   uint64
		args [6]uint64
	}
}

type response struct {
	id    uint64
	val   int64
	error int32
	flags uint32
}

type addFD struct {
	id         uint64
	flags      uint32
	srcFD      uint32
	newFD      uint32
	newFDFlags uint32
}

// Serve answers until the container has no process any more, or Close. It blocks its thread.
func (s *Supervisor) Serve() error {
	if !s.serving.CompareAndSwap(false, true) {
		return errors.New("bypass: Serve was called before")
	}
	defer close(s.done)
	defer s.tasks.close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fds := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}, {Fd: int32(s.stop.Fd()), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, -1); errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			return fmt.Errorf("bypass: poll: %w", err)
		}
		if fds[1].Revents != 0 {
			return nil
		}
		if fds[0].Revents&unix.POLLIN == 0 {
			return nil // POLLHUP: nobody is left
		}
		var n notification
		switch no := s.ioctl(unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&n)); no {
		case 0:
			s.handle(&n)
		case unix.ENOENT, unix.EINTR: // who called has ended
		case unix.ENOTCONN:
			return nil
		default:
			return fmt.Errorf("bypass: SECCOMP_IOCTL_NOTIF_RECV: %w", no)
		}
	}
}

// Close ends Serve and what waits. Calls that the container makes afterwards fail with ENOSYS; it is for when the container is at its end.
func (s *Supervisor) Close() error {
	s.once.Do(func() {
		s.cancel()
		_, _ = unix.Write(int(s.stop.Fd()), binary.NativeEndian.AppendUint64(nil, 1))
		if s.serving.Load() {
			select {
			case <-s.done:
			case <-time.After(closeGrace):
				// Before Linux 6.11 it may sleep for a call whose caller was killed just then, until the next one.
				return
			}
		}
		s.waiters.Wait()
		_ = s.stop.Close()
		_ = s.cfg.Listener.Close()
	})
	return nil
}

// closeGrace is how long Close waits for Serve.
const closeGrace = time.Second

func (s *Supervisor) ioctl(cmd uintptr, arg unsafe.Pointer) unix.Errno {
	_, _, no := unix.Syscall(unix.SYS_IOCTL, uintptr(s.fd), cmd, uintptr(arg))
	return no
}

func (s *Supervisor) handle(n *notification) {
	switch n.data.nr {
	case unix.SYS_CONNECT:
		s.connect(n)
	case unix.SYS_LISTEN:
		s.listen(n)
	default:
		s.tasks.epollMade = time.Now()
		s.goOn(n.id)
	}
}

// goOn lets the kernel carry the call out as COMMAND made it, or has made it by then: of TCP nothing can come of that, since Landlock refuses it.
func (s *Supervisor) goOn(id uint64) {
	s.answer(response{id: id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE})
}

// result has the call return err, or success.
func (s *Supervisor) result(id uint64, err unix.Errno) {
	s.answer(response{id: id, error: -int32(err)})
}

func (s *Supervisor) answer(r response) {
	if no := s.ioctl(unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r)); no != 0 && no != unix.ENOENT { // ENOENT: it has ended, or a signal has interrupted it and it asks anew
		s.complain("answer", no)
	}
}

// complain logs once for each sort of trouble.
func (s *Supervisor) complain(what string, err error) {
	if _, again := s.said.LoadOrStore(what, nil); !again {
		s.log.Warn("bypass", "at", what, "error", err)
	}
}

// refusal is what a call returns whose socket cannot be looked at: a bad number is the caller's mistake, anything else ours, such as a process that the kernel lets nobody look into (an executable that is not readable).
func (s *Supervisor) refusal(err error) unix.Errno {
	if errors.Is(err, unix.EBADF) {
		return unix.EBADF
	}
	s.complain("descriptor", err)
	return unix.EACCES
}

// listen carries listen(2) out, with its descriptor and backlog, but for a socket of the host. It never lets the kernel go on with the call, since the descriptor could be another by then; so the process that SO_PEERCRED names to who
// connects to a unix socket is this one, with the same user.
func (s *Supervisor) listen(n *notification) {
	_, theirs, err := s.tasks.socket(int(n.pid), int(int32(n.data.args[0])))
	if err != nil {
		s.result(n.id, s.refusal(err))
		return
	}
	defer unix.Close(theirs)
	if look(theirs, s.cookie).host {
		s.result(n.id, unix.EPERM)
		return
	}
	s.result(n.id, errnoOf(unix.Listen(theirs, int(int32(n.data.args[1])))))
}

// connect decides about one connect(2). Its arguments are descriptor, address and length of the address.
func (s *Supervisor) connect(n *notification) {
	fd := int(int32(n.data.args[0]))
	dst, ok := s.destination(n)
	if !ok {
		s.goOn(n.id) // another family, or nonsense that the kernel names best
		return
	}
	t, theirs, err := s.tasks.socket(int(n.pid), fd)
	if err != nil {
		s.result(n.id, s.refusal(err))
		return
	}
	st := look(theirs, s.cookie)
	if !st.tcp {
		unix.Close(theirs)
		s.goOn(n.id)
		return
	}
	allowed := dst.Port() != 0 && s.cfg.Allow(dst.Addr().Unmap())
	if st.host {
		s.again(n, t, fd, theirs, st, dst, allowed)
		return
	}
	flags, ok := s.replaceable(t, fd, st)
	if !allowed || !ok {
		s.leave(n.id, theirs, st.family, dst)
		return
	}
	s.bypass(n, fd, theirs, flags, st.family, dst)
}

// replaceable reports whether the socket that t has as fd can be another one without t's noticing, and its flags.
func (s *Supervisor) replaceable(t *task, fd int, st socketState) (flags int, ok bool) {
	if st.state != tcpClose || st.bound && !st.host {
		return 0, false
	}
	watched, err := s.tasks.watched(t, fd)
	if err == nil && !watched {
		flags, err = t.flags(fd)
	}
	if err != nil {
		s.complain("descriptor's state", err)
		return 0, false
	}
	return flags, !watched
}

// again is connect(2) on a socket that was handed over before: to ask how the first is getting on, or because that failed. It takes over theirs.
func (s *Supervisor) again(n *notification, t *task, fd, theirs int, st socketState, dst netip.AddrPort, allowed bool) {
	no := unix.EISCONN
	switch st.state {
	case tcpSynSent, tcpSynRecv:
		no = unix.EALREADY
	case tcpClose:
		// What the attempt before came to, as connect(2) tells who asks by it. A reset is none: it is what disconnecting by AF_UNSPEC leaves behind.
		if pending, err := unix.GetsockoptInt(theirs, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && pending != 0 && pending != int(unix.ECONNRESET) {
			no = unix.Errno(pending)
			break
		}
		if flags, ok := s.replaceable(t, fd, st); ok && allowed {
			s.bypass(n, fd, theirs, flags, st.family, dst)
			return
		}
		no = unix.EADDRNOTAVAIL // the container's own socket, which could reach the rest, is gone
	}
	unix.Close(theirs)
	s.failed.Add(1)
	s.result(n.id, no)
}

// leave connects the container's own socket, which it takes over a duplicate of, to where the network and NAT lead. A socket that blocks does so in a goroutine.
func (s *Supervisor) leave(id uint64, theirs, family int, dst netip.AddrPort) {
	s.left.Add(1)
	flags, err := unix.FcntlInt(uintptr(theirs), unix.F_GETFL, 0)
	if err == nil && flags&unix.O_NONBLOCK != 0 {
		s.result(id, connectTo(theirs, family, dst))
		unix.Close(theirs)
		return
	}
	s.await(id, func() {
		defer unix.Close(theirs)
		// A connect that sleeps ends when the socket is shut down.
		defer context.AfterFunc(s.ctx, func() { _ = unix.Shutdown(theirs, unix.SHUT_RDWR) })()
		s.result(id, connectTo(theirs, family, dst))
	}, func() { unix.Close(theirs) })
}

// await runs f beside Serve, or refuses the call and cleans up when too many wait already.
func (s *Supervisor) await(id uint64, f, cleanup func()) {
	if int(s.waiting.Add(1)) > s.cfg.MaxWaiting {
		s.waiting.Add(-1)
		s.full.Add(1)
		cleanup()
		s.result(id, unix.EAGAIN)
		return
	}
	s.waiters.Go(func() {
		defer s.waiting.Add(-1)
		f()
	})
}

// bypass connects a socket of the host in the place of theirs, which it takes over.
func (s *Supervisor) bypass(n *notification, fd, theirs, flags, family int, dst netip.AddrPort) {
	defer unix.Close(theirs)
	ours, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
	if err != nil {
		s.complain("socket", err)
		s.failed.Add(1)
		s.result(n.id, errnoOf(err))
		return
	}
	s.options.carry(theirs, ours, family)
	h := &handover{s: s, id: n.id, fd: fd, ours: ours, flags: flags}
	no := connectTo(ours, family, dst)
	if no == unix.EINPROGRESS && flags&unix.O_NONBLOCK == 0 {
		no = connectTo(ours, family, dst) // a near end has answered by now, and nobody need be woken for it
	}
	switch no {
	case 0:
		h.give(0)
	case unix.EINPROGRESS:
		h.give(unix.EINPROGRESS)
	case unix.EALREADY:
		s.await(n.id, h.wait, func() { unix.Close(ours) })
	default:
		h.fail(no)
	}
}

// destination reads the address out of the caller's memory. ok is false for all but IPv4 and IPv6 with the length that the kernel wants.
func (s *Supervisor) destination(n *notification) (dst netip.AddrPort, ok bool) {
	var buf [unix.SizeofSockaddrInet6]byte
	length := int(int32(n.data.args[2]))
	if length < unix.SizeofSockaddrInet4 || n.data.args[1] == 0 {
		return dst, false
	}
	size := min(length, len(buf))
	local := unix.Iovec{Base: &buf[0]}
	local.SetLen(size)
	got, err := unix.ProcessVMReadv(int(n.pid), []unix.Iovec{local}, []unix.RemoteIovec{{Base: uintptr(n.data.args[1]), Len: size}}, 0)
	if err != nil {
		if !errors.Is(err, unix.EFAULT) && !errors.Is(err, unix.ESRCH) {
			s.complain("memory", err)
		}
		return dst, false
	}
	return parseSockaddr(buf[:got])
}

// parseSockaddr reads struct sockaddr_in or sockaddr_in6. An IPv6 address with a scope is not one that NAT could reach.
func parseSockaddr(b []byte) (netip.AddrPort, bool) {
	if len(b) < unix.SizeofSockaddrInet4 {
		return netip.AddrPort{}, false
	}
	port := binary.BigEndian.Uint16(b[2:])
	switch binary.NativeEndian.Uint16(b) {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), port), true
	case unix.AF_INET6:
		if len(b) < unix.SizeofSockaddrInet6 || binary.NativeEndian.Uint32(b[24:]) != 0 {
			return netip.AddrPort{}, false
		}
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])), port), true
	}
	return netip.AddrPort{}, false
}

// connectTo connects fd, of that address family: an IPv6 socket takes an IPv4 address in its mapped form alone, an IPv4 one no IPv6 address.
func connectTo(fd, family int, dst netip.AddrPort) unix.Errno {
	var sa unix.Sockaddr
	switch {
	case family == unix.AF_INET6 && dst.Addr().Is6():
		sa = &unix.SockaddrInet6{Addr: dst.Addr().As16(), Port: int(dst.Port())}
	case family == unix.AF_INET && dst.Addr().Is4():
		sa = &unix.SockaddrInet4{Addr: dst.Addr().As4(), Port: int(dst.Port())}
	default:
		return unix.EAFNOSUPPORT
	}
	return errnoOf(unix.Connect(fd, sa))
}

func errnoOf(err error) (no unix.Errno) {
	errors.As(err, &no)
	return no
}

// handover is a socket of the host on its way to a caller.
type handover struct {
	s     *Supervisor
	id    uint64
	fd    int // the caller's number
	ours  int
	flags int // of the caller's socket and descriptor
}

// give puts the socket in the place of the caller's, and has connect(2) return result.
func (h *handover) give(result unix.Errno) {
	defer unix.Close(h.ours)
	if h.flags&unix.O_NONBLOCK == 0 {
		if err := unix.SetNonblock(h.ours, false); err != nil {
			h.s.complain("fcntl", err)
		}
	}
	a := addFD{id: h.id, flags: unix.SECCOMP_ADDFD_FLAG_SETFD, srcFD: uint32(h.ours), newFD: uint32(h.fd), newFDFlags: uint32(h.flags & unix.O_CLOEXEC)}
	if no := h.s.ioctl(unix.SECCOMP_IOCTL_NOTIF_ADDFD, unsafe.Pointer(&a)); no != 0 {
		if no != unix.ENOENT {
			h.s.complain("hand over", no)
			h.s.failed.Add(1)
			h.s.result(h.id, unix.EACCES)
		}
		return
	}
	h.s.sockets.Add(1)
	h.s.result(h.id, result)
}

func (h *handover) fail(no unix.Errno) {
	unix.Close(h.ours)
	h.s.failed.Add(1)
	h.s.result(h.id, no)
}

// callerThere is how often, while the far end is silent, a waiter looks whether its caller still waits.
const callerThere = time.Second

// wait waits for the answer to a socket that blocks.
func (h *handover) wait() {
	fds := []unix.PollFd{{Fd: int32(h.ours), Events: unix.POLLOUT}, {Fd: int32(h.s.stop.Fd()), Events: unix.POLLIN}}
	deadline := h.sendTimeout()
	for {
		n, err := unix.Poll(fds, int(callerThere.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil, fds[1].Revents != 0:
			unix.Close(h.ours)
			return
		case n == 0:
			if id := h.id; h.s.ioctl(unix.SECCOMP_IOCTL_NOTIF_ID_VALID, unsafe.Pointer(&id)) != 0 {
				unix.Close(h.ours)
				return
			}
			if !deadline.IsZero() && time.Now().After(deadline) {
				h.give(unix.EINPROGRESS) // what connect(2) says where SO_SNDTIMEO has passed
				return
			}
			continue
		}
		no, err := unix.GetsockoptInt(h.ours, unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil {
			no = int(unix.EIO)
		}
		if no != 0 {
			h.fail(unix.Errno(no))
			return
		}
		h.give(0)
		return
	}
}

// sendTimeout is when connect(2) gives up by SO_SNDTIMEO.
func (h *handover) sendTimeout() time.Time {
	var buf [16]byte
	v, ok := option{unix.SOL_SOCKET, unix.SO_SNDTIMEO, 16}.get(h.ours, &buf)
	if !ok || len(v) != 16 {
		return time.Time{}
	}
	d := time.Duration(binary.NativeEndian.Uint64(v))*time.Second + time.Duration(binary.NativeEndian.Uint64(v[8:]))*time.Microsecond
	if d <= 0 {
		return time.Time{}
	}
	return time.Now().Add(d)
}
