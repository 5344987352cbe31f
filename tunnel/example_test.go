package tunnel_test

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
	vswitch "patchbay/switch"
	"patchbay/tunnel"
)

// station is what a container's TAP would be: it prints what it gets.
type station struct {
	name string
	got  chan string
}

func (s station) Caps() frame.Caps { return 0 }

func (s station) Transmit(fs []frame.Frame) int {
	for i := range fs {
		s.got <- fmt.Sprintf("%s got %d bytes from %v", s.name, len(fs[i].Data), wire.Src(fs[i].Data))
	}
	return len(fs)
}

// Two hosts, here two loopback addresses, make one network. Each plugs the other in as a port.
func Example() {
	const vni = 42
	hosts := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:47890"), netip.MustParseAddrPort("127.0.0.2:47890")}
	got := make(chan string, 1)
	var ingress *vswitch.Ingress
	for i, listen := range hosts {
		v, err := tunnel.Listen(tunnel.Config{Listen: listen})
		if err != nil {
			fmt.Println(err)
			return
		}
		defer v.Close()
		sw := vswitch.New(vswitch.Config{})
		peer, err := v.AddPeer(tunnel.PeerConfig{VNI: vni, Remote: hosts[1-i]})
		if err != nil {
			fmt.Println(err)
			return
		}
		// All peers of a network are in one split-horizon group: what comes from one never goes to another.
		port, err := sw.AddPort(peer, vswitch.PortConfig{Name: "peer " + hosts[1-i].String(), Group: 1})
		if err != nil {
			fmt.Println(err)
			return
		}
		peer.Attach(sw.Ingress(port))
		// To unplug: sw.RemovePort(port), then peer.Close().
		go v.Run(context.Background())

		id, err := sw.AddPort(station{fmt.Sprintf("station %d", i+1), got}, vswitch.PortConfig{})
		if err != nil {
			fmt.Println(err)
			return
		}
		if i == 0 {
			ingress = sw.Ingress(id)
		}
	}
	broadcast := make([]byte, 60)
	wire.PutEthernet(broadcast, wire.Broadcast, wire.MAC{2, 0, 0, 0, 0, 1}, 0x88b5)
	ingress.Forward([]frame.Frame{{Data: broadcast}})
	select {
	case s := <-got:
		fmt.Println(s)
	case <-time.After(5 * time.Second):
		fmt.Println("nothing came")
	}
	// Output: station 2 got 60 bytes from 02:00:00:00:00:01
}
