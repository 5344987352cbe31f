package tap

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == argRR {
		if err := rrMain(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	testbed.Main(m)
}

// cable is a Sink that transmits everything to another Device: the simplest switch there is.
type cable struct {
	to     *Device
	frames atomic.Uint64
	supers atomic.Uint64 // superframes of TCP
	udp    atomic.Uint64 // superframes of UDP
	csum   atomic.Uint64 // frames with a checksum to finish
	maxLen atomic.Uint64
}

func (c *cable) Forward(fs []frame.Frame) {
	for i := range fs {
		f := &fs[i]
		switch {
		case f.Hdr.GSO() == wire.GSOUDPL4:
			c.udp.Add(1)
		case f.Superframe():
			c.supers.Add(1)
		}
		if f.Hdr.Flags&wire.VirtioNeedsCsum != 0 {
			c.csum.Add(1)
		}
		if n := uint64(len(f.Data)); n > c.maxLen.Load() {
			c.maxLen.Store(n)
		}
	}
	c.frames.Add(uint64(len(fs)))
	c.to.Transmit(fs)
}

// sinkFunc is a Sink made of a function.
type sinkFunc func(fs []frame.Frame)

func (f sinkFunc) Forward(fs []frame.Frame) { f(fs) }

// open makes a TAP in ns, configures it and hands it to a Device that the test closes.
func open(t testing.TB, ns *testbed.NS, oc OpenConfig, ic IfConfig) *Device {
	t.Helper()
	return openWith(t, ns, oc, ic, Config{})
}

func openWith(t testing.TB, ns *testbed.NS, oc OpenConfig, ic IfConfig, c Config) *Device {
	t.Helper()
	h := openHandle(t, ns, oc, ic)
	c.Info, c.FDs = h.Info, h.FDs
	d, err := New(c)
	if err != nil {
		h.Close()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func openHandle(t testing.TB, ns *testbed.NS, oc OpenConfig, ic IfConfig) *Handle {
	t.Helper()
	testbed.RequireTUN(t)
	var h *Handle
	var out Configured
	var err error
	ns.Do(func() {
		if h, err = Open(oc); err != nil {
			return
		}
		if out, err = h.Configure(ic); err != nil {
			h.Close()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range append(h.Notes, out.Notes...) {
		t.Log(n)
	}
	return h
}

// serve runs a Serve for every queue of d until the test ends.
func serve(t testing.TB, d *Device, sink frame.Sink) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for q := range d.Queues() {
		wg.Go(func() {
			if err := d.Serve(ctx, q, sink); err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
	}
	t.Cleanup(func() { cancel(); wg.Wait() })
}

// pair is two containers with one TAP each, joined by two cables:
//
//	ns a: eth0 10.1.0.1 fd01::1 ── TAP ── ab ──▶ ┐
//	                              ◀── ba ── TAP ── eth0 10.1.0.2 fd01::2 :ns b
type pair struct {
	a, b   *testbed.NS
	da, db *Device
	ab, ba *cable
}

func newPair(t testing.TB, oa, ob OpenConfig, mtu int) *pair {
	t.Helper()
	return newPairWith(t, oa, ob, mtu, Config{})
}

func newPairWith(t testing.TB, oa, ob OpenConfig, mtu int, c Config) *pair {
	t.Helper()
	p := &pair{a: testbed.NewNS(t, "a"), b: testbed.NewNS(t, "b")}
	oa.Name = "eth0"
	p.da = openWith(t, p.a, oa, IfConfig{MTU: mtu, MAC: wire.MAC{2, 0, 0, 0, 0, 1}, Addrs: prefixes("10.1.0.1/24", "fd01::1/64")}, c)
	p.plug(t, ob, mtu, c)
	return p
}

// plug makes the second container, and joins the two.
func (p *pair) plug(t testing.TB, ob OpenConfig, mtu int, c Config) {
	t.Helper()
	ob.Name = "eth0"
	p.db = openWith(t, p.b, ob, IfConfig{MTU: mtu, MAC: wire.MAC{2, 0, 0, 0, 0, 2}, Addrs: prefixes("10.1.0.2/24", "fd01::2/64")}, c)
	p.ab, p.ba = &cable{to: p.db}, &cable{to: p.da}
	serve(t, p.da, p.ab)
	serve(t, p.db, p.ba)
}

func prefixes(ss ...string) (ps []netip.Prefix) {
	for _, s := range ss {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

func TestOpenNegotiates(t *testing.T) {
	testbed.Leaks(t)
	ns := testbed.NewNS(t)
	d := open(t, ns, OpenConfig{Name: "eth0"}, IfConfig{MAC: wire.MAC{2, 1, 1, 1, 1, 1}, MTU: 1400})
	i := d.Info()
	if !i.VnetHdr || i.Name != "eth0" || i.MTU != 1400 || i.MAC != (wire.MAC{2, 1, 1, 1, 1, 1}) {
		t.Errorf("Info = %+v", i)
	}
	if want := frame.CapCsum | frame.CapTSO4 | frame.CapTSO6; i.Caps&want != want {
		t.Errorf("Caps = %b, want at least %b", i.Caps, want)
	}
	out, err := ns.Command(testbed.Tool(t, "ethtool"), "-k", "eth0").CombinedOutput()
	if err != nil {
		t.Fatalf("ethtool: %v: %s", err, out)
	}
	for _, want := range []string{"tx-checksum-ip-generic: on", "tx-tcp-segmentation: on", "tx-tcp6-segmentation: on"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("ethtool -k has no %q:\n%s", want, out)
		}
	}
	if i.Caps&frame.CapUSO != 0 && !strings.Contains(string(out), "tx-udp-segmentation: on") {
		t.Errorf("CapUSO claimed, but ethtool says no")
	}
}

func TestOpenWithout(t *testing.T) {
	ns := testbed.NewNS(t)
	for _, without := range []frame.Caps{frame.CapUSO, frame.CapUSO | frame.CapECN, frame.CapTSO6, frame.CapCsum} {
		d := open(t, ns, OpenConfig{Without: without}, IfConfig{})
		if d.Caps()&without != 0 || !d.Info().VnetHdr {
			t.Errorf("without %b: Caps %b, header %v", without, d.Caps(), d.Info().VnetHdr)
		}
	}
}

func TestOpenErrors(t *testing.T) {
	testbed.Leaks(t)
	testbed.RequireTUN(t)
	ns := testbed.NewNS(t)
	ns.Do(func() {
		h, err := Open(OpenConfig{Name: "eth0"})
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		for what, c := range map[string]OpenConfig{
			"holds the interface": {Name: "eth0"},
			"at most 15 bytes":    {Name: "a-name-longer-than-15"},
			"queues asked for":    {Queues: MaxQueues + 1},
			"is no TAP":           {Name: "lo"},
		} {
			if _, err := Open(c); err == nil || !strings.Contains(err.Error(), what) {
				t.Errorf("Open(%+v): %v, want an error with %q", c, err, what)
			}
		}
	})
}

func TestPersistKeepsAddresses(t *testing.T) {
	testbed.Leaks(t)
	ns := testbed.NewNS(t)
	for _, plain := range []bool{false, true} {
		h := openHandle(t, ns, OpenConfig{Name: "eth0", Persist: true, Plain: plain}, IfConfig{Addrs: prefixes("10.2.0.1/24")})
		mac := h.MAC
		h.Close()
		ns.Do(func() {
			h2, err := Open(OpenConfig{Name: "eth0", Plain: plain}) // which ends the persistence, too
			if err != nil {
				t.Fatal(err)
			}
			defer h2.Close()
			if h2.MAC != mac {
				t.Errorf("plain %v: MAC %v became %v", plain, mac, h2.MAC)
			}
			out, _ := ns.Command(testbed.Tool(t, "ip"), "addr", "show", "dev", "eth0").CombinedOutput()
			if !strings.Contains(string(out), "10.2.0.1/24") {
				t.Errorf("plain %v: address lost:\n%s", plain, out)
			}
		})
		if out, err := ns.Command(testbed.Tool(t, "ip"), "link", "show", "eth0").CombinedOutput(); err == nil {
			t.Errorf("plain %v: still there:\n%s", plain, out)
		}
	}
}

func TestConfigure(t *testing.T) {
	ns := testbed.NewNS(t)
	ip := testbed.Tool(t, "ip")
	d := open(t, ns, OpenConfig{}, IfConfig{
		Rename: "net7", TxQueueLen: 321, GSOMaxSize: 64000,
		Addrs: prefixes("10.3.0.5/24", "fd03::5/64"),
		Routes: []Route{
			{Dst: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.3.0.1")},
			{Dst: netip.MustParsePrefix("::/0"), Via: netip.MustParseAddr("fd03::1")},
			{Dst: netip.MustParsePrefix("192.0.2.0/24"), Metric: 7},
			{Dst: netip.MustParsePrefix("198.51.100.0/24"), Via: netip.MustParseAddr("172.31.0.1"), OnLink: true},
		},
	})
	if d.Info().Name != "net7" || d.Info().MTU != DefaultMTU {
		t.Errorf("Info = %+v", d.Info())
	}
	for _, c := range []struct{ args, want string }{
		{"-4 route", "default via 10.3.0.1 dev net7"},
		{"-6 route", "default via fd03::1 dev net7"},
		{"-4 route", "192.0.2.0/24 dev net7 scope link metric 7"},
		{"-4 route", "198.51.100.0/24 via 172.31.0.1 dev net7 onlink"},
		{"link show net7", "qlen 321"},
		{"link show net7", "mtu 1500"},
		{"-d link show net7", "gso_max_size 64000"},
		{"link show lo", "UP"},
		{"-6 addr show dev net7", "fd03::5/64 scope global nodad"},
	} {
		out, err := ns.Command(ip, strings.Fields(c.args)...).CombinedOutput()
		if err != nil || !strings.Contains(string(out), c.want) {
			t.Errorf("ip %s: %v: no %q in\n%s", c.args, err, c.want, out)
		}
	}
	ns.Do(func() {
		for _, s := range []string{"accept_ra", "autoconf", "dad_transmits", "router_solicitations"} {
			b, err := os.ReadFile("/proc/sys/net/ipv6/conf/net7/" + s)
			if err != nil || string(b) != "0\n" {
				t.Errorf("%s = %q, %v; want 0", s, b, err)
			}
		}
		// Nothing of this may be tentative: a container's first connection is made at once.
		out, _ := ns.Command(ip, "-6", "addr", "show", "dev", "net7", "tentative").CombinedOutput()
		if len(out) != 0 {
			t.Errorf("tentative addresses:\n%s", out)
		}
		if _, err := Configure(IfConfig{Name: "net7", TxQueueLen: 321, Addrs: prefixes("10.3.0.5/24", "fd03::5/64")}); err != nil {
			t.Errorf("the second time: %v", err)
		}
		for want, c := range map[string]IfConfig{
			`configure "nope"`:        {Name: "nope"},
			"MTU 20":                  {Name: "net7", MTU: 20},
			"group address":           {Name: "net7", MAC: wire.Broadcast},
			"add route":               {Name: "net7", Routes: []Route{{Dst: netip.MustParsePrefix("203.0.113.0/24"), Via: netip.MustParseAddr("172.31.9.1")}}},
			"IPv6 needs an MTU of 12": {Name: "net7", MTU: 1000, Addrs: prefixes("fd04::1/64")},
		} {
			if _, err := Configure(c); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("Configure(%+v): %v, want an error with %q", c, err, want)
			}
		}
	})
}

// A router that advertises itself must change nothing unless that was asked for.
func TestConfigureAcceptRA(t *testing.T) {
	ns := testbed.NewNS(t)
	open(t, ns, OpenConfig{Name: "eth0"}, IfConfig{AcceptRA: true})
	ns.Do(func() {
		if b, err := os.ReadFile("/proc/sys/net/ipv6/conf/eth0/accept_ra"); err != nil || string(b) != "2\n" {
			t.Errorf("accept_ra = %q, %v; want 2", b, err)
		}
	})
}

func TestNewRefuses(t *testing.T) {
	testbed.Leaks(t)
	ns := testbed.NewNS(t)
	h := openHandle(t, ns, OpenConfig{Name: "eth0"}, IfConfig{})
	defer h.Close()
	lie := h.Info
	lie.VnetHdr = false
	for want, c := range map[string]Config{
		"no descriptor":   {Info: h.Info},
		"virtio header":   {Info: lie, FDs: h.FDs},
		"makes no sense":  {Info: h.Info, FDs: h.FDs, BatchFrames: -1},
		"bad file descri": {Info: h.Info, FDs: []int{h.FDs[0], 1 << 20}},
	} {
		if _, err := New(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("New(%+v): %v, want an error with %q", c, err, want)
		}
	}
}

// asleep waits until a thread of this process sleeps in ppoll(2), which nothing but an idle read loop calls.
func asleep(t *testing.T) {
	t.Helper()
	want := []byte(fmt.Sprintf("%d ", unix.SYS_PPOLL))
	testbed.Eventually(t, 5*time.Second, func() bool {
		threads, err := filepath.Glob("/proc/self/task/*/syscall")
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(threads, func(f string) bool {
			b, err := os.ReadFile(f)
			return err == nil && bytes.HasPrefix(b, want)
		})
	})
}

func TestServeEnds(t *testing.T) {
	testbed.Leaks(t)
	ns := testbed.NewNS(t)
	for _, oc := range []OpenConfig{{Name: "eth0", Persist: true}, {Name: "eth0", Plain: true, Persist: true}, {Name: "eth0", Kind: KindPacket}} {
		h := openHandle(t, ns, oc, IfConfig{})
		d, err := New(Config{Info: h.Info, FDs: h.FDs})
		if err != nil {
			t.Fatal(err)
		}
		nothing := sinkFunc(func([]frame.Frame) {})
		result := make(chan error, 1)
		within := func(what string) error {
			t.Helper()
			select {
			case err := <-result:
				return err
			case <-time.After(5 * time.Second):
				t.Fatalf("%+v: %s: Serve did not return", oc, what)
				return nil
			}
		}
		// The context ends it, twice, so that the first wake-up does not linger.
		for range 2 {
			ctx, cancel := context.WithCancel(context.Background())
			go func() { result <- d.Serve(ctx, 0, nothing) }()
			asleep(t)
			select {
			case err := <-result:
				t.Fatalf("Serve returned before its context was done: %v", err)
			default:
			}
			if err := d.Serve(ctx, 0, nothing); !errors.Is(err, errServed) {
				t.Errorf("a second Serve: %v", err)
			}
			cancel()
			if err := within("cancel"); err != nil {
				t.Errorf("cancel: %v", err)
			}
		}
		if err := d.Serve(t.Context(), 1, nothing); err == nil {
			t.Error("Serve of a queue that is not there: no error")
		}
		// The interface is deleted.
		go func() { result <- d.Serve(t.Context(), 0, nothing) }()
		asleep(t)
		if out, err := ns.Command(testbed.Tool(t, "ip"), "link", "del", "eth0").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if err := within("link del"); !errors.Is(err, ErrGone) {
			t.Errorf("%+v: interface deleted: Serve says %v, want ErrGone", oc, err)
		}
		f := frame.Frame{Data: make([]byte, 60)}
		if n := d.Transmit([]frame.Frame{f, f}); n != 0 || d.Drops().Get(frame.DropTxError) != 2 {
			t.Errorf("%+v: Transmit to nowhere took %d, txerror %d", oc, n, d.Drops().Get(frame.DropTxError))
		}
		d.Close()
		// Close ends it.
		d = open(t, ns, OpenConfig{Name: "eth0", Plain: oc.Plain, Kind: oc.Kind}, IfConfig{})
		go func() { result <- d.Serve(t.Context(), 0, nothing) }()
		asleep(t)
		d.Close()
		if err := within("Close"); err != nil {
			t.Errorf("Close: %v", err)
		}
		if err := d.Serve(t.Context(), 0, nothing); !errors.Is(err, ErrClosed) {
			t.Errorf("Serve after Close: %v", err)
		}
		if n := d.Transmit([]frame.Frame{f}); n != 0 || d.Drops().Get(frame.DropPortDown) != 1 {
			t.Errorf("Transmit after Close took %d, port-down %d", n, d.Drops().Get(frame.DropPortDown))
		}
	}
}

// Close while many goroutines transmit: no write may reach a descriptor that somebody else has got meanwhile (-race and Leaks tell).
func TestCloseWhileTransmitting(t *testing.T) {
	testbed.Leaks(t)
	ns := testbed.NewNS(t)
	for range 10 {
		d := open(t, ns, OpenConfig{Name: "eth0"}, IfConfig{})
		var wg sync.WaitGroup
		var took, offered atomic.Int64
		f := frame.Frame{Data: make([]byte, 60)}
		for range 8 {
			wg.Go(func() {
				for d.Drops().Get(frame.DropPortDown) < 100 {
					took.Add(int64(d.Transmit([]frame.Frame{f, f})))
					offered.Add(2)
				}
			})
		}
		time.Sleep(time.Millisecond)
		d.Close()
		wg.Wait()
		if s := d.Stats(); s.TxFrames != uint64(took.Load()) || uint64(offered.Load()) != s.TxFrames+d.Drops().Total() {
			t.Fatalf("offered %d, took %d, counted %d, dropped %d", offered.Load(), took.Load(), s.TxFrames, d.Drops().Total())
		}
	}
}

func TestTransmitTooBig(t *testing.T) {
	ns := testbed.NewNS(t)
	for _, plain := range []bool{false, true} {
		d := open(t, ns, OpenConfig{Name: "eth0", Plain: plain}, IfConfig{})
		fits, tagged, long := make([]byte, 1514), make([]byte, 1518), make([]byte, 1515)
		tagged[12], tagged[13] = 0x81, 0
		n := d.Transmit([]frame.Frame{{Data: fits}, {Data: long}, {Data: tagged}})
		if n != 2 || d.Drops().Get(frame.DropTooBig) != 1 {
			t.Errorf("plain %v: took %d, too-big %d; want 2 and 1", plain, n, d.Drops().Get(frame.DropTooBig))
		}
		if s := d.Stats(); s.TxFrames != 2 || s.TxBytes != 1514+1518 {
			t.Errorf("plain %v: %+v", plain, s)
		}
		d.Close()
	}
}

// Closing the socket ends the interface, as closing a TAP does, and the far end's namespace with it. What the kernel drops in between is counted.
func TestPacketLifetime(t *testing.T) {
	testbed.Leaks(t)
	ns := testbed.NewNS(t)
	ip := testbed.Tool(t, "ip")
	d := open(t, ns, OpenConfig{Name: "eth0", Kind: KindPacket}, IfConfig{MTU: 1400, MAC: wire.MAC{2, 0, 0, 0, 0, 9}})
	i := d.Info()
	if i.Kind != KindPacket || i.Name != "eth0" || i.MTU != 1400 || i.MAC != (wire.MAC{2, 0, 0, 0, 0, 9}) || !i.VnetHdr {
		t.Errorf("Info = %+v", i)
	}
	send := inject(t, ns, "eth0")
	b := tcpFrame(1000).Data
	for range 20000 {
		send(b)
	}
	got := 0
	r := newReader(d, 0)
	for {
		if _, err := r.fill(); err != nil {
			t.Fatal(err)
		}
		if len(r.fs) == 0 {
			break
		}
		got += len(r.fs)
	}
	if s := d.Stats(); s.RxMissed == 0 || s.RxMissed+uint64(got) < 20000 || s.RxMissed != d.Stats().RxMissed {
		t.Errorf("sent 20000, read %d, missed %d", got, s.RxMissed)
	}
	d.Close()
	if !testbed.Wait(5*time.Second, func() bool {
		return ns.Command(ip, "link", "show", "eth0").Run() != nil
	}) {
		t.Error("the interface is still there after Close")
	}
}

// A tag that the container puts on its frames is still there behind a packet socket, from which the kernel takes it out.
func TestVLANTagSurvives(t *testing.T) {
	for _, oc := range []OpenConfig{{}, {Kind: KindPacket}, {Plain: true}} {
		oc.Name = "eth0"
		ns := testbed.NewNS(t)
		d := open(t, ns, oc, IfConfig{})
		send := inject(t, ns, "eth0")
		for _, tpid := range []byte{0x81, 0x88} {
			b := make([]byte, 100)
			for i := range b {
				b[i] = byte(i)
			}
			copy(b[12:], []byte{tpid, 0, 0x20, 5, 8, 6})
			if tpid == 0x88 {
				b[13] = 0xa8
			}
			send(b)
			// The container's kernel says a thing or two of its own.
			r, at := newReader(d, 0), -1
			for at < 0 {
				if _, err := r.fill(); err != nil {
					t.Fatal(err)
				}
				at = slices.IndexFunc(r.fs, func(f frame.Frame) bool { return len(f.Data) >= len(b) && f.Data[len(b)-1] == b[len(b)-1] })
			}
			if !bytes.Equal(r.fs[at].Data, b) {
				t.Errorf("%+v: sent\n%x got\n%x", oc, b, r.fs[at].Data)
			}
			if n := d.Transmit(r.fs[at:][:1]); n != 1 {
				t.Errorf("%+v: did not take the frame back", oc)
			}
		}
	}
}

func TestKindAuto(t *testing.T) {
	ns := testbed.NewNS(t)
	if d := open(t, ns, OpenConfig{Kind: KindAuto}, IfConfig{}); d.Info().Kind != KindTAP {
		t.Errorf("with %s: %v", DevicePath, d.Info().Kind)
	}
	testbed.BindFile(t, DevicePath, "") // a plain file: no TAP can be had from it
	if h, err := Open(OpenConfig{Name: "eth0"}); err == nil {
		h.Close()
		t.Error("a TAP without the device")
	}
	d := open(t, ns, OpenConfig{Kind: KindAuto}, IfConfig{})
	if d.Info().Kind != KindPacket || d.Info().Name == "" {
		t.Errorf("without %s: %+v", DevicePath, d.Info())
	}
}

func TestInfoTravelsAsJSON(t *testing.T) {
	in := Info{Name: "eth0", Kind: KindPacket, MAC: macA, MTU: 1400, Caps: frame.CapAll, VnetHdr: true}
	b, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	var out Info
	if err := json.Unmarshal(b, &out); err != nil || in != out {
		t.Errorf("%s became %+v, %v", b, out, err)
	}
	if err := json.Unmarshal([]byte(`{"kind":"tun"}`), &out); err == nil || !strings.Contains(err.Error(), "tap, packet") {
		t.Errorf("an unknown kind: %v", err)
	}
}
