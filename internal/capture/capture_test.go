package capture

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket/pcapgo"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	vswitch "patchbay/switch"
)

// sink is a port that takes everything.
type sink struct{}

func (sink) Transmit(fs []frame.Frame) int { return len(fs) }
func (sink) Caps() frame.Caps              { return frame.CapAll }

// bed is a switch with the ports a and b, both bound to a MAC, and c.
type bed struct {
	sw      *vswitch.Switch
	a, b, c vswitch.PortID
	in      *vswitch.Ingress // of a
}

var macA, macB = wire.MAC{2, 0, 0, 0, 0, 0xa}, wire.MAC{2, 0, 0, 0, 0, 0xb}

func newBed(t *testing.T) *bed {
	t.Helper()
	b := &bed{sw: vswitch.New(vswitch.Config{})}
	for _, p := range []struct {
		id  *vswitch.PortID
		cfg vswitch.PortConfig
	}{{&b.a, vswitch.PortConfig{Name: "a", MAC: macA}}, {&b.b, vswitch.PortConfig{Name: "b", MAC: macB}}, {&b.c, vswitch.PortConfig{Name: "c"}}} {
		id, err := b.sw.AddPort(sink{}, p.cfg)
		if err != nil {
			t.Fatal(err)
		}
		*p.id = id
	}
	b.in = b.sw.Ingress(b.a)
	return b
}

func ether(dst, src wire.MAC, n int) frame.Frame {
	d := make([]byte, n)
	wire.PutEthernet(d, dst, src, 0x88b5)
	return frame.Frame{Data: d}
}

// read is what a reader makes of a stream: per frame the port, the length and the comment.
func read(t *testing.T, b []byte) (out []string) {
	t.Helper()
	r, err := pcapgo.NewNgReader(bytes.NewReader(b), pcapgo.DefaultNgReaderOptions)
	if err != nil {
		t.Fatal(err)
	}
	for {
		data, ci, opts, err := r.ReadPacketDataWithOptions()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		i, err := r.Interface(ci.InterfaceIndex)
		if err != nil {
			t.Fatal(err)
		}
		s := i.Name + " " + wire.Dst(data).String()
		if ci.Length != len(data) {
			s += " cut"
		}
		out = append(out, strings.TrimSpace(s+" "+strings.Join(opts.Comments, ",")))
	}
}

// capturing runs a capture while f runs.
func capturing(t *testing.T, c Config, f func()) (*Capture, []byte) {
	t.Helper()
	p, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx, &b) }()
	testbed.Eventually(t, 5*time.Second, func() bool { return c.Switch.Observed() })
	f()
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return p, b.Bytes()
}

func TestCapture(t *testing.T) {
	b := newBed(t)
	send := func() {
		b.in.Forward([]frame.Frame{ether(macB, macA, 60), ether(wire.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, macA, 1000), ether(macB, wire.MAC{2, 0, 0, 0, 0, 0x66}, 60)})
		b.sw.Ingress(b.c).Forward([]frame.Frame{ether(macB, wire.MAC{2, 0, 0, 0, 0, 0xc}, 60)})
	}
	const spoof = "dropped: spoof-mac: the source MAC is not the one the port is bound to"
	mac := func(m wire.MAC) string { return m.String() }
	all := []string{"a " + mac(macB), "a ff:ff:ff:ff:ff:ff", "a " + mac(macB) + " " + spoof, "c " + mac(macB)}
	for _, c := range []struct {
		name string
		cfg  Config
		want []string
	}{
		{"all", Config{}, all},
		{"port a", Config{Port: b.a}, all[:3]},
		{"port b", Config{Port: b.b}, []string{all[0], all[1], all[3]}},
		{"port c", Config{Port: b.c}, []string{all[1], all[3]}},
		{"filter", Config{Filter: "broadcast"}, all[1:2]},
		{"snaplen", Config{Filter: "greater 500", SnapLen: 100}, []string{all[1] + " cut"}},
		{"count", Config{MaxFrames: 2}, all[:2]},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.cfg.Switch = b.sw
			_, out := capturing(t, c.cfg, send)
			if got := read(t, out); strings.Join(got, "\n") != strings.Join(c.want, "\n") {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
			if b.sw.Observed() {
				t.Error("it still looks after its end")
			}
		})
	}
	// tcpdump reads it as well, and so Wireshark.
	_, out := capturing(t, Config{Switch: b.sw}, send)
	cmd := testbed.AsOrdinaryUser(exec.Command(testbed.Tool(t, "tcpdump"), "-n", "-r", "-"))
	cmd.Stdin = bytes.NewReader(out)
	cmd.Stderr = os.Stderr
	if text, err := cmd.Output(); err != nil || strings.Count(string(text), "ethertype Unknown (0x88b5)") != 4 {
		t.Errorf("tcpdump: %v\n%s", err, text)
	}
}

// TestNewPort holds that a port which comes while a capture runs has its own interface in the file.
func TestNewPort(t *testing.T) {
	b := newBed(t)
	_, out := capturing(t, Config{Switch: b.sw}, func() {
		id, err := b.sw.AddPort(sink{}, vswitch.PortConfig{Name: "late"})
		if err != nil {
			t.Fatal(err)
		}
		b.sw.Ingress(id).Forward([]frame.Frame{ether(macB, wire.MAC{2, 0, 0, 0, 0, 7}, 60)})
	})
	if got := read(t, out); len(got) != 1 || got[0] != "late "+macB.String() {
		t.Errorf("got %v", got)
	}
}

// stuck is a writer that does not go on until it is let.
type stuck struct {
	bytes.Buffer
	more chan struct{}
	wait bool
}

func (s *stuck) Write(b []byte) (int, error) {
	if s.wait {
		<-s.more
	}
	return s.Buffer.Write(b)
}

// TestSlowReader holds that a reader that does not read costs memory up to the bound and no more, that forwarding goes on, and that what is missing is counted.
func TestSlowReader(t *testing.T) {
	b := newBed(t)
	w := &stuck{more: make(chan struct{})}
	p, err := New(Config{Switch: b.sw, BufferBytes: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx, w) }()
	testbed.Eventually(t, 5*time.Second, func() bool { return b.sw.Observed() })
	w.wait = true
	const frames = 2000
	for range frames {
		b.in.Forward([]frame.Frame{ether(macB, macA, 1000)})
	}
	s := p.Stats()
	if s.Frames+s.Skipped != frames || s.Skipped < frames/2 {
		t.Errorf("%+v of %d frames", s, frames)
	}
	p.mu.Lock()
	held := p.bytes
	p.mu.Unlock()
	if held > 64<<10 {
		t.Errorf("%d bytes wait", held)
	}
	close(w.more)
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if n := len(read(t, w.Bytes())); uint64(n) != s.Frames {
		t.Errorf("%d frames written, %d recorded", n, s.Frames)
	}
}

// TestReaderGone holds that a pipe whose reader has ended ends the capture without an error.
func TestReaderGone(t *testing.T) {
	b := newBed(t)
	p, err := New(Config{Switch: b.sw})
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	defer w.Close()
	if err := p.Run(t.Context(), w); err != nil {
		t.Errorf("%v", err)
	}
	if b.sw.Observed() {
		t.Error("it still looks")
	}
}

// refuser is a port that takes nothing.
type refuser struct{ sink }

func (refuser) Transmit([]frame.Frame) int { return 0 }

// TestOnePort holds what a capture of one port shows where not everything reaches it: isolation keeps broadcasts from it, what is isolated on its way there is shown with the reason, and what it
// refuses too.
func TestOnePort(t *testing.T) {
	sw := vswitch.New(vswitch.Config{})
	add := func(p vswitch.Port, name string, mac wire.MAC, isolated bool) vswitch.PortID {
		id, err := sw.AddPort(p, vswitch.PortConfig{Name: name, MAC: mac, Isolated: isolated})
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	macC := wire.MAC{2, 0, 0, 0, 0, 0xc}
	a, b, c := add(sink{}, "a", macA, true), add(sink{}, "b", macB, true), add(refuser{}, "c", macC, false)
	send := func() {
		sw.Ingress(a).Forward([]frame.Frame{ether(wire.Broadcast, macA, 60), ether(macB, macA, 60), ether(macC, macA, 60)})
	}
	_, out := capturing(t, Config{Switch: sw, Port: b}, send)
	if got := read(t, out); len(got) != 1 || !strings.HasPrefix(got[0], "a "+macB.String()+" dropped: isolated: ") {
		t.Errorf("of b: %q", got)
	}
	_, out = capturing(t, Config{Switch: sw, Port: c}, send)
	if got := read(t, out); len(got) != 4 || got[1] != "a "+macC.String() || !strings.HasPrefix(got[3], "a "+macC.String()+" dropped: refused: ") {
		t.Errorf("of c: %q", got)
	}
}
