package bench

import (
	"bytes"
	"encoding/json"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/testbed"
)

// command is patchbay bench as an ordinary user starts it; its report goes to the returned directory.
func command(t *testing.T, path string, args ...string) (cmd *exec.Cmd, dir string) {
	t.Helper()
	testbed.RequireTUN(t)
	dir = filepath.Join(t.TempDir(), "report")
	cmd = testbed.AsOrdinaryUser(exec.Command(testbed.Build(t), append([]string{"bench", "--report", dir}, args...)...))
	cmd.Env = append(os.Environ(), "XDG_CACHE_HOME="+t.TempDir())
	if path != "" {
		cmd.Env = append(cmd.Env, "PATH="+path)
	}
	return cmd, dir
}

// readReport reads what a run has written.
func readReport(t *testing.T, dir string) (res Results, markdown string) {
	t.Helper()
	one := func(pattern string) []byte {
		files, _ := filepath.Glob(filepath.Join(dir, pattern))
		if len(files) != 1 {
			t.Fatalf("%d files %s, want one", len(files), pattern)
		}
		b, err := os.ReadFile(files[0])
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	dec := json.NewDecoder(bytes.NewReader(one("*.jsonl")))
	for {
		var line struct {
			Row
			Reason string `json:"reason"`
		}
		if err := dec.Decode(&line); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if line.Reason == "" {
			res.Rows = append(res.Rows, line.Row)
		} else {
			res.Absent = append(res.Absent, Absence{line.Scenario, line.Peer, line.Round, line.Measure, line.Reason})
		}
	}
	return res, string(one("*.md"))
}

// A short real run of each scenario, as an ordinary user: every figure is there, and so is what makes it believable. No figure is
// judged.
func TestBench(t *testing.T) {
	testbed.Leaks(t)
	testbed.Tool(t, "nft")
	cmd, dir := command(t, "", scenarioSwitch+baseName, scenarioNAT+baseName, scenarioPublish, scenarioTunnel+baseName, "--peers=patchbay,"+peerManyPorts+","+peerSuperframe+","+peerSealed, "--rounds", "1", "--time", "200ms")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	res, md := readReport(t, dir)
	if !bytes.Contains(out, []byte(md)) {
		t.Errorf("the report is not on standard output: %s", out)
	}
	for _, a := range res.Absent {
		t.Errorf("%s: %s", a.subject(), a.Reason)
	}
	exe := testbed.Build(t)
	for _, sc := range []string{scenarioSwitch, scenarioNAT, scenarioPublish, scenarioTunnel} {
		peers := []string{peerKernel, peerPatchbay}
		if sc == scenarioPublish {
			peers = append(peers, peerManyPorts)
		}
		if sc == scenarioTunnel {
			peers = append(peers, peerSuperframe, peerSealed)
		}
		for _, p := range peers {
			var want []string
			for _, m := range measurementsOf(sc) {
				switch m.kind {
				case "stream", iperfKind:
					want = append(want, m.name, m.name+" system cpu")
					if p != peerKernel {
						want = append(want, m.name+" cpu")
					}
				case "flood":
					want = append(want, m.name, m.name+" loss")
				default:
					want = append(want, m.name, m.name+" p50", m.name+" p99", m.name+" max", m.name+" failed")
				}
			}
			if p != peerKernel {
				want = append(want, "rss", "rss peak", "pss")
				if sc == scenarioPublish {
					want = append(want, "start")
				}
			}
			var got []string
			for _, r := range res.Rows {
				if r.Scenario == sc && r.Peer == p {
					got = append(got, r.Measure)
					checkRow(t, r, exe)
				}
			}
			slices.Sort(want)
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("%s %s: measured %q, want %q", sc, p, got, want)
			}
		}
		if !strings.Contains(md, "## "+sc+": ") {
			t.Errorf("no table of %s in the report", sc)
		}
	}
	if strings.Contains(md, "not measured |") && !strings.Contains(md, "of pasta") || !strings.Contains(md, "## Goals") {
		t.Errorf("goals: %s", md)
	}
}

// Each variant is measured, and under its condition where a figure shows that.
func TestVariants(t *testing.T) {
	testbed.Leaks(t)
	testbed.Tool(t, "nft")
	var names []string
	for _, v := range variants {
		if v.name != v.scenario {
			names = append(names, v.name)
		}
	}
	cmd, dir := command(t, "", append([]string{"--peers", "patchbay", "--rounds", "1", "--time", "60ms"}, names...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	res, md := readReport(t, dir)
	for _, a := range res.Absent {
		t.Errorf("%s: %s", a.subject(), a.Reason)
	}
	got := map[summaryKey]float64{}
	for _, r := range res.Rows {
		got[summaryKey{r.Scenario, r.Peer, r.Measure}] = r.Value
	}
	for _, name := range names {
		v, _ := variantOf(name)
		if !strings.Contains(md, "## "+name+": "+v.title) {
			t.Errorf("no table of %s", name)
		}
		for _, p := range []string{peerKernel, peerPatchbay} {
			for _, m := range v.measurements {
				if got[summaryKey{name, p, m.name}] <= 0 {
					t.Errorf("%s %s %s was not measured", name, p, m.name)
				}
			}
			// A connection and a request are two round trips.
			if p50 := got[summaryKey{name, p, "crr 1 p50"}]; v.rtt > 0 && p50 < float64(2*v.rtt.Microseconds()) {
				t.Errorf("%s %s: %v µs to connect and ask", name, p, p50)
			}
		}
		for _, m := range v.measurements {
			if _, ok := got[summaryKey{name, peerPatchbay, m.name + " memory"}]; ok != m.held {
				t.Errorf("%s %s: memory of each: %v", name, m.name, ok)
			}
		}
	}
}

func checkRow(t *testing.T, r Row, exe string) {
	t.Helper()
	who := r.Scenario + " " + r.Peer + " " + r.Measure
	mtu := 1500
	if r.Scenario == scenarioTunnel {
		mtu = map[string]int{peerKernel: 1450, peerPatchbay: 1450, peerSuperframe: 1434, peerSealed: 1418}[r.Peer]
	}
	if r.Round != 1 || r.MTU != mtu || r.Version == "" || r.Commit == "" || r.Kernel == "" || r.CPU == "" || r.Cores == 0 || r.Unit == "" ||
		r.Seconds != 0.2 || time.Since(r.Date) > time.Hour || !slices.Contains(r.Offloads, "tx-tcp-segmentation") {
		t.Errorf("%s: %+v", who, r)
	}
	if has := r.Congestion; has.Sockets != usualCongestion(t) || has.Namespace != has.Sockets && has.Namespace != congestionAlways || has.Refused != "" || r.Near != has || r.Far != has {
		t.Errorf("%s: congestion control %+v, %+v, %+v", who, has, r.Near, r.Far)
	}
	zero := strings.HasSuffix(r.Measure, "loss") || strings.HasSuffix(r.Measure, "failed") || strings.HasSuffix(r.Measure, "cpu") // may be
	if r.Value < 0 || r.Value == 0 && !zero || math.IsInf(r.Value, 0) {
		t.Errorf("%s is %v", who, r.Value)
	}
	if strings.HasSuffix(r.Measure, "failed") && r.Value != 0 {
		t.Errorf("%s: %v", who, r.Value)
	}
	kernelHas := !strings.HasPrefix(r.Measure, "rss") && r.Measure != "pss" && r.Measure != "start" && (!strings.HasSuffix(r.Measure, " cpu") || strings.HasSuffix(r.Measure, "system cpu"))
	if r.Ratio != nil && !kernelHas || r.Ratio == nil && kernelHas && !zero {
		t.Errorf("%s: ratio %v", who, r.Ratio)
	}
	if r.Peer == peerKernel {
		if len(r.Processes) != 0 || r.Ratio != nil && *r.Ratio != 1 {
			t.Errorf("%s: processes %v, ratio %v", who, r.Processes, r.Ratio)
		}
		return
	}
	wantProcesses := map[string]int{scenarioNAT: 2, scenarioSwitch: 3, scenarioPublish: 2, scenarioTunnel: 6}[r.Scenario] // patchbay itself, and the edge process of each container; a daemon and a client more on each host of a tunnel
	if len(r.Processes) != wantProcesses {
		t.Errorf("%s: processes %v", who, r.Processes)
	}
	for _, p := range r.Processes {
		if p.Exe != exe || len(p.Argv) == 0 {
			t.Errorf("%s: %+v is not %s", who, p, exe)
		}
	}
}

// A contender that is missing and one that fails are in the report with the reason, and the others are measured.
func TestMissingAndFailingPeers(t *testing.T) {
	testbed.Leaks(t)
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "pasta"), []byte("#!/bin/sh\necho out of order >&2\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd, dir := command(t, bin, "--rounds", "1", "--time", "50ms", "--peers", "pasta,slirp4netns", "nat")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	res, md := readReport(t, dir)
	reasons := map[string]string{}
	for _, a := range res.Absent {
		reasons[a.Peer] = a.Reason
	}
	if r := reasons["pasta"]; !strings.Contains(r, "out of order") || !strings.Contains(r, "exit status 3") {
		t.Errorf("pasta: %q", r)
	}
	if r := reasons["slirp4netns"]; r != "slirp4netns is not installed: install package slirp4netns" {
		t.Errorf("slirp4netns: %q", r)
	}
	for _, want := range []string{"## Not measured", "out of order", "slirp4netns is not installed"} {
		if !strings.Contains(md, want) {
			t.Errorf("the report does not say %q", want)
		}
	}
}

// An interrupted run ends everything, keeps what it has and says that it is not complete.
func TestInterrupt(t *testing.T) {
	testbed.Leaks(t)
	cmd, dir := command(t, "", "--rounds", "1", "--time", "1s", "--peers", "patchbay", "switch")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	testbed.Eventually(t, 30*time.Second, func() bool {
		files, _ := filepath.Glob(filepath.Join(dir, "*.jsonl"))
		if len(files) == 0 {
			return false
		}
		fi, err := os.Stat(files[0])
		return err == nil && fi.Size() > 0
	})
	if err := cmd.Process.Signal(unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("it reports success")
	}
	res, md := readReport(t, dir)
	if len(res.Rows) == 0 || !strings.Contains(md, "| kernel |") || !strings.Contains(stderr.String(), "canceled") {
		t.Errorf("%d rows; %s; %s", len(res.Rows), md, &stderr)
	}
}

func TestUsageErrors(t *testing.T) {
	for _, args := range [][]string{{"tunnels"}, {"--peers", "passt"}, {"nat", "--rounds", "x"}, {"nat", "--nonsense", "1"}, {"nat", "--time"}, {"nat", "--congestion", "nonsense"}} {
		cmd, dir := command(t, "", args...)
		out, err := cmd.CombinedOutput()
		if err == nil || bytes.Count(out, []byte("\n")) != 1 || !bytes.HasPrefix(out, []byte("patchbay: bench: ")) {
			t.Errorf("%q: %v: %s", args, err, out)
		}
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("%q wrote a report", args)
		}
	}
}
