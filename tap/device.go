package tap

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// Limits of one batch of a read loop, unless Config says otherwise. A small batch stays in a core's cache from
// the read to the write; see doc.go for what was measured.
const (
	DefaultBatchFrames = 64
	DefaultBatchBytes  = 64 << 10
)

// DefaultSpin is how long a read loop looks for more before its thread sleeps, unless Config says otherwise. Waking a thread takes about
// as long.
const DefaultSpin = 50 * time.Microsecond

// ErrGone is in the chain of Serve's error when the interface no longer exists: its namespace ended or somebody deleted it.
var ErrGone = errors.New("the interface is gone")

// ErrClosed is what Serve returns on a Device that was closed before.
var ErrClosed = errors.New("the device is closed")

// Config makes a Device out of descriptors. Info and FDs are required.
type Config struct {
	// Info as Handle or the process at the other end of the socket gave it. VnetHdr is checked against the device.
	Info Info
	// FDs are the queues. New takes them over and Close closes them; they are made non-blocking. Do not keep an *os.File in
	// non-blocking mode on the same descriptors: the runtime's poller would wake for every frame.
	FDs []int
	// BatchFrames bounds one batch in frames; 0 means DefaultBatchFrames.
	BatchFrames int
	// BatchBytes bounds one batch in bytes; 0 means DefaultBatchBytes. One frame more may go over it.
	BatchBytes int
	// Spin bounds how long a read loop whose queue is empty keeps looking before its thread sleeps; 0 means DefaultSpin, negative not at all. A loop that looks in vain does so ever more rarely.
	Spin time.Duration
	// Drops is where drops are counted; nil gives the Device its own.
	Drops *frame.DropCounters
}

// Stats are the counters of a Device, seen from the switch: rx is what the switch receives from it. Bytes are of frames without virtio
// headers; a superframe counts as one frame.
type Stats struct {
	RxFrames, RxBytes uint64
	TxFrames, TxBytes uint64
	// RxMissed are frames that the kernel dropped because the switch did not read them in time. It is known of packet sockets alone: a TAP
	// counts them as tx_dropped of the interface, inside the container.
	RxMissed uint64
}

// Device is a TAP from the switch's side: Transmit writes to it, Serve reads from it. It is safe for concurrent use.
type Device struct {
	info   Info
	maxLen int // bytes of the longest finished frame that fits the MTU, untagged
	frames int
	bytes  int
	spin   time.Duration
	nowait bool // see nowait_linux.go
	drops  *frame.DropCounters
	queues []*queue
	pool   sync.Pool // of *scratch

	// gate counts Transmits under way; Close adds closing to it, which makes it negative for good.
	gate atomic.Int64
	_    [56]byte
	tx   txStats

	mu     sync.Mutex // guards closed, and the start of a Serve against it; missed
	closed bool
	missed uint64
	serves sync.WaitGroup
	done   error
}

type txStats struct {
	frames, bytes atomic.Uint64
	_             [48]byte
}

// queue is one descriptor, its read loop's state and its counters.
type queue struct {
	fd      int
	wake    int // eventfd that ends a wait for frames
	stop    atomic.Bool
	serving atomic.Bool
	frames  atomic.Uint64
	bytes   atomic.Uint64
	_       [64]byte
}

const closing = -1 << 40

// New makes a Device. On error the descriptors are still the caller's.
func New(c Config) (*Device, error) {
	if len(c.FDs) == 0 {
		return nil, fmt.Errorf("tap %q: no descriptor was handed over: open the interface first", c.Info.Name)
	}
	if c.BatchFrames == 0 {
		c.BatchFrames = DefaultBatchFrames
	}
	if c.BatchBytes == 0 {
		c.BatchBytes = DefaultBatchBytes
	}
	if c.Spin == 0 {
		c.Spin = DefaultSpin
	}
	if c.Info.MTU == 0 {
		c.Info.MTU = DefaultMTU
	}
	if c.BatchFrames < 1 || c.BatchBytes < 1 || c.Info.MTU < MinMTU {
		return nil, fmt.Errorf("tap %q: a batch of %d frames and %d bytes at MTU %d makes no sense: leave them 0 for the defaults",
			c.Info.Name, c.BatchFrames, c.BatchBytes, c.Info.MTU)
	}
	if !c.Info.VnetHdr {
		c.Info.Caps = 0
	}
	if c.Drops == nil {
		c.Drops = new(frame.DropCounters)
	}
	d := &Device{
		info:   c.Info,
		maxLen: wire.EthernetLen + c.Info.MTU,
		frames: c.BatchFrames,
		bytes:  c.BatchBytes,
		spin:   c.Spin,
		drops:  c.Drops,
		pool:   sync.Pool{New: func() any { return new(scratch) }},
	}
	d.nowait = takesNowait(c.FDs[0])
	for _, fd := range c.FDs {
		if err := checkFD(fd, c.Info); err != nil {
			d.closeWakes()
			return nil, err
		}
		wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			d.closeWakes()
			return nil, fmt.Errorf("tap %q: eventfd: %w", c.Info.Name, err)
		}
		d.queues = append(d.queues, &queue{fd: fd, wake: wake})
	}
	return d, nil
}

// checkFD makes sure that what came over the socket is what the message said, and makes it non-blocking.
func checkFD(fd int, info Info) error {
	if info.Kind == KindPacket {
		n, err := unix.GetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR)
		if err != nil {
			return fmt.Errorf("tap %q: descriptor %d is no packet socket: %w", info.Name, fd, err)
		}
		if n != 1 || !info.VnetHdr {
			return fmt.Errorf("tap %q: packet socket without a virtio header: hand over what Open returned", info.Name)
		}
	} else if name, flags, err := getIff(fd); err == nil {
		if flags&unix.IFF_TAP == 0 {
			return fmt.Errorf("tap %q: descriptor %d is %q, a TUN, not a TAP: open it with IFF_TAP", info.Name, fd, name)
		}
		if vnet := flags&unix.IFF_VNET_HDR != 0; vnet != info.VnetHdr {
			return fmt.Errorf("tap %q: virtio header: device says %v, its description says %v: hand over the description Open returned", info.Name, vnet, info.VnetHdr)
		}
		if n, err := unix.IoctlGetUint32(fd, unix.TUNGETVNETHDRSZ); err == nil && info.VnetHdr && n != wire.VirtioNetHdrLen {
			return fmt.Errorf("tap %q: virtio header of %d bytes, want %d: set TUNSETVNETHDRSZ", info.Name, n, wire.VirtioNetHdrLen)
		}
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return fmt.Errorf("tap %q: descriptor %d: %w", info.Name, fd, err)
	}
	return nil
}

// Info is what the Device was made with.
func (d *Device) Info() Info { return d.info }

// Caps is what Transmit hands to the kernel as it is; it finishes every other frame itself.
func (d *Device) Caps() frame.Caps { return d.info.Caps }

// Queues is how many Serve calls, with queue 0 to Queues()-1, it takes to read everything.
func (d *Device) Queues() int { return len(d.queues) }

// Drops is where the Device counts what it could not deliver.
func (d *Device) Drops() *frame.DropCounters { return d.drops }

// Stats reads the counters. They are read one after the other while traffic goes on.
func (d *Device) Stats() (s Stats) {
	for _, q := range d.queues {
		s.RxFrames += q.frames.Load()
		s.RxBytes += q.bytes.Load()
	}
	s.TxFrames, s.TxBytes = d.tx.frames.Load(), d.tx.bytes.Load()
	if d.info.Kind == KindPacket {
		s.RxMissed = d.countMissed()
	}
	return s
}

// countMissed adds up what each packet socket has counted since it was last asked.
func (d *Device) countMissed() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, q := range d.queues {
		if d.closed {
			break
		}
		if st, err := unix.GetsockoptTpacketStats(q.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			d.missed += uint64(st.Drops)
		}
	}
	return d.missed
}

// Dup returns duplicates of the queues' descriptors, for another process that is to go on with the interface. They are the caller's.
func (d *Device) Dup() (fds []int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, fmt.Errorf("tap %q: %w", d.info.Name, ErrClosed)
	}
	for _, q := range d.queues {
		fd, err := unix.FcntlInt(uintptr(q.fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			for _, fd := range fds {
				unix.Close(fd)
			}
			return nil, fmt.Errorf("tap %q: duplicate a descriptor: %w; raise the limit of open files (ulimit -n)", d.info.Name, err)
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// SetPersist says whether the interface outlives its last descriptor, whatever OpenConfig.Persist said. It needs no privilege over the namespace.
func (d *Device) SetPersist(on bool) error {
	if d.info.Kind == KindPacket {
		return nil // it never outlives its descriptors
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return fmt.Errorf("tap %q: %w", d.info.Name, ErrClosed)
	}
	v := 0
	if on {
		v = 1
	}
	if err := unix.IoctlSetInt(d.queues[0].fd, unix.TUNSETPERSIST, v); err != nil {
		return fmt.Errorf("tap %q: TUNSETPERSIST: %w", d.info.Name, err)
	}
	return nil
}

// Close ends every Serve, waits for them and for each Transmit under way, and closes the descriptors. A Transmit that comes later
// counts its frames as DropPortDown. Idempotent. It must not be called from a Sink that this Device feeds.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return d.done
	}
	d.closed = true
	for _, q := range d.queues {
		q.interrupt()
	}
	d.serves.Wait()
	d.gate.Add(closing)
	for d.gate.Load() != closing {
		time.Sleep(50 * time.Microsecond)
	}
	d.closeWakes()
	var errs []error
	for _, q := range d.queues {
		errs = append(errs, unix.Close(q.fd))
	}
	if err := errors.Join(errs...); err != nil {
		d.done = fmt.Errorf("close tap %q: %w", d.info.Name, err)
	}
	return d.done
}

func (d *Device) closeWakes() {
	for _, q := range d.queues {
		unix.Close(q.wake)
	}
}

// interrupt makes the queue's Serve return soon, from any goroutine.
func (q *queue) interrupt() {
	q.stop.Store(true)
	one := [8]byte{1: 1} // any value but zero, in either byte order
	_, _ = unix.Write(q.wake, one[:])
}
