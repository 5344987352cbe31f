package nat

import "sync/atomic"

type stats struct {
	idleEnded atomic.Uint64
	evicted   atomic.Uint64
	probes    atomic.Uint64
}

// Stats is a picture of a NAT at one moment. Its JSON names are part of what patchbay writes with --stats.
type Stats struct {
	TCPFlows          int `json:"tcpFlows"`          // of containers to the host's side, connecting and established
	HalfOpen          int `json:"halfOpen"`          // of them, those that wait for the host's answer
	PublishedFlows    int `json:"publishedFlows"`    // through published TCP ports, connecting and established
	PublishedHalfOpen int `json:"publishedHalfOpen"` // of them, those that wait for the container's answer
	UDPFlows          int `json:"udpFlows"`          // container endpoints with a socket on the host
	UDPClients        int `json:"udpClients"`        // of published UDP ports
	PingFlows         int `json:"pingFlows"`         // container endpoints with a ping socket on the host
	PublishedPorts    int `json:"publishedPorts"`    // ports of the host that lead to a container

	IdleEnded  uint64 `json:"idleEnded"`  // TCP flows ended because they were silent for longer than Limits.TCPIdle or TCPHalfIdle
	UDPEvicted uint64 `json:"udpEvicted"` // clients of published UDP ports that were never answered and made room for others

	TCPOrphans  int    `json:"tcpOrphans"`  // connections of a process before this one whose container has not come back yet
	Probes      uint64 `json:"probes"`      // segments sent to containers to have such connections reset
	Unjournaled uint64 `json:"unjournaled"` // TCP flows that found the journal full; a crash leaves their containers waiting
}

// Stats takes a picture.
func (n *NAT) Stats() Stats {
	return Stats{
		TCPFlows: n.tcp.flows.inUse(), HalfOpen: n.tcp.halfOpen.inUse(),
		PublishedFlows: n.tcp.pubFlows.inUse(), PublishedHalfOpen: n.tcp.pubHalfOpen.inUse(),
		UDPFlows: n.udp.flows.quota.inUse(), UDPClients: n.udp.pubs.quota.inUse(), PingFlows: n.icmp.flows.quota.inUse(),
		PublishedPorts: n.publishedPorts(),
		IdleEnded:      n.stats.idleEnded.Load(), UDPEvicted: n.stats.evicted.Load(),
		TCPOrphans: n.journal.waiting(), Probes: n.stats.probes.Load(), Unjournaled: n.journal.lost(),
	}
}
