package tap

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/testbed"
)

// joined is two namespaces with 10.1.0.1 and 10.1.0.2, joined in one way or another.
type joined struct{ a, b *testbed.NS }

// kernelPair joins two namespaces by two veths and a bridge: the measure of all things here.
func kernelPair(t testing.TB) joined {
	p := joined{testbed.NewNS(t, "a"), testbed.NewNS(t, "b")}
	br := testbed.NewNS(t, "bridge")
	testbed.Veth(t, p.a, "eth0", br, "p1")
	testbed.Veth(t, p.b, "eth0", br, "p2")
	testbed.Bridge(t, br, "br0", "p1", "p2")
	testbed.AddAddrs(t, p.a, "eth0", netip.MustParsePrefix("10.1.0.1/24"))
	testbed.AddAddrs(t, p.b, "eth0", netip.MustParsePrefix("10.1.0.2/24"))
	testbed.Up(t, p.a, "eth0")
	testbed.Up(t, p.b, "eth0")
	return p
}

// pairs are the ways compared. Each is built anew for each run.
var pairs = []struct {
	name string
	make func(t testing.TB) joined
}{
	{"kernel", kernelPair},
	{"tap", func(t testing.TB) joined {
		p := newPairWith(t, OpenConfig{}, OpenConfig{}, 1500, Config{})
		return joined{p.a, p.b}
	}},
	{"tap-nospin", func(t testing.TB) joined {
		p := newPairWith(t, OpenConfig{}, OpenConfig{}, 1500, Config{Spin: -1})
		return joined{p.a, p.b}
	}},
	{"packet", func(t testing.TB) joined {
		oc := OpenConfig{Kind: KindPacket}
		p := newPairWith(t, oc, oc, 1500, Config{})
		return joined{p.a, p.b}
	}},
	{"plain", func(t testing.TB) joined {
		p := newPairWith(t, OpenConfig{Plain: true}, OpenConfig{Plain: true}, 1500, Config{})
		return joined{p.a, p.b}
	}},
}

// BenchmarkTCP measures one TCP stream for a second: iperf3 between two namespaces, and what this process, the switch, spends on it. The interesting number is each line's Gbit/s against
// the kernel's in the same run.
func BenchmarkTCP(b *testing.B) {
	for _, w := range pairs {
		b.Run(w.name, func(b *testing.B) {
			p := w.make(b)
			var gbits, cpu []float64
			for b.Loop() {
				before := cpuTime()
				r := runIperf(b, p.a, p.b, "10.1.0.2", "-t", "1").End.Received
				gbits = append(gbits, r.BPS/1e9)
				cpu = append(cpu, (cpuTime()-before).Seconds()/r.Bytes*1e9)
			}
			b.ReportMetric(median(gbits), "Gbit/s")
			b.ReportMetric(median(cpu), "cpu-s/GB")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkUDP measures how many datagrams of 64 bytes of one sender are delivered.
func BenchmarkUDP(b *testing.B) {
	for _, w := range pairs {
		b.Run(w.name, func(b *testing.B) {
			p := w.make(b)
			var pps []float64
			for b.Loop() {
				s := runIperf(b, p.a, p.b, "10.1.0.2", "-u", "-b", "0", "-l", "64", "-t", "1").End.Sum
				pps = append(pps, float64(s.Packets-s.LostPackets)/s.Seconds/1000)
			}
			b.ReportMetric(median(pps), "k/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkRR measures a TCP request and its answer, one byte each, between two processes in blocking system calls. cpu is what this
// process, the switch, spends on one.
func BenchmarkRR(b *testing.B) {
	for _, w := range pairs {
		b.Run(w.name, func(b *testing.B) {
			p := w.make(b)
			srv := p.b.Command(self(b), argRR, "server")
			out, err := srv.StdoutPipe()
			if err == nil {
				err = srv.Start()
			}
			if err != nil {
				b.Fatal(err)
			}
			out.Read(make([]byte, 1)) // it listens
			var p50, p99, worst, cpu []float64
			for b.Loop() {
				before := cpuTime()
				var n int
				var p5, p9, most float64
				out, err := p.a.Command(self(b), argRR, "client").Output()
				if _, serr := fmt.Sscan(string(out), &n, &p5, &p9, &most); err != nil || serr != nil {
					b.Fatalf("%v %v %s", err, serr, out)
				}
				p50, p99, worst = append(p50, p5), append(p99, p9), append(worst, most)
				cpu = append(cpu, float64((cpuTime()-before).Nanoseconds())/1000/float64(n))
			}
			srv.Process.Kill()
			srv.Wait()
			b.ReportMetric(median(p50), "p50-µs")
			b.ReportMetric(median(p99), "p99-µs")
			b.ReportMetric(slices.Max(worst), "max-µs")
			b.ReportMetric(median(cpu), "cpu-µs")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func self(t testing.TB) string {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

// argRR as first argument makes this test binary one end of BenchmarkRR.
const argRR = "tap-test-rr"

// rrMain is that end.
func rrMain(role string) error {
	runtime.LockOSThread()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	addr := &unix.SockaddrInet4{Port: 5999, Addr: [4]byte{10, 1, 0, 2}}
	var buf [1]byte
	if role == "server" {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		if err := unix.Bind(fd, addr); err != nil {
			return err
		}
		if err := unix.Listen(fd, 1); err != nil {
			return err
		}
		fmt.Println("listening")
		for {
			c, _, err := unix.Accept(fd)
			if err != nil {
				return err
			}
			unix.SetsockoptInt(c, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
			for {
				if n, err := unix.Read(c, buf[:]); n != 1 || err != nil {
					break
				}
				unix.Write(c, buf[:])
			}
			unix.Close(c)
		}
	}
	if err := unix.Connect(fd, addr); err != nil {
		return err
	}
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	var us []float64
	for end := time.Now().Add(time.Second / 2); time.Now().Before(end); {
		t0 := time.Now()
		unix.Write(fd, buf[:])
		if n, err := unix.Read(fd, buf[:]); n != 1 || err != nil {
			return fmt.Errorf("read: %d, %w", n, err)
		}
		us = append(us, float64(time.Since(t0).Nanoseconds())/1000)
	}
	p50 := median(us)
	fmt.Println(len(us), p50, us[len(us)*99/100], us[len(us)-1])
	return nil
}

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var r unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &r)
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

func median(x []float64) float64 {
	slices.Sort(x)
	return x[len(x)/2]
}

// iperf is what these tests read of iperf3 -J.
type iperf struct {
	End struct {
		Sent struct {
			Bytes       float64
			Retransmits int
		} `json:"sum_sent"`
		Received struct {
			Bytes float64
			BPS   float64 `json:"bits_per_second"`
		} `json:"sum_received"`
		Sum struct {
			Packets     int
			LostPackets int `json:"lost_packets"`
			Seconds     float64
		}
	}
	Error string
}

// runIperf runs one iperf3 test from ns a to addr in ns b.
func runIperf(t testing.TB, a, b *testbed.NS, addr string, args ...string) (r iperf) {
	t.Helper()
	path := testbed.Tool(t, "iperf3")
	srv := b.Command(path, "-s", "-1", "--forceflush")
	out, err := srv.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.Start(); err != nil {
		t.Fatal(err)
	}
	defer srv.Wait()
	defer srv.Process.Kill()
	buf := make([]byte, 4096)
	for got := ""; !strings.Contains(got, "listening"); {
		n, err := out.Read(buf)
		if err != nil {
			t.Fatalf("iperf3 -s: %v: %s", err, got)
		}
		got += string(buf[:n])
	}
	j, err := a.Command(path, append([]string{"-c", addr, "-J"}, args...)...).Output()
	if jerr := json.Unmarshal(j, &r); jerr != nil || err != nil || r.Error != "" {
		t.Fatalf("iperf3 -c %s %v: %v %v %s", addr, args, err, jerr, r.Error)
	}
	return r
}
