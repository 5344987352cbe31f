package nat

import (
	"errors"

	"golang.org/x/sys/unix"
)

// From the host's socket to the container.

const (
	downIdle  = iota // nobody; the next event starts it
	downBusy         // the loop or a goroutine
	downAgain        // the same, and an event came meanwhile
	downFull         // nobody until the container takes bytes again
	downDone         // nobody any more: the host's FIN has come
)

// ready is called on the loop when the host's socket has something, or room.
func (f *tcpFlow) ready(events uint32) {
	if events&unix.EPOLLOUT != 0 {
		f.conn.Resume()
	}
	if events&^unix.EPOLLOUT == 0 {
		return
	}
	if events&^(unix.EPOLLOUT|unix.EPOLLIN) != 0 {
		f.readOn.Store(true)
	}
	for {
		if f.down.CompareAndSwap(downIdle, downBusy) {
			f.download(f.t.loopBuf[:], loopReads)
			return
		}
		switch f.down.Load() {
		case downBusy:
			if f.down.CompareAndSwap(downBusy, downAgain) {
				return
			}
		case downAgain, downFull:
			return
		case downDone:
			if events&unix.EPOLLERR != 0 {
				f.checkReset()
			}
			return
		}
	}
}

// loopReads is how many full buffers of one flow the loop moves before it turns to others, or leaves that flow to a goroutine of its own.
const loopReads = 4

// download moves what the host's socket has to the container, while the container's connection takes it at once and for no more than turns full buffers. What is left then is for goOn or
// downloadSlow. f.down is downBusy.
func (f *tcpFlow) download(b []byte, turns int) {
	for {
		n, err := f.read(b)
		switch {
		case n > 0:
			f.alive()
			m, err := f.conn.TryWrite(b[:n])
			if err != nil {
				f.abort()
				return
			}
			if n == len(b) {
				turns--
			}
			switch {
			case m < n:
				f.rest, f.restAt = f.t.bufs.get(false), 0
				f.rest.n = copy(f.rest.b, b[m:n])
				if !f.waits() {
					f.t.spawn(f.downloadSlow)
					return
				}
				if !f.giveRest() {
					return
				}
			case n < len(b) && !f.readOn.Load() && f.pause(): // what comes from now on is an event
				return
			case turns > 0:
			case f.waits(): // others come first
				f.t.n.streams.post(f.again)
				return
			default:
				f.t.spawn(f.downloadSlow)
				return
			}
		case errors.Is(err, unix.EAGAIN):
			if f.pause() {
				return
			}
		case err == nil:
			if f.proven.Load() {
				f.hostEnd()
			} else {
				f.t.spawn(f.hostEnd) // a FIN waits for the container's handshake
			}
			return
		default:
			f.abort()
			return
		}
	}
}

// pause is called when the host's socket has no more, and is false when an event came meanwhile. f.down is downBusy, and is no more after true.
func (f *tcpFlow) pause() bool {
	if f.down.CompareAndSwap(downBusy, downIdle) {
		return true
	}
	f.down.Store(downBusy)
	return false
}

// waits reports whether the loop goes on with this flow by itself, rather than a goroutine. f.down is downBusy.
func (f *tcpFlow) waits() bool {
	if f.again == nil && f.t.n.oneThread && f.conn.NotifyRoom(f.hasRoom) {
		f.again = f.goOn
	}
	return f.again != nil
}

// hasRoom is called when the container's connection takes bytes again, or never will, on whatever goroutine finds out and maybe with locks of the stack held.
func (f *tcpFlow) hasRoom() {
	f.roomed.Store(true)
	if f.down.CompareAndSwap(downFull, downBusy) {
		f.t.n.streams.post(f.again)
	}
}

// goOn moves the rest, and then what the host's socket has. It runs on the loop, with f.down downBusy.
func (f *tcpFlow) goOn() {
	if f.rest == nil || f.giveRest() {
		f.download(f.t.loopBuf[:], loopReads)
	}
}

// giveRest gives the container the rest, and is false where f waits for it (downFull) or has ended.
func (f *tcpFlow) giveRest() bool {
	for {
		f.roomed.Store(false)
		m, err := f.conn.TryWrite(f.rest.b[f.restAt:f.rest.n])
		f.restAt += m
		if err != nil || f.restAt == f.rest.n {
			f.t.bufs.put(f.rest)
			f.rest = nil
			if err != nil {
				f.abort()
			}
			return err == nil
		}
		f.down.Store(downFull)
		// Room that there was between the two found nobody waiting.
		if !f.roomed.Load() || !f.down.CompareAndSwap(downFull, downBusy) {
			return false
		}
	}
}

// downloadSlow moves the rest and then what the host's socket has, waiting for the container as long as it takes, until the socket is drained.
func (f *tcpFlow) downloadSlow() {
	b := f.rest // all of it: giveRest, which takes from it, is the loop's
	if f.rest = nil; b == nil {
		b = f.t.bufs.get(false)
	}
	defer func() { f.t.bufs.put(b) }()
	n, err := b.n, error(nil)
	for {
		if n > 0 {
			f.alive()
			if _, err := f.conn.Write(b.b[:n]); err != nil {
				f.abort()
				return
			}
		}
		if n == len(b.b) && n < bigBuf { // it is a stream of some size
			f.t.bufs.put(b)
			b = f.t.bufs.get(true)
		}
		n, err = f.read(b.b)
		switch {
		case n > 0:
		case errors.Is(err, unix.EAGAIN):
			n = 0
			if f.pause() {
				return
			}
		case err == nil:
			f.hostEnd()
			return
		default:
			f.abort()
			return
		}
	}
}

// hostEnd passes the host's FIN on. The socket stays watched: a reset that comes behind the FIN is news to the container too.
func (f *tcpFlow) hostEnd() {
	if f.conn.CloseWrite() != nil {
		f.abort()
		return
	}
	f.down.Store(downDone)
	if f.ended.Load() == 0 { // else the flow ends now
		f.checkReset()
	}
	if !f.first.CompareAndSwap(0, fromHost) && f.port != 0 && !f.over.Load() {
		f.t.recycler.put(f.to, f.port, f.t.n.now()) // our FIN was the first, so ours is the TIME-WAIT
	}
	f.eof()
}
