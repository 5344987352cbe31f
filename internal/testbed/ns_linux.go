package testbed

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Require skips t with the reason where this process is not inside a bed, or fails it when REQUIRE_NETNS=1.
func Require(t testing.TB) {
	t.Helper()
	reason := bed.missing
	if reason == "" && os.Getenv(envStage) != stageInside {
		reason = "this package has no TestMain that calls testbed.Main"
	}
	lack(t, reason)
}

// RequireTUN is Require, and a TUN device that can be opened.
func RequireTUN(t testing.TB) {
	t.Helper()
	Require(t)
	lack(t, bed.noTUN)
}

// RequirePing is Require, and ping sockets that can be opened.
func RequirePing(t testing.TB) {
	t.Helper()
	Require(t)
	lack(t, bed.noPing)
}

// Lacking skips t for a reason of the caller's, such as a kernel without a feature, or fails it when REQUIRE_NETNS=1.
func Lacking(t testing.TB, format string, args ...any) {
	t.Helper()
	lack(t, fmt.Sprintf(format, args...))
}

func lack(t testing.TB, reason string) {
	t.Helper()
	switch {
	case reason == "":
	case os.Getenv("REQUIRE_NETNS") == "1" && !bed.fuzzing:
		t.Fatalf("REQUIRE_NETNS=1, but %s", reason)
	default:
		t.Skip(reason)
	}
}

// NS is a network namespace that this process is in or has made.
type NS struct {
	// Name appears in messages and in Path.
	Name string
	path string
	fd   int

	mu   sync.Mutex
	cmds []*exec.Cmd
}

var nsCount atomic.Int64

// NewNS makes a network namespace with lo up, ping sockets open and no duplicate address detection. It is given back by t.Cleanup, which
// also kills what Command started and is still running. The name is optional and need not be unique.
func NewNS(t testing.TB, name ...string) *NS {
	t.Helper()
	Require(t)
	n := &NS{Name: fmt.Sprintf("ns%d", nsCount.Add(1))}
	if len(name) > 0 {
		n.Name += "-" + filepath.Base(name[0])
	}
	n.path = filepath.Join(bed.dir, "ns", n.Name)
	if err := n.create(); err != nil {
		t.Fatalf("network namespace %s: %v", n.Name, err)
	}
	t.Cleanup(n.destroy)
	n.Do(func() {
		if err := loopbackUp(); err != nil {
			t.Fatalf("network namespace %s: lo: %v", n.Name, err)
		}
		_ = openPing() // RequirePing tells
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0)
	})
	return n
}

// Host is the namespace the tests themselves are in, which plays the host of the program under test.
func Host(t testing.TB) *NS {
	t.Helper()
	Require(t)
	fd, err := unix.Open("/proc/self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	n := &NS{Name: "host", fd: fd, path: fmt.Sprintf("/proc/%d/ns/net", os.Getpid())}
	t.Cleanup(func() { n.killAll(); unix.Close(fd) })
	return n
}

func (n *NS) create() (err error) {
	runtime.LockOSThread()
	old, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer unix.Close(old)
	defer restore(old)
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	if n.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return err
	}
	if err := os.WriteFile(n.path, nil, 0o644); err != nil {
		return err
	}
	return unix.Mount("/proc/thread-self/ns/net", n.path, "", unix.MS_BIND, "")
}

// restore goes back to a namespace and releases the thread. A thread that cannot go back is kept locked, so that it ends
// with its goroutine.
func restore(fd int) {
	if unix.Setns(fd, unix.CLONE_NEWNET) == nil {
		runtime.UnlockOSThread()
	}
}

func (n *NS) destroy() {
	n.killAll()
	_ = unix.Unmount(n.path, unix.MNT_DETACH)
	_ = os.Remove(n.path)
	unix.Close(n.fd)
}

func (n *NS) killAll() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.cmds {
		if c.Process != nil && c.Process.Kill() == nil {
			_, _ = c.Process.Wait()
		}
	}
	n.cmds = nil
}

// Path is a file that any process of the bed can open and setns to.
func (n *NS) Path() string { return n.path }

// FD is a descriptor of the namespace; it belongs to n.
func (n *NS) FD() int { return n.fd }

// Do calls f on the calling goroutine with its thread in the namespace. Goroutines that f starts are not in it: a net.Listen or a
// net.Dial to a literal address is safe, an http.Client needs DialContext. Do may be nested, and f may call t.Fatal.
func (n *NS) Do(f func()) {
	runtime.LockOSThread()
	old, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		panic(fmt.Sprintf("testbed: %v", err))
	}
	defer unix.Close(old)
	defer restore(old)
	if err := unix.Setns(n.fd, unix.CLONE_NEWNET); err != nil {
		panic(fmt.Sprintf("testbed: enter network namespace %s: %v", n.Name, err))
	}
	f()
}

// DialContext is net.Dialer.DialContext from inside the namespace, for an http.Transport and the like. addr is literal: names are
// looked up elsewhere.
func (n *NS) DialContext(ctx context.Context, network, addr string) (c net.Conn, err error) {
	n.Do(func() {
		var d net.Dialer
		c, err = d.DialContext(ctx, network, addr)
	})
	return c, err
}

// Listen is net.Listen inside the namespace.
func (n *NS) Listen(network, addr string) (l net.Listener, err error) {
	n.Do(func() { l, err = net.Listen(network, addr) })
	return l, err
}

// ListenPacket is net.ListenPacket inside the namespace.
func (n *NS) ListenPacket(network, addr string) (c net.PacketConn, err error) {
	n.Do(func() { c, err = net.ListenPacket(network, addr) })
	return c, err
}

// Command is exec.Command for a process inside the namespace. It is a namespace's root there, as the tests are; see AsOrdinaryUser. Where it is
// still running when the test ends, it is killed. cmd.Env, if set, must start from cmd.Environ().
func (n *NS) Command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	if cmd.Err == nil {
		// This test binary enters the namespace and executes the command: see execIn.
		cmd.Args = append([]string{self(), cmd.Path}, cmd.Args...)
		cmd.Path = self()
		cmd.Env = setenv(os.Environ(), envExecNS, n.path)
	}
	n.mu.Lock()
	n.cmds = append(n.cmds, cmd)
	n.mu.Unlock()
	return cmd
}

// execIn is what Command's process does first. os.Args: this binary, the command's path, its arguments from 0.
func execIn(path string) {
	_ = os.Unsetenv(envExecNS)
	runtime.LockOSThread()
	fail := func(err error) {
		fmt.Fprintf(os.Stderr, "testbed: %s: %v\n", path, err)
		os.Exit(126)
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		fail(err)
	}
	// Exec keeps the namespaces of the thread that calls it.
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		fail(err)
	}
	if len(os.Args) < 3 {
		fail(unix.EINVAL)
	}
	fail(syscall.Exec(os.Args[1], os.Args[2:], os.Environ()))
}
