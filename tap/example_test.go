package tap_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"patchbay/frame"
	"patchbay/internal/wire"
	"patchbay/tap"
)

// first prints the first ARP request that comes and wants no more.
type first struct{ stop context.CancelFunc }

func (s first) Forward(fs []frame.Frame) {
	for i := range fs {
		t, off, ok := wire.Payload(fs[i].Data)
		if a, isARP := wire.ParseARP(fs[i].Data[off:]); ok && t == wire.EtherTypeARP && isARP && a.TargetIP.String() == "10.88.0.9" {
			fmt.Println("the kernel asks who has", a.TargetIP)
			s.stop()
			return
		}
	}
}

// Example opens a TAP in the namespace it runs in, as the edge process does, and reads from it, as the node does with the descriptors that it is handed.
func Example() {
	h, err := tap.Open(tap.OpenConfig{Name: "example0", Kind: tap.KindAuto})
	if err != nil {
		fmt.Println(err)
		return
	}
	if _, err := h.Configure(tap.IfConfig{Addrs: []netip.Prefix{netip.MustParsePrefix("10.88.0.2/24")}}); err != nil {
		fmt.Println(err)
		return
	}
	dev, err := tap.New(tap.Config{Info: h.Info, FDs: h.FDs})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer dev.Close()
	ctx, stop := context.WithCancel(context.Background())
	go func() { // somebody on the other side of the interface sends something
		if c, err := net.Dial("udp", "10.88.0.9:9"); err == nil {
			fmt.Fprint(c, "hello")
			c.Close()
		}
	}()
	fmt.Println("ended:", dev.Serve(ctx, 0, first{stop}))
	// Output:
	// the kernel asks who has 10.88.0.9
	// ended: <nil>
}
