package tunnel

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/testbed"
)

// ends are two places with 10.1.0.1 and 10.1.0.2 on one overlay network over a veth underlay with MTU 1500.
type ends struct{ a, b *testbed.NS }

// overlays are the ways compared. Each is built anew for each run. The kernel does not cut superframes on a veth, so that it is not what it would be over a
// wire.
var overlays = []struct {
	name string
	make func(t testing.TB) ends
}{
	{"kernel", func(t testing.TB) ends {
		a, b := underlay(t, 1500)
		for i, ns := range []*testbed.NS{a, b} {
			kernelVXLAN(t, ns, 9, []string{"local", fmt.Sprintf("10.9.0.%d", i+1), "remote", fmt.Sprintf("10.9.0.%d", 2-i), "dstport", "4789", "udpcsum"}, fmt.Sprintf("10.1.0.%d/24", i+1))
			run(t, ns, "ip", "link", "set", "vx0", "mtu", "1450", "address", fmt.Sprintf("02:00:00:00:00:0%d", i+1))
		}
		return ends{a, b}
	}},
	{"patchbay", func(t testing.TB) ends { return ownEnds(t, Config{}, WireVXLAN) }},
	{"superframe", func(t testing.TB) ends { return ownEnds(t, Config{}, WirePatchbay) }},
	{"patchbay-spin", func(t testing.TB) ends { return ownEnds(t, Config{Spin: 50 * time.Microsecond}, WireVXLAN) }},
	{"to-kernel", func(t testing.TB) ends { a, b := mixedEnds(t, "10.1.0.1/24", "10.1.0.2/24"); return ends{a, b} }},
	{"from-kernel", func(t testing.TB) ends { a, b := mixedEnds(t, "10.1.0.2/24", "10.1.0.1/24"); return ends{b, a} }},
}

// mixedEnds are a container of ours and a host with a vxlan device.
func mixedEnds(t testing.TB, ours, kernels string) (container, kernel *testbed.NS) {
	a, b := underlay(t, 1500)
	n := newNetwork(newVTEP(t, a, Config{}), 9)
	n.peer(t, PeerConfig{Remote: netip.MustParseAddrPort("10.9.0.2:4789")})
	kernelVXLAN(t, b, 9, []string{"local", "10.9.0.2", "remote", "10.9.0.1", "dstport", "4789", "udpcsum"}, kernels)
	run(t, b, "ip", "link", "set", "vx0", "mtu", "1450")
	return n.container(t, 1, 1450, ours), b
}

// ownEnds are two containers of ours, on a host each.
func ownEnds(t testing.TB, cfg Config, w Wire) ends {
	a, b := underlay(t, 1500)
	var c [2]*testbed.NS
	for i, ns := range []*testbed.NS{a, b} {
		n := newNetwork(newVTEP(t, ns, cfg), 9)
		p := n.peer(t, PeerConfig{Remote: netip.MustParseAddrPort(fmt.Sprintf("10.9.0.%d:4789", 2-i)), Wire: w})
		mtu, err := p.MTU()
		if err != nil {
			t.Fatal(err)
		}
		c[i] = n.container(t, byte(i+1), mtu, fmt.Sprintf("10.1.0.%d/24", i+1))
	}
	return ends{c[0], c[1]}
}

// BenchmarkTCP measures one TCP stream for two seconds: iperf3 between the ends, and what this process, both nodes at once, spends on it.
func BenchmarkTCP(b *testing.B) {
	for _, w := range overlays {
		b.Run(w.name, func(b *testing.B) {
			e := w.make(b)
			ping(b, e.a, "10.1.0.2")
			var gbits, cpu, retrans []float64
			for b.Loop() {
				before := cpuTime()
				r := runIperf(b, e.a, e.b, "10.1.0.2", "-t", "2").End
				gbits = append(gbits, r.Received.BPS/1e9)
				cpu = append(cpu, (cpuTime()-before).Seconds()/r.Received.Bytes*1e9)
				retrans = append(retrans, r.Sent.Retransmits)
			}
			b.ReportMetric(median(gbits), "Gbit/s")
			b.ReportMetric(median(cpu), "cpu-s/GB")
			b.ReportMetric(median(retrans), "retransmits")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkUDP measures how many datagrams of 64 bytes of one sender are delivered.
func BenchmarkUDP(b *testing.B) {
	for _, w := range overlays {
		b.Run(w.name, func(b *testing.B) {
			e := w.make(b)
			ping(b, e.a, "10.1.0.2")
			var pps []float64
			for b.Loop() {
				s := runIperf(b, e.a, e.b, "10.1.0.2", "-u", "-b", "0", "-l", "64", "-t", "2").End.Sum
				pps = append(pps, float64(s.Packets-s.LostPackets)/s.Seconds/1000)
			}
			b.ReportMetric(median(pps), "k/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkPing measures round trips one after the other.
func BenchmarkPing(b *testing.B) {
	for _, w := range overlays {
		b.Run(w.name, func(b *testing.B) {
			e := w.make(b)
			ping(b, e.a, "10.1.0.2")
			var avg []float64
			for b.Loop() {
				out, err := e.a.Command(testbed.Tool(b, "ping"), "-q", "-A", "-c", "3000", "10.1.0.2").Output()
				_, times, found := strings.Cut(string(out), "min/avg/max/mdev = ")
				fields := strings.Split(times, "/")
				if err != nil || !found || len(fields) < 4 {
					b.Fatalf("%v: %s", err, out)
				}
				ms, err := strconv.ParseFloat(fields[1], 64)
				if err != nil {
					b.Fatal(err)
				}
				avg = append(avg, ms*1000)
			}
			b.ReportMetric(median(avg), "µs")
			b.ReportMetric(0, "ns/op")
		})
	}
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

// iperf is what is read of iperf3 -J.
type iperf struct {
	End struct {
		Sent struct {
			Retransmits float64
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
