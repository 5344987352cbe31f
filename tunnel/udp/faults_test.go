package udp

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/mmsg"
)

// faults makes a sendmmsg that refuses what is says, before it sends anything.
func faults(s *Socket, is func(m *mmsg.Msg) unix.Errno) {
	s.sendmmsg = func(fd int, ms []mmsg.Msg) (int, unix.Errno) {
		for i := range ms {
			if e := is(&ms[i]); e != 0 {
				if i == 0 {
					return 0, e
				}
				return mmsg.Send(fd, ms[:i])
			}
		}
		return mmsg.Send(fd, ms)
	}
}

// cut reports whether a message is to be cut by the kernel.
func cut(m *mmsg.Msg) bool {
	for c := unsafeControl(m); ; {
		level, typ, _, rest, ok := mmsg.Next(c)
		if !ok {
			return false
		}
		if level == unix.SOL_UDP && typ == unix.UDP_SEGMENT {
			return true
		}
		c = rest
	}
}

// Where the kernel will not cut, everything is sent one by one, for a while; EIO and EINVAL alike.
func TestFallsBack(t *testing.T) {
	for _, errno := range []unix.Errno{unix.EIO, unix.EINVAL} {
		t.Run(fmt.Sprint(errno), func(t *testing.T) {
			now := time.Unix(0, 0)
			rx := listen(t, nil, at("127.0.0.1:0"))
			in := receive(t, rx)
			tx := listen(t, nil, Config{Listen: netip.MustParseAddrPort("127.0.0.1:0"), RetryCut: time.Minute, Now: func() time.Time { return now }})
			broken := true
			faults(tx, func(m *mmsg.Msg) unix.Errno {
				if broken && cut(m) {
					return errno
				}
				return 0
			})
			var drops frame.DropCounters
			p, other := newPath(t, tx, rx.LocalAddr(), PathConfig{}), newPath(t, tx, rx.LocalAddr(), PathConfig{})
			sent, lost := send(t, p, &drops, 0, 2, 1000, 1000, 1000, 500, 500, 2000, 2000)
			if lost != 0 {
				t.Errorf("%d lost", lost)
			}
			same(t, in.wait(t, 7), sent)
			for _, tos := range in.tos {
				if tos != 2 {
					t.Errorf("ECN %d", tos)
				}
			}
			if p.Cut() != CutRefused || other.Cut() != CutOn {
				t.Errorf("cut: %v, of the other path %v", p.Cut(), other.Cut())
			}
			// From now on it does not even try.
			before := p.Stats()
			send(t, p, &drops, 0, 0, repeat(100, 10)...)
			if d := p.Stats().Messages - before.Messages; d != 10 {
				t.Errorf("%d messages", d)
			}
			broken = false
			now = now.Add(time.Minute)
			before = p.Stats()
			send(t, p, &drops, 0, 0, repeat(100, 10)...)
			if d := p.Stats().Messages - before.Messages; d != 1 || p.Cut() != CutOn {
				t.Errorf("a minute later: %d messages, cut: %v", d, p.Cut())
			}
			in.wait(t, 27)
			noDrops(t, &drops)
		})
	}
}

func TestCutCanBeSwitchedOff(t *testing.T) {
	now := time.Unix(0, 0)
	rx := listen(t, nil, at("127.0.0.1:0"))
	tx := listen(t, nil, Config{Listen: netip.MustParseAddrPort("127.0.0.1:0"), Now: func() time.Time { return now }})
	var drops frame.DropCounters
	off := newPath(t, tx, rx.LocalAddr(), PathConfig{NoCut: true})
	lossy := newPath(t, tx, rx.LocalAddr(), PathConfig{})
	off.SuspendCut()
	lossy.SuspendCut()
	for _, p := range []*Path{off, lossy} {
		send(t, p, &drops, 0, 0, repeat(100, 5)...)
		if n := p.Stats().Messages; n != 5 {
			t.Errorf("%v: %d messages", p.Cut(), n)
		}
	}
	if off.Cut() != CutOff || lossy.Cut() != CutLossy {
		t.Errorf("cut: %v and %v", off.Cut(), lossy.Cut())
	}
	now = now.Add(DefaultRetryCut)
	for _, p := range []*Path{off, lossy} {
		send(t, p, &drops, 0, 0, repeat(100, 5)...)
	}
	if off.Cut() != CutOff || off.Stats().Messages != 10 || lossy.Cut() != CutOn || lossy.Stats().Messages != 6 {
		t.Errorf("later: %v with %d messages, %v with %d", off.Cut(), off.Stats().Messages, lossy.Cut(), lossy.Stats().Messages)
	}
	none := listen(t, nil, Config{Listen: netip.MustParseAddrPort("127.0.0.1:0"), NoCut: true})
	if c := newPath(t, none, rx.LocalAddr(), PathConfig{}).Cut(); c != CutMissing || none.MaxSegments() != 0 {
		t.Errorf("a Socket without: %v", c)
	}
	noDrops(t, &drops)
}

// A frame is one drop, however many of its datagrams are lost, and the reason is the errno's.
func TestDropsAreCountedByFrame(t *testing.T) {
	rx := listen(t, nil, at("127.0.0.1:0"))
	for _, c := range []struct {
		errno unix.Errno
		want  frame.Drop
	}{
		{unix.EAGAIN, frame.DropTxBusy},
		{unix.ENOBUFS, frame.DropTxBusy},
		{unix.ENETUNREACH, frame.DropUnderlay},
		{unix.ENETDOWN, frame.DropUnderlay},
		{unix.EPERM, frame.DropHostSend},
		{unix.EIO, frame.DropHostSend},
		{unix.EMSGSIZE, frame.DropTooBig},
	} {
		for _, ports := range []int{1, 3} {
			tx := listen(t, nil, Config{Listen: netip.MustParseAddrPort("127.0.0.1:0"), Ports: ports})
			calls, bad := 0, true
			faults(tx, func(*mmsg.Msg) unix.Errno {
				if calls++; bad {
					return c.errno
				}
				return 0
			})
			p := newPath(t, tx, rx.LocalAddr(), PathConfig{})
			var drops frame.DropCounters
			b, _ := tx.Batch(&drops)
			add := func() {
				for f := range 100 {
					for range 1 + f%7 {
						b.Add(p, uint32(f), 0, f, b.Head(8), payload(f, 100*(1+f%2)))
					}
				}
			}
			add()
			if lost := b.Send(); lost != 100 || drops.Total() != 100 || drops.Get(c.want) != 100 {
				t.Errorf("%v, %d ports: %d lost, %d dropped, %d for %v", c.errno, ports, lost, drops.Total(), drops.Get(c.want), c.want)
			}
			if st := p.Stats(); st.Datagrams != 0 {
				t.Errorf("%v: %d datagrams are counted as sent", c.errno, st.Datagrams)
			}
			if p.Cut() != CutOn {
				t.Errorf("%v: cut: %v", c.errno, p.Cut())
			}
			bad = false
			add()
			if lost := b.Send(); lost != 0 {
				t.Errorf("%v: still %d lost", c.errno, lost)
			}
			b.Release()
			if c.want == frame.DropTxBusy && calls > 400 {
				t.Errorf("%v: %d messages were tried", c.errno, calls)
			}
		}
	}
}

// EINTR and a buffer that is full for a moment lose nothing.
func TestTriesAgain(t *testing.T) {
	rx := listen(t, nil, at("127.0.0.1:0"))
	in := receive(t, rx)
	tx := listen(t, nil, at("127.0.0.1:0"))
	errs := []unix.Errno{unix.EINTR, unix.EAGAIN, unix.EAGAIN, unix.EINTR, unix.ENOBUFS, 0, unix.EAGAIN, 0, 0, unix.EIO, unix.EAGAIN, unix.EINTR, 0, unix.EAGAIN, 0}
	faults(tx, func(*mmsg.Msg) unix.Errno {
		if len(errs) == 0 {
			return 0
		}
		e := errs[0]
		errs = errs[1:]
		return e
	})
	p := newPath(t, tx, rx.LocalAddr(), PathConfig{})
	var drops frame.DropCounters
	for range 4 {
		send(t, p, &drops, 0, 0, 100, 200, 200, 50)
	}
	in.wait(t, 16)
	noDrops(t, &drops)
}
