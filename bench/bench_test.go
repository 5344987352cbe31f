package bench

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/bench/load"
	"patchbay/internal/testbed"
)

func TestMain(m *testing.M) { testbed.Main(m) }

func TestParseStat(t *testing.T) {
	// The third is of a process whose name is ") S 1 (x y".
	for _, c := range []struct {
		line string
		want procStat
	}{
		{"7 (patchbay) S 1 7 7 0 -1 4194560 10 0 0 0 120 34 0 0 20 0 8 0 100 0 0", procStat{7, 1, 'S', 154}},
		{"12 (a b) Z 7 7 7 0 -1 0 0 0 0 0 1 0 0 0 20 0 1 0 100 0 0", procStat{12, 7, 'Z', 1}},
		{"13 () S 1 (x y) R 12 7 7 0 -1 0 0 0 0 0 2 3 0 0 20 0 1 0 100 0 0", procStat{13, 12, 'R', 5}},
	} {
		if got, err := parseStat(c.line); err != nil || got != c.want {
			t.Errorf("%q: %+v, %v; want %+v", c.line, got, err, c.want)
		}
	}
	for _, bad := range []string{"", "7", "7 patchbay S 1", ") (", "7 (x) S 1 2 3", "x (x) S 1 7 7 0 -1 0 0 0 0 0 2 3 0", "7 (x) S 1 7 7 0 -1 0 0 0 0 0 -2 3 0"} {
		if got, err := parseStat(bad); err == nil {
			t.Errorf("%q: %+v, want an error", bad, got)
		}
	}
}

func TestOwnProcessIsThere(t *testing.T) {
	p, ok := processes()[os.Getpid()]
	if !ok || p.parent != os.Getppid() {
		t.Fatalf("%+v, %v; parent is %d", p, ok, os.Getppid())
	}
	for ticksOf([]int{os.Getpid()}) < p.ticks+3 { // 30 ms of work show
		_ = bytes.Repeat([]byte{1}, 1<<20)
	}
	mem, err := memoryOf([]int{os.Getpid()})
	if err != nil || mem.rss < 1<<20 || mem.peak < mem.rss || mem.peak > 1<<34 || mem.pss < 1<<19 || mem.pss > mem.peak {
		t.Errorf("%+v, %v", mem, err)
	}
	if a := argv(os.Getpid()); !slices.Equal(a, os.Args) {
		t.Errorf("argv %q, want %q", a, os.Args)
	}
	if c, err := readCPU(); err != nil || c.total() == 0 || c.busy() >= c.total() {
		t.Errorf("%+v, %v", c, err)
	}
	if m := thisMachine(); m.Kernel == "" || m.CPU == "" || m.Cores == 0 || m.Files == 0 {
		t.Errorf("%+v", m)
	}
}

func TestTree(t *testing.T) {
	all := map[int]procStat{1: {1, 0, 'S', 0}, 5: {5, 1, 'S', 0}, 6: {6, 5, 'Z', 0}, 7: {7, 6, 'S', 0}, 8: {8, 5, 'R', 0}, 9: {9, 1, 'S', 0}}
	if got := tree(all, 5); !slices.Equal(got, []int{5, 8, 7}) {
		t.Errorf("%v", got)
	}
	if got := tree(all, 4); got != nil {
		t.Errorf("%v", got)
	}
}

func TestParseMemory(t *testing.T) {
	const s = "Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t    1024 kB\n"
	if n, err := parseMemory(s, "VmRSS"); n != 1<<20 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := parseMemory(s, "VmSwap"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
	for _, bad := range []string{"VmRSS: x kB\n", "VmRSS: 12 MB\n", "VmRSS:\n"} {
		if n, err := parseMemory(bad, "VmRSS"); err == nil {
			t.Errorf("%q: %d", bad, n)
		}
	}
}

func TestParseCPUAndNoise(t *testing.T) {
	a, err := parseCPU("cpu  100 10 90 1000 50 5 15 30 0 0\ncpu0 …\n")
	if err != nil || a != (cpuTimes{tasks: 200, interrupts: 20, idle: 1050, steal: 30}) {
		t.Fatalf("%+v, %v", a, err)
	}
	b := cpuTimes{tasks: 260, interrupts: 25, idle: 1075, steal: 40}
	if n := noiseBetween(a, b, 40); n.foreign != 0.2 || n.steal != 0.1 || !n.loud() {
		t.Errorf("%+v", n)
	}
	if n := noiseBetween(a, b, 90); n.foreign != 0 { // our own ticks may be rounded up
		t.Errorf("%+v", n)
	}
	if n := noiseBetween(a, a, 0); n != (noise{}) || n.loud() {
		t.Errorf("%+v", n)
	}
	for _, bad := range []string{"", "cpu 1 2 3\n", "intr 1 2 3 4 5 6 7 8 9\n", "cpu  1 2 x 4 5 6 7 8\n"} {
		if c, err := parseCPU(bad); err == nil {
			t.Errorf("%q: %+v", bad, c)
		}
	}
}

func TestParseNetDev(t *testing.T) {
	const s = "Inter-|   Receive  |  Transmit\n face |bytes packets errs drop fifo frame compressed multicast|bytes packets\n" +
		"    lo: 9999 99 0 0 0 0 0 0 9999 99 0 0 0 0 0 0\n  eth0: 1000 10 0 0 0 0 0 0 200 2 0 0 0 0 0 0\n  eth1:1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n"
	if b, p := parseNetDev(s); b != 1202 || p != 14 {
		t.Errorf("%d bytes, %d packets", b, p)
	}
	if b, p := parseNetDev("eth0: 1 2"); b != 0 || p != 0 {
		t.Errorf("%d, %d", b, p)
	}
}

func TestParseCPUModel(t *testing.T) {
	for s, want := range map[string]string{
		"processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n":          "AMD EPYC",
		"processor : 0\nBogoMIPS : 50\n\nModel : Raspberry Pi 5 Rev 1.0\n": "Raspberry Pi 5 Rev 1.0",
	} {
		if got := parseCPUModel(s); got != want {
			t.Errorf("%q: %q", s, got)
		}
	}
	if parseCPUModel("") == "" {
		t.Error("no name at all")
	}
}

func TestActiveOffloads(t *testing.T) {
	var names []byte
	for i := range 40 {
		name := map[int]string{0: "tx-scatter-gather", 1: "highdma", 2: "tx-tcp-segmentation", 35: "tx-udp-segmentation", 36: "rx-checksum"}[i]
		names = append(names, append([]byte(name), make([]byte, ethStringLength-len(name))...)...)
	}
	blocks := make([]byte, 32)
	binary.NativeEndian.PutUint32(blocks[8:], 1<<1|1<<2) // active
	binary.NativeEndian.PutUint32(blocks[4:], 1<<0)      // requested only
	binary.NativeEndian.PutUint32(blocks[24:], 1<<3)
	if got := activeOffloads(names, blocks); !slices.Equal(got, []string{"tx-tcp-segmentation", "tx-udp-segmentation"}) {
		t.Errorf("%q", got)
	}
	if got := activeOffloads(names, nil); len(got) != 0 {
		t.Errorf("%q", got)
	}
}

func TestValues(t *testing.T) {
	stream := measurement{name: "tcp out", kind: "stream"}
	vs, err := stream.values(load.Result{Bytes: 250e6, Elapsed: time.Second})
	if err != nil || !slices.Equal(vs, []value{{"tcp out", 2, "Gbit/s"}}) {
		t.Errorf("%v, %v", vs, err)
	}
	flood := measurement{name: "udp in", kind: "flood"}
	vs, err = flood.values(load.Result{Bytes: 1, Sent: 200, Received: 150, Elapsed: time.Second / 2})
	if err != nil || !slices.Equal(vs, []value{{"udp in", 300, "datagrams/s"}, {"udp in loss", 0.25, "share"}}) {
		t.Errorf("%v, %v", vs, err)
	}
	crr := measurement{name: "crr 1", kind: "crr"}
	vs, err = crr.values(load.Result{Ops: 10, Errors: 1, Elapsed: time.Second, P50: 50 * time.Microsecond, P99: time.Millisecond, Max: time.Second})
	if err != nil || len(vs) != 5 || vs[1] != (value{"crr 1 p50", 50, "µs"}) || vs[3].v != 1e6 || vs[4].v != 1 {
		t.Errorf("%v, %v", vs, err)
	}
	for _, m := range []measurement{stream, flood, crr} {
		if vs, err := m.values(load.Result{Elapsed: time.Second, FirstErr: "refused"}); err == nil {
			t.Errorf("%s of nothing: %v", m.kind, vs)
		}
	}
}

// What is held or made of a number, and why it is not all, is said.
func TestShort(t *testing.T) {
	hold := measurement{name: "flows", kind: "hold", count: 10000, held: true}
	row := measurement{name: "crr row", kind: "crr", count: 100}
	for _, c := range []struct {
		m    measurement
		r    load.Result
		want string
	}{
		{hold, load.Result{Ops: 10000}, ""},
		{hold, load.Result{Ops: 8190, Errors: 1810, FirstErr: "too many open files"}, "held 8190 of 10000: too many open files"},
		{row, load.Result{Ops: 100}, ""},
		{row, load.Result{Ops: 98, Errors: 2, FirstErr: "refused"}, "2 requests failed, the first with: refused"},
		{row, load.Result{Ops: 60, Elapsed: 100 * time.Second}, "made 60 of 100 within 1m40s"},
		{row, load.Result{Ops: 60, Errors: 1, FirstErr: "refused", Elapsed: time.Second}, "made 61 of 100 within 1s, of which 1 failed, the first with: refused"},
		{measurement{kind: "crr"}, load.Result{Ops: 5}, ""},
		{measurement{kind: "stream"}, load.Result{Bytes: 5}, ""},
	} {
		got := ""
		if err := c.m.short(c.r, fullTime); err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%+v: %q, want %q", c.r, got, c.want)
		}
	}
	for _, v := range variants {
		for _, m := range v.measurements {
			if m.name == "flows" && m.config(fullTime).Count != 10000 {
				t.Errorf("%s: %d flows", v.name, m.config(fullTime).Count)
			}
		}
	}
}

// What the bench starts has the limit, soft as well as hard, which Go's runtime would otherwise put back.
func TestRaiseFiles(t *testing.T) {
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Setrlimit(unix.RLIMIT_NOFILE, &was) }()
	if err := raiseFiles(); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("sh", "-c", "ulimit -Sn; ulimit -Hn").Output()
	var soft, hard uint64
	if _, serr := fmt.Sscan(string(out), &soft, &hard); err != nil || serr != nil {
		t.Fatalf("%v, %v: %q", err, serr, out)
	}
	if soft != min(hard, filesWanted) || hard < was.Max {
		t.Errorf("a child may have %d files open, %d at most, where %d were allowed", soft, hard, was.Max)
	}
	if m := thisMachine(); m.Files != int(soft) {
		t.Errorf("this process: %d, its child: %d", m.Files, soft)
	}
}

// A measurement that is taken once more beside others is the same.
func TestBeside(t *testing.T) {
	for _, v := range variants {
		for _, m := range v.measurements {
			alone, ok := strings.CutSuffix(m.name, " beside")
			if ok && !slices.ContainsFunc(v.measurements, func(o measurement) bool { o.name += " beside"; return o == m }) {
				t.Errorf("%s: there is no %q like %q", v.name, alone, m.name)
			}
		}
	}
}

func TestFilesText(t *testing.T) {
	if s := filesText([]int{os.Getpid()}); !strings.Contains(s, ".test has ") || !strings.Contains(s, " files open, of ") || strings.Contains(s, "unknown") {
		t.Errorf("of this process: %q", s)
	}
	if s := parseFiles("Limit  Soft Limit  Hard Limit  Units\nMax open files            1024                 20000                files\n"); s != "1024" {
		t.Errorf("soft limit: %q", s)
	}
	if s := parseFiles("") + parseFiles("Max open files"); s != "an unknown numberan unknown number" {
		t.Errorf("no limit: %q", s)
	}
	if s := filesText(nil); s != "" {
		t.Errorf("of none: %q", s)
	}
}

func TestChoose(t *testing.T) {
	names := func(ps []peer) string {
		var out []string
		for _, p := range ps {
			out = append(out, p.name)
		}
		return strings.Join(out, " ")
	}
	for _, c := range []struct{ scenario, names, want, unknown string }{
		{"nat", "", "kernel patchbay patchbay@bypass slirp4netns pasta pasta@newest gvproxy patchbay@65520 slirp4netns@65520 pasta@65520 pasta@newest65520 host", ""},
		{"nat", "all", "kernel patchbay patchbay@bypass slirp4netns pasta pasta@newest gvproxy patchbay@65520 slirp4netns@65520 pasta@65520 pasta@newest65520 host", ""},
		{"nat@rtt10", "auto", "kernel patchbay slirp4netns pasta pasta@newest gvproxy", ""},
		{"nat", "pasta, vde_switch,passt", "kernel pasta", "passt"},
		{"switch", "pasta,vde_switch", "kernel vde_switch", ""},
		{"switch", "auto", "kernel patchbay veth vde_switch openvswitch gvproxy", ""},
		{"switch@pairs4", "auto", "kernel patchbay vde_switch openvswitch", ""},
		{"tunnel@loss0.1", "patchbay,patchbay@sealed", "kernel patchbay patchbay@sealed", ""},
	} {
		v, ok := variantOf(c.scenario)
		if !ok {
			t.Fatalf("no variant %q", c.scenario)
		}
		got, unknown := choose(v, c.names)
		if names(got) != c.want || strings.Join(unknown, " ") != c.unknown {
			t.Errorf("%s %q: %s; unknown %q", c.scenario, c.names, names(got), unknown)
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	for want, c := range map[string]Config{
		"scenario": {Scenarios: []string{"tunnels"}}, "peer": {Peers: "passt"}, "rounds": {Rounds: -1}, "measurement": {Time: time.Hour}, "congestion": {Congestion: "nonsense"},
	} {
		if _, err := c.withDefaults(); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "use ") {
			t.Errorf("%+v: %v", c, err)
		}
	}
	c, err := Config{}.withDefaults()
	if err != nil || !slices.Equal(c.Scenarios, Scenarios()) || c.Rounds != 3 || c.Time != 5*time.Second || c.Congestion != usualCongestion(t) {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestRoundsTurn(t *testing.T) {
	var es []entrant
	for _, n := range []string{"kernel", "a", "b", "c"} {
		es = append(es, entrant{peer: peer{name: n}})
	}
	for round, want := range map[int]string{1: "kernel a b c", 2: "kernel b c a", 3: "kernel c a b", 4: "kernel a b c"} {
		var got []string
		for _, e := range inRound(es, round) {
			got = append(got, e.name)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("round %d: %q", round, got)
		}
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0.00", 0.0042: "0.004", 0.25: "0.25", 2.345: "2.35", 45.67: "45.7", 99.97: "100", 12345.6: "12346"} {
		if got := number(v); got != want {
			t.Errorf("%v: %q", v, got)
		}
	}
	if number(math.NaN()) != "–" {
		t.Error("NaN")
	}
	if median([]float64{3, 1, 2}) != 2 || median([]float64{4, 1, 2, 3}) != 2.5 || !math.IsNaN(median(nil)) {
		t.Error("median")
	}
}

// fixedResults has two rounds of two contenders, a third in one round, and absences.
func fixedResults() Results {
	var res Results
	date := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	congested := Congestion{Sockets: "cubic", Namespace: "reno"}
	add := func(round int, scenario, peer, measure, unit string, v, base float64, ps ...Process) {
		r := Row{Scenario: scenario, Peer: peer, Version: peer + " 1.0", Round: round, Measure: measure, Value: v, Unit: unit, Seconds: 5, MTU: 1500,
			Offloads: []string{"tx-tcp-segmentation"}, Foreign: 0.02, Date: date, Commit: "abc1234", Machine: Machine{"6.18", "CPU", 2, 20000, congested}, Near: congested, Far: congested, Processes: ps}
		if base > 0 {
			q := v / base
			r.Ratio = &q
		}
		res.Rows = append(res.Rows, r)
	}
	run := Process{"/usr/bin/patchbay", []string{"patchbay", "run"}}
	for i, k := range []float64{60, 50} {
		add(i+1, "nat", "kernel", "tcp out", "Gbit/s", k, k)
		add(i+1, "nat", "kernel", "rr p50", "µs", 80, 80)
		add(i+1, "nat", "patchbay", "tcp out", "Gbit/s", 15, k, run) // 0.25 and 0.30
		add(i+1, "nat", "patchbay", "rr p50", "µs", 120, 80, run)
		add(i+1, "nat", "patchbay", "rss", "MiB", 40, 0, run)
	}
	add(1, "nat", "pasta", "tcp out", "Gbit/s", 6, 60) // 0.10
	pasta := &res.Rows[len(res.Rows)-1]
	pasta.Note, pasta.Far = "it stalled", Congestion{Sockets: "reno", Namespace: "reno", Refused: "cubic: not permitted"}
	res.Absent = []Absence{{Scenario: "nat", Peer: "gvproxy", Reason: "gvproxy is not installed: build\nit"}, {Scenario: "nat", Peer: "pasta", Round: 2, Measure: "tcp out", Reason: "stalled"}}
	return res
}

func TestReport(t *testing.T) {
	got := Markdown(fixedResults(), issueGoals)
	want, err := os.ReadFile("testdata/report.md")
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the report has changed; now it is:\n%s", got)
	}
	if s := Markdown(Results{}, issueGoals); strings.Contains(s, "|") || !strings.HasPrefix(s, "# ") {
		t.Errorf("of nothing: %s", s)
	}
}

func TestGoals(t *testing.T) {
	sums := summarize(fixedResults().Rows)
	for _, c := range []struct {
		g    Goal
		want string
	}{
		{Goal{Scenario: "nat", Measure: "tcp out", Of: "kernel", AtLeast: 0.27}, "held"}, // 0.275 is the median of the rounds
		{Goal{Scenario: "nat", Measure: "tcp out", Of: "kernel", AtLeast: 0.55}, "**missed**, 50 % short"},
		{Goal{Scenario: "nat", Measure: "tcp out", Of: "pasta", AtLeast: 2.5}, "held"},
		{Goal{Scenario: "nat", Measure: "tcp out", Of: "pasta", AtLeast: 5}, "**missed**, 50 % short"},
		{Goal{Scenario: "nat", Measure: "rr p50", Of: "kernel", AtMost: 1.5}, "held"},
		{Goal{Scenario: "nat", Measure: "rr p50", Of: "kernel", AtMost: 1.2}, "**missed**, 25 % over"},
		{Goal{Scenario: "nat", Measure: "rss", AtMost: 41}, "held"},
		{Goal{Scenario: "nat", Measure: "rss", AtMost: 20}, "**missed**, 100 % over"},
		{Goal{Scenario: "nat", Measure: "tcp out", Of: "gvproxy", AtLeast: 3}, "not measured"},
		{Goal{Scenario: "nat", Measure: "tcp in", Of: "kernel", AtLeast: 3}, "not measured"},
		{Goal{Scenario: "nat", Measure: "rss", Of: "kernel", AtLeast: 3}, "not measured"},
	} {
		if got := c.g.verdict(c.g.value(sums)); got != c.want {
			t.Errorf("%+v: %s, want %s", c.g, got, c.want)
		}
	}
}

func TestProgress(t *testing.T) {
	s := Step{"nat", 1, 3, "pasta", "tcp out", "3.10 Gbit/s", 83 * time.Second}
	var live, lines bytes.Buffer
	p := progress{w: &live, live: true}
	p.step(s)
	p.absent(Absence{Scenario: "nat", Peer: "pasta", Round: 1, Measure: "tcp in", Reason: "a\nb"})
	p.end()
	if got := live.String(); got != "\r\x1b[Knat  round 1/3  pasta        tcp out    3.10 Gbit/s      1:23 min left\r\x1b[Knat pasta round 1 tcp in: a b\n" {
		t.Errorf("%q", got)
	}
	p = progress{w: &lines}
	p.step(s)
	s.Measure, s.Left = "tcp in", 70*time.Second
	p.step(s)
	s.Peer, s.Left = "slirp4netns", 0
	p.step(s)
	if got := lines.String(); got != "nat round 1/3 pasta, 1:23 min left\nnat round 1/3 slirp4netns, 1 s left\n" {
		t.Errorf("%q", got)
	}
}

// An agent that starts containers has its time for each, not for all; one that says nothing has it once.
func TestGreet(t *testing.T) {
	agent := func(patience time.Duration) (*agentConn, *json.Encoder) {
		inR, inW, err1 := os.Pipe()
		outR, outW, err2 := os.Pipe()
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		a := newAgentConn(inW, outR)
		a.patience = patience
		t.Cleanup(func() { a.close(); inR.Close(); outW.Close() })
		return a, json.NewEncoder(outW)
	}
	const patience = 2 * time.Second
	a, out := agent(patience)
	went := make(chan error, 1)
	go func() {
		var err error
		for ahead := 5; ahead >= 0; ahead-- {
			time.Sleep(patience / 4)
			err = errors.Join(err, out.Encode(greeting{Ahead: ahead, MTU: 1500 - ahead}))
		}
		went <- err
	}()
	if err := errors.Join(a.greet(), <-went); err != nil || a.greeting.MTU != 1500 {
		t.Errorf("one container after the other: %v, %+v", err, a.greeting)
	}
	a, out = agent(20 * time.Millisecond)
	if err := out.Encode(greeting{Ahead: 7}); err != nil {
		t.Fatal(err)
	}
	if err := a.greet(); !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "7 containers") {
		t.Errorf("nothing after the first: %v", err)
	}
	a, out = agent(patience)
	if err := errors.Join(out.Encode(greeting{Ahead: 7}), out.Encode(greeting{Failed: "too far"})); err != nil {
		t.Fatal(err)
	}
	if err := a.greet(); err == nil || err.Error() != "too far" {
		t.Errorf("the target was out of reach: %v", err)
	}
}

func TestTail(t *testing.T) {
	var l tail
	for range 100 {
		if n, err := l.Write([]byte("0123456789\n")); n != 11 || err != nil {
			t.Fatal(n, err)
		}
	}
	if s := l.String(); len(s) > 700 || strings.Contains(s, "\n") || !strings.HasSuffix(s, "0123456789") {
		t.Errorf("%q", s)
	}
}
