package frame

import (
	"strings"
	"sync"
	"testing"

	"patchbay/internal/wire"
)

func TestEveryDropReasonHasANameAndAMeaning(t *testing.T) {
	names := make(map[string]Drop)
	for d := Drop(0); int(d) < NumDrops; d++ {
		name, meaning := d.String(), d.Meaning()
		if name == "" || meaning == "" {
			t.Errorf("reason %d: name %q, meaning %q", d, name, meaning)
		}
		if strings.ToLower(name) != name || strings.ContainsAny(name, " _") {
			t.Errorf("reason %d is called %q; want lower case with hyphens", d, name)
		}
		if other, twice := names[name]; twice {
			t.Errorf("reasons %d and %d are both called %q", other, d, name)
		}
		names[name] = d
	}
	if Drop(NumDrops).String() != "unknown" || Drop(255).Meaning() == "" {
		t.Error("a reason of a later version is not survived")
	}
}

func TestDropCountersCountFromManyGoroutines(t *testing.T) {
	var c DropCounters
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 1000 {
				c.Add(DropTxBusy, 2)
				c.Add(DropStorm, 1)
				c.Add(DropRate, 0)
				c.Add(DropRate, -5)
			}
		})
	}
	wg.Wait()
	if c.Get(DropTxBusy) != 16000 || c.Get(DropStorm) != 8000 || c.Get(DropRate) != 0 || c.Total() != 24000 {
		t.Errorf("txbusy %d, storm %d, rate %d, total %d", c.Get(DropTxBusy), c.Get(DropStorm), c.Get(DropRate), c.Total())
	}
	seen := map[Drop]uint64{}
	c.Each(func(d Drop, n uint64) { seen[d] = n })
	if len(seen) != 2 || seen[DropTxBusy] != 16000 {
		t.Errorf("Each saw %v", seen)
	}
}

func TestCapsTake(t *testing.T) {
	h := func(flags, gso uint8) wire.VirtioNetHdr { return wire.VirtioNetHdr{Flags: flags, GSOType: gso} }
	for _, c := range []struct {
		name string
		hdr  wire.VirtioNetHdr
		need Caps
	}{
		{"finished", h(0, 0), 0},
		{"valid checksum", h(wire.VirtioDataValid, 0), 0},
		{"partial checksum", h(wire.VirtioNeedsCsum, 0), CapCsum},
		{"TSO4", h(wire.VirtioNeedsCsum, wire.GSOTCPv4), CapCsum | CapTSO4},
		{"TSO6", h(wire.VirtioNeedsCsum, wire.GSOTCPv6), CapCsum | CapTSO6},
		{"TSO4 with CWR", h(wire.VirtioNeedsCsum, wire.GSOTCPv4|wire.GSOECN), CapCsum | CapTSO4 | CapECN},
		{"USO", h(wire.VirtioNeedsCsum, wire.GSOUDPL4), CapCsum | CapUSO},
	} {
		for caps := Caps(0); caps <= CapAll; caps++ {
			if got, want := caps.Takes(c.hdr), caps&c.need == c.need; got != want {
				t.Errorf("%s: caps %05b: Takes = %v", c.name, caps, got)
			}
		}
	}
	if CapAll.Takes(h(0, wire.GSOUDP)) {
		t.Error("UFO is taken, which nobody of us can do")
	}
}
