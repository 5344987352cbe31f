package bypass

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Config is what New needs.
type Config struct {
	// Listener is what Install returned. It becomes the Supervisor's when New succeeds. Required.
	Listener *os.File
	// Network is the container's network namespace, as Network tells inside. Sockets of others, such as those of a sandbox within the container, are connected where they are. Required.
	Network uint64
	// Allow says whether a connection to dst may be made on the host, to that very address. It is called by the Supervisor's goroutine and must not block. Required.
	Allow func(dst netip.Addr) bool
	// MaxWaiting bounds the connections that wait for an answer on sockets that block, the host's and the container's. Default 256.
	MaxWaiting int
	// Logger gets what does not work, once each. Default: none.
	Logger *slog.Logger
}

// Stats are a Supervisor's counters.
type Stats struct {
	Sockets uint64 `json:"sockets"` // of the host, handed to the container, connected or connecting
	Failed  uint64 `json:"failed"`  // connections on the host that failed at once or while the container waited, as it was told
	Left    uint64 `json:"left"`    // connections left to the network and NAT
	Full    uint64 `json:"full"`    // refused: too many waited
	Waiting int    `json:"waiting"` // for an answer, now
}

// Add adds the counters of another.
func (s *Stats) Add(o Stats) {
	s.Sockets += o.Sockets
	s.Failed += o.Failed
	s.Left += o.Left
	s.Full += o.Full
	s.Waiting += o.Waiting
}

// Supervisor answers a container's calls. See the package documentation.
type Supervisor struct {
	cfg     Config
	log     *slog.Logger
	fd      int    // the listener
	stop    int    // an eventfd: Close
	host    uint64 // the host's network namespace
	tasks   tasks
	epolls  epolls
	untold  untold
	options *carrier

	sockets, failed, left, full atomic.Uint64
	waiting                     atomic.Int32

	running sync.WaitGroup // serve, and what it has started
	once    sync.Once
	said    sync.Map // what was logged
}

// New makes a Supervisor and starts it, or says what this kernel lacks. It answers until the container has no process any more, or Close.
func New(cfg Config) (*Supervisor, error) {
	if cfg.MaxWaiting <= 0 {
		cfg.MaxWaiting = 256
	}
	s := &Supervisor{cfg: cfg, log: cfg.Logger, options: newCarrier(), tasks: tasks{byTID: map[int]*task{}}}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if s.host, err = Network(); err != nil {
		return nil, err
	}
	if err := probeKcmp(); err != nil {
		return nil, err
	}
	s.fd = int(cfg.Listener.Fd())
	if s.stop, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		return nil, fmt.Errorf("eventfd: %w; raise the limit of open files", err)
	}
	// One core then hands over to the other side and back without waking another one (Linux 6.6).
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(s.fd), unix.SECCOMP_IOCTL_NOTIF_SET_FLAGS, unix.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
	s.running.Go(s.serve)
	return s, nil
}

// probeKcmp tries the call that says who watches a socket.
func probeKcmp() error {
	self := uintptr(os.Getpid())
	if _, _, no := unix.Syscall6(unix.SYS_KCMP, self, self, 0, 0, 0, 0); no != 0 && no != unix.EBADF {
		return fmt.Errorf("kcmp: %w; the kernel is built without CONFIG_KCMP, or a sandbox refuses it: run without the bypass", no)
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
	tid   uint32
	flags uint32
	data  struct {
		nr   int32
		arch uint32
		ip   uint64
		args [6]uint64
	}
}

// arg is an argument that is an int.
func (n *notification) arg(i int) int { return int(int32(n.data.args[i])) }

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

// serve answers on a thread of its own.
func (s *Supervisor) serve() {
	defer s.tasks.close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fds := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}, {Fd: int32(s.stop), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, -1); errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			s.complain("poll", err)
			return
		}
		if fds[1].Revents != 0 || fds[0].Revents&unix.POLLIN == 0 { // Close, or POLLHUP: nobody is left
			return
		}
		var n notification
		switch no := s.ioctl(unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&n)); no {
		case 0:
			s.handle(&n)
		case unix.ENOENT: // who called has ended
		case unix.ENOTCONN:
			return
		default:
			s.complain("receive", no)
			return
		}
	}
}

// closeGrace is how long Close waits for what the Supervisor does at that moment.
const closeGrace = time.Second

// Close ends the Supervisor. Calls that the container makes afterwards fail with ENOSYS; it is for when the container is at its end. It returns within closeGrace: before Linux 6.11 the kernel may keep the Supervisor's thread asleep
// for a call whose caller was killed just then; that thread and its two descriptors are left behind.
func (s *Supervisor) Close() error {
	s.once.Do(func() {
		_, _ = unix.Write(s.stop, binary.NativeEndian.AppendUint64(nil, 1))
		ended := make(chan struct{})
		go func() {
			s.running.Wait()
			unix.Close(s.stop)
			_ = s.cfg.Listener.Close()
			close(ended)
		}()
		select {
		case <-ended:
		case <-time.After(closeGrace):
		}
	})
	return nil
}

func (s *Supervisor) ioctl(cmd uintptr, arg unsafe.Pointer) unix.Errno {
	for {
		if _, _, no := unix.Syscall(unix.SYS_IOCTL, uintptr(s.fd), cmd, uintptr(arg)); no != unix.EINTR { // the runtime signals its threads
			return no
		}
	}
}

// put gives the caller of id a duplicate of fd, under number, or under the lowest free one where that is -1. It is not SECCOMP_ADDFD_FLAG_SEND, which answers as well: interrupted by a signal, that has the call return 0 and no descriptor
// (kernel/seccomp.c, seccomp_notify_addfd).
func (s *Supervisor) put(id uint64, fd, number, flags int) (int, unix.Errno) {
	a := addFD{id: id, srcFD: uint32(fd), newFDFlags: uint32(flags & unix.O_CLOEXEC)}
	if number >= 0 {
		a.flags, a.newFD = unix.SECCOMP_ADDFD_FLAG_SETFD, uint32(number)
	}
	for {
		if n, _, no := unix.Syscall(unix.SYS_IOCTL, uintptr(s.fd), unix.SECCOMP_IOCTL_NOTIF_ADDFD, uintptr(unsafe.Pointer(&a))); no != unix.EINTR {
			return int(n), no
		}
	}
}

func (s *Supervisor) handle(n *notification) {
	switch n.data.nr {
	case unix.SYS_CONNECT:
		s.connect(n)
	case unix.SYS_LISTEN:
		s.listen(n)
	default:
		s.makeEpoll(n)
	}
}

// goOn lets the kernel carry the call out as COMMAND made it, or has made it by then: of TCP nothing can come of that, since Landlock refuses it.
func (s *Supervisor) goOn(id uint64) {
	s.answer(response{id: id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE})
}

// result has the call return err, or success. Descriptors of the caller's are closed before: the last one to close a socket is who waits for its SO_LINGER, and that is the caller.
func (s *Supervisor) result(id uint64, err unix.Errno) {
	s.answer(response{id: id, error: -int32(err)})
}

// answer reports whether the caller was still there to be told.
func (s *Supervisor) answer(r response) bool {
	no := s.ioctl(unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r))
	if no != 0 && no != unix.ENOENT { // ENOENT: it has ended, or a signal has interrupted it
		s.complain("answer", no)
	}
	return no == 0
}

// conclude tells the caller what untold.ask came to. A success that a signal keeps from him, as signals of Go's own runtime do, is told when he calls again.
func (s *Supervisor) conclude(id, cookie uint64, err unix.Errno) {
	if s.answer(response{id: id, error: -int32(err)}) && err == 0 {
		s.untold.forget(cookie)
	}
}

// untold are sockets, by their cookies, that have connected for a caller who does not know yet.
type untold struct {
	mu      sync.Mutex
	cookies map[uint64]struct{}
}

// maxUntold bounds what callers can leave there who never call again; when full it begins anew.
const maxUntold = 1024

// ask is what a caller is to be told of the socket with that cookie, of which the kernel says what connect returns: success once, and as often as it does not come to him.
func (u *untold) ask(cookie uint64, connect func() unix.Errno) unix.Errno {
	u.mu.Lock()
	defer u.mu.Unlock()
	no := connect()
	switch _, ok := u.cookies[cookie]; {
	case no == 0:
		if u.cookies == nil || len(u.cookies) >= maxUntold {
			u.cookies = map[uint64]struct{}{}
		}
		u.cookies[cookie] = struct{}{}
	case no == unix.EISCONN && ok:
		no = 0
	}
	return no
}

func (u *untold) forget(cookie uint64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.cookies, cookie)
}

// complain logs once for each sort of trouble.
func (s *Supervisor) complain(what string, err error) {
	if _, again := s.said.LoadOrStore(what, nil); !again {
		s.log.Warn("bypass", "at", what, "error", err)
	}
}

// refusal is what a call returns whose descriptor cannot be looked at: a bad number is the caller's mistake, anything else ours.
func (s *Supervisor) refusal(err error) unix.Errno {
	if errors.Is(err, unix.EBADF) {
		return unix.EBADF
	}
	s.complain("descriptor", err)
	return unix.EACCES
}

// beside runs f in a goroutine, one of MaxWaiting at most. It reports whether it does.
func (s *Supervisor) beside(f func()) bool {
	if int(s.waiting.Add(1)) > s.cfg.MaxWaiting {
		s.waiting.Add(-1)
		return false
	}
	s.running.Go(func() {
		defer s.waiting.Add(-1)
		f()
	})
	return true
}

// letGo closes a duplicate and then answers, so that the caller, who may close his own next and expect port or name to be free, does not find ours in the way. Closing may take time if he closes his meanwhile: a
// connected socket lingers (SO_LINGER), a file system of his own thinks. This goroutine is not to wait for that.
func (s *Supervisor) letGo(fd int, answer func()) {
	end := func() {
		unix.Close(fd)
		answer()
	}
	var buf [16]byte
	linger, err := option{unix.SOL_SOCKET, unix.SO_LINGER, 8}.read(fd, &buf)
	slow := err != nil || len(linger) == 8 && binary.NativeEndian.Uint32(linger) != 0 && binary.NativeEndian.Uint32(linger[4:]) != 0
	if !slow || !s.beside(end) {
		end()
	}
}

// makeEpoll makes an epoll instance for the caller, so that its number is known: whether a socket is watched decides whether it can be replaced.
func (s *Supervisor) makeEpoll(n *notification) {
	flags := 0
	if n.data.nr == unix.SYS_EPOLL_CREATE1 {
		flags = n.arg(0)
	}
	if flags&^unix.EPOLL_CLOEXEC != 0 || n.data.nr != unix.SYS_EPOLL_CREATE1 && n.arg(0) <= 0 {
		s.result(n.id, unix.EINVAL)
		return
	}
	e, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		s.result(n.id, errnoOf(err))
		return
	}
	number, no := s.put(n.id, e, -1, flags)
	unix.Close(e)
	switch no {
	case 0:
		s.epolls.add(number)
		s.answer(response{id: n.id, val: int64(number)})
	case unix.ENOENT, unix.ESRCH: // it has ended, or calls again
	default:
		s.result(n.id, no) // EMFILE
	}
}

// listen carries listen(2) out, with its descriptor and backlog, but for a socket of the host. It never lets the kernel go on with the call, since the descriptor could be another by then; so the process that SO_PEERCRED names to who
// connects to a unix socket is this one, with the same user.
func (s *Supervisor) listen(n *notification) {
	_, theirs, err := s.tasks.descriptor(int(n.tid), n.arg(0))
	if err != nil {
		s.result(n.id, s.refusal(err))
		return
	}
	st, err := look(theirs)
	no := errnoOf(err) // ENOTSOCK
	switch {
	case err != nil:
	case st.network == s.host && !st.unix: // one of AF_UNIX has been inherited, as by who is started with it
		no = unix.EPERM
	default:
		no = errnoOf(unix.Listen(theirs, n.arg(1)))
	}
	s.letGo(theirs, func() { s.result(n.id, no) })
}

// connect decides about one connect(2). Its arguments are descriptor, address and length of the address.
func (s *Supervisor) connect(n *notification) {
	fd := n.arg(0)
	dst, ok := s.destination(n)
	if !ok {
		s.goOn(n.id) // another family, or nonsense that the kernel names best
		return
	}
	t, theirs, err := s.tasks.descriptor(int(n.tid), fd)
	if err != nil {
		s.result(n.id, s.refusal(err))
		return
	}
	st, err := look(theirs)
	if err != nil || !st.tcp {
		s.letGo(theirs, func() { s.goOn(n.id) })
		return
	}
	allowed := dst.Port() != 0 && s.cfg.Allow(dst.Addr().Unmap())
	if st.network == s.host {
		s.again(n, t, fd, theirs, st, dst, allowed)
		return
	}
	if allowed && st.network == s.cfg.Network && st.state == tcpClose && !st.chosen {
		if flags, ok := s.replaceable(t, fd); ok {
			s.bypass(n, fd, theirs, flags, st.family, dst)
			return
		}
	}
	s.leave(n.id, theirs, st, dst)
}

// replaceable reports whether what t has as fd can be another socket without t's noticing, and its flags.
func (s *Supervisor) replaceable(t *task, fd int) (flags int, ok bool) {
	if s.epolls.full {
		s.complain("epoll instances", errors.New("more numbers than are remembered: connections are left to the network from now on"))
	}
	watched, err := s.epolls.watch(t.tid, fd)
	if err == nil && !watched {
		flags, err = t.flags(fd)
	}
	if err != nil {
		s.complain("descriptor's state", err)
		return 0, false
	}
	return flags, !watched
}

// bypass connects a socket of the host in the place of theirs, which it takes over. Where the caller waits, he has the new socket from the beginning: a signal that interrupts him leaves him with one that connects, as it would without a
// Supervisor.
func (s *Supervisor) bypass(n *notification, fd, theirs, flags, family int, dst netip.AddrPort) {
	ours, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
	if err != nil {
		unix.Close(theirs)
		s.complain("socket", err)
		s.failed.Add(1)
		s.result(n.id, errnoOf(err))
		return
	}
	s.options.carry(theirs, ours, family)
	unix.Close(theirs) // it was never connected: nothing lingers
	no, waits := connectTo(ours, family, dst), flags&unix.O_NONBLOCK == 0
	if no == unix.EINPROGRESS && waits && tcpState(ours) == tcpClose {
		no = settle(ours, family) // refused already: the caller keeps his own socket
	}
	if no != 0 && no != unix.EINPROGRESS {
		unix.Close(ours)
		s.failed.Add(1)
		s.result(n.id, no)
		return
	}
	if waits {
		_, _ = unix.FcntlInt(uintptr(ours), unix.F_SETFL, 0)
	}
	if _, given := s.put(n.id, ours, fd, flags); given != 0 {
		unix.Close(ours)
		if given != unix.ENOENT && given != unix.ESRCH { // his limit of open files is below the descriptor's number, for instance
			s.complain("hand over", given)
			s.failed.Add(1)
			s.result(n.id, unix.EACCES)
		}
		return
	}
	s.sockets.Add(1)
	if waits {
		s.await(n.id, ours, family, true)
		return
	}
	s.letGo(ours, func() { s.result(n.id, no) })
}

// again is connect(2) on a socket that was handed over before: to ask how that is getting on, to wait for it, or because it failed. It takes over theirs, and never connects it anywhere: it is the host's.
func (s *Supervisor) again(n *notification, t *task, fd, theirs int, st socketState, dst netip.AddrPort, allowed bool) {
	if connecting(st.state) && blocks(theirs) {
		s.await(n.id, theirs, st.family, true)
		return
	}
	cookie := socketCookie(theirs)
	no := s.untold.ask(cookie, func() unix.Errno { return settle(theirs, st.family) })
	if no == errUnconnected {
		if flags, ok := s.replaceable(t, fd); ok && allowed {
			s.bypass(n, fd, theirs, flags, st.family, dst)
			return
		}
		no = unix.EADDRNOTAVAIL // the container's own socket, which could reach the rest, is gone
	}
	s.letGo(theirs, func() { s.conclude(n.id, cookie, no) })
}

func blocks(fd int) bool {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	return err == nil && flags&unix.O_NONBLOCK == 0
}

// leave connects a socket of the container's own, a duplicate of which it takes over, to where the network and NAT lead.
func (s *Supervisor) leave(id uint64, theirs int, st socketState, dst netip.AddrPort) {
	s.left.Add(1)
	wait := blocks(theirs) && (st.state == tcpClose || connecting(st.state))
	if wait { // for a moment it does not: who else has it has nothing to do with it before it is connected
		_ = unix.SetNonblock(theirs, true)
	}
	cookie := socketCookie(theirs)
	no := s.untold.ask(cookie, func() unix.Errno { return connectTo(theirs, st.family, dst) })
	if wait {
		_ = unix.SetNonblock(theirs, false)
		if no == unix.EINPROGRESS || no == unix.EALREADY {
			s.await(id, theirs, st.family, false)
			return
		}
	}
	s.letGo(theirs, func() { s.conclude(id, cookie, no) })
}

// While the far end is silent it is asked whether the caller still waits: soon at first, since a signal has him call anew, and then ever less often.
const (
	firstLook = 10 * time.Millisecond
	lastLook  = time.Second
)

// await answers a caller who waits for fd, a duplicate that it takes over, to connect; counted says that a failure is one of the host's.
func (s *Supervisor) await(id uint64, fd, family int, counted bool) {
	cookie := socketCookie(fd)
	if !connecting(tcpState(fd)) { // a near end has answered by now, and nobody need be woken for it
		no := s.untold.ask(cookie, func() unix.Errno { return settled(fd, family) })
		s.letGo(fd, func() { s.conclude(id, cookie, no) })
		return
	}
	ok := s.beside(func() {
		no, there := s.connected(id, fd, family)
		unix.Close(fd)
		if !there {
			return
		}
		if no != 0 && no != unix.EINPROGRESS && counted {
			s.failed.Add(1)
		}
		s.conclude(id, cookie, no)
	})
	if !ok {
		s.full.Add(1)
		unix.Close(fd)
		s.result(id, unix.EAGAIN)
	}
}

// connected waits until fd has connected, or not, or SO_SNDTIMEO is over (EINPROGRESS, as connect(2) has it). there is false when nobody waits for the answer any more.
func (s *Supervisor) connected(id uint64, fd, family int) (no unix.Errno, there bool) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}, {Fd: int32(s.stop), Events: unix.POLLIN}}
	var deadline time.Time
	if d := sendTimeout(fd); d > 0 {
		deadline = time.Now().Add(d)
	}
	for look := firstLook; ; look = min(2*look, lastLook) {
		step := look
		if !deadline.IsZero() {
			step = max(min(step, time.Until(deadline)), 0)
		}
		switch n, err := unix.Poll(fds, int((step+time.Millisecond-1)/time.Millisecond)); {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return errnoOf(err), true
		case fds[1].Revents != 0 || s.ioctl(unix.SECCOMP_IOCTL_NOTIF_ID_VALID, unsafe.Pointer(&id)) != 0:
			return 0, false
		case n == 0:
			if !deadline.IsZero() && !time.Now().Before(deadline) {
				return unix.EINPROGRESS, true
			}
			continue
		}
		return s.untold.ask(socketCookie(fd), func() unix.Errno { return settled(fd, family) }), true
	}
}

// sendTimeout is fd's SO_SNDTIMEO; 0 is none.
func sendTimeout(fd int) time.Duration {
	var buf [16]byte
	v, ok := option{unix.SOL_SOCKET, unix.SO_SNDTIMEO, 16}.get(fd, &buf)
	if !ok || len(v) != 16 {
		return 0
	}
	return time.Duration(binary.NativeEndian.Uint64(v))*time.Second + time.Duration(binary.NativeEndian.Uint64(v[8:]))*time.Microsecond
}

// destination reads the address out of the caller's memory. ok is false for all but IPv4 and IPv6 with the length that the kernel wants.
func (s *Supervisor) destination(n *notification) (dst netip.AddrPort, ok bool) {
	var buf [unix.SizeofSockaddrInet6]byte
	length := n.arg(2)
	if length < unix.SizeofSockaddrInet4 || n.data.args[1] == 0 {
		return dst, false
	}
	size := min(length, len(buf))
	local := unix.Iovec{Base: &buf[0]}
	local.SetLen(size)
	got, err := unix.ProcessVMReadv(int(n.tid), []unix.Iovec{local}, []unix.RemoteIovec{{Base: uintptr(n.data.args[1]), Len: size}}, 0)
	if err != nil {
		if !errors.Is(err, unix.EFAULT) && !errors.Is(err, unix.ESRCH) {
			s.complain("memory", err)
		}
		return dst, false
	}
	return parseSockaddr(buf[:got])
}

// parseSockaddr reads struct sockaddr_in or sockaddr_in6; a scope, an interface's number, becomes the zone.
func parseSockaddr(b []byte) (netip.AddrPort, bool) {
	if len(b) < unix.SizeofSockaddrInet4 {
		return netip.AddrPort{}, false
	}
	port := binary.BigEndian.Uint16(b[2:])
	switch binary.NativeEndian.Uint16(b) {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), port), true
	case unix.AF_INET6:
		if len(b) < sizeofRFC2133 {
			return netip.AddrPort{}, false
		}
		a := netip.AddrFrom16([16]byte(b[8:24]))
		if len(b) >= unix.SizeofSockaddrInet6 && !a.Is4In6() {
			if scope := binary.NativeEndian.Uint32(b[24:]); scope != 0 {
				a = a.WithZone(strconv.FormatUint(uint64(scope), 10))
			}
		}
		return netip.AddrPortFrom(a, port), true
	}
	return netip.AddrPort{}, false
}

// sizeofRFC2133 is of struct sockaddr_in6 before it had a scope, which the kernel still takes.
const sizeofRFC2133 = 24

// connectTo connects fd, of that address family: an IPv6 socket takes an IPv4 address in its mapped form alone, an IPv4 one no IPv6 address.
func connectTo(fd, family int, dst netip.AddrPort) unix.Errno {
	var sa unix.Sockaddr
	switch {
	case family == unix.AF_INET6 && dst.Addr().Is6():
		scope, _ := strconv.ParseUint(dst.Addr().Zone(), 10, 32) // none is 0
		sa = &unix.SockaddrInet6{Addr: dst.Addr().As16(), Port: int(dst.Port()), ZoneId: uint32(scope)}
	case family == unix.AF_INET && dst.Addr().Is4():
		sa = &unix.SockaddrInet4{Addr: dst.Addr().As4(), Port: int(dst.Port())}
	default:
		return unix.EAFNOSUPPORT
	}
	return errnoOf(unix.Connect(fd, sa))
}

// errUnconnected is what settle says of a socket that neither connects nor is connected.
const errUnconnected = unix.EAFNOSUPPORT

// settle is connect(2) on a socket that has been told where to: 0 the first time that it is connected, EISCONN afterwards, EALREADY, or why it failed. It cannot connect a socket that has not, or has no more: the address is of the
// other family, which the kernel finds out when it comes to look at it (net/ipv4/af_inet.c, __inet_stream_connect).
func settle(fd, family int) unix.Errno {
	if connecting(tcpState(fd)) {
		return unix.EALREADY // without asking, which would wait if the caller has had the socket block meanwhile
	}
	var sa unix.Sockaddr = &unix.SockaddrInet6{}
	if family == unix.AF_INET6 {
		// Should the caller have turned it into one of IPv4 meanwhile (IPV6_ADDRFORM): TCP connects to no broadcast address.
		sa = &unix.SockaddrInet4{Addr: [4]byte{255, 255, 255, 255}}
	}
	no := errnoOf(unix.Connect(fd, sa))
	if no == unix.EINVAL { // IPv6 finds the address too short first
		return errUnconnected
	}
	return no
}

// settled is settle for who has seen the socket connect: that it is connected, by whoever asked first, is success, and that it is nothing any more is that it was broken off.
func settled(fd, family int) unix.Errno {
	switch no := settle(fd, family); no {
	case unix.EISCONN:
		return 0
	case errUnconnected:
		return unix.ECONNABORTED
	default:
		return no
	}
}

func errnoOf(err error) (no unix.Errno) {
	errors.As(err, &no)
	return no
}
