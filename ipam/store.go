package ipam

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"time"

	"patchbay/internal/wire"
)

// ErrConflict is what a Store returns when the record it was asked to change is not the one the caller knows.
var ErrConflict = errors.New("the record was changed by somebody else")

// State is what an address on record is.
type State uint8

// The states. An address without a record was never used, or its record was forgotten.
const (
	Leased   State = iota // held by Record.Attachment
	Released              // given back, or run out, at Record.Since
	Declined              // somebody else was seen using it (DHCPDECLINE) at Record.Since
)

// String is "leased", "released" or "declined".
func (s State) String() string {
	switch s {
	case Leased:
		return "leased"
	case Released:
		return "released"
	case Declined:
		return "declined"
	}
	return "unknown"
}

// Record is what a Store keeps of one address. It is a plain value and marshals to JSON.
type Record struct {
	Addr       netip.Addr `json:"addr"`
	State      State      `json:"state"`
	Attachment string     `json:"attachment"`         // the holder, or the last one
	MAC        wire.MAC   `json:"mac"`                // the holder's, or zero when nobody said
	Since      time.Time  `json:"since"`              // when it came into State
	Expires    time.Time  `json:"expires,omitzero"`   // the end of a lease with a TTL; zero: until it is released
	Version    int64      `json:"version,omitempty"`  // the Store's: which writing of the record this is; 0: not stored yet
	Static     bool       `json:"static,omitempty"`   // asked for by address
	Hostname   string     `json:"hostname,omitempty"` // what the holder is called, for lists and DHCP
}

// Store keeps the records of pools. It does not judge them: which address goes to whom is the Pool's business.
//
// Every change is a compare-and-swap on one address, which is what one bbolt transaction, or one etcd transaction comparing
// the key's mod revision, can do. A Store is safe for concurrent use; its calls may block on a disk or a network and then heed ctx.
type Store interface {
	// List returns every record of the pool in any order. A pool nobody wrote to has none.
	List(ctx context.Context, pool string) ([]Record, error)
	// Put writes r under r.Addr and returns the version it has from now on, which is never 0 and never one the address had
	// before. It fails with ErrConflict unless the stored record has version r.Version (0: unless there is none).
	Put(ctx context.Context, pool string, r Record) (version int64, err error)
	// Delete removes the record under r.Addr, or fails with ErrConflict unless it has version r.Version.
	Delete(ctx context.Context, pool string, r Record) error
}

// MemStore is a Store in memory. The zero value is ready. It is safe for concurrent use and never blocks or fails otherwise than with ErrConflict.
type MemStore struct {
	mu    sync.Mutex
	seq   int64
	pools map[string]map[netip.Addr]Record
}

// List implements Store.
func (m *MemStore) List(_ context.Context, pool string) ([]Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	rs := make([]Record, 0, len(m.pools[pool]))
	for _, r := range m.pools[pool] {
		rs = append(rs, r)
	}
	return rs, nil
}

// Put implements Store.
func (m *MemStore) Put(_ context.Context, pool string, r Record) (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pools[pool][r.Addr].Version != r.Version {
		return 0, ErrConflict
	}
	if m.pools == nil {
		m.pools = map[string]map[netip.Addr]Record{}
	}
	if m.pools[pool] == nil {
		m.pools[pool] = map[netip.Addr]Record{}
	}
	m.seq++
	r.Version = m.seq
	m.pools[pool][r.Addr] = r
	return r.Version, nil
}

// Delete implements Store.
func (m *MemStore) Delete(_ context.Context, pool string, r Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if old, ok := m.pools[pool][r.Addr]; !ok || old.Version != r.Version {
		return ErrConflict
	}
	delete(m.pools[pool], r.Addr)
	return nil
}

// Drop removes every record of a pool. One that is not there is no error.
func (m *MemStore) Drop(_ context.Context, pool string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.pools, pool)
	return nil
}
