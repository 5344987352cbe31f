// Package stack is the gateway of a network: one switch port with an address, that sorts what containers send to it by
// protocol. TCP goes to the gVisor netstack, of which this package is the only importer; UDP and ICMP are handed on packet by packet; ARP,
// neighbour discovery, router advertisements and echo to the gateway itself are answered here.
//
// # Theory of operation
//
// Transmit is called by the goroutine that read the frames, usually off a TAP, and runs each to completion:
//
//	ARP, ND         answered from the gateway's own addresses and the host aliases; neighbours are learned
//	fragments       joined in bounded memory (RFC 5722: an overlap ends the packet), then sorted as any other packet
//	UDP             handed to Handlers.UDP in one call for each run of datagrams, to Handlers.LocalUDP by port
//	echo            answered for the gateway's own addresses, else for Handlers.ICMP; nobody else's ping is ever answered here
//	TCP             to the connection's endpoint; a SYN that belongs to none becomes a TCPRequest; the rest is answered with RST
//
// Netstack is used for its TCP alone. Segments do not pass its IP layer, and are processed on the goroutine that brings them:
// its own way is to queue each for a processor goroutine, which costs a hand-off a segment and, when a core sleeps, a wake-up of 40 to 70 µs;
// see linkname.go for how. What the processing yields is pushed to the host's socket (AsyncConn.Pump, TryWriter) before the acknowledgement
// is sent, so a request is on its way out one wake-up after the container wrote it. A SYN needs no goroutine either: it waits as an
// entry in a table until somebody calls Accept, which sends the SYN-ACK and does not wait for the answer.
//
// A segment that meets a locked endpoint (its user is writing, say) waits in the connection's backlog, and whoever has the endpoint works that off
// when done. Only behind one of netstack's timers does a segment take netstack's own way.
//
// TIME-WAIT ends when its last acknowledgement is out: guests reuse ports quickly, and the host's own socket behind the connection keeps the real one.
//
// What netstack sends leaves as superframes of up to 64 KiB with a virtio header, by way of a small list of ingress handles of the gateway's port.
//
// # Ownership
//
// Frames given to Transmit and Send are lent; Packets are too. Netstack gets copies sized to the packet. What Forward is given belongs to the tx
// (send.go) that built it, until Forward returns.
//
// # Concurrency
//
// Everything exported is safe for concurrent use, except that one goroutine at a time may read a Conn and one write it. No lock of
// this package is held across Forward or a handler. Netstack's lock on an endpoint is, on Forward; so what comes back to
// the gateway inside a Forward must not wait for it, and does not: TryLock and the backlog see to that.
//
// # Limits
//
// Half-open requests (in all and of one source), learned neighbours, frames that wait for a neighbour, fragments (in all and of one source), the buffers of a
// connection and of all together, ICMP errors of one source and answers to router solicitations a second: each is bounded, and what exceeds a bound is counted
// in Drops. Established connections are bounded by whoever answers the requests.
//
// The buffers of all connections together (TCPConfig.MaxMemory, see memory.go) hold bytes as netstack counts them; Go's heap takes up to twice as much around them. Some of
// it is kept for queues that are short, so stalled connections cannot use it all up: those that move keep working, with smaller windows. A container
// that sends into a window announced when there was more room loses segments (drop reason memory) and sends them again.
//
// Not done here: anti-spoofing (the switch binds ports to addresses; the gateway only refuses sources outside its subnets), path MTU discovery inside
// the network (a link that carries less than the others, which is a tunnel, says so, and AnswerTooBig tells the sender), IPv4 source routes, TCP Fast Open (data in a SYN is ignored and sent again by its sender).
//
// Netstack acknowledges selectively (SACK) in the state ESTABLISHED alone. Where the outside has ended its direction and the container goes on sending, what gets lost on the container's line is repaired
// one segment a round trip, or after a timeout: a TAP loses nothing, but a virtual machine's or a tunnelled line may.
//
// # References
//
// RFC 826, 5227 (ARP); 4861, 4862, 8106 (ND, RA); 791, 8200, 5722 (fragments); 792, 4443, 1122 (ICMP); 9293, 7323 (TCP). gVisor
// pkg/tcpip/transport/tcp: dispatcher.go, accept.go, endpoint.go.
package stack
