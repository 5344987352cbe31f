package api

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"patchbay/internal/wire"
)

// Wire is how frames travel to a peer.
type Wire string

// The wires.
const (
	// WireVXLAN is RFC 7348, which kernels, Open vSwitch and flannel speak. The default.
	WireVXLAN Wire = "vxlan"
	// WirePatchbay is for peers that are patchbay too: superframes travel whole.
	WirePatchbay Wire = "patchbay"
)

// Bounds of peers.
const (
	MaxPeerFDB = 4096 // static entries of one peer
	maxHost    = 253  // bytes of a host name
)

// PeerSpec asks for a peer: the node on another host that a network goes on at. The zero value of every field but Host is its documented default.
type PeerSpec struct {
	// Host is the peer's name or address. A name is looked up again when the peer does not answer.
	Host string `json:"host"`
	// Port is the UDP port it listens on. Default: the network's.
	Port uint16 `json:"port,omitempty"`
	// Wire is how frames travel to it. Default: the network's.
	Wire Wire `json:"wire,omitempty"`
	// NoOffload sends each datagram by itself (no UDP_SEGMENT), for a path on which the kernel's cutting does harm.
	NoOffload bool `json:"noOffload,omitempty"`
	// OnePort sends from the listening port alone: to a peer behind a NAT, or one that shares its address with another of the network.
	OnePort bool `json:"onePort,omitempty"`
	// FDB are MACs that are known to live behind it; they are never learned elsewhere.
	FDB []wire.MAC `json:"fdb,omitempty"`
}

// PeerState is what is known of a peer.
type PeerState string

// The states of a peer.
const (
	PeerWaiting   PeerState = "waiting"   // it has no address yet, or the tunnel is not open; Error says why, and it is tried again
	PeerNew       PeerState = "new"       // nothing was heard of it yet
	PeerHeard     PeerState = "heard"     // frames come from it, but it answers no probes: a kernel
	PeerHandshake PeerState = "handshake" // keys are being agreed on
	PeerUp        PeerState = "up"        // it answers
	PeerDown      PeerState = "down"      // it answered once, and does no more
)

// Peer is a peer of a network as it is: its spec with every default filled in, and its state.
type Peer struct {
	PeerSpec
	Network string `json:"network"`
	// Address is where datagrams go now.
	Address netip.AddrPort `json:"address,omitzero"`
	State   PeerState      `json:"state"`
	// Since is when the state began.
	Since time.Time `json:"since"`
	// Heard is when anything came from it last.
	Heard time.Time `json:"heard,omitzero"`
	// Error says why it is waiting, or why its name leads nowhere now.
	Error string `json:"error,omitempty"`
	// RTT is the round trip in seconds; 0 while it is not known.
	RTT float64 `json:"rtt,omitempty"`
	// Loss is the part of what it sent lately that did not come, 0 to 1.
	Loss float64 `json:"loss,omitempty"`
	// Reordered is how many datagrams or messages from it were overtaken.
	Reordered uint64 `json:"reordered,omitempty"`
	// Mode is "superframes" or "segments" on the patchbay wire.
	Mode string `json:"mode,omitempty"`
	// Sealed is whether there are keys for it; on a sealed network nothing passes while there are none.
	Sealed bool `json:"sealed,omitempty"`
	// SealError says why the last handshake with it failed; empty after one that did not.
	SealError string `json:"sealError,omitempty"`
	// Handshakes is how many led to keys, since this node has the peer.
	Handshakes uint64 `json:"handshakes,omitempty"`
	// Offloads tells whether the kernel cuts datagrams for it: on, off, missing, refused or lossy.
	Offloads string `json:"offloads,omitempty"`
	// MTU is the largest inner IP packet in bytes that gets to it; 0 while there is no route.
	MTU      int    `json:"mtu,omitempty"`
	RxFrames uint64 `json:"rxFrames"`
	RxBytes  uint64 `json:"rxBytes"`
	TxFrames uint64 `json:"txFrames"` // a superframe is one
	TxBytes  uint64 `json:"txBytes"`  // of UDP payload
	// Drops are frames from it or for it that were not delivered.
	Drops   []DropCount `json:"drops,omitempty"`
	Created time.Time   `json:"created"`
	// Origin is "api" or "config".
	Origin string `json:"origin"`
}

// FDBSpec names a static entry of a peer.
type FDBSpec struct {
	MAC wire.MAC `json:"mac"`
}

// PeerRef is HOST or HOST:PORT as people write it: an IPv6 address before a port stands in brackets.
func PeerRef(host string, port uint16) string {
	if port == 0 {
		return host
	}
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}

// ParsePeer reads what PeerRef writes. Port is 0 when it is not given. Names come back in lower case, addresses in their short form.
func ParsePeer(s string) (host string, port uint16, err error) {
	bad := func() error {
		return Errorf(CodeInvalid, "write a host's name or address, or HOST:PORT, such as b.example.test, 192.0.2.7:4789 or [2001:db8::7]:4789", "peer %q is none", abbreviate(s))
	}
	if a, aerr := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]")); aerr == nil {
		return a.Unmap().String(), 0, checkHost(a.Unmap().String())
	}
	host = s
	if h, p, serr := net.SplitHostPort(s); serr == nil {
		n, perr := strconv.ParseUint(p, 10, 16)
		if perr != nil || n == 0 || h == "" {
			return "", 0, bad()
		}
		host, port = h, uint16(n)
	}
	if a, aerr := netip.ParseAddr(host); aerr == nil {
		host = a.Unmap().String() // with a zone as it is
	} else {
		host = strings.ToLower(strings.TrimSuffix(host, "."))
	}
	if a, aerr := netip.ParseAddr(host); aerr == nil && a.Unmap().String() != host || checkHost(host) != nil {
		return "", 0, bad()
	}
	return host, port, nil
}

// checkHost takes an address of one host, or a name of DNS labels.
func checkHost(s string) error {
	if a, err := netip.ParseAddr(s); err == nil {
		if a.IsUnspecified() || a.IsMulticast() || a.Is4In6() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
			return Errorf(CodeInvalid, "give that of one host", "address %s is no host's", a)
		}
		if z := a.Zone(); z != "" && (checkIfName(z) != nil || !a.IsLinkLocalUnicast()) {
			return Errorf(CodeInvalid, "name the interface only of a link-local address, such as fe80::1%eth0", "address %q is no host's", abbreviate(s))
		}
		return nil
	}
	ok := s != "" && len(s) <= maxHost
	digits := true // what looks like an IPv4 address and is none
	for label := range strings.SplitSeq(s, ".") {
		ok = ok && CheckName(strings.ReplaceAll(label, "_", "a")) == nil
		digits = digits && strings.Trim(label, "0123456789") == ""
	}
	if !ok || digits {
		return Errorf(CodeInvalid, "give a name such as b.example.test, or an address", "host %q is no name of one", abbreviate(s))
	}
	return nil
}

func (w Wire) check() error {
	switch w {
	case "", WireVXLAN, WirePatchbay:
		return nil
	}
	return Errorf(CodeInvalid, "use vxlan or patchbay", "wire %q is not known", abbreviate(string(w)))
}

// Validate checks what can be checked without a node. The error is an *Error of CodeInvalid.
func (s *FDBSpec) Validate() error {
	if s.MAC.IsZero() || s.MAC.IsGroup() {
		return Errorf(CodeInvalid, "give the address of one station, such as 02:00:5e:10:00:01", "static entry %s is no station's", s.MAC)
	}
	return nil
}

// Validate checks what can be checked without a node. The error is an *Error of CodeInvalid.
func (s *PeerSpec) Validate() error {
	if err := s.validate(); err != nil {
		return fmt.Errorf("peer %q: %w", abbreviate(s.Host), err)
	}
	return nil
}

func (s *PeerSpec) validate() error {
	if err := checkHost(s.Host); err != nil {
		return err
	}
	if err := s.Wire.check(); err != nil {
		return err
	}
	if len(s.FDB) > MaxPeerFDB {
		return Errorf(CodeInvalid, fmt.Sprintf("give at most %d", MaxPeerFDB), "%d static entries are too many", len(s.FDB))
	}
	seen := make(map[wire.MAC]bool, len(s.FDB))
	for _, m := range s.FDB {
		if err := (&FDBSpec{MAC: m}).Validate(); err != nil {
			return err
		}
		if seen[m] {
			return Errorf(CodeInvalid, "leave it out once", "static entry %s is given twice", m)
		}
		seen[m] = true
	}
	return nil
}
