package node

import (
	"net/netip"
	"strings"
	"testing"

	"patchbay/tunnel"
)

// TestSealedNetworkRefusesClearPeers: whoever adds a peer cannot forget its seal, and nothing stays of the attempt.
func TestSealedNetworkRefusesClearPeers(t *testing.T) {
	n, err := NewNetwork(t.Context(), NetworkConfig{Name: "lab", VNI: 7, Seal: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}()
	v, err := tunnel.Listen(tunnel.Config{Listen: netip.MustParseAddrPort("127.0.0.1:0")})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	for _, w := range []tunnel.Wire{tunnel.WireVXLAN, tunnel.WirePatchbay} {
		p, err := n.AddPeer(v, PeerConfig{Name: "127.0.0.1:4790", Remote: netip.MustParseAddrPort("127.0.0.1:4790"), Wire: w})
		if err == nil || !strings.Contains(err.Error(), `network "lab" is sealed, and peer "127.0.0.1:4790" is not`) {
			t.Errorf("wire %v: %v, %v", w, p, err)
		}
	}
	if got := len(n.Peers()) + len(v.Peers()); got != 0 {
		t.Errorf("%d peers stay", got)
	}
}
