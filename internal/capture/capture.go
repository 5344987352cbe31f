package capture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"golang.org/x/sys/unix"

	vswitch "patchbay/switch"
)

// DefaultBufferBytes is how many bytes of frames may wait to be written.
const DefaultBufferBytes = 8 << 20

// recordOverhead is what a frame in the list costs beside its bytes.
const recordOverhead = 128

// Config says what to record. Switch is required; the zero value of every other field is its documented default.
type Config struct {
	Switch *vswitch.Switch
	// Port restricts it to frames from, to and flooded towards one port. Default: every frame.
	Port vswitch.PortID
	// Filter is what ParseFilter takes. Default: every frame.
	Filter string
	// SnapLen is how many bytes of a frame are kept. Default: all.
	SnapLen int
	// MaxFrames ends it after so many frames. Default: it goes on.
	MaxFrames int
	// BufferBytes bounds the frames that wait to be written. Default DefaultBufferBytes.
	BufferBytes int
	// Now is the clock. Default time.Now.
	Now func() time.Time
}

// Stats is what a Capture did so far.
type Stats struct {
	Frames  uint64 // recorded
	Skipped uint64 // not recorded, since the reader was slow
}

// Capture records frames while Run runs.
type Capture struct {
	c      Config
	filter *Filter

	wake chan struct{} // has room for one: something is in the list

	mu      sync.Mutex
	list    []record
	bytes   int
	stats   Stats
	skipped map[vswitch.PortID]uint64
	full    bool // MaxFrames were taken
}

// record is one frame that waits to be written.
type record struct {
	at   time.Time
	from vswitch.PortID
	data []byte // at most SnapLen
	len  int    // of the frame
	drop string // "" or why it was dropped
}

// New prepares a capture. The error is one of the filter, and says where in it.
func New(c Config) (*Capture, error) {
	if c.Switch == nil {
		return nil, errors.New("capture: Config.Switch is nil; give the network's")
	}
	f, err := ParseFilter(c.Filter)
	if err != nil {
		return nil, err
	}
	if c.BufferBytes <= 0 {
		c.BufferBytes = DefaultBufferBytes
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Capture{c: c, filter: f, wake: make(chan struct{}, 1), skipped: make(map[vswitch.PortID]uint64)}, nil
}

// Stats is a snapshot.
func (c *Capture) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stats
}

// Observe implements vswitch.Observer.
func (c *Capture) Observe(o vswitch.Observed) {
	if p := c.c.Port; p != 0 && o.From != p && o.To != p && !o.Reaches(p) {
		return
	}
	if !c.filter.Match(o.Frame.Data) {
		return
	}
	data := o.Frame.Data
	if n := c.c.SnapLen; n > 0 && n < len(data) {
		data = data[:n]
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	cost := len(data) + recordOverhead
	switch {
	case c.full:
		return
	case c.bytes+cost > c.c.BufferBytes:
		c.stats.Skipped++
		c.skipped[o.From]++
		return
	}
	r := record{at: c.c.Now(), from: o.From, data: append([]byte(nil), data...), len: len(o.Frame.Data)}
	if o.Dropped {
		r.drop = fmt.Sprintf("dropped: %s: %s", o.Why, o.Why.Meaning())
	}
	c.list, c.bytes = append(c.list, r), c.bytes+cost
	c.stats.Frames++
	c.full = c.c.MaxFrames > 0 && c.stats.Frames >= uint64(c.c.MaxFrames)
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// take empties the list. What is in it counts until written says otherwise.
func (c *Capture) take() (rs []record, full bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	rs, c.list = c.list, nil
	return rs, c.full
}

// written gives the room of a record back.
func (c *Capture) written(r *record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bytes -= len(r.data) + recordOverhead
}

// Run writes the capture to w, and returns when ctx ends, MaxFrames are written, or w fails; a Write that is under way when ctx ends is waited for. That w's reader has gone is no error. Call it once.
func (c *Capture) Run(ctx context.Context, w io.Writer) error {
	f, err := c.begin(w)
	if err != nil {
		return clean(err)
	}
	stop := c.c.Switch.Observe(c)
	defer stop()
	for full := false; !full; {
		select {
		case <-ctx.Done():
			stop()
			full = true
		case <-c.wake:
		}
		rs, enough := c.take()
		for i := range rs {
			if err := f.write(&rs[i]); err != nil {
				return clean(err)
			}
			c.written(&rs[i])
		}
		if err := f.Flush(); err != nil {
			return clean(err)
		}
		full = full || enough
	}
	stop()
	return clean(c.end(f))
}

// clean takes a reader that has gone for the end that it is.
func clean(err error) error {
	if errors.Is(err, unix.EPIPE) || errors.Is(err, io.ErrClosedPipe) || errors.Is(err, unix.ECONNRESET) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("write the capture: %w", err)
	}
	return nil
}

// file is the pcapng writer with its interfaces.
type file struct {
	*pcapgo.NgWriter
	snap  uint32
	index map[vswitch.PortID]int
	names func() []vswitch.PortInfo
	wrote map[vswitch.PortID]uint64
}

// begin writes the header, and an interface for each port there is.
func (c *Capture) begin(w io.Writer) (*file, error) {
	snap := uint32(c.c.SnapLen)
	if snap == 0 {
		snap = 1 << 18
	}
	f := &file{snap: snap, index: make(map[vswitch.PortID]int), names: c.c.Switch.Ports, wrote: make(map[vswitch.PortID]uint64)}
	for _, p := range f.names() {
		if f.NgWriter == nil {
			opts := pcapgo.DefaultNgWriterOptions
			opts.SectionInfo = pcapgo.NgSectionInfo{Application: "patchbay"}
			ng, err := pcapgo.NewNgWriterInterface(w, f.iface(p.Config.Name), opts)
			if err != nil {
				return nil, err
			}
			f.NgWriter, f.index[p.ID] = ng, 0
			continue
		}
		if err := f.add(p); err != nil {
			return nil, err
		}
	}
	if f.NgWriter == nil {
		return nil, errors.New("the switch has no port")
	}
	return f, f.Flush()
}

func (f *file) iface(name string) pcapgo.NgInterface {
	return pcapgo.NgInterface{Name: name, LinkType: layers.LinkTypeEthernet, SnapLength: f.snap, TimestampResolution: 9}
}

func (f *file) add(p vswitch.PortInfo) error {
	i, err := f.AddInterface(f.iface(p.Config.Name))
	f.index[p.ID] = i
	return err
}

// interfaceOf is the interface of a port, one more when the port is new.
func (f *file) interfaceOf(id vswitch.PortID) (int, error) {
	if i, ok := f.index[id]; ok {
		return i, nil
	}
	for _, p := range f.names() {
		if _, ok := f.index[p.ID]; !ok {
			if err := f.add(p); err != nil {
				return 0, err
			}
		}
	}
	if i, ok := f.index[id]; ok {
		return i, nil
	}
	p := vswitch.PortInfo{ID: id} // it has come and gone
	p.Config.Name = fmt.Sprintf("port%d", id)
	err := f.add(p)
	return f.index[id], err
}

func (f *file) write(r *record) error {
	i, err := f.interfaceOf(r.from)
	if err != nil {
		return err
	}
	f.wrote[r.from]++
	var opts pcapgo.NgPacketOptions
	if r.drop != "" {
		opts.Comments = []string{r.drop}
	}
	return f.WritePacketWithOptions(gopacket.CaptureInfo{Timestamp: r.at, CaptureLength: len(r.data), Length: r.len, InterfaceIndex: i}, r.data, opts)
}

// end writes how much there was, and what is missing.
func (c *Capture) end(f *file) error {
	now := c.c.Now()
	for id, i := range f.index {
		c.mu.Lock()
		skipped := c.skipped[id]
		c.mu.Unlock()
		s := pcapgo.NgInterfaceStatistics{LastUpdate: now, PacketsReceived: f.wrote[id] + skipped, PacketsDropped: skipped}
		if err := f.WriteInterfaceStats(i, s); err != nil {
			return err
		}
	}
	return f.Flush()
}
