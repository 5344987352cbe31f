package api

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// backlog is how many clients wait to be accepted; the kernel lowers it to net.core.somaxconn.
const backlog = 1024

// Listen makes the node's socket at path: mode 0600 from the first moment, in a directory that is made with mode 0700 when there is none. The socket of a node
// that has died is replaced. A live one is CodeConflict, and names its process. What is no socket stays. Closing the listener removes the socket.
func Listen(path string) (*net.UnixListener, error) {
	return listen(path, "--socket", func(who, path string) error {
		return Errorf(CodeConflict, "use --takeover to replace it, or another --socket", "a node is running already%s at %s", who, path)
	})
}

// ListenStream is Listen for the socket of a virtual machine.
func ListenStream(path string) (*net.UnixListener, error) {
	return listen(path, "--stream", func(who, path string) error {
		return Errorf(CodeConflict, "choose another with --stream", "socket %s: somebody listens there already%s", path, who)
	})
}

// CloseStream closes the listener of a virtual machine and removes its socket, also where another node has made that. What somebody else has put there meanwhile stays.
func CloseStream(l *net.UnixListener) error {
	path := l.Addr().String()
	l.SetUnlinkOnClose(false) // which would not look
	l.Close()
	unlock, err := lockDir(filepath.Dir(path), "--stream")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer unlock()
	if fi, err := os.Lstat(path); err != nil || fi.Mode()&fs.ModeSocket == 0 {
		return nil
	}
	return clearPath(path, "--stream", func(string, string) error { return nil })
}

// listen does the work. flag is what the person can change, live the error for a socket that somebody listens on.
func listen(path, flag string, live func(who, path string) error) (*net.UnixListener, error) {
	path, err := filepath.Abs(path) // a leading @ would be another name space
	if err != nil {
		return nil, fmt.Errorf("socket %q: %w", abbreviate(path), err)
	}
	if err := checkPath("socket", path, maxSocket); err != nil {
		return nil, err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, Errorf(CodeInvalid, "choose a place you can write to with "+flag, "socket %s: %w", path, err)
	}
	unlock, err := lockDir(dir, flag)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := clearPath(path, flag, live); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		// bind(2) gives the file the mode of the socket (net/unix/af_unix.c, unix_bind_bsd), so that it is never open to others, and no umask is meddled with.
		if cerr := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); cerr != nil {
			return cerr
		}
		return err
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, Errorf(CodeInvalid, "choose a place you can write to with "+flag, "socket %s: %w", path, err)
	}
	return l.(*net.UnixListener), nil
}

// lockDir keeps two nodes that start at once from each removing the other's socket. It refuses a directory in which others could put a socket of theirs.
func lockDir(dir, flag string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, Errorf(CodeInvalid, "choose a directory of yours with "+flag, "socket: %w", err)
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	fi, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	st := fi.Sys().(*syscall.Stat_t)
	foreign := st.Uid != 0 && int(st.Uid) != os.Geteuid()
	if foreign || fi.Mode()&fs.ModeSticky == 0 && fi.Mode().Perm()&0o002 != 0 {
		return nil, Errorf(CodeInvalid, "choose a directory of yours with "+flag+", or chmod o-w it", "socket: others could replace what is in %s (%v, owner %s)", dir, fi.Mode(), userName(int(st.Uid)))
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { f.Close() }, nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR), time.Now().After(deadline):
			return nil, Errorf(CodeUnavailable, "try again, or choose another directory with "+flag, "socket: lock %s: %w", dir, err)
		}
	}
}

// clearPath removes a socket that nobody listens on.
func clearPath(path, flag string, live func(who, path string) error) error {
	fi, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return Errorf(CodeInvalid, "choose another with "+flag, "socket: %w", err)
	case fi.Mode()&fs.ModeSocket == 0:
		return Errorf(CodeInvalid, "choose another with "+flag, "socket %s: something that is no socket is there", path)
	}
	c, err := net.DialTimeout("unix", path, 5*time.Second)
	switch {
	case err == nil:
		defer c.Close()
		who := ""
		if p, err := PeerOf(c.(*net.UnixConn)); err == nil && p.PID != 0 {
			who = fmt.Sprintf(" (pid %d)", p.PID)
		}
		return live(who, path)
	case !errors.Is(err, unix.ECONNREFUSED):
		return Errorf(CodeConflict, "choose another with "+flag, "socket %s is in use, or another user's: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return Errorf(CodeInvalid, "remove it, or choose another with "+flag, "socket of a node that has died: %w", err)
	}
	return nil
}

// Handover is a duplicate of l's descriptor for the next node, which passes it to ListenFD or ListenFile. It is the caller's. From then on closing l leaves the socket where it is. (A duplicate from
// l.File would not do: asking an os.File for its descriptor makes the socket blocking, in both processes.)
func Handover(l *net.UnixListener) (fd int, err error) {
	rc, err := l.SyscallConn()
	if err == nil {
		if cerr := rc.Control(func(own uintptr) { fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 3) }); cerr != nil {
			err = cerr
		}
	}
	if err != nil {
		return -1, fmt.Errorf("socket %s: %w", l.Addr(), err)
	}
	l.SetUnlinkOnClose(false)
	return fd, nil
}

// socket is a listener that may be closed while its file changes hands: a takeover that fails makes the file this node's own again, also when the node is ending just then. net.UnixListener leaves that
// to its caller.
type socket struct {
	*net.UnixListener
	mu sync.Mutex
}

func (s *socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.UnixListener.Close()
}

func (s *socket) SetUnlinkOnClose(unlink bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.UnixListener.SetUnlinkOnClose(unlink)
}

// handOver is Handover.
func (s *socket) handOver() (fd int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Handover(s.UnixListener)
}

// ListenFile makes a listener of one that another node has handed over. f stays the caller's. Closing the listener leaves the socket where it is, for the next Listen to replace.
func ListenFile(f *os.File) (*net.UnixListener, error) {
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("socket handed over: %w", err)
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("socket handed over: %s is no unix socket", l.Addr())
	}
	u.SetUnlinkOnClose(false)
	rc, err := u.SyscallConn()
	if err == nil {
		// Once more, so that SO_PEERCRED tells clients of this process and not of the one that made the socket.
		if cerr := rc.Control(func(fd uintptr) { err = unix.Listen(int(fd), backlog) }); cerr != nil {
			err = cerr
		}
	}
	if err != nil {
		u.Close()
		return nil, fmt.Errorf("socket handed over: %w", err)
	}
	return u, nil
}

// PeerOf asks the kernel who is at the other end of c (SO_PEERCRED): for a client the process that listens, for a server the one that connected. PID is 0 for a
// process of a PID namespace that this one cannot see.
func PeerOf(c *net.UnixConn) (Caller, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return Caller{}, err
	}
	var cred *unix.Ucred
	if cerr := rc.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil {
		err = cerr
	}
	if err != nil {
		return Caller{}, fmt.Errorf("SO_PEERCRED: %w", err)
	}
	return Caller{PID: int(cred.Pid), UID: int(cred.Uid)}, nil
}

// Admit is nil when the process at the other end of c is the node's own user's, or root's.
func Admit(c *net.UnixConn) error {
	p, err := PeerOf(c)
	if err != nil {
		return err
	}
	return checkPeer(p, os.Getuid())
}

// checkPeer lets the node's own user and root in.
func checkPeer(p Caller, self int) error {
	if p.UID == self || p.UID == 0 {
		return nil
	}
	return Errorf(CodeForbidden, "run a daemon of your own", "user %s may not use %s's node", userName(p.UID), bareUserName(self))
}

// userName is "bob (uid 1002)", or "with uid 1002" when it has no name.
func userName(uid int) string {
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return fmt.Sprintf("%s (uid %d)", u.Username, uid)
	}
	return fmt.Sprintf("with uid %d", uid)
}

func bareUserName(uid int) string {
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return u.Username
	}
	return fmt.Sprintf("uid %d", uid)
}
