package edge

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// children are the ids of pid's children, zombies included, as /proc shows them.
func children(pid int) []int {
	dir := fmt.Sprintf("/proc/%d/task", pid)
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var out []int
	for _, t := range tasks {
		b, err := os.ReadFile(dir + "/" + t.Name() + "/children")
		if err != nil {
			if os.IsNotExist(err) && t.Name() == strconv.Itoa(pid) {
				return childrenByScan(pid) // a kernel without CONFIG_PROC_CHILDREN
			}
			continue
		}
		for _, f := range bytes.Fields(b) {
			if c, err := strconv.Atoi(string(f)); err == nil {
				out = append(out, c)
			}
		}
	}
	return out
}

func childrenByScan(pid int) (out []int) {
	d, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	for _, n := range names {
		c, err := strconv.Atoi(n)
		if err != nil {
			continue
		}
		if _, ppid, ok := procStat(c); ok && ppid == pid {
			out = append(out, c)
		}
	}
	return out
}

// procStat is the state letter of a process ('T' stopped, 'Z' zombie) and its parent.
func procStat(pid int) (state byte, ppid int, ok bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, false
	}
	// The name is in parentheses and may itself have any of the bytes that separate fields.
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, 0, false
	}
	f := bytes.Fields(b[i+1:])
	if len(f) < 2 || len(f[0]) != 1 {
		return 0, 0, false
	}
	ppid, err = strconv.Atoi(string(f[1]))
	return f[0][0], ppid, err == nil
}

// killTree kills pid and its descendants. The parent is stopped before its children are listed, so that it has no more of them
// meanwhile.
func killTree(pid int) {
	_ = syscall.Kill(pid, syscall.SIGSTOP)
	for _, c := range children(pid) {
		killTree(c)
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)
}

// ownOrphans are those of kids that live in the namespace behind mark, which is of the kind that /proc/PID/ns calls by name, or, if that is "user", below it. dying says that one
// of the others is about to end: it has left its namespaces, all but the user namespace, and still has its children.
func ownOrphans(kids []int, mark int, name string) (out []int, dying bool) {
	want, err := nsID(mark)
	if err != nil {
		return nil, false
	}
	for _, c := range kids {
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/%s", c, name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) {
			state, _, ok := procStat(c)
			dying = dying || ok && state != 'Z' && state != 'X'
		}
		for err == nil {
			id, ierr := nsID(fd)
			if ierr == nil && id == want {
				out = append(out, c)
				break
			}
			var up int
			up, err = unix.IoctlRetInt(fd, unix.NS_GET_PARENT)
			unix.Close(fd)
			fd = up
		}
		if err == nil {
			unix.Close(fd)
		}
	}
	return out, dying
}

func nsID(fd int) (id [2]uint64, err error) {
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	return [2]uint64{st.Dev, st.Ino}, err
}
