package porttest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// Port is vswitch.Port, which this package does not import so that it can test what the switch is built on.
type Port interface {
	Transmit(fs []frame.Frame) int
	Caps() frame.Caps
}

// Harness is an open port and its far end. Only Port, Read and Close are needed.
type Harness struct {
	Port Port
	// Read waits at most so long for frames to come out at the far end and returns them, copied; none is no error. Frames that are not
	// the suite's may be among them. Hdr of each says what is left to do.
	Read func(wait time.Duration) []frame.Frame
	// Close closes the port. It is called more than once, and while Transmit runs.
	Close func()
	// Drops is how many frames the port has dropped, over all reasons. nil means that it does not count.
	Drops func() uint64
	// Addrs is what frames carry; zero fields have defaults that belong to nobody.
	Addrs Addrs
	// MTU of the far end in bytes of IP packet. 0 means 1500.
	MTU int
	// NoTCP leaves TCP out, for a far end that terminates it.
	NoTCP bool
	// Patience is how long something may take that ought to happen at once. 0 means 5 s.
	Patience time.Duration
	// AllocFree says that Transmit allocates nothing, which is then checked. The far end must not allocate either when nobody reads;
	// PacketReader's does not.
	AllocFree bool
}

// inFlight is how many frames may be on their way to the far end while somebody reads it.
const inFlight = 64

// checks is the suite, in order. Each has a port of its own and returns what is wrong.
var checks = []struct {
	name string
	run  func(h *Harness) error
}{
	{"delivers in order", checkDelivers},
	{"takes an empty batch", checkEmpty},
	{"leaves lent frames alone", checkLent},
	{"finishes what it cannot pass on", checkUnfinished},
	{"takes concurrent callers", checkConcurrent},
	{"never waits", checkNeverWaits},
	{"survives nonsense", checkNonsense},
	{"drops and counts after Close", checkClosed},
	{"can be closed while in use", checkCloseInUse},
	{"allocates nothing", checkAllocs},
}

// Run runs the suite. open makes a fresh port for each check and cleans up with t.Cleanup.
func Run(t *testing.T, open func(t *testing.T) *Harness) {
	for _, c := range checks {
		t.Run(c.name, func(t *testing.T) {
			h := open(t)
			h.defaults()
			t.Cleanup(h.Close)
			if err := c.run(h); err != nil {
				t.Error(err)
			}
		})
	}
}

func (h *Harness) defaults() {
	d := defaultAddrs()
	if h.Addrs.SrcMAC.IsZero() {
		h.Addrs.SrcMAC = d.SrcMAC
	}
	if h.Addrs.DstMAC.IsZero() {
		h.Addrs.DstMAC = d.DstMAC
	}
	if !h.Addrs.Src4.IsValid() {
		h.Addrs.Src4 = d.Src4
	}
	if !h.Addrs.Dst4.IsValid() {
		h.Addrs.Dst4 = d.Dst4
	}
	if !h.Addrs.Src6.IsValid() {
		h.Addrs.Src6 = d.Src6
	}
	if !h.Addrs.Dst6.IsValid() {
		h.Addrs.Dst6 = d.Dst6
	}
	if h.Patience == 0 {
		h.Patience = 5 * time.Second
	}
	if h.MTU == 0 {
		h.MTU = 1500
	}
}

func (h *Harness) drops() uint64 {
	if h.Drops == nil {
		return 0
	}
	return h.Drops()
}

// send transmits and checks what Transmit says.
func (h *Harness) send(fs []frame.Frame) (int, error) {
	n := h.Port.Transmit(fs)
	if n < 0 || n > len(fs) {
		return 0, fmt.Errorf("Transmit of %d frames returned %d", len(fs), n)
	}
	return n, nil
}

// sendAll transmits frames that there is room for.
func (h *Harness) sendAll(fs []frame.Frame) error {
	n, err := h.send(fs)
	if err == nil && n != len(fs) {
		err = fmt.Errorf("an idle port accepted %d of %d frames", n, len(fs))
	}
	if err != nil {
		return err
	}
	return nil
}

// works checks that a datagram gets through, whatever else is still on its way.
func (h *Harness) works(id uint32) error {
	fl := flow{false, 999}
	a := newArrived(h.MTU)
	end := time.Now().Add(h.Patience)
	for ; time.Now().Before(end); id++ {
		if _, err := h.send([]frame.Frame{h.Addrs.udp(fl, id, 100, false)}); err != nil {
			return err
		}
		for range 20 {
			fs := h.Read(10 * time.Millisecond)
			for i := range fs {
				// Thousands of others may come first.
				if p := wire.EthernetLen + wire.IPv4Len; len(fs[i].Data) > p+2 && binary.BigEndian.Uint16(fs[i].Data[p:]) == fl.port {
					if err := a.add(&fs[i]); err != nil {
						return err
					}
				}
			}
			if len(a.ids[fl]) > 0 {
				return nil
			}
		}
	}
	return fmt.Errorf("nothing gets through any more")
}

func checkDelivers(h *Harness) error {
	a := newArrived(h.MTU)
	var fs []frame.Frame
	want := map[flow][]uint32{}
	lens := map[uint32]int{}
	for id := range uint32(32) {
		fl := flow{id%3 == 0, 100 + uint16(id%2)}
		n := []int{8, 100, 1000, 1400, h.MTU - 48, 33}[id%6]
		want[fl] = append(want[fl], id)
		lens[id] = n
		fs = append(fs, h.Addrs.udp(fl, id, n, false))
	}
	// Batches of one, and of several.
	for _, k := range []int{1, 2, 29} {
		if err := h.sendAll(fs[:k]); err != nil {
			return err
		}
		fs = fs[k:]
	}
	if err := h.readUntil(a, func() bool { return a.datagrams >= 32 }); err != nil {
		return err
	}
	for fl, ids := range want {
		if !slices.Equal(a.ids[fl], ids) {
			return fmt.Errorf("%v: sent datagrams %v, got %v", fl, ids, a.ids[fl])
		}
		for _, id := range ids {
			if a.lens[fl][id] != lens[id] {
				return fmt.Errorf("%v: datagram %d of %d bytes came out with %d", fl, id, lens[id], a.lens[fl][id])
			}
		}
	}
	return nil
}

func checkEmpty(h *Harness) error {
	before := h.drops()
	for _, fs := range [][]frame.Frame{nil, {}} {
		if n := h.Port.Transmit(fs); n != 0 {
			return fmt.Errorf("Transmit of no frames returned %d", n)
		}
	}
	if n := h.drops() - before; n != 0 {
		return fmt.Errorf("Transmit of no frames dropped %d", n)
	}
	return nil
}

// everything is a batch of each kind of frame and how many datagrams and bytes of TCP it carries by flow.
func (h *Harness) everything(port uint16) (fs []frame.Frame, datagrams int, streams map[flow]int) {
	streams = map[flow]int{}
	for _, v6 := range []bool{false, true} {
		u := flow{v6, port}
		fs = append(fs,
			h.Addrs.udp(u, 0, 700, false),
			h.Addrs.udp(u, 1, 701, true),
			h.Addrs.udpSuper(u, 2, 1200, 5),
			h.Addrs.udpSuper(u, 7, 100, 40))
		datagrams += 47
		if h.NoTCP {
			continue
		}
		t := flow{v6, port + 1}
		mss := h.MTU - 72
		fs = append(fs,
			h.Addrs.tcp(t, 0, mss, 0, false),
			h.Addrs.tcp(t, mss, mss, 0, true),
			h.Addrs.tcp(t, 2*mss, 40000, mss, true),
			h.Addrs.tcp(t, 2*mss+40000, 64000, mss, true),
			h.Addrs.tcp(t, 2*mss+104000, 3000, 536, true))
		streams[t] = 2*mss + 107000
	}
	return fs, datagrams, streams
}

func (h *Harness) readEverything(datagrams int, streams map[flow]int) error {
	a := newArrived(h.MTU)
	err := h.readUntil(a, func() bool {
		if a.datagrams < datagrams {
			return false
		}
		for fl, n := range streams {
			if a.stream[fl].n < n {
				return false
			}
		}
		return true
	})
	if err != nil {
		for fl, n := range streams {
			err = fmt.Errorf("%w; %v: %d of %d bytes", err, fl, a.stream[fl].n, n)
		}
		return err
	}
	return a.ordered()
}

func checkLent(h *Harness) error {
	fs, datagrams, streams := h.everything(200)
	for i := range fs {
		was := frame.Frame{Hdr: fs[i].Hdr, Data: bytes.Clone(fs[i].Data)}
		one := fs[i : i+1]
		if err := h.sendAll(one); err != nil {
			return err
		}
		if one[0].Hdr != was.Hdr || len(one[0].Data) != len(was.Data) || !bytes.Equal(one[0].Data, was.Data) {
			return fmt.Errorf("Transmit has changed a lent frame of %d bytes with %+v", len(was.Data), was.Hdr)
		}
		// The owner reads the next frame into the same bytes.
		for k := range one[0].Data {
			one[0].Data[k] = 0xaa
		}
		one[0] = frame.Frame{}
	}
	if err := h.readEverything(datagrams, streams); err != nil {
		return err
	}
	// A flooded frame is with several ports at once: -race sees who writes.
	fs, _, _ = h.everything(300)
	var wg sync.WaitGroup
	var bad atomic.Pointer[error]
	for range 2 {
		wg.Go(func() {
			for range 5 {
				if _, err := h.send(fs); err != nil {
					bad.Store(&err)
				}
			}
		})
	}
	wg.Wait()
	if err := bad.Load(); err != nil {
		return *err
	}
	return nil
}

func checkUnfinished(h *Harness) error {
	fs, datagrams, streams := h.everything(400)
	for i := range fs {
		if err := h.sendAll(fs[i : i+1]); err != nil {
			return fmt.Errorf("frame of %d bytes with %+v: %w", len(fs[i].Data), fs[i].Hdr, err)
		}
	}
	if err := h.readEverything(datagrams, streams); err != nil {
		return err
	}
	fs, datagrams, streams = h.everything(500)
	for batch := range slices.Chunk(fs, 3) {
		if err := h.sendAll(batch); err != nil {
			return err
		}
		time.Sleep(20 * time.Millisecond) // for a far end that is a small socket buffer
	}
	return h.readEverything(datagrams, streams)
}

func checkConcurrent(h *Harness) error {
	const callers, batches, batch = 4, 40, 8
	var accepted, read atomic.Int64
	var bad atomic.Pointer[error]
	var wg sync.WaitGroup
	fail := func(err error) { bad.CompareAndSwap(nil, &err) }
	end := time.Now().Add(2 * h.Patience)
	for g := range callers {
		wg.Go(func() {
			for b := range batches {
				for accepted.Load()-read.Load() > inFlight-callers*batch {
					if time.Now().After(end) || bad.Load() != nil {
						fail(fmt.Errorf("of %d accepted datagrams only %d have come out", accepted.Load(), read.Load()))
						return
					}
					time.Sleep(100 * time.Microsecond)
				}
				var fs []frame.Frame
				for k := range batch {
					fs = append(fs, h.Addrs.udp(flow{g%2 == 1, 600 + uint16(g)}, uint32(b*batch+k), 50+g*100, false))
				}
				n, err := h.send(fs)
				if err != nil {
					fail(err)
				}
				accepted.Add(int64(n))
				for i := range fs {
					clear(fs[i].Data)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	a := newArrived(h.MTU)
	finished := false
	err := h.readUntil(a, func() bool {
		read.Store(int64(a.datagrams))
		select {
		case <-done:
			finished = true
		default:
		}
		return bad.Load() != nil || finished && int64(a.datagrams) >= accepted.Load()
	})
	if err != nil {
		fail(err)
	}
	<-done
	if err := bad.Load(); err != nil {
		return *err
	}
	if n := accepted.Load(); n != callers*batches*batch {
		return fmt.Errorf("%d of %d datagrams were accepted, with at most %d on their way", n, callers*batches*batch, inFlight)
	}
	return a.ordered()
}

// checkNeverWaits sends more than any buffer holds while nobody reads.
func checkNeverWaits(h *Harness) error {
	const batches, batch = 600, 32
	var fs []frame.Frame
	for k := range batch {
		fs = append(fs, h.Addrs.udp(flow{false, 700}, uint32(k), 1200, false))
	}
	before := h.drops()
	type result struct {
		accepted int
		longest  time.Duration
		err      error
	}
	done := make(chan result, 1)
	go func() {
		var r result
		for range batches {
			start := time.Now()
			n, err := h.send(fs)
			if err != nil {
				r.err = err
			}
			r.accepted += n
			r.longest = max(r.longest, time.Since(start))
		}
		done <- r
	}()
	select {
	case r := <-done:
		if r.err != nil {
			return r.err
		}
		if r.longest > time.Second {
			return fmt.Errorf("a Transmit of %d frames took %v while nobody read the far end", batch, r.longest)
		}
		refused := uint64(batches*batch - r.accepted)
		if n := h.drops() - before; h.Drops != nil && n != refused {
			return fmt.Errorf("Transmit did not accept %d frames, but %d are counted as dropped", refused, n)
		}
	case <-time.After(6 * h.Patience):
		return fmt.Errorf("Transmit waits for somebody to read the far end")
	}
	return h.works(10000)
}

// checkNonsense sends frames that no edge would let in. They may be dropped or delivered; the port stays what it is.
func checkNonsense(h *Harness) error {
	good := h.Addrs.udp(flow{false, 800}, 0, 100, false)
	with := func(data []byte, hdr wire.VirtioNetHdr) frame.Frame { return frame.Frame{Hdr: hdr, Data: data} }
	for _, f := range []frame.Frame{
		{},
		with([]byte{1, 2, 3}, wire.VirtioNetHdr{}),
		with(good.Data[:wire.EthernetLen], wire.VirtioNetHdr{}),
		with(good.Data[:20], wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, CsumStart: 34, CsumOffset: 6}),
		with(good.Data, wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, CsumStart: 0xffff, CsumOffset: 0xffff}),
		with(good.Data, wire.VirtioNetHdr{GSOType: wire.GSOTCPv4, GSOSize: 100}),
		with(good.Data, wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, GSOType: wire.GSOTCPv6, CsumStart: 34, CsumOffset: 16}),
		with(good.Data, wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, GSOType: wire.GSOUDPL4, CsumStart: 34, CsumOffset: 6}),
		with(good.Data, wire.VirtioNetHdr{GSOType: wire.GSOUDP, GSOSize: 1}),
		with(good.Data, wire.VirtioNetHdr{GSOType: 0x7f, GSOSize: 1, HdrLen: 0xffff}),
		with(good.Data[:40], wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, GSOType: wire.GSOUDPL4, GSOSize: 1, CsumStart: 34, CsumOffset: 6}),
		with(make([]byte, wire.MaxFrame+100), wire.VirtioNetHdr{}),
		with(make([]byte, wire.MaxFrame), wire.VirtioNetHdr{GSOType: wire.GSOTCPv4 | wire.GSOECN, GSOSize: 1}),
	} {
		before := h.drops()
		n, err := h.send([]frame.Frame{f, f})
		if err != nil {
			return err
		}
		if d := h.drops() - before; h.Drops != nil && d < uint64(2-n) {
			return fmt.Errorf("frame of %d bytes with %+v: %d of 2 accepted, but %d counted as dropped", len(f.Data), f.Hdr, n, d)
		}
	}
	return h.works(20000)
}

func checkClosed(h *Harness) error {
	fs := []frame.Frame{h.Addrs.udp(flow{false, 900}, 0, 100, false), h.Addrs.udp(flow{true, 900}, 0, 100, false), h.Addrs.udp(flow{true, 900}, 1, 100, true)}
	if err := h.sendAll(fs[:1]); err != nil {
		return err
	}
	h.Close()
	h.Close()
	before := h.drops()
	n, err := h.send(fs)
	if err == nil && n != 0 {
		err = fmt.Errorf("after Close, Transmit of %d frames accepted %d", len(fs), n)
	}
	if err != nil {
		return err
	}
	if d := h.drops() - before; h.Drops != nil && d != uint64(len(fs)) {
		return fmt.Errorf("after Close, %d frames were not accepted, but %d are counted as dropped", len(fs), d)
	}
	_ = h.Port.Caps()
	return nil
}

func checkCloseInUse(h *Harness) error {
	var stop atomic.Bool
	var started sync.WaitGroup
	var wg sync.WaitGroup
	for g := range 2 {
		started.Add(1)
		wg.Go(func() {
			fs, _, _ := h.everything(uint16(1000 + 10*g))
			h.Port.Transmit(fs)
			started.Done()
			for !stop.Load() {
				h.Port.Transmit(fs)
			}
		})
	}
	started.Wait()
	closed := make(chan struct{})
	go func() { h.Close(); close(closed) }()
	defer wg.Wait()
	defer stop.Store(true)
	select {
	case <-closed:
	case <-time.After(h.Patience):
		return errors.New("the port's Close does not return while others call Transmit")
	}
	if n := h.Port.Transmit([]frame.Frame{h.Addrs.udp(flow{false, 1}, 0, 100, false)}); n != 0 {
		return fmt.Errorf("after Close, Transmit accepted %d", n)
	}
	return nil
}

func checkAllocs(h *Harness) error {
	if !h.AllocFree || raceEnabled {
		return nil
	}
	fs, _, _ := h.everything(1100)
	// The first calls grow scratch and fill what the far end keeps, which may lag behind: so there is more than one try. What allocates in the steady state does so in each.
	var n float64
	for end := time.Now().Add(h.Patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		for range 200 {
			h.Port.Transmit(fs)
		}
		if n = testing.AllocsPerRun(100, func() { h.Port.Transmit(fs) }); n == 0 {
			return nil
		}
	}
	return fmt.Errorf("Transmit of %d frames of all kinds makes %v allocations", len(fs), n)
}
