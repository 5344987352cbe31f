// Package udp is a UDP socket for tunnels: many datagrams in one system call each way, cut and joined by the kernel where it can.
//
// # Theory of operation
//
// A Socket listens on one address and port, and sends from it or from a few further ports beside it, so that the flows of a tunnel spread
// over the queues and paths of the underlay. A Path is the way to one remote address: what goes there, which offloads it takes, how large
// a packet may be.
//
// To send, take a Batch, and for each datagram a Head to write headers into; Add names that head and a payload, which is gathered from where it
// lies (sendmsg with iovecs) and never copied. Consecutive datagrams of one size to one Path become one message that the kernel cuts
// (UDP_SEGMENT), of at most MaxTrain bytes and as many datagrams as the kernel takes (64; 128 from Linux 6.10 on: asked once a
// Socket); up to maxMessages messages go out in one sendmmsg.
//
// To receive, Serve reads with recvmmsg into buffers that hold what the kernel has joined (UDP_GRO), until the socket is empty or the batch
// is full, and hands over Trains: a datagram, or several of one size, one behind the other. Batches come from readiness, never from a
// timer. An idle Serve blocks its thread in ppoll(2), as package tap does and for the same reasons; Config.Spin has it look again first.
//
// # When the kernel will not cut
//
// A message with several datagrams that the kernel refuses is sent again one by one. If that works, cutting was at fault and the Path does without
// for Config.RetryCut: EIO comes from routes whose device cannot finish checksums or that pass through IPsec, EINVAL from sandboxes. If it
// does not, the datagrams are too long for the path (EMSGSIZE), and are counted as such. A caller that measures loss and finds it to look like
// an offload bug on the way says so with Path.SuspendCut. PathConfig.NoCut switches it off for good. CutState says which of these it is.
//
// # Path MTU
//
// Datagrams carry DF and are never cut into fragments (RFC 7348 §4.3): IP_MTU_DISCOVER is IP_PMTUDISC_DO, so the kernel keeps the path's MTU, from
// routes and from ICMP, and refuses what is longer. MTU asks it. After a refusal it is asked again, at most once a second, and PathConfig.OnMTU
// hears of a change.
//
// # Outer header
//
// The TTL is 64. Checksums are real, which the kernel sees to; datagrams without one are taken over IPv4 (RFC 7348 §4.1) and by the
// kernel's rule not over IPv6. DSCP is zero; the caller chooses ECN for each datagram and sees it in each Train.
//
// # Ownership
//
// Trains are lent until Handler.Receive returns; the bytes may be written to. What is given to Batch.Add must stay as it is until Send returns.
//
// # Concurrency
//
// Socket and Path may be used from any goroutine. A Batch belongs to one; any number may be in use at once, and no lock is held while sending. Serve
// runs once at a time. Close waits for it and for every Batch that has not been released.
//
// # Limits
//
// Datagrams of at most MaxDatagram bytes. What the kernel drops because Serve is too slow is Stats.Missed; its buffer is Config.Buffer bytes, or
// what net.core.rmem_max allows. When the sending buffer is full a message is tried again a few times and then dropped (frame.DropTxBusy).
// Without UDP_SEGMENT and UDP_GRO everything works, one datagram a message.
//
// # References
//
// udp(7), ip(7), sendmmsg(2), recvmmsg(2); Linux net/ipv4/udp.c (udp_send_skb), net/ipv4/udp_offload.c; RFC 7348, RFC 8899.
package udp
