package edge

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"patchbay/internal/netns"
	"patchbay/internal/testbed"
)

// runArg0 makes this test binary a small `patchbay run`, whose Spec is in runEnv.
const (
	runArg0 = "edge-test-run"
	runEnv  = "EDGE_TEST_SPEC"
	// countArg0 makes it a COMMAND that says each signal it gets, one a line, and ends with status 5 when it gets signal 36. See fence.
	countArg0 = "edge-test-count"
	// hostileArg0 makes it a COMMAND that turns on its edge process, see turnOnEdge.
	hostileArg0 = "edge-test-hostile"
)

// quickExit keeps a process under the race detector from sleeping for a second before it ends; there are hundreds here.
const quickExit = "atexit_sleep_ms=0"

func TestMain(m *testing.M) {
	edgeEnv = append(edgeEnv, "GORACE="+quickExit)
	Main()
	switch os.Args[0] {
	case runArg0:
		os.Exit(miniRun())
	case countArg0:
		countSignals()
	case hostileArg0:
		turnOnEdge(os.Args[1], os.Args[2])
	}
	if os.Getenv("GORACE") == "" {
		os.Setenv("GORACE", quickExit)
	}
	testbed.Main(m)
}

func miniRun() int {
	var w wireSpec
	if err := w.decode([]byte(os.Getenv(runEnv))); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 125
	}
	os.Unsetenv(runEnv)
	spec := w.Spec
	if len(spec.Env) == 0 {
		spec.Env = nil
	}
	if pid, err := strconv.Atoi(os.Getenv(joinEnv)); err == nil {
		os.Unsetenv(joinEnv)
		if spec.Join, err = netns.OpenTarget(pid); err != nil {
			return report(err)
		}
	}
	t0 := time.Now()
	p, err := Start(context.Background(), spec, Stdio{})
	if err != nil {
		return report(err)
	}
	t1 := time.Now()
	defer p.ForwardSignals()()
	if err := p.Release(); err != nil {
		return report(err)
	}
	t2 := time.Now()
	if spec.Pause {
		fmt.Println("paused")
	}
	st, err := p.Wait()
	if os.Getenv("EDGE_TEST_TIMES") != "" {
		fmt.Fprintln(os.Stderr, "start", t1.Sub(t0), "release", t2.Sub(t1), "wait", time.Since(t2))
	}
	if err != nil {
		return report(err)
	}
	for _, n := range p.Notes() {
		fmt.Fprintln(os.Stderr, "note:", n)
	}
	return st.ExitCode()
}

func report(err error) int {
	fmt.Fprintf(os.Stderr, "patchbay: run: %v\n", err)
	var e *Error
	if errors.As(err, &e) {
		return e.Status
	}
	return 1
}

// run is a command that runs spec as a process of its own, as an ordinary user of the host would.
func run(t testing.TB, spec Spec) *exec.Cmd {
	t.Helper()
	testbed.Require(t)
	w := wireSpec{Spec: spec}
	b, err := w.encode()
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Args = []string{runArg0}
	cmd.Env = append(os.Environ(), runEnv+"="+string(b))
	return testbed.AsOrdinaryUser(cmd)
}

func sh(script string, args ...string) []string {
	return append([]string{"/bin/sh", "-c", script, "sh"}, args...)
}

// finish runs cmd to its end, within ten seconds, and returns its exit status and what it wrote.
func finish(t testing.TB, cmd *exec.Cmd) (code int, out string) {
	t.Helper()
	var b syncBuffer
	if cmd.Stdout == nil {
		cmd.Stdout = &b
	}
	if cmd.Stderr == nil {
		cmd.Stderr = &b
	}
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
	err := cmd.Wait()
	if !timer.Stop() {
		t.Fatalf("%v did not end; it wrote:\n%s", cmd.Args, b.String())
	}
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), b.String()
}

// background is a run whose output a test waits for.
type background struct {
	t   testing.TB
	cmd *exec.Cmd
	out syncBuffer
}

func start(t testing.TB, cmd *exec.Cmd) *background {
	t.Helper()
	b := &background{t: t, cmd: cmd}
	cmd.Stdout, cmd.Stderr = &b.out, &b.out
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return b
}

// expect waits until the output has s, n times.
func (b *background) expect(s string, n int) {
	b.t.Helper()
	if !testbed.Wait(5*time.Second, func() bool { return strings.Count(b.out.String(), s) >= n }) {
		ps, _ := exec.Command("ps", "-eo", "pid,ppid,pgid,stat,wchan,args").Output()
		b.t.Fatalf("no %q, %d times, in:\n%s\n%s", s, n, b.out.String(), ps)
	}
}

// edge is the id of the run's edge process.
func (b *background) edge() int {
	b.t.Helper()
	var pid int
	testbed.Eventually(b.t, 5*time.Second, func() bool {
		for _, c := range children(b.cmd.Process.Pid) {
			if name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", c)); string(name) == edgeArg0+"\n" {
				pid = c
			}
		}
		return pid != 0
	})
	return pid
}

func (b *background) wait() int {
	b.t.Helper()
	done := make(chan error, 1)
	go func() { done <- b.cmd.Wait() }()
	select {
	case <-done:
		return b.cmd.ProcessState.ExitCode()
	case <-time.After(10 * time.Second):
		b.t.Fatalf("it does not end; it wrote:\n%s", b.out.String())
		return 0
	}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// processes are those whose command line has mark, zombies left out.
func processes(mark string) (out []int) {
	ps, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range ps {
		if b, err := os.ReadFile(p); err == nil && strings.Contains(string(b), mark) {
			pid, _ := strconv.Atoi(strings.Split(p, "/")[2])
			out = append(out, pid)
		}
	}
	return out
}

// edges are the edge processes that are alive.
func edges() []int { return processes(edgeArg0 + "\x00") }

// counter is a script that runs the signal counter, by way of a shell that it replaces.
func counter(t testing.TB, before string) []string {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return []string{testbed.Tool(t, "bash"), "-c", before + " exec -a " + countArg0 + " " + self}
}

// fence is a signal that means nothing: when it has come, sent to the parent alone, so has what the parent had before, since parent and
// edge process pass one on after the other.
const fence = syscall.Signal(37)

// settle waits until every signal that the parent has had is with COMMAND, a signal counter. It is called once a run.
func (b *background) settle() {
	b.t.Helper()
	b.cmd.Process.Signal(fence)
	b.expect("got-fence", 1)
}

func countSignals() {
	ch := make(chan os.Signal, 100)
	names := map[os.Signal]string{fence: "fence"}
	signal.Notify(ch, fence)
	for name, s := range signals {
		names[s] = name
		signal.Notify(ch, s)
	}
	signal.Notify(ch, syscall.Signal(36))
	fmt.Println("ready")
	for s := range ch {
		if s == syscall.Signal(36) {
			os.Exit(5)
		}
		fmt.Println("got-" + names[s])
	}
}
