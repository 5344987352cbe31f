// Package ipam hands out the addresses of a network: pools, leases, and the choice of subnets that do not clash with the
// host's routes. IPv4 and IPv6 are the same code; a network with both has two pools.
//
// # Theory of operation
//
// A [Pool] covers one CIDR. Never handed out are the network and broadcast addresses of IPv4, the subnet-router anycast address of
// IPv6, the gateway, the host alias and what the configuration reserves. An address is found in this order:
//
//  1. the lease the attachment already holds (asking twice is harmless),
//  2. the address asked for, when one was,
//  3. the address the same MAC, or else the same attachment, gave back last,
//  4. the next address in sequence that nobody holds and nobody gave back lately,
//  5. when there is none, the one that was given back longest ago.
//
// So an address rests after its release ([PoolConfig.ReuseDelay]) while there is another choice, because neighbours, DNS caches and NAT flows
// still remember its old owner; but a small pool does not refuse a container for the sake of it. Only when every address is held does
// [Pool.Lease] fail, and then [ExhaustedError] names the holders.
//
// A lease belongs to an attachment id and lives until it is released, or until its end when it was asked for with a TTL (DHCP). A released
// address stays on record, so that the same MAC gets it again; the number of such records is bounded.
//
// # Ownership and concurrency
//
// Everything is kept through a [Store]: [MemStore] here, a file or etcd elsewhere. The pool holds a copy of its records and writes through. Each
// write is a compare-and-swap on one address, so several nodes may share a store: who loses a race reads again and goes on. Pool and
// MemStore are safe for concurrent use. A call blocks for as long as the Store does.
//
// # Limits
//
// A pool keeps at most [PoolConfig.MaxReleased] released records. IPv4 subnets are /8 to /30, IPv6 /16 to /126.
//
// # References
//
// RFC 1918 (private IPv4), RFC 4193 §3.2 (ULA), RFC 4291 §2.6.1 (subnet-router anycast), RFC 6890 (special-purpose addresses).
package ipam
