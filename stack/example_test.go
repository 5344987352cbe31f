package stack_test

import (
	"fmt"
	"net/netip"

	"patchbay/frame"
	"patchbay/internal/wire"
	"patchbay/stack"
)

// printer stands for the switch.
type printer struct{}

func (printer) Forward(fs []frame.Frame) {
	for _, f := range fs {
		fmt.Printf("%v -> %v, %d bytes\n", wire.Src(f.Data), wire.Dst(f.Data), len(f.Data))
	}
}

func Example() {
	gw, err := stack.New(stack.Config{
		MAC:   wire.MAC{0x02, 0, 0, 0, 0, 1},
		Addrs: []netip.Prefix{netip.MustParsePrefix("10.88.0.1/16")},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer gw.Close()
	gw.Connect(func() frame.Sink { return printer{} })

	// A container asks who has 10.88.0.1.
	ask := make([]byte, 42)
	wire.PutEthernet(ask, wire.Broadcast, wire.MAC{0x02, 0, 0, 0, 0, 2}, wire.EtherTypeARP)
	copy(ask[14:], []byte{0, 1, 8, 0, 6, 4, 0, 1, 0x02, 0, 0, 0, 0, 2, 10, 88, 0, 2, 0, 0, 0, 0, 0, 0, 10, 88, 0, 1})
	gw.Transmit([]frame.Frame{{Data: ask}})
	// Output: 02:00:00:00:00:01 -> 02:00:00:00:00:02, 42 bytes
}
