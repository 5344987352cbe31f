package ipam

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"patchbay/internal/wire"
)

var ctx = context.Background()

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }
func ip(s string) netip.Addr    { return netip.MustParseAddr(s) }

func newPool(t testing.TB, c PoolConfig) *Pool {
	t.Helper()
	if c.Name == "" {
		c.Name = "net"
	}
	p, err := NewPool(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func lease(t testing.TB, p *Pool, q Request) netip.Addr {
	t.Helper()
	r, err := p.Lease(ctx, q)
	if err != nil {
		t.Fatal(err)
	}
	return r.Addr
}

func TestSequence(t *testing.T) {
	p := newPool(t, PoolConfig{Prefix: pfx("10.88.0.0/29"), Reserved: []netip.Prefix{pfx("10.88.0.4/32")}})
	var got []string
	for i := range 3 {
		got = append(got, lease(t, p, Request{Attachment: fmt.Sprint("a", i)}).String())
	}
	// .0 network, .1 gateway, .4 reserved, .6 host alias, .7 broadcast
	if want := "10.88.0.2 10.88.0.3 10.88.0.5"; strings.Join(got, " ") != want {
		t.Errorf("got %v, want %s", got, want)
	}
	_, err := p.Lease(ctx, Request{Attachment: "late"})
	if !errors.Is(err, ErrExhausted) {
		t.Fatalf("fourth lease of three: %v", err)
	}
	if want := `network "net": all addresses of 10.88.0.0/29 are held, by a0, a1, a2: stop one of them, or make a network with a larger --subnet`; err.Error() != want {
		t.Errorf("error\n got %s\nwant %s", err, want)
	}
	if again := lease(t, p, Request{Attachment: "a1"}); again != ip("10.88.0.3") {
		t.Errorf("asking twice gave %s", again)
	}
}

func TestSequenceIPv6(t *testing.T) {
	p := newPool(t, PoolConfig{Prefix: pfx("fd00:1::/64")})
	if p.Gateway() != ip("fd00:1::1") || p.HostAlias() != ip("fd00:1::fe") {
		t.Fatalf("gateway %s, host alias %s", p.Gateway(), p.HostAlias())
	}
	seen := map[netip.Addr]bool{p.Gateway(): true, p.HostAlias(): true, ip("fd00:1::"): true}
	for i := range 300 {
		a := lease(t, p, Request{Attachment: fmt.Sprint(i)})
		if seen[a] {
			t.Fatalf("%s handed out, which is taken", a)
		}
		seen[a] = true
	}
}

func TestHugeReservationIsOneStep(t *testing.T) {
	p := newPool(t, PoolConfig{Prefix: pfx("fd00:1::/48"), Reserved: []netip.Prefix{pfx("fd00:1::/64"), pfx("fd00:1:0:1::/64")}, HostAlias: ip("fd00:1:0:5::1")})
	if a := lease(t, p, Request{Attachment: "x"}); a != ip("fd00:1:0:2::") {
		t.Errorf("got %s", a)
	}
}

func TestRange(t *testing.T) {
	p := newPool(t, PoolConfig{Prefix: pfx("10.88.0.0/24"), Range: pfx("10.88.0.128/30")})
	var got []netip.Addr
	for i := range 4 {
		got = append(got, lease(t, p, Request{Attachment: fmt.Sprint(i)}))
	}
	if !slices.Equal(got, []netip.Addr{ip("10.88.0.128"), ip("10.88.0.129"), ip("10.88.0.130"), ip("10.88.0.131")}) {
		t.Errorf("got %v", got)
	}
	lease(t, p, Request{Attachment: "static", Addr: ip("10.88.0.9")})
	_, err := p.Lease(ctx, Request{Attachment: "late"})
	if !errors.Is(err, ErrExhausted) || strings.Contains(err.Error(), "static") {
		t.Errorf("a lease outside the range is no holder of it: %v", err)
	}
}

func TestStatic(t *testing.T) {
	p := newPool(t, PoolConfig{Prefix: pfx("10.88.0.0/24"), Reserved: []netip.Prefix{pfx("10.88.0.64/26")}})
	lease(t, p, Request{Attachment: "db", Addr: ip("10.88.0.50")})
	for _, c := range []struct {
		att, addr string
		want      error
		text      string
	}{
		{"x", "10.88.0.50", ErrTaken, "db"},
		{"x", "10.88.0.0", ErrReserved, "subnet itself"},
		{"x", "10.88.0.1", ErrReserved, "gateway"},
		{"x", "10.88.0.254", ErrReserved, "host's alias"},
		{"x", "10.88.0.255", ErrReserved, "broadcast"},
		{"x", "10.88.0.70", ErrReserved, "10.88.0.64/26"},
		{"x", "10.89.0.5", ErrNotInPool, "10.88.0.0/24"},
		{"x", "fd00::5", ErrNotInPool, "10.88.0.0/24"},
		{"db", "10.88.0.51", ErrHolds, "10.88.0.50"},
		{"db", "10.88.0.50", nil, ""},
		{"x", "10.88.0.51", nil, ""},
	} {
		_, err := p.Lease(ctx, Request{Attachment: c.att, Addr: ip(c.addr)})
		if !errors.Is(err, c.want) || c.want == nil && err != nil {
			t.Errorf("%s for %s: %v, want %v", c.addr, c.att, err, c.want)
		}
		if err != nil && (!strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), c.addr) || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%s for %s: error %q does not say %q", c.addr, c.att, err, c.text)
		}
	}
	if _, err := p.Lease(ctx, Request{}); err == nil {
		t.Error("a lease without an attachment")
	}
}

func TestReuse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPool(t, PoolConfig{Prefix: pfx("10.88.0.0/29"), ReuseDelay: time.Minute}) // .2 to .5
		mac := wire.MAC{2, 0, 0, 0, 0, 9}
		for i := range 3 {
			lease(t, p, Request{Attachment: fmt.Sprint("a", i)}) // .2 .3 .4
		}
		if err := p.Release(ctx, "a0"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if err := p.Release(ctx, "a1"); err != nil {
			t.Fatal(err)
		}
		if err := p.Release(ctx, "a1"); err != nil {
			t.Errorf("a second release: %v", err)
		}
		if got := lease(t, p, Request{Attachment: "b"}); got != ip("10.88.0.5") {
			t.Errorf("got %s: the addresses given back should rest while .5 is free", got)
		}
		if got := lease(t, p, Request{Attachment: "c"}); got != ip("10.88.0.2") {
			t.Errorf("got %s: with nothing else free, the one that rested longest should be taken", got)
		}
		if got := lease(t, p, Request{Attachment: "a1"}); got != ip("10.88.0.3") {
			t.Errorf("got %s: a1 held .3 before", got)
		}
		for _, a := range []string{"a1", "a2", "b", "c"} {
			_ = p.Release(ctx, a)
		}
		if got := lease(t, p, Request{Attachment: "vm", MAC: mac, Addr: ip("10.88.0.4")}); got != ip("10.88.0.4") {
			t.Errorf("static got %s", got)
		}
		_ = p.Release(ctx, "vm")
		time.Sleep(2 * time.Minute)
		if got := lease(t, p, Request{Attachment: "vm under another name", MAC: mac}); got != ip("10.88.0.4") {
			t.Errorf("got %s: that MAC held .4 before", got)
		}
		if got := lease(t, p, Request{Attachment: "d"}); got != ip("10.88.0.2") {
			t.Errorf("got %s: after the delay, the sequence goes on behind the one it gave last (.5), from the start", got)
		}
	})
}

func TestTTLAndDecline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPool(t, PoolConfig{Prefix: pfx("10.88.0.0/29"), DeclineDelay: time.Hour, ReuseDelay: time.Second})
		a := lease(t, p, Request{Attachment: "m1", TTL: time.Minute})
		time.Sleep(59 * time.Second)
		lease(t, p, Request{Attachment: "m1", TTL: time.Minute}) // renewed
		time.Sleep(59 * time.Second)
		if _, ok := p.Holder(a); !ok {
			t.Error("a renewed lease ended early")
		}
		if _, err := p.Lease(ctx, Request{Attachment: "m2", Addr: a}); !errors.Is(err, ErrTaken) {
			t.Errorf("held address: %v", err)
		}
		time.Sleep(time.Second)
		if _, ok := p.Holder(a); ok || len(p.Leases()) != 0 {
			t.Error("the lease outlived its TTL")
		}
		if _, ok := p.Of("m1"); ok {
			t.Error("Of returns a lease that is over")
		}
		lease(t, p, Request{Attachment: "m2", Addr: a})
		if err := p.Decline(ctx, "m1", a); err == nil {
			t.Error("m1 declined the address of m2")
		}
		if err := p.Decline(ctx, "m2", a); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		for i := range 3 {
			if got := lease(t, p, Request{Attachment: fmt.Sprint("x", i)}); got == a {
				t.Errorf("%s was handed out a minute after it was declined", got)
			}
		}
		if got := lease(t, p, Request{Attachment: "last"}); got != a {
			t.Errorf("got %s: a declined address is better than none", got)
		}
	})
}

func TestPrefer(t *testing.T) {
	p := newPool(t, PoolConfig{Prefix: pfx("10.88.0.0/24")})
	if a := lease(t, p, Request{Attachment: "a", Prefer: ip("10.88.0.77")}); a != ip("10.88.0.77") {
		t.Errorf("got %s", a)
	}
	for _, bad := range []string{"10.88.0.77", "10.88.0.1", "10.88.0.255", "192.0.2.1", "fd00::1"} {
		if a := lease(t, p, Request{Attachment: bad, Prefer: ip(bad)}); a == ip(bad) {
			t.Errorf("preferred %s was handed out", a)
		}
	}
}

func TestReleasedRecordsAreBounded(t *testing.T) {
	st := new(MemStore)
	p := newPool(t, PoolConfig{Prefix: pfx("fd00::/64"), Store: st, MaxReleased: 10})
	for i := range 100 {
		id := fmt.Sprint(i)
		lease(t, p, Request{Attachment: id})
		if err := p.Release(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	if rs, _ := st.List(ctx, p.key); len(rs) != 10 {
		t.Errorf("%d records kept, want 10", len(rs))
	}
}

func TestRestartKeepsLeases(t *testing.T) {
	st := new(MemStore)
	c := PoolConfig{Prefix: pfx("10.88.0.0/24"), Store: st}
	p := newPool(t, c)
	a, b := lease(t, p, Request{Attachment: "a"}), lease(t, p, Request{Attachment: "b"})
	_ = p.Release(ctx, "b")
	p = newPool(t, c)
	if got := lease(t, p, Request{Attachment: "a"}); got != a {
		t.Errorf("a had %s, has %s after the restart", a, got)
	}
	if got := lease(t, p, Request{Attachment: "c"}); got == a || got == b {
		t.Errorf("c got %s, which is held or resting", got)
	}
	gone, err := p.Reconcile(ctx, func(att string) bool { return att == "a" })
	if err != nil || len(gone) != 1 || gone[0].Attachment != "c" {
		t.Errorf("reconcile released %v, %v; want c", gone, err)
	}
}

// TestRandomWalk checks, over many random operations on two pools that share a store (two nodes), that no address is ever held twice or
// is one that is not to be handed out, and that leases stay what they are until they end.
func TestRandomWalk(t *testing.T) {
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		now := time.Unix(1e9, 0)
		c := PoolConfig{Name: "n", Prefix: pfx("10.88.0.0/27"), Store: new(MemStore), Now: func() time.Time { return now },
			Reserved: []netip.Prefix{pfx("10.88.0.8/30")}, MaxReleased: 4}
		if seed%2 == 1 {
			c.Prefix, c.Reserved = pfx("fd00::/123"), []netip.Prefix{pfx("fd00::8/126")}
		}
		pools := []*Pool{newPool(t, c), newPool(t, c)}
		type held struct {
			a   netip.Addr
			end time.Time
		}
		model := map[string]held{}
		for range 2000 {
			p := pools[rnd.IntN(2)]
			att := fmt.Sprint("p", slices.Index(pools, p), "-", rnd.IntN(20)) // an attachment lives on one node
			for k, h := range model {
				if !h.end.IsZero() && !now.Before(h.end) {
					delete(model, k)
				}
			}
			switch rnd.IntN(8) {
			case 0, 1:
				if err := p.Release(ctx, att); err != nil {
					t.Fatal(err)
				}
				delete(model, att)
			case 2:
				now = now.Add(time.Duration(rnd.IntN(200)) * time.Second)
			case 3:
				if h, ok := model[att]; ok {
					if err := p.Decline(ctx, att, h.a); err != nil {
						t.Fatal(err)
					}
					delete(model, att)
				}
			default:
				q := Request{Attachment: att, MAC: wire.MAC{2, 0, 0, 0, 0, byte(rnd.IntN(4))}}
				if rnd.IntN(2) == 0 {
					q.TTL = time.Duration(1+rnd.IntN(300)) * time.Second
				}
				if rnd.IntN(3) == 0 {
					b := c.Prefix.Addr().AsSlice()
					b[len(b)-1] = byte(rnd.IntN(40))
					q.Addr, _ = netip.AddrFromSlice(b)
				}
				r, err := p.Lease(ctx, q)
				was, had := model[att]
				if err != nil {
					if had && (!q.Addr.IsValid() || q.Addr == was.a) {
						t.Fatalf("seed %d: %s holds %s and was refused: %v", seed, att, was.a, err)
					}
					if errors.Is(err, ErrExhausted) && len(model) < 24 { // 30 hosts, gateway, alias and 4 reserved off (31 of IPv6)
						t.Fatalf("seed %d: exhausted with %d held: %v", seed, len(model), err)
					}
					if errors.Is(err, ErrConflict) {
						t.Fatalf("seed %d: %v", seed, err)
					}
					continue
				}
				if had && was.a != r.Addr {
					t.Fatalf("seed %d: %s had %s, got %s", seed, att, was.a, r.Addr)
				}
				for other, h := range model {
					if h.a == r.Addr && other != att {
						t.Fatalf("seed %d: %s given to %s while %s holds it", seed, r.Addr, att, other)
					}
				}
				if why := p.reserved(r.Addr); why != "" || !c.Prefix.Contains(r.Addr) {
					t.Fatalf("seed %d: %s given to %s: %s", seed, r.Addr, att, why)
				}
				model[att] = held{r.Addr, r.Expires}
			}
		}
	}
}

func TestConcurrent(t *testing.T) {
	st := new(MemStore)
	c := PoolConfig{Name: "n", Prefix: pfx("10.88.0.0/24"), Store: st}
	pools := []*Pool{newPool(t, c), newPool(t, c)}
	var mu sync.Mutex
	held := map[netip.Addr]string{}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			p := pools[g%2]
			for i := range 50 {
				att := fmt.Sprint(g, "/", i%10)
				r, err := p.Lease(ctx, Request{Attachment: att})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				if o, ok := held[r.Addr]; ok && o != att {
					t.Errorf("%s is held by %s and was given to %s", r.Addr, o, att)
				}
				held[r.Addr] = att
				mu.Unlock()
				p.Leases()
				if i%3 == 0 {
					mu.Lock()
					delete(held, r.Addr) // before it can be given to another
					mu.Unlock()
					if err := p.Release(ctx, att); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
}

// brokenStore fails as a full disk would.
type brokenStore struct{ MemStore }

var errDisk = errors.New("no space left on device")

func (*brokenStore) Put(context.Context, string, Record) (int64, error) { return 0, errDisk }

func TestStoreFailureIsTold(t *testing.T) {
	p := newPool(t, PoolConfig{Prefix: pfx("10.88.0.0/24"), Store: new(brokenStore)})
	if _, err := p.Lease(ctx, Request{Attachment: "a"}); !errors.Is(err, errDisk) {
		t.Errorf("got %v", err)
	}
	if len(p.Leases()) != 0 {
		t.Error("a lease that was not stored is held")
	}
}

func TestBadPools(t *testing.T) {
	for _, c := range []PoolConfig{
		{},
		{Prefix: pfx("10.88.0.1/24")},
		{Prefix: pfx("10.88.0.0/31")},
		{Prefix: pfx("10.88.0.0/24"), Gateway: ip("10.89.0.1")},
		{Prefix: pfx("10.88.0.0/24"), Gateway: ip("10.88.0.255")},
		{Prefix: pfx("10.88.0.0/24"), HostAlias: ip("10.88.0.1")},
		{Prefix: pfx("10.88.0.0/24"), HostAlias: ip("10.88.0.0")},
		{Prefix: pfx("10.88.0.0/24"), Range: pfx("10.88.0.0/16")},
		{Prefix: pfx("10.88.0.0/24"), Range: pfx("10.89.0.0/28")},
		{Prefix: pfx("10.88.0.0/24"), Reserved: []netip.Prefix{pfx("10.89.0.0/28")}},
		{Prefix: pfx("10.88.0.0/24"), Reserved: []netip.Prefix{{}}},
	} {
		c.Name = "bad"
		if _, err := NewPool(ctx, c); err == nil || !strings.Contains(err.Error(), `network "bad"`) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%+v: error %v", c, err)
		}
	}
	// The smallest ones hold exactly one container.
	for _, s := range []string{"10.88.0.0/30", "fd00::/126"} {
		p := newPool(t, PoolConfig{Prefix: pfx(s)})
		lease(t, p, Request{Attachment: "one"})
		if p.HostAlias().IsValid() {
			t.Errorf("%s has a host alias %s", s, p.HostAlias())
		}
	}
}
