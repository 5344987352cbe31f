// Package superframe is the patchbay wire, version 1: how Ethernet frames, superframes among them, travel between two of our own nodes in UDP datagrams. It makes no system calls and starts no
// goroutines.
//
// # Theory of operation
//
// A superframe as a TAP hands it over, up to 64 KiB with a virtio header that says how to cut it, is cheap because nobody has cut it yet. On this wire it stays one: it is a message, cut into datagrams
// of the path's MTU without a look at what is in it, which one system call sends, and put together at the other end. No inner header is written, no inner checksum computed, and the receiving
// container's kernel gets the superframe as the sending one made it. Small frames go the other way about: several share one datagram.
//
// The price is loss: a datagram lost is a message lost, with up to 45 segments in it. A sender that learns of loss cuts superframes into segments first, each in a datagram of its own (package
// tunnel, PeerStats.Mode); to the receiver that is nothing special.
//
// Packer and Cutter are the sending side, Parse, Reassembler and Records the receiving one. Both ends number messages, so that loss, reordering and duplication are known (Sequence, Stats).
//
// # Wire format
//
// A datagram is a fragment of a message. Its header is HeaderLen bytes, all numbers big endian:
//
//		 0                   1                   2                   3
//		 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//		+---------------+-------------+-+---------------+---------------+
//		|  type = 0xC1  |  reserved   |S|     index     |     last      |
//		+---------------+-------------+-+---------------+---------------+
//		|                            channel                            |
//		+---------------------------------------------------------------+
//		|                                                               |
//		+                        sequence number                        +
//		|                                                               |
//		+---------------------------------------------------------------+
//		|                             total                             |
//		+---------------------------------------------------------------+
//		|                  part of the message ...
//
//	  - type: 0xC1. It names format and version: an incompatible format takes another type, so that both can share a port with each other and with VXLAN, whose first byte is 0x08.
//	  - S: the message is sealed. The other seven flags are reserved: 0.
//	  - index: the number of this fragment; last: that of the message's last one. Both count from 0, so that a message has 1 to 256 fragments.
//	  - channel: the VNI of a clear message, the session's identifier of a sealed one.
//	  - sequence number: of the message, the same in all its fragments. A sender increments it by one for each message on a channel, whatever its length, modulo 2^64. On a clear channel it begins
//	    with a random number, and anew with another when the sender restarts; on a sealed one the session says where it begins.
//	  - total: the length of the message in bytes, at least 4 and at most MaxMessage, SealRoom more where it is sealed.
//
// All fragments of a message but the last have parts of the same length, and the last one's is not longer and not empty. So the place of a part in the message is index times that length, and of the last
// one total less its own.
//
// # Messages
//
// A clear message, or a sealed one once it is opened, is one record or several, one behind the other, without a gap and without a rest:
//
//		+---------------+-----------------------------------------------+
//		|     kind      |                    length                     |
//		+---------------+-----------------------------------------------+
//		|                     body: length bytes ...
//
//	  - kind 1: a finished Ethernet frame, without FCS.
//	  - kind 2: a virtio_net_hdr of 10 bytes, little endian, and the Ethernet frame it belongs to, which is a superframe or has a checksum to finish. The fields are those of a TAP with IFF_VNET_HDR.
//	  - kind 3: a control message (package tunnel).
//
// Other kinds are for later versions.
//
// A sealed message is sealed once, over all records, before it is cut. What the seal authenticates beside them is the header without index and last (Header.AppendAAD): these differ between the
// fragments of a message.
//
// # Rules for receivers
//
// A datagram with another type, a reserved flag, an index behind the last, a total out of bounds, no part, or a part whose length contradicts index, last and total is dropped (frame.DropTunnelHeader).
// So is a fragment that contradicts an earlier one of its message in total, last or length of the parts (frame.DropFragMismatch), and one that has come already (frame.DropDuplicate).
// Parts that overlap cannot be said in the format.
//
// A message whose records do not add up is dropped whole (frame.DropMalformed). A record of a kind that is not known is skipped (frame.DropUnknownRecord). Each frame is checked as if it came from a
// stranger's TAP: length, and VirtioNetHdr.Validate.
//
// Messages are delivered as they become whole: nothing waits for an earlier one. One that comes a second time within the last Window numbers is dropped. A number far from the last ones, or a long row of
// old ones, means that the sender has started anew, and what it sends is taken: on the clear wire duplicates are a nuisance and no danger. Who unseals messages has a replay window of his own.
//
// If any fragment has the ECN mark of congestion, so has the message (RFC 3168 §5.3).
//
// # Limits
//
// Incomplete messages are bounded in number, bytes and age (Config); the oldest is given up for a new one (frame.DropFragLimit), and one that is too old at the next look (frame.DropFragTimeout).
// The bytes of buffers count, not of what has come. A path whose datagrams carry fewer than MinRoom bytes of a message is none for this wire.
//
// # Security considerations
//
// A clear message is worth what a VXLAN packet is: on a shared underlay anybody can forge one (RFC 7348 §7). A sealed one is authenticated as a whole, so that somebody who guesses channel and number can
// spoil a message by a fragment of his own, or fill the contexts, and it is lost, as if he had jammed it; he cannot have anything delivered. Numbers are noted only when the message is believed
// (Reassembler.Accept), so that forged ones shut out nobody. Memory is bounded for each peer, and a datagram that is no fragment of anything takes none.
//
// # Ownership
//
// What Packer and Cutter hand out points into the caller's frames. What Reassembler.Add returns points into the datagrams it was given, or into buffers that are valid until Release; frames made of it are
// writable, as those of a TAP's reader.
//
// # Concurrency
//
// Each value belongs to one goroutine; functions are pure. A Pool is shared by the Reassemblers of one goroutine.
//
// # References
//
// DESIGN.md §6; RFC 7348 §7, RFC 3168 §5.3, RFC 5681 §3.2, RFC 3550 §6.4.1 (loss from sequence numbers); Linux include/uapi/linux/virtio_net.h, Documentation/networking/segmentation-offloads.rst.
package superframe
