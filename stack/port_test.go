package stack

import (
	"slices"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/porttest"
)

// TestConformance: the gateway is a switch port like any other, whose far end for datagrams is Handlers.UDP.
func TestConformance(t *testing.T) {
	porttest.Run(t, func(t *testing.T) *porttest.Harness {
		out := make(chan frame.Frame, 1024)
		cfg := testConfig()
		cfg.Handlers.UDP = handlerFunc(func(ps []Packet) {
			for _, p := range ps {
				if len(out) == cap(out) { // before the copy: nobody reads on purpose
					continue
				}
				select {
				case out <- frame.Frame{Hdr: p.Frame.Hdr, Data: slices.Clone(p.Frame.Data)}:
				default:
				}
			}
		})
		g, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return &porttest.Harness{
			Port:      g,
			NoTCP:     true,
			AllocFree: true,
			Addrs:     porttest.Addrs{SrcMAC: conMAC, DstMAC: gwMAC, Src4: con4, Dst4: far4, Src6: con6, Dst6: far6},
			Drops:     func() uint64 { return g.Drops().Total() },
			Close:     func() { g.Close() },
			Read: func(wait time.Duration) (fs []frame.Frame) {
				deadline := time.After(wait)
				select {
				case f := <-out:
					fs = append(fs, f)
				case <-deadline:
					return nil
				}
				for len(fs) < 256 {
					select {
					case f := <-out:
						fs = append(fs, f)
					default:
						return fs
					}
				}
				return fs
			},
		}
	})
}
