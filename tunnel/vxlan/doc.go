// Package vxlan is the VXLAN header of RFC 7348, read and written as Linux does.
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+-+-+-+-+-+-+-+-+-----------------------------------------------+
//	|R|R|R|R|I|R|R|R|                 reserved                      |
//	+---------------+-------------------------------+---------------+
//	|              VXLAN network identifier (VNI)   |   reserved    |
//	+-----------------------------------------------+---------------+
//
// The header is the first HeaderLen bytes of a UDP datagram; an Ethernet frame without FCS follows.
//
// # Reserved bits
//
// RFC 7348 §5 has a receiver ignore them. Linux drops a datagram in which one is set (vxlan_rcv: "unprocessed flags"), because they are how
// extensions say that the header means something else (group policy, GPE, remote checksum offload). So does Parse, with frame.DropTunnelHeader; and Put
// sets none. Nobody may carry anything of ours in them.
//
// # Inner VLAN tags
//
// RFC 7348 §6.1 has a tunnel endpoint drop inner frames with a VLAN tag unless it is told otherwise. Linux, Open vSwitch and the switches of data
// centres pass them, and so do we: a container that uses VLANs finds them on both hosts, as on one. A tag is four bytes more than the network's
// MTU accounts for, here as there.
//
// # Concurrency
//
// Pure functions.
//
// # References
//
// RFC 7348 §5, §6; Linux drivers/net/vxlan/vxlan_core.c (vxlan_rcv, vxlan_build_skb), include/net/vxlan.h.
package vxlan
