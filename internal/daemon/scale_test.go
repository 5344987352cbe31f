package daemon

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/api"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	"patchbay/tap"
)

// TestScale has many attachments on one network and many networks on one node, and reports what they cost: with SCALE=full 500 and 200, as `make scale` does. Latency is that of the whole
// exchange over the API with a real TAP, from the request until frames flow. The forwarding rate is of 1400-byte frames from one TAP to another through the switch, sent and received by packet
// sockets: with few ports, with many idle ones, and while another port broadcasts as fast as it can.
func TestScale(t *testing.T) {
	testbed.RequireTUN(t)
	attachments, networks := 60, 25
	if os.Getenv("SCALE") == "full" {
		attachments, networks = 500, 200
	}
	n := newTestNode(t, t.TempDir())
	client := serveAPI(t, n)

	idle := memory()
	for i := range networks {
		if _, err := n.CreateNetwork(t.Context(), api.NetworkSpec{Name: fmt.Sprintf("net%d", i)}); err != nil {
			t.Fatal(err)
		}
	}
	withNetworks := memory()
	t.Logf("%d networks: %.0f KiB of memory and %.1f threads each", networks, float64(withNetworks.rss-idle.rss)/1024/float64(networks), float64(withNetworks.threads-idle.threads)/float64(networks))

	if _, err := n.CreateNetwork(t.Context(), api.NetworkSpec{Name: "big", Subnets: prefixes("10.200.0.0/16", "fd20::/64")}); err != nil {
		t.Fatal(err)
	}
	before := memory()
	var ends []*end
	var took []time.Duration
	var few, many float64
	for i := range attachments {
		e, d := attachOver(t, client, fmt.Sprintf("box%d", i))
		ends, took = append(ends, e), append(took, d)
		if i == 3 {
			few = best(t, ends[0], ends[1])
		}
	}
	after := memory()
	slices.Sort(took)
	t.Logf("%d attachments: attach p50 %v, p99 %v, max %v; %.0f KiB of memory and %.1f threads each", attachments, took[len(took)/2], took[len(took)*99/100], took[len(took)-1],
		float64(after.rss-before.rss)/1024/float64(attachments), float64(after.threads-before.threads)/float64(attachments))
	quiet(t, n)
	many = best(t, ends[0], ends[1])

	ctx, stop := context.WithCancel(t.Context())
	done := make(chan int)
	go func() {
		sent := 0
		f := ends[2].frame(wire.Broadcast, 100)
		for ctx.Err() == nil {
			if _, err := unix.Write(ends[2].fd, f); err == nil {
				sent++
			}
		}
		done <- sent
	}()
	time.Sleep(200 * time.Millisecond)
	storm := rate(t, ends[0], ends[1])
	stop()
	sent := <-done
	t.Logf("forwarding: %.0f frames/s with 4 ports, %.2f of that with %d, %.2f while a port broadcasts (%d frames)", few, many/few, attachments, storm/few, sent)
	if storm < few/50 {
		t.Errorf("broadcasts stall unicast: %.0f frames/s, %.0f without", storm, few)
	}
	if many < few/4 {
		t.Errorf("idle ports slow forwarding down: %.0f frames/s, %.0f with 4 ports", many, few)
	}
}

// serveAPI answers for the node on a socket, as the daemon does.
func serveAPI(t *testing.T, n *Node) *api.Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "node.sock")
	l, err := api.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- api.NewServer(api.ServerConfig{Backend: n}).Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return api.NewClient(path)
}

// end is the container's side of an attachment: an interface of this namespace with a packet socket on it.
type end struct {
	fd  int
	mac wire.MAC
}

func (e *end) frame(dst wire.MAC, n int) []byte {
	b := make([]byte, n)
	wire.PutEthernet(b, dst, e.mac, 0x88b5)
	return b
}

// attachOver attaches a TAP over the API and says how long that took.
func attachOver(t *testing.T, client *api.Client, name string) (*end, time.Duration) {
	t.Helper()
	began := time.Now()
	s, err := client.Attach(t.Context(), "big", api.AttachmentSpec{Name: name, Lifetime: api.LifetimeSession})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	ifc := s.Plan().Interface
	h, err := tap.Open(tap.OpenConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	if _, err := h.Configure(tap.IfConfig{MAC: ifc.MAC, MTU: ifc.MTU}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Up(api.Device{Info: h.Info, PID: os.Getpid(), FDs: h.FDs}); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	i, err := net.InterfaceByName(h.Name)
	if err != nil {
		t.Fatal(err)
	}
	const proto = 0xb588 // 0x88b5 in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: i.Index}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 200_000}); err != nil {
		t.Fatal(err)
	}
	return &end{fd: fd, mac: ifc.MAC}, took
}

// rate sends from one end to another for half a second and returns how many frames a second arrive.
func rate(t *testing.T, from, to *end) float64 {
	t.Helper()
	const window = 500 * time.Millisecond
	stop := make(chan struct{})
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		f := from.frame(to.mac, 1400)
		for {
			select {
			case <-stop:
				return
			default:
				_, _ = unix.Write(from.fd, f) // a full queue is no matter: what arrives is counted
			}
		}
	}()
	b := make([]byte, 2000)
	got, began := 0, time.Now()
	for time.Since(began) < window {
		n, err := unix.Read(to.fd, b)
		if err == nil && n == 1400 && bytes.Equal(b[6:12], from.mac[:]) {
			got++
		}
	}
	took := time.Since(began)
	close(stop)
	<-sent
	return float64(got) / took.Seconds()
}

// quiet waits until the new interfaces have said on the network what interfaces say at first (MLD, router solicitations), each to all others, for half a minute at most.
func quiet(t *testing.T, n *Node) {
	t.Helper()
	flooded := func() (f uint64) {
		nw, err := n.Network("big")
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range nw.Ports {
			f += p.Flooded
		}
		return f
	}
	for end, was := time.Now().Add(30*time.Second), flooded(); time.Now().Before(end); {
		time.Sleep(500 * time.Millisecond)
		now := flooded()
		if now-was < 3 {
			return
		}
		was = now
	}
}

// best is the best of three rates: what is compared lies half a minute apart, and on a shared machine one window alone says more about the neighbours than about the ports.
func best(t *testing.T, from, to *end) (r float64) {
	t.Helper()
	for range 3 {
		r = max(r, rate(t, from, to))
	}
	return r
}

// taken is what this process takes.
type taken struct{ rss, threads int }

func memory() (u taken) {
	runtime.GC()
	debug.FreeOSMemory()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return u
	}
	for l := range strings.Lines(string(b)) {
		f := strings.Fields(l)
		if len(f) < 2 {
			continue
		}
		v, _ := strconv.Atoi(f[1]) // other lines have other things
		switch f[0] {
		case "VmRSS:":
			u.rss = v << 10
		case "Threads:":
			u.threads = v
		}
	}
	return u
}
