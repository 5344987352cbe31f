package testbed

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const envDie = "PATCHBAY_TESTBED_DIE"

// TestHelperDie is the inner half of TestNothingSurvives.
func TestHelperDie(t *testing.T) {
	how := os.Getenv(envDie)
	if how == "" {
		return
	}
	cmd := NewNS(t).Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// A daemon, whose parent is gone.
	if err := exec.Command("sh", "-c", "setsid sleep 1001 </dev/null >/dev/null 2>&1 &").Run(); err != nil {
		t.Fatal(err)
	}
	fmt.Println("ready")
	if how == "panic" {
		go panic("as told")
	}
	time.Sleep(time.Minute)
}

// A test binary that panics, times out or is killed leaves no process behind: here it makes a bed inside ours.
func TestNothingSurvives(t *testing.T) {
	Leaks(t)
	Require(t)
	for _, how := range []string{"panic", "timeout", "kill"} {
		t.Run(how, func(t *testing.T) {
			cmd := exec.Command(self(), "-test.run=^TestHelperDie$", "-test.timeout=1s")
			if how == "kill" {
				cmd.Args[2] = "-test.timeout=60s"
			}
			cmd.Env = setenv(setenv(os.Environ(), envStage, ""), envDie, how)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			sc := bufio.NewScanner(out)
			for sc.Scan() && sc.Text() != "ready" {
			}
			if how == "kill" {
				if !Wait(3*time.Second, func() bool { return len(sleepers()) == 2 }) {
					t.Errorf("%d sleepers started, want 2", len(sleepers()))
				}
				_ = cmd.Process.Kill()
			}
			for sc.Scan() {
			}
			err = cmd.Wait()
			if err == nil {
				t.Error("it reports success")
			}
			var left []int
			if !Wait(3*time.Second, func() bool { left = sleepers(); return len(left) == 0 }) {
				t.Errorf("processes %v survive", left)
				for _, p := range left {
					_ = syscall.Kill(p, syscall.SIGKILL)
				}
			}
		})
	}
}

// sleepers is every process that runs "sleep 100x", which no other test does.
func sleepers() (pids []int) {
	es, _ := os.ReadDir("/proc")
	for _, e := range es {
		b, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if err == nil && strings.HasPrefix(string(b), "sleep\x00100") {
			if p, err := strconv.Atoi(e.Name()); err == nil {
				pids = append(pids, p)
			}
		}
	}
	return pids
}
