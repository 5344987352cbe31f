package nat

import "patchbay/stack"

// icmpNAT is a placeholder until ICMP is written.
type icmpNAT struct{ n *NAT }

func newICMP(n *NAT) (*icmpNAT, error) { return &icmpNAT{n: n}, nil }

// HandlePackets refuses.
func (c *icmpNAT) HandlePackets(ps []stack.Packet) {}

func (c *icmpNAT) close() {}
