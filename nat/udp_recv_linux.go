package nat

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/mmsg"
	"patchbay/internal/wire"
)

// Bounds of one receive.
const (
	recvMsgs   = 64               // messages of one recvmmsg
	recvRounds = 4                // calls for one socket before the others get a turn
	recvBuf    = headroom + 1<<16 // one message: a whole GRO train is at most 64 KiB
	fragArena  = 256 << 10        // scratch for fragments of one batch
)

// received is one message as the kernel gave it.
type received struct {
	buf   []byte         // payload at buf[headroom:headroom+n]
	n     int            // bytes
	seg   int            // size of the datagrams it is a train of, or 0
	peer  netip.AddrPort // on the host's side; never v4-mapped
	local netip.Addr     // address of the host it came to, where asked for
	tos   uint8
	ttl   uint8 // 0 where not asked for
}

// recvBatch is the scratch of the loop that receives. One goroutine uses it.
type recvBatch struct {
	msgs  [recvMsgs]mmsghdr
	names [recvMsgs]mmsg.Sockaddr
	ctls  [recvMsgs]control
	iovs  [recvMsgs]unix.Iovec
	bufs  [recvMsgs][]byte
	used  int // messages whose headers must be reset before the next call

	fs    []frame.Frame
	arena []byte
	room  []byte // of arena, free
	ipID  uint32
}

func newRecvBatch() *recvBatch {
	b := &recvBatch{used: recvMsgs}
	// One mapping that is touched as far as datagrams reach: RAM is used for the sizes that really come.
	all := make([]byte, recvMsgs*recvBuf)
	for i := range b.bufs {
		b.bufs[i] = all[i*recvBuf : (i+1)*recvBuf : (i+1)*recvBuf]
		b.iovs[i].Base = &b.bufs[i][headroom]
		b.iovs[i].SetLen(recvBuf - headroom)
		h := &b.msgs[i].hdr
		h.Name = &b.names[i][0]
		h.Iov = &b.iovs[i]
		h.SetIovlen(1)
		h.Control = &b.ctls[i].bytes()[0]
	}
	return b
}

// recv receives what s has, at most recvMsgs messages.
func (b *recvBatch) recv(s *packetSock) (int, unix.Errno) {
	for i := range b.used {
		h := &b.msgs[i].hdr
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(controlLen)
		h.Flags = 0
	}
	n, errno := recvmmsg(s.fd, b.msgs[:], 0)
	if errno != 0 {
		b.used = 1 // the kernel may have touched the first
		return 0, errno
	}
	b.used = n
	return n, 0
}

// at describes message i. ok is false for one that was cut short or names no peer.
func (b *recvBatch) at(i int, r *received) (ok bool) {
	m := &b.msgs[i]
	*r = received{buf: b.bufs[i], n: int(m.n)}
	if m.hdr.Flags&unix.MSG_TRUNC != 0 {
		return false
	}
	if r.peer, ok = b.names[i].Get(); !ok {
		return false
	}
	parseControl(b.ctls[i].bytes()[:min(int(m.hdr.Controllen), controlLen)], r)
	return true
}

// parseControl reads the control messages of a datagram.
func parseControl(c []byte, r *received) {
	for len(c) >= unix.SizeofCmsghdr {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&c[0]))
		n := int(h.Len)
		if n < unix.SizeofCmsghdr || n > len(c) {
			return
		}
		d := c[unix.CmsgLen(0):n]
		switch {
		case h.Level == unix.SOL_UDP && h.Type == unix.UDP_GRO && len(d) >= 4:
			r.seg = int(binary.NativeEndian.Uint32(d))
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_TOS && len(d) >= 1:
			r.tos = d[0]
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_TCLASS && len(d) >= 4:
			r.tos = uint8(binary.NativeEndian.Uint32(d))
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_TTL && len(d) >= 4,
			h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_HOPLIMIT && len(d) >= 4:
			r.ttl = uint8(binary.NativeEndian.Uint32(d))
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(d) >= unix.SizeofInet4Pktinfo:
			r.local = netip.AddrFrom4([4]byte(d[4:8]))
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(d) >= unix.SizeofInet6Pktinfo:
			r.local = netip.AddrFrom16([16]byte(d[:16])).Unmap()
		}
		c = c[min(len(c), unix.CmsgSpace(n-unix.CmsgLen(0))):]
	}
}

// queueUDP turns a received message into frames from src to dst, ready for Send: as one frame where it fits the network whole or as a
// superframe, else datagram by datagram, each in fragments if it must be.
func (b *recvBatch) queueUDP(u *udpNAT, r *received, src, dst netip.AddrPort) {
	mtu := u.net.MTU()
	hdr := ipHdrLen(src.Addr()) + wire.UDPLen
	one := r.n
	if r.seg > 0 && r.seg < r.n {
		one = r.seg
	}
	if hdr+one <= mtu && hdr+r.n <= 0xffff {
		b.fs = append(b.fs, udpFrame(r.buf, r.n, src, dst, r.tos, r.seg))
		return
	}
	// Frames are built in place, so each datagram's headers overwrite the end of the one before it: it must have been copied or sent by then.
	for off := 0; off < r.n; off += one {
		n := min(one, r.n-off)
		f := udpFrame(r.buf[off:], n, src, dst, r.tos, 0)
		if hdr+n > mtu {
			finishUDP(&f)
			b.queueFragments(u, &f, mtu)
			continue
		}
		// The short end of a train of long datagrams.
		b.fs = append(b.fs, f)
		b.flush(u)
	}
}

// queueFragments queues a finished packet longer than the network's MTU.
func (b *recvBatch) queueFragments(u *udpNAT, f *frame.Frame, mtu int) {
	need := fragRoom(len(f.Data), mtu)
	if len(b.room) < need {
		b.flush(u)
		if b.arena == nil {
			b.arena = make([]byte, fragArena)
			b.room = b.arena
		}
	}
	b.ipID++
	b.fs, b.room = appendFragments(b.fs, b.room, f, mtu, b.ipID)
}

// flush puts the queued frames on the network.
func (b *recvBatch) flush(u *udpNAT) {
	if len(b.fs) > 0 {
		u.net.Send(b.fs)
	}
	clear(b.fs)
	b.fs = b.fs[:0]
	b.room = b.arena
}
