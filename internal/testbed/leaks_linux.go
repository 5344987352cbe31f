package testbed

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// leakWait is how long things may take to go away after a test.
const leakWait = 5 * time.Second

// Leaks fails t when, at its end, there are goroutines, file descriptors or processes that were not there when Leaks was called. Call it
// first, so that it looks after all other clean-up is done, and not in parallel tests.
func Leaks(t testing.TB) {
	t.Helper()
	goroutines, fds, procs := goroutines(), openFDs(), descendants(os.Getpid())
	t.Cleanup(func() {
		var report string
		if !Wait(leakWait, func() bool {
			report = grown(goroutines, fds, procs)
			return report == ""
		}) {
			t.Errorf("%v after the end of the test there still are:\n%s", leakWait, report)
		}
	})
}

func grown(goroutines0 map[string]string, fds0 map[string]int, procs0 map[int]string) string {
	var b strings.Builder
	for id, stack := range goroutines() {
		if _, ok := goroutines0[id]; !ok && !harmless(stack) {
			fmt.Fprintf(&b, "goroutine %s\n", stack)
		}
	}
	for what, n := range openFDs() {
		if n > fds0[what] {
			fmt.Fprintf(&b, "%d more open: %s\n", n-fds0[what], what)
		}
	}
	for pid, name := range descendants(os.Getpid()) {
		if _, ok := procs0[pid]; !ok {
			fmt.Fprintf(&b, "process %d (%s)\n", pid, name)
		}
	}
	return b.String()
}

// goroutines is the stack of each goroutine but this one by its id.
func goroutines() map[string]string {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	out := map[string]string{}
	for i, s := range strings.Split(string(buf), "\n\n") {
		if i == 0 {
			continue // the caller
		}
		id, _, _ := strings.Cut(strings.TrimPrefix(s, "goroutine "), " ")
		out[id] = s
	}
	return out
}

// harmless reports whether the goroutine belongs to the runtime or the testing package and comes and goes as they like.
func harmless(stack string) bool {
	for _, s := range []string{"testing.(*T).Run(", "testing.(*M).", "runtime.ensureSigM", "os/signal.signal_recv", "testing.runFuzzing", "runtime/trace", "created by runtime", "created by testing.(*T).Run"} {
		if strings.Contains(stack, s) {
			return true
		}
	}
	return false
}

// openFDs counts the open descriptors by what they are. Numbers are cut off, so that a socket replaced by another one is no leak.
func openFDs() map[string]int {
	out := map[string]int{}
	es, _ := os.ReadDir("/proc/self/fd")
	for _, e := range es {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		// The runtime opens its poller when it first needs it; ReadDir's own descriptor is gone by now.
		if err != nil || to == "anon_inode:[eventpoll]" || to == "anon_inode:[eventfd]" {
			continue
		}
		if kind, _, ok := strings.Cut(to, ":["); ok && kind != "anon_inode" {
			to = kind
		}
		out[to]++
	}
	return out
}

// descendants is every process below pid, zombies included, with its name.
func descendants(pid int) map[int]string {
	parent, names := map[int]int{}, map[int]string{}
	es, _ := os.ReadDir("/proc")
	for _, e := range es {
		p, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue
		}
		s := string(b)
		i, j := strings.IndexByte(s, '('), strings.LastIndexByte(s, ')')
		if i < 0 || j < i {
			continue
		}
		f := strings.Fields(s[j+1:])
		if len(f) < 2 {
			continue
		}
		parent[p], _ = strconv.Atoi(f[1])
		names[p] = s[i+1 : j]
	}
	out := map[int]string{}
	level := []int{pid}
	for len(level) > 0 {
		var next []int
		for p, pp := range parent {
			if slices.Contains(level, pp) {
				out[p] = names[p]
				next = append(next, p)
			}
		}
		level = next
	}
	return out
}

// alive reports whether a process exists and is no zombie.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	s := string(b)
	return !strings.HasPrefix(s[strings.LastIndexByte(s, ')')+1:], " Z")
}
