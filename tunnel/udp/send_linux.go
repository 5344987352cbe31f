package udp

import (
	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/mmsg"
)

// busyRetries is how often a message that found the sending buffer full is tried again at once.
const busyRetries = 3

// transmit sends ms from one port; order says which message each is.
func (b *Batch) transmit(fd int, ms []mmsg.Msg, order []uint8) {
	for at, tries := 0, 0; at < len(ms); {
		n, errno := b.s.sendmmsg(fd, ms[at:])
		if errno == 0 {
			for _, i := range order[at : at+n] {
				m := &b.info[i]
				m.path.count(m.n, m.bytes)
			}
			at += n
			tries = 0
			continue
		}
		m := &b.info[order[at]]
		switch errno {
		case unix.EINTR:
			continue
		case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM:
			if tries++; tries <= busyRetries {
				continue
			}
			// The next messages would find it no better.
			for _, i := range order[at:] {
				b.loseAll(&b.info[i], frame.DropTxBusy)
			}
			return
		case unix.EMSGSIZE, unix.EINVAL, unix.EIO:
			if m.n > 1 {
				b.oneByOne(fd, &ms[at], m)
				break
			}
			b.refused(m.path, &b.dgs[m.dg], errno)
		default:
			b.loseAll(m, reason(errno))
		}
		at++
		tries = 0
	}
}

// oneByOne sends the datagrams of a message that the kernel would not cut. If it takes one of them now, cutting was at fault.
func (b *Batch) oneByOne(fd int, msg *mmsg.Msg, m *message) {
	var ctl mmsg.Control
	addECN(&ctl, m)
	b.one[0] = *msg
	h := &b.one[0].Hdr
	ctl.Attach(h)
	whole, tooBig := false, false
	for d := m.dg; d < m.dg+m.n; d++ {
		iov := int(b.dgs[d].iov)
		h.Iov = &b.iovs[iov]
		h.SetIovlen(b.iovEnd(d) - iov)
		n := 0
		for _, v := range b.iovs[iov:b.iovEnd(d)] {
			n += int(v.Len)
		}
		errno := unix.EMSGSIZE
		if !tooBig || n < m.seg {
			errno = b.sendOne(fd)
		}
		if errno != 0 {
			tooBig = tooBig || errno == unix.EMSGSIZE && n == m.seg // and so are the others of its length
			b.refused(m.path, &b.dgs[d], errno)
			continue
		}
		m.path.count(1, n)
		whole = whole || n == m.seg
	}
	h.Control = nil
	if whole {
		m.path.suspend(CutRefused)
	}
}

func (b *Batch) sendOne(fd int) (errno unix.Errno) {
	for tries := 0; tries <= busyRetries; {
		_, errno = b.s.sendmmsg(fd, b.one[:])
		switch errno {
		case unix.EINTR:
		case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM:
			tries++
		default:
			return errno
		}
	}
	return errno
}

// refused counts one datagram that the kernel would not send.
func (b *Batch) refused(p *Path, d *datagram, errno unix.Errno) {
	why := reason(errno)
	b.Lose(int(d.tag), int(d.frames), why)
	if why == frame.DropTooBig {
		p.tooBig()
	}
}

func (b *Batch) loseAll(m *message, why frame.Drop) {
	for d := m.dg; d < m.dg+m.n; d++ {
		b.Lose(int(b.dgs[d].tag), int(b.dgs[d].frames), why)
	}
}

func reason(errno unix.Errno) frame.Drop {
	switch errno {
	case unix.EMSGSIZE:
		return frame.DropTooBig
	case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM:
		return frame.DropTxBusy
	case unix.ENETUNREACH, unix.EHOSTUNREACH, unix.ENETDOWN, unix.EHOSTDOWN, unix.ENODEV, unix.EADDRNOTAVAIL:
		return frame.DropUnderlay
	}
	return frame.DropHostSend
}

func (p *Path) count(datagrams, bytes int) {
	if datagrams > 1 {
		p.cutMessages.Add(1)
		p.cutDatagrams.Add(uint64(datagrams))
	}
	p.calls.Add(1)
	p.datagrams.Add(uint64(datagrams))
	p.bytes.Add(uint64(bytes))
}
