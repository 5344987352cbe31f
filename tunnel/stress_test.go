package tunnel

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

// Peers come, move and go while frames flow both ways. Nothing is forwarded for a peer that is closed, and every frame is delivered or counted.
func TestPeersComeAndGo(t *testing.T) {
	testbed.Leaks(t)
	a, b := underlay(t, 1500)
	va, vb := newVTEP(t, a, Config{}), newVTEP(t, b, Config{})
	there, elsewhere := netip.MustParseAddrPort("10.9.0.2:4789"), netip.MustParseAddrPort("10.9.0.9:4789")
	for vni := range uint32(4) { // the far end reflects
		p := addPeer(t, vb, PeerConfig{VNI: vni, Remote: netip.MustParseAddrPort("10.9.0.1:4789")})
		p.Attach(sinkFunc(func(fs []frame.Frame) { p.Transmit(fs) }))
	}
	ping(t, a, "10.9.0.2")
	var wg sync.WaitGroup
	var back atomic.Int64
	end := time.Now().Add(time.Second)
	for vni := range uint32(4) {
		wg.Go(func() {
			super := frame.Frame{Data: partial(packet(false, wire.ProtoTCP, 0, 20000), false)}
			super.Hdr = wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, GSOType: wire.GSOTCPv4, GSOSize: 1400, CsumStart: 34, CsumOffset: 16}
			fs := []frame.Frame{{Data: packet(true, wire.ProtoUDP, 0, 100)}, super, {Data: packet(false, wire.ProtoUDP, 2, 1000)}}
			for round := 0; time.Now().Before(end) || round < 5; round++ {
				p, err := va.AddPeer(PeerConfig{VNI: vni, Remote: there})
				if err != nil {
					t.Error(err)
					return
				}
				var closed atomic.Bool
				var forwarded atomic.Uint64
				p.Attach(sinkFunc(func(fs []frame.Frame) {
					if closed.Load() {
						t.Error("a frame for a peer that is closed")
					}
					back.Add(int64(len(fs)))
					forwarded.Add(uint64(len(fs)))
				}))
				var sent, taken atomic.Int64
				var senders sync.WaitGroup
				for range 2 {
					senders.Go(func() {
						for range 20 {
							taken.Add(int64(p.Transmit(fs)))
							sent.Add(int64(len(fs)))
						}
					})
				}
				if err := p.SetRemote(elsewhere); err != nil {
					t.Error(err)
				}
				if err := p.SetRemote(there); err != nil {
					t.Error(err)
				}
				p.Stats()
				if round%2 == 0 {
					senders.Wait()
				}
				p.Close()
				closed.Store(true)
				senders.Wait()
				st := p.Stats()
				early := st.RxFrames - forwarded.Load()  // what an earlier round's frames came back as, before this one had a sink
				early += p.Drops().Get(frame.DropNoFlow) // and answers to its questions
				if sent.Load() != taken.Load()+int64(p.Drops().Total()-early) || uint64(taken.Load()) != st.TxFrames {
					t.Errorf("%d frames, %d taken, %d dropped, %d of them before there was a sink, %+v", sent.Load(), taken.Load(), p.Drops().Total(), early, st)
				}
				if err := p.SetRemote(elsewhere); !errors.Is(err, ErrClosed) {
					t.Error(fmt.Errorf("a closed peer moves: %w", err))
				}
			}
		})
	}
	wg.Wait()
	if back.Load() == 0 {
		t.Error("nothing came back")
	}
}
