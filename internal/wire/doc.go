// Package wire holds checked views of the bytes that cross patchbay: Ethernet, VLAN, ARP, IPv4, IPv6, TCP, UDP,
// ICMP and the virtio_net_hdr that a TAP device puts in front of a frame.
//
// # Theory of operation
//
// A view is made by a Parse function that checks every length once; its accessors never read outside what was
// checked. Parsers allocate nothing and never panic: a malformed packet is a false result, which the caller turns
// into a drop counter. Builders (Put…) write into a slice the caller owns and return the number of bytes written; one that writes
// behind the slice's end is the caller's mistake and panics. PutTCP, PutUDP, PutARP and PutEthernet write one header;
// PutEcho, PutICMPError, PutND and PutRA write a whole IP packet, since their checksums and hop limits belong to it.
//
// VirtioNetHdr.Validate is the gate for what a container says about its own frames: behind it, offsets and sizes may be used unchecked.
//
// # Limits
//
// One VLAN tag; eight IPv6 extension headers and one fragment header; MaxHeaders bytes of headers in a superframe.
//
// # Ownership and concurrency
//
// Views alias the caller's bytes and are valid as long as those are. Everything here is a pure function.
//
// # References
//
// RFC 791, RFC 8200, RFC 826, RFC 4861, RFC 9293, RFC 768, RFC 792, RFC 4443; Linux include/uapi/linux/virtio_net.h.
package wire
