// Package bypass gives the commands of a container sockets of the host for their TCP connections to the outside: the bytes then go through no TAP, no switch and no NAT of patchbay, and are
// as fast as the host's own. It is asked for (`patchbay run --bypass`), since what it does shows: see Differences.
//
// # Theory of operation
//
//	COMMAND   connect(2) ──seccomp──▶ stops
//	             │                      │ notification
//	             │                      ▼
//	starter   Install, then         Supervisor, in the node, in the host's namespaces
//	          executes COMMAND          │ address and socket are looked at; policy is asked
//	             │◀── not TCP ──────────┤ the kernel goes on with the call
//	             │◀── left ─────────────┤ the Supervisor connects COMMAND's own socket, on a duplicate, to where the network leads
//	             │◀── bypassed ─────────┘ it connects a socket of the host and puts it in the place of COMMAND's
//
// Four sorts of calls stop: connect(2), listen(2) and epoll_create(2) in its two forms; all others run at their speed, reads and writes among them. One thread answers a container's calls, and a goroutine waits for each connection
// whose caller waits, Config.MaxWaiting of them at most. A connection that the host refuses at once leaves a socket that blocks as it is. A caller that waits has the host's socket already while he does, so that a signal finds
// what it finds without a Supervisor: a socket that connects.
//
// A connection is left to the network, and so to NAT with its policy and counters, when Config.Allow says that it means anything else than that address as it is (the network's own addresses, host.patchbay.internal, what
// policy refuses); when the socket is of another network namespace than the container's, such as a sandbox's within; when it is not fresh, is bound to an address, a port or an interface, or marked; and when an epoll instance watches it already, which would
// go on watching the old one.
//
// # What keeps it from being a way out
//
// COMMAND is not trusted. It can change the address in its memory, or what stands behind the number of a descriptor, between the Supervisor's look and the kernel's. So
//
//   - the Supervisor makes every TCP connection itself, with an address of its own copy, on a socket that nobody can exchange; it lets no call go on that could connect TCP;
//   - Landlock has the kernel refuse every connect(2) of a TCP socket by COMMAND itself, whatever a call that did go on has become meanwhile. Without Landlock there is no bypass;
//   - the Supervisor connects a socket that was handed over nowhere again (settle), and does not let it listen;
//   - what gets past the filter, or past Landlock's hook, is not there: io_uring, programs of another architecture, TCP_ULP, MSG_FASTOPEN;
//   - Landlock keeps COMMAND from tracing what is outside of its domain, the edge process first of all, which has threads without the filter and is otherwise within COMMAND's reach.
//
// What is left to a hostile COMMAND with a socket of the host: bind(2) to free ports from 1024 upwards, on which nobody can connect, ioctl(2), which tells the host's interfaces and addresses, and setsockopt(2), by which it may send what it sends to the one address by another interface or source route. The Supervisor reads at most 28
// bytes of COMMAND's memory for a connection and believes no length, number or state that it finds; the kernel sees to it by the notification's id that only who called is answered. It has no rights that the user who runs it has not.
// Whoever of the user's processes is under neither filter nor Landlock could be handed a socket of the host by COMMAND, over a unix socket in the file system that they share, and do with it what he likes: one that enters the container from outside
// (nsenter), or a hostile command of another container without a bypass. Two that conspire are no better contained than one without a container.
//
// # Differences
//
//   - getsockname(2) tells an address of the host. The connection is in none of the network's counters but Stats, in no capture, and under no limit but COMMAND's of open files, and MaxWaiting while its caller waits.
//   - Addresses, routes and packet filters that COMMAND makes in its namespace do not apply to it.
//   - Options that are set before connect(2) are carried over as far as options_linux.go lists them. Not so TCP_MAXSEG, TCP_SYNCNT, TCP_NOTSENT_LOWAT, IP_TTL, IP_MTU_DISCOVER, SO_PRIORITY, SO_RCVLOWAT, TCP_FASTOPEN_CONNECT, TCP_MD5SIG, SO_TIMESTAMPING, IP_OPTIONS, filters and O_ASYNC.
//   - A duplicate of the socket that was made before connect(2), in the same process or another, stays the old one. An epoll instance that came over a socket or by dup(2) and watches a socket before it connects is not noticed.
//   - After a connection that failed while it was in progress the socket is one of the host and reaches what the bypass reaches: EADDRNOTAVAIL for the rest.
//   - SO_PEERCRED of a unix socket's listener names the node's process id, with the same user.
//   - A program whose executable the user may not read, and every one where Yama's ptrace_scope is 3: EACCES, since nobody may look into it.
//   - A signal that interrupts the making of an epoll instance may leave one more, under a number that nobody knows; where it is handled without SA_RESTART, that call and listen(2) return EINTR.
//   - io_uring and 32-bit programs: ENOSYS. TCP_ULP: ENOPROTOOPT. Setting up a listener of seccomp notifications inside: EBUSY.
//
// # Concurrency
//
// Stats and Close are safe for concurrent use. Install acts on the calling thread and on what that thread starts.
//
// # References
//
// seccomp(2), seccomp_unotify(2), landlock(7), pidfd_getfd(2), kcmp(2); Linux kernel/seccomp.c, security/landlock/net.c and task.c, net/ipv4/af_inet.c (__inet_stream_connect).
package bypass
