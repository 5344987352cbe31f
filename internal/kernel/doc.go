// Package kernel finds out what this machine lets patchbay do: the checks of `patchbay doctor`, and the single checks that `run` uses to
// turn a failure into one line with a remedy.
//
// # Theory of operation
//
// A probe tries the thing itself and never looks at a version, since vendors carry features back and sandboxes take them away: it
// opens the device, sends the datagram, makes the namespace. Settings are read only to explain a failure that has happened. What a
// probe makes (a socket, a TAP, a namespace) is gone when it returns, and nothing that belongs to the host is changed.
//
// Two of them need more than this process can do:
//
//   - A user namespace cannot be made by a process of several threads. UserNS forks a child that makes its namespaces and then
//     executes a file that does not exist: the failure "no such file" is proof that everything before it worked, and no program ever runs.
//   - TAP features want a network namespace that we are privileged over. As root a thread of its own moves into a fresh one and
//     ends there. As an ordinary user the program starts itself once more in new namespaces: Config.Child is that command,
//     and it calls Inside.
//
// # Concurrency
//
// All functions are safe for concurrent use. They block for some milliseconds; none waits for another machine.
//
// # References
//
// user_namespaces(7), tun.c (tun_chr_ioctl), udp(7), icmp(7), splice(2); Documentation/admin-guide/sysctl/{kernel,net,user}.rst. The idea of
// probes that cannot lie is that of cilium/ebpf.
package kernel
