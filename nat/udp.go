package nat

import "patchbay/stack"

// udpNAT is a placeholder until UDP is written.
type udpNAT struct{ n *NAT }

func newUDP(n *NAT) (*udpNAT, error) { return &udpNAT{n: n}, nil }

// HandlePackets refuses.
func (u *udpNAT) HandlePackets(ps []stack.Packet) {}

func (u *udpNAT) close() {}
