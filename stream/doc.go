// Package stream is a port of a switch over a byte stream: a virtual machine, or anything else that speaks QEMU's `-netdev stream` framing on a socket.
//
// # Theory of operation
//
// On the wire a frame is its length, four bytes in network order, and then its bytes from the destination MAC on, without FCS. There is no header for offloads, so
// [Port.Transmit] finishes what is unfinished: checksums are completed, superframes are cut. What it makes of a batch goes into a bounded buffer. There are two, which change places: a
// goroutine writes one out while the other fills. A frame that finds no room in that is dropped as txbusy: Transmit never waits for the peer. A write that fails ends the port: Serve says why.
//
// [Port.Serve] reads large pieces of the stream, and hands all the frames of a piece to its sink at once. A length that no frame can have means that the two ends have lost each other: it is
// counted as malformed, and the stream ends.
//
// The MAC of a virtual machine is its own business. [Port.First] waits for the first frame and shows its source without taking it off the stream, so that a node can bind the port to it before
// anything is forwarded.
//
// # Ownership
//
// New takes the connection over, and Close closes it. Frames are lent, both ways.
//
// # Concurrency
//
// Transmit may be called from any number of goroutines, Serve and First from one at a time. Close ends them all and waits for them.
//
// # Limits
//
// Frames of wire.EthernetLen to wire.MaxFrame bytes; Config.BufferBytes of frames that wait to be written, and as much that is
// being written.
//
// # References
//
// QEMU net/stream.c, net/net.c (net_fill_rstate); qemu(1), -netdev stream.
package stream
