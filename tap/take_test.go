package tap

import (
	"testing"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// What a device yields is checked before anybody looks at it.
func TestTakeChecks(t *testing.T) {
	good := udpFrame(64, 0)
	rec := func(h wire.VirtioNetHdr, data []byte) []byte {
		b := make([]byte, wire.VirtioNetHdrLen)
		h.Encode(b)
		return append(b, data...)
	}
	bad := good.Hdr
	bad.CsumStart = 60000
	super := tcpFrame(5000)
	noSize := super.Hdr
	noSize.GSOSize = 0
	for _, c := range []struct {
		name string
		rec  []byte
		want frame.Drop
	}{
		{"good", rec(good.Hdr, good.Data), noDrop},
		{"superframe", rec(super.Hdr, super.Data), noDrop},
		{"longest", rec(wire.VirtioNetHdr{}, make([]byte, wire.MaxFrame)), noDrop},
		{"empty", nil, frame.DropMalformed},
		{"header alone", rec(good.Hdr, nil), frame.DropMalformed},
		{"short", rec(wire.VirtioNetHdr{}, make([]byte, wire.EthernetLen-1)), frame.DropMalformed},
		{"too long", rec(wire.VirtioNetHdr{}, make([]byte, wire.MaxFrame+1)), frame.DropMalformed},
		{"checksum outside", rec(bad, good.Data), frame.DropBadHdr},
		{"segments of nothing", rec(noSize, super.Data), frame.DropBadHdr},
	} {
		d := &Device{drops: new(frame.DropCounters), info: Info{VnetHdr: true}}
		r := &reader{d: d, hdrLen: wire.VirtioNetHdrLen}
		ok := r.take(c.rec)
		if ok != (c.want == noDrop) || ok != (len(r.fs) == 1) {
			t.Errorf("%s: taken: %v", c.name, ok)
		}
		if c.want != noDrop && d.drops.Get(c.want) != 1 || c.want == noDrop && d.drops.Total() != 0 {
			t.Errorf("%s: not counted as %v", c.name, c.want)
		}
	}
}
