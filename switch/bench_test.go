package vswitch_test

import (
	"fmt"
	"sync/atomic"
	"testing"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	vswitch "patchbay/switch"
)

func TestMain(m *testing.M) { testbed.Main(m) }

// sink takes everything and keeps nothing.
type sink struct{}

func (sink) Transmit(fs []frame.Frame) int { return len(fs) }
func (sink) Caps() frame.Caps              { return frame.CapAll }

const batch = 32

// wideMAC is one of 2^24 addresses.
func wideMAC(n int) wire.MAC { return wire.MAC{2, 1, 0, byte(n >> 16), byte(n >> 8), byte(n)} }

func benchSwitch(b *testing.B, ports, macs int) (*vswitch.Switch, []*vswitch.Ingress) {
	s := vswitch.New(vswitch.Config{Log: quiet(), MaxMACs: 1 << 18})
	in := make([]*vswitch.Ingress, ports)
	for i := range in {
		id, err := s.AddPort(sink{}, none)
		if err != nil {
			b.Fatal(err)
		}
		in[i] = s.Ingress(id)
		in[i].Forward([]frame.Frame{eth(mac(9999), mac(i), "")})
	}
	for i := range macs {
		in[1+i%(ports-1)].Forward([]frame.Frame{eth(mac(0), wideMAC(i), "")})
	}
	return s, in
}

func perFrame(b *testing.B, frames int) {
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*frames), "ns/frame")
}

// BenchmarkUnicast: 64-byte frames of one flow, 32 a batch.
func BenchmarkUnicast(b *testing.B) {
	_, in := benchSwitch(b, 2, 0)
	fs := make([]frame.Frame, batch)
	for i := range fs {
		fs[i] = eth(mac(1), mac(0), string(make([]byte, 50)))
	}
	b.ReportAllocs()
	for b.Loop() {
		in[0].Forward(fs)
	}
	perFrame(b, batch)
}

// BenchmarkUnicastOne: a batch of one, as in request and response.
func BenchmarkUnicastOne(b *testing.B) {
	_, in := benchSwitch(b, 2, 0)
	fs := []frame.Frame{eth(mac(1), mac(0), string(make([]byte, 50)))}
	b.ReportAllocs()
	for b.Loop() {
		in[0].Forward(fs)
	}
}

// BenchmarkUnicastSpread: each frame of a batch for another port.
func BenchmarkUnicastSpread(b *testing.B) {
	_, in := benchSwitch(b, 1+batch, 0)
	fs := make([]frame.Frame, batch)
	for i := range fs {
		fs[i] = eth(mac(i+1), mac(0), string(make([]byte, 50)))
	}
	b.ReportAllocs()
	for b.Loop() {
		in[0].Forward(fs)
	}
	perFrame(b, batch)
}

// BenchmarkBound: as Unicast, from a port bound to its MAC and addresses.
func BenchmarkBound(b *testing.B) {
	s, _ := benchSwitch(b, 2, 0)
	id, err := s.AddPort(sink{}, vswitch.PortConfig{MAC: mac(100), Addrs: ips("10.0.0.5", "2001:db8::5")})
	if err != nil {
		b.Fatal(err)
	}
	in := s.Ingress(id)
	fs := make([]frame.Frame, batch)
	for i := range fs {
		fs[i] = ip4(mac(100), "10.0.0.5", "10.0.0.1", 17, make([]byte, 30)...)
		copy(fs[i].Data, []byte{2, 0, 0, 0, 0, 1})
	}
	b.ReportAllocs()
	for b.Loop() {
		in.Forward(fs)
	}
	perFrame(b, batch)
	if d := s.Stats().Total.Dropped(); d != 2 { // the two that made the ports known to each other
		b.Logf("dropped %d", d)
	}
}

// BenchmarkFlood: broadcast to n ports.
func BenchmarkFlood(b *testing.B) {
	for _, n := range []int{10, 500} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			_, in := benchSwitch(b, n, 0)
			fs := []frame.Frame{eth(wire.Broadcast, mac(0), string(make([]byte, 50)))}
			b.ReportAllocs()
			for b.Loop() {
				in[0].Forward(fs)
			}
		})
	}
}

// BenchmarkFDB100k: every frame goes to and comes from another of 100,000 known addresses.
func BenchmarkFDB100k(b *testing.B) {
	const macs = 100_000
	_, in := benchSwitch(b, 3, 0)
	for i := range macs {
		in[1+i%2].Forward([]frame.Frame{eth(mac(0), wideMAC(i), "")})
	}
	fs := make([][]frame.Frame, macs/batch)
	for j := range fs {
		for i := range batch {
			k := (j*batch + i) * 7919 % macs &^ 1 // even ones live on port 1
			fs[j] = append(fs[j], eth(wideMAC(k+1), wideMAC(k), string(make([]byte, 50))))
		}
	}
	b.ReportAllocs()
	j := 0
	for b.Loop() {
		in[1].Forward(fs[j])
		if j++; j == len(fs) {
			j = 0
		}
	}
	perFrame(b, batch)
}

// BenchmarkParallel: every goroutine an Ingress of its own, unicast, with 500 ports.
func BenchmarkParallel(b *testing.B) {
	_, in := benchSwitch(b, 500, 0)
	var next atomic.Int64
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		i := int(next.Add(1)) % 250
		fs := make([]frame.Frame, batch)
		for k := range fs {
			fs[k] = eth(mac(250+i), mac(i), string(make([]byte, 50)))
		}
		for pb.Next() {
			in[i].Forward(fs)
		}
	})
	perFrame(b, batch)
}

// BenchmarkNewSources: every frame from a source never heard, in a full table: the worst a container can do.
func BenchmarkNewSources(b *testing.B) {
	_, in := benchSwitch(b, 3, 0)
	fs := []frame.Frame{eth(mac(2), mac(1), "")}
	n := 0
	b.ReportAllocs()
	for b.Loop() {
		n++
		copy(fs[0].Data[6:], []byte{2, 9, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
		in[1].Forward(fs)
	}
}
