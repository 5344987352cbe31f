// Package node assembles a network out of the rooms below: one switch, the gateway's port with its NAT, DNS and DHCP, a pool of addresses for each IP
// version, and the containers attached to it. It is the only place where implementations meet.
//
// # Theory of operation
//
// [NewNetwork] chooses or checks the subnets, opens the gateway and plugs it into the switch as a port like any other; [Network.Run] drives what needs a
// goroutine until its context ends. [Network.Start] brings one container up in this order, and takes it down in the reverse:
//
//  1. lease its addresses, reserve its name and bind its published ports (whatever can fail by configuration fails here, before a process exists),
//  2. start its edge process, which makes the namespaces, opens the TAP and passes its descriptors back,
//  3. add the port, start one read loop a queue, tell the gateway the container's MAC, put its name into the zone,
//  4. release the edge process, which starts the command.
//
// # Other hosts
//
// [Network.AddPeer] makes the node on another host a port like any other. All peers and the gateway are in one split-horizon group: what comes from a peer goes to no other one (full mesh,
// no loops), and each node's gateway, which has the same address everywhere, is its own containers' alone. A frame from a peer that claims a bound MAC of this node is dropped; what was
// learned behind a peer is forgotten when it goes down. What is too long for a peer's path is answered by the gateway (stack.Gateway.AnswerTooBig).
//
// # Ownership and concurrency
//
// A Network owns its containers and peers: closing it ends them; a peer's tunnel.VTEP is its maker's. Network and Container are safe for concurrent use.
//
// # Limits
//
// Those of the rooms: see nat.Limits, vswitch.Config, dns.Config. A name is at most 63 bytes, as it is a DNS label.
package node
