// Package dhcp is the DHCPv4 server a network's gateway runs for ports that configure themselves: a QEMU guest, or udhcpc in a container.
// github.com/insomniacslk/dhcp does the format; who gets which address is the Leaser's business.
//
// # Theory of operation
//
// A packet to port 67 ([Server.HandlePackets]) is checked and queued; one worker, which exists while the queue is not empty, takes it from
// there, since a Leaser may wait for a disk. The state of a client is all in the Leaser:
//
//	DISCOVER   lease for OfferTime, OFFER
//	REQUEST    lease for LeaseTime; ACK when the address is the one asked for, else NAK (the server is the only one here: authoritative)
//	DECLINE    give the address up as used by somebody else
//	RELEASE    give the address back
//	INFORM     ACK with the options alone
//
// A reply goes to the client's address when it has one (ciaddr); else to its hardware address, where the network can do that
// ([MACSender]) and the client did not ask for broadcast; else to the broadcast address, as RFC 2131 §4.1 allows. A NAK is always broadcast.
//
// A client is its Ethernet address: chaddr must be the frame's source, so that nobody speaks for another. Requests through relays are dropped.
//
// # Ownership and concurrency
//
// A Server may be used from any goroutine. Packets are lent and copied into the queue. Close ends the worker.
//
// # Limits
//
// The queue is bounded, in all and for each MAC; above that a request is dropped as frame.DropServiceLimit. [PoolLeaser] bounds how many addresses go
// to MACs that are no attachment's. IPv6 hosts are configured by router advertisements; there is no DHCPv6. Option overload (52) is not read.
//
// # References
//
// RFC 2131 §4.3 (server behaviour), RFC 2132 (options), RFC 3397 (domain search), RFC 6842 (client identifier in replies).
package dhcp
