package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"patchbay/internal/netns"
	"patchbay/internal/testbed"
)

// resolver is a resolver that asks server from inside the namespace: one query over UDP for each lookup, and no second try.
func (s *space) resolver(server netip.Addr) *net.Resolver {
	s.t.Helper()
	h, err := netns.OpenPID(s.pid)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { h.Close() })
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (c net.Conn, err error) {
		err = h.Do(func() error {
			var d net.Dialer
			c, err = d.DialContext(ctx, network, net.JoinHostPort(server.String(), "53"))
			return err
		})
		return c, err
	}}
}

// lookup is the addresses of a name, in the order of the answer.
func lookup(r *net.Resolver, network, name string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return r.LookupNetIP(ctx, network, name)
}

// TestNames holds what a container's neighbors are called: by name and alias, until they leave.
//
//	[asker] ┐      ┌ [one] alias api
//	        lab ───┤
//	               └ [two] alias api
func TestNames(t *testing.T) {
	testbed.Leaks(t)
	d := startDaemonWithLogin(t)
	d.do("network", "create", "lab", "--subnet", "10.66.0.0/24", "--subnet", "fd66::/64")
	asker, _ := d.newAttached("lab", "asker")
	_, one := d.newAttached("lab", "one", "--alias", "api", "--alias", "v1-api")
	space2, two := d.newAttached("lab", "two", "--alias", "API")
	r := asker.resolver(netip.MustParseAddr("10.66.0.1"))

	for name, want := range map[string][]netip.Addr{
		"one.": one.Addrs, "ONE.": one.Addrs, "v1-api.": one.Addrs, "one.lab.patchbay.internal.": one.Addrs, "two.": two.Addrs,
		"api.": append(slices.Clone(one.Addrs), two.Addrs...), "api.lab.patchbay.internal.": append(slices.Clone(one.Addrs), two.Addrs...),
	} {
		got, err := lookup(r, "ip", name)
		slices.SortFunc(got, netip.Addr.Compare)
		slices.SortFunc(want, netip.Addr.Compare)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s is %v (%v), want %v", name, got, err, want)
		}
	}
	// Backwards.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if got, err := r.LookupAddr(ctx, one.Addrs[0].String()); err != nil || len(got) == 0 || !strings.HasPrefix(got[0], "one.") {
		t.Errorf("%s is called %v (%v), want one", one.Addrs[0], got, err)
	}
	// Everybody who shares an alias comes first now and then.
	first := map[netip.Addr]int{}
	for range 40 {
		got := strings.Fields(asker.do("dig", "+short", "+timeout=5", "@10.66.0.1", "A", "api"))
		if len(got) != 2 {
			t.Fatalf("api is %v", got)
		}
		first[netip.MustParseAddr(got[0])]++
	}
	if len(first) != 2 {
		t.Errorf("the answers do not rotate: %v", first)
	}
	// A name goes with its attachment, an alias with its last one.
	d.do("detach", "two")
	if got, err := lookup(r, "ip4", "api."); err != nil || !slices.Equal(got, one.Addrs[:1]) {
		t.Errorf("api is %v (%v), want %v", got, err, one.Addrs[:1])
	}
	d.do("detach", "one")
	for _, name := range []string{"one.", "two.", "api.", "v1-api.", "one.lab.patchbay.internal."} {
		if got, err := lookup(r, "ip", name); err == nil {
			t.Errorf("%s is still %v", name, got)
		}
	}
	// And comes again with the next one.
	again := d.attach("lab", "one", space2)
	if got, err := lookup(r, "ip4", "one."); err != nil || !slices.Contains(again.Addrs, got[0]) {
		t.Errorf("one is %v (%v), want %v", got, err, again.Addrs)
	}
	// Another network's names are its own.
	d.do("network", "create", "far", "--subnet", "10.67.0.0/24")
	d.newAttached("far", "hidden")
	if got, err := lookup(r, "ip", "hidden."); err == nil {
		t.Errorf("a name of another network is %v", got)
	}
	// Unless one is on that one too: whichever of its resolvers one asks, before a crash of the daemon and after it.
	hidden := d.inspect("far", "hidden")
	d.attach("far", "asker", asker)
	far := asker.resolver(netip.MustParseAddr("10.67.0.1"))
	for _, crash := range []bool{false, true} {
		if crash {
			d.end(syscall.SIGKILL)
			d.start()
			testbed.Eventually(t, 10*time.Second, func() bool { return len(d.attached(asker)) == 2 && d.up("hidden") && d.up("one") })
		}
		for name, want := range map[string]netip.Addr{"hidden.": hidden.Addrs[0], "hidden.far.patchbay.internal.": hidden.Addrs[0], "one.": again.Addrs[0], "one.lab.": again.Addrs[0]} {
			for of, r := range map[string]*net.Resolver{"lab": r, "far": far} {
				if got, err := lookup(r, "ip4", name); err != nil || !slices.Equal(got, []netip.Addr{want}) {
					t.Errorf("asked of %s, %s is %v (%v), want %s", of, name, got, err, want)
				}
			}
		}
	}
	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if got, err := r.LookupAddr(ctx, hidden.Addrs[0].String()); err != nil || !slices.Equal(got, []string{"hidden.far.patchbay.internal."}) {
		t.Errorf("%s is called %v (%v), want hidden", hidden.Addrs[0], got, err)
	}
	d.do("detach", "far/asker")
	if got, err := lookup(r, "ip", "hidden."); err == nil {
		t.Errorf("a name of a network that was left is %v", got)
	}
}

// TestNamesWhileAllChanges asks for one name all the time while networks and attachments come and go: no query fails or waits for that.
func TestNamesWhileAllChanges(t *testing.T) {
	testbed.Leaks(t)
	rounds := 200
	if testing.Short() {
		rounds = 20
	}
	d := startDaemonWithLogin(t)
	d.do("network", "create", "lab", "--subnet", "10.66.0.0/24", "--subnet", "fd66::/64")
	asker, _ := d.newAttached("lab", "asker")
	_, stays := d.newAttached("lab", "stays", "--alias", "shared")
	guest := newSpace(t, d.login)
	r := asker.resolver(netip.MustParseAddr("10.66.0.1"))

	var asked atomic.Int64
	var worst time.Duration
	failures := make(chan string, 10)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	late := lateness()
	wg.Go(func() {
		for ctx.Err() == nil {
			for _, name := range []string{"stays.", "shared.lab.patchbay.internal."} {
				began := time.Now()
				got, err := lookup(r, "ip4", name)
				worst = max(worst, time.Since(began))
				asked.Add(1)
				if err != nil || !slices.Contains(got, stays.Addrs[0]) {
					select {
					case failures <- fmt.Sprintf("%s is %v: %v", name, got, err):
					default: // ten are enough
					}
				}
			}
		}
	})
	d.changes(guest, rounds)
	cancel()
	wg.Wait()
	close(failures)
	for f := range failures {
		t.Error(f)
	}
	stall := late()
	t.Logf("%d queries during %d attachments, the slowest %v; threads were woken up to %v late", asked.Load(), rounds, worst.Round(time.Millisecond), stall.Round(time.Millisecond))
	if n := asked.Load(); n < int64(rounds) {
		t.Errorf("%d queries in all", n)
	}
	// Go's resolver asks again after 5 s: an answer in less was the first one's.
	if bound := 2*time.Second + 10*stall; worst > bound {
		t.Errorf("the slowest answer took %v, want at most %v", worst, bound)
	}
}

// changes attaches and detaches the namespace so many times, sharing an alias with one that stays, and makes and removes a network now and then.
func (d *daemonProc) changes(s *space, rounds int) {
	d.t.Helper()
	for i := range rounds {
		name := fmt.Sprintf("guest%d", i)
		d.do("attach", "lab", "--pid", fmt.Sprint(s.pid), "--name", name, "--alias", "shared")
		if i%20 == 0 {
			d.do("network", "create", name)
			d.do("network", "rm", name)
		}
		d.do("detach", name)
	}
}
