// Package offload does in software what a network card or the kernel would have done: it completes partial checksums, cuts superframes into
// segments, and merges segments into superframes.
//
// # Theory of operation
//
// Frames are lent, so nothing here writes to Frame.Data or copies payload. A finished frame is a head, rewritten in scratch that belongs to
// the caller, and a payload that points into the frame: the two go to the device by one writev, or many such pairs to a
// socket by one sendmsg. Segmenter hands out the segments of one frame one by one; a frame that is no superframe is its own only
// segment, so that a port needs one path for all it cannot take as it is. Coalescer is the way back: it finds, in one batch of frames,
// consecutive segments of one flow and describes each run as one superframe, a head and a list of payloads.
//
// Segmentation follows Linux's tcp_gso_segment and __udp_gso_segment: the sequence number advances by payload, FIN and PSH stay on the last
// segment, CWR on the first, the IPv4 identification counts up, and each checksum is made from the pseudo-header sum that the frame's
// field holds. Coalescing follows tcp_gro_receive and udp_gro_receive_segment, and is stricter: it takes only what Segmenter gives back
// byte for byte (the identification of IPv4 packets with DF excepted, see Coalescer). A checksum that was complete is verified before it is
// replaced by a partial one, so that no corruption is laundered.
//
// # Ownership and concurrency
//
// Segmenter and Coalescer hold references to the frames they were last given; both are reused by one goroutine at a time. What
// they hand out is valid until the next Reset or Coalesce, and as long as the frames are. Nothing allocates once the
// slices of a Coalescer have grown to the size of a batch.
//
// # Limits
//
// Headers of at most wire.MaxHeaders bytes; one VLAN tag; no IPv4 fragmentation of UDP (UFO); no superframes inside tunnels. Frames are
// expected to have passed VirtioNetHdr.Validate, or to be made by us; one that has not may be refused or come out
// wrong, but never causes a panic.
//
// # References
//
// Linux net/ipv4/tcp_offload.c, net/ipv4/udp_offload.c, net/core/gro.c; RFC 1071, RFC 1624 (checksums), RFC 3168 (CWR), RFC 6864 (IPv4 ID).
package offload
