package tap

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// busyRetries is how often a write that found the device full is tried again at once. The kernel's side empties within microseconds or
// not at all: the container's receive path runs inside our own write.
const busyRetries = 3

// Transmit writes fs to the container and returns how many frames it took; the others are counted by reason in Drops. It never
// waits. It may be called from several goroutines at once.
func (d *Device) Transmit(fs []frame.Frame) int {
	if d.gate.Add(1) < 0 {
		d.gate.Add(-1)
		d.drops.Add(frame.DropPortDown, len(fs))
		return 0
	}
	sent, bytes := 0, 0
	for i := range fs {
		f := &fs[i]
		if len(f.Data) > d.maxLen && !f.Superframe() && d.tooBig(f.Data) {
			d.drops.Add(frame.DropTooBig, 1)
			continue
		}
		if d.send(f) {
			sent++
			bytes += len(f.Data)
		}
	}
	d.gate.Add(-1)
	if sent > 0 {
		d.tx.frames.Add(uint64(sent))
		d.tx.bytes.Add(uint64(bytes))
	}
	return sent
}

// tooBig looks closer at a frame above the MTU: a VLAN tag does not count.
func (d *Device) tooBig(data []byte) bool {
	_, off, ok := wire.Payload(data)
	return !ok || len(data)-off > d.info.MTU
}

func (d *Device) send(f *frame.Frame) bool {
	fd := d.pick(f.Data)
	if !d.info.VnetHdr {
		return d.write(fd, nil, f.Data)
	}
	var hdr [wire.VirtioNetHdrLen]byte
	f.Hdr.Encode(hdr[:])
	return d.write(fd, hdr[:], f.Data)
}

// pick chooses the queue to write to. The kernel remembers it for the flow: answers are then read from that queue.
func (d *Device) pick(data []byte) int {
	if len(d.queues) == 1 {
		return d.queues[0].fd
	}
	return d.queues[flowHash(data)%uint32(len(d.queues))].fd
}

// write writes one frame, its header in front if there is one.
func (d *Device) write(fd int, hdr, data []byte) bool {
	var iov [2]unix.Iovec
	n := 0
	if len(hdr) > 0 {
		iov[0].Base = unsafe.SliceData(hdr)
		iov[0].SetLen(len(hdr))
		n = 1
	}
	iov[n].Base = unsafe.SliceData(data)
	iov[n].SetLen(len(data))
	return d.writev(fd, iov[:n+1])
}

// writev writes one frame gathered from iov and counts a failure.
func (d *Device) writev(fd int, iov []unix.Iovec) bool {
	for try := 0; ; {
		errno := writevFD(fd, iov)
		switch {
		case errno == 0:
			return true
		case errno == unix.EINTR:
			continue
		case errno == unix.EAGAIN || errno == unix.ENOBUFS || errno == unix.ENOMEM:
			if try++; try <= busyRetries {
				continue
			}
			d.drops.Add(frame.DropTxBusy, 1)
		default:
			d.drops.Add(frame.DropTxError, 1)
		}
		return false
	}
}

// writevFD is a writev(2) that keeps the processor, for the reason given at readFD.
func writevFD(fd int, iov []unix.Iovec) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
	return errno
}
