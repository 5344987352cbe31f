// Package mmsg is sendmmsg(2) and recvmmsg(2) without allocations: the messages, socket addresses and control messages as the kernel reads and
// writes them, for owners of raw sockets that are never blocked on.
//
// # Concurrency
//
// The functions may be called from any goroutine; the types are plain memory and belong to one at a time. Send and Recv do not tell the Go
// scheduler that a system call is under way, since that costs as much as a short one takes; they never block (MSG_DONTWAIT).
//
// # References
//
// sendmmsg(2), recvmmsg(2), cmsg(3), ip(7), ipv6(7), udp(7).
package mmsg
