// Package tunnel joins the networks of several hosts: a VTEP is this host's end of every tunnel, and each Peer, one remote VTEP as seen by one network,
// is a port of that network's switch (vswitch.Port).
//
// # Theory of operation
//
// A VTEP listens on one UDP address and port, which all networks share; a network with a port of its own has a VTEP of its own.
//
// Towards the peer: the switch hands a batch to Peer.Transmit. Each frame is cut into finished segments (offload.Segmenter) and each segment becomes
// one VXLAN datagram, its header and the inner headers written into scratch, its payload gathered from where it lies. Package udp sends runs of equal datagrams as
// one message that the kernel cuts.
//
// From the peer: Run receives trains of datagrams and looks at each datagram of each train, since one train may carry several networks. The VNI and the
// sender's address name the Peer, and the frames of one batch go to that Peer's sink together, so that tap.Transmit finds consecutive segments of a flow
// side by side and joins them again.
//
// Broadcast is nothing special: the switch floods to all ports, and head-end replication is what comes of it. Full mesh without loops is split horizon:
// the ports of all peers of one network are in one group (vswitch.PortConfig.Group), so that what comes from a peer never goes to another. The addresses behind
// a peer are learned by the switch, or static entries of its port.
//
// # Who is a peer
//
// A datagram belongs to the Peer with its VNI whose remote address is the sender's. The sender's port says nothing, since a kernel
// sends from a port that follows the flow (RFC 7348 §5); only where two Peers of one network have the same address do their ports tell
// them apart, and they then have to send from the port they listen on (PeerConfig.OnePort at their end). Everybody else is dropped: DropUnknownVNI where
// no Peer has the VNI, else DropUnknownPeer. VXLAN has no security of its own (RFC 7348 §7): on a shared underlay anybody can forge an address.
//
// # MTU
//
// A network over an underlay with an MTU of 1500 has one of 1450 over IPv4 and 1430 over IPv6 (InnerMTU). Datagrams are never cut into fragments. What
// does not fit the path is dropped as DropTooBig, and PeerConfig.OnMTU hears of the new inner MTU.
//
// # Congestion marks
//
// The outer header's ECN is the inner one's, and a mark set on the way is carried inside, or the frame dropped where it cannot be (DropECN): RFC 6040
// normal mode. DSCP stays zero outside, as with Linux's default.
//
// # Liveness
//
// A kernel's VTEP answers no question. What is known of such a peer is when it was heard last (PeerStats.Heard); a quiet network is quiet.
//
// # The wire
//
// How frames travel to a peer is a wire: what turns frames into datagrams and back. There is one, vxlanWire. Wires for our own peers belong beside
// it: they differ in what they put behind the VXLAN header, not in how peers are found.
//
// # Ownership
//
// Frames are lent both ways. A VTEP owns its socket, a Peer nothing but counters.
//
// # Concurrency
//
// VTEP and Peer may be used from any goroutine. Run is one goroutine, and the only caller of the sinks, so that an Ingress may be one. The set of peers is
// a copy-on-write snapshot. Peer.Close returns when no Transmit on it and no Forward to its sink is under way or will follow; it must not be called
// from inside either.
//
// # Limits
//
// One receiving goroutine a VTEP. Frames of at most what fits a datagram (udp.MaxDatagram less the header); superframes have no such limit.
//
// # References
//
// RFC 7348, RFC 6040, RFC 8899; Linux drivers/net/vxlan, include/net/inet_ecn.h; DESIGN.md §3, §4.
package tunnel
