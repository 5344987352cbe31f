// Package tap is the edge between a container's kernel and the switch: TAP devices with a virtio header, so that superframes of up to 64 KiB
// and unfinished checksums cross in one read and one write at MTU 1500.
//
// # Theory of operation
//
// It has two halves, because privilege stays at the edge (DESIGN.md §5).
//
// Open and Configure run in a process that is inside the container's user and network namespace. Open creates the interface,
// tries the offloads from the best set down, and yields descriptors and an Info; Configure sets addresses, routes, MTU and the sysctls
// that keep router advertisements away, over netlink. The descriptors travel to the node over a unix socket, the Info beside them as JSON.
//
// A TAP ends with its last descriptor unless it is persistent; whoever holds a descriptor may change that (SetPersist), without rights over the namespace. So the node, and not
// the edge, makes a TAP persistent. Open takes a persistent one over, as it is, by its name, and with several queues even joins one that somebody holds;
// OpenConfig.New refuses both.
//
// New makes a Device of them in the node, which needs no privilege over any namespace. Serve, one goroutine a queue, reads until
// the queue is empty or a batch is full and hands the batch to a frame.Sink at once: batches come from readiness, never from a timer.
// Transmit is the way back: it writes each frame, header in front, after joining consecutive segments of a flow into superframes
// (internal/offload.Coalescer) and finishing what the device cannot take unfinished (internal/offload.Segmenter).
//
// There are three kinds of device behind the same Device:
//
//   - a TAP with IFF_VNET_HDR: the normal case;
//   - a plain TAP, opened through songgao/water, where the header is refused or OpenConfig.Plain says so: no Caps, Transmit finishes everything;
//   - KindPacket, where there is no /dev/net/tun to be had: a veth pair whose far end sits in a network namespace of its own, which only a
//     packet socket with PACKET_VNET_HDR keeps alive. Superframes cross it the same way. Closing the socket ends namespace and pair.
//
// # The read loop
//
// Frames of a batch lie one behind the other in one arena a queue, each on its own cache line. Reads and writes are raw system calls
// that do not tell the Go scheduler, since that costs as much as a short call takes; each says itself that it may not block (nowait_linux.go). An
// idle loop first looks again for Config.Spin (spin.Spinner), and then blocks its thread in ppoll(2) on the queue and an eventfd, by which Close and the context wake it. Every 5 ms it lets other
// goroutines run on its thread (spin.Slice). The runtime's poller is not used: it adds a thread switch to every wake-up.
//
// What was measured, on two cores that other work shared, so that single figures scatter by a factor of two (BenchmarkTCP and BenchmarkRR
// repeat it; take them to a quiet machine before changing a default):
//
//   - poll and non-blocking reads against one blocking read a frame (which nothing can stop): four rounds, no difference above the
//     scatter, so it is poll; nor from LockOSThread;
//   - looking again before sleeping: prototypes that always did so for 30 or 150 µs brought request-response p50 from about 100 µs to
//     20 in most and 50 to 180 in other runs while the cores were idle, at twice the CPU a second. The spinner with its back-off, on busy
//     cores: p50 within the scatter of not spinning, and 4 to 13 % more CPU a GB of bulk TCP. Config.Spin -1 turns it off;
//   - bytes in a batch from 1 KiB to 512 KiB: 0.75 to 0.77 CPU seconds a GB throughout, so it is small for the memory's sake;
//   - joining 32 datagrams of 64 bytes into one write: 0.4 µs a frame in Transmit instead of 3.4, to an interface where nobody
//     listens: what the receiving kernel pays to cut them is not in it. IFF_NAPI on top made it dearer (one run), so it is not used.
//
// # Ownership
//
// A Handle owns its descriptors until they are given away; New takes over those in its Config when it succeeds, and Close closes
// them. Frames handed to the Sink are lent until Forward returns. Transmit keeps nothing of what it is given.
//
// # Concurrency
//
// A Device may be used from any goroutine. Transmit takes no lock and may run any number of times at once; Serve once a queue at a time.
// Close waits for both. Open and Configure act on the calling thread's network namespace.
//
// # Limits
//
// Frames of at most wire.MaxFrame bytes. MaxQueues queues; Transmit spreads flows over them by a hash, and the kernel sends a
// flow's answers to the queue it was last written to. What the container's kernel drops because the switch reads too slowly shows as tx_dropped
// of the interface inside the container, and for packet sockets as Stats.RxMissed. A packet socket holds at most net.core.rmem_max bytes
// (208 KiB, three superframes, before Linux 6.17 unless raised). A superframe whose segments exceed the receiver's MTU is passed on: its
// kernel takes it.
//
// # References
//
// Linux drivers/net/tun.c, net/packet/af_packet.c, Documentation/networking/tuntap.rst, include/uapi/linux/virtio_net.h; packet(7),
// veth(4), ppoll(2), eventfd(2).
package tap
