// Package wire holds checked views of the bytes that cross patchbay: Ethernet, VLAN, ARP, IPv4, IPv6, TCP, UDP,
// ICMP and the virtio_net_hdr that a TAP device puts in front of a frame.
//
// # Theory of operation
//
// A view is made by a Parse function that checks every length once; its accessors never read outside what was
// checked. Parsers allocate nothing and never panic: a malformed packet is a false result, which the caller turns
// into a drop counter. Builders (Put…) write into a slice the caller owns and return the number of bytes written.
//
// # Ownership and concurrency
//
// Views alias the caller's bytes and are valid as long as those are. Everything here is a pure function.
//
// # References
//
// RFC 791, RFC 8200, RFC 826, RFC 4861, RFC 9293, RFC 768, RFC 792, RFC 4443; Linux include/uapi/linux/virtio_net.h.
package wire
