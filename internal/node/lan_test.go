package node

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"patchbay/internal/testbed"
	"patchbay/internal/testbed/probe"
)

// balanced holds the switch's invariant for every port, once nothing is under way: what was received was sent on to one, or to all, or dropped.
func balanced(t *testing.T, n *Network) {
	t.Helper()
	var off []string
	if !testbed.Wait(5*time.Second, func() bool {
		off = nil
		for _, p := range n.Status().Ports {
			if p.RxFrames != p.Unicast+p.Flooded+p.Dropped {
				off = append(off, fmt.Sprintf("%+v", p))
			}
		}
		return len(off) == 0
	}) {
		t.Errorf("rx is not unicast + flooded + dropped: %s", strings.Join(off, "; "))
	}
	st := n.Status()
	for _, p := range st.Ports {
		if p.RxFrames == 0 || p.TxFrames == 0 {
			t.Errorf("port %s saw no traffic: %+v", p.Name, p)
		}
	}
	t.Logf("drops: %+v", st.Drops)
}

// TestContainersTalk has containers of one network talk directly: neighbour discovery, multicast, TCP of both IP versions, at the usual and at a jumbo MTU.
func TestContainersTalk(t *testing.T) {
	testbed.RequirePing(t)
	for _, mtu := range []int{1500, 9000} {
		t.Run(fmt.Sprint(mtu), func(t *testing.T) {
			testbed.Leaks(t)
			n := newNet(t, NetworkConfig{MTU: mtu})
			a, b := newBox(t, n, ContainerConfig{AttachConfig: AttachConfig{Name: "a"}}), newBox(t, n, ContainerConfig{AttachConfig: AttachConfig{Name: "b"}})
			c := newBox(t, n, ContainerConfig{AttachConfig: AttachConfig{Name: "c"}})
			b.do(ask{Listen: ":7"})
			a.reach(probe.Attempt{Net: "ping", Addr: b.addrs[0].String()}, probe.Attempt{Net: "ping", Addr: b.addrs[1].String()})
			if out := a.run("ip", "-6", "neigh", "show", "to", b.addrs[1].String()); !strings.Contains(out, b.mac.String()) {
				t.Errorf("neighbour discovery: %q, want %s", out, b.mac)
			}
			// The largest packet that may not be cut passes, and one byte more does not leave.
			ping := func(to netip.Addr, size int) int {
				return a.do(ask{Exec: []string{"ping", "-c1", "-W1", "-n", "-M", "do", "-s", fmt.Sprint(size), to.String()}}).Code
			}
			for _, p := range []struct {
				to   netip.Addr
				over int
			}{{b.addrs[0], 28}, {b.addrs[1], 48}, {addrOf(n.gwAddrs, 4), 28}, {addrOf(n.gwAddrs, 6), 48}} {
				if code := ping(p.to, mtu-p.over); code != 0 {
					t.Errorf("ping of %d bytes to %s: status %d", mtu-p.over, p.to, code)
				}
				if code := ping(p.to, mtu-p.over+1); code == 0 {
					t.Errorf("ping of %d bytes to %s passed", mtu-p.over+1, p.to)
				}
			}
			move(t, a.agent, transfer{Addr: b.v4(7), Up: bulk() / 4, Down: bulk() / 4, Seed: 1})
			move(t, a.agent, transfer{Addr: b.v6(7), Up: bulk() / 4, Down: bulk() / 4, Seed: 2})

			// What mDNS and the like send reaches every other container.
			for _, group := range []string{"224.0.0.251:5353", "[ff02::fb%eth0]:5353"} {
				b.do(ask{Hear: group})
				c.do(ask{Hear: group})
				a.do(ask{Say: &say{Group: group, Text: "who is there"}})
				for _, x := range []*box{b, c} {
					if r, err := x.try(ask{Heard: true}); err != nil || !strings.HasPrefix(r.Out, "who is there from ") {
						t.Errorf("%s heard %q of %s: %v", x.name, r.Out, group, err)
					}
				}
			}
			balanced(t, n)
			for _, e := range n.Status().FDB {
				if !e.Static {
					t.Errorf("the switch has learned %+v; every MAC here is known beforehand", e)
				}
			}
		})
	}
}

// TestDHCP gets a lease by busybox' client: the address the container has already, which is its own.
func TestDHCP(t *testing.T) {
	testbed.Leaks(t)
	n := newNet(t, NetworkConfig{Name: "lan", Subnets: []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24"), netip.MustParsePrefix("fd77::/64")}})
	a := newBox(t, n, ContainerConfig{AttachConfig: AttachConfig{Name: "a", Addrs: []netip.Addr{netip.MustParseAddr("10.77.0.9")}}})
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n[ $1 = bound ] && env | sort\nexit 0\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	out := a.run(testbed.Tool(t, "udhcpc"), "-i", "eth0", "-f", "-q", "-n", "-t", "3", "-T", "2", "-s", script)
	lines := strings.Split(out, "\n")
	for _, want := range []string{"ip=10.77.0.9", "mask=24", "router=10.77.0.1", "dns=10.77.0.1", "mtu=1500", "serverid=10.77.0.1", "domain=lan.patchbay.internal"} {
		if !slices.Contains(lines, want) {
			t.Errorf("no %s in:\n%s", want, out)
		}
	}
}
