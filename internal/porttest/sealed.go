package porttest

import (
	"bytes"
	"testing"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// OnlySealed looks at what was captured on the underlay of sealed tunnels: each UDP datagram is a sealed message or of a handshake (packages superframe and secure of tunnel), at least some are sealed messages, and
// clear, which is in what is sent inside, is in no frame.
func OnlySealed(t testing.TB, fs []frame.Frame, least int, clear []byte) {
	t.Helper()
	sealed := 0
	for _, f := range fs {
		if bytes.Contains(f.Data, clear) {
			t.Fatalf("clear on the underlay: % x", f.Data)
		}
		b := f.Data[wire.EthernetLen:]
		ip, ok := wire.ParseIP(b, f.Superframe())
		if !ok || ip.Proto != wire.ProtoUDP {
			continue
		}
		switch d := b[ip.HdrLen+8 : ip.Len]; {
		case len(d) > 1 && d[0] == 0xc1 && d[1] == 1:
			sealed++
		case len(d) > 1 && d[0] == 0xc3:
		default:
			t.Fatalf("a datagram that is neither sealed nor of a handshake: % x", d)
		}
	}
	if sealed < least {
		t.Errorf("%d sealed datagrams in %d frames, and not %d: the capture missed some", sealed, len(fs), least)
	}
}
