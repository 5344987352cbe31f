package store

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"sync/atomic"

	"go.etcd.io/bbolt"
)

// File is a bbolt database whose writers share transactions. Everybody who writes to one database uses the same File. It is safe for concurrent use.
type File struct {
	db atomic.Pointer[bbolt.DB]

	mu     sync.Mutex
	queue  []*change
	commit sync.Mutex // of a transaction from its begin to the disk; who waits for it finds its own change done, or takes all that queued up meanwhile
}

// NewFile makes one of a database that the caller has opened, and closes.
func NewFile(db *bbolt.DB) *File {
	f := &File{}
	f.db.Store(db)
	return f
}

// DB is the database, for those who read. Who writes with it waits for the other writers, and shares nothing.
func (f *File) DB() *bbolt.DB { return f.db.Load() }

// Use goes on with db, the same file opened again.
func (f *File) Use(db *bbolt.DB) { f.db.Store(db) }

// change is one writing, on its way to the disk.
type change struct {
	ctx   context.Context
	do    func(tx *bbolt.Tx) error
	taken bool // into a transaction, which is over when File.commit is free
	err   error
}

// errUnwritten is what a change has until its transaction is on disk.
var errUnwritten = errors.New("the transaction did not end")

// Write runs do in a transaction that is on disk when it returns, and returns do's error or the transaction's. It blocks on the disk; ctx is looked at when the transaction begins.
// do must check everything before it writes: when it fails, the others of its transaction are kept, and what it wrote with them.
func (f *File) Write(ctx context.Context, do func(tx *bbolt.Tx) error) error {
	c := &change{ctx: ctx, do: do, err: errUnwritten}
	f.mu.Lock()
	f.queue = append(f.queue, c)
	f.mu.Unlock()

	f.commit.Lock()
	defer f.commit.Unlock()
	if !c.taken {
		f.write()
	}
	return c.err
}

// write takes everything that is queued through one transaction. f.commit is held.
func (f *File) write() {
	f.mu.Lock()
	batch := f.queue
	f.queue = nil
	f.mu.Unlock()
	for _, c := range batch {
		c.taken = true
	}
	errs := make([]error, len(batch))
	err := f.db.Load().Update(func(tx *bbolt.Tx) error {
		for i, c := range batch {
			if errs[i] = c.ctx.Err(); errs[i] == nil {
				errs[i] = c.do(tx)
			}
		}
		return nil
	})
	for i, c := range batch {
		c.err = cmp.Or(errs[i], err)
	}
}
