// Package netns opens, creates and enters network namespaces, and starts processes inside the namespaces of another process.
//
// # Theory of operation
//
// A network namespace belongs to a thread, not to a process. Handle.Do therefore binds the calling goroutine to its thread,
// moves that thread, calls a function and moves the thread back; a thread that cannot be moved back is never reused. What was
// opened inside (sockets, TAP queues) keeps belonging to that namespace wherever it is used later.
//
// A user namespace is another matter: the kernel lets only a process with a single thread enter one, which a Go process never is.
// Target.Start therefore forks, enters the namespaces in the child while it has one thread, and executes a program there: the
// way `nsenter --user --net` does it, without needing that tool. `patchbay attach` re-executes itself like this, since inside the
// user namespace that owns the target's network namespace it is privileged over that although it is nothing on the host. A process of the target may
// live in a user namespace further down; only a Guest goes there.
//
// A namespace has no name that stays its own: pids, paths and inode numbers are used again. An Identity holds all of them, and the process's start time, and tells whether what
// they lead to is what it was; while anybody keeps a descriptor of the namespace, of a TAP in it for instance, its inode number at least is nobody else's.
//
// # Ownership
//
// A Handle or Target owns its descriptors until Close. A namespace lives as long as a process is in it or a descriptor or mount holds it.
//
// # Concurrency
//
// A Handle may be used from any goroutine, by several at once; Close must come last. Goroutines that a function started inside Do are
// not inside.
//
// # References
//
// setns(2), network_namespaces(7), user_namespaces(7), ioctl_ns(2); Linux kernel/nsproxy.c, kernel/user_namespace.c (userns_install).
package netns
