package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Why a namespace could not be had. Each is in the chain of the error that Open and its kin return.
var (
	ErrNoProcess    = errors.New("there is no such process")
	ErrNotPermitted = errors.New("not permitted")
	ErrNotNetNS     = errors.New("not a network namespace")
)

// NamedDir is where `ip netns add` keeps named namespaces.
const NamedDir = "/run/netns"

// ID identifies a namespace on this machine for as long as it exists. It is comparable.
type ID struct {
	Dev, Ino uint64
}

// Handle is an open network namespace.
type Handle struct {
	fd  int
	ref string
}

// Open opens what a user may write on a command line: a process id (1234), a path (anything with a slash), or else a name
// that `ip netns` knows.
func Open(ref string) (*Handle, error) {
	if pid, err := strconv.Atoi(ref); err == nil {
		return OpenPID(pid)
	}
	if strings.Contains(ref, "/") {
		return OpenPath(ref)
	}
	return OpenName(ref)
}

// OpenPID opens the network namespace a process is in.
func OpenPID(pid int) (*Handle, error) {
	what := fmt.Sprintf("network namespace of process %d", pid)
	if pid <= 0 {
		return nil, fmt.Errorf("%s: %w: give the id of a running process", what, ErrNoProcess)
	}
	h, err := netns.GetFromPid(pid)
	if err != nil {
		return nil, explainPID(what, pid, err)
	}
	return &Handle{fd: int(h), ref: strconv.Itoa(pid)}, nil
}

// OpenName opens a namespace made by `ip netns add`.
func OpenName(name string) (*Handle, error) {
	what := fmt.Sprintf("network namespace %q", name)
	if name == "" || name == "." || name == ".." || filepath.Base(name) != name {
		return nil, fmt.Errorf("%s: %w: a name is one path element of %s", what, ErrNotNetNS, NamedDir)
	}
	h, err := OpenPath(filepath.Join(NamedDir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w: see `ip netns list`, or give a process id or a path", what, fs.ErrNotExist)
	}
	if err != nil {
		return nil, err
	}
	h.ref = name
	return h, nil
}

// OpenPath opens a namespace file: /proc/PID/ns/net, or what such a file was bind-mounted on.
func OpenPath(path string) (*Handle, error) {
	what := fmt.Sprintf("network namespace %s", path)
	// A FIFO in its place would keep an ordinary open waiting.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		switch {
		case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
			return nil, fmt.Errorf("%s: %w: %w: open it as the user it belongs to", what, ErrNotPermitted, err)
		case errors.Is(err, fs.ErrNotExist) && filepath.Dir(path) == NamedDir:
			return nil, fmt.Errorf("%s: %w: see `ip netns list`, or give a process id or a path", what, err)
		case errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("%s: %w: has its process ended?", what, err)
		}
		return nil, fmt.Errorf("%s: %w: give /proc/PID/ns/net or a file that it is mounted on", what, err)
	}
	if err := checkType(fd, unix.CLONE_NEWNET); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return &Handle{fd: fd, ref: path}, nil
}

// FromFD makes a Handle of a descriptor, for instance one that came over a unix socket. It duplicates fd, which stays the caller's.
func FromFD(fd int) (*Handle, error) {
	what := fmt.Sprintf("network namespace behind descriptor %d", fd)
	if err := checkType(fd, unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	nfd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return &Handle{fd: nfd, ref: fmt.Sprintf("fd %d", fd)}, nil
}

// Current opens the namespace of the calling thread.
func Current() (*Handle, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	h, err := netns.Get()
	if err != nil {
		return nil, fmt.Errorf("own network namespace: %w: is /proc mounted?", err)
	}
	return &Handle{fd: int(h), ref: "own"}, nil
}

// New makes a network namespace with nothing in it but a loopback interface that is down. The caller stays where it is. It needs
// CAP_SYS_ADMIN in the present user namespace.
func New() (*Handle, error) {
	back, err := lockThread()
	if err != nil {
		return nil, err
	}
	defer back()
	h, err := netns.New()
	if err != nil {
		remedy := ""
		switch {
		case errors.Is(err, unix.EPERM):
			remedy = ": needs CAP_SYS_ADMIN; make it inside a user namespace"
		case errors.Is(err, unix.ENOSPC):
			remedy = ": raise the sysctl user.max_net_namespaces"
		case errors.Is(err, unix.EINVAL):
			remedy = ": the kernel has no network namespaces (CONFIG_NET_NS)"
		}
		return nil, fmt.Errorf("create a network namespace: %w%s", err, remedy)
	}
	return &Handle{fd: int(h), ref: "new"}, nil
}

// FD is the descriptor; it belongs to h.
func (h *Handle) FD() int { return h.fd }

// String is what the Handle was opened with.
func (h *Handle) String() string { return h.ref }

// ID identifies the namespace: two Handles with equal IDs are the same namespace.
func (h *Handle) ID() (ID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(h.fd, &st); err != nil {
		return ID{}, fmt.Errorf("network namespace %s: %w", h.ref, err)
	}
	return ID{Dev: st.Dev, Ino: st.Ino}, nil
}

// Close gives the descriptor back. Idempotent.
func (h *Handle) Close() error {
	if h.fd < 0 {
		return nil
	}
	fd := h.fd
	h.fd = -1
	if err := unix.Close(fd); err != nil {
		return fmt.Errorf("close network namespace %s: %w", h.ref, err)
	}
	return nil
}

// Do calls f on the calling goroutine with its thread inside the namespace and returns f's error, or the reason why it could not
// go there. Goroutines that f starts are outside. Do may be nested. When f panics the thread is moved back all the same.
func (h *Handle) Do(f func() error) error {
	back, err := lockThread()
	if err != nil {
		return err
	}
	defer back()
	if err := netns.Set(netns.NsHandle(h.fd)); err != nil {
		if errors.Is(err, unix.EPERM) {
			return fmt.Errorf("enter network namespace %s: %w: %w: it needs CAP_SYS_ADMIN over it; enter the user namespace that owns it first",
				h.ref, ErrNotPermitted, err)
		}
		return fmt.Errorf("enter network namespace %s: %w", h.ref, err)
	}
	return f()
}

// lockThread binds the goroutine to its thread. back returns the thread to its present namespace and releases it; a
// thread that cannot return stays locked, so that it ends with its goroutine and taints no other.
func lockThread() (back func(), err error) {
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("own network namespace: %w: is /proc mounted?", err)
	}
	return func() {
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
		_ = home.Close()
	}, nil
}

// checkType makes sure that fd is a namespace of the given CLONE_NEW type.
func checkType(fd, want int) error {
	got, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	switch {
	case errors.Is(err, unix.EBADF):
		return err
	case err != nil:
		return fmt.Errorf("%w: it is an ordinary file: give /proc/PID/ns/net or a file that it is mounted on", ErrNotNetNS)
	case got != want:
		return fmt.Errorf("%w: it is a %s namespace", ErrNotNetNS, nsNames[got])
	}
	return nil
}

var nsNames = map[int]string{
	unix.CLONE_NEWCGROUP: "cgroup", unix.CLONE_NEWIPC: "ipc", unix.CLONE_NEWNET: "network", unix.CLONE_NEWNS: "mount",
	unix.CLONE_NEWPID: "pid", unix.CLONE_NEWTIME: "time", unix.CLONE_NEWUSER: "user", unix.CLONE_NEWUTS: "uts",
}

// explainPID says why a file below /proc/PID/ns could not be opened.
func explainPID(what string, pid int, err error) error {
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s: %w: %w: the process belongs to another user, or has rights that you lack; run as its user", what, ErrNotPermitted, err)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH):
		if _, serr := os.Stat("/proc/self/ns"); serr != nil {
			return fmt.Errorf("%s: %w: mount /proc first", what, err)
		}
		if _, serr := os.Stat(fmt.Sprintf("/proc/%d", pid)); serr == nil {
			return fmt.Errorf("%s: %w: it has ended and waits for its parent", what, ErrNoProcess)
		}
		return fmt.Errorf("%s: %w: it has ended, or lives in another PID namespace", what, ErrNoProcess)
	}
	return fmt.Errorf("%s: %w", what, err)
}
