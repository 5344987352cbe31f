package tunnel

import (
	"net/netip"
	"testing"

	"patchbay/frame"
	"patchbay/tunnel/superframe"
	"patchbay/tunnel/udp"
)

// What is put together and then does not open gives its memory back as early as what does: somebody who knows a session's id has it for the asking.
func TestForgedMessagesAreNotKept(t *testing.T) {
	r := newRig(t)
	s, _ := sealPair(t)
	p := addPeer(t, r.VTEP, PeerConfig{VNI: 42, Remote: netip.MustParseAddrPort("127.0.0.2:4789"), Wire: WirePatchbay, Seal: s})
	const id = 0x1234
	r.links.byID.Store(&map[uint32]*Peer{id: p})
	var set peerSet
	var last lookup
	body := make([]byte, 60000)
	h := superframe.Header{Sealed: true, Channel: id, Total: uint32(len(body))}
	most := 0
	for h.Seq = range uint64(64) {
		var c superframe.Cutter
		for c.Begin(h, 0, body, 1400); c.More(); {
			d := make([]byte, c.HeadLen(), 1500)
			d = append(d, c.Next(d)...)
			r.receiveSuper(&set, d, &udp.Train{Data: d, Size: len(d), From: p.Remote()}, &last)
		}
		most = max(most, p.stream(id).r.Lent())
	}
	if most > maxLent+superframe.MaxMessage+superframe.SealRoom {
		t.Errorf("%d bytes are held, %d was the bound", most, maxLent)
	}
	if n := p.Drops().Get(frame.DropNoSession); n != 64 {
		t.Errorf("%d messages did not open, of 64", n)
	}
}
