// Package edge runs a command in namespaces, new ones or a container's, with a process in between that opens the container's interfaces from inside and hands
// their descriptors out, so that the node needs no rights over any namespace. The same process opens interfaces in namespaces that are there already.
//
// # Theory of operation
//
//	parent   `patchbay run`, be it a node of its own or a daemon's client: an ordinary user in the host's namespaces
//	  │ socketpair: descriptors out, go-ahead in, signals in, exit status out
//	edge     this program once more (/proc/self/exe), root of new user, network, mount, UTS and perhaps PID namespaces
//	  │ fork, exec
//	COMMAND
//
// Start writes a Spec into a memory file and starts the edge process, which makes its mounts private, opens and configures the TAPs (package
// tap), sends their descriptors, sets up host name, /proc, /sys/class/net, resolv.conf and hosts while the parent already
// attaches the descriptors to its switch, and waits. Release lets it execute COMMAND. It then waits for COMMAND, takes in orphans, and
// reports how COMMAND ended. main calls Main first, which in an edge process never returns.
//
// The edge process keeps a duplicate of each descriptor for as long as it lives, so that the interface, its addresses and its carrier outlast
// a parent that closes its own while COMMAND runs (Detach has it let go). They do not outlast the parent itself: with it the container ends (see Teardown).
// What hands descriptors to a node, and to the next one when that has died, is the parent (package attach), which keeps copies of its own; the edge process talks to nobody else.
//
// With Spec.Bypass COMMAND is executed by a starter, a child of the edge process that puts package bypass's filter on itself first; its listener goes to the parent. See starter_linux.go.
//
// With Spec.Pause there is no COMMAND: the container is for others to join. It ends with the parent, or with a signal that would end a COMMAND which does not handle it, and its
// Status then has that signal: 128+n for a shell.
//
// # A container that is joined
//
// In NetContainer the edge process is no clone in new namespaces: netns.Target.Start puts it into the user, network and UTS namespaces of a process of the container, and
// into a mount namespace of its own, a copy of the parent's. So COMMAND has the container's interfaces, localhost, ports and ids, and the host's files but
// for resolv.conf, hosts and /sys/class/net; it has neither the container's mounts nor its PID namespace. Where the container never made a UTS namespace, and so has the parent's, COMMAND gets a copy
// of it. Only who is root in there has rights there. The container does not end with COMMAND, nor COMMAND with it: its network is there for as long as anybody is in it.
//
// # Interfaces in a namespace that is there already
//
//	OpenIn    `patchbay attach`, or a daemon that looks for what an earlier one left
//	  │ socketpair: descriptors out
//	edge      enters the target's user and network namespaces, opens or reopens, configures, hands over, ends
//
// A new interface takes nobody else's: where two want one name, one gets it; who asks for no name gets the next free ethN. It is not persistent, so that
// nothing is left when OpenIn's caller or the edge process is killed at any moment; the node makes it so when its record is on disk (Interface.Persist). Reopen takes over
// such an interface by its name and MAC and changes nothing in it; tap.ErrGone says that it is no more, any other error that it may still be there. The container may stop or
// kill the edge process, which shares its user namespace: OpenIn kills it when its context ends.
//
// COMMAND inherits what it would under env(1) or unshare(1): streams, other descriptors under their numbers, working directory, umask,
// limits, signal mask, process group and terminal. Files of the container live on a tmpfs that is reachable by bind mounts alone; nothing is
// on disk. Where /etc/resolv.conf is absent or a symlink to nowhere, a tmpfs with everything else bound into it stands in for /etc.
//
// # Signals
//
// All three processes are in one process group. What a terminal, or a shell's kill %1, sends to the group reaches COMMAND by itself; what is
// sent to the parent alone has to be passed on. The parent cannot tell the two apart, since Go does not say who sent a signal, but the
// edge process can: it has seen the first kind too. So the parent reports each signal and the edge process decides (ownSignals). When
// COMMAND stops itself, the parent stops as well if it is its terminal's foreground job.
//
// # Teardown
//
// The container ends with COMMAND, and whoever is left in it is killed. With a PID namespace the kernel sees to that, also when the parent or the
// edge process is killed. Without one, as always in a container that is joined, the edge process is a subreaper: COMMAND's descendants, daemons too, become its children when their
// parents end, and it kills them when COMMAND ends or the socket to the parent does. If the edge process is killed, COMMAND gets
// SIGKILL from the kernel and the orphans become children of the parent, a subreaper too, which knows them by their user namespace; those of a container that is joined, where
// others may share that, by the mount namespace that was made for COMMAND.
// COMMAND may meddle with the edge process: one that has let go of its socket is killed 10 s later, and one that has died is mourned at once,
// whoever holds a duplicate of its socket. An edge process that COMMAND stops and leaves its socket hangs the run like a COMMAND that ignores
// every signal: kill the parent.
// What remains when both are killed at once, without a PID namespace: COMMAND dies, descendants of it live on, without a network,
// since the TAP goes with its last descriptor. What remains when the edge process of a container that is joined is killed: descendants of COMMAND that have made
// mount namespaces of their own.
//
// Looking for orphans is a race with their parents' ends: a process leaves its mount namespace before it leaves its children, and only then is a zombie. So the
// parent looks until nothing changes.
//
// # Ownership
//
// The descriptors of Devices are the caller's. A Process owns the edge process and everything in the container; Wait or Close has seen
// it all end when it returns. The edge process is inside the container's trust domain (with its ids mapped to root, COMMAND may trace it): the
// parent takes descriptors only before COMMAND exists, and believes it nothing but a status.
//
// # Concurrency
//
// Process is safe for concurrent use. Start and OpenIn may be called by several goroutines; ForwardSignals by one at a time in a process.
//
// # Limits
//
// Signals that were ignored when the parent started stay ignored for COMMAND as far as Go's runtime lets a program know: SIGHUP, SIGINT, with it
// SIGQUIT, and the stop signals; not SIGTERM, SIGPIPE, SIGUSR1 and the like. The signals that end a Go program cannot be inherited
// blocked. A signal sent to the parent alone arrives some 5 ms late, and within 20 ms of the same signal to the group it is taken for
// that one. Descriptors 0, 1 and 2 that were closed are /dev/null. COMMAND's first PID in a PID namespace is near 10: the threads of
// PID 1 have numbers too.
//
// # References
//
// user_namespaces(7), pid_namespaces(7), mount_namespaces(7), prctl(2) (PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG), signalfd(2), credentials(7);
// Linux kernel/exit.c (find_new_reaper), kernel/signal.c (prepare_signal).
package edge
