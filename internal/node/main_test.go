package node

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/edge"
	"patchbay/internal/testbed"
	"patchbay/internal/testbed/probe"
	"patchbay/nat"
	vswitch "patchbay/switch"
)

func TestMain(m *testing.M) {
	edge.Main()
	probe.Main()
	agentMain()
	bypassMain()
	testbed.Main(m)
}

// newNet is a network whose node is this process, so that its goroutines, descriptors and heap can be looked at. Containers are real: each
// has an edge process and a command, usually an agent.
//
//	[box] eth0 ── tap ┐
//	                  switch ── gateway ── NAT ── [host: these tests] ── [external]
//	[box] eth0 ── tap ┘
func newNet(t testing.TB, cfg NetworkConfig) *Network {
	t.Helper()
	testbed.RequireTUN(t)
	if cfg.Name == "" {
		cfg.Name = "testnet"
	}
	n, err := NewNetwork(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return n
}

// box is a container whose command is an agent.
type box struct {
	*Container
	*agent
}

func newBox(t testing.TB, n *Network, cfg ContainerConfig) *box {
	t.Helper()
	b, err := startBox(t, n, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func startBox(t testing.TB, n *Network, cfg ContainerConfig) (*box, error) {
	t.Helper()
	a, in, out := newAgent(t)
	defer in.Close()
	defer out.Close()
	cfg.Process.Argv = []string{self(t), agentArg}
	cfg.Stdio = edge.Stdio{In: in, Out: out}
	c, err := n.Start(t.Context(), cfg)
	if err != nil {
		return nil, err
	}
	b := &box{Container: c, agent: a}
	t.Cleanup(b.end)
	return b, nil
}

// end lets the command end by itself, and sees the container go.
func (b *box) end() {
	b.hangUp()
	st, err := b.Wait()
	if err != nil || st.ExitCode() != 0 && st.Signal == 0 {
		b.t.Errorf("container %s: %v, %v", b.name, st, err)
	}
}

// v4 and v6 are the container's addresses with a port.
func (b *box) v4(port uint16) string { return netip.AddrPortFrom(b.addrs[0], port).String() }
func (b *box) v6(port uint16) string { return netip.AddrPortFrom(b.addrs[1], port).String() }

// agent is the near end of an agent's pipes. A call at a time.
type agent struct {
	t   testing.TB
	mu  sync.Mutex
	in  *os.File
	out *os.File
	dec *json.Decoder
}

func self(t testing.TB) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

// newAgent makes the pipes; in and out are the agent's ends.
func newAgent(t testing.TB) (a *agent, in, out *os.File) {
	t.Helper()
	in, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	a = &agent{t: t, in: w, out: r, dec: json.NewDecoder(r)}
	t.Cleanup(a.hangUp)
	return a, in, out
}

// newOutsider is an agent outside: in an external machine, or on the host.
func newOutsider(t testing.TB, in *testbed.NS) *agent {
	t.Helper()
	a, r, w := newAgent(t)
	cmd := in.Command(self(t), agentArg)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = r, w, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r.Close()
	w.Close()
	t.Cleanup(func() {
		a.hangUp()
		_ = cmd.Wait() // a killed one is the namespace's doing
	})
	return a
}

func (a *agent) hangUp() {
	a.in.Close()
	a.out.Close()
}

// do asks and waits for the answer, two minutes at most.
func (a *agent) do(q ask) told {
	a.t.Helper()
	r, err := a.try(q)
	if err != nil {
		a.t.Fatalf("agent: %v", err)
	}
	return r
}

func (a *agent) try(q ask) (r told, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := json.NewEncoder(a.in).Encode(q); err != nil {
		return r, err
	}
	_ = a.out.SetReadDeadline(time.Now().Add(2 * time.Minute))
	if err := a.dec.Decode(&r); err != nil {
		return r, err
	}
	if r.Err != "" {
		return r, fmt.Errorf("%s", r.Err)
	}
	return r, nil
}

// run is what a program prints, which is to end with status 0.
func (a *agent) run(argv ...string) string {
	a.t.Helper()
	r := a.do(ask{Exec: argv})
	if r.Code != 0 {
		a.t.Errorf("%s: status %d: %s", strings.Join(argv, " "), r.Code, r.Out)
	}
	return strings.TrimSpace(r.Out)
}

// reach tries, and fails the test for each attempt that does not get through.
func (a *agent) reach(list ...probe.Attempt) []probe.Outcome {
	a.t.Helper()
	out := a.do(ask{Try: list}).Outcomes
	for _, o := range out {
		if !o.OK() {
			a.t.Errorf("%v", o)
		}
	}
	return out
}

// faults is a line with faults at every container's port, both ways.
type faults struct {
	testbed.Faults
	mu    sync.Mutex
	ports []*testbed.FaultyPort
	sinks []*testbed.FaultySink
}

func (f *faults) port(_ string, p vswitch.Port) vswitch.Port {
	f.mu.Lock()
	defer f.mu.Unlock()
	fp := testbed.NewFaultyPort(p, f.Faults)
	f.ports = append(f.ports, fp)
	return fp
}

func (f *faults) sink(_ string, s frame.Sink) frame.Sink {
	f.mu.Lock()
	defer f.mu.Unlock()
	fs := testbed.NewFaultySink(s, f.Faults)
	f.sinks = append(f.sinks, fs)
	return fs
}

// count sums what has gone wrong, and close mends the lines, which must be before their containers end.
func (f *faults) count() (in, out testbed.FaultCount) {
	add := func(a *testbed.FaultCount, b testbed.FaultCount) {
		a.Passed += b.Passed
		a.Lost += b.Lost
		a.Duplicated += b.Duplicated
		a.Reordered += b.Reordered
	}
	for _, p := range f.ports {
		add(&out, p.Count())
	}
	for _, s := range f.sinks {
		add(&in, s.Count())
	}
	return in, out
}

func (f *faults) close() {
	for _, p := range f.ports {
		p.Close()
	}
	for _, s := range f.sinks {
		s.Close()
	}
}

// footprint is what a node costs at one moment.
type footprint struct {
	goroutines, fds int
	heap            uint64 // bytes, after a collection
}

func (f footprint) String() string {
	return fmt.Sprintf("%d goroutines, %d descriptors, %.1f MiB of heap", f.goroutines, f.fds, float64(f.heap)/(1<<20))
}

// Tolerances of a baseline. Idle goroutines of the runtime and of sync.Pools come and go; the heap keeps pools and tables that do not
// shrink.
const (
	spareGoroutines = 2
	spareFDs        = 2
	spareHeap       = 8 << 20
)

func measure() (f footprint) {
	for range 3 { // sync.Pool needs two collections to be empty
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	es, _ := os.ReadDir("/proc/self/fd")
	return footprint{runtime.NumGoroutine(), len(es), m.HeapAlloc}
}

// backTo fails t unless the node shrinks to what it was before within d.
func backTo(t testing.TB, before footprint, d time.Duration) {
	t.Helper()
	var now footprint
	if !testbed.Wait(d, func() bool {
		now = measure()
		return now.goroutines <= before.goroutines+spareGoroutines && now.fds <= before.fds+spareFDs && now.heap <= before.heap+spareHeap
	}) {
		t.Errorf("before: %v; %v after the end: %v", before, d, now)
	}
	t.Logf("before: %v; after: %v", before, now)
}

// drop is the count of one reason over the whole network.
func drop(n *Network, d frame.Drop) uint64 {
	for _, s := range n.Status().Drops {
		if s.Reason == d.String() {
			return s.Count
		}
	}
	return 0
}

func mustSpec(t testing.TB, s string) nat.Spec {
	t.Helper()
	spec, err := nat.ParseSpec(s)
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

// addr is the address of the version, of a list of at most one each.
func addrOf(as []netip.Addr, version int) netip.Addr {
	i := slices.IndexFunc(as, func(a netip.Addr) bool { return a.Is4() == (version == 4) })
	return as[i]
}
