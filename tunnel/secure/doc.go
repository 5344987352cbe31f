// Package secure seals a tunnel: it makes keys with one peer of one network and seals and opens what goes between the two.
//
// # Theory of operation
//
// A Link is this node's half of the sealed path to one peer of one network. Two DTLS 1.2 handshakes may be under way on it, one that it started and one that it answers; the
// DTLS library (pion/dtls v3) does key exchange, authentication and retransmission. Nothing is ever carried as DTLS records but one word of confirmation: of a
// finished handshake the link exports keys (RFC 5705), makes a Session of them and lets the DTLS connection go. Bulk data is AES-256-GCM under those keys, with a counter for a
// nonce, one seal over a message of up to 64 KiB. The caller frames it (package superframe): what is sealed carries the session's id and the sequence number in clear, and both are under the seal.
//
// Run owns the handshakes, the timers and what becomes of sessions. Deliver, Session, Open and everything of a Session are for the data path: they never wait for Run or for a callback; Open takes the
// session's own lock for as long as its replay window is looked at. All but Deliver allocate nothing.
//
// # Threat model
//
// The attacker owns the underlay: it reads, forges, drops, delays, repeats and redirects every datagram, and knows all about the node but its keys. It has, at most, certificates of the
// same CA for other hosts or other networks. What it can then do is stop traffic, learn when how much was sent between which hosts, and read who the hosts are: certificates
// and the name of the network go in clear in DTLS 1.2. What it cannot do:
//   - read, change, make or repeat a frame, also not by reflecting one to its sender (each direction has its own key);
//   - stand in for a peer: the certificate must name Host, chain to the given CA, be valid now, be for the use it is put to (server or client), and be issued for this network;
//   - lead a handshake of one network into another: the network's name and VNI are negotiated by ALPN, under both Finished messages, and are part of the export's label;
//   - have the tunnel's traffic sent to somebody else by delivering a peer's datagram from that one's address: a peer is followed to where it answers and not to where it is heard (package tunnel, Roaming), and until then that address is sent
//     no more bytes than came in its name. Who is on the way to that address too, and carries question and answer, is one more relay on the underlay that he owns;
//   - end a session: alerts are never more than a hint, and a Session outlives the connection it came from;
//   - make the node work: an unknown handshake costs one HMAC and a small answer until its sender has shown that it reads what is sent to the peer's address (the cookie below, then
//     DTLS's own HelloVerifyRequest). At most one handshake is answered at a time, and for a limited time.
//
// With a pre-shared key all holders of the key are one party: it says "a node of this network" and not which. Whoever is on the path can lead the tunnel for B to C, which also
// holds it; certificates prevent that. A tunnel led back to its own node is refused in both modes.
//
// Sealed is: patchbay frames and control messages. Not protected: the sizes and times of datagrams, the outer addresses, the session's id and sequence number, which hosts and
// networks there are. Keys of a session are in memory only; a session that ended cannot be read later with the certificates' keys or the pre-shared key (ECDHE in both modes).
//
// # Wire
//
// A handshake datagram, big endian:
//
//	 0               1               2               3
//	+---------------+---------------+---------------+---------------+
//	| type 0xC3     | 0             | 0             | 0             |
//	+---------------+---------------+---------------+---------------+
//	| VNI, 24 bits in 32                                            |
//	+---------------+---------------+---------------+---------------+
//	|R| number of the handshake, 31 bits                            |
//	+---------------+---------------+---------------+---------------+
//	| cookie, 64 bits                                               |
//	|                                                               |
//	+---------------+---------------+---------------+---------------+
//	| one DTLS datagram, or nothing: a challenge                    |
//
// The number is random, chosen by the initiator; R is set in what the responder sends. DTLS has no mark of its own that tells which of two crossing handshakes a Certificate or a
// ChangeCipherSpec belongs to, or an old handshake from a new one. It also makes blind forgery a matter of 31 bits.
//
// The cookie of a first datagram is zero. The responder answers a wrong one with a challenge: the right cookie, an HMAC of VNI and number under a secret that changes every minute, and nothing
// behind it. The initiator repeats its datagram with the cookie and keeps it for this handshake. Until then the responder has kept nothing. A datagram shorter than a ClientHello is not answered,
// so that challenges never amplify.
//
// # Sessions
//
// From the export come two keys, two 96-bit IVs and the session's 32-bit id, the same on both sides. Nonce = IV xor sequence number (RFC 5116 §3.2, RFC 8446 §5.3); a sequence
// number is used once, whatever goroutine asks (Session.Next).
//
// The initiator seals under a session as soon as it has it, and says so to the responder inside DTLS. The responder accepts under it at once and seals under it
// when it has that word or the first datagram that opens under it, whichever comes first: nothing is sealed with keys that the other may not have yet. The session before stays open for what is still on its way
// and ends when it was idle for 30 s while the new one was not.
//
// When both start at once (glare) there are two sessions, and both hold. Both sides prefer the one with the greater id. They may still differ: because messages were lost, or because what crossed at one end
// came one after the other at the other. Then each accepts what the other seals, and within seconds one side, which hears nothing under its own choice, goes over to the other's (patience). Of sessions that did not cross
// the newer one counts: frames that still come under the one before are no reason to go back to it, until nothing has come under the newer one for seconds.
//
// # Rekey
//
// The initiator of a session makes a new one when it is RekeyAfter old, the responder a little later if nothing came; either does when it has sealed or opened RekeyBytes under it. Hard limits, past which
// a session ends and frames are dropped until there is another one: twice RekeyAfter, four times RekeyBytes, 2^48 messages, 2^36 datagrams that do not open (RFC 9147 §4.5.3).
//
// # Roaming
//
// A Link knows no addresses. Who found a datagram to open under a session of the link knows that the peer made it, and not that the peer is where it came from: anybody on the way can deliver it first, from any address. Package tunnel asks
// there, under the seal, and sends nothing else there before the answer has come from there; what did not open moves nothing. Handshakes go to the peer's address as known, so a peer that moved has to be heard under a session, or at its
// configured address.
//
// # Failing closed
//
// There is no way to turn a seal off in here: without a session Session returns nil, and the caller drops (frame.DropNoSession). Certificates are checked again at each rekey, so that an expired
// one ends the tunnel at the next (at most twice RekeyAfter later). No revocation lists: reissue the CA, or let certificates be short.
//
// # Limits
//
// 8 sessions a link, 64 handshake datagrams of 2 KiB waiting; about 10 goroutines while handshakes run, and one (Run) otherwise.
//
// # References
//
// RFC 6347 (DTLS 1.2), RFC 9146 §6 (addresses of peers), RFC 5705 (exporters), RFC 7627 (extended master secret), RFC 7301 (ALPN), RFC 5489 (ECDHE_PSK), RFC 5116 (AEAD), RFC 6479 (replay window), RFC 5869 (HKDF);
// docs/adr/0011-sealing.md.
package secure
