package node

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/edge"
	"patchbay/internal/testbed"
	"patchbay/nat"
)

// bypassArg makes this test binary a command that tries some things with its connections, by plain system calls as a program in C would.
const bypassArg = "node-test-bypass"

// bypassWorld is what such a command is told of the world, all but the last of it outside the container.
type bypassWorld struct {
	echo, closed, silent, hostLoopback, host, own string
}

var bypassCases = map[string]func(bypassWorld) error{
	"carries":       carries,
	"watched":       watchedBefore,
	"bound":         boundBefore,
	"refused":       refusedWhileBlocking,
	"refused later": refusedLater,
	"asks again":    asksAgain,
	"inside":        staysInside,
	"many":          manyAtOnce,
	"nested":        nestedNetwork,
	"signals":       underSignals,
	"hostile":       hostile,
	"hostile swap":  hostileSwap,
	"too many":      tooMany,
	"waits":         waitForever,
}

func bypassMain() {
	if len(os.Args) != 9 || os.Args[1] != bypassArg {
		return
	}
	w := bypassWorld{os.Args[3], os.Args[4], os.Args[5], os.Args[6], os.Args[7], os.Args[8]}
	for name := range strings.SplitSeq(os.Args[2], ",") {
		if err := bypassCases[name](w); err != nil {
			fmt.Printf("%s: %v\n", name, err)
			os.Exit(1)
		}
	}
	fmt.Println("ok")
	os.Exit(0)
}

func address(ap string) *unix.SockaddrInet4 {
	a := netip.MustParseAddrPort(ap)
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}

func tcpSocket(flags int) (int, error) {
	return unix.Socket(unix.AF_INET, unix.SOCK_STREAM|flags, 0)
}

// from is the local address of a socket.
func from(fd int) string {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return err.Error()
	}
	return netip.AddrFrom4(sa.(*unix.SockaddrInet4).Addr).String()
}

// echoes sends a line over fd and waits for it to come back.
func echoes(fd int) error {
	if err := unix.SetNonblock(fd, false); err != nil {
		return err
	}
	if _, err := unix.Write(fd, []byte("hello\n")); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	var buf [16]byte
	if n, err := unix.Read(fd, buf[:]); err != nil || string(buf[:n]) != "hello\n" {
		return fmt.Errorf("read %q: %w", buf[:max(n, 0)], err)
	}
	return nil
}

func writable(fd int) error {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	if n, err := unix.Poll(fds, 10_000); n != 1 || err != nil {
		return fmt.Errorf("poll: %d, %w", n, err)
	}
	return nil
}

// carries: number, flags and options of the socket are what they were, and it is one of the host.
func carries(w bypassWorld) error {
	fd, err := tcpSocket(unix.SOCK_NONBLOCK | unix.SOCK_CLOEXEC)
	if err != nil {
		return err
	}
	type opt struct{ level, name, val int }
	opts := []opt{
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 33},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 7},
		{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 12345},
		{unix.IPPROTO_IP, unix.IP_TOS, 0x10},
		{unix.SOL_SOCKET, unix.SO_RCVBUF, 40_000},
	}
	for _, o := range opts {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.val); err != nil {
			return fmt.Errorf("%+v: %w", o, err)
		}
	}
	if err := unix.Connect(fd, address(w.echo)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return fmt.Errorf("connect: %w", err)
	}
	if err := writable(fd); err != nil {
		return err
	}
	for _, o := range opts {
		want := o.val
		if o.name == unix.SO_RCVBUF && o.level == unix.SOL_SOCKET {
			want *= 2 // as the kernel tells it
		}
		if got, err := unix.GetsockoptInt(fd, o.level, o.name); got != want || err != nil {
			return fmt.Errorf("%+v is %d, %w", o, got, err)
		}
	}
	if n, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); n != unix.FD_CLOEXEC {
		return fmt.Errorf("close-on-exec is gone: %d, %w", n, err)
	}
	if n, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); n&unix.O_NONBLOCK == 0 {
		return fmt.Errorf("O_NONBLOCK is gone: %o, %w", n, err)
	}
	if got := from(fd); got != w.host {
		return fmt.Errorf("from %s, not the host's %s", got, w.host)
	}
	if err := echoes(fd); err != nil {
		return err
	}
	// And the other way round: a socket that blocks, and is kept across exec.
	fd, err = tcpSocket(0)
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, address(w.echo)); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	fl, err1 := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	cl, err2 := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	if fl&unix.O_NONBLOCK != 0 || cl != 0 || err1 != nil || err2 != nil {
		return fmt.Errorf("flags %o and %o: %w", fl, cl, errors.Join(err1, err2))
	}
	return echoes(fd)
}

// watchedBefore: an epoll instance that watches the socket before it connects gets its events.
func watchedBefore(w bypassWorld) error {
	for round := range 3 { // the instance is new in the first
		e, err := unix.EpollCreate1(0)
		if err != nil {
			return err
		}
		fd, err := tcpSocket(unix.SOCK_NONBLOCK)
		if err != nil {
			return err
		}
		if err := unix.EpollCtl(e, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLOUT | unix.EPOLLET, Fd: int32(fd)}); err != nil {
			return err
		}
		if err := unix.Connect(fd, address(w.echo)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			return fmt.Errorf("connect: %w", err)
		}
		deadline := time.Now().Add(10 * time.Second)
		for {
			var ev [4]unix.EpollEvent
			n, err := unix.EpollWait(e, ev[:], 1000)
			if err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
			if n > 0 && ev[0].Events&unix.EPOLLOUT != 0 && ev[0].Events&unix.EPOLLHUP == 0 {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("round %d: no event of the connection", round)
			}
		}
		if got := from(fd); got != w.own {
			return fmt.Errorf("from %s, not its own %s", got, w.own)
		}
		if err := echoes(fd); err != nil {
			return err
		}
	}
	return nil
}

// boundBefore: who has chosen an address keeps it.
func boundBefore(w bypassWorld) error {
	fd, err := tcpSocket(0)
	if err != nil {
		return err
	}
	own := netip.MustParseAddr(w.own).As4()
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: own}); err != nil {
		return err
	}
	if err := unix.Connect(fd, address(w.echo)); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	if got := from(fd); got != w.own {
		return fmt.Errorf("from %s, not its own %s", got, w.own)
	}
	return echoes(fd)
}

func refusedWhileBlocking(w bypassWorld) error {
	fd, err := tcpSocket(0)
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, address(w.closed)); !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("connect to a closed port: %w", err)
	}
	if err := unix.Connect(fd, address(w.echo)); err != nil {
		return fmt.Errorf("connect after that: %w", err)
	}
	return echoes(fd)
}

func refusedLater(w bypassWorld) error {
	fd, err := tcpSocket(unix.SOCK_NONBLOCK)
	if err != nil {
		return err
	}
	err = unix.Connect(fd, address(w.closed))
	if errors.Is(err, unix.EINPROGRESS) {
		if err := writable(fd); err != nil {
			return err
		}
		no, gerr := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if gerr != nil {
			return gerr
		}
		err = unix.Errno(no)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("connect to a closed port: %w", err)
	}
	// The same socket once more, now one of the host. As on any socket, the first call ends the attempt before.
	if err := unix.Connect(fd, address(w.echo)); !errors.Is(err, unix.ECONNABORTED) {
		return fmt.Errorf("connect after that: %w", err)
	}
	if err := unix.Connect(fd, address(w.echo)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return fmt.Errorf("connect after that: %w", err)
	}
	if err := writable(fd); err != nil {
		return err
	}
	return echoes(fd)
}

// asksAgain: connect(2) on a socket that connects or has is told so, and changes nothing.
func asksAgain(w bypassWorld) error {
	fd, err := tcpSocket(unix.SOCK_NONBLOCK)
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, address(w.echo)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return err
	}
	if err := writable(fd); err != nil {
		return err
	}
	if err := unix.Connect(fd, address(w.closed)); err != nil { // as Linux has it, once
		return fmt.Errorf("connect again: %w", err)
	}
	if err := unix.Connect(fd, address(w.closed)); !errors.Is(err, unix.EISCONN) {
		return fmt.Errorf("connect when connected: %w", err)
	}
	return echoes(fd)
}

// staysInside: loopback, unix sockets and UDP are the container's, as ever.
func staysInside(w bypassWorld) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	go serveEcho(l)
	a, err := netip.ParseAddrPort(l.Addr().String())
	if err != nil {
		return err
	}
	for _, flags := range []int{0, unix.SOCK_NONBLOCK} {
		fd, err := tcpSocket(flags)
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, address(a.String())); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			return fmt.Errorf("connect to its own loopback: %w", err)
		}
		if err := echoes(fd); err != nil {
			return err
		}
	}
	// A port is free once its socket is closed: nobody else has it still.
	for range 300 {
		fd, err := tcpSocket(0)
		if err != nil {
			return err
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Port: 7999}); err != nil {
			return fmt.Errorf("bind once more: %w", err)
		}
		if err := unix.Listen(fd, 1); err != nil {
			return fmt.Errorf("listen once more: %w", err)
		}
		unix.Close(fd)
	}
	// What listens on the host's loopback is not there.
	fd, err := tcpSocket(0)
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, address(w.hostLoopback)); !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("the host's loopback: %w", err)
	}
	path := fmt.Sprintf("@patchbay-test-%d", os.Getpid())
	u, err := net.Listen("unix", path)
	if err != nil {
		return fmt.Errorf("listen on a unix socket: %w", err)
	}
	go serveEcho(u)
	c, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		return err
	}
	if line, err := bufio.NewReader(c).ReadString('\n'); err != nil || line != "hello\n" {
		return fmt.Errorf("unix socket said %q: %w", line, err)
	}
	if _, err := net.Listen("tcp", l.Addr().String()); !errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("listen twice: %w", err)
	}
	if err := unix.Listen(12345, 1); !errors.Is(err, unix.EBADF) {
		return fmt.Errorf("listen on nothing: %w", err)
	}
	if err := unix.Connect(12345, address(w.echo)); !errors.Is(err, unix.EBADF) {
		return fmt.Errorf("connect nothing: %w", err)
	}
	if err := unix.Connect(1, address(w.echo)); !errors.Is(err, unix.ENOTSOCK) {
		return fmt.Errorf("connect a pipe: %w", err)
	}
	return nil
}

func serveEcho(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			_, _ = io.Copy(c, c)
		}()
	}
}

// Threads by the dozen, more than the Supervisor remembers, connect at the same time.
func manyAtOnce(w bypassWorld) error {
	var g sync.WaitGroup
	errs := make(chan error, 100)
	for i := range 100 { // half of them block
		g.Go(func() {
			runtime.LockOSThread() // and the thread ends with the goroutine
			for range 5 {
				fd, err := tcpSocket(unix.SOCK_NONBLOCK * (i & 1))
				if err == nil {
					err = unix.Connect(fd, address(w.echo))
				}
				if errors.Is(err, unix.EINPROGRESS) {
					err = writable(fd)
				}
				if err == nil {
					err = echoes(fd)
				}
				if err == nil && from(fd) != w.host {
					err = fmt.Errorf("from %s", from(fd))
				}
				if err != nil {
					errs <- err
					return
				}
				unix.Close(fd)
			}
		})
	}
	g.Wait()
	select {
	case err := <-errs:
		return err
	default:
		return nil
	}
}

// bypassWaiting is how many connections may wait in these tests.
const bypassWaiting = 64

// tooMany: the one that is too many is told so.
func tooMany(w bypassWorld) error {
	got := make(chan error, bypassWaiting+1)
	for range bypassWaiting + 1 {
		go func() {
			fd, err := tcpSocket(0)
			if err == nil {
				err = unix.Connect(fd, address(w.silent))
			}
			got <- err
		}()
	}
	if err := <-got; !errors.Is(err, unix.EAGAIN) {
		return fmt.Errorf("the first to be told: %w", err)
	}
	return nil
}

// waitForever waits, and is interrupted by a signal with SA_RESTART, as all of Go's are, every few milliseconds.
func waitForever(w bypassWorld) error {
	runtime.LockOSThread()
	fd, err := tcpSocket(0)
	if err != nil {
		return err
	}
	pid, tid := os.Getpid(), unix.Gettid()
	go func() {
		for range 100 {
			time.Sleep(3 * time.Millisecond)
			_ = unix.Tgkill(pid, tid, unix.SIGURG)
		}
		fmt.Println("waiting")
	}()
	return unix.Connect(fd, address(w.silent))
}

// underSignals: a call that a signal interrupts and the kernel makes anew succeeds as any other, to the outside and to its own loopback.
func underSignals(w bypassWorld) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go serveEcho(l)
	runtime.LockOSThread()
	pid, tid := os.Getpid(), unix.Gettid()
	var done atomic.Bool
	var g sync.WaitGroup
	g.Go(func() {
		for !done.Load() {
			_ = unix.Tgkill(pid, tid, unix.SIGURG)
			time.Sleep(20 * time.Microsecond)
		}
	})
	defer g.Wait()
	defer done.Store(true)
	for i := range 300 {
		to := w.echo
		if i%3 == 0 {
			to = l.Addr().String()
		}
		fd, err := tcpSocket(0)
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, address(to)); err != nil {
			return fmt.Errorf("connect %d to %s: %w", i, to, err)
		}
		unix.Close(fd)
	}
	return nil
}

// nestedNetwork: a network namespace that the command makes has no way out, as without a bypass.
func nestedNetwork(w bypassWorld) error {
	runtime.LockOSThread() // and the thread ends with the process
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	for _, flags := range []int{0, unix.SOCK_NONBLOCK} {
		fd, err := tcpSocket(flags)
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, address(w.echo)); !errors.Is(err, unix.ENETUNREACH) {
			return fmt.Errorf("connect: %w", err)
		}
	}
	return nil
}

// The container's sockets and the host's, in each of the cases.
//
//	[command] eth0 ── tap, switch, NAT ─┐
//	   └─── sockets of the host ────── [host] ext ── eth0 [external: echo on 7]
func TestBypass(t *testing.T) {
	testbed.Leaks(t)
	ext := testbed.NewExternal(t)
	l, err := ext.Listen("tcp", net.JoinHostPort(ext.Addr4.String(), "7"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go serveEcho(l)
	var intruders atomic.Int32
	lo, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lo.Close()
	go func() {
		for {
			c, err := lo.Accept()
			if err != nil {
				return
			}
			intruders.Add(1)
			c.Close()
		}
	}()
	n := newNet(t, NetworkConfig{Limits: nat.Limits{HalfOpenPerContainer: bypassWaiting}})
	at := func(port string) string { return net.JoinHostPort(ext.Addr4.String(), port) }
	silent := netip.AddrFrom4([4]byte{198, 18, ext.Addr4.As4()[2], 77})
	own := netip.MustParseAddr("10.88.0.99")
	if s := n.subnets[0]; !s.Contains(own) {
		own = s.Addr().Next().Next().Next()
	}
	run := func(name string) (*Container, *bufio.Reader) {
		t.Helper()
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		c, err := n.Start(t.Context(), ContainerConfig{
			AttachConfig: AttachConfig{Addrs: []netip.Addr{own}},
			Process: edge.Spec{Bypass: true, Argv: []string{self(t), bypassArg, name, at("7"), at("9"), netip.AddrPortFrom(silent, 7).String(),
				lo.Addr().String(), ext.HostAddr4.String(), own.String()}},
			Stdio: edge.Stdio{Out: w},
		})
		w.Close()
		if err != nil {
			t.Fatal(err)
		}
		return c, bufio.NewReader(r)
	}
	for _, names := range []string{"carries,watched,bound,refused,refused later,asks again,inside", "many", "signals,nested", "hostile,hostile swap", "too many"} {
		t.Run(names, func(t *testing.T) {
			c, out := run(names)
			said, _ := io.ReadAll(out)
			st, err := c.Wait()
			if err != nil || st.ExitCode() != 0 || !strings.HasSuffix(string(said), "ok\n") {
				t.Errorf("%v, %v: %s", st, err, said)
			}
		})
	}
	if got := intruders.Load(); got > 0 {
		t.Errorf("%d connections reached the host's loopback", got)
	}
	t.Run("counters", func(t *testing.T) {
		st := n.Status().Bypass
		if st == nil || st.Sockets < 500 || st.Left == 0 || st.Failed == 0 || st.Full == 0 || st.Waiting != 0 {
			t.Errorf("counters: %+v", st)
		}
	})
	t.Run("killed-while-it-waits", func(t *testing.T) {
		before := n.Status().Bypass.Sockets
		c, out := run("waits")
		if line, err := out.ReadString('\n'); line != "waiting\n" {
			t.Fatalf("said %q, %v", line, err)
		}
		testbed.Eventually(t, 5*time.Second, func() bool { return n.Status().Bypass.Waiting == 1 })
		if got := n.Status().Bypass.Sockets - before; got != 1 {
			t.Errorf("one connect, interrupted a hundred times, made %d connections", got)
		}
		began := time.Now()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if d := time.Since(began); d > 2*time.Second {
			t.Errorf("closing took %v", d)
		}
	})
	t.Run("not-without-asking", func(t *testing.T) {
		b := newBox(t, n, ContainerConfig{})
		if b.bypass != nil {
			t.Error("a container that did not ask for a bypass has one")
		}
	})
}
