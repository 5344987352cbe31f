// Package dns is the resolver a network's gateway runs on port 53: it answers the names of the network's containers from a snapshot, and
// forwards every other question to the resolvers of the host. github.com/miekg/dns does the wire format.
//
// # Theory of operation
//
// A query comes as a UDP packet ([Server.HandlePackets]) or over TCP ([Server.HandleTCP], [Server.ServeTCP]). The [Zone] is looked at first; what it knows is
// answered at once, on the calling goroutine:
//
//	NAME                              a container, or one of its aliases; several with one name are all given, in turning order
//	NAME.NETWORK                      the same
//	NAME.NETWORK.patchbay.internal    the same; NETWORK.patchbay.internal is the search domain
//	gateway.patchbay.internal         the gateway
//	host.patchbay.internal            the host, where the network has a host alias
//	localhost, *.localhost            the container's own loopback (RFC 6761)
//	reverse names of these            NAME.NETWORK.patchbay.internal
//
// A container that is on several networks asks the resolver of one: names that this one does not have are looked up in the zones of the others ([Config.Others]).
//
// A name that exists without the type asked for is NODATA, since NXDOMAIN for AAAA makes some libraries forget the A. What is in
// patchbay.internal, or the reverse name of an address in the network's subnets, is never asked outside: unknown ones are NXDOMAIN. A
// single label that is no container's is asked outside, as Docker does: home routers and company resolvers answer such names. So is
// NAME.NETWORK that is no container's, as networks may be called like top-level domains. The host's /etc/hosts is not served: its lines name the host's loopback
// more often than not, which is another place inside.
//
// Everything else goes to the host's resolvers by the protocol it came by, byte for byte but for the id, so EDNS0 and what is in it stay as they
// were. The first resolver is asked; each further one when [Config.Delay] passed without an answer, or at once after a failure. The first
// good answer wins (NOERROR or NXDOMAIN); a bad one (SERVFAIL, REFUSED, …) is passed on only if no other comes, and SERVFAIL with an extended error is
// made when none comes at all. A resolver that was overtaken or silent several times in a row is asked last for a while. An answer
// that does not fit what the client can take, or the network's MTU, is truncated with TC, and the client comes back by TCP.
//
// The host's resolv.conf is looked at, by stat, at most once every [Config.CheckEvery], when a query is forwarded, and read when it changed. Without a nameserver in it the
// resolver is 127.0.0.1, as in libc; while it is missing or empty (somebody is writing it) the last one stays in force. The node runs in
// the host's network namespace, so 127.0.0.53 works.
//
// # Ownership and concurrency
//
// A Server may be used from any goroutine. Packets are lent and copied where a query must wait. SetZone replaces the snapshot behind
// an atomic pointer: no query waits or fails for it. Each forwarded query has a goroutine, and one more with one host socket for each resolver asked; Close ends them all.
//
// # Limits
//
// Queries waiting for a resolver and TCP connections are bounded, in all and for each client; above that, UDP queries are dropped and counted
// as frame.DropServiceLimit, TCP queries get SERVFAIL and connections a reset. A query has at most 4096 bytes. Not supported: zone transfers,
// UPDATE, NOTIFY (answered REFUSED or NOTIMP), and the DNS over TLS or HTTPS of the host's resolver, which is reached through the host's stub.
//
// # References
//
// RFC 1035, RFC 2308 (negative answers), RFC 5452 §9 (forgery), RFC 6303 (local zones), RFC 6761 (localhost), RFC 6762 app. G (.internal is reserved by ICANN for private use),
// RFC 6891 (EDNS0), RFC 7766 (TCP), RFC 8914 (extended errors); resolv.conf(5).
package dns
