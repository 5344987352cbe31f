// Package config reads the daemon's configuration file: the networks it is to have and the ports that are to be published.
//
//	networks:
//	  lab:
//	    subnets: [10.9.0.0/24, fd09::/64]   # default: free ones
//	    gateways: [10.9.0.254]              # default: the first address of each
//	    mtu: 1500
//	    isolate: true                       # reach the gateway alone
//	    internal: true                      # no way out
//	    vni: 42                             # number of the network on all its nodes
//	    wire: patchbay                      # to peers that name no other; default: vxlan
//	    seal: true                          # encrypted and authenticated
//	    port: 4790                          # UDP, here and at the peers; default: the daemon's
//	    group: 239.1.1.1%eth0               # where kernels among the peers send their broadcast
//	    ipRange: [10.9.0.64/26, "fd09::1:0/112"]  # what this node hands out of the subnets; default: all
//	    peers:
//	      - b.example.test                  # HOST or HOST:PORT, or more of it:
//	      - host: 192.0.2.7:4789
//	        wire: vxlan
//	        noOffload: true
//	        onePort: true
//	        fdb: ["02:00:5e:10:00:01"]      # MACs that live behind it
//	    dns: [9.9.9.9, "[2620:fe::fe]:53"]  # default: the host's
//	    hostLoopback: true
//	    linkLocal: true
//	publish:
//	  - attachment: web
//	    network: lab                        # default: default
//	    ports: ["8080:80", "127.0.0.1:5300-5309:53/udp"]
//
// # Theory of operation
//
// Parse reads a whole file or nothing: an unknown key, a bad value or a name that stands twice is an error with the file's name and line, in the form that compilers use, and says what would be
// right. What a network may be is api.NetworkSpec's business, and is checked here already. Parse touches nothing; the daemon compares the result with what there is (daemon.Configure).
//
// # Concurrency
//
// Parse is a pure function. A File is a plain value.
//
// # Limits
//
// MaxSize bytes; as many networks and rules as fit. YAML aliases are refused, so that a small file cannot be a large one.
//
// # References
//
// YAML 1.2.
package config
