// Package bench measures patchbay beside the kernel and its peers, in one run, on the machine it is called on.
//
// # Theory of operation
//
// Figures of this kind mean little unless they prove what was measured and stand beside others from the same minute. So:
//
//   - Everything happens in namespaces that the bench makes itself, as an ordinary user or as root; nothing of the host is touched. Root's bench has a user with subordinate ids in them
//     besides (makeTenant), for contenders that cannot do without.
//   - A round measures every contender once, the kernel first; each figure carries its ratio to the kernel's of the same round. Ratios travel to other
//     machines, absolute figures do not.
//   - A contender is set up anew for each round, its daemons run as a user without capabilities over the namespace that plays the host, and what ran is
//     read back from /proc and the device: executables, arguments, MTU, offloads.
//   - A contender that is missing or fails is a line with its reason, never left out in silence; and so is one that holds or makes fewer than were asked for, with its figure.
//   - All that is started may have 65,536 files open a process, or as many as this user may allow: connections held take one or two descriptors each. The report says how many.
//   - TCP has the same congestion control for all, cubic unless asked otherwise, where it would be the machine's default: BBR paces a stream by its own model of the bandwidth, and a throughput is that
//     model's then. The generator's sockets are told before they connect or listen, and each namespace is for all others, such as a contender's own and iperf3's. The kernel lets a namespace have only
//     what the machine's administrator has allowed to everybody (net.ipv4.tcp_allowed_congestion_control), a socket of a privileged process any; where one is refused there is reno, and the report
//     says both. Nothing of the host's is set.
//   - CPU time that neither the contender nor the generator used, and time stolen by the hypervisor, are sampled; a measurement that had much of
//     either is made once more.
//
// The processes are
//
//	patchbay bench            Run: collects events, draws the progress line, writes the report
//	└─ inner scenarios        root of a fresh user, PID, mount and network namespace: builds topologies, starts contenders
//	   ├─ inner serve         the far side: load.Serve in a namespace of its own
//	   └─ contender           in the namespace that plays the host, as an ordinary user: see below
//	      └─ inner agent      the near side, behind the contender: takes measurements as JSON lines on its standard input
//
// A contender is `patchbay run -- … inner agent`, or `inner user`, which starts the agent in namespaces of its own and then a daemon such as slirp4netns
// that joins them, or `inner node`, two containers on one network. All of these are this same binary: a program that calls Run must hand the
// arguments after "bench inner" to Inner.
//
// The topology of scenario nat; only the middle differs between contenders:
//
//	[client] ── contender ── [host] 198.18.0.2 ── veth, MTU 1500 ── 198.18.0.1 [server]
//
// and of scenario switch:
//
//	[client] ── contender ── [server]
//
// and of scenario publish, where the agent is outside and the far side in the container, which the host's port 7070 leads to:
//
//	[client: serve] ── contender ── [host] 198.18.0.2:7070 ── veth, MTU 1500 ── 198.18.0.1 [server: agent]
//
// and of scenario tunnel, where the contender has a half on each host, and the client and the server are on the hosts themselves where the contender is an
// interface of the host's:
//
//	[client] ── contender ── [host] 198.18.0.2 ── veth, MTU 1500 ── 198.18.0.1 [peer] ── contender ── [server]
//
// A scenario has variants, each under one condition and with fewer measurements: IPv6, a round trip of 10 or 50 ms more, an underlay that loses packets or has MTU 9000, no superframes, many pairs at the same
// time. The wire of a longer round trip is a process of the bench between two TAPs (role wire), since not every kernel has netem; loss is nftables' on a bridge between the hosts, where packets
// are cut before. Scenario scale has variants only: 10,000 connections held and a row of 100,000 short ones through nat, an FDB of 100,000 MACs in switch, silent peers in tunnel.
//
// # Ownership
//
// The processes of a contender are killed at its end, whatever they forked; the PID namespace ends what escapes that. Files are written by Run only, below
// Config.Report.
//
// # Concurrency
//
// One Run at a time is meaningful on a machine, since two would measure each other.
//
// # Limits
//
// The CPU time of a daemon is known to 10 ms, so runs shorter than a second make its seconds per GB coarse. Foreign CPU time contains the
// kernel's own threads, and memory is that of processes, resident and proportional: what a kernel's bridge, conntrack or vxlan holds is in no figure. Variants count what they take by number at 1.5 s a measurement or longer, and
// proportionally less below; after 100 s they have what they have. A contender that gives the generator sockets of the host's (run --bypass) has the host's congestion control there, since it may
// not set more; that row says so. What a contender's own TCP does in its process, such as netstack's, is its own.
//
// # References
//
// RFC 2544 for the addresses and the habit of saying what was offered and what was delivered; proc(5) for the accounting.
package bench
