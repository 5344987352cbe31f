package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"patchbay/ipam"
)

// Bolt is an ipam.Store in a bbolt file.
type Bolt struct {
	file   *File
	bucket []byte
}

var _ ipam.Store = (*Bolt)(nil)

// New keeps pools in the bucket of that name, which is made if it is not there.
func New(file *File, bucket string) (*Bolt, error) {
	b := &Bolt{file: file, bucket: []byte(bucket)}
	err := file.DB().Update(func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(b.bucket)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("leases: bucket %q: %w", bucket, err)
	}
	return b, nil
}

// List implements ipam.Store. A record that cannot be read is an error that names its pool and address.
func (b *Bolt) List(ctx context.Context, pool string) (rs []ipam.Record, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	err = b.file.DB().View(func(tx *bbolt.Tx) error {
		p := tx.Bucket(b.bucket).Bucket([]byte(pool))
		if p == nil {
			return nil
		}
		return p.ForEach(func(k, v []byte) error {
			r, err := decode(pool, k, v)
			rs = append(rs, r)
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	return rs, nil
}

func decode(pool string, k, v []byte) (ipam.Record, error) {
	var r ipam.Record
	a, ok := netip.AddrFromSlice(k)
	if err := json.Unmarshal(v, &r); err != nil {
		return r, fmt.Errorf("pool %s: record %s is damaged: %w; move the state file away and addresses are given anew", pool, a, err)
	}
	if !ok || r.Addr != a {
		return r, fmt.Errorf("pool %s: record %x is of %s: it is damaged; move the state file away and addresses are given anew", pool, k, r.Addr)
	}
	return r, nil
}

// Put implements ipam.Store.
func (b *Bolt) Put(ctx context.Context, pool string, r ipam.Record) (version int64, err error) {
	err = b.change(ctx, func(outer *bbolt.Bucket) error {
		p, err := outer.CreateBucketIfNotExists([]byte(pool))
		if err != nil {
			return err
		}
		if err := match(p, pool, r); err != nil {
			return err
		}
		seq, err := outer.NextSequence()
		if err != nil {
			return err
		}
		w := r
		w.Version = int64(seq)
		v, err := json.Marshal(w)
		if err != nil {
			return err
		}
		version = w.Version
		return p.Put(r.Addr.AsSlice(), v)
	})
	if err != nil {
		return 0, err
	}
	return version, nil
}

// match reports ErrConflict unless the stored record is the one the caller knows.
func match(p *bbolt.Bucket, pool string, r ipam.Record) error {
	var stored int64
	k := r.Addr.AsSlice()
	if v := p.Get(k); v != nil {
		old, err := decode(pool, k, v)
		if err != nil {
			return err
		}
		stored = old.Version
	}
	if stored != r.Version {
		return ipam.ErrConflict
	}
	return nil
}

// Delete implements ipam.Store.
func (b *Bolt) Delete(ctx context.Context, pool string, r ipam.Record) error {
	return b.change(ctx, func(outer *bbolt.Bucket) error {
		p := outer.Bucket([]byte(pool))
		if p == nil || r.Version == 0 {
			return ipam.ErrConflict
		}
		if err := match(p, pool, r); err != nil {
			return err
		}
		return p.Delete(r.Addr.AsSlice())
	})
}

// Drop removes every record of a pool. One that is not there is no error.
func (b *Bolt) Drop(ctx context.Context, pool string) error {
	return b.change(ctx, func(outer *bbolt.Bucket) error {
		if err := outer.DeleteBucket([]byte(pool)); !errors.Is(err, bolterrors.ErrBucketNotFound) {
			return err
		}
		return nil
	})
}

// change runs f in a transaction that is on disk when it returns.
func (b *Bolt) change(ctx context.Context, f func(outer *bbolt.Bucket) error) error {
	err := b.file.Write(ctx, func(tx *bbolt.Tx) error { return f(tx.Bucket(b.bucket)) })
	if err != nil && !errors.Is(err, ipam.ErrConflict) {
		return fmt.Errorf("leases: %w", err)
	}
	return err
}
