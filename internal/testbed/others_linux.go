package testbed

import (
	"bytes"
	"os"
	"strconv"
	"strings"
	"testing"
)

// Others begins to measure what share of the machine's time, 0 to 1, is used by others than this process and its descendants, the hypervisor's other guests among them. The function tells it, from then until now.
// A test that has to be done within a time has that of the machine that was left to it: tests of other packages run beside it.
func Others(t testing.TB) func() float64 {
	t.Helper()
	busy0, all0 := machineTicks(t)
	own0 := ownTicks()
	return func() float64 {
		busy, all := machineTicks(t)
		own := ownTicks()
		return max(float64(busy-busy0)-float64(own-own0), 0) / float64(max(all-all0, 1))
	}
}

// machineTicks reads the first line of proc_stat(5): user nice system idle iowait irq softirq steal.
func machineTicks(t testing.TB) (busy, all int64) {
	t.Helper()
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(b), "\n")
	f := strings.Fields(line)
	if len(f) < 9 {
		t.Fatalf("/proc/stat: %q", line)
	}
	for i, v := range f[1:9] {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			t.Fatalf("/proc/stat: %q", line)
		}
		all += n
		if i != 3 && i != 4 {
			busy += n
		}
	}
	return busy, all
}

// ownTicks is the time of this process, of its descendants, and of those it has waited for (utime, stime, cutime and cstime of proc_pid_stat(5)).
func ownTicks() (ticks int64) {
	pids := descendants(os.Getpid())
	pids[os.Getpid()] = ""
	for pid := range pids {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil {
			continue // it has ended, and its parent's has it
		}
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(f) < 15 {
			continue
		}
		for _, v := range f[11:15] {
			n, _ := strconv.ParseInt(v, 10, 64)
			ticks += n
		}
	}
	return ticks
}
