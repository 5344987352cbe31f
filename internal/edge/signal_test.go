package edge

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/testbed"
)

var signals = map[string]syscall.Signal{
	"HUP": unix.SIGHUP, "INT": unix.SIGINT, "QUIT": unix.SIGQUIT, "TERM": unix.SIGTERM, "USR1": unix.SIGUSR1, "USR2": unix.SIGUSR2,
	"ALRM": unix.SIGALRM, "WINCH": unix.SIGWINCH, "CONT": unix.SIGCONT, "IO": unix.SIGIO, "PWR": unix.SIGPWR, "35": 35, "64": 64,
}

// TestSignalToParent sends each signal to the parent alone, as kill PID does: COMMAND gets it once.
func TestSignalToParent(t *testing.T) {
	testbed.Leaks(t)
	for _, pid := range []bool{false, true} {
		b := start(t, run(t, Spec{Net: NetNone, PID: pid, Argv: counter(t, "")}))
		b.expect("ready", 1)
		for name, s := range signals {
			for n := 1; n <= 2; n++ {
				b.cmd.Process.Signal(s)
				b.expect("got-"+name+"\n", n)
			}
		}
		b.settle()
		for name := range signals {
			if n := strings.Count(b.out.String(), "got-"+name+"\n"); n != 2 {
				t.Errorf("PID %v: SIG%s arrived %d times, want 2", pid, name, n)
			}
		}
		b.cmd.Process.Signal(syscall.Signal(36))
		if code := b.wait(); code != 5 {
			t.Errorf("PID %v: exit status %d: %s", pid, code, b.out.String())
		}
	}
}

// TestSignalToGroup sends each signal to the whole process group, as a shell's kill %1 does: COMMAND still gets it once.
func TestSignalToGroup(t *testing.T) {
	testbed.Leaks(t)
	for _, pid := range []bool{false, true} {
		cmd := run(t, Spec{Net: NetNone, PID: pid, Argv: counter(t, "")})
		cmd.SysProcAttr.Setpgid = true
		b := start(t, cmd)
		b.expect("ready", 1)
		for name, s := range signals {
			for n := 1; n <= 5; n++ {
				syscall.Kill(-cmd.Process.Pid, s)
				b.expect("got-"+name+"\n", n)
				time.Sleep(20 * time.Millisecond)
			}
			if n := strings.Count(b.out.String(), "got-"+name+"\n"); n != 5 {
				t.Errorf("PID %v: SIG%s arrived %d times, want 5", pid, name, n)
			}
		}
		// And after it a signal for the parent alone is passed on again.
		time.Sleep(2 * groupBurst)
		b.cmd.Process.Signal(unix.SIGTERM)
		b.expect("got-TERM\n", 6)
		b.cmd.Process.Signal(syscall.Signal(36))
		if code := b.wait(); code != 5 {
			t.Errorf("PID %v: exit status %d: %s", pid, code, b.out.String())
		}
	}
}

// TestSignalToGroupThatCommandLeft: a COMMAND in a group of its own is out of reach of kill -PGID, and gets it from the parent.
func TestSignalToGroupThatCommandLeft(t *testing.T) {
	cmd := run(t, Spec{Net: NetNone, Argv: append([]string{testbed.Tool(t, "setsid")}, counter(t, "")...)})
	cmd.SysProcAttr.Setpgid = true
	b := start(t, cmd)
	b.expect("ready", 1)
	syscall.Kill(-cmd.Process.Pid, unix.SIGTERM)
	b.expect("got-TERM\n", 1)
	b.settle()
	if n := strings.Count(b.out.String(), "got-TERM\n"); n != 1 {
		t.Errorf("SIGTERM arrived %d times", n)
	}
}

func TestDeathBySignal(t *testing.T) {
	for _, s := range []syscall.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1} {
		b := start(t, run(t, Spec{Net: NetNone, Argv: sh("ulimit -c 0; echo ready; exec sleep 100")}))
		b.expect("ready", 1)
		b.cmd.Process.Signal(s)
		if code := b.wait(); code != 128+int(s) {
			t.Errorf("%v: exit status %d, want %d: %s", s, code, 128+int(s), b.out.String())
		}
	}
}

// TestIgnoredSignals: what nohup and a shell's & have ignored stays ignored, and the parent does not pass it on.
func TestIgnoredSignals(t *testing.T) {
	cmd := run(t, Spec{Net: NetNone, Argv: sh("echo ready; exec sleep 1")})
	self, _ := os.Executable()
	cmd.Args = []string{"bash", "-c", "trap '' HUP INT QUIT; exec -a " + runArg0 + " " + self}
	cmd.Path = testbed.Tool(t, "bash")
	b := start(t, cmd)
	b.expect("ready", 1)
	for _, s := range []syscall.Signal{unix.SIGHUP, unix.SIGINT} {
		b.cmd.Process.Signal(s)
	}
	if code := b.wait(); code != 0 {
		t.Errorf("exit status %d", code)
	}
}

// terminal is a pseudo-terminal with a command on it, which is the leader of a session.
type terminal struct {
	*background
	master *os.File
	fd     int // of master
}

func onTerminal(t *testing.T, cmd *exec.Cmd) *terminal {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		testbed.Lacking(t, "no pseudo-terminal: %v", err)
	}
	m := os.NewFile(uintptr(fd), "ptmx")
	t.Cleanup(func() { m.Close() })
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	s, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		testbed.Lacking(t, "no pseudo-terminal: %v", err)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = s, s, s
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Setctty = true, true
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.Close()
	x := &terminal{background: &background{t: t, cmd: cmd}, master: m, fd: fd}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := m.Read(buf)
			if err != nil {
				return
			}
			x.out.Write(buf[:n])
		}
	}()
	return x
}

func (x *terminal) typeIn(s string) {
	x.t.Helper()
	if _, err := x.master.WriteString(s); err != nil {
		x.t.Fatal(err)
	}
}

// TestTerminal: keys reach COMMAND exactly once, and it is on the terminal itself.
func TestTerminal(t *testing.T) {
	testbed.Leaks(t)
	for _, pid := range []bool{false, true} {
		x := onTerminal(t, run(t, Spec{Net: NetNone, PID: pid, Argv: counter(t, "tty; stty size;")}))
		x.expect("ready", 1)
		if !strings.Contains(x.out.String(), "/dev/pts/") {
			t.Errorf("COMMAND is on no terminal: %s", x.out.String())
		}
		for n := 1; n <= 10; n++ {
			x.typeIn("\x03")
			x.expect("got-INT", n)
			x.typeIn("\x1c")
			x.expect("got-QUIT", n)
			time.Sleep(time.Duration(n*3) * time.Millisecond) // the next key in and after groupBurst
		}
		for n := uint16(1); n <= 3; n++ {
			ws := &unix.Winsize{Row: 20 + n, Col: 70 + n}
			if err := unix.IoctlSetWinsize(x.fd, unix.TIOCSWINSZ, ws); err != nil {
				t.Fatal(err)
			}
			x.expect("got-WINCH", int(n))
		}
		x.settle()
		for s, want := range map[string]int{"INT": 10, "QUIT": 10, "WINCH": 3} {
			if n := strings.Count(x.out.String(), "got-"+s); n != want {
				t.Errorf("PID %v: SIG%s arrived %d times, want %d", pid, s, n, want)
			}
		}
		x.cmd.Process.Signal(syscall.Signal(36))
		if code := x.wait(); code != 5 {
			t.Errorf("exit status %d", code)
		}
	}
}

// TestJobControl: an interactive shell stops the run with Ctrl-Z, or gets its terminal back when COMMAND stops itself, and continues it.
func TestJobControl(t *testing.T) {
	testbed.Leaks(t)
	for _, pid := range []bool{false, true} {
		cmd := run(t, Spec{Net: NetNone, PID: pid, Argv: sh(`echo ready; while read l; do echo "said-$l"; [ "$l" = stop ] && kill -STOP $$; done; exit 9`)})
		self, _ := os.Executable()
		cmd.Path = testbed.Tool(t, "bash")
		cmd.Args = []string{"bash", "--norc", "--noprofile", "-i"}
		cmd.Env = append(cmd.Env, "PS1=prompt> ", "TERM=dumb", "HISTFILE=")
		x := onTerminal(t, cmd)
		x.expect("prompt>", 1)
		x.typeIn("(exec -a " + runArg0 + " " + self + ")\n")
		x.expect("ready", 1)
		for n := 1; n <= 3; n++ {
			x.typeIn("hello\n")
			x.expect("said-hello", n)
			x.typeIn("\x1a")
			x.expect("Stopped", n)
			x.typeIn("fg\n")
		}
		x.typeIn("stop\n")
		x.expect("said-stop", 1)
		x.expect("Stopped", 4)
		x.typeIn("fg\n")
		x.typeIn("again\n")
		x.expect("said-again", 1)
		x.typeIn("\x04")
		x.typeIn("echo status=$?\n")
		x.expect("status=9", 1)
		if n := strings.Count(x.out.String(), "Stopped"); n != 4 {
			t.Errorf("PID %v: stopped %d times, want 4:\n%s", pid, n, x.out.String())
		}
		x.typeIn("exit\n")
		x.wait()
	}
}

// TestHangup: the terminal goes away, and the run with it.
func TestHangup(t *testing.T) {
	testbed.Leaks(t)
	x := onTerminal(t, run(t, Spec{Net: NetNone, Argv: sh("echo ready; sleep 100")}))
	x.expect("ready", 1)
	x.master.Close()
	if code := x.wait(); code != 128+int(unix.SIGHUP) {
		t.Errorf("exit status %d", code)
	}
}
