// Package nat joins the flows of containers to sockets of the host. It sees a network only through stack.Network and knows no
// gVisor type: TCP reaches it as net.Conn-like connections, UDP and ICMP as whole packets.
//
// # Theory of operation
//
// Outbound TCP: the gateway offers every SYN to HandleTCP. Policy says what host address the destination means; quotas say whether
// this container may have another connection attempt; then a nonblocking connect on the host is started and only its outcome answers the
// SYN, so that refused stays refused and unreachable stays unreachable. A connect that finishes at once (a service on the same machine) is
// answered on the spot; the others wait in one epoll loop, whatever their number. An established flow is two directions, each of which carries
// bytes, FIN and RST. A destination that uses up the host's ports in TIME-WAIT gets them again; see ports.go.
//
// Outbound UDP and ICMP are translated packet by packet with batched host sockets; see udp.go and icmp.go.
//
// Published ports: every TCP listener sits in the same epoll loop, whatever their number: a port costs one descriptor and about a hundred bytes,
// and no goroutine. An accepted connection is joined to one dialled into the network from the client's own address, so the container sees the
// true client; a client on the host itself is seen as the gateway. The kernel accepts before the container is asked, so a refusal by the
// container is seen by the client as a reset after connect.
//
// # After a crash
//
// A process that is killed says nothing to anybody. The kernel closes its host sockets, so that the far ends know; the containers are told by the next process. A Journal is a file in which a NAT notes its
// TCP flows by stores into a shared mapping; ResetOrphans has a container's own TCP tell its sequence numbers and answers with a reset (orphan.go). UDP flows start anew with the next
// datagram from the container.
//
// # Handover
//
// A NAT can leave to another process what the host's side knows it by (handover_linux.go, handover_udp_linux.go): published ports, where clients and datagrams wait meanwhile and none is refused, and the sockets
// of UDP flows, so that containers keep their ports of the host. What stays behind: TCP connections, whose state is netstack's, are reset on both sides, for the container through the Journal;
// pings are lost; clients of published UDP ports are known again by their next datagram, or their container's to them, only that one on the host itself may get another port of the
// gateway's.
//
// # Policy
//
// policy.go is the one place that decides where a container may go. The host's loopback is closed by every spelling (127/8, ::1, 0.0.0.0, ::,
// IPv4-mapped, -compatible and -translated, NAT64, 6to4, Teredo and ISATAP forms, addresses on a loopback interface) and can be opened only
// as the network's host alias. Link-local and cloud metadata addresses, multicast, broadcast and the network's own subnets are refused.
//
// # Ownership and concurrency
//
// A NAT is safe for concurrent use. Run blocks and owns the loops; Close is idempotent, ends every flow and listener and unblocks Run. A TCP flow has no
// goroutine: bytes from the container are written to the host on the goroutine that read them off the network, bytes from the host are read and
// passed on in the loop. Only while a container does not take what the host sent has its flow a buffer and, unless Config.OneThread is set, a goroutine.
//
// # Limits
//
// Limits holds all of them; reaching one is a drop counter (flow-limit, dial-limit) and never an unbounded queue. Per-container quotas keep
// one container's black-holed connects from stalling another's. What comes through published ports has quotas of its own, so that outside clients do not keep
// a container from connecting. The source of a datagram costs nothing to make up: where the clients of published UDP ports are too many, the oldest one
// that its container never answered makes room (Stats.UDPEvicted). ICMP errors have a rate for each container. Forget ends what a container
// has when it goes.
//
// # References
//
// RFC 5382 (TCP through NAT), RFC 5961 and 9293 §3.10.7 (what a segment out of window is answered with), RFC 4787 (UDP), RFC 5508 (ICMP), RFC 6052 (IPv4 in IPv6), RFC 3056 (6to4), RFC 4380 (Teredo), RFC 5214 (ISATAP),
// tcp(7), epoll(7), Linux net/ipv4/af_inet.c (__inet_stream_connect).
package nat
