package dhcp

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	"patchbay/ipam"
	"patchbay/stack"
	vswitch "patchbay/switch"
	"patchbay/tap"
)

func TestMain(m *testing.M) { testbed.Main(m) }

// world is a container whose interface has no address yet, and the server on a real gateway.
//
//	[container] eth0 ── tap ── switch ── gateway 10.88.0.1 ── Server ── PoolLeaser ── ipam.Pool
type world struct {
	*testbed.NS
	mac   wire.MAC
	pool  *ipam.Pool
	drops *frame.DropCounters
	dir   string
}

type latePackets struct{ stack.PacketHandler }

func newWorld(t *testing.T, edit func(*Config, *PoolLeaser)) *world {
	t.Helper()
	testbed.RequireTUN(t)
	w := &world{NS: testbed.NewNS(t, "container"), drops: new(frame.DropCounters), dir: t.TempDir()}
	udp := new(latePackets)
	gateway, err := stack.New(stack.Config{
		MAC: wire.MAC{2, 0, 0x5e, 0, 0, 1}, Addrs: []netip.Prefix{netip.PrefixFrom(gw, 24)},
		Handlers: stack.Handlers{LocalUDP: map[uint16]stack.PacketHandler{ServerPort: udp}}, Drops: w.drops,
	})
	if err != nil {
		t.Fatal(err)
	}
	b := newBed(t, func(c *Config, l *PoolLeaser) {
		c.Network, c.Drops = gateway, w.drops
		if edit != nil {
			edit(c, l)
		}
	})
	w.pool = b.pool
	udp.PacketHandler = b.s
	sw := vswitch.New(vswitch.Config{})
	gwPort, err := sw.AddPort(gateway, vswitch.PortConfig{Name: "gateway"})
	if err != nil {
		t.Fatal(err)
	}
	gateway.Connect(func() frame.Sink { return sw.Ingress(gwPort) })
	var h *tap.Handle
	w.Do(func() {
		if h, err = tap.Open(tap.OpenConfig{Name: "eth0"}); err == nil {
			_, err = h.Configure(tap.IfConfig{Name: "eth0", MTU: 1450})
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	w.mac = h.MAC
	d, err := tap.New(tap.Config{Info: h.Info, FDs: h.FDs})
	if err != nil {
		t.Fatal(err)
	}
	port, err := sw.AddPort(d, vswitch.PortConfig{Name: "container", MAC: h.MAC})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- d.Serve(context.Background(), 0, sw.Ingress(port)) }()
	t.Cleanup(func() {
		b.s.Close()
		sw.RemovePort(port)
		d.Close()
		<-served
		sw.RemovePort(gwPort)
		gateway.Close()
	})
	return w
}

// script is what udhcpc calls: it notes what it was told and sets the address, so that renewal is by unicast from it.
const script = `#!/bin/sh
case $1 in bound|renew) ip addr replace $ip/$mask dev $interface; ip route replace default via $router;; deconfig) ip addr flush dev $interface;; esac
{ echo "event=$1"; env | grep -E '^(ip|subnet|mask|router|dns|domain|search|mtu|lease|serverid|hostname|message)='; echo; } >>$OUT
`

// udhcpc starts the client; its events are in the returned file.
func (w *world) udhcpc(t *testing.T, args ...string) (out string, cmd *exec.Cmd) {
	t.Helper()
	testbed.Tool(t, "ip")
	prog := filepath.Join(w.dir, "script")
	if err := os.WriteFile(prog, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	out = filepath.Join(w.dir, "events")
	_ = os.Remove(out)
	cmd = w.Command(testbed.Tool(t, "udhcpc"), append([]string{"-i", "eth0", "-f", "-s", prog, "-t", "3", "-T", "2"}, args...)...)
	cmd.Env = append(cmd.Environ(), "OUT="+out)
	log, err := os.Create(out + ".log") // not a buffer: the client may still write when the test reads
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("udhcpc: %s", read(log.Name()))
		}
	})
	return out, cmd
}

func read(path string) string {
	b, _ := os.ReadFile(path)
	return string(b)
}

func (w *world) pingGateway(t *testing.T) {
	t.Helper()
	if b, err := w.Command(testbed.Tool(t, "ping"), "-c", "1", "-W", "5", "10.88.0.1").CombinedOutput(); err != nil {
		t.Errorf("ping: %v\n%s", err, b)
	}
}

// TestUdhcpc takes a real client through a whole lease.
func TestUdhcpc(t *testing.T) {
	w := newWorld(t, nil)
	out, client := w.udhcpc(t, "-n", "-q", "-x", "hostname:guest", "-O", "search", "-O", "mtu")
	if err := client.Wait(); err != nil {
		t.Fatal(err)
	}
	leases := w.pool.Leases()
	if len(leases) != 1 || leases[0].MAC != w.mac || leases[0].Hostname != "guest" {
		t.Fatalf("leases %+v", leases)
	}
	events := read(out)
	for _, want := range []string{"event=bound", "ip=" + leases[0].Addr.String(), "mask=24", "subnet=255.255.255.0", "router=10.88.0.1", "dns=10.88.0.1",
		"mtu=1450", "domain=n.patchbay.internal", "search=n.patchbay.internal corp.example", "lease=3600", "serverid=10.88.0.1"} {
		if !strings.Contains(events, want+"\n") {
			t.Errorf("udhcpc was not told %s:\n%s", want, events)
		}
	}
	// The gateway can be reached with it.
	w.pingGateway(t)
	// A second client on that MAC gets the same, and gives it back when told to.
	out, client = w.udhcpc(t)
	testbed.Eventually(t, 10*time.Second, func() bool { return strings.Contains(read(out), "event=bound") })
	// The client flushes its address as soon as it has sent the release, which by then must not wait for the gateway's ARP reply:
	// the kernel forgets the neighbours of a device with its last address, so the ping above does not count.
	w.pingGateway(t)
	if err := client.Process.Signal(syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	if want := "ip=" + leases[0].Addr.String() + "\n"; !strings.Contains(read(out), want) {
		t.Errorf("the second time, want %s, got %s", want, read(out))
	}
	testbed.Eventually(t, 5*time.Second, func() bool { return len(w.pool.Leases()) == 0 })
}

// TestUdhcpcRenews makes the client renew, which it does by unicast from its address.
func TestUdhcpcRenews(t *testing.T) {
	w := newWorld(t, nil)
	out, client := w.udhcpc(t)
	testbed.Eventually(t, 10*time.Second, func() bool { return strings.Contains(read(out), "event=bound") })
	first := w.pool.Leases()
	if err := client.Process.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	testbed.Eventually(t, 20*time.Second, func() bool { return strings.Contains(read(out), "event=renew") })
	second := w.pool.Leases()
	if len(first) != 1 || len(second) != 1 || first[0].Addr != second[0].Addr || !second[0].Expires.After(first[0].Expires) {
		t.Errorf("before %+v, after %+v", first, second)
	}
}

// TestUdhcpcOfAnAttachment: a container that asks although it has a lease gets its own address, and gets it again when it wants another.
func TestUdhcpcOfAnAttachment(t *testing.T) {
	var mac atomic.Pointer[wire.MAC]
	w := newWorld(t, func(_ *Config, l *PoolLeaser) {
		l.Attachment = func(m wire.MAC) string {
			if p := mac.Load(); p != nil && m == *p {
				return "web"
			}
			return ""
		}
	})
	mac.Store(&w.mac)
	want := ip("10.88.0.123")
	if _, err := w.pool.Lease(context.Background(), ipam.Request{Attachment: "web", MAC: w.mac, Addr: want}); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"-n", "-q"}, {"-n", "-q", "-r", "10.88.0.50"}, {"-n", "-q", "-r", "192.168.7.7"}} {
		out, client := w.udhcpc(t, args...)
		if err := client.Wait(); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(read(out), "ip="+want.String()+"\n") {
			t.Errorf("%v: %s", args, read(out))
		}
	}
}
