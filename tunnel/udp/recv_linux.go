package udp

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"

	"patchbay/internal/mmsg"
	"patchbay/internal/spin"
)

// Sizes of one receive.
const (
	recvMessages = 64      // messages of one recvmmsg
	recvFew      = 4       // messages of one recvmmsg while they are long: what is read should be in the cache still when it is forwarded
	recvLong     = 8 << 10 // bytes that make messages long, on average
	recvBuf      = 1 << 16 // one message: what the kernel joins is at most 64 KiB
)

// Train is one message from the kernel: a datagram, or several of one size from one sender, one behind the other.
type Train struct {
	// Data is all of them. It may be written to, and is lent until Receive returns.
	Data []byte
	// Size is the length in bytes of each datagram; the last may be shorter. It is len(Data) for a single one.
	Size int
	// From is the sender; IPv4 addresses are never v4-mapped, zones are left out.
	From netip.AddrPort
	// TOS is the outer header's traffic class, the same for all; its two lowest bits are ECN.
	TOS uint8
}

// Handler takes what Serve has read. It runs to completion on Serve's goroutine and must not wait.
type Handler interface {
	Receive(ts []Train)
}

// receiver is the scratch of one Serve.
type receiver struct {
	s     *Socket
	msgs  [recvMessages]mmsg.Msg
	names [recvMessages]mmsg.Sockaddr
	ctls  [recvMessages]mmsg.Control
	iovs  [recvMessages]unix.Iovec
	bufs  []byte
	want  int // messages to ask for
	used  int // messages whose headers must be reset before the next call
	ts    []Train
}

// Serve receives and hands over what it has read, a batch at a time, until ctx is done or the Socket is closed (nil). It blocks, and runs once at a time.
func (s *Socket) Serve(ctx context.Context, h Handler) error {
	if err := s.startServe(); err != nil {
		return fmt.Errorf("receive on %v: %w", s.local, err)
	}
	defer s.endServe()
	defer context.AfterFunc(ctx, s.interrupt)()
	r := newReceiver(s)
	var sp spin.Spinner
	var slice spin.Slice
	for !s.stop.Load() {
		slice.Yield()
		more, errno := r.fill()
		if len(r.ts) > 0 {
			sp.Found()
			h.Receive(r.ts)
		}
		switch {
		case errno != 0:
			return fmt.Errorf("receive on %v: %w", s.local, errno)
		case more, sp.Again(s.cfg.Spin):
		default:
			if err := s.wait(); err != nil {
				return fmt.Errorf("receive on %v: %w", s.local, err)
			}
		}
	}
	return nil
}

func (s *Socket) startServe() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	if !s.serving.CompareAndSwap(false, true) {
		return fmt.Errorf("another Serve reads it already")
	}
	s.stop.Store(false)
	// What woke the last Serve must not wake this one.
	var b [8]byte
	_, _ = unix.Read(s.wake, b[:])
	s.serves.Add(1)
	return nil
}

func (s *Socket) endServe() {
	s.serving.Store(false) // not under mu: Close holds it while it waits
	s.serves.Done()
}

func newReceiver(s *Socket) *receiver {
	// One allocation that is touched as far as datagrams reach: RAM is used for the sizes that really come.
	r := &receiver{s: s, bufs: make([]byte, recvMessages*recvBuf), want: recvMessages, used: recvMessages, ts: make([]Train, 0, recvMessages)}
	for i := range r.msgs {
		r.iovs[i] = mmsg.Iovec(r.buf(i))
		h := &r.msgs[i].Hdr
		h.Name = &r.names[i][0]
		h.Iov = &r.iovs[i]
		h.SetIovlen(1)
		h.Control = &r.ctls[i].Bytes()[0]
	}
	return r
}

func (r *receiver) buf(i int) []byte { return r.bufs[i*recvBuf : (i+1)*recvBuf : (i+1)*recvBuf] }

// fill reads one batch into r.ts. more is false when the socket was found empty.
func (r *receiver) fill() (more bool, errno unix.Errno) {
	r.ts = r.ts[:0]
	for i := range r.used {
		h := &r.msgs[i].Hdr
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(mmsg.ControlLen)
		h.Flags = 0
	}
	r.used = 1 // the kernel may have touched the first whatever it says
	n, errno := mmsg.Recv(r.s.ports[0], r.msgs[:r.want], 0)
	switch errno {
	case 0:
	case unix.EAGAIN:
		return false, 0
	case unix.EINTR, unix.ENOMEM, unix.ENOBUFS, unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENETDOWN, unix.EPROTO, unix.EMSGSIZE:
		return true, 0 // of the moment, or of a datagram that was sent
	default:
		return false, errno
	}
	r.used = max(n, 1)
	datagrams, bytes, dropped := 0, 0, 0
	for i := range n {
		t, ok := r.train(i)
		if !ok {
			dropped++
			continue
		}
		r.ts = append(r.ts, t)
		bytes += len(t.Data)
		if t.Size > 0 {
			datagrams += (len(t.Data) + t.Size - 1) / t.Size
		} else {
			datagrams++
		}
	}
	r.s.messages.Add(uint64(n))
	r.s.datagrams.Add(uint64(datagrams))
	r.s.bytes.Add(uint64(bytes))
	if dropped > 0 {
		r.s.dropped.Add(uint64(dropped))
	}
	more = n == r.want
	r.want = recvMessages
	if bytes >= n*recvLong {
		r.want = recvFew
	}
	return more, 0
}

// train describes message i. ok is false for one that was cut short or names no sender.
func (r *receiver) train(i int) (t Train, ok bool) {
	m := &r.msgs[i]
	t.Data = r.buf(i)[:m.N]
	t.Size = len(t.Data)
	if m.Hdr.Flags&unix.MSG_TRUNC != 0 {
		return t, false
	}
	if t.From, ok = r.names[i].Get(); !ok {
		return t, false
	}
	c := r.ctls[i].Bytes()[:min(int(m.Hdr.Controllen), mmsg.ControlLen)]
	for {
		level, typ, d, rest, ok := mmsg.Next(c)
		if !ok {
			return t, true
		}
		switch {
		case level == unix.SOL_UDP && typ == unix.UDP_GRO && len(d) >= 4:
			if n := int(int32(binary.NativeEndian.Uint32(d))); n > 0 && n < len(t.Data) {
				t.Size = n
			}
		case level == unix.IPPROTO_IP && typ == unix.IP_TOS && len(d) >= 1:
			t.TOS = d[0]
		case level == unix.IPPROTO_IPV6 && typ == unix.IPV6_TCLASS && len(d) >= 4:
			t.TOS = uint8(binary.NativeEndian.Uint32(d))
		}
		c = rest
	}
}

// wait blocks the thread until there is a datagram, or somebody wants the Serve to end.
//
// It is poll(2) and not the runtime's poller: a goroutine that sleeps in a system call of its own is back at work a thread switch earlier.
func (s *Socket) wait() error {
	pfd := [2]unix.PollFd{
		{Fd: int32(s.ports[0]), Events: unix.POLLIN},
		{Fd: int32(s.wake), Events: unix.POLLIN},
	}
	for {
		_, _, errno := unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&pfd)), 2, 0, 0, 0, 0)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return fmt.Errorf("poll: %w", errno)
	}
}
