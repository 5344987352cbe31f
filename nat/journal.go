package nat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Journal is a file that knows which TCP flows live, so that whoever comes after a crash can end them: containers that wait for bytes on a connection nobody
// carries any more would wait for hours. Flows are noted with stores into a shared mapping, which the kernel keeps when the process is killed;
// there is no system call for a flow, and nothing is synced, since a crash of the machine ends the containers too.
//
// The file is a header and slots of 48 bytes. The last word of a slot is a check of the others, stored last and cleared first: a slot
// whose check is wrong was being written when its process died, and is free.
//
// Each process has a file of its own in the directory and holds a lock on it (flock). A file whose lock can be had belonged to a process that is gone: its flows are orphans,
// and are copied to the new owner's file before the old one is removed, so that they are not lost when that one dies early as well.
//
// A Journal serves one NAT. Open it before New and close it after NAT.Close. Safe for concurrent use.
type Journal struct {
	dir string

	mu      sync.Mutex
	file    *os.File
	mem     []byte
	slots   []journalSlot
	free    []int32 // indices, taken from the end
	frozen  bool
	others  bool // another process that lives has a file here
	orphans map[netip.Addr]orphanage

	unjournaled atomic.Uint64
}

// journalSlot is one flow: container and peer address, as 16 bytes each, ports, and the check; 0 for a free one. Words are of the machine's byte order.
type journalSlot [6]uint64

// orphanage holds the slots of one container's orphans.
type orphanage struct {
	slots []int32
	since time.Time
}

// orphan is a flow whose process is gone.
type orphan struct {
	slot            int32
	container, peer netip.AddrPort
}

const (
	journalMagic  = "pbflows1"
	journalHeader = 64 // bytes
	journalPrefix = "flows-"
	// DefaultJournalSlots has room for every flow that the default Limits allow, in 1.5 MiB.
	DefaultJournalSlots = 1 << 15
	maxJournalSlots     = 1 << 22
	// orphanTTL is how long orphans of an address that is not plugged again are kept.
	orphanTTL = time.Hour
)

// OpenJournal makes a journal of that many slots, DefaultJournalSlots for 0, in dir, which is made if it is not there, and takes over the flows of processes that are gone.
// The directory must belong to this user and be writable by nobody else. It is for one NAT: give each network its own. It reads and writes files and waits
// for other processes that are in the same call.
func OpenJournal(dir string, slots int) (*Journal, error) {
	if slots == 0 {
		slots = DefaultJournalSlots
	}
	if slots < 1 || slots > maxJournalSlots {
		return nil, fmt.Errorf("flow journal %s: %d slots; give 1 to %d", dir, slots, maxJournalSlots)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("flow journal: %w", err)
	}
	lock, err := lockJournalDir(dir)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	j := &Journal{dir: dir, orphans: make(map[netip.Addr]orphanage)}
	if err := j.create(slots); err != nil {
		return nil, fmt.Errorf("flow journal %s: %w", dir, err)
	}
	if err := j.adopt(time.Now()); err != nil {
		j.Close()
		return nil, fmt.Errorf("flow journal %s: %w", dir, err)
	}
	return j, nil
}

// lockJournalDir keeps other processes from making and adopting files there until the result is closed.
func lockJournalDir(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("flow journal %s: %w; give a directory", dir, err)
	}
	f := os.NewFile(uintptr(fd), dir)
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	switch {
	case err != nil:
	case int(st.Uid) != os.Geteuid():
		err = fmt.Errorf("it belongs to uid %d and this is uid %d; remove it or give another directory", st.Uid, os.Geteuid())
	case st.Mode&0o022 != 0:
		err = fmt.Errorf("others may write to it (mode %#o); run: chmod 700 %s", st.Mode&0o7777, dir)
	default:
		err = flock(fd, unix.LOCK_EX)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("flow journal %s: %w", dir, err)
	}
	return f, nil
}

func flock(fd, how int) error {
	for {
		if err := unix.Flock(fd, how); err != unix.EINTR {
			return err
		}
	}
}

// create makes this process's file. The directory is locked.
func (j *Journal) create(slots int) error {
	for n := 0; ; n++ {
		name := filepath.Join(j.dir, fmt.Sprintf("%s%d-%d", journalPrefix, os.Getpid(), n))
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			return err
		}
		size := journalHeader + slots*int(unsafe.Sizeof(journalSlot{}))
		err = flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			// All of it now: a store into a hole that a full disk cannot fill would be a SIGBUS.
			if err = unix.Fallocate(int(f.Fd()), 0, 0, int64(size)); errors.Is(err, unix.EOPNOTSUPP) {
				_, err = f.WriteAt(make([]byte, size), 0)
			}
		}
		if err == nil {
			j.mem, err = unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		}
		if err != nil {
			f.Close()
			return errors.Join(err, os.Remove(name))
		}
		j.file = f
		binary.LittleEndian.PutUint64(j.mem[8:], uint64(slots))
		copy(j.mem, journalMagic)
		j.slots = unsafe.Slice((*journalSlot)(unsafe.Pointer(&j.mem[journalHeader])), slots)
		j.free = make([]int32, slots)
		for i := range j.free {
			j.free[i] = int32(slots - 1 - i)
		}
		return nil
	}
}

// adopt takes over the files of processes that are gone. The directory is locked.
func (j *Journal) adopt(now time.Time) error {
	names, err := filepath.Glob(filepath.Join(j.dir, journalPrefix+"*"))
	if err != nil {
		return err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.frozen { // meanwhile: what is not taken over now is the next process's
		return nil
	}
	j.others = false
	for _, name := range names {
		if name == j.file.Name() {
			continue
		}
		f, err := os.OpenFile(name, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		err = flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			err = j.inherit(f, now)
			if err == nil {
				err = os.Remove(name)
			}
		} else if errors.Is(err, unix.EWOULDBLOCK) {
			j.others, err = true, nil
		}
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// inherit copies the flows in f to slots of j's own, as many as there is room for. What is not a journal has none. j.mu is held.
func (j *Journal) inherit(f *os.File, now time.Time) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("%s is not a regular file of uid %d; remove it", f.Name(), os.Geteuid())
	}
	if st.Size > journalHeader+maxJournalSlots*int64(unsafe.Sizeof(journalSlot{})) {
		return nil
	}
	b := make([]byte, st.Size)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return err
	}
	for _, o := range parseJournal(b) {
		i := j.note(o.container, o.peer)
		if i < 0 {
			j.unjournaled.Add(1)
			continue
		}
		g := j.orphans[o.container.Addr()]
		j.orphans[o.container.Addr()] = orphanage{slots: append(g.slots, i), since: now}
	}
	return nil
}

// parseJournal finds the flows in a journal file; torn slots and what is not a journal have none.
func parseJournal(b []byte) (os []orphan) {
	if len(b) < journalHeader || string(b[:len(journalMagic)]) != journalMagic {
		return nil
	}
	size := int(unsafe.Sizeof(journalSlot{}))
	for b = b[journalHeader:]; len(b) >= size; b = b[size:] {
		var s journalSlot
		for i := range s {
			s[i] = binary.NativeEndian.Uint64(b[8*i:])
		}
		if s[5] == 0 || s[5] != s.check() {
			continue
		}
		o := orphan{container: getAddr(s[0], s[1], s[4]>>16), peer: getAddr(s[2], s[3], s[4])}
		if o.container.Addr().Is4() == o.peer.Addr().Is4() && o.container.Port() != 0 && o.peer.Port() != 0 {
			os = append(os, o)
		}
	}
	return os
}

// check is never 0. It need not resist malice: who can write the file has the user's rights already.
func (s *journalSlot) check() uint64 {
	h := uint64(0x9e3779b97f4a7c15)
	for _, w := range s[:5] {
		h = (h ^ w) * 0xff51afd7ed558ccd
		h ^= h >> 32
	}
	return h | 1
}

func putAddr(a netip.Addr) (hi, lo uint64) {
	b := a.As16()
	return binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
}

func getAddr(hi, lo, port uint64) netip.AddrPort {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], hi)
	binary.BigEndian.PutUint64(b[8:], lo)
	return netip.AddrPortFrom(netip.AddrFrom16(b).Unmap(), uint16(port))
}

// put notes a flow and returns its slot, or -1 when there is none: the flow goes on without. A nil Journal has none.
func (j *Journal) put(container, peer netip.AddrPort, now time.Time) int32 {
	if j == nil {
		return -1
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.free) == 0 {
		j.expire(now)
	}
	i := j.note(container, peer)
	if i < 0 {
		j.unjournaled.Add(1)
	}
	return i
}

// note fills a free slot; -1 when there is none. j.mu is held.
func (j *Journal) note(container, peer netip.AddrPort) int32 {
	n := len(j.free)
	if n == 0 || j.frozen {
		return -1
	}
	i := j.free[n-1]
	j.free = j.free[:n-1]
	s := &j.slots[i]
	s[0], s[1] = putAddr(container.Addr())
	s[2], s[3] = putAddr(peer.Addr())
	s[4] = uint64(container.Port())<<16 | uint64(peer.Port())
	atomic.StoreUint64(&s[5], s.check()) // behind the others
	return i
}

// remove frees a slot that put returned; -1 is none.
func (j *Journal) remove(i int32) {
	if j == nil || i < 0 {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.clear(i)
}

// clear frees slot i. j.mu is held.
func (j *Journal) clear(i int32) {
	if j.frozen {
		return
	}
	atomic.StoreUint64(&j.slots[i][5], 0)
	j.free = append(j.free, i)
}

// take gives the orphans of container address a to the caller, who removes their slots when they are dealt with.
func (j *Journal) take(a netip.Addr, now time.Time) ([]orphan, error) {
	if j == nil {
		return nil, nil
	}
	_, err := j.refresh(now)
	j.mu.Lock()
	defer j.mu.Unlock()
	j.expire(now)
	if j.frozen {
		return nil, err
	}
	var os []orphan
	for _, i := range j.orphans[a].slots {
		s := &j.slots[i]
		os = append(os, orphan{slot: i, container: getAddr(s[0], s[1], s[4]>>16), peer: getAddr(s[2], s[3], s[4])})
	}
	delete(j.orphans, a)
	return os, err
}

// Refresh takes over the flows of processes that lived when the directory was last looked at and have ended since; NAT.ResetOrphans does so too. It reports whether there is
// another process left that lives. It may wait for other processes that are in OpenJournal. A nil Journal has none.
func (j *Journal) Refresh() (left bool, err error) {
	if j == nil {
		return false, nil
	}
	return j.refresh(time.Now())
}

func (j *Journal) refresh(now time.Time) (left bool, err error) {
	j.mu.Lock()
	look := j.others && !j.frozen
	j.mu.Unlock()
	if !look {
		return false, nil
	}
	lock, err := lockJournalDir(j.dir)
	if err != nil {
		return true, err
	}
	defer lock.Close()
	err = j.adopt(now)
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.others && !j.frozen, err
}

// expire drops orphans that nobody has come back for. j.mu is held.
func (j *Journal) expire(now time.Time) {
	for a, o := range j.orphans {
		if now.Sub(o.since) > orphanTTL {
			j.drop(a)
		}
	}
}

// forget drops the orphans of container address a.
func (j *Journal) forget(a netip.Addr) {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.drop(a)
}

// drop is forget with j.mu held.
func (j *Journal) drop(a netip.Addr) {
	for _, i := range j.orphans[a].slots {
		j.clear(i)
	}
	delete(j.orphans, a)
}

// waiting is how many orphans wait for their container.
func (j *Journal) waiting() (n int) {
	if j == nil {
		return 0
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, o := range j.orphans {
		n += len(o.slots)
	}
	return n
}

// lost is how many flows found no slot.
func (j *Journal) lost() uint64 {
	if j == nil {
		return 0
	}
	return j.unjournaled.Load()
}

// Freeze leaves the journal as it is: flows that end from now on stay in it, and the next process ends them for the container. It is for a NAT whose network no
// longer carries its resets, such as one whose TAPs another process has: call it before NAT.Close. Idempotent.
func (j *Journal) Freeze() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.frozen = true
}

// Close frees the file for the next process, and removes it when no flow is in it. Idempotent.
func (j *Journal) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.file == nil {
		return nil
	}
	empty := len(j.free) == len(j.slots)
	j.frozen = true
	var err error
	if empty {
		err = os.Remove(j.file.Name())
	}
	err = errors.Join(err, unix.Munmap(j.mem), j.file.Close())
	j.file, j.mem, j.slots, j.free, j.orphans = nil, nil, nil, nil, nil
	if err != nil {
		return fmt.Errorf("flow journal %s: %w", strings.TrimSuffix(j.dir, "/"), err)
	}
	return nil
}
