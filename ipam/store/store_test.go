package store_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"patchbay/internal/wire"
	"patchbay/ipam"
	"patchbay/ipam/store"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "churn" {
		fmt.Fprintln(os.Stderr, churn(os.Args[2]))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

type droppingStore interface {
	ipam.Store
	Drop(ctx context.Context, pool string) error
}

func open(t *testing.T, path string) (*bbolt.DB, *store.Bolt) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: 30 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	s, err := store.New(store.NewFile(db), "leases")
	if err != nil {
		t.Fatal(err)
	}
	return db, s
}

func list(t *testing.T, s ipam.Store, pool string) []ipam.Record {
	t.Helper()
	rs, err := s.List(t.Context(), pool)
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(rs, func(a, b ipam.Record) int { return a.Addr.Compare(b.Addr) })
	return rs
}

// TestContract holds every store to what ipam.Store says.
func TestContract(t *testing.T) {
	for name, s := range map[string]droppingStore{"mem": new(ipam.MemStore), "bolt": second(open(t, filepath.Join(t.TempDir(), "db")))} {
		t.Run(name, func(t *testing.T) { contract(t, s) })
	}
}

func second[A, B any](_ A, b B) B { return b }

func contract(t *testing.T, s droppingStore) {
	ctx := t.Context()
	four, six := netip.MustParseAddr("10.88.0.2"), netip.MustParseAddr("fd00::2")
	versions := map[int64]bool{0: true} // of every writing there was
	put := func(pool string, r ipam.Record) ipam.Record {
		t.Helper()
		v, err := s.Put(ctx, pool, r)
		if err != nil {
			t.Fatal(err)
		}
		if versions[v] {
			t.Fatalf("version %d was there before", v)
		}
		versions[v], r.Version = true, v
		return r
	}
	conflict := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, ipam.ErrConflict) {
			t.Errorf("%s: %v, want ErrConflict", what, err)
		}
	}
	if rs := list(t, s, "a"); len(rs) != 0 {
		t.Errorf("a pool nobody wrote to has %v", rs)
	}
	full := ipam.Record{
		Addr: four, State: ipam.Declined, Attachment: "web", MAC: wire.MAC{2, 0, 0, 0, 0, 1}, Static: true, Hostname: "w",
		Since: time.Unix(1000, 5).UTC(), Expires: time.Unix(2000, 0).UTC(),
	}
	r4, r6, other := put("a", full), put("a", ipam.Record{Addr: six, Attachment: "web"}), put("b", ipam.Record{Addr: four, Attachment: "db"})
	if got, want := list(t, s, "a"), []ipam.Record{r4, r6}; !reflect.DeepEqual(got, want) {
		t.Errorf("a has\n%+v, want\n%+v", got, want)
	}

	_, err := s.Put(ctx, "a", full)
	conflict("put over a record as if it were new", err)
	old := r4
	r4.State = ipam.Released
	r4 = put("a", r4)
	_, err = s.Put(ctx, "a", old)
	conflict("put on an old version", err)
	_, err = s.Put(ctx, "c", r4)
	conflict("put with a version where nothing is", err)
	conflict("delete of an old version", s.Delete(ctx, "a", old))
	conflict("delete of what is not there", s.Delete(ctx, "a", ipam.Record{Addr: netip.MustParseAddr("10.88.0.9")}))
	conflict("delete in a pool that is not there", s.Delete(ctx, "c", r4))
	if got, want := list(t, s, "a"), []ipam.Record{r4, r6}; !reflect.DeepEqual(got, want) {
		t.Errorf("conflicts changed something: a has\n%+v, want\n%+v", got, want)
	}

	if err := s.Delete(ctx, "a", r4); err != nil {
		t.Fatal(err)
	}
	put("a", full) // with a version that is new though the record was deleted
	for range 2 {
		if err := s.Drop(ctx, "a"); err != nil {
			t.Fatal(err)
		}
	}
	if rs := list(t, s, "a"); len(rs) != 0 {
		t.Errorf("dropped, and there is %v", rs)
	}
	put("a", full)
	if got := list(t, s, "b"); !reflect.DeepEqual(got, []ipam.Record{other}) {
		t.Errorf("b has %v", got)
	}

	// Of many that write one address at once, one gets it.
	var wg sync.WaitGroup
	won := make(chan int64, 100)
	for range cap(won) {
		wg.Go(func() {
			if v, err := s.Put(ctx, "race", ipam.Record{Addr: six}); err == nil {
				won <- v
			} else {
				conflict("race", err)
			}
		})
	}
	wg.Wait()
	if len(won) != 1 || list(t, s, "race")[0].Version != <-won {
		t.Errorf("%d won the race, or another record is stored", len(won))
	}
}

func TestVersionsGoOnAfterARestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	r := ipam.Record{Addr: netip.MustParseAddr("10.88.0.2")}
	var last int64
	for range 3 {
		db, s := open(t, path)
		v, err := s.Put(t.Context(), "a", r)
		if err != nil || v <= last {
			t.Fatalf("version %d after %d, %v", v, last, err)
		}
		last = v
		if err := s.Drop(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		db.Close()
	}
}

func TestEndedContextWritesNothing(t *testing.T) {
	_, s := open(t, filepath.Join(t.TempDir(), "db"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r := ipam.Record{Addr: netip.MustParseAddr("10.88.0.2")}
	if _, err := s.Put(ctx, "a", r); !errors.Is(err, context.Canceled) {
		t.Errorf("Put: %v", err)
	}
	if _, err := s.List(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("List: %v", err)
	}
	if rs := list(t, s, "a"); len(rs) != 0 {
		t.Errorf("there is %v", rs)
	}
}

// TestDamage: a damaged record is named, and does not keep its neighbours in a transaction from the disk.
func TestDamage(t *testing.T) {
	for name, c := range map[string]struct{ key, value, says string }{
		"not JSON":       {"\x0a\x58\x00\x02", "{", "10.88.0.2"},
		"other address":  {"\x0a\x58\x00\x02", `{"addr":"10.88.0.7","mac":"02:00:00:00:00:01"}`, "0a580002"},
		"key of 3 bytes": {"\x0a\x58\x00", `{"addr":"10.88.0.2","mac":"02:00:00:00:00:01"}`, "0a5800"},
	} {
		t.Run(name, func(t *testing.T) {
			db, s := open(t, filepath.Join(t.TempDir(), "db"))
			if _, err := s.Put(t.Context(), "net/10.88.0.0/16", ipam.Record{Addr: netip.MustParseAddr("10.88.0.1")}); err != nil {
				t.Fatal(err)
			}
			err := db.Update(func(tx *bbolt.Tx) error {
				return tx.Bucket([]byte("leases")).Bucket([]byte("net/10.88.0.0/16")).Put([]byte(c.key), []byte(c.value))
			})
			if err != nil {
				t.Fatal(err)
			}
			_, err = s.List(t.Context(), "net/10.88.0.0/16")
			if err == nil || !strings.Contains(err.Error(), "net/10.88.0.0/16") || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
				t.Errorf("List: %v; want one line that names the pool and %s", err, c.says)
			}
			if len(c.key) != 4 {
				return
			}
			var wg sync.WaitGroup
			for i := range 8 {
				wg.Go(func() {
					if _, err := s.Put(t.Context(), "net/10.88.0.0/16", ipam.Record{Addr: netip.MustParseAddr("10.88.0.2")}); err == nil || errors.Is(err, ipam.ErrConflict) {
						t.Errorf("Put over it: %v", err)
					}
				})
				wg.Go(func() {
					if _, err := s.Put(t.Context(), "net/10.88.0.0/16", ipam.Record{Addr: netip.AddrFrom4([4]byte{10, 88, 1, byte(i)})}); err != nil {
						t.Errorf("Put beside it: %v", err)
					}
				})
			}
			wg.Wait()
		})
	}
}

// TestManyWritersShareTransactions: what comes while one is written goes into the next.
func TestManyWritersShareTransactions(t *testing.T) {
	db, s := open(t, filepath.Join(t.TempDir(), "db"))
	tx, err := db.Begin(true) // a transaction that takes its time
	if err != nil {
		t.Fatal(err)
	}
	before := tx.ID()
	const writers = 500
	var wg, started sync.WaitGroup
	for i := range writers {
		a := netip.AddrFrom4([4]byte{10, 88, byte(i >> 8), byte(i)})
		started.Add(1)
		wg.Go(func() {
			started.Done()
			if _, err := s.Put(t.Context(), "a", ipam.Record{Addr: a}); err != nil {
				t.Error(err)
			}
		})
	}
	started.Wait()
	time.Sleep(100 * time.Millisecond) // so that nearly all are queued; the test needs a quarter of them
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if n := len(list(t, s, "a")); n != writers {
		t.Errorf("%d records of %d", n, writers)
	}
	tx, err = db.Begin(true)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if n := tx.ID() - before; n > writers/4 {
		t.Errorf("%d writers took %d transactions", writers, n)
	}
}

// TestOneFailsAndTheOthersAreWritten holds that who shares a transaction with somebody whose writing fails is written, and that each is told its own.
func TestOneFailsAndTheOthersAreWritten(t *testing.T) {
	db, _ := open(t, filepath.Join(t.TempDir(), "db"))
	f := store.NewFile(db)
	tx, err := db.Begin(true) // so that they queue up
	if err != nil {
		t.Fatal(err)
	}
	refused := errors.New("refused")
	var wg sync.WaitGroup
	const writers = 20
	for i := range writers {
		wg.Go(func() {
			err := f.Write(t.Context(), func(tx *bbolt.Tx) error {
				if i%2 == 1 {
					return refused
				}
				_, err := tx.CreateBucketIfNotExists(fmt.Appendf(nil, "b%d", i))
				return err
			})
			if got, want := err, map[int]error{1: refused}[i%2]; got != want {
				t.Errorf("writer %d is told %v, want %v", i, got, want)
			}
		})
	}
	time.Sleep(50 * time.Millisecond)
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	err = db.View(func(tx *bbolt.Tx) error {
		for i := range writers {
			if there := tx.Bucket(fmt.Appendf(nil, "b%d", i)) != nil; there != (i%2 == 0) {
				t.Errorf("writer %d: written %v", i, there)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// churn writes records as fast as it can, and says each address once it is acknowledged.
func churn(path string) error {
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		return err
	}
	s, err := store.New(store.NewFile(db), "leases")
	if err != nil {
		return err
	}
	errs := make(chan error)
	for w := range 8 {
		go func() {
			a := netip.AddrFrom4([4]byte{10, byte(w), 0, 0})
			for {
				a = a.Next()
				if _, err := s.Put(context.Background(), "a", ipam.Record{Addr: a}); err != nil {
					errs <- err
					return
				}
				os.Stdout.WriteString(a.String() + "\n")
			}
		}()
	}
	return <-errs
}

// TestKilledInTheMiddle: every lease that was acknowledged before kill -9 is there afterwards.
func TestKilledInTheMiddle(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	cmd := exec.Command(os.Args[0], "churn", path)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(out)
	var acked []netip.Addr
	for {
		line, err := r.ReadString('\n')
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		acked = append(acked, netip.MustParseAddr(strings.TrimSpace(line)))
		if len(acked) == 300 {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	cmd.Wait()
	if len(acked) < 300 {
		t.Fatalf("the writer ended after %d records", len(acked))
	}
	_, s := open(t, path)
	stored := map[netip.Addr]int64{}
	var newest int64
	for _, r := range list(t, s, "a") {
		stored[r.Addr] = r.Version
		newest = max(newest, r.Version)
	}
	for _, a := range acked {
		if stored[a] == 0 {
			t.Errorf("%s was acknowledged and is not there", a)
		}
	}
	if v, err := s.Put(t.Context(), "a", ipam.Record{Addr: netip.MustParseAddr("10.200.0.1")}); err != nil || v <= newest {
		t.Errorf("version %d after %d, %v", v, newest, err)
	}
}

// BenchmarkPoolLease is a lease of one of 500 attachments on a /16, one at a time as Pool does it.
func BenchmarkPoolLease(b *testing.B) {
	for name, s := range map[string]func() ipam.Store{
		"mem": func() ipam.Store { return new(ipam.MemStore) },
		"bolt": func() ipam.Store {
			db, err := bbolt.Open(filepath.Join(b.TempDir(), "db"), 0o600, nil)
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { db.Close() })
			s, err := store.New(store.NewFile(db), "leases")
			if err != nil {
				b.Fatal(err)
			}
			return s
		},
	} {
		b.Run(name, func(b *testing.B) {
			p, err := ipam.NewPool(b.Context(), ipam.PoolConfig{Name: "n", Prefix: netip.MustParsePrefix("10.88.0.0/16"), Store: s()})
			if err != nil {
				b.Fatal(err)
			}
			for i := range b.N {
				if _, err := p.Lease(b.Context(), ipam.Request{Attachment: fmt.Sprint(i), MAC: wire.MAC{2, 0, 0, 0, byte(i >> 8), byte(i)}}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
