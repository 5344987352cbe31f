package porttest

import (
	"bytes"
	"strings"
	"sync"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/offload"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

func TestMain(m *testing.M) { testbed.Main(m) }

// memory is a port whose far end is a slice: a good one, with a fault to choose.
type memory struct {
	fault string
	caps  frame.Caps
	room  int
	once  sync.Once

	mu     sync.Mutex
	got    []frame.Frame
	closed bool
	drops  frame.DropCounters
}

func (m *memory) Caps() frame.Caps { return m.caps }

func (m *memory) Transmit(fs []frame.Frame) int {
	if m.fault == "waits" && len(m.peek()) > 5000 {
		m.once.Do(func() { time.Sleep(1500 * time.Millisecond) })
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed && m.fault != "works when closed" {
		if m.fault != "does not count" {
			m.drops.Add(frame.DropPortDown, len(fs))
		}
		return 0
	}
	if m.fault == "reorders" && len(fs) > 5 {
		fs[1], fs[5] = fs[5], fs[1]
	}
	n := 0
	for i := range fs {
		f := &fs[i]
		if m.fault == "scribbles" {
			f.Data[0] ^= 1
		}
		if m.fault == "loses" && len(m.got) == 20 {
			n++
			m.room--
			continue
		}
		if len(m.got) >= m.room {
			if m.fault != "loses quietly" {
				m.drops.Add(frame.DropTxBusy, len(fs)-n)
			}
			return n
		}
		if !m.put(f) {
			m.drops.Add(frame.DropBadHdr, len(fs)-n)
			return n
		}
		n++
	}
	if m.fault == "counts too many" {
		return len(fs) + 1
	}
	return n
}

func (m *memory) put(f *frame.Frame) bool {
	if m.fault == "keeps" {
		m.got = append(m.got, *f)
		return true
	}
	h := f.Hdr
	if !h.Validate(f.Data) {
		return false
	}
	if m.fault == "passes superframes as frames" {
		m.got = append(m.got, frame.Frame{Data: bytes.Clone(f.Data)})
		return true
	}
	if m.caps.Takes(f.Hdr) {
		m.got = append(m.got, frame.Frame{Hdr: f.Hdr, Data: bytes.Clone(f.Data)})
		return true
	}
	var s offload.Segmenter
	c, ok := s.Reset(f)
	for range c {
		m.got = append(m.got, frame.Frame{Data: s.Append(nil)})
	}
	return ok
}

func (m *memory) peek() []frame.Frame {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.got
}

func (m *memory) read(time.Duration) []frame.Frame {
	m.mu.Lock()
	defer m.mu.Unlock()
	got := m.got
	m.got = nil
	return got
}

func (m *memory) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
}

func open(fault string, caps frame.Caps) *Harness {
	m := &memory{fault: fault, caps: caps, room: 10000}
	h := &Harness{Port: m, Read: m.read, Close: m.close, Drops: m.drops.Total}
	h.defaults()
	return h
}

func TestGoodPortPasses(t *testing.T) {
	for _, caps := range []frame.Caps{0, frame.CapCsum, frame.CapTSO4 | frame.CapCsum, frame.CapAll} {
		Run(t, func(t *testing.T) *Harness { return open("", caps) })
	}
}

// Each fault is found, and by the check that is there for it.
func TestBadPortsFail(t *testing.T) {
	for fault, check := range map[string]string{
		"scribbles":                    "leaves lent frames alone",
		"keeps":                        "leaves lent frames alone",
		"reorders":                     "delivers in order",
		"loses":                        "delivers in order",
		"passes superframes as frames": "finishes what it cannot pass on",
		"waits":                        "never waits",
		"loses quietly":                "never waits",
		"works when closed":            "drops and counts after Close",
		"does not count":               "drops and counts after Close",
		"counts too many":              "delivers in order",
	} {
		t.Run(fault, func(t *testing.T) {
			for _, c := range checks {
				if c.name != check {
					continue
				}
				h := open(fault, 0)
				h.Patience = 500 * time.Millisecond
				err := c.run(h)
				if err == nil {
					t.Fatalf("%q did not notice", check)
				}
				t.Log(err)
				return
			}
			t.Fatalf("no check %q", check)
		})
	}
}

// The packet reader sees superframes as superframes and what the interface sends not at all:
//
//	[a] eth0 ── veth ── eth0 [b] ◀ PacketReader
func TestPacketReader(t *testing.T) {
	testbed.Leaks(t)
	a, b := testbed.NewNS(t, "a"), testbed.NewNS(t, "b")
	testbed.Veth(t, a, "eth0", b, "eth0")
	read := PacketReader(t, b, "eth0")
	ad := defaultAddrs()
	f := ad.tcp(flow{false, 7}, 0, 20000, 1400, true)
	sender := func(ns *testbed.NS, f frame.Frame) {
		var fd int
		var err error
		ns.Do(func() { fd, err = packetSocket("eth0") })
		if err != nil {
			t.Fatal(err)
		}
		defer closeFD(fd)
		buf := make([]byte, wire.VirtioNetHdrLen, wire.VirtioNetHdrLen+len(f.Data))
		f.Hdr.Encode(buf)
		if err := writeFD(fd, append(buf, f.Data...)); err != nil {
			t.Fatal(err)
		}
	}
	sender(b, ad.udp(flow{false, 8}, 1, 100, false))
	sender(a, f)
	var got []string
	testbed.Eventually(t, 5*time.Second, func() bool {
		for _, r := range read(10 * time.Millisecond) {
			if bytes.Contains(r.Data, []byte{0x70, 0x73}) { // the destination port
				got = append(got, string(r.Data))
				if r.Hdr.GSOType != wire.GSOTCPv4 || r.Hdr.GSOSize != 1400 {
					t.Errorf("header %+v", r.Hdr)
				}
			}
		}
		return len(got) > 0
	})
	if len(got) != 1 || !strings.HasSuffix(got[0], string(f.Data[100:])) {
		t.Errorf("got %d frames, or another one", len(got))
	}
}
