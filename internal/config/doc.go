// Package config reads the daemon's configuration file: the networks it is to have and the ports that are to be published.
//
//	networks:
//	  lab:
//	    subnets: [10.9.0.0/24, fd09::/64]   # default: free ones
//	    gateways: [10.9.0.254]              # default: the first address of each
//	    mtu: 1500
//	    isolate: true                       # reach the gateway alone
//	    internal: true                      # no way out
//	    vni: 42
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
