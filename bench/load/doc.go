// Package load is patchbay's own traffic generator: a server that answers on one TCP and UDP port, and clients that measure a path to
// it. It is what `patchbay demo` and the benchmarks use where iperf3 is not wanted or not there, and what the tests load the data path with.
//
// # Theory of operation
//
// A generator must cost less than what it measures. So clients and server use blocking sockets, one thread a stream, and never the runtime's poller: on a
// two-core machine the poller's wake-ups would be most of a request-response figure. The server's acceptors answer short connections on the thread that
// accepted them.
//
// Which congestion control TCP has decides what a path seems to carry: BBR paces each stream by a model of its own and so measures that. Whoever compares names one, for the client and for the
// server; otherwise both have what their network namespaces have.
//
// What is measured:
//
//   - Stream: bytes per second over TCP, either way, one or several streams.
//   - Flood: datagrams over UDP as fast as one thread sends them or at a rate; what the receiver counted, not what the sender sent.
//   - RequestResponse: one byte there and back over one TCP connection or UDP flow, with the distribution of round-trip times.
//   - ConnectRequestClose: a TCP connection for each request.
//
// # Protocol
//
// A TCP connection starts with one byte, the operation; see tcp.go for what follows it. opSource ends when the client closes. A UDP datagram starts with one byte,
// the operation, and four of session; see udp.go. On the port above its own the server speaks first: it sends one byte to whoever connects.
//
// # Limits
//
// Every client ends after its Duration or its Count, and on ctx. At most maxSamples round-trip times are kept; a run that makes more
// samples evenly.
package load
