// Package daemon is the long-running node: it owns networks, keeps them and their attachments on disk, and answers the API.
//
// # Theory of operation
//
// A [Node] holds a node.Network for each network and a node.Attachment for each membership, and implements api.Backend on them. Everything that must outlive
// the process is a record in one bbolt file (state.go): networks, attachments with their published ports, and the leases (ipam/store). A record is written before success is
// answered, and taken back before an end is.
//
// # What survives what
//
//	the node is killed        Networks, attachments, addresses, names, published ports: all are back when the next node has started. The interfaces live on: TAPs of
//	                          `attach` are persistent, those of `run` are held by its client, which hands its descriptors to the next node. So TCP connections between
//	                          containers go on; what is sent meanwhile waits in the interfaces' queues. Connections through NAT are reset (nat.Journal), UDP flows
//	                          start anew, connects to published ports are refused until the next node is there.
//	the node is taken over    As above without the gap: the next node gets every TAP, every listening socket and every UDP socket, and the API's own
//	                          (takeover.go). Connections through NAT are reset; NAT's UDP flows keep their ports.
//	                          An interface that cannot be opened again at once is tried again; the attachment ends only when interface or namespace is no more.
//	a container ends          Its attachments end, and their leases and ports are free: those of `run` at once, those of `attach` when the last process has left the
//	                          namespace, within a second (ended.go). When it ends while no node runs, the next one sees that at its start.
//	the machine restarts      Networks stay; attachments are gone with their namespaces.
//
// # Tunnels
//
// A network with a VNI may have peers (peer.go), each looked after by a goroutine of its own (peer_follow.go): one that has no address yet, or whose tunnel cannot be opened, waits and is tried again; one that is silent
// has its name looked up again; and the network's MTU follows what gets to them (mtu.go). The UDP sockets are one VTEP a port, there as long as a peer uses them (vtep.go).
//
//	the node is killed        Peers are back before attachments are, at the address each had last.
//	the node is taken over    The sockets go to the next node; what comes meanwhile waits in them, and is read when all peers are there.
//	the underlay goes away    The peer is down, what was learned behind it is forgotten; it comes back by itself.
//
// A namespace is found again by what it was named by, a pid or a path, and held against its inode and the process's start time (netns.Identity), so that a new container
// with an old pid is not taken for it.
//
// # Ownership and concurrency
//
// A Node owns its networks until Close. All methods are safe for concurrent use. mu guards the maps and is not held across anything that may block; two requests for one name meet in
// node.Network.Reserve, two for one host port in bind(2). network.peering is held while peers come and go, peer.mu while one is connected; neither is taken with mu held.
//
// # Limits
//
// Those of the rooms below, Config.MaxNetworks, and MaxPeers of one network. Each network costs two threads of NAT, each TAP queue one.
//
// # References
//
// DESIGN.md §5; tun(4) (persistent interfaces), pidfd_open(2).
package daemon
