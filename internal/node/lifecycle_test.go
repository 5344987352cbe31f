package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"patchbay/internal/edge"
	"patchbay/internal/testbed"
	"patchbay/internal/testbed/probe"
)

var (
	sub4 = netip.MustParsePrefix("10.77.0.0/24")
	sub6 = netip.MustParsePrefix("fd77::/64")
)

func subnets() []netip.Prefix { return []netip.Prefix{sub4, sub6} }

// empty holds that nothing of any container is left in the network, and so many ports, of the gateway.
func empty(t *testing.T, n *Network, ports int) {
	t.Helper()
	st := n.Status()
	if len(st.Containers) != 0 || len(st.Ports) != ports || len(st.FDB) != ports {
		t.Errorf("left: containers %+v, ports %+v, FDB %+v; want %d", st.Containers, st.Ports, st.FDB, ports)
	}
	for _, p := range n.pools {
		if l := p.Leases(); len(l) > 0 {
			t.Errorf("leases left: %+v", l)
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.attachments) != 0 {
		t.Errorf("names left: %v", n.attachments)
	}
}

// holds reports whether somebody has the address leased.
func holds(n *Network, a netip.Addr) bool {
	for _, p := range n.pools {
		if p.Prefix().Contains(a) {
			_, ok := p.Holder(a)
			return ok
		}
	}
	return false
}

// bindable reports whether the host's port can be bound, over TCP and UDP.
func bindable(t *testing.T, port int) bool {
	t.Helper()
	addr := fmt.Sprintf(":%d", port)
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return false
	}
	l.Close()
	p, err := net.ListenPacket("udp", addr)
	if err != nil {
		return false
	}
	p.Close()
	return true
}

// TestContainerGone ends a container and holds that its name, addresses, port, published ports and neighbour entries are gone, and that the next one can
// have them all.
func TestContainerGone(t *testing.T) {
	testbed.Leaks(t)
	n := newNet(t, NetworkConfig{Subnets: subnets()})
	watcher := newBox(t, n, ContainerConfig{AttachConfig: AttachConfig{Name: "watcher"}})
	start := func() *box {
		return newBox(t, n, ContainerConfig{AttachConfig: AttachConfig{Name: "web", Addrs: []netip.Addr{netip.MustParseAddr("10.77.0.9"), netip.MustParseAddr("fd77::9")}, Publish: specs(t, "8080:80", "8081-8084:81-84/udp", "127.0.0.1:8085:85")}})
	}
	reachable := func(want bool) {
		t.Helper()
		inside := []probe.Attempt{{Net: "tcp", Addr: "web:80"}, {Net: "tcp", Addr: "10.77.0.9:80"}, {Net: "udp", Addr: "[fd77::9]:80"}}
		for _, o := range watcher.do(ask{Try: inside}).Outcomes {
			if o.OK() != want {
				t.Errorf("%v; want reached: %v", o, want)
			}
		}
		for _, a := range []probe.Attempt{{Net: "tcp", Addr: "127.0.0.1:8080"}, {Net: "udp", Addr: "[::1]:8081"}, {Net: "tcp", Addr: "127.0.0.1:8085"}} {
			if o := probe.Try(a); o.OK() != want {
				t.Errorf("published: %v; want reached: %v", o, want)
			}
		}
	}
	for range 2 {
		web := start()
		web.do(ask{Probe: []string{":80", ":81", ":85"}})
		reachable(true)
		if len(n.sw.Ports()) != 3 || !holds(n, web.addrs[0]) || bindable(t, 8080) || bindable(t, 8083) {
			t.Error("the container has not what it is to have")
		}
		web.end()
		for port := 8080; port <= 8085; port++ {
			if !bindable(t, port) {
				t.Errorf("port %d is still bound", port)
			}
		}
		if len(n.sw.Ports()) != 2 || holds(n, web.addrs[0]) || holds(n, web.addrs[1]) {
			t.Errorf("left: ports %+v, leases %v %v", n.sw.Ports(), holds(n, web.addrs[0]), holds(n, web.addrs[1]))
		}
		reachable(false)
	}
	watcher.end()
	empty(t, n, 1)
}

// TestCloseWithContainers closes a network whose containers run, talk and hold connections.
func TestCloseWithContainers(t *testing.T) {
	testbed.Leaks(t)
	_, addr := outsideLoad(t)
	before := measure()
	n, err := NewNetwork(t.Context(), NetworkConfig{Name: "closing"})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	var boxes []*box
	for i := range 4 {
		b := newBox(t, n, ContainerConfig{AttachConfig: AttachConfig{Publish: specs(t, fmt.Sprintf("%d:80", 8080+i))}})
		b.do(ask{Flows: &flows{Addr: addr, Open: 20, Rounds: 1, Size: 100}})
		boxes = append(boxes, b)
	}
	busy := make(chan error, 1)
	go func() {
		_, err := boxes[0].try(ask{Flows: &flows{Addr: addr, Open: 1, Rounds: 1 << 30, Size: 1 << 20}})
		busy <- err
	}()
	time.Sleep(200 * time.Millisecond)
	start := time.Now()
	if err := n.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	t.Logf("closed four busy containers in %v", time.Since(start))
	if err := <-busy; err == nil {
		t.Error("the command lived on")
	}
	for _, b := range boxes {
		if st, err := b.Wait(); err != nil || st.ExitCode() != 128+9 {
			t.Errorf("%s: %v, %v; want it killed", b.name, st, err)
		}
		b.hangUp()
	}
	empty(t, n, 0)
	if err := n.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	if _, err := n.Start(t.Context(), ContainerConfig{Process: edge.Spec{Argv: []string{"true"}}}); err == nil || !strings.Contains(err.Error(), "closed") {
		t.Errorf("start on a closed network: %v", err)
	}
	backTo(t, before, 5*time.Second)
}

// TestCloseWhileStarting closes networks at any moment of a start: either there was a container, which is ended, or an error, and nothing is left.
func TestCloseWhileStarting(t *testing.T) {
	testbed.Leaks(t)
	testbed.RequireTUN(t)
	rounds := 30
	if testing.Short() {
		rounds = 10
	}
	came := 0
	for i := range rounds {
		n, err := NewNetwork(t.Context(), NetworkConfig{Name: "closing"})
		if err != nil {
			t.Fatal(err)
		}
		type started struct {
			c   *Container
			err error
		}
		res := make(chan started, 2)
		for range 2 {
			go func() {
				c, err := n.Start(context.Background(), ContainerConfig{Process: edge.Spec{Argv: []string{"sleep", "1000"}}})
				res <- started{c, err}
			}()
		}
		time.Sleep(time.Duration(i) * 2 * time.Millisecond)
		if err := n.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		for range 2 {
			switch r := <-res; {
			case r.err != nil && strings.Contains(r.err.Error(), "\n"):
				t.Errorf("more than one line: %q", r.err)
			case r.err == nil:
				came++
				if st, err := r.c.Wait(); err != nil || st.ExitCode() != 128+9 {
					t.Errorf("%v, %v; want it killed", st, err)
				}
			}
		}
		empty(t, n, 0)
	}
	t.Logf("%d of %d containers came up before the end", came, 2*rounds)
}

// TestStartStop starts and ends a hundred containers in a row.
func TestStartStop(t *testing.T) {
	testbed.Leaks(t)
	n := newNet(t, NetworkConfig{Subnets: subnets()})
	one := func() {
		c, err := n.Start(t.Context(), ContainerConfig{AttachConfig: AttachConfig{Name: "web", Publish: specs(t, "8080:80")}, Process: edge.Spec{Argv: []string{"true"}}})
		if err != nil {
			t.Fatal(err)
		}
		if st, err := c.Wait(); err != nil || st.ExitCode() != 0 {
			t.Fatalf("%v, %v", st, err)
		}
	}
	count := 100
	if testing.Short() {
		count = 30
	}
	for range 5 {
		one()
	}
	before := measure()
	start := time.Now()
	for range count {
		one()
	}
	t.Logf("%v a container", (time.Since(start) / time.Duration(count)).Round(time.Microsecond))
	backTo(t, before, 5*time.Second)
	empty(t, n, 1)
}

// TestStartFails makes Start fail at each of its steps, and holds that the error names what is wrong and nothing is left.
func TestStartFails(t *testing.T) {
	testbed.Leaks(t)
	taken, err := net.Listen("tcp", ":8099")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	notExec := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(notExec, []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	n := newNet(t, NetworkConfig{Subnets: subnets()})
	first := newBox(t, n, ContainerConfig{AttachConfig: AttachConfig{Name: "first", Addrs: []netip.Addr{netip.MustParseAddr("10.77.0.9")}, Publish: specs(t, "8080:80", "8081:81/udp")}})
	ok := edge.Spec{Argv: []string{"true"}}
	addr := func(s string) []netip.Addr { return []netip.Addr{netip.MustParseAddr(s)} }
	cases := []struct {
		what   string
		cfg    ContainerConfig
		says   []string
		status int
	}{
		{"name taken", ContainerConfig{AttachConfig: AttachConfig{Name: "First"}, Process: ok}, []string{"first", "taken"}, 0},
		{"not a name", ContainerConfig{AttachConfig: AttachConfig{Name: "a.b"}, Process: ok}, []string{`"a.b"`}, 0},
		{"address taken", ContainerConfig{AttachConfig: AttachConfig{Name: "x", Addrs: addr("10.77.0.9")}, Process: ok}, []string{"10.77.0.9", "first"}, 0},
		{"gateway's address", ContainerConfig{AttachConfig: AttachConfig{Name: "x", Addrs: addr("10.77.0.1")}, Process: ok}, []string{"10.77.0.1", "gateway"}, 0},
		{"address elsewhere", ContainerConfig{AttachConfig: AttachConfig{Name: "x", Addrs: addr("10.78.0.9")}, Process: ok}, []string{"10.78.0.9"}, 0},
		{"IPv6 address elsewhere, after IPv4 is leased", ContainerConfig{AttachConfig: AttachConfig{Name: "x", Addrs: addr("fd78::9")}, Process: ok}, []string{"fd78::9"}, 0},
		{"port published by another", ContainerConfig{AttachConfig: AttachConfig{Name: "x", Publish: specs(t, "8082:82", "8080:80")}, Process: ok}, []string{"8080"}, 0},
		{"UDP port published by another", ContainerConfig{AttachConfig: AttachConfig{Name: "x", Publish: specs(t, "8082:82", "8081:80/udp")}, Process: ok}, []string{"8081"}, 0},
		{"port of another program in a range", ContainerConfig{AttachConfig: AttachConfig{Name: "x", Publish: specs(t, "8082:82", "8095-8099:95-99")}, Process: ok}, []string{"8099"}, 0},
		{"MAC taken", ContainerConfig{AttachConfig: AttachConfig{Name: "x", MAC: first.mac}, Process: ok}, []string{first.mac.String()}, 0},
		{"group MAC", ContainerConfig{AttachConfig: AttachConfig{Name: "x", MAC: [6]byte{1, 2, 3, 4, 5, 6}}, Process: ok}, []string{"01:02:03:04:05:06"}, 0},
		{"too many queues", ContainerConfig{AttachConfig: AttachConfig{Name: "x", Queues: 1000}, Process: ok}, []string{"queues"}, edge.StatusFailed},
		{"no command", ContainerConfig{AttachConfig: AttachConfig{Name: "x"}}, []string{"command"}, edge.StatusFailed},
		{"command not found", ContainerConfig{AttachConfig: AttachConfig{Name: "x", Publish: specs(t, "8082:82")}, Process: edge.Spec{Argv: []string{"no-such-command"}}}, []string{"no-such-command"}, edge.StatusNotFound},
		{"command not executable", ContainerConfig{AttachConfig: AttachConfig{Name: "x", Publish: specs(t, "8082:82/udp")}, Process: edge.Spec{Argv: []string{notExec}}}, []string{notExec}, edge.StatusNotExecutable},
		{"no such directory", ContainerConfig{AttachConfig: AttachConfig{Name: "x"}, Process: edge.Spec{Argv: []string{"true"}, Dir: "/no/such"}}, []string{"/no/such"}, 0},
		{"long host name", ContainerConfig{AttachConfig: AttachConfig{Name: "x", Hostname: strings.Repeat("h", 65)}, Process: ok}, []string{"hhh"}, edge.StatusFailed},
	}
	try := func(i int) {
		c := cases[i]
		ctr, err := n.Start(t.Context(), c.cfg)
		if err == nil {
			t.Errorf("%s: no error", c.what)
			_ = ctr.Close()
			return
		}
		for _, s := range c.says {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%s: %v; want it to say %q", c.what, err, s)
			}
		}
		if strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: more than one line: %q", c.what, err)
		}
		var e *edge.Error
		if c.status != 0 && (!errors.As(err, &e) || e.Status != c.status) {
			t.Errorf("%s: %v; want status %d", c.what, err, c.status)
		}
		if ps := n.sw.Ports(); len(ps) != 2 || holds(n, netip.MustParseAddr("10.77.0.10")) && c.cfg.Name == "x" {
			t.Errorf("%s: left: %+v", c.what, ps)
		}
		for _, port := range []int{8082, 8095, 8098} {
			if !bindable(t, port) {
				t.Errorf("%s: port %d is still bound", c.what, port)
			}
		}
	}
	for i := range cases {
		try(i)
	}
	before := measure()
	for range 3 {
		for i := range cases {
			try(i)
		}
	}
	backTo(t, before, 5*time.Second)
	// The first container did not notice.
	first.do(ask{Probe: []string{":80"}})
	if o := probe.Try(probe.Attempt{Net: "tcp", Addr: "127.0.0.1:8080"}); !o.OK() {
		t.Errorf("%v", o)
	}
	for _, p := range n.pools {
		for _, r := range p.Leases() {
			if r.Attachment != "first" {
				t.Errorf("lease left: %+v", r)
			}
		}
	}
	first.end()
	empty(t, n, 1)
}

// TestNetworkFails holds that a network that cannot be made says why and leaves nothing.
func TestNetworkFails(t *testing.T) {
	testbed.Leaks(t)
	testbed.RequireTUN(t)
	ext := testbed.NewExternal(t)
	p := func(s string) netip.Prefix { return netip.MustParsePrefix(s) }
	for _, c := range []struct {
		what string
		cfg  NetworkConfig
		says string
	}{
		{"no name", NetworkConfig{}, "name"},
		{"clash with a route", NetworkConfig{Name: "x", Subnets: []netip.Prefix{netip.PrefixFrom(ext.HostAddr4, 24).Masked()}}, ext.HostLink},
		{"two of a kind", NetworkConfig{Name: "x", Subnets: []netip.Prefix{sub4, p("10.78.0.0/24")}}, "same IP version"},
		{"overlap", NetworkConfig{Name: "x", Subnets: []netip.Prefix{sub4, p("10.77.0.0/25")}}, "overlap"},
		{"IPv6 at a small MTU", NetworkConfig{Name: "x", Subnets: []netip.Prefix{sub6}, MTU: 1000}, "1280"},
		{"MTU", NetworkConfig{Name: "x", MTU: 70000}, "70000"},
		{"resolver", NetworkConfig{Name: "x", DNS: []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:53")}}, "0.0.0.0"},
	} {
		n, err := NewNetwork(t.Context(), c.cfg)
		if err == nil {
			t.Errorf("%s: no error", c.what)
			n.Close()
			continue
		}
		if !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %q; want one line that says %q", c.what, err, c.says)
		}
	}
}

// TestOneIPVersion holds that a network of one IP version alone works.
func TestOneIPVersion(t *testing.T) {
	testbed.Leaks(t)
	ext, _ := outsideLoad(t)
	for _, p := range subnets() {
		n := newNet(t, NetworkConfig{Subnets: []netip.Prefix{p}})
		b, c := newBox(t, n, ContainerConfig{AttachConfig: AttachConfig{Name: "b"}}), newBox(t, n, ContainerConfig{AttachConfig: AttachConfig{Name: "c"}})
		out := ext.Addr4
		if p.Addr().Is6() {
			out = ext.Addr6
		}
		b.reach(probe.Attempt{Net: "ping", Addr: out.String()}, probe.Attempt{Net: "ping", Addr: "c"}, probe.Attempt{Net: "ping", Addr: "gateway.patchbay.internal"})
		if len(c.addrs) != 1 {
			t.Errorf("addresses %v", c.addrs)
		}
	}
}

// TestFlowsGoWithTheirContainer kills a container that has connections open to a server that closes when its client does, and holds that NAT's table is empty then.
func TestFlowsGoWithTheirContainer(t *testing.T) {
	testbed.Leaks(t)
	_, addr := outsideLoad(t)
	n := newNet(t, NetworkConfig{})
	b := newBox(t, n, ContainerConfig{AttachConfig: AttachConfig{Name: "b"}})
	b.do(ask{Flows: &flows{Addr: addr, Open: 50, Rounds: 1, Size: 100}})
	if f := n.Status().NAT.TCPFlows; f != 50 {
		t.Errorf("%d flows, want 50", f)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	start := time.Now()
	if !testbed.Wait(30*time.Second, func() bool { return n.Status().NAT.TCPFlows == 0 }) {
		t.Errorf("%d flows of a container that is gone", n.Status().NAT.TCPFlows)
	}
	t.Logf("gone after %v", time.Since(start))
}
