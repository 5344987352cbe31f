package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// AliveAt reports whether the namespace is in use still, as far as what it was named by tells: the path, or the process if path is empty. A process that
// the caller may not look at any more counts as long as it runs.
func (id Identity) AliveAt(path string) bool {
	if path == "" {
		if id.PID == 0 {
			return false
		}
		now, err := IdentifyProcess(id.PID)
		if err != nil || now.StartTime != id.StartTime {
			return false
		}
		path = processNet(id.PID)
	}
	same, err := id.at(path)
	return same || errors.Is(err, fs.ErrPermission)
}

// Process is some process in the namespace other than those that the caller may not look at, or nil.
func (id Identity) Process() *Identity {
	es, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, e := range es {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if same, _ := id.at(processNet(pid)); !same {
			continue
		}
		p, err := IdentifyProcess(pid)
		if err != nil {
			continue
		}
		// It may have ended, and another one have its pid, between the two looks.
		if same, _ := id.at(processNet(pid)); same {
			return &Identity{NetDev: id.NetDev, NetIno: id.NetIno, PID: p.PID, StartTime: p.StartTime}
		}
	}
	return nil
}

// at reports whether the path leads to the namespace.
func (id Identity) at(path string) (bool, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return false, err
	}
	return st.Dev == id.NetDev && st.Ino == id.NetIno, nil
}

func processNet(pid int) string { return fmt.Sprintf("/proc/%d/ns/net", pid) }
