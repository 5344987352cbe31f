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

	"patchbay/internal/api"
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

// TestDaemonIsKilledUnderChanges kills the daemon while attachments are made and taken away: what was answered holds in the next one, what was not is whole or not at all, and
// nothing is left in the namespace or of the leases.
func TestDaemonIsKilledUnderChanges(t *testing.T) {
	testbed.Leaks(t)
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	d := startDaemonWithLogin(t)
	s := newSpace(t, d.login)
	d.do("network", "create", "tight", "--subnet", "10.66.0.0/27")
	const many = 6
	for round := range rounds {
		var mu sync.Mutex
		there, gone := map[string]bool{}, map[string]bool{} // what was answered
		var wg sync.WaitGroup
		for i := range many {
			wg.Go(func() {
				name := fmt.Sprintf("r%dn%d", round, i)
				port := fmt.Sprintf("%d:80", 9000+i)
				if d.command("attach", "tight", "--pid", fmt.Sprint(s.pid), "--name", name, "-p", port).Run() != nil {
					return
				}
				mu.Lock()
				there[name] = true
				mu.Unlock()
				if i%2 == 0 {
					return
				}
				mu.Lock()
				delete(there, name)
				mu.Unlock()
				if d.command("detach", name).Run() == nil {
					mu.Lock()
					gone[name] = true
					mu.Unlock()
				}
			})
		}
		time.Sleep(time.Duration(50+rand.IntN(400)) * time.Millisecond)
		d.end(unix.SIGKILL)
		wg.Wait()
		d.start()
		// Waiting ones come up or vanish.
		settled := func() bool {
			as, err := d.client().Attachments(t.Context(), "")
			if err != nil {
				return false
			}
			known := map[string]bool{}
			for _, a := range as {
				if a.State != api.StateUp || gone[a.Name] {
					return false
				}
				known[a.Name] = true
			}
			for name := range there {
				if !known[name] {
					return false
				}
			}
			return slices.Equal(s.ifnames(), d.attached(s))
		}
		if !testbed.Wait(10*time.Second, settled) {
			t.Fatalf("round %d: attached for certain: %v, detached for certain: %v; inside are %v:\n%s", round, there, gone, s.ifnames(), d.do("ps"))
		}
		for _, a := range must(d.client().Attachments(t.Context(), "")) {
			if len(a.Publish) != 1 || a.Publish[0].Error != "" {
				t.Errorf("round %d: ports of %s: %+v", round, a.Name, a.Publish)
			}
			d.do("detach", a.Name)
		}
		if left := s.ifnames(); len(left) > 0 {
			t.Fatalf("round %d: left inside: %v", round, left)
		}
	}
	// Every address of the subnet can be had, so no lease was left behind: network, gateway, host alias and broadcast take four.
	for i := range 28 {
		d.do("attach", "tight", "--pid", fmt.Sprint(s.pid), "--name", fmt.Sprintf("all%d", i))
	}
	d.refused([]string{"attach", "tight", "--pid", fmt.Sprint(s.pid), "--name", "one-too-many"}, "tight")
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestDetachRightAfterRestart holds that a detach takes an interface away which the new daemon has not opened yet.
func TestDetachRightAfterRestart(t *testing.T) {
	testbed.Leaks(t)
	const many = 8
	d := startDaemonWithLogin(t)
	s := newSpace(t, d.login)
	for round := range 4 {
		var names []string
		for i := range many {
			names = append(names, fmt.Sprintf("r%dn%d", round, i))
			d.do("attach", "default", "--pid", fmt.Sprint(s.pid), "--name", names[i])
		}
		d.end(unix.SIGKILL)
		d.start()
		d.do(append([]string{"detach"}, names...)...)
		if !testbed.Wait(10*time.Second, func() bool { return len(s.ifnames()) == 0 }) {
			t.Fatalf("round %d: left inside: %v; the daemon has\n%s", round, s.ifnames(), d.do("ps"))
		}
	}
}
