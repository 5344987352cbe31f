// Package bypass gives the commands of a container sockets of the host for their TCP connections to the outside: the bytes then go through no TAP, no switch and no NAT of patchbay, and are
// as fast as the host's own. It is asked for (`patchbay run --bypass`), since what it does shows: see Differences.
//
// # Theory of operation
//
//	COMMAND   connect(2) ──seccomp──▶ stops
//	             │                      │ notification
//	edge      Install, once, before     ▼
//	          COMMAND is executed    Supervisor, in the node, in the host's namespaces
//	                                    │ address and socket are looked at; policy is asked
//	          ◀── as if nothing were ───┤ not TCP, or not for the outside: the kernel goes on with the call
//	          ◀── a socket of the host ─┘ otherwise: made, pinned, connected, and put in the place of COMMAND's
//
// The filter that Install puts on stops nothing but connect(2) and the making of epoll instances; all other calls run at their speed, reads and writes among them. One thread serves the notifications
// of a container (Supervisor.Serve). It connects first and answers then, so a refused connection stays refused and its errors are the host's own. A socket that does not block is handed over while it connects. One that
// does is waited for by a goroutine, Config.MaxWaiting of them at most.
//
// A connection is left to the network, and so to NAT with its policy and counters, when Config.Allow says that it means anything else than that address as it is (the network's own addresses, host.patchbay.internal, what
// policy refuses); when the socket is bound, in a state other than fresh, or already watched by an epoll instance, which would go on watching the old one; and when too many wait.
//
// # What keeps it from being a way out
//
// COMMAND is not trusted. It can change the address in its memory, or what stands behind a number of a descriptor, between the Supervisor's look and the kernel's; so nothing that was looked at is used twice: the Supervisor
// connects a socket of its own to an address of its own copy. What COMMAND can do with a socket of the host that it holds is bounded by the kernel: the socket is pinned (pin) before it is handed over. A classic BPF filter,
// locked so that nobody can take it off, throws away every segment that is not from the address and port that policy let through. Connected anew to another place, or listening, the socket hears nobody. What is left to a hostile COMMAND:
//
//   - a bare SYN to another address, whose answer it never sees (an ICMP error it does);
//   - bind(2) to free ports of the host from 1024 upwards, on which nobody can connect;
//   - ioctl(2) on the socket, which tells the host's interfaces and addresses, as /proc/net does to whoever runs without a container.
//
// The Supervisor reads at most 28 bytes of COMMAND's memory for a connection and believes no length, number or state that it finds. It acts only for processes that are there when it answers, which the kernel sees to by the
// notification's id. It has no rights that the user who runs it has not.
//
// # Differences
//
// getsockname(2) tells an address of the host, and so do servers. The connection is in none of the network's counters but Stats, in no capture, and under none of its limits but MaxWaiting: it is COMMAND's descriptor, bounded by COMMAND's limit of
// open files. Options that are set before connect(2) are carried over (options.go lists which); a socket that other processes hold duplicates of is replaced in the calling process alone. An epoll instance that came over a socket or by
// dup(2) and watches a socket before it connects is not noticed. Programs of another architecture than the kernel's (32-bit ones) and calls through io_uring are not stopped; they go through NAT as ever.
//
// # Concurrency
//
// Serve is for one goroutine; Stats and Close are safe beside it. Install acts on the calling thread and on what that thread starts.
//
// # References
//
// seccomp(2), seccomp_unotify(2), pidfd_getfd(2), kcmp(2), socket(7) (SO_LOCK_FILTER); Linux kernel/seccomp.c, net/core/filter.c (sk_filter_trim_cap), net/ipv4/tcp_ipv4.c (tcp_v4_rcv, which asks the filter).
package bypass
