package edge

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// etcFile is a file of the container that differs from the host's.
type etcFile struct {
	path string
	data []byte
}

// files puts resolv.conf and hosts in place. They live on a tmpfs that is reachable only through the bind mounts, so nothing is on disk and
// nothing stays.
func (e *edgeProc) files() error {
	var fs []etcFile
	if e.spec.ResolvConf != nil {
		fs = append(fs, etcFile{"/etc/resolv.conf", e.spec.ResolvConf})
	}
	if e.spec.Hosts != nil {
		fs = append(fs, etcFile{"/etc/hosts", e.spec.Hosts})
	}
	if len(fs) == 0 {
		return nil
	}
	if e.spec.ResolvConf != nil {
		hideResolvers()
	}
	err := withScratch(func(dir string) error {
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0755,size=4m"); err != nil {
			return fmt.Errorf("mount tmpfs: %w", err)
		}
		var missing []etcFile
		for i, f := range fs {
			src := filepath.Join(dir, strconv.Itoa(i))
			if err := writeFile(src, f.data); err != nil {
				return err
			}
			// A symlink is followed, so that the file it names has the new content under either name.
			if fi, err := os.Stat(f.path); err != nil || !fi.Mode().IsRegular() {
				missing = append(missing, f)
				continue
			}
			if err := unix.Mount(src, f.path, "", unix.MS_BIND, ""); err != nil {
				return fmt.Errorf("bind over %s: %w", f.path, err)
			}
		}
		if len(missing) > 0 {
			return mirrorEtc(dir, missing)
		}
		return nil
	})
	if err != nil {
		return explain("/etc/resolv.conf and /etc/hosts of the container", unwrapPath(err), "make both ordinary files, and /tmp a directory, or run with --net host")
	}
	return nil
}

// hideResolvers keeps the C library from asking the host's resolver, which knows nothing of the container's network, behind the back
// of resolv.conf. A program that finds something else than a socket goes on to DNS.
func hideResolvers() {
	for _, s := range []string{"/run/systemd/resolve/io.systemd.Resolve", "/run/nscd/socket", "/var/run/nscd/socket"} {
		if fi, err := os.Lstat(s); err == nil && fi.Mode()&os.ModeSocket != 0 {
			_ = unix.Mount("/dev/null", s, "", unix.MS_BIND, "")
		}
	}
}

// mirrorEtc is for a file that is not there to mount over, or is a symlink to nowhere, and that an ordinary user cannot create: a tmpfs
// takes the place of /etc, with everything that is in /etc bound into it, and has the missing files.
func mirrorEtc(scratch string, missing []etcFile) error {
	if fi, err := os.Stat("/etc"); err != nil || !fi.IsDir() {
		return fmt.Errorf("there is no directory /etc to put %s into", missing[0].path)
	}
	es, err := os.ReadDir("/etc")
	if err != nil {
		return err
	}
	etc := filepath.Join(scratch, "etc")
	if err := os.Mkdir(etc, 0o755); err != nil {
		return err
	}
	if err := os.Chmod(etc, 0o755); err != nil {
		return err
	}
	own := map[string][]byte{}
	for _, f := range missing {
		own[filepath.Base(f.path)] = f.data
	}
	for _, e := range es {
		if _, ok := own[e.Name()]; ok {
			continue
		}
		if err := mirror("/etc/"+e.Name(), filepath.Join(etc, e.Name()), e); err != nil {
			return err
		}
	}
	for name, data := range own {
		if err := writeFile(filepath.Join(etc, name), data); err != nil {
			return err
		}
	}
	if err := unix.Mount(etc, "/etc", "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind over /etc: %w", err)
	}
	return nil
}

// mirror makes dst what src is, by a bind mount, or by the same symlink.
func mirror(src, dst string, e os.DirEntry) error {
	switch {
	case e.Type()&os.ModeSymlink != 0:
		to, err := os.Readlink(src)
		if err != nil {
			return err
		}
		return os.Symlink(to, dst)
	case e.IsDir():
		if err := os.Mkdir(dst, 0o755); err != nil {
			return err
		}
	default:
		if err := writeFile(dst, nil); err != nil {
			return err
		}
	}
	if err := unix.Mount(src, dst, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %s: %w", src, err)
	}
	return nil
}

// writeFile makes a file that everybody may read, whatever the caller's umask, which is COMMAND's too.
func writeFile(path string, data []byte) error {
	if err := os.WriteFile(path, data, 0o644); err != nil {
		return err
	}
	return os.Chmod(path, 0o644)
}
