package stack

import (
	"encoding/binary"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// sendFragments cuts a packet that is longer than the MTU (RFC 791 §2.3, RFC 8200 §4.5) and sends the pieces to mac. f.Data is overwritten
// only in its checksum field.
func (g *Gateway) sendFragments(t *tx, f *frame.Frame, mac wire.MAC) {
	if !finishChecksum(f) {
		g.drops.Add(frame.DropBadHdr, 1)
		return
	}
	d := f.Data[wire.EthernetLen:]
	ip, ok := wire.ParseIP(d, false)
	if !ok || ip.IsFragment() || ip.Version == 6 && ip.HdrLen != wire.IPv6Len {
		g.drops.Add(frame.DropTooBig, 1)
		return
	}
	hdr := ip.HdrLen
	if ip.Version == 6 {
		hdr += 8 // the fragment header
	}
	step := (g.MTU() - hdr) &^ 7
	payload := d[ip.HdrLen:ip.Len]
	id := g.ipID.Add(1)
	for off := 0; off < len(payload); off += step {
		n := min(step, len(payload)-off)
		more := off+n < len(payload)
		r := t.room(wire.EthernetLen + hdr + n)
		wire.PutEthernet(r, mac, g.mac, etherTypeOf(f.Data))
		h := r[wire.EthernetLen:]
		copy(h, d[:ip.HdrLen])
		if ip.Version == 4 {
			binary.BigEndian.PutUint16(h[2:], uint16(hdr+n))
			binary.BigEndian.PutUint16(h[4:], uint16(id))
			v := uint16(off / 8)
			if more {
				v |= 0x2000
			}
			binary.BigEndian.PutUint16(h[6:], v)
			h[10], h[11] = 0, 0
			binary.BigEndian.PutUint16(h[10:], ^wire.Fold(wire.Sum(h[:hdr], 0)))
		} else {
			binary.BigEndian.PutUint16(h[4:], uint16(8+n))
			next := h[6]
			h[6] = 44
			e := h[wire.IPv6Len:]
			e[0], e[1] = next, 0
			v := uint16(off)
			if more {
				v |= 1
			}
			binary.BigEndian.PutUint16(e[2:], v)
			binary.BigEndian.PutUint32(e[4:], id)
		}
		copy(h[hdr:], payload[off:off+n])
		t.add(frame.Frame{Data: r})
	}
	t.flush()
}
