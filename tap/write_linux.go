package tap

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/offload"
	"patchbay/internal/wire"
)

// busyRetries is how often a write that found the device full is tried again at once. The kernel's side empties within microseconds or
// not at all: the container's receive path runs inside our own write.
const busyRetries = 3

// maxPieces is how many iovecs one frame can become: a virtio header, a head and the payloads of the longest run. Linux takes 1024.
const maxPieces = 512

// scratch is what a Transmit needs beyond the stack. It comes from a pool, so that any number may run at once. What it points to
// from its last use is not looked at again.
type scratch struct {
	co   offload.Coalescer
	seg  offload.Segmenter
	head [wire.MaxHeaders]byte
	hdr  [wire.VirtioNetHdrLen]byte
	vec  [][]byte
	iov  [maxPieces]unix.Iovec
}

// noDrop is what a write returns that delivered its frame.
const noDrop = frame.Drop(frame.NumDrops)

// Transmit writes fs to the container and returns how many frames it took; the others are counted by reason in Drops. It never
// waits. It may be called from several goroutines at once. Consecutive segments of one flow are joined into superframes on the
// way, and what the device cannot take unfinished is finished.
func (d *Device) Transmit(fs []frame.Frame) int {
	if d.gate.Add(1) < 0 {
		d.gate.Add(-1)
		d.drops.Add(frame.DropPortDown, len(fs))
		return 0
	}
	sent, bytes := 0, 0
	if d.worthJoining(fs) {
		sent, bytes = d.transmitJoined(fs)
	} else {
		for i := range fs {
			if why := d.transmitOne(&fs[i]); why != noDrop {
				d.drops.Add(why, 1)
				continue
			}
			sent++
			bytes += len(fs[i].Data)
		}
	}
	d.gate.Add(-1)
	if sent > 0 {
		d.tx.frames.Add(uint64(sent))
		d.tx.bytes.Add(uint64(bytes))
	}
	return sent
}

// worthJoining reports whether two frames of fs could be joined: neighbours that are finished segments of one size class. It is a
// glance that keeps batches of superframes, and of single small frames, off the longer path. A batch with a frame above the MTU is
// not for that path either, since a joined frame does not show it.
func (d *Device) worthJoining(fs []frame.Frame) bool {
	if len(fs) < 2 || d.info.Caps&frame.CapCsum == 0 || d.info.Caps == frame.CapCsum {
		return false
	}
	plain := 0
	for i := range fs {
		f := &fs[i]
		if f.Superframe() {
			continue
		}
		if len(f.Data) > d.maxLen {
			return false
		}
		plain++
	}
	return plain > 1
}

// transmitOne writes one frame, finished as far as the device needs it.
func (d *Device) transmitOne(f *frame.Frame) frame.Drop {
	if len(f.Data) > d.maxLen && !f.Superframe() && d.tooBig(f.Data) {
		return frame.DropTooBig
	}
	fd := d.pick(f.Data)
	if !d.info.Caps.Takes(f.Hdr) {
		s := d.pool.Get().(*scratch)
		why := d.transmitFinished(fd, f, s)
		d.pool.Put(s)
		return why
	}
	if !d.info.VnetHdr {
		return d.write(fd, f.Data)
	}
	var hdr [wire.VirtioNetHdrLen]byte
	f.Hdr.Encode(hdr[:])
	return d.write(fd, hdr[:], f.Data)
}

// tooBig looks closer at a frame above the MTU: a VLAN tag does not count.
func (d *Device) tooBig(data []byte) bool {
	_, off, ok := wire.Payload(data)
	return !ok || len(data)-off > d.info.MTU
}

// transmitFinished cuts f into segments with complete checksums and writes them one by one. A segment the device refuses takes the frame's rest
// with it: the receiver has lost the frame either way.
func (d *Device) transmitFinished(fd int, f *frame.Frame, s *scratch) frame.Drop {
	n, ok := s.seg.Reset(f)
	if !ok {
		return frame.DropMalformed
	}
	head := s.head[:s.seg.HeadLen()]
	s.hdr = [wire.VirtioNetHdrLen]byte{}
	for range n {
		payload := s.seg.Next(head)
		var why frame.Drop
		switch {
		case d.info.VnetHdr && len(head) > 0:
			why = d.write(fd, s.hdr[:], head, payload)
		case d.info.VnetHdr:
			why = d.write(fd, s.hdr[:], payload)
		case len(head) > 0:
			why = d.write(fd, head, payload)
		default:
			why = d.write(fd, payload)
		}
		if why != noDrop {
			return why
		}
	}
	return noDrop
}

// transmitJoined writes a batch after joining what belongs together.
func (d *Device) transmitJoined(fs []frame.Frame) (sent, bytes int) {
	s := d.pool.Get().(*scratch)
	defer d.pool.Put(s)
	for i := range s.co.Coalesce(fs, d.info.Caps) {
		var hdr wire.VirtioNetHdr
		hdr, s.vec = s.co.Gather(i, s.vec[:0])
		var why frame.Drop
		n := 1 // frames in this one
		if len(s.vec) == 1 {
			f := frame.Frame{Hdr: hdr, Data: s.vec[0]}
			why = d.transmitOne(&f)
		} else {
			n = len(s.vec) - 1 // the first piece is the head
			why = d.writeRun(&hdr, s)
		}
		if why != noDrop {
			d.drops.Add(why, n)
			continue
		}
		sent += n
		for _, p := range s.vec {
			bytes += len(p)
		}
	}
	return sent, bytes
}

// writeRun writes the superframe whose pieces are in s.vec.
func (d *Device) writeRun(hdr *wire.VirtioNetHdr, s *scratch) frame.Drop {
	if len(s.vec)+1 > len(s.iov) {
		return frame.DropTxError
	}
	hdr.Encode(s.hdr[:])
	s.iov[0] = iovec(s.hdr[:])
	for i, p := range s.vec {
		s.iov[i+1] = iovec(p)
	}
	return d.writev(d.pick(s.vec[0]), s.iov[:len(s.vec)+1])
}

// pick chooses the queue to write to. The kernel remembers it for the flow: answers are then read from that queue.
func (d *Device) pick(data []byte) int {
	if len(d.queues) == 1 {
		return d.queues[0].fd
	}
	return d.queues[wire.FlowHash(data)%uint32(len(d.queues))].fd
}

// write writes one frame that is made of up to three pieces.
func (d *Device) write(fd int, pieces ...[]byte) frame.Drop {
	var iov [3]unix.Iovec
	for i, p := range pieces {
		iov[i] = iovec(p)
	}
	return d.writev(fd, iov[:len(pieces)])
}

func iovec(b []byte) (v unix.Iovec) {
	v.Base = unsafe.SliceData(b)
	v.SetLen(len(b))
	return v
}

// writev writes one frame gathered from iov.
func (d *Device) writev(fd int, iov []unix.Iovec) frame.Drop {
	for try := 0; ; {
		switch writevFD(fd, iov, d.nowait) {
		case 0:
			return noDrop
		case unix.EINTR:
		case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM:
			if try++; try > busyRetries {
				return frame.DropTxBusy
			}
		default:
			return frame.DropTxError
		}
	}
}
