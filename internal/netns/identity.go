package netns

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// ErrOther is in the chain when a pid or path leads to another namespace or process than it did.
var ErrOther = errors.New("it is another one now")

// Identity tells a namespace from one that has its pid or path later. It is a plain value and marshals to JSON.
type Identity struct {
	NetDev    uint64 `json:"netDev,omitempty"` // of the network namespace, as stat(2) on its nsfs file gives them
	NetIno    uint64 `json:"netIno,omitempty"`
	PID       int    `json:"pid,omitempty"`       // the process it was named by, or 0
	StartTime uint64 `json:"startTime,omitempty"` // of that process: field 22 of /proc/PID/stat, in clock ticks since boot
}

// Identity is the target's.
func (t *Target) Identity() (Identity, error) {
	id := Identity{PID: t.pid}
	var st unix.Stat_t
	if err := unix.Fstat(int(t.net.Fd()), &st); err != nil {
		return id, fmt.Errorf("%s: %w", t.name, err)
	}
	id.NetDev, id.NetIno = st.Dev, st.Ino
	if t.pid != 0 {
		p, err := IdentifyProcess(t.pid)
		if err != nil {
			return id, err
		}
		id.StartTime = p.StartTime
	}
	return id, nil
}

// Matches is nil when t is what id was made of, and an error with ErrOther in its chain otherwise.
func (id Identity) Matches(t *Target) error {
	now, err := t.Identity()
	if err != nil {
		return err
	}
	if now != id {
		return fmt.Errorf("%s: %w: the one that was meant has ended", t.name, ErrOther)
	}
	return nil
}

// IdentifyProcess is the identity of a process alone, without its namespaces.
func IdentifyProcess(pid int) (*Identity, error) {
	what := fmt.Sprintf("process %d", pid)
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, explainPID(what, pid, err)
	}
	// The name is in parentheses and may itself have any of the bytes that separate fields; field 3 follows it.
	const startTime = 22 - 3
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(f) <= startTime {
		return nil, fmt.Errorf("%s: /proc/%d/stat has %d fields: this is no Linux that patchbay knows", what, pid, len(f))
	}
	t, err := strconv.ParseUint(string(f[startTime]), 10, 64)
	if err != nil {
		return nil, fmt.Errorf("%s: start time: %w", what, err)
	}
	return &Identity{PID: pid, StartTime: t}, nil
}
