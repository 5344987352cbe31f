package bypass

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxTasks bounds the threads that a Supervisor remembers, each with two descriptors.
const maxTasks = 64

// task is a thread that connects or listens.
type task struct {
	tid   int
	pidfd int
	proc  *os.File // /proc/TID
	used  uint64
}

// tasks remembers threads, since most that connect do so again. It is for one goroutine.
type tasks struct {
	byTID map[int]*task
	clock uint64
}

// get opens thread tid, or finds it opened.
func (ts *tasks) get(tid int) (*task, error) {
	ts.clock++
	if t := ts.byTID[tid]; t != nil {
		t.used = ts.clock
		return t, nil
	}
	pidfd, err := openThread(tid)
	if err != nil {
		return nil, err
	}
	proc, err := os.Open("/proc/" + strconv.Itoa(tid))
	if err != nil {
		unix.Close(pidfd)
		return nil, err
	}
	if len(ts.byTID) >= maxTasks {
		var oldest *task
		for _, t := range ts.byTID {
			if oldest == nil || t.used < oldest.used {
				oldest = t
			}
		}
		ts.drop(oldest)
	}
	t := &task{tid: tid, pidfd: pidfd, proc: proc, used: ts.clock}
	ts.byTID[tid] = t
	return t, nil
}

func (ts *tasks) drop(t *task) {
	unix.Close(t.pidfd)
	_ = t.proc.Close()
	delete(ts.byTID, t.tid)
}

func (ts *tasks) close() {
	for _, t := range ts.byTID {
		ts.drop(t)
	}
}

// descriptor is a duplicate of a descriptor of thread tid, which is looked up anew if who had that number has ended.
func (ts *tasks) descriptor(tid, fd int) (*task, int, error) {
	t, err := ts.get(tid)
	if err != nil {
		return nil, -1, err
	}
	s, err := unix.PidfdGetfd(t.pidfd, fd, 0)
	if errors.Is(err, unix.ESRCH) {
		ts.drop(t)
		if t, err = ts.get(tid); err != nil {
			return nil, -1, err
		}
		s, err = unix.PidfdGetfd(t.pidfd, fd, 0)
	}
	return t, s, err
}

// openThread is a pidfd of a thread, or of its process before Linux 6.9, which has the same descriptors.
func openThread(tid int) (int, error) {
	fd, err := unix.PidfdOpen(tid, unix.PIDFD_THREAD)
	if !errors.Is(err, unix.EINVAL) {
		return fd, err
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return -1, err
	}
	_, rest, _ := strings.Cut(string(status), "\nTgid:")
	line, _, _ := strings.Cut(rest, "\n")
	tgid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		return -1, err
	}
	return unix.PidfdOpen(tgid, 0)
}

// flags are the open file description's and the descriptor's, O_NONBLOCK and O_CLOEXEC among them.
func (t *task) flags(fd int) (int, error) {
	f, err := unix.Openat(int(t.proc.Fd()), "fdinfo/"+strconv.Itoa(fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(f)
	var buf [256]byte
	n, err := unix.Read(f, buf[:])
	if err != nil {
		return 0, err
	}
	return parseFlags(string(buf[:n]))
}

// parseFlags reads the line "flags:\t02004002" of proc_pid_fdinfo(5).
func parseFlags(info string) (int, error) {
	for line := range strings.Lines(info) {
		if v, ok := strings.CutPrefix(line, "flags:"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(v), 8, 32)
			return int(n), err
		}
	}
	return 0, errors.New("no flags in fdinfo")
}

// maxEpolls bounds the numbers that are remembered and looked at for each connection.
const maxEpolls = 64

// epolls are the numbers under which processes of the container have got their epoll instances, all processes' together: few differ, and a child has its parent's.
type epolls struct {
	numbers []int
	full    bool // there were more: what is watched is not known any more
}

func (e *epolls) add(fd int) {
	for _, n := range e.numbers {
		if n == fd {
			return
		}
	}
	if len(e.numbers) == maxEpolls {
		e.full = true
		return
	}
	e.numbers = append(e.numbers, fd)
}

// watch reports whether one of them watches thread tid's fd.
func (e *epolls) watch(tid, fd int) (bool, error) {
	if e.full {
		return true, nil
	}
	for _, n := range e.numbers {
		slot := kcmpEpollSlot{efd: uint32(n), tfd: uint32(fd)}
		r, _, no := unix.Syscall6(unix.SYS_KCMP, uintptr(tid), uintptr(tid), kcmpEpollTFD, uintptr(fd), uintptr(unsafe.Pointer(&slot)), 0)
		switch no {
		case 0:
			if r == 0 {
				return true, nil
			}
		case unix.ENOENT, unix.EBADF, unix.EINVAL: // not watched; not this process's number; another file there
		default:
			return false, fmt.Errorf("kcmp: %w", no)
		}
	}
	return false, nil
}

// kcmpEpollSlot is struct kcmp_epoll_slot of linux/kcmp.h.
type kcmpEpollSlot struct{ efd, tfd, toff uint32 }

const kcmpEpollTFD = 7 // KCMP_EPOLL_TFD
