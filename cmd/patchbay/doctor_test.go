package main

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"patchbay/internal/api"
)

// TestDoctorMTU: a mismatch is explained, with what to do.
func TestDoctorMTU(t *testing.T) {
	peer := func(mtu int, addr string) api.Peer {
		return api.Peer{PeerSpec: api.PeerSpec{Host: "b", Port: 4789, Wire: api.WireVXLAN}, MTU: mtu, Address: netip.AddrPortFrom(netip.MustParseAddr(addr), 4789)}
	}
	both := []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24"), netip.MustParsePrefix("fd09::/64")}
	for _, c := range []struct {
		mtu     int
		subnets []netip.Prefix
		peers   []api.Peer
		ok      bool
		words   []string
	}{
		{1450, both, []api.Peer{peer(1450, "192.0.2.1"), peer(1450, "192.0.2.2")}, true, []string{"1450 bytes, as many as get to its 2 peers"}},
		{1500, both, []api.Peer{peer(8950, "192.0.2.1"), peer(1430, "2001:db8::1")}, false, []string{"MTU is 1500, but 1430 bytes get to peer b:4789", "wire vxlan over IPv6", "--mtu 1430"}},
		{1450, both, []api.Peer{peer(8950, "192.0.2.1")}, true, []string{"could be larger"}},
		{1280, both, []api.Peer{peer(1200, "192.0.2.1")}, false, []string{"less than the 1280", "IPv4 subnet alone"}},
		{1450, both, []api.Peer{{}}, true, []string{"no peer has a route"}},
	} {
		r := mtuResult(&api.Network{NetworkSpec: api.NetworkSpec{Name: "lab", MTU: c.mtu, Subnets: c.subnets}}, c.peers)
		text := r.Detail + " " + r.Remedy
		for _, w := range c.words {
			if !strings.Contains(text, w) {
				t.Errorf("%+v lacks %q", r, w)
			}
		}
		if r.OK != c.ok || r.Name != "mtu lab" || r.OK != (r.Remedy == "") {
			t.Errorf("%+v", r)
		}
	}
	for state, word := range map[api.PeerState]string{
		api.PeerWaiting: "leads nowhere", api.PeerNew: "UDP port 4789 is open", api.PeerDown: "its node runs", api.PeerUp: "--no-offload", api.PeerHeard: "3% of what",
		api.PeerHandshake: "same name and VNI",
	} {
		p := peer(1450, "192.0.2.1")
		p.State, p.Since, p.Offloads, p.Loss = state, time.Now().Add(-time.Minute), "lossy", 0.03
		if state == api.PeerWaiting {
			p.Error = "its name leads nowhere now"
		}
		if state == api.PeerHandshake || state == api.PeerDown {
			p.SealError = "the certificate has expired"
			if r := peerResult(&p); !strings.HasSuffix(r.Detail, p.SealError) {
				t.Errorf("%s: %+v", state, r)
			}
		}
		r := peerResult(&p)
		if !strings.Contains(r.Detail+" "+r.Remedy, word) || r.OK != (state == api.PeerUp || state == api.PeerHeard) {
			t.Errorf("%s: %+v", state, r)
		}
	}
}

// TestDoctorIdentity: a daemon that cannot be known on its sealed networks, or not for long, is told of.
func TestDoctorIdentity(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		info   api.Info
		sealed bool
		there  bool
		words  string // none: all is well
	}{
		{api.Info{}, false, false, ""},
		{api.Info{}, true, true, "--psk-file"},
		{api.Info{Identity: "key"}, true, true, ""},
		{api.Info{Identity: "certificate", Expires: now.Add(300 * 24 * time.Hour)}, true, true, ""},
		{api.Info{Identity: "certificate", Expires: now.Add(24 * time.Hour)}, false, true, "ca issue --force"},
		{api.Info{Identity: "certificate", Expires: now.Add(-time.Hour)}, true, true, "ca issue --force"},
	} {
		r, ok := identityResult(&c.info, []api.Network{{NetworkSpec: api.NetworkSpec{Name: "lab", Seal: c.sealed}}}, now)
		if ok != c.there || ok && (r.OK != (c.words == "") || !strings.Contains(r.Remedy, c.words)) {
			t.Errorf("%+v, sealed %v: %+v, %v", c.info, c.sealed, r, ok)
		}
	}
}
