// Package testbed gives tests namespaces, topologies, faults and leak checks. Only tests and benchmarks import it.
//
// # Theory of operation
//
// A test package says
//
//	func TestMain(m *testing.M) { testbed.Main(m) }
//
// and its test binary is then started anew inside fresh user, network, mount, UTS and PID namespaces, as an ordinary user of the
// machine who is root only in there. The chain of processes is
//
//	go test → outer: the process that go test started; it waits, relays signals and answers build requests
//	        → drop:  only when outer is root: private mounts, a 0666 /dev/net/tun on a tmpfs, another uid; then as an ordinary user. Further ordinary users are
//	                 known inside for NewUser
//	        → init:  PID 1 inside: private mounts, /proc, lo up, ping sockets open; it reaps orphans
//	        → inside: the tests
//
// The network namespace the tests find themselves in plays "the host": it has nothing but lo, and a test may do to it what it
// likes. NewNS makes further ones. AsOrdinaryUser starts a command without any capability over it, which is what an ordinary user of
// a host is. Nothing outside the namespaces is touched, except for a temporary directory that outer removes.
//
// Where a machine refuses (no user namespaces, no TUN device), the tests run where they are and those that call Require, NewNS or
// RequireTUN skip with the reason; REQUIRE_NETNS=1 turns such skips into failures. A fuzzing run (-fuzz) is never re-executed, since the go
// tool talks to its workers over inherited files; in it these tests always skip.
//
// # Ownership
//
// What a helper makes is undone by t.Cleanup. What escapes that (a panic, a timeout, SIGKILL) dies with the PID namespace, of which the
// processes of a test are all members; namespaces and mounts have no other holder.
//
// # Concurrency
//
// NS.Do binds the calling goroutine to its thread; goroutines started inside it are elsewhere. Everything else may be called from any
// goroutine that may call its *testing.T.
//
// # References
//
// user_namespaces(7), network_namespaces(7), pid_namespaces(7); rootlesskit pkg/port/testsuite for the idea of re-executing a test binary.
package testbed
