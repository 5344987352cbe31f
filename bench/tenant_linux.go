package bench

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// tenantID is the user and group of the tenant: an ordinary user with subordinate ids, for contenders whose set-up wants real ones (newuidmap, getpwuid). Only root can make one; an
// ordinary user's bench has a single user, himself, and lists such contenders as absent.
const tenantID = 61002

// tenantFirst and tenantIDs are the tenant's subordinate ids.
const (
	tenantFirst = 700000
	tenantIDs   = 65536
)

const tenantName = "bench-tenant"

// makeTenant gives the calling goroutine's thread a mount namespace in which the tenant exists and may open /dev/net/tun; the machine's own is left alone. Processes that the goroutine
// starts have it too, and a user namespace of such a process takes the maps, in which every id there is stays what it is. dir is for the files. The goroutine must be locked to its
// thread and never unlock. Takes root.
func makeTenant(dir string) (uids, gids []syscall.SysProcIDMap, err error) {
	if os.Geteuid() != 0 {
		return nil, nil, errors.New("only root can make a user")
	}
	if uids, err = sameIDs("/proc/self/uid_map"); err != nil {
		return nil, nil, err
	}
	if gids, err = sameIDs("/proc/self/gid_map"); err != nil {
		return nil, nil, err
	}
	if err := os.Chmod(dir, 0o711); err != nil { // the way to what is his in there
		return nil, nil, err
	}
	return uids, gids, mountTenant(dir)
}

// mountTenant makes the mount namespace.
func mountTenant(dir string) error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare the mounts: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	for name, line := range map[string]string{
		"passwd": fmt.Sprintf("%s:x:%d:%[2]d::/:/bin/sh", tenantName, tenantID),
		"group":  fmt.Sprintf("%s:x:%d:", tenantName, tenantID),
		"subuid": fmt.Sprintf("%s:%d:%d", tenantName, tenantFirst, tenantIDs),
		"subgid": fmt.Sprintf("%s:%d:%d", tenantName, tenantFirst, tenantIDs),
	} {
		there := filepath.Join("/etc", name)
		b, err := os.ReadFile(there)
		if err != nil {
			return err
		}
		if len(b) > 0 && b[len(b)-1] != '\n' {
			b = append(b, '\n')
		}
		ours := filepath.Join(dir, name)
		if err := os.WriteFile(ours, append(b, line+"\n"...), 0o644); err != nil {
			return err
		}
		if err := unix.Mount(ours, there, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", there, err)
		}
	}
	const devices, node = "/dev/net", "/dev/net/tun"
	if err := unix.Mount("tmpfs", devices, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0755,size=64k"); err != nil {
		return fmt.Errorf("mount %s: %w", devices, err)
	}
	if err := unix.Mknod(node, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))); err != nil {
		return fmt.Errorf("make %s: %w", node, err)
	}
	return os.Chmod(node, 0o666)
}

// sameIDs maps each id of the present user namespace to itself.
func sameIDs(file string) (maps []syscall.SysProcIDMap, err error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) != 3 {
			return nil, fmt.Errorf("%s: %q", file, line)
		}
		first, err1 := strconv.Atoi(f[0])
		n, err2 := strconv.Atoi(f[2])
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		maps = append(maps, syscall.SysProcIDMap{ContainerID: first, HostID: first, Size: n})
	}
	return maps, nil
}

// tenantBin is this program where the tenant can run it: the one that is running may lie in a directory that is closed to him.
func (s *site) tenantBin() (string, error) {
	if b, err := os.ReadFile("/etc/subuid"); err != nil || !strings.Contains(string(b), tenantName+":") {
		return "", errors.New("needs a user with subordinate ids of his own: run the bench as root")
	}
	in, err := os.Open(self)
	if err != nil {
		return "", err
	}
	defer in.Close()
	name := filepath.Join(s.dir, "patchbay")
	out, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return "", err
	}
	_, err = io.Copy(out, in)
	return name, errors.Join(err, out.Close())
}

// startTenant starts cmd in s as the tenant, with a directory of his own for what he has at run time.
func (s space) startTenant(cmd *exec.Cmd, dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := os.Chown(dir, tenantID, tenantID); err != nil {
		return err
	}
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_RUNTIME_DIR="+dir, "TMPDIR="+dir, "USER="+tenantName)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: tenantID, Gid: tenantID}}
	return s.start(cmd)
}
