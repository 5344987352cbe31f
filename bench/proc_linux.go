package bench

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ticksPerSecond is USER_HZ: what /proc counts CPU time in on every architecture that Go runs on.
const ticksPerSecond = 100

// procStat is what the bench needs of /proc/PID/stat.
type procStat struct {
	pid, parent int
	state       byte
	ticks       uint64 // user and system time of the process and its threads, ended ones included
}

// parseStat reads a line of /proc/PID/stat. The name in it may hold spaces and brackets.
func parseStat(s string) (procStat, error) {
	open, end := strings.IndexByte(s, '('), strings.LastIndexByte(s, ')')
	if open < 1 || end < open {
		return procStat{}, errors.New("process status without a name in brackets")
	}
	f := strings.Fields(s[end+1:])
	if len(f) < 13 {
		return procStat{}, errors.New("process status is cut off")
	}
	pid, err1 := strconv.Atoi(strings.TrimSpace(s[:open]))
	parent, err2 := strconv.Atoi(f[1])
	user, err3 := strconv.ParseUint(f[11], 10, 64)
	sys, err4 := strconv.ParseUint(f[12], 10, 64)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return procStat{}, err
	}
	return procStat{pid: pid, parent: parent, state: f[0][0], ticks: user + sys}, nil
}

// processes is every process that /proc shows, by its id, but for those that ended while it was read.
func processes() map[int]procStat {
	out := map[int]procStat{}
	dirs, _ := filepath.Glob("/proc/[0-9]*/stat") // the pattern is well-formed
	for _, d := range dirs {
		b, err := os.ReadFile(d)
		if err != nil {
			continue
		}
		if p, err := parseStat(string(b)); err == nil {
			out[p.pid] = p
		}
	}
	return out
}

// tree is root and its descendants, nearest first, without zombies.
func tree(all map[int]procStat, root int) (pids []int) {
	level := []int{root}
	for len(level) > 0 {
		var next []int
		for _, p := range level {
			if st, ok := all[p]; ok && st.state != 'Z' && st.state != 'X' {
				pids = append(pids, p)
			}
			for _, c := range all {
				if c.parent == p && c.pid != p {
					next = append(next, c.pid)
				}
			}
		}
		slices.Sort(next)
		level = next
	}
	return pids
}

// argv is a process's command line.
func argv(pid int) []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(b) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
}

// ticksOf sums the CPU time of pids; those that have ended count nothing.
func ticksOf(pids []int) (n uint64) {
	for _, p := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p))
		if err != nil {
			continue
		}
		if st, err := parseStat(string(b)); err == nil {
			n += st.ticks
		}
	}
	return n
}

// parseMemory reads a line such as "VmRSS:  1234 kB" of /proc/PID/status, in bytes.
func parseMemory(status, key string) (int64, error) {
	for line := range strings.Lines(status) {
		rest, ok := strings.CutPrefix(line, key+":")
		if !ok {
			continue
		}
		num, unit, _ := strings.Cut(strings.TrimSpace(rest), " ")
		n, err := strconv.ParseInt(num, 10, 64)
		if err != nil || strings.TrimSpace(unit) != "kB" {
			return 0, fmt.Errorf("%s is not in kB: %q", key, line)
		}
		return n << 10, nil
	}
	return 0, fmt.Errorf("%s: %w", key, fs.ErrNotExist)
}

// memory is what processes hold together, in bytes: resident, now and at its highest, which counts what several share once for each, and proportional, which shares it out.
type memory struct{ rss, peak, pss int64 }

// memoryOf sums the memory of pids.
func memoryOf(pids []int) (sum memory, err error) {
	for _, p := range pids {
		for _, x := range []struct {
			file, key string
			to        *int64
		}{{"status", "VmRSS", &sum.rss}, {"status", "VmHWM", &sum.peak}, {"smaps_rollup", "Pss", &sum.pss}} {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p, x.file))
			if err != nil {
				return memory{}, err
			}
			n, err := parseMemory(string(b), x.key)
			if err != nil {
				return memory{}, err
			}
			*x.to += n
		}
	}
	return sum, nil
}

// cpuTimes is the first line of /proc/stat, in ticks.
type cpuTimes struct{ tasks, interrupts, idle, steal uint64 }

func (c cpuTimes) total() uint64 { return c.tasks + c.interrupts + c.idle + c.steal }
func (c cpuTimes) busy() uint64  { return c.tasks + c.interrupts }

func parseCPU(s string) (cpuTimes, error) {
	line, _, _ := strings.Cut(s, "\n")
	f := strings.Fields(line)
	if len(f) < 9 || f[0] != "cpu" {
		return cpuTimes{}, fmt.Errorf("/proc/stat starts with %q", line)
	}
	var n [8]uint64
	for i := range n {
		v, err := strconv.ParseUint(f[i+1], 10, 64)
		if err != nil {
			return cpuTimes{}, err
		}
		n[i] = v
	}
	return cpuTimes{tasks: n[0] + n[1] + n[2], idle: n[3] + n[4], interrupts: n[5] + n[6], steal: n[7]}, nil
}

func readCPU() (cpuTimes, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return cpuTimes{}, err
	}
	return parseCPU(string(b))
}

// parseNetDev reads /proc/PID/net/dev: received and sent bytes and packets of all interfaces but lo.
func parseNetDev(s string) (bytes, packets uint64) {
	for line := range strings.Lines(s) {
		name, rest, ok := strings.Cut(line, ":")
		if !ok || strings.TrimSpace(name) == "lo" {
			continue
		}
		f := strings.Fields(rest)
		if len(f) < 10 {
			continue
		}
		for _, i := range []int{0, 8} {
			n, _ := strconv.ParseUint(f[i], 10, 64) // a headline counts nothing
			bytes += n
			n, _ = strconv.ParseUint(f[i+1], 10, 64)
			packets += n
		}
	}
	return bytes, packets
}

// parseCPUModel reads the processor's name from /proc/cpuinfo; architectures name it differently or not at all.
func parseCPUModel(s string) string {
	for _, key := range []string{"model name", "Model", "cpu model", "cpu", "Processor"} {
		for line := range strings.Lines(s) {
			k, v, ok := strings.Cut(line, ":")
			if ok && strings.TrimSpace(k) == key {
				return strings.TrimSpace(v)
			}
		}
	}
	return runtime.GOARCH
}

// thisMachine is where the process runs.
func thisMachine() Machine {
	m := Machine{Cores: runtime.NumCPU(), CPU: runtime.GOARCH}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		m.CPU = parseCPUModel(string(b))
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) == nil {
		m.Files = int(min(l.Cur, math.MaxInt32))
	}
	return m
}
