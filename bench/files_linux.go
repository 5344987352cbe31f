package bench

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// filesWanted is the limit of open files that everything in a run is to have: enough for 10,000 connections held by a contender that takes two descriptors or more for each, and for
// patchbay's limit of 16,384 flows, which are five sixteenths of its files.
const filesWanted = 1 << 16

// raiseFiles sets this process's limit of open files, and so that of all it starts, to filesWanted, or to what this user may have: the hard limit, which only root may raise. It is
// set even if it is so already, or Go's runtime would give those it starts the soft limit that there was before the runtime raised it.
func raiseFiles() error {
	want := unix.Rlimit{Cur: filesWanted, Max: filesWanted}
	var is unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &is); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	if is.Max < filesWanted {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &want); err == nil {
			return nil
		}
	}
	want = unix.Rlimit{Cur: min(is.Max, filesWanted), Max: is.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &want); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	return nil
}

// filesText says which of the processes has the most files open, as what may bound them; empty for none.
func filesText(pids []int) (text string) {
	most := 0
	for _, p := range pids {
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p))
		exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", p))
		limits, _ := os.ReadFile(fmt.Sprintf("/proc/%d/limits", p)) // prlimit(2) would want the same user
		if err != nil || len(fds) <= most {
			continue
		}
		most = len(fds)
		text = fmt.Sprintf("; %s has %d files open, of %s that it may", filepath.Base(exe), most, parseFiles(string(limits)))
	}
	return text
}

// parseFiles reads the soft limit of open files from /proc/PID/limits.
func parseFiles(s string) string {
	for line := range strings.Lines(s) {
		if rest, ok := strings.CutPrefix(line, "Max open files"); ok && len(strings.Fields(rest)) > 0 {
			return strings.Fields(rest)[0]
		}
	}
	return "an unknown number"
}
