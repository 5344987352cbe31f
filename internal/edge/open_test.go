package edge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/netns"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	"patchbay/tap"
)

// space is namespaces of somebody else's, with a process that sleeps in them.
type space struct {
	t      *testing.T
	pid    int
	target *netns.Target
}

// newSpace makes them with `unshare FLAGS…`.
func newSpace(t *testing.T, flags ...string) *space {
	t.Helper()
	testbed.RequireTUN(t)
	cmd := exec.Command(testbed.Tool(t, "unshare"), append(flags, testbed.Tool(t, "sleep"), "1000000")...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s := &space{t: t, pid: cmd.Process.Pid}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	testbed.Eventually(t, 10*time.Second, func() bool {
		name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", s.pid))
		return string(name) == "sleep\n"
	})
	var err error
	if s.target, err = netns.OpenTarget(s.pid); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.target.Close() })
	return s
}

// do runs a command inside and returns what it wrote.
func (s *space) do(name string, args ...string) string {
	s.t.Helper()
	cmd := exec.Command(testbed.Tool(s.t, "nsenter"), append([]string{"-t", fmt.Sprint(s.pid), "-U", "-n", "--preserve-credentials", "--", testbed.Tool(s.t, name)}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

// open is OpenIn of one interface.
func (s *space) open(f Interface) (*tap.Handle, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	hs, _, err := OpenIn(ctx, s.target, []Interface{f})
	if err != nil {
		return nil, err
	}
	return hs[0], nil
}

// TestOpenInAtOnce holds that no two openers get one interface, whatever they ask for at the same time.
func TestOpenInAtOnce(t *testing.T) {
	s := newSpace(t, "-Urn")
	const openers = 6
	for _, f := range []Interface{{}, {Queues: 2}, {Queues: 2, ForcePlain: true}, {ForcePlain: true}, {Kind: tap.KindPacket}, {Name: "own0", Queues: 2}, {Name: "own0", Queues: 2, ForcePlain: true}} {
		var mu sync.Mutex
		got := make(map[string]bool)
		var hs []*tap.Handle
		var wg sync.WaitGroup
		for range openers {
			wg.Go(func() {
				h, err := s.open(f)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil && got[h.Name]:
					t.Errorf("%+v: two have %q", f, h.Name)
				case err == nil:
					got[h.Name] = true
				case f.Name == "" || !errors.Is(err, unix.EEXIST) || !strings.Contains(err.Error(), "--ifname"):
					t.Errorf("%+v: %v", f, err)
				}
				if h != nil {
					hs = append(hs, h)
				}
			})
		}
		wg.Wait()
		if n := len(got); (f.Name == "" && n != openers) || (f.Name != "" && n > 1) {
			t.Errorf("%+v: %d openers have %v", f, openers, got)
		}
		for _, h := range hs {
			h.Close()
		}
		testbed.Eventually(t, 10*time.Second, func() bool { return strings.Count(s.do("ip", "-o", "link"), "\n") == 1 })
	}
}

// TestOpenInLeavesNothing holds that an interface is not persistent until its owner says so, whether its opener closes it or dies.
func TestOpenInLeavesNothing(t *testing.T) {
	s := newSpace(t, "-Urn")
	h, err := s.open(Interface{Name: "eth0", Persist: true})
	if err != nil {
		t.Fatal(err)
	}
	h.Close()
	if l := s.do("ip", "-o", "link"); strings.Contains(l, "eth0") {
		t.Errorf("left behind: %s", l)
	}
	mac := wire.MAC{2, 0, 0, 0, 0, 9}
	if h, err = s.open(Interface{Name: "eth0", MAC: mac, Persist: true}); err != nil {
		t.Fatal(err)
	}
	if err := h.SetPersist(true); err != nil { // as the node does
		t.Fatal(err)
	}
	h.Close()
	if h, err = s.open(Interface{Name: "eth0", MAC: mac, Persist: true, Reopen: true}); err != nil {
		t.Fatal(err)
	}
	h.Close()
	if l := s.do("ip", "-o", "link"); !strings.Contains(l, "eth0") {
		t.Errorf("opening it again has ended it: %s", l)
	}
}

// TestReopenOfAnother holds that what has the name, or the name and the MAC, and is not the TAP that was left counts as gone.
func TestReopenOfAnother(t *testing.T) {
	s := newSpace(t, "-Urn")
	s.do("ip", "link", "add", "eth0", "address", "02:00:00:00:00:09", "type", "veth", "peer", "name", "peer0")
	before := s.do("ip", "-o", "link")
	for _, f := range []Interface{
		{Name: "eth0", MAC: wire.MAC{2, 0, 0, 0, 0, 9}, Reopen: true},
		{Name: "eth0", MAC: wire.MAC{2, 0, 0, 0, 0, 8}, Reopen: true},
		{Name: "eth1", MAC: wire.MAC{2, 0, 0, 0, 0, 9}, Reopen: true},
	} {
		h, err := s.open(f)
		if !errors.Is(err, tap.ErrGone) || h != nil || !strings.Contains(err.Error(), f.Name) {
			t.Errorf("%+v: %v", f, err)
		}
	}
	if now := s.do("ip", "-o", "link"); now != before {
		t.Errorf("touched:\n%s was\n%s", now, before)
	}
}

// TestOpenInEndsWithItsContext holds that a container which stops the process inside stops nobody else.
func TestOpenInEndsWithItsContext(t *testing.T) {
	s := newSpace(t, "-Urn")
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	done := make(chan struct{})
	defer func() { <-done }()
	go func() {
		defer close(done)
		for ctx.Err() == nil { // before it has come to its end
			for _, c := range children(os.Getpid()) {
				if cmd, _ := os.ReadFile(filepath.Join("/proc", fmt.Sprint(c), "cmdline")); strings.HasPrefix(string(cmd), edgeArg0+"\x00") {
					_ = syscall.Kill(c, syscall.SIGSTOP)
				}
			}
		}
	}()
	for ctx.Err() == nil { // now and then it is too quick
		hs, _, err := OpenIn(ctx, s.target, []Interface{{}})
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		closeDevices(hs)
	}
	if l := edges(); len(l) > 0 {
		t.Errorf("left behind: %v", l)
	}
}
