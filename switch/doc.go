// Package vswitch is a learning Ethernet switch: Port, Switch, FDB, forwarding, isolation, anti-spoofing and storm control. It lives in
// the folder switch, which is a Go keyword, and is imported as
//
//	vswitch "patchbay/switch"
//
// # Theory of operation
//
// A goroutine that receives frames owns an Ingress of its port and calls Forward with each batch it has read. Forward runs to completion on that
// goroutine: it classifies every frame (checks it, learns its source, looks its destination up), groups the frames by egress port in the
// order they came, and calls Transmit of each of these ports. There is no queue and no goroutine in here. Frames are never edited, cut or
// copied; a superframe is one frame.
//
// The forwarding database (FDB) is an open-addressing hash table of atomic words. A lookup takes no lock. A frame from a known source
// writes only when its entry is older than a tenth of the ageing time, and then without a lock. A new or moved source takes a mutex that is
// never waited for: when somebody else has it, the next frame learns. The table is bounded; when it is full, the port that holds most
// loses its oldest entry of a sample, so a port that invents sources displaces its own. Static entries are never displaced nor relearned.
//
// A frame is dropped, for one of the reasons of package frame, or delivered to one port, or flooded: broadcast, multicast and unknown
// destinations go to every other port that isolation and split horizon allow. There is no snooping, so IPv6 neighbour discovery and
// mDNS need nothing.
//
// # Counters
//
// For each port, and so for the switch: RxFrames = Unicast + Flooded + the sum of Drops, where a flooded frame counts once however many copies
// were made. On the egress side, TxFrames + TxRefused is what a port was offered. A port that takes the first n frames of a batch says so by
// returning n; which of them it really took is its own affair and its own counters'.
//
// # Ownership
//
// Frames are lent, from the caller of Forward to the switch and from the switch to ports. An Ingress owns its scratch, grown on first use;
// in the steady state nothing is allocated.
//
// # Concurrency
//
// Everything on Switch may be called from any goroutine, but RemovePort must not be called from inside a Transmit, since it waits for that
// Transmit. An Ingress belongs to one goroutine at a time. The set of ports is a copy-on-write snapshot. An Ingress
// makes its own counter odd while it is inside Forward; RemovePort publishes a snapshot without the port and then waits until every
// Ingress has left the Forward it was in. That costs a frame nothing and a batch two additions to memory nobody else writes.
//
// # Limits
//
// Ports (Config.MaxPorts), FDB entries (Config.MaxMACs), sources per port (PortConfig.MACLimit), flooded frames per second
// (PortConfig.StormLimit), bytes per second (PortConfig.RateLimit).
//
// # References
//
// IEEE 802.1D-2004 §7 (ageing 300 s, reserved addresses §7.12.6); RFC 826, RFC 4861, RFC 7039 (source address validation), RFC 6105 (RA guard);
// Linux net/bridge; Open vSwitch lib/mac-learning.h; Snabb apps/bridge/learning.lua.
package vswitch
