package vswitch_test

import (
	"fmt"

	"patchbay/frame"
	"patchbay/internal/wire"
	vswitch "patchbay/switch"
)

// printer is a port that prints what it is given.
type printer string

func (p printer) Transmit(fs []frame.Frame) int {
	for _, f := range fs {
		fmt.Printf("%s got %q\n", string(p), f.Data[wire.EthernetLen:])
	}
	return len(fs)
}

func (printer) Caps() frame.Caps { return frame.CapAll }

func Example() {
	s := vswitch.New(vswitch.Config{})
	alice, _ := s.AddPort(printer("alice"), vswitch.PortConfig{Name: "alice"})
	bob, _ := s.AddPort(printer("bob"), vswitch.PortConfig{Name: "bob"})
	_, _ = s.AddPort(printer("carol"), vswitch.PortConfig{Name: "carol"})

	a, b := wire.MAC{2, 0, 0, 0, 0, 0xa}, wire.MAC{2, 0, 0, 0, 0, 0xb}
	send := func(in *vswitch.Ingress, dst, src wire.MAC, text string) {
		data := make([]byte, wire.EthernetLen, 64)
		wire.PutEthernet(data, dst, src, 0x88b5)
		in.Forward([]frame.Frame{{Data: append(data, text...)}})
	}
	fromAlice, fromBob := s.Ingress(alice), s.Ingress(bob) // one for each goroutine that receives

	send(fromAlice, wire.Broadcast, a, "who is there?")
	send(fromBob, a, b, "bob")
	send(fromAlice, b, a, "hello bob")

	for _, e := range s.FDB() {
		fmt.Println(e.MAC, "is behind port", e.Port)
	}
	t := s.Stats().Total
	fmt.Println("received", t.RxFrames, "= unicast", t.Unicast, "+ flooded", t.Flooded, "+ dropped", t.Dropped())
	// Output:
	// bob got "who is there?"
	// carol got "who is there?"
	// alice got "bob"
	// bob got "hello bob"
	// 02:00:00:00:00:0a is behind port 1
	// 02:00:00:00:00:0b is behind port 2
	// received 3 = unicast 2 + flooded 1 + dropped 0
}
