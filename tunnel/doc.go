// Package tunnel joins the networks of several hosts: a VTEP is this host's end of every tunnel, and each Peer, one remote VTEP as seen by one network,
// is a port of that network's switch (vswitch.Port).
//
// # Theory of operation
//
// A VTEP listens on one UDP address and port, which all networks share; a network with a port of its own has a VTEP of its own.
//
// Towards the peer: the switch hands a batch to Peer.Transmit. On the VXLAN wire each frame is cut into finished segments (offload.Segmenter) and each segment becomes
// one VXLAN datagram, its header and the inner headers written into scratch, its payload gathered from where it lies. On the patchbay wire a superframe is cut as it is, without a look
// inside, and small frames share a datagram (package superframe). Package udp sends runs of equal datagrams as one message that the kernel cuts.
//
// From the peer: Run receives trains of datagrams and looks at each datagram of each train, since one train may carry several networks. Its first byte names the wire; the VNI and the
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
// # Sealing
//
// A peer with PeerConfig.Seal is sent sealed messages and handshakes and nothing else, and nothing else is taken from it; package secure has the keys, the handshakes and who may be at the other end. What is sealed is a
// message of the patchbay wire, whatever PeerConfig.Wire says: a superframe is sealed once and then cut, or cut first on WireVXLAN. The control messages are sealed like frames, so that nobody on the
// way can answer, or say how much is lost.
//
//   - Sending: without keys frames are dropped (DropNoSession). A message is copied together in the scratch of the Transmit, sealed where it lies and cut from there.
//   - Receiving: the session in the header names the peer, and the address says nothing. A message is put together first and opened then, so what waits to be put together is bounded for each session as for a clear
//     peer, and whoever sees a session's number can make parts that waste that room: he can drop datagrams as well. Nothing is noted of a message (that it came, that the peer lives, where it is) before it has
//     opened. Counted are DropUnauthentic, DropReplayed, DropNoSession, and DropUnsealed for what comes clear.
//   - Roaming: where the newest message came from that opened, there the peer may be, and there it is when it answers there; see below. Handshakes are taken from the peer's address alone; a peer that is down is looked for where
//     it was said to be (AddPeer, SetRemote).
//   - Links run while Run does. ExportSessions takes the sessions to another process (see Takeover), which goes on without a handshake.
//
// # Roaming
//
// That a message opens says who made it and not where it came from: who can copy datagrams and is faster delivers one from an address of his choice. So a sealed peer is not followed to an address before it has answered there (roam.go;
// RFC 9000 §8.2 and §9, RFC 9146 §6). The address that the newest message came from is sent a challenge: a sealed probe whose number and time are 96 random bits. Everything else goes where the peer was. When the answer comes from the
// candidate, the peer moves there, one round trip after it was first heard there, at most once a second.
//
//   - No amplification: an address that has not answered is sent no more bytes than the messages that opened came with from there, each challenge is of 104, and there are four a second at most. An answer that is lost is asked for again as soon as
//     that allows: a peer that sends anything is asked again after 250 ms, one that does not after its next probe.
//   - One candidate at a time, for two seconds at most unless it answers, so that who copies datagrams cannot have each forgotten before it does. It is asked nothing while the newest message is from where the peer is known to be.
//   - Both may roam at once: a challenge is answered where it came from when that is the candidate, and with the same bounds. Where neither can reach the other any more, both go down and are looked for where they were said to be.
//   - What is left: who is on the way to the candidate as well can carry the challenge to the peer and its answer back, and so have the tunnel go by way of that address until something newer comes another way. He could drop it as well, and reads
//     nothing. Who can copy datagrams and is always faster can keep a peer that has really gone elsewhere from being followed.
//
// Control messages of a version or kind that a node does not know are dropped (DropMalformed) and change nothing. A challenge is neither: an older node answers it as it does any probe, where it knows us to be, and is followed. Only where both have roamed
// at once and the old addresses are dead, its answer gets nowhere; then the two go down as above. An older node itself follows what it hears, unasked.
//
// # MTU
//
// A network over an underlay with an MTU of 1500 has one of 1450 over IPv4 and 1430 over IPv6 (InnerMTU; Overhead has the other wires). Datagrams are never cut into fragments. What a path carries is the
// lower of two figures, less that overhead (Peer.MTU):
//
//   - what the kernel knows, of routes and of ICMP, asked once a second;
//   - what was found by trying, in the manner of RFC 8899, at peers that answer probes. Every ten seconds one is padded to what is thought to pass. When three in a row go unanswered and a short one does not, the
//     path has a black hole: MinPathMTU, 1280, is used at once, and the size is searched between, to within 8 bytes, in two or three seconds on a short path. Where it turns out that nothing between gets lost, it was
//     chance, and the old size is tried again. Every ten minutes something longer is tried. A path below MinPathMTU is not found by trying.
//
// PeerConfig.OnMTU hears of each change. What does not fit (a packet, or a superframe whose segments would not) is dropped as DropTooBig, once a frame, and given to PeerConfig.OnTooBig, so that somebody
// can tell the sender. So that this stays rare, the maximum segment size that TCP announces is lowered on its way, in both directions, at each of our ends (clampMSS): it is never raised, and only segments with SYN are
// touched that are no fragments and have no IPv6 extension headers.
//
// # Congestion marks
//
// The outer header's ECN is the inner one's, and a mark set on the way is carried inside, or the frame dropped where it cannot be (DropECN): RFC 6040
// normal mode. DSCP stays zero outside, as with Linux's default.
//
// # Liveness
//
// One goroutine of Run asks after all peers (control.go has the messages), each once a second, and one that has never answered, which may be a kernel, every five. PeerStats.State is
//
//   - new: has sent nothing and answered nothing;
//   - heard: sends frames and answers nothing. A kernel's VTEP answers no question and is never down; PeerStats.Heard says when it was last heard, and a quiet network is quiet;
//   - up: answers;
//   - down: answered once, and has not been heard for 3.5 s, or has left everything unanswered for 10 s although it is heard: what goes to it gets lost. If it sends frames and no control messages, it is
//     heard after half a minute: another host has the address;
//   - handshake: sealed, and without keys so far. One that loses its keys later goes down as others do, and new keys are asked for as soon as it is.
//
// PeerConfig.OnState hears of each change, in order. A peer that comes back within the 3.5 s as another process is down and up in a row: what was learned behind it is out of date. An answer counts when it repeats
// the number and the time of a question that is open, so that who can forge the peer's address and see nothing cannot make it look up or restarted; questions in its name make us ask, four times a second at most. When
// the VTEP itself has stood still, the peers get their 3.5 s again.
//
// Both ends say in each message how many datagrams they have sent and received. PeerStats.Loss is the share of ours that did not arrive in the last ten seconds or so, what is under way aside, and PeerStats.RTT the
// smoothed time between question and answer (RFC 6298 §2, the first term).
//
// # Offloads that lose
//
// There are network cards, and switches between virtual machines, that spoil or lose the datagrams they are to cut (UDP_SEGMENT) and nothing else. On either wire, when of those that were cut nothing arrives, or no more
// than one of each message, while single ones do, a full-size probe is sent by itself; when that is answered, so that the MTU does not explain it, and the same is seen again, cutting is done without for a while
// (udp.Path.SuspendCut), and PeerStats.Cut says lossy.
//
// # Takeover
//
// Export duplicates the socket's descriptors for another process, whose Listen goes on with them (Config.FDs); peers are made anew there. End Run before, and call it again if nothing comes of it: what arrives
// between the end of one Run and the start of the next, here or there, waits in the kernel's buffer. The far end sees a peer that has started anew.
//
// # The wire
//
// How frames travel to a peer is a wire (PeerConfig.Wire): what turns frames into datagrams and back. vxlanWire is for everybody, superWire for our own nodes. What a peer sends is taken in either, told
// apart by the first byte, so that the two ends need not agree.
//
// On the patchbay wire one port is used, which keeps messages in order and their fragments together. Fragments are as long as the path's MTU is known to carry, and shorter as soon as it is known to be lower.
//
// # Loss on the patchbay wire
//
// A superframe is lost with any of its datagrams: at one lost in a hundred that is one superframe in three. The peer's control messages say how many messages it misses and how many came late. Above a
// threshold of either, superframes are cut into segments first, each in a datagram of its own; when there has been less than a lower threshold for a while, they go whole again. The while doubles each time that
// this fails soon, and even with some loss, below the upper threshold, another try is made in the end (adapt.go has the numbers). PeerStats.Mode is what is done now, and ModeChanges how often it changed.
// What two goroutines reorder between them that send at once is not held against the path.
//
// # Ownership
//
// Frames are lent both ways. A VTEP owns its socket, a Peer nothing but counters.
//
// # Concurrency
//
// VTEP and Peer may be used from any goroutine. Run is two goroutines: one receives and is the only caller of the sinks, so that an Ingress may be one; the other probes. Each sealed peer adds that of its link. The set of peers is
// a copy-on-write snapshot. Peer.Close returns when no Transmit on it and no Forward to its sink is under way or will follow; it must not be called
// from inside either.
//
// # Limits
//
// One receiving goroutine a VTEP. On the VXLAN wire, frames of at most what fits a datagram (udp.MaxDatagram less the header); superframes have no such limit, nor anything on the patchbay wire but that of
// wire.MaxFrame. A superframe above GSOMaxSize takes two sends and another copy.
//
// # References
//
// RFC 7348, RFC 6040, RFC 8899, RFC 9000 (validation of paths), RFC 9146, RFC 1624 (checksums of what is clamped), IEEE 802.1Q §8.6.3 (addresses of control frames); Linux drivers/net/vxlan, include/net/inet_ecn.h; DESIGN.md §3, §4.
package tunnel
