package tap

import (
	"context"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/spin"
	"patchbay/internal/wire"
)

// arenaAlign is where records start in the arena: a cache line, so that two frames never share one and copies start aligned.
const arenaAlign = 64

// reader is the scratch of one Serve. It belongs to that goroutine.
type reader struct {
	d      *Device
	q      *queue
	hdrLen int
	arena  []byte
	fs     []frame.Frame
	spin   spin.Spinner
	slice  spin.Slice
}

// Serve reads queue and hands what it reads to sink, a batch at a time, until ctx is done or the Device is closed (nil), or the
// interface goes away (an error with ErrGone). It blocks; each queue wants one goroutine of its own, and one Serve at a time. The frames
// are valid until Forward returns.
func (d *Device) Serve(ctx context.Context, queue int, sink frame.Sink) error {
	if queue < 0 || queue >= len(d.queues) {
		return fmt.Errorf("tap %q: no queue %d: it has %d", d.info.Name, queue, len(d.queues))
	}
	q := d.queues[queue]
	if err := d.startServe(q); err != nil {
		return fmt.Errorf("tap %q: queue %d: %w", d.info.Name, queue, err)
	}
	defer d.endServe(q)
	defer context.AfterFunc(ctx, q.interrupt)()

	r := newReader(d, queue)
	if err := r.loop(sink); err != nil {
		return fmt.Errorf("tap %q: queue %d: %w", d.info.Name, queue, err)
	}
	return nil
}

var errServed = errors.New("another Serve reads it already")

// startServe claims q, so that Close waits for it.
func (d *Device) startServe(q *queue) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return ErrClosed
	}
	if !q.serving.CompareAndSwap(false, true) {
		return errServed
	}
	q.stop.Store(false)
	// What woke the last Serve must not wake this one.
	var b [8]byte
	_, _ = unix.Read(q.wake, b[:])
	d.serves.Add(1)
	return nil
}

func (d *Device) endServe(q *queue) {
	q.serving.Store(false) // not under mu: Close holds it while it waits
	d.serves.Done()
}

func newReader(d *Device, queue int) *reader {
	r := &reader{d: d, q: d.queues[queue], fs: make([]frame.Frame, 0, d.frames)}
	if d.info.VnetHdr {
		r.hdrLen = wire.VirtioNetHdrLen
	}
	r.arena = make([]byte, d.bytes+r.room()+arenaAlign)
	return r
}

// room is what the longest record needs, and one byte by which a longer one is noticed.
func (r *reader) room() int { return packetRoom + r.hdrLen + wire.MaxFrame + 1 }

// read reads one record into b, which has room() bytes.
func (r *reader) read(b []byte) (rec []byte, errno unix.Errno) {
	if r.d.info.Kind == KindPacket {
		return readPacket(r.q.fd, b)
	}
	n, errno := readFD(r.q.fd, b, r.d.nowait)
	if errno != 0 {
		return nil, errno
	}
	return b[:n], 0
}

func (r *reader) loop(sink frame.Sink) error {
	for !r.q.stop.Load() {
		if err := r.step(sink); err != nil {
			return err
		}
	}
	return nil
}

// step forwards one batch; when there is none it looks again for a while, and then waits.
func (r *reader) step(sink frame.Sink) error {
	r.slice.Yield()
	more, err := r.fill()
	if len(r.fs) > 0 {
		r.spin.Found()
		sink.Forward(r.fs)
	}
	switch {
	case err != nil:
		return err
	case more, r.spin.Again(r.d.spin):
		return nil
	}
	return r.wait()
}

// fill reads until the queue is empty (more is false) or the batch is full.
func (r *reader) fill() (more bool, err error) {
	r.fs = r.fs[:0]
	off, reads, bytes := 0, 0, 0
	for reads < r.d.frames && off < r.d.bytes {
		rec, errno := r.read(r.arena[off : off+r.room()])
		if errno != 0 {
			if errno == unix.EINTR {
				continue
			}
			if errno != unix.EAGAIN {
				err = readError(errno)
			}
			break
		}
		reads++
		if len(rec) == 0 {
			err = ErrGone
			break
		}
		if r.take(rec) {
			bytes += len(rec) - r.hdrLen
		}
		off += (len(rec) + packetRoom + arenaAlign - 1) &^ (arenaAlign - 1)
	}
	if len(r.fs) > 0 {
		r.q.frames.Add(uint64(len(r.fs)))
		r.q.bytes.Add(uint64(bytes))
	}
	return reads == r.d.frames || off >= r.d.bytes, err
}

// take checks one record and adds its frame to the batch, or counts why not.
func (r *reader) take(rec []byte) bool {
	if len(rec) < r.hdrLen+wire.EthernetLen || len(rec) > r.hdrLen+wire.MaxFrame {
		r.d.drops.Add(frame.DropMalformed, 1)
		return false
	}
	f := frame.Frame{Data: rec[r.hdrLen:len(rec):len(rec)]}
	if r.hdrLen != 0 {
		f.Hdr.Decode(rec)
		if !f.Hdr.Validate(f.Data) {
			r.d.drops.Add(frame.DropBadHdr, 1)
			return false
		}
	}
	r.fs = append(r.fs, f)
	return true
}

func readError(errno unix.Errno) error {
	switch errno {
	case unix.EBADFD, unix.EFAULT, unix.EIO, unix.ENODEV, unix.ENETDOWN:
		return fmt.Errorf("%w (%w)", ErrGone, errno)
	}
	return fmt.Errorf("read: %w", errno)
}

// wait blocks the thread until there is a frame, or somebody wants the Serve to end.
//
// It is poll(2) and not the runtime's poller: a goroutine that sleeps in a system call of its own is back at work a thread switch earlier.
func (r *reader) wait() error {
	pfd := [2]unix.PollFd{
		{Fd: int32(r.q.fd), Events: unix.POLLIN},
		{Fd: int32(r.q.wake), Events: unix.POLLIN},
	}
	for {
		_, _, errno := unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&pfd)), 2, 0, 0, 0, 0)
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return fmt.Errorf("poll: %w", errno)
		case pfd[0].Revents&unix.POLLIN == 0 && pfd[0].Revents&(unix.POLLERR|unix.POLLHUP|unix.POLLNVAL) != 0:
			return ErrGone
		}
		return nil
	}
}
