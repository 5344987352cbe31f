package secure

import (
	"bytes"
	"context"
	"testing"
	"time"
)

// FuzzOpen: what nobody sealed never opens, and never panics.
func FuzzOpen(f *testing.F) {
	a, b := pair(f)
	m, _ := seal(a, "the only message that was ever sealed")
	f.Add(m.id, m.seq, m.aad, m.text)
	f.Add(m.id, m.seq, m.aad, m.text[:3])
	f.Add(uint32(0), uint64(1)<<63, []byte{}, []byte{})
	f.Add(m.id, ^uint64(0), []byte(nil), []byte(nil))
	f.Fuzz(func(t *testing.T, id uint32, seq uint64, aad, text []byte) {
		same := id == m.id && seq == m.seq && bytes.Equal(aad, m.aad) && bytes.Equal(text, m.text)
		if _, _, ok := b.Open(id, seq, aad, bytes.Clone(text)); ok && !same {
			t.Fatalf("opened: id %08x seq %d aad %x text %x", id, seq, aad, text)
		}
	})
}

// FuzzDeliver hands anything to a link that runs, as challenge, hello, or part of a handshake under way; it makes no session of it and keeps working.
func FuzzDeliver(f *testing.F) {
	// Real datagrams of a handshake are the seeds.
	var seeds [][]byte
	ca, cb := configs(f)
	bed := connect(newNode(f, ca), newNode(f, cb))
	bed.a.start()
	bed.b.start()
	within(f, 10*time.Second, "session", bed.sealed)
	seeds = append(bed.a.to.recorded(), bed.b.to.recorded()...)
	bed.end(f)
	for i, s := range seeds {
		f.Add(s, i%2 == 0)
		f.Add(s[:len(s)/2], true)
	}
	f.Add(header{vni: 42, number: 1, responder: true, cookie: 5}.append(nil), true)
	n := newNode(f, ca)
	n.to.deliver = func([]byte) {}
	n.start()
	f.Cleanup(func() { n.stop() })
	f.Fuzz(func(t *testing.T, d []byte, aim bool) {
		before := bytes.Clone(d)
		if aim && len(d) >= HeaderLen {
			// As from somebody who sees what goes over the path: with the number and cookie of what is under way.
			if sent := n.to.recorded(); len(sent) > 0 {
				last, _, _ := parseHeader(sent[len(sent)-1])
				copy(d, header{vni: 42, number: last.number, responder: !last.responder, cookie: last.cookie}.append(nil))
				before = bytes.Clone(d)
			}
		}
		n.link.Deliver(d)
		if !bytes.Equal(d, before) {
			t.Fatal("Deliver changed what it was lent")
		}
		if n.link.Session() != nil {
			t.Fatal("a session without a peer")
		}
		n.to.mu.Lock()
		if len(n.to.seen) > 100 {
			n.to.seen = n.to.seen[50:]
		}
		n.to.mu.Unlock()
	})
}

// FuzzSift: what is left is made of whole records that were there, in order.
func FuzzSift(f *testing.F) {
	f.Add([]byte{recordAlert, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2, 2, 40, recordHandshake, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1, 9})
	f.Fuzz(func(t *testing.T, d []byte) {
		whole := bytes.Clone(d)
		kept, _ := sift(d)
		for rest := kept; len(rest) > 0; {
			n := recordHeader + int(rest[11])<<8 + int(rest[12])
			if n > len(rest) || !bytes.Contains(whole, rest[:n]) {
				t.Fatalf("%x is left of %x", kept, whole)
			}
			if epoch := rest[4]; epoch == 0 && rest[0] != recordHandshake && rest[0] != recordChangeCipherSpec {
				t.Fatalf("%x passed", rest[:n])
			}
			rest = rest[n:]
		}
		sealedRecords(whole)
		isClientHello(whole)
	})
}

func FuzzImport(f *testing.F) {
	a, _ := pair(f)
	cfg := a.cfg
	data, err := a.Export()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := NewLink(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if l.Import(data) == nil {
			if s := l.Session(); s != nil {
				seq, _ := s.Next()
				s.Seal(nil, seq, nil, []byte("x"))
			}
		}
		l.Open(1, 2, nil, nil)
		l.Close()
	})
}

// FuzzAnswer feeds the library behind our door: as who answers and as who started, with certificates and with a pre-shared key, a handshake's true beginning and then anything.
func FuzzAnswer(f *testing.F) {
	type kit struct {
		link   *Link
		hellos [2][]byte // the true first payload from the initiator and from the responder
	}
	var kits []kit
	for _, cfgs := range []func(testing.TB) (LinkConfig, LinkConfig){configs, pskConfigs} {
		ca, cb := cfgs(f)
		bed := connect(newNode(f, ca), newNode(f, cb))
		bed.a.start()
		bed.b.start()
		within(f, 10*time.Second, "session", bed.sealed)
		k := kit{link: bed.a.link}
		for i, p := range []*path{bed.a.to, bed.b.to} {
			for _, d := range p.recorded() {
				h, payload, _ := parseHeader(d)
				if len(payload) == 0 {
					continue
				}
				if h.responder == (i == 1) && k.hellos[i] == nil {
					k.hellos[i] = payload
				}
				f.Add(payload, payload, len(kits) == 1, i == 1)
			}
		}
		bed.end(f)
		ca.Send = func([]byte) error { return nil }
		l, err := NewLink(ca)
		if err != nil {
			f.Fatal(err)
		}
		k.link = l
		kits = append(kits, k)
	}
	f.Fuzz(func(t *testing.T, one, two []byte, psk, initiator bool) {
		if len(one) > MaxHandshake || len(two) > MaxHandshake {
			return
		}
		k := kits[0]
		if psk {
			k = kits[1]
		}
		s := newShake(k.link, header{vni: 42, number: 1, cookie: 1, responder: !initiator})
		first := k.hellos[0]
		if initiator {
			s.random = k.link.cfg.Identity.begin()
			defer k.link.cfg.Identity.end(s.random)
			first = k.hellos[1]
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Millisecond)
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- s.shakeHands(ctx, func() {}) }()
		for _, d := range [][]byte{first, one, two} {
			s.feed(bytes.Clone(d))
		}
		if err := <-done; err == nil || s.made.Load() {
			t.Fatal("a session without a peer")
		}
	})
}
