package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/netns"
	"patchbay/internal/testbed"
)

// ifnames is the interfaces of the namespace but lo, sorted.
func (s *space) ifnames() (names []string) {
	s.t.Helper()
	h, err := netns.OpenPID(s.pid)
	if err != nil {
		s.t.Fatal(err)
	}
	defer h.Close()
	if err := h.Do(func() error {
		is, err := net.Interfaces()
		for _, i := range is {
			if i.Name != "lo" {
				names = append(names, i.Name)
			}
		}
		return err
	}); err != nil {
		s.t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

// attached is the interfaces that the daemon says it has in the namespace, sorted.
func (d *daemonProc) attached(s *space) (names []string) {
	d.t.Helper()
	as, err := d.client().Attachments(d.t.Context(), "")
	if err != nil {
		d.t.Fatal(err)
	}
	for _, a := range as {
		if a.PID == s.pid {
			names = append(names, a.IfName)
		}
	}
	slices.Sort(names)
	return names
}

// TestManyAttachAtOnce holds that those who attach one namespace at the same time get an interface each, or a reason.
func TestManyAttachAtOnce(t *testing.T) {
	testbed.Leaks(t)
	const many = 8
	d := startDaemonWithLogin(t)
	s := newSpace(t, d.login)
	for round := range 5 {
		var wg sync.WaitGroup
		for i := range many {
			wg.Go(func() {
				cmd := d.command("attach", "default", "--pid", fmt.Sprint(s.pid), "--name", fmt.Sprintf("r%dn%d", round, i))
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("round %d: attach %d: %v: %s", round, i, err, out)
				}
			})
		}
		wg.Wait()
		inside, known := s.ifnames(), d.attached(s)
		if !slices.Equal(inside, known) || len(inside) != many {
			t.Errorf("round %d: inside are %v, the daemon has %v", round, inside, known)
		}
		for i := range many {
			wg.Go(func() {
				if out, err := d.command("detach", fmt.Sprintf("r%dn%d", round, i)).CombinedOutput(); err != nil {
					t.Errorf("round %d: detach %d: %v: %s", round, i, err, out)
				}
			})
		}
		wg.Wait()
		if left := s.ifnames(); len(left) > 0 {
			t.Fatalf("round %d: left inside: %v", round, left)
		}
	}
}

// TestAttachIsKilled kills `patchbay attach` at every stage: what is left is a whole attachment, or nothing.
func TestAttachIsKilled(t *testing.T) {
	testbed.Leaks(t)
	d := startDaemonWithLogin(t)
	s := newSpace(t, d.login)
	whole := 0
	const tries = 60
	for i := range tries {
		name := fmt.Sprintf("n%d", i)
		cmd := d.command("attach", "default", "--pid", fmt.Sprint(s.pid), "--name", name, "-p", "8099:80")
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rand.IntN(80)) * time.Millisecond)
		_ = cmd.Process.Signal(unix.SIGKILL)
		_ = cmd.Wait()
		// It may be whole, or vanish when the daemon sees the client's end.
		if !testbed.Wait(10*time.Second, func() bool {
			as, err := d.client().Attachments(t.Context(), "")
			return err == nil && (len(as) == 0 || len(as) == 1 && d.up(name))
		}) {
			t.Fatalf("try %d: neither there nor gone: %s", i, d.do("ps"))
		}
		if d.up(name) {
			whole++
			d.do("detach", name)
		}
		if !testbed.Wait(5*time.Second, func() bool { return len(s.ifnames()) == 0 }) {
			t.Fatalf("try %d: left inside: %v; %s", i, s.ifnames(), d.do("ps"))
		}
		if p := d.do("publish", "ls"); strings.Contains(p, "8099") {
			t.Fatalf("try %d: still published: %s", i, p)
		}
	}
	t.Logf("%d of %d were whole", whole, tries)
}
