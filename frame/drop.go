package frame

import "sync/atomic"

// Drop names why a frame or packet was not delivered. Each reason has one counter wherever drops are counted.
type Drop uint8

// The reasons. Add a new one before numDrops, with a name and a meaning in dropText.
const (
	DropMalformed      Drop = iota // too short, or a length inside it does not add up
	DropBadHdr                     // virtio header that contradicts the frame
	DropNoPort                     // unknown destination and nobody to flood to
	DropHairpin                    // destination lives on the port the frame came from
	DropTxBusy                     // the egress device or socket would not take it
	DropTxError                    // the egress device refused it for another reason
	DropTooBig                     // longer than the egress port's MTU allows and not a superframe
	DropPortDown                   // the port was being removed
	DropGroupSource                // source address is a group or zero
	DropSpoofMAC                   // source MAC is not the one the port is bound to
	DropSpoofIP                    // source IP, or ARP or ND sender, is not one the port is bound to
	DropIsolated                   // isolation forbids these two ports to talk
	DropStorm                      // broadcast, unknown and multicast above the port's limit
	DropRate                       // above the port's rate limit
	DropMACLimit                   // port has learned as many addresses as it may
	DropUnresolved                 // the gateway knows no MAC for the destination yet
	DropNotForGateway              // protocol or address the gateway does not serve
	DropChecksum                   // wrong IP, TCP, UDP or ICMP checksum
	DropFragTimeout                // fragments that never became whole
	DropFragLimit                  // reassembly memory is used up
	DropPolicyLoopback             // destination is the host's loopback, which is not allowed here
	DropPolicyMetadata             // destination is link-local (cloud metadata), which is not allowed here
	DropPolicyAddress              // destination cannot be reached through NAT: multicast, broadcast, unspecified
	DropPolicyInternal             // the network is internal: it has no way out
	DropFlowLimit                  // flow table is full
	DropDialLimit                  // too many half-open connections, of this container or in all
	DropNoFlow                     // answer that belongs to no flow
	DropHostSend                   // the host's socket refused the packet
	DropPingForbidden              // the host forbids unprivileged ping sockets (net.ipv4.ping_group_range)
	DropServiceLimit               // DHCP, DNS or RA request above the service's limit
	DropRefused                    // the egress port did not take it; the port's own counters name the reason
	DropSplitHorizon               // both ports belong to the same split-horizon group
	DropReserved                   // 01:80:c2:00:00:0x, which IEEE 802.1D bridges never forward
	DropTTL                        // time to live ran out at the gateway
	DropMemory                     // the buffers of the gateway's TCP connections have reached their limit
	DropUnderlay                   // the host has no way to the tunnel's peer
	DropTunnelHeader               // tunnel header that is too short, lacks its mark, or has reserved bits set
	DropUnknownVNI                 // tunnelled frame for a network that is not here
	DropUnknownPeer                // tunnelled frame from a host that is no peer of the network
	DropECN                        // congestion was marked on the way, and the frame cannot carry the mark (RFC 6040)
	DropFragMismatch               // fragment that contradicts the others of its message
	DropDuplicate                  // tunnelled message, or fragment of one, that has come already
	DropUnknownRecord              // record of a kind that this version does not know
	DropUnsealed                   // clear frame on a sealed network
	DropUnauthentic                // sealed frame that does not open: forged, changed on the way, or sealed for somebody else
	DropReplayed                   // sealed frame that came before, or too late to tell
	DropNoSession                  // sealed path without keys: none yet, or those the frame names are not here
	numDrops
)

// NumDrops is how many reasons there are.
const NumDrops = int(numDrops)

var dropText = [NumDrops][2]string{
	DropMalformed:      {"malformed", "the frame is too short, or a length inside it does not add up"},
	DropBadHdr:         {"bad-hdr", "the virtio header contradicts the frame"},
	DropNoPort:         {"no-port", "the destination is unknown and there is no other port to flood to"},
	DropHairpin:        {"hairpin", "the destination lives on the port the frame came from"},
	DropTxBusy:         {"txbusy", "the receiver's device or socket was full"},
	DropTxError:        {"txerror", "the receiver's device refused the frame"},
	DropTooBig:         {"too-big", "the frame is longer than the receiving port's MTU"},
	DropPortDown:       {"port-down", "the port was being removed"},
	DropGroupSource:    {"group-source", "the source address is a group address or zero"},
	DropSpoofMAC:       {"spoof-mac", "the source MAC is not the one the port is bound to"},
	DropSpoofIP:        {"spoof-ip", "the source address is not one the port is bound to"},
	DropIsolated:       {"isolated", "isolation forbids these two ports to talk"},
	DropStorm:          {"storm", "broadcast, unknown and multicast frames above the port's limit"},
	DropRate:           {"rate", "above the port's rate limit"},
	DropMACLimit:       {"mac-limit", "the port has learned as many addresses as it may"},
	DropUnresolved:     {"unresolved", "nobody on the network answers for the destination address"},
	DropNotForGateway:  {"not-for-gateway", "the gateway does not serve this protocol or address"},
	DropChecksum:       {"checksum", "a checksum is wrong"},
	DropFragTimeout:    {"frag-timeout", "fragments that never became whole"},
	DropFragLimit:      {"frag-limit", "fragments above the memory set aside for them"},
	DropPolicyLoopback: {"policy-loopback", "the host's loopback is closed to containers; --host-loopback opens it"},
	DropPolicyMetadata: {"policy-metadata", "link-local destinations such as 169.254.169.254 are closed to containers"},
	DropPolicyAddress:  {"policy-address", "the destination cannot be reached through NAT"},
	DropPolicyInternal: {"policy-internal", "the network is internal: it has no way out"},
	DropFlowLimit:      {"flow-limit", "the table of flows is full"},
	DropDialLimit:      {"dial-limit", "too many connections are still waiting for an answer"},
	DropNoFlow:         {"no-flow", "an answer that belongs to no flow"},
	DropHostSend:       {"host-send", "the host's socket refused the packet"},
	DropPingForbidden:  {"ping-forbidden", "the host's net.ipv4.ping_group_range does not allow ping sockets"},
	DropServiceLimit:   {"service-limit", "more DHCP, DNS or router requests than the service takes"},
	DropTTL:            {"ttl", "the time to live ran out at the gateway; traceroute does that on purpose"},
	DropRefused:        {"refused", "the receiving port did not take the frame; its own counters name the reason"},
	DropSplitHorizon:   {"split-horizon", "both ports belong to the same split-horizon group"},
	DropMemory:         {"memory", "the gateway's TCP buffers reached their limit: segments lost, to be sent again, or a writer held up"},
	DropUnderlay:       {"underlay", "the host has no route to the tunnel's peer, or its link is down"},
	DropTunnelHeader:   {"tunnel-header", "the tunnel's header is too short, lacks its mark or has reserved bits set: the sender speaks another protocol or extension"},
	DropUnknownVNI:     {"unknown-vni", "a frame for a VNI of which there is no network here"},
	DropUnknownPeer:    {"unknown-peer", "a tunnelled frame from a host that is no peer of the network; `patchbay peer add` makes it one"},
	DropECN:            {"ecn", "a tunnelled frame met congestion on the way and cannot say so to its receiver"},
	DropFragMismatch:   {"frag-mismatch", "a tunnelled fragment contradicts the others of its message"},
	DropDuplicate:      {"duplicate", "a tunnelled message, or a fragment of one, came a second time"},
	DropUnknownRecord:  {"unknown-record", "the tunnel's peer sent something that this version does not know: it is newer"},
	DropUnsealed:       {"unsealed", "a clear frame on a sealed network: the peer does not seal, or somebody forges; create the network with --seal on both nodes"},
	DropUnauthentic:    {"unauthentic", "a sealed frame that does not open: forged, changed on the way, or sealed for somebody else"},
	DropReplayed:       {"replayed", "a sealed frame that was received before, or comes too late to tell"},
	DropNoSession:      {"no-session", "there are no keys for the frame: the handshake with the peer is not done, or the frame is of a session that has ended"},
	DropReserved:       {"reserved", "bridge protocol address (01:80:c2:00:00:0x), which is never forwarded"},
}

// String is the reason's short name, as `patchbay drops` and the metrics show it.
func (d Drop) String() string {
	if int(d) >= NumDrops {
		return "unknown"
	}
	return dropText[d][0]
}

// MarshalText makes the reason a key or value of JSON under its short name.
func (d Drop) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Meaning is one sentence for the person who sees the counter rise.
func (d Drop) Meaning() string {
	if int(d) >= NumDrops {
		return "a reason this version does not know"
	}
	return dropText[d][1]
}

// DropCounters counts drops by reason. The zero value is ready; it must not be copied.
type DropCounters struct {
	n [NumDrops]atomic.Uint64
}

// Add counts n frames dropped for reason d.
func (c *DropCounters) Add(d Drop, n int) {
	if n > 0 {
		c.n[d].Add(uint64(n))
	}
}

// Get is the count of one reason.
func (c *DropCounters) Get(d Drop) uint64 { return c.n[d].Load() }

// Total is the count over all reasons. Counters that move while it runs may or may not be included.
func (c *DropCounters) Total() (t uint64) {
	for i := range c.n {
		t += c.n[i].Load()
	}
	return t
}

// Each calls f for every reason whose count is not zero, in the order of the constants.
func (c *DropCounters) Each(f func(d Drop, n uint64)) {
	for i := range c.n {
		if n := c.n[i].Load(); n != 0 {
			f(Drop(i), n)
		}
	}
}
