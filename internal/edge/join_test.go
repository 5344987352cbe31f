package edge

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"patchbay/internal/testbed"
)

// joinEnv names the process whose namespaces a small `patchbay run` joins.
const joinEnv = "EDGE_TEST_JOIN"

// join is a command that runs spec in the namespaces of a process, after a bit of shell script in the process that becomes it.
func join(t testing.TB, pid int, before string, argv ...string) *exec.Cmd {
	t.Helper()
	cmd := run(t, Spec{Net: NetContainer, Argv: argv})
	cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d", joinEnv, pid))
	cmd.SysProcAttr = nil // of the tests' own user, as the target is
	cmd.Args = []string{"bash", "-c", before + ` exec -a "$0" "$1"`, runArg0, cmd.Path}
	cmd.Path = testbed.Tool(t, "bash")
	return cmd
}

// TestJoinKeepsLimit holds that a COMMAND which joins a container has the limit of open files that a private one has: the caller's.
func TestJoinKeepsLimit(t *testing.T) {
	s := newSpace(t, "-Urn")
	for _, soft := range []string{"77", "hard"} {
		want := soft
		if soft == "hard" {
			var l syscall.Rlimit
			if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
				t.Fatal(err)
			}
			want = fmt.Sprint(l.Max)
		}
		if code, out := finish(t, join(t, s.pid, "ulimit -Sn "+soft+";", sh("ulimit -Sn")...)); code != 0 || out != want+"\n" {
			t.Errorf("ulimit -Sn %s: status %d, %q, want %s", soft, code, out, want)
		}
	}
}

// TestJoinHostName holds that a container which has the caller's own UTS namespace can be joined, and that its root cannot rename the host.
func TestJoinHostName(t *testing.T) {
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for _, flags := range [][]string{{"-Urn"}, {"-n"}, {"-Urnu"}} {
		s := newSpace(t, flags...)
		code, out := finish(t, join(t, s.pid, "", sh("uname -n; hostname other; uname -n")...))
		if code != 0 || out != name+"\nother\n" {
			t.Errorf("unshare %v: status %d: %s", flags, code, out)
		}
		if now, _ := os.Hostname(); now != name {
			t.Fatalf("unshare %v: the host is called %q now", flags, now)
		}
	}
}

// TestJoinSparesStrangers holds that the end of a COMMAND which joined a container takes its own orphans with it and nobody else's child, also where the user namespace is the caller's.
func TestJoinSparesStrangers(t *testing.T) {
	for _, flags := range [][]string{{"-n"}, {"-Urn"}} {
		s := newSpace(t, flags...)
		stranger, orphan := fmt.Sprintf("%d62", os.Getpid()), fmt.Sprintf("%d63", os.Getpid())
		t.Cleanup(func() {
			for _, p := range processes("sleep\x00" + stranger) {
				_ = syscall.Kill(p, syscall.SIGKILL)
			}
		})
		// The second stranger becomes the run's child when its parent ends, as orphans do.
		before := "sleep " + stranger + " >/dev/null 2>&1 & (sleep " + stranger + " >/dev/null 2>&1 & sleep 0.1) &"
		cmd := join(t, s.pid, before, sh("setsid sleep "+orphan+" >/dev/null 2>&1 & sleep 0.3; kill -KILL $PPID; sleep 20")...)
		if code, out := finish(t, cmd); code != 125 || !strings.Contains(out, "killed by signal 9") {
			t.Errorf("unshare %v: status %d: %s", flags, code, out)
		}
		if l := processes("sleep\x00" + stranger); len(l) != 2 {
			t.Errorf("unshare %v: strangers left: %v", flags, l)
		}
		if !testbed.Wait(5*time.Second, func() bool { return len(processes("sleep\x00"+orphan)) == 0 }) {
			t.Errorf("unshare %v: an orphan lives on", flags)
		}
		for _, p := range processes("sleep\x00" + stranger) {
			_ = syscall.Kill(p, syscall.SIGKILL)
		}
		testbed.Eventually(t, 5*time.Second, func() bool { return len(processes("sleep\x00"+stranger)) == 0 })
	}
}

// TestPause holds that a container without a COMMAND ends with a signal, as a COMMAND would.
func TestPause(t *testing.T) {
	for s, code := range map[syscall.Signal]int{syscall.SIGTERM: 143, syscall.SIGINT: 130} {
		b := start(t, run(t, Spec{Net: NetNone, Pause: true, PID: s == syscall.SIGINT}))
		b.expect("paused", 1)
		if err := b.cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
		if got := b.wait(); got != code {
			t.Errorf("%v: status %d, want %d: %s", s, got, code, b.out.String())
		}
	}
}
