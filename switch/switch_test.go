package vswitch_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	vswitch "patchbay/switch"
)

// recorder is a port that keeps copies of what it was given.
type recorder struct {
	mu    sync.Mutex
	got   []string
	room  int // how many frames it takes in all; negative: any number
	calls int
}

func newRecorder() *recorder { return &recorder{room: -1} }

func (r *recorder) Transmit(fs []frame.Frame) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls++
	for i := range fs {
		if r.room == 0 {
			return i
		}
		r.room--
		r.got = append(r.got, string(fs[i].Data))
	}
	return len(fs)
}

func (r *recorder) Caps() frame.Caps { return frame.CapAll }

func (r *recorder) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	got := r.got
	r.got = nil
	return got
}

func mac(n int) wire.MAC { return wire.MAC{2, 0, 0, 0, byte(n >> 8), byte(n)} }

// eth is a frame from src to dst with a payload of no meaning.
func eth(dst, src wire.MAC, payload string) frame.Frame {
	b := make([]byte, 14+len(payload))
	wire.PutEthernet(b, dst, src, 0x88b5)
	copy(b[14:], payload)
	return frame.Frame{Data: b}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// bench is a switch with n recording ports named p0…, whose ports have seen no frame yet.
type bench struct {
	t     testing.TB
	s     *vswitch.Switch
	ids   []vswitch.PortID
	ports []*recorder
	in    []*vswitch.Ingress
	now   time.Time
}

func newBench(t testing.TB, cfg vswitch.Config, ports ...vswitch.PortConfig) *bench {
	b := &bench{t: t, now: time.Unix(1e9, 0)}
	cfg.Log = quiet()
	cfg.Now = func() time.Time { return b.now }
	b.s = vswitch.New(cfg)
	for i, pc := range ports {
		if pc.Name == "" {
			pc.Name = fmt.Sprintf("p%d", i)
		}
		r := newRecorder()
		id, err := b.s.AddPort(r, pc)
		if err != nil {
			t.Fatal(err)
		}
		b.ids, b.ports, b.in = append(b.ids, id), append(b.ports, r), append(b.in, b.s.Ingress(id))
	}
	return b
}

func (b *bench) send(port int, fs ...frame.Frame) { b.in[port].Forward(fs) }

// want checks what each port got since the last call.
func (b *bench) want(payloads ...string) {
	b.t.Helper()
	for i, r := range b.ports {
		var got string
		for _, f := range r.take() {
			got += f[14:]
		}
		if got != payloads[i] {
			b.t.Errorf("port %d got %q, want %q", i, got, payloads[i])
		}
	}
}

func (b *bench) drops(port int) map[frame.Drop]uint64 {
	for _, p := range b.s.Ports() {
		if p.ID == b.ids[port] {
			return p.Stats.Drops
		}
	}
	b.t.Fatalf("port %d is gone", port)
	return nil
}

func (b *bench) wantDrop(port int, why frame.Drop, n uint64) {
	b.t.Helper()
	if d := b.drops(port); d[why] != n || n > 0 && len(d) != 1 {
		b.t.Errorf("port %d dropped %v, want %d × %v", port, d, n, why)
	}
}

// balance checks the invariant of every port and of the switch.
func balance(t testing.TB, s *vswitch.Switch) {
	t.Helper()
	for _, p := range s.Ports() {
		if c := p.Stats; c.RxFrames != c.Unicast+c.Flooded+c.Dropped() {
			t.Errorf("port %s: rx %d ≠ unicast %d + flooded %d + drops %v", p.Config.Name, c.RxFrames, c.Unicast, c.Flooded, c.Drops)
		}
	}
	if c := s.Stats().Total; c.RxFrames != c.Unicast+c.Flooded+c.Dropped() {
		t.Errorf("switch: rx %d ≠ unicast %d + flooded %d + drops %v", c.RxFrames, c.Unicast, c.Flooded, c.Drops)
	}
}

var none = vswitch.PortConfig{}

func TestLearnAndForward(t *testing.T) {
	testbed.Leaks(t)
	b := newBench(t, vswitch.Config{}, none, none, none)
	b.send(0, eth(mac(1), mac(0), "unknown"))
	b.want("", "unknown", "unknown")
	b.send(1, eth(mac(0), mac(1), "answer"))
	b.want("answer", "", "")
	b.send(0, eth(mac(1), mac(0), "known"))
	b.want("", "known", "")
	b.send(2, eth(wire.Broadcast, mac(2), "all"), eth(wire.MAC{0x33, 0x33, 0, 0, 0, 1}, mac(2), "nd"), eth(wire.MAC{1, 0, 0x5e, 0, 0, 251}, mac(2), "mdns"))
	b.want("allndmdns", "allndmdns", "")
	balance(t, b.s)
	c := b.s.Stats().Total
	if c.Unicast != 2 || c.Flooded != 4 || c.TxFrames != 2+2+6 {
		t.Errorf("counters %+v", c)
	}
}

func TestAgeing(t *testing.T) {
	b := newBench(t, vswitch.Config{Ageing: 100 * time.Second}, none, none, none)
	b.send(1, eth(mac(9), mac(1), ""))
	b.now = b.now.Add(99 * time.Second)
	b.send(0, eth(mac(1), mac(0), "a"))
	b.want("", "a", "")
	b.send(1, eth(mac(9), mac(1), "")) // heard again
	b.now = b.now.Add(99 * time.Second)
	b.send(0, eth(mac(1), mac(0), "b"))
	b.want("", "b", "")
	b.now = b.now.Add(time.Second)
	b.send(0, eth(mac(1), mac(0), "c"))
	b.want("", "c", "c")
	for _, e := range b.s.FDB() {
		if e.MAC == mac(1) {
			t.Errorf("aged entry is listed: %+v", e)
		}
	}
}

func TestMove(t *testing.T) {
	b := newBench(t, vswitch.Config{}, none, none, none)
	b.send(1, eth(mac(9), mac(1), ""))
	b.send(2, eth(mac(9), mac(1), ""))
	b.want("", "", "")
	b.send(0, eth(mac(1), mac(0), "x"))
	b.want("", "", "x")
	if st := b.s.Stats(); st.Moves != 1 || st.MACs != 2 {
		t.Errorf("%+v", st)
	}
}

func TestNothingBackOut(t *testing.T) {
	b := newBench(t, vswitch.Config{}, none, none)
	b.send(0, eth(mac(9), mac(0), ""), eth(mac(9), mac(1), ""))
	b.want("", "")
	b.send(0, eth(mac(1), mac(0), "x"))
	b.want("", "")
	b.wantDrop(0, frame.DropHairpin, 1)
}

func TestRefusedFrames(t *testing.T) {
	short := frame.Frame{Data: make([]byte, 13)}
	long := frame.Frame{Data: make([]byte, wire.MaxFrame+1)}
	copy(long.Data, eth(mac(1), mac(0), "").Data)
	for _, c := range []struct {
		name string
		f    frame.Frame
		why  frame.Drop
	}{
		{"empty", frame.Frame{}, frame.DropMalformed},
		{"short", short, frame.DropMalformed},
		{"long", long, frame.DropMalformed},
		{"zero source", eth(mac(1), wire.MAC{}, ""), frame.DropGroupSource},
		{"multicast source", eth(mac(1), wire.MAC{1, 0, 0x5e, 0, 0, 1}, ""), frame.DropGroupSource},
		{"broadcast source", eth(mac(1), wire.Broadcast, ""), frame.DropGroupSource},
		{"spanning tree", eth(wire.MAC{1, 0x80, 0xc2}, mac(0), ""), frame.DropReserved},
		{"LLDP", eth(wire.MAC{1, 0x80, 0xc2, 0, 0, 0xe}, mac(0), ""), frame.DropReserved},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, vswitch.Config{}, none, none)
			b.send(0, c.f)
			b.want("", "")
			b.wantDrop(0, c.why, 1)
			balance(t, b.s)
			if c.why != frame.DropReserved && len(b.s.FDB()) != 0 {
				t.Errorf("learned %v", b.s.FDB())
			}
		})
	}
	b := newBench(t, vswitch.Config{}, none)
	b.send(0, eth(mac(1), mac(0), ""))
	b.wantDrop(0, frame.DropNoPort, 1)
	// 01:80:c2:00:00:10 is the first that is forwarded.
	b = newBench(t, vswitch.Config{}, none, none)
	b.send(0, eth(wire.MAC{1, 0x80, 0xc2, 0, 0, 0x10}, mac(0), "x"))
	b.want("", "x")
}

func TestSuperframeUntouched(t *testing.T) {
	s := vswitch.New(vswitch.Config{Log: quiet()})
	var got frame.Frame
	a, _ := s.AddPort(newRecorder(), none)
	_, _ = s.AddPort(portFunc(func(fs []frame.Frame) int { got = fs[0]; return len(fs) }), none)
	f := frame.Frame{Data: make([]byte, wire.MaxFrame), Hdr: wire.VirtioNetHdr{Flags: 1, GSOType: wire.GSOTCPv4 | wire.GSOECN, HdrLen: 54, GSOSize: 1460, CsumStart: 34, CsumOffset: 16}}
	copy(f.Data, eth(mac(1), mac(0), "").Data)
	s.Ingress(a).Forward([]frame.Frame{f})
	if got.Hdr != f.Hdr || len(got.Data) != len(f.Data) || &got.Data[0] != &f.Data[0] {
		t.Errorf("got header %+v and %d bytes, want the frame itself", got.Hdr, len(got.Data))
	}
}

type portFunc func([]frame.Frame) int

func (f portFunc) Transmit(fs []frame.Frame) int { return f(fs) }
func (portFunc) Caps() frame.Caps                { return frame.CapAll }

// Order between any two frames for one port holds, whatever mixture a batch is.
func TestOrderInMixedBatch(t *testing.T) {
	b := newBench(t, vswitch.Config{}, none, none, none, none)
	for i := range 4 {
		b.send(i, eth(mac(9), mac(i), ""))
	}
	b.want("", "", "", "")
	b.send(0,
		eth(mac(1), mac(0), "a"), eth(mac(2), mac(0), "b"), eth(wire.Broadcast, mac(0), "C"), eth(mac(1), mac(0), "d"),
		eth(mac(0), mac(0), "lost"), eth(wire.Broadcast, mac(0), "E"), eth(mac(2), mac(0), "f"))
	b.want("", "aCdE", "bCEf", "CE")
	// And again: no chain is left over.
	b.send(0, eth(mac(3), mac(0), "x"), eth(mac(1), mac(0), "y"))
	b.want("", "y", "", "x")
	b.send(0, eth(wire.Broadcast, mac(0), "z"), eth(mac(1), mac(0), "w"))
	b.want("", "zw", "z", "z")
	balance(t, b.s)
}

func TestLongBatch(t *testing.T) {
	b := newBench(t, vswitch.Config{}, none, none, none)
	b.send(1, eth(mac(9), mac(1), ""))
	b.want("", "", "")
	var fs []frame.Frame
	want1, want2 := "", ""
	for i := range 1000 {
		p := fmt.Sprintf("%03d,", i)
		d := mac(1)
		if i%7 == 0 {
			d = wire.Broadcast
			want2 += p
		}
		want1 += p
		fs = append(fs, eth(d, mac(0), p))
	}
	b.send(0, fs...)
	b.want("", want1, want2)
	balance(t, b.s)
}

func TestRefusalByPort(t *testing.T) {
	b := newBench(t, vswitch.Config{}, none, none, none)
	b.send(1, eth(mac(9), mac(1), ""))
	b.want("", "", "")
	b.ports[1].room = 2
	b.send(0, eth(mac(1), mac(0), "a"), eth(wire.Broadcast, mac(0), "b"), eth(mac(1), mac(0), "c"), eth(wire.Broadcast, mac(0), "d"))
	b.want("", "ab", "bd")
	b.wantDrop(0, frame.DropRefused, 1)
	b.send(0, eth(mac(1), mac(0), "e"), eth(mac(1), mac(0), "f"))
	b.wantDrop(0, frame.DropRefused, 3)
	balance(t, b.s)
	if c := b.s.Ports()[1].Stats; c.TxRefused != 4 || c.TxFrames != 2 {
		t.Errorf("egress counters %+v", c)
	}
}

// Whatever a port says about how much it took, the counters stay sane.
func TestLyingPort(t *testing.T) {
	for _, n := range []int{-1, 99} {
		s := vswitch.New(vswitch.Config{Log: quiet()})
		a, _ := s.AddPort(newRecorder(), none)
		_, _ = s.AddPort(portFunc(func([]frame.Frame) int { return n }), vswitch.PortConfig{MAC: mac(1)})
		s.Ingress(a).Forward([]frame.Frame{eth(mac(1), mac(0), ""), eth(mac(1), mac(0), "")})
		balance(t, s)
	}
}

func TestIsolationAndSplitHorizon(t *testing.T) {
	iso, grp := vswitch.PortConfig{Isolated: true}, vswitch.PortConfig{Group: 7}
	b := newBench(t, vswitch.Config{}, iso, iso, none, grp, grp, vswitch.PortConfig{Group: 8})
	bc := func(i int) { b.send(i, eth(wire.Broadcast, mac(i), fmt.Sprint(i))) }
	bc(0)
	b.want("", "", "0", "0", "0", "0")
	bc(1)
	b.want("", "", "1", "1", "1", "1")
	bc(2)
	b.want("2", "2", "", "2", "2", "2")
	bc(3)
	b.want("3", "3", "3", "", "", "3")
	bc(4)
	b.want("4", "4", "4", "", "", "4")
	bc(5)
	b.want("5", "5", "5", "5", "5", "")
	b.send(0, eth(mac(1), mac(0), "x"), eth(mac(2), mac(0), "y"))
	b.send(3, eth(mac(4), mac(3), "x"), eth(mac(5), mac(3), "z"))
	b.want("", "", "y", "", "", "z")
	b.wantDrop(0, frame.DropIsolated, 1)
	b.wantDrop(3, frame.DropSplitHorizon, 1)
	balance(t, b.s)
}

func TestStaticWins(t *testing.T) {
	b := newBench(t, vswitch.Config{Ageing: time.Second}, none, vswitch.PortConfig{MAC: mac(1)}, none)
	b.send(2, eth(mac(9), mac(1), "spoof"))
	b.want("", "", "")
	b.wantDrop(2, frame.DropSpoofMAC, 1)
	b.now = b.now.Add(time.Hour)
	b.send(0, eth(mac(1), mac(0), "x"))
	b.want("", "x", "")
	b.send(1, eth(mac(9), mac(8), "spoof"))
	b.wantDrop(1, frame.DropSpoofMAC, 1)
	if _, err := b.s.AddPort(newRecorder(), vswitch.PortConfig{MAC: mac(1)}); !errors.Is(err, vswitch.ErrTaken) {
		t.Errorf("second port with the MAC: %v", err)
	}
	// A static entry added later takes the place of a learned one, and goes when asked to.
	b.send(0, eth(mac(9), mac(5), ""))
	b.want("", "", "")
	if err := b.s.AddStatic(b.ids[2], mac(5)); err != nil {
		t.Fatal(err)
	}
	b.send(1, eth(mac(5), mac(1), "y"))
	b.want("", "", "y")
	if !b.s.RemoveStatic(b.ids[2], mac(5)) || b.s.RemoveStatic(b.ids[2], mac(5)) || b.s.RemoveStatic(b.ids[1], mac(1)) {
		t.Error("RemoveStatic")
	}
	b.send(1, eth(mac(5), mac(1), "z"))
	b.want("z", "", "z")
}

func TestRemovePort(t *testing.T) {
	b := newBench(t, vswitch.Config{}, none, none, none)
	for i := range 3 {
		b.send(i, eth(mac(9), mac(i), ""))
	}
	b.want("", "", "")
	before := b.s.Stats().Total
	if err := b.s.RemovePort(b.ids[1]); err != nil {
		t.Fatal(err)
	}
	if after := b.s.Stats().Total; after.RxFrames != before.RxFrames || after.TxFrames != before.TxFrames {
		t.Errorf("counters went from %+v to %+v", before, after)
	}
	b.send(0, eth(mac(1), mac(0), "unknown again"))
	b.want("", "", "unknown again")
	b.send(1, eth(mac(0), mac(1), "late"))
	b.want("", "", "")
	if st := b.s.Stats(); st.Total.Drops[frame.DropPortDown] != 1 || st.Ports != 2 {
		t.Errorf("%+v", st)
	}
	balance(t, b.s)
	if err := b.s.RemovePort(b.ids[1]); !errors.Is(err, vswitch.ErrNoPort) {
		t.Errorf("second removal: %v", err)
	}
	// The index is used again, the ID is not, and the old Ingress does not become the new port's.
	id, err := b.s.AddPort(b.ports[1], vswitch.PortConfig{Name: "p1"})
	if err != nil || id == b.ids[1] {
		t.Fatal(id, err)
	}
	b.send(1, eth(mac(0), mac(1), "late"))
	b.want("", "", "")
	b.s.Ingress(id).Forward([]frame.Frame{eth(mac(0), mac(1), "new")})
	b.want("new", "", "")
}

func TestMACLimit(t *testing.T) {
	b := newBench(t, vswitch.Config{Ageing: 10 * time.Second}, vswitch.PortConfig{MACLimit: 2}, none)
	b.send(0, eth(mac(9), mac(1), "a"), eth(mac(9), mac(2), "b"), eth(mac(9), mac(3), "c"), eth(mac(9), mac(1), "d"))
	b.want("", "abd")
	b.wantDrop(0, frame.DropMACLimit, 1)
	if p := b.s.Ports()[0]; p.MACs != 2 {
		t.Errorf("%d MACs", p.MACs)
	}
	b.now = b.now.Add(10 * time.Second)
	b.send(0, eth(mac(9), mac(3), "e"))
	b.want("", "e")
	balance(t, b.s)
}

func TestStormLimit(t *testing.T) {
	b := newBench(t, vswitch.Config{}, vswitch.PortConfig{StormLimit: 10}, none)
	b.send(1, eth(mac(9), mac(1), ""))
	b.want("", "")
	for range 30 {
		b.send(0, eth(wire.Broadcast, mac(0), "b"), eth(mac(7), mac(0), "u"), eth(mac(1), mac(0), "."))
	}
	b.want("", "bu.bu.bu.bu.bu."+strings.Repeat(".", 25))
	b.wantDrop(0, frame.DropStorm, 50)
	b.now = b.now.Add(500 * time.Millisecond)
	for range 30 {
		b.send(0, eth(wire.Broadcast, mac(0), "b"))
	}
	b.want("", "bbbbb")
	balance(t, b.s)
}

func TestRateLimit(t *testing.T) {
	b := newBench(t, vswitch.Config{}, vswitch.PortConfig{RateLimit: 1 << 20}, vswitch.PortConfig{MAC: mac(1)})
	payload := string(make([]byte, 1010))
	sent := func() (n uint64) {
		before := b.s.Ports()[0].Stats.Unicast
		for range 3000 {
			b.send(0, eth(mac(1), mac(0), payload))
		}
		b.ports[1].take()
		return b.s.Ports()[0].Stats.Unicast - before
	}
	if n := sent(); n != 2*wire.MaxFrame/1024 {
		t.Errorf("burst of %d KiB, want %d", n, 2*wire.MaxFrame/1024)
	}
	b.now = b.now.Add(100 * time.Millisecond)
	if n := sent(); n < 102 || n > 103 {
		t.Errorf("%d KiB in 100 ms, want 102", n)
	}
	balance(t, b.s)
}

func TestFDBBound(t *testing.T) {
	b := newBench(t, vswitch.Config{MaxMACs: 100}, none, none, none)
	for i := range 10 {
		b.send(1, eth(mac(9), mac(1000+i), ""))
	}
	for i := range 5000 {
		b.now = b.now.Add(time.Millisecond)
		b.send(0, eth(mac(9), mac(2000+i), ""))
	}
	st := b.s.Stats()
	if st.MACs != 100 || st.Evictions != 5000-90 {
		t.Errorf("%+v", st)
	}
	// The port that invents sources has displaced its own, not the others'.
	if p := b.s.Ports(); p[1].MACs != 10 || p[0].MACs != 90 {
		t.Errorf("ports hold %d and %d", p[0].MACs, p[1].MACs)
	}
	// Static entries find room, and a table full of them learns nothing but forwards.
	for i := range 100 {
		if err := b.s.AddStatic(b.ids[2], mac(9000+i)); err != nil {
			t.Fatal(i, err)
		}
	}
	if err := b.s.AddStatic(b.ids[2], mac(9999)); !errors.Is(err, vswitch.ErrFull) {
		t.Errorf("static entry too many: %v", err)
	}
	b.want("", "", "")
	b.send(0, eth(mac(9050), mac(1), "x"))
	b.want("", "", "x")
	if st := b.s.Stats(); st.MACs != 100 || st.StaticMACs != 100 {
		t.Errorf("%+v", st)
	}
}

func TestIntrospection(t *testing.T) {
	b := newBench(t, vswitch.Config{}, vswitch.PortConfig{Name: "web", MAC: mac(1)}, none)
	b.send(1, eth(wire.Broadcast, mac(2), ""))
	b.now = b.now.Add(3 * time.Second)
	want := []vswitch.Entry{{mac(1), b.ids[0], 3 * time.Second, true}, {mac(2), b.ids[1], 3 * time.Second, false}}
	got := b.s.FDB()
	if len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("FDB %+v, want %+v", got, want)
	}
	if n := b.s.Flush(b.ids[1]); n != 1 || len(b.s.FDB()) != 1 {
		t.Errorf("flushed %d, left %v", n, b.s.FDB())
	}
	if p := b.s.Ports(); len(p) != 2 || p[0].Config.Name != "web" || p[1].ID != b.ids[1] {
		t.Errorf("%+v", p)
	}
}

func TestAddPortErrors(t *testing.T) {
	s := vswitch.New(vswitch.Config{MaxPorts: 2, Log: quiet()})
	for _, c := range []vswitch.PortConfig{
		{MAC: wire.Broadcast}, {MACLimit: -1}, {StormLimit: -1}, {RateLimit: -1}, {Group: -1},
		{Addrs: []netip.Addr{{}}}, {Addrs: []netip.Addr{netip.MustParseAddr("224.0.0.1")}}, {Addrs: []netip.Addr{netip.IPv6Unspecified()}},
	} {
		if _, err := s.AddPort(newRecorder(), c); err == nil {
			t.Errorf("accepted %+v", c)
		}
	}
	if _, err := s.AddPort(nil, none); err == nil {
		t.Error("accepted nil")
	}
	if _, err := s.AddPort(newRecorder(), vswitch.PortConfig{Name: "a"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.AddPort(newRecorder(), vswitch.PortConfig{Name: "a"}); !errors.Is(err, vswitch.ErrTaken) {
		t.Errorf("same name: %v", err)
	}
	if _, err := s.AddPort(newRecorder(), none); err != nil {
		t.Fatal(err)
	}
	if _, err := s.AddPort(newRecorder(), none); !errors.Is(err, vswitch.ErrFull) {
		t.Errorf("third port: %v", err)
	}
	in := s.Ingress(99)
	in.Forward([]frame.Frame{eth(wire.Broadcast, mac(1), "")})
	balance(t, s)
	if d := s.Stats().Total.Drops[frame.DropPortDown]; d != 1 {
		t.Errorf("frame from nowhere: %d", d)
	}
}

func TestIngressOfTwoGoroutinesPanics(t *testing.T) {
	s := vswitch.New(vswitch.Config{Log: quiet()})
	a, _ := s.AddPort(newRecorder(), none)
	in := s.Ingress(a)
	_, _ = s.AddPort(portFunc(func(fs []frame.Frame) int {
		defer func() {
			if recover() == nil {
				t.Error("no panic")
			}
		}()
		in.Forward(fs)
		return len(fs)
	}), none)
	in.Forward([]frame.Frame{eth(wire.Broadcast, mac(1), "")})
}
