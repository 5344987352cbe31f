package edge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"patchbay/internal/testbed"
)

// runArg0 makes this test binary a small `patchbay run`, whose Spec is in runEnv.
const (
	runArg0 = "edge-test-run"
	runEnv  = "EDGE_TEST_SPEC"
)

func TestMain(m *testing.M) {
	Main()
	if os.Args[0] == runArg0 {
		os.Exit(miniRun())
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
