// Package stack is the gateway of a network: one switch port with an address, that sorts what containers send to it by
// protocol. TCP goes to the gVisor netstack, of which this package is the only importer; UDP and ICMP are handed on packet by packet; ARP,
// neighbour discovery, router advertisements and echo to the gateway itself are answered here.
package stack
