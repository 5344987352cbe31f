package nat_test

import (
	"context"
	"fmt"
	"net/netip"

	"patchbay/frame"
	"patchbay/internal/wire"
	"patchbay/nat"
	"patchbay/stack"
)

// lan stands for the switch.
type lan struct{}

func (lan) Forward([]frame.Frame) {}

// lateTCP gives the gateway a handler that does not exist yet when it is made.
type lateTCP struct{ stack.TCPHandler }

func Example() {
	subnet := netip.MustParsePrefix("10.88.0.0/24")
	var tcp lateTCP
	gw, err := stack.New(stack.Config{
		MAC: wire.MAC{2, 0, 0, 0, 0, 1}, Addrs: []netip.Prefix{netip.MustParsePrefix("10.88.0.1/24")}, Handlers: stack.Handlers{TCP: &tcp},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer gw.Close()
	n, err := nat.New(nat.Config{Network: gw, Subnets: []netip.Prefix{subnet}})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer n.Close()
	tcp.TCPHandler = n
	gw.Connect(func() frame.Sink { return lan{} })
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	done := make(chan error)
	go func() { done <- n.Run(ctx) }()

	// Port 80 of the container at 10.88.0.2 is the host's 127.88.0.1:8088 from here on.
	spec, err := nat.ParseSpec("127.88.0.1:8088:80")
	if err != nil {
		fmt.Println(err)
		return
	}
	p, err := n.Publish(spec, []netip.Addr{netip.MustParseAddr("10.88.0.2")})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("published", p.Spec(), "ports open:", n.Stats().PublishedPorts)
	_, err = n.Publish(spec, []netip.Addr{netip.MustParseAddr("10.88.0.3")})
	fmt.Println("twice:", err != nil)
	p.Close()
	fmt.Println("ports open:", n.Stats().PublishedPorts)
	stop()
	fmt.Println("ended:", <-done)
	// Output:
	// published 127.88.0.1:8088:80/tcp ports open: 1
	// twice: true
	// ports open: 0
	// ended: <nil>
}
