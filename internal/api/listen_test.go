package api

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/testbed"
)

func mode(t *testing.T, path string) os.FileMode {
	t.Helper()
	fi, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Mode()
}

func TestListen(t *testing.T) {
	testbed.Leaks(t)
	old := unix.Umask(0) // the socket is 0600 whatever the umask
	defer unix.Umask(old)
	dir := filepath.Join(t.TempDir(), "a", "b")
	path := filepath.Join(dir, "node.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if m := mode(t, dir); m.Perm() != 0o700 {
		t.Errorf("directory: %v", m)
	}
	if m := mode(t, path); m.Perm() != 0o600 || m&os.ModeSocket == 0 {
		t.Errorf("socket: %v", m)
	}
	_, err = Listen(path)
	if want := fmt.Sprintf("a node is running already (pid %d) at %s; use --takeover to replace it, or another --socket", os.Getpid(), path); CodeOf(err) != CodeConflict || err.Error() != want {
		t.Errorf("a second node: %v, want %s", err, want)
	}
	l.Close()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}

	// A node that died leaves its socket behind.
	l, err = Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	dead := NewClient(path)
	if err := dead.Health(t.Context()); !errors.Is(err, ErrNoNode) || err.Error() != "no node answers at "+path+": connection refused; start one with `patchbay daemon`" {
		t.Errorf("a dead node: %v", err)
	}
	if _, err := dead.Attach(t.Context(), "lan", AttachmentSpec{}); !errors.Is(err, ErrNoNode) || CodeOf(err) != CodeUnavailable {
		t.Errorf("a dead node: %v", err)
	}
	l, err = Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := dead.Health(t.Context()); !errors.Is(err, ErrNoNode) || !strings.Contains(err.Error(), ": no such file or directory;") {
		t.Errorf("no node: %v", err)
	}
}

func TestListenRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(dir, "open")
	if err := errors.Join(os.Mkdir(open, 0o700), os.Chmod(open, 0o777)); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		file:                        "something that is no socket is there; choose another",
		link:                        "something that is no socket is there",
		dir:                         "something that is no socket is there",
		file + "/node.sock":         "not a directory",
		open + "/node.sock":         "others could replace what is in " + open,
		"/proc/none/node.sock":      "choose a place you can write to",
		strings.Repeat("/long", 50): "is longer than 107",
		dir + "/nul\x00":            "means nothing",
	} {
		if l, err := Listen(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", path, err, want)
			if l != nil {
				l.Close()
			}
		}
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "mine" {
		t.Errorf("the file: %q, %v", b, err)
	}
}

// TestListenRace: of many nodes that find a dead one's socket, one gets it.
func TestListenRace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node.sock")
	for range 20 {
		dead, err := Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		dead.SetUnlinkOnClose(false)
		dead.Close()
		var won atomic.Int32
		var wg sync.WaitGroup
		var winner atomic.Pointer[net.UnixListener]
		for range 8 {
			wg.Go(func() {
				if l, err := Listen(path); err == nil {
					won.Add(1)
					winner.Store(l)
				} else if CodeOf(err) != CodeConflict {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 {
			t.Fatalf("%d nodes have the socket", won.Load())
		}
		winner.Load().Close()
	}
}

// TestHandover: a client sees no gap, the new node's pid, and the socket survives the old one's end.
func TestHandover(t *testing.T) {
	s := start(t, ServerConfig{})
	fd, err := Handover(s.l)
	if err != nil {
		t.Fatal(err)
	}
	l, err := ListenFD([]int{fd})
	if err != nil {
		t.Fatal(err)
	}
	next := startOn(t, l, newFake(), ServerConfig{})
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	if next.path != s.path {
		t.Errorf("path %s, was %s", next.path, s.path)
	}
	if err := s.client.Health(t.Context()); err != nil {
		t.Errorf("after the old node's end: %v", err)
	}
	if _, err := Listen(s.path); CodeOf(err) != CodeConflict {
		t.Errorf("a third node: %v", err)
	}
	if err := next.stop(); err != nil {
		t.Fatal(err)
	}
	again, err := Listen(s.path) // what is left is replaced
	if err != nil {
		t.Fatal(err)
	}
	again.Close()

	r, w := pipe(t)
	wf := os.NewFile(uintptr(w), "pipe")
	defer wf.Close()
	if _, err := ListenFile(r); err == nil {
		t.Error("a pipe is no listener")
	}
}

// TestHandoverPID: who is told of a node that is running already is told the pid of the next one, not of the one that made the socket.
func TestHandoverPID(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := Handover(l)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), envNext+"=1")
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}()
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "<nil>\n" {
		t.Fatalf("the next node: %q, %v", line, err)
	}
	l.Close()
	if _, err := Listen(path); CodeOf(err) != CodeConflict || !strings.Contains(err.Error(), fmt.Sprintf("(pid %d)", cmd.Process.Pid)) {
		t.Errorf("%v, want pid %d", err, cmd.Process.Pid)
	}
}

// TestReplacedSocket: a node whose socket somebody has removed and replaced leaves the new one alone.
func TestReplacedSocket(t *testing.T) {
	s := start(t, ServerConfig{})
	if err := s.client.Health(t.Context()); err != nil { // so that Serve has seen its own
		t.Fatal(err)
	}
	if err := os.Remove(s.path); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(s.path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	if m := mode(t, s.path); m&os.ModeSocket == 0 {
		t.Errorf("what is there now: %v", m)
	}
}

// TestServeGrace: a request that is under way is answered, and one that takes too long does not hold the end up.
func TestServeGrace(t *testing.T) {
	for _, long := range []bool{false, true} {
		s := start(t, ServerConfig{Grace: map[bool]time.Duration{false: time.Minute, true: 50 * time.Millisecond}[long]})
		s.network(t, "lan")
		s.mu.Lock()
		s.slow = make(chan struct{})
		s.mu.Unlock()
		got := make(chan error, 1)
		go func() {
			_, err := s.client.Attach(context.Background(), "wan", AttachmentSpec{Lifetime: LifetimeSession})
			got <- err
		}()
		s.slowed(t)
		stopped := make(chan error, 1)
		go func() { stopped <- s.stop() }()
		if !long {
			time.Sleep(20 * time.Millisecond)
			close(s.slow)
		}
		if err := <-stopped; err != nil {
			t.Error(err)
		}
		err := <-got
		if !long && CodeOf(err) != CodeNotFound || long && !errors.Is(err, ErrNoNode) {
			t.Errorf("long %v: %v", long, err)
		}
		if long {
			close(s.slow)
		}
	}
}

func TestPaths(t *testing.T) {
	type env map[string]string
	owned := func(dir string, uid int) bool { return dir == "/run/user/1000" && uid == 1000 }
	for _, c := range []struct {
		uid    int
		env    env
		socket string // or the error's beginning
		state  string
	}{
		{0, env{"XDG_RUNTIME_DIR": "/run/user/0", "HOME": "/root"}, "/run/patchbay/node.sock", "/var/lib/patchbay"},
		{1000, env{"XDG_RUNTIME_DIR": "/x", "XDG_STATE_HOME": "/s", "HOME": "/h"}, "/x/patchbay/node.sock", "/s/patchbay"},
		{1000, env{"HOME": "/h"}, "/run/user/1000/patchbay/node.sock", "/h/.local/state/patchbay"},
		{1001, env{}, "socket: XDG_RUNTIME_DIR is not set, and /run/user/1001 is not yours", "state: neither XDG_STATE_HOME nor HOME is set"},
		{1001, env{"XDG_RUNTIME_DIR": "run", "XDG_STATE_HOME": "s"}, `XDG_RUNTIME_DIR="run" is relative`, `XDG_STATE_HOME="s" is relative`},
		{1001, env{SocketEnv: "/my.sock", "HOME": "h"}, "/my.sock", `HOME="h" is relative`},
		{0, env{SocketEnv: "my.sock"}, `PATCHBAY_SOCKET="my.sock" is relative`, "/var/lib/patchbay"},
	} {
		get := func(k string) string { return c.env[k] }
		socket, err := defaultSocket(get, c.uid, owned)
		if err != nil {
			socket, _, _ = strings.Cut(err.Error(), ";")
		}
		state, err := defaultStateDir(get, c.uid)
		if err != nil {
			state, _, _ = strings.Cut(err.Error(), ";")
		}
		if socket != c.socket || state != c.state {
			t.Errorf("uid %d, %v: %s and %s, want %s and %s", c.uid, c.env, socket, state, c.socket, c.state)
		}
	}
	dir := t.TempDir()
	for perm, want := range map[os.FileMode]bool{0o700: true, 0o755: true, 0o770: false, 0o777: false} {
		if err := os.Chmod(dir, perm); err != nil {
			t.Fatal(err)
		}
		if got := ownedBy(dir, os.Geteuid()); got != want {
			t.Errorf("%v: %v", perm, got)
		}
	}
	if ownedBy(dir, os.Geteuid()+1) || ownedBy(dir+"/none", os.Geteuid()) {
		t.Error("what is not ours passes")
	}
}

// TestCloseStream holds that the socket of a machine goes with its listener, whichever node has made it, and that another's stays.
func TestCloseStream(t *testing.T) {
	gone := func(path string) bool {
		_, err := os.Lstat(path)
		return errors.Is(err, fs.ErrNotExist)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "vm.sock")
	open := func() *net.UnixListener {
		t.Helper()
		l, err := ListenStream(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	handOver := func() *net.UnixListener {
		t.Helper()
		old := open()
		f, err := old.File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		l, err := net.FileListener(f)
		if err != nil {
			t.Fatal(err)
		}
		old.SetUnlinkOnClose(false)
		old.Close()
		return l.(*net.UnixListener)
	}
	for name, l := range map[string]func() *net.UnixListener{"its own": open, "handed over": handOver} {
		if err := CloseStream(l()); err != nil || !gone(path) {
			t.Errorf("%s: %v, gone %t", name, err, gone(path))
		}
	}
	l := open()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	open()
	if err := CloseStream(l); err != nil || gone(path) {
		t.Errorf("somebody else's socket: %v, gone %t", err, gone(path))
	}
	path = filepath.Join(dir, "file")
	l = open()
	if err := errors.Join(os.Remove(path), os.WriteFile(path, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := CloseStream(l); err != nil || gone(path) {
		t.Errorf("what is no socket: %v", err)
	}
	path = filepath.Join(dir, "sub", "vm.sock")
	l = open()
	if err := os.RemoveAll(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	if err := CloseStream(l); err != nil {
		t.Errorf("its directory is gone: %v", err)
	}
}
