package nat

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/testbed"
)

var container = []netip.Addr{netip.MustParseAddr("10.0.2.9"), netip.MustParseAddr("fd00:2::9")}

func mustSpec(t testing.TB, s string) Spec {
	t.Helper()
	p, err := ParseSpec(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// hello serves one word to everybody, in the place of a container.
func hello(t testing.TB) (port uint16) {
	l := hostListener(t, "127.0.0.1:0")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "hello")
			c.Close()
		}
	}()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// TestPublishSource holds from which address a container sees a client: its own when it is elsewhere, the gateway's when it is on the host.
//
//	[ext] ─── [host: NAT, published port] ─── container
func TestPublishSource(t *testing.T) {
	testbed.Require(t)
	testbed.Leaks(t)
	ext := testbed.NewExternal(t)
	port := hello(t)
	d := &dialNet{}
	n := startNAT(t, Config{Network: d})
	p, err := n.Publish(mustSpec(t, fmt.Sprintf("8080:%d", port)), container)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	only4, err := n.Publish(mustSpec(t, fmt.Sprintf("8081:%d", port)), container[:1])
	if err != nil {
		t.Fatal(err)
	}
	defer only4.Close()
	host := testbed.Host(t)
	for _, c := range []struct {
		from *testbed.NS
		to   string
		want string // "own" or an address
	}{
		{ext.NS, netip.AddrPortFrom(ext.HostAddr4, 8080).String(), "own"},
		{ext.NS, netip.AddrPortFrom(ext.HostAddr6, 8080).String(), "own"},
		{ext.NS, netip.AddrPortFrom(ext.HostAddr6, 8081).String(), "10.0.2.1"}, // no IPv6 inside
		{host, "127.0.0.1:8080", "10.0.2.1"},
		{host, "[::1]:8080", "fd00:2::1"},
		{host, netip.AddrPortFrom(ext.HostAddr4, 8080).String(), "10.0.2.1"},
		{host, netip.AddrPortFrom(ext.HostAddr6, 8080).String(), "fd00:2::1"},
	} {
		var conn net.Conn
		var err error
		c.from.Do(func() { conn, err = net.Dial("tcp", c.to) })
		if err != nil {
			t.Errorf("%s: %v", c.to, err)
			continue
		}
		b, err := io.ReadAll(conn)
		if string(b) != "hello" || err != nil {
			t.Errorf("%s: %q, %v", c.to, b, err)
		}
		var want netip.AddrPort
		if c.want == "own" {
			want = netip.MustParseAddrPort(conn.LocalAddr().String())
		} else {
			want = netip.AddrPortFrom(netip.MustParseAddr(c.want), 0)
		}
		conn.Close()
		d.mu.Lock()
		if got := d.srcs[len(d.srcs)-1]; got != want {
			t.Errorf("%s: the container sees %s, want %s", c.to, got, want)
		}
		d.mu.Unlock()
	}
}

// TestPublishRefused holds that a client of a published port whose container refuses sees a reset, soon.
func TestPublishRefused(t *testing.T) {
	testbed.Leaks(t)
	n := startNAT(t, Config{Network: &dialNet{}})
	p, err := n.Publish(mustSpec(t, "127.0.0.1:8080:1"), container)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	c, err := net.Dial("tcp", "127.0.0.1:8080")
	if errors.Is(err, syscall.ECONNRESET) {
		return // the reset was there before connect had returned
	}
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read: %v, want a reset", err)
	}
}

// TestPublishLimits holds that a container that does not answer costs no more than its share, and that others are reached meanwhile.
func TestPublishLimits(t *testing.T) {
	testbed.Leaks(t)
	n := startNAT(t, Config{Network: &dialNet{}, Limits: Limits{HalfOpenPerContainer: 8, DialTimeout: time.Second}})
	silent, err := n.Publish(mustSpec(t, "127.0.0.1:8080:9"), container)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	p, err := n.Publish(mustSpec(t, fmt.Sprintf("127.0.0.1:8081:%d", hello(t))), []netip.Addr{netip.MustParseAddr("10.0.2.10")})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	var cs []net.Conn
	for range 12 {
		c, err := net.Dial("tcp", "127.0.0.1:8080")
		if errors.Is(err, syscall.ECONNRESET) {
			continue // above the limit, and the reset was there before connect had returned
		}
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		cs = append(cs, c)
	}
	testbed.Eventually(t, 5*time.Second, func() bool { return n.Drops().Get(frame.DropDialLimit) == 4 })
	start := time.Now()
	c, err := net.Dial("tcp", "127.0.0.1:8081")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, err := io.ReadAll(c); string(b) != "hello" || time.Since(start) > 500*time.Millisecond {
		t.Fatalf("%q, %v after %v", b, err, time.Since(start))
	}
	for _, c := range cs {
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("read: %v, want a reset", err)
		}
	}
}

// TestPublishRange holds that a range is whole or not there at all, and that its ports lead where they should.
func TestPublishRange(t *testing.T) {
	testbed.Leaks(t)
	n := startNAT(t, Config{Network: &dialNet{}})
	blocker := hostListener(t, "127.0.0.1:8109")
	_, err := n.Publish(mustSpec(t, "8100-8119:100-119"), container)
	if err == nil || !strings.Contains(err.Error(), "8109/tcp is in use") {
		t.Fatalf("error %v", err)
	}
	for port := 8100; port < 8120; port++ {
		if port == 8109 {
			continue
		}
		hostListener(t, fmt.Sprintf("127.0.0.1:%d", port)).Close()
	}
	blocker.Close()
	first := hello(t)
	spec := fmt.Sprintf("8100-8119:%d-%d", first-10, first+9)
	p, err := n.Publish(mustSpec(t, spec), container)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", "127.0.0.1:8110")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, _ := io.ReadAll(c); string(b) != "hello" {
		t.Fatalf("port 8110 leads elsewhere: %q", b)
	}
	if p.Spec().String() != spec+"/tcp" {
		t.Fatalf("Spec is %s", p.Spec())
	}
	p.Close()
	p.Close()
	hostListener(t, "127.0.0.1:8110")
}

func TestPublishNeedsAddresses(t *testing.T) {
	n := startNAT(t, Config{Network: &dialNet{}})
	for _, to := range [][]netip.Addr{nil, {{}}, {container[0], container[0]}} {
		if _, err := n.Publish(mustSpec(t, "8080:80"), to); err == nil {
			t.Errorf("%v: no error", to)
		}
	}
	if _, err := n.Publish(Spec{HostPort: 65535, Port: 1, Count: 2, Proto: TCP}, container); err == nil {
		t.Error("a range beyond 65535: no error")
	}
	if _, err := n.Publish(mustSpec(t, "203.0.113.5:8080:80"), container); err == nil || !strings.Contains(err.Error(), "not an address of this host") {
		t.Errorf("foreign HOSTIP: %v", err)
	}
	n.Close()
	if _, err := n.Publish(mustSpec(t, "8080:80"), container); err == nil {
		t.Error("after Close: no error")
	}
}

// TestPortHolder holds that a port in use names who has it: this process, and another one by its name.
func TestPortHolder(t *testing.T) {
	testbed.Require(t)
	n := startNAT(t, Config{Network: &dialNet{}})
	for _, addr := range []string{"127.0.0.1:8080", "[::1]:8080", "0.0.0.0:8080", "[::]:8080"} {
		l := hostListener(t, addr)
		_, err := n.Publish(mustSpec(t, "8080:80"), container)
		if want := fmt.Sprintf("pid %d", os.Getpid()); err == nil || !strings.Contains(err.Error(), want) || !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("%s is taken: %v, want %q in it", addr, err, want)
		}
		l.Close()
	}
	// A port of another address is none of our business.
	hostListener(t, "127.0.0.2:8080")
	p, err := n.Publish(mustSpec(t, "127.0.0.1:8080:80"), container)
	if err != nil {
		t.Fatal(err)
	}
	p.Close()

	cmd := exec.Command(testbed.Tool(t, "nc"), "-l", "127.0.0.1", "8090")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	testbed.Eventually(t, 5*time.Second, func() bool {
		var p *Published
		if p, err = n.Publish(mustSpec(t, "127.0.0.1:8090:80"), container); err == nil {
			p.Close()
		}
		return err != nil
	})
	if want := fmt.Sprintf("(pid %d)", cmd.Process.Pid); !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "nc") {
		t.Errorf("%v, want nc %s", err, want)
	}
}

func TestPrivilegedPort(t *testing.T) {
	testbed.Require(t)
	// Inside the namespace the tests are root; the error is worded from what bind says to others.
	p := &Published{spec: mustSpec(t, "80:80")}
	b := p.binding(0)
	err := p.bindError(&b, unix.EACCES)
	want := fmt.Sprintf("take one of %d or above, or have root run: sysctl net.ipv4.ip_unprivileged_port_start=80", unprivilegedPortStart())
	if !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
		t.Fatalf("%v, want %q", err, want)
	}
}

func TestParseProcAddr(t *testing.T) {
	for in, want := range map[string]string{
		"0100007F:1F90":                         "127.0.0.1:8080",
		"00000000:0050":                         "0.0.0.0:80",
		"00000000000000000000000001000000:01BB": "[::1]:443",
		"0000000000000000FFFF00000100007F:0001": "[::ffff:127.0.0.1]:1",
	} {
		if got, ok := parseProcAddr(in); !ok || got.String() != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
	for _, in := range []string{"", ":", "0100007F", "0100007F:", "0100007F:1F900", "zz00007F:1F90", "0100:1"} {
		if _, ok := parseProcAddr(in); ok {
			t.Errorf("%q: accepted", in)
		}
	}
}

// rss is the resident memory of this process in bytes.
func rss(t testing.TB) int {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.Fields(string(b))[1])
	if err != nil {
		t.Fatal(err)
	}
	return n * os.Getpagesize()
}

// TestTenThousandPorts holds what 10,000 published ports cost: a few MB, no goroutine, and little time.
func TestTenThousandPorts(t *testing.T) {
	n := startNAT(t, Config{Network: &dialNet{}})
	runtime.GC()
	mem, gos := rss(t), runtime.NumGoroutine()
	start := time.Now()
	p, err := n.Publish(mustSpec(t, "20000-29999:1-10000"), container)
	if err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	runtime.GC()
	grown := rss(t) - mem
	t.Logf("10,000 ports: %v, %.1f MiB more resident, %d more goroutines", took, float64(grown)/(1<<20), runtime.NumGoroutine()-gos)
	if g := runtime.NumGoroutine(); g > gos+1 {
		t.Errorf("%d goroutines, %d before", g, gos)
	}
	if grown > 5<<20 {
		t.Errorf("resident memory grew by %d bytes", grown)
	}
	if took > 5*time.Second {
		t.Errorf("took %v", took)
	}
	c, err := net.Dial("tcp", "127.0.0.1:29999")
	if err == nil {
		c.Close()
	} else if !errors.Is(err, syscall.ECONNRESET) { // nobody is behind it, so a reset proves that it is served
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	hostListener(t, "127.0.0.1:29999")

	// More than the limit has room for is refused before anything is opened, and the error says what to do.
	var l unix.Rlimit
	unix.Getrlimit(unix.RLIMIT_NOFILE, &l)
	if l.Cur != l.Max {
		t.Errorf("the limit of open files is %d of %d", l.Cur, l.Max)
	}
	if l.Cur < 60000 {
		if _, err := n.Publish(mustSpec(t, "5000-64999:5000-64999"), container); err == nil || !strings.Contains(err.Error(), "ulimit -n") {
			t.Errorf("60,000 ports under a limit of %d: %v", l.Cur, err)
		}
	}
}
