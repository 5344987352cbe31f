package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"patchbay/internal/api"
	"patchbay/internal/netns"
	"patchbay/internal/wire"
	"patchbay/ipam/store"
	"patchbay/tap"
)

// Buckets of the state file. leaseBucket is ipam/store's.
var (
	networkBucket    = []byte("networks")    // name → networkRecord
	attachmentBucket = []byte("attachments") // network/name → attachmentRecord
	peerBucket       = []byte("peers")       // network/HOST[:PORT] → peerRecord; since version 2
	leaseBucket      = "leases"
	metaBucket       = []byte("meta") // "schema" → version of all of this
	schemaKey        = []byte("schema")
)

// schema is the version of the records below. A file of a later one is refused; one of an earlier one becomes this one. Version 2 has peers.
const schema = 2

// networkRecord is a network on disk: every default is settled.
type networkRecord struct {
	api.NetworkSpec
	AutoMTU    bool // nobody asked for one: it follows the paths of the peers
	ID         string
	GatewayMAC wire.MAC
	Created    time.Time
	Origin     string
}

// attachmentRecord is an attachment on disk.
type attachmentRecord struct {
	api.AttachmentSpec                 // Name, Addrs, MAC and IfName as they are
	Info               tap.Info        // of its device
	Identity           *netns.Identity // of its namespace; LifetimeNamespace
	Holder             *netns.Identity // the client's process; LifetimeSession
	Ports              []publishRecord // instead of AttachmentSpec.Publish
	Created            time.Time
	Notes              []string
}

// publishRecord is one range of published ports.
type publishRecord struct {
	ID     string
	Spec   string
	Origin string
}

// Origins of networks and published ports.
const (
	originAPI    = "api"
	originAttach = "attach"
	originConfig = "config"
)

// state is the file that everything durable is in. A call that writes returns when it is on disk.
type state struct {
	file *store.File // leases are kept in it too, so all who write share one transaction
	path string
}

// lockWait is how long to wait for the file of a node that is just ending.
const lockWait = 2 * time.Second

// openState opens or makes the file in dir.
func openState(dir string) (*state, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory %s: %w; name one that you may write with --state-dir", dir, err)
	}
	if err := checkOwn(dir); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "state.db")
	s := &state{file: store.NewFile(nil), path: path}
	if err := s.open(); err != nil {
		return nil, err
	}
	return s, nil
}

// checkOwn refuses a directory in which somebody else could put a state of his.
func checkOwn(dir string) error {
	fi, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() || fi.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("state directory %s is another user's, or others may write to it (%v); name one of your own with --state-dir, or chmod go-w it", dir, fi.Mode())
	}
	return nil
}

// open opens the file, again after close.
func (s *state) open() error {
	path := s.path
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockWait, FreelistType: bbolt.FreelistMapType})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return fmt.Errorf("state file %s is in use by another node; stop it, or give this one a --state-dir of its own", path)
	case err != nil:
		return fmt.Errorf("state file %s: %w; if it is damaged, move it away and networks start anew", path, err)
	}
	s.file.Use(db)
	if err := s.prepare(); err != nil {
		db.Close()
		return err
	}
	return nil
}

// prepare makes the buckets and checks the version.
func (s *state) prepare() error {
	return s.file.DB().Update(func(tx *bbolt.Tx) error {
		for _, b := range [][]byte{networkBucket, attachmentBucket, peerBucket, metaBucket} {
			if _, err := tx.CreateBucketIfNotExists(b); err != nil {
				return fmt.Errorf("state file %s: %w", s.path, err)
			}
		}
		meta := tx.Bucket(metaBucket)
		var v int
		if b := meta.Get(schemaKey); b != nil {
			if err := json.Unmarshal(b, &v); err != nil {
				return fmt.Errorf("state file %s: version %q: %w", s.path, b, err)
			}
		}
		if v > schema {
			return fmt.Errorf("state file %s is of a later patchbay (version %d, this one knows %d); run that one, or give this one a --state-dir of its own", s.path, v, schema)
		}
		b, err := json.Marshal(schema)
		if err != nil {
			return err
		}
		return meta.Put(schemaKey, b)
	})
}

func (s *state) close() error { return s.file.DB().Close() }

func attachmentKey(network, name string) string { return network + "/" + name }

// put writes one record.
func (s *state) put(bucket []byte, key string, rec any) error {
	b, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("state of %q: %w", key, err)
	}
	if err := s.file.Write(context.Background(), func(tx *bbolt.Tx) error { return tx.Bucket(bucket).Put([]byte(key), b) }); err != nil {
		return fmt.Errorf("state file %s: write %q: %w; is the disk full?", s.path, key, err)
	}
	return nil
}

// remove deletes one record. One that is not there is no error.
func (s *state) remove(bucket []byte, key string) error {
	if err := s.file.Write(context.Background(), func(tx *bbolt.Tx) error { return tx.Bucket(bucket).Delete([]byte(key)) }); err != nil {
		return fmt.Errorf("state file %s: delete %q: %w; is the disk full?", s.path, key, err)
	}
	return nil
}

// removeNetwork deletes a network and its peers in one.
func (s *state) removeNetwork(name string) error {
	err := s.file.Write(context.Background(), func(tx *bbolt.Tx) error {
		c := tx.Bucket(peerBucket).Cursor()
		prefix := []byte(name + "/")
		var keys [][]byte
		for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, _ = c.Next() {
			keys = append(keys, bytes.Clone(k))
		}
		for _, k := range keys {
			if err := tx.Bucket(peerBucket).Delete(k); err != nil {
				return err
			}
		}
		return tx.Bucket(networkBucket).Delete([]byte(name))
	})
	if err != nil {
		return fmt.Errorf("state file %s: delete %q: %w; is the disk full?", s.path, name, err)
	}
	return nil
}

// loadPeers reads the peers, by network name.
func (s *state) loadPeers() (map[string][]peerRecord, error) {
	peers := make(map[string][]peerRecord)
	err := s.file.DB().View(func(tx *bbolt.Tx) error {
		return tx.Bucket(peerBucket).ForEach(func(k, v []byte) error {
			var r peerRecord
			if err := json.Unmarshal(v, &r); err != nil {
				return fmt.Errorf("peer %q: %w", k, err)
			}
			peers[r.Network] = append(peers[r.Network], r)
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("state file %s: %w; if it is damaged, move it away and networks start anew", s.path, err)
	}
	return peers, nil
}

// load reads networks and attachments, these by network name.
func (s *state) load() (networks []networkRecord, attachments map[string][]attachmentRecord, err error) {
	attachments = make(map[string][]attachmentRecord)
	err = s.file.DB().View(func(tx *bbolt.Tx) error {
		if err := tx.Bucket(networkBucket).ForEach(func(k, v []byte) error {
			var r networkRecord
			if err := json.Unmarshal(v, &r); err != nil {
				return fmt.Errorf("network %q: %w", k, err)
			}
			networks = append(networks, r)
			return nil
		}); err != nil {
			return err
		}
		return tx.Bucket(attachmentBucket).ForEach(func(k, v []byte) error {
			var r attachmentRecord
			if err := json.Unmarshal(v, &r); err != nil {
				return fmt.Errorf("attachment %q: %w", k, err)
			}
			network := string(k[:len(k)-len(r.Name)-1])
			attachments[network] = append(attachments[network], r)
			return nil
		})
	})
	if err != nil {
		return nil, nil, fmt.Errorf("state file %s: %w; if it is damaged, move it away and networks start anew", s.path, err)
	}
	return networks, attachments, nil
}
