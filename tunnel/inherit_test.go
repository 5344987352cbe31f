package tunnel

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"patchbay/internal/testbed"
)

// Sessions that were handed over are good for one peer, also where that is not admitted or has to go at once: with the same bytes a second one would seal under the same numbers.
func TestSessionsServeOnce(t *testing.T) {
	testbed.Leaks(t)
	a, b := underlay(t, 1500)
	sa, sb := sealPair(t)
	remote := netip.MustParseAddrPort("10.9.0.2:4789")
	q := addPeer(t, newVTEP(t, b, Config{}), PeerConfig{VNI: 42, Remote: netip.MustParseAddrPort("10.9.0.1:4789"), Seal: sb})
	var v *VTEP
	var err error
	a.Do(func() { v, err = Listen(Config{Log: quiet}) })
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	p := addPeer(t, v, PeerConfig{VNI: 42, Remote: remote, Seal: sa})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- v.Run(ctx) }()
	testbed.Eventually(t, tardy+10*time.Second, isSealed(p, q))
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	heir := &Seal{Identity: sharedKey(t, testKey), Network: sa.Network, Host: sa.Host}
	if heir.Sessions, err = p.ExportSessions(); err != nil {
		t.Fatal(err)
	}
	p.Close()
	used := map[uint64]bool{}
	for i, want := range []bool{true, false} {
		p := addPeer(t, v, PeerConfig{VNI: 42, Remote: remote, Seal: heir})
		s := p.seal.link.Session()
		if (s != nil) != want {
			t.Errorf("peer %d has a session: %v", i+1, s != nil)
		}
		if s != nil {
			seq, ok := s.Next()
			if !ok || used[seq] {
				t.Errorf("peer %d seals number %d again", i+1, seq)
			}
			used[seq] = true
		}
		p.Close()
	}
}
