package api

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// SocketEnv is the environment variable that names the node's socket.
const SocketEnv = "PATCHBAY_SOCKET"

// DefaultSocket is the path of the caller's node's socket: $PATCHBAY_SOCKET; of root (uid 0) /run/patchbay/node.sock; of another user
// $XDG_RUNTIME_DIR/patchbay/node.sock, or without that variable /run/user/UID/patchbay/node.sock where /run/user/UID is the user's. Without any of them it is an
// error: a place like /tmp would belong to whoever is there first.
func DefaultSocket() (string, error) {
	return defaultSocket(os.Getenv, os.Getuid(), ownedBy)
}

func defaultSocket(getenv func(string) string, uid int, owned func(dir string, uid int) bool) (string, error) {
	const rest = "patchbay/node.sock"
	if s := getenv(SocketEnv); s != "" {
		return absolute(SocketEnv, s)
	}
	if uid == 0 {
		return filepath.Join("/run", rest), nil
	}
	if d := getenv("XDG_RUNTIME_DIR"); d != "" {
		d, err := absolute("XDG_RUNTIME_DIR", d)
		return filepath.Join(d, rest), err
	}
	dir := fmt.Sprintf("/run/user/%d", uid)
	if !owned(dir, uid) {
		return "", Errorf(CodeInvalid, "set XDG_RUNTIME_DIR to a directory of yours with mode 0700, or give --socket", "socket: XDG_RUNTIME_DIR is not set, and %s is not yours", dir)
	}
	return filepath.Join(dir, rest), nil
}

// ownedBy reports whether dir is a directory that uid owns and nobody else can write to.
func ownedBy(dir string, uid int) bool {
	fi, err := os.Stat(dir)
	if err != nil || !fi.IsDir() || fi.Mode().Perm()&0o022 != 0 {
		return false
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == uid
}

// DefaultStateDir is where the caller's node keeps its state: of root (uid 0) /var/lib/patchbay; of another user $XDG_STATE_HOME/patchbay, or without that variable
// ~/.local/state/patchbay.
func DefaultStateDir() (string, error) { return defaultStateDir(os.Getenv, os.Getuid()) }

func defaultStateDir(getenv func(string) string, uid int) (string, error) {
	if uid == 0 {
		return "/var/lib/patchbay", nil
	}
	if d := getenv("XDG_STATE_HOME"); d != "" {
		d, err := absolute("XDG_STATE_HOME", d)
		return filepath.Join(d, "patchbay"), err
	}
	home := getenv("HOME")
	if home == "" {
		return "", Errorf(CodeInvalid, "set one of them, or give --state-dir", "state: neither XDG_STATE_HOME nor HOME is set")
	}
	home, err := absolute("HOME", home)
	return filepath.Join(home, ".local/state/patchbay"), err
}

// absolute refuses what would be another place in another working directory.
func absolute(variable, path string) (string, error) {
	if !filepath.IsAbs(path) {
		return "", Errorf(CodeInvalid, "set it to an absolute path", "%s=%q is relative", variable, abbreviate(path))
	}
	return path, nil
}
