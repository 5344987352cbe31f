package bench

import (
	"fmt"
	"math"
	"strings"
)

// Goal is what a project promised itself about patchbay's figures in one run.
type Goal struct {
	Scenario, Text string
	// Measure of patchbay, against the same of Of; Of "" means the value itself.
	Measure, Of string
	// AtLeast and AtMost bound the quotient, or the value; 0 means no bound.
	AtLeast, AtMost float64
}

// issueGoals are those of issue 2.
var issueGoals = func() []Goal {
	gs := []Goal{
		{Scenario: scenarioSwitch, Text: "TCP, of kernel bridge", Measure: "tcp", Of: peerKernel, AtLeast: 0.35},
		{Scenario: scenarioNAT, Text: "TCP out, of kernel masquerade", Measure: "tcp out", Of: peerKernel, AtLeast: 0.25},
		{Scenario: scenarioNAT, Text: "TCP in, of kernel masquerade", Measure: "tcp in", Of: peerKernel, AtLeast: 0.25},
	}
	for _, p := range []string{"slirp4netns", "pasta", "gvproxy"} {
		gs = append(gs,
			Goal{Scenario: scenarioNAT, Text: "TCP out, of " + p, Measure: "tcp out", Of: p, AtLeast: 3},
			Goal{Scenario: scenarioNAT, Text: "TCP in, of " + p, Measure: "tcp in", Of: p, AtLeast: 3})
	}
	return append(gs,
		Goal{Scenario: scenarioNAT, Text: "UDP 1400 B out, of kernel masquerade", Measure: "udp out", Of: peerKernel, AtLeast: 0.6},
		Goal{Scenario: scenarioNAT, Text: "UDP 1400 B in, of kernel masquerade", Measure: "udp in", Of: peerKernel, AtLeast: 0.6},
		Goal{Scenario: scenarioNAT, Text: "request-response p50, of kernel masquerade", Measure: "rr p50", Of: peerKernel, AtMost: 1.3},
		Goal{Scenario: scenarioNAT, Text: "RSS of `run` after it all, MiB", Measure: "rss", AtMost: 100e6 / (1 << 20)},
		Goal{Scenario: scenarioNAT, Text: "connections a second, one at a time (on this machine)", Measure: "crr 1", AtLeast: 3000},
		Goal{Scenario: scenarioNAT, Text: "connections a second, 16 at a time (on this machine)", Measure: "crr 16", AtLeast: 5000},
		Goal{Scenario: scenarioNAT, Text: "their p99, µs (on this machine)", Measure: "crr 16 p99", AtMost: 50000})
}()

// value is what the goal is about: NaN where it was not measured.
func (g Goal) value(sums map[summaryKey]summary) float64 {
	own, ok := sums[summaryKey{g.Scenario, peerPatchbay, g.Measure}]
	if !ok {
		return math.NaN()
	}
	if g.Of == "" {
		return own.median
	}
	return own.of(sums[summaryKey{g.Scenario, g.Of, g.Measure}])
}

// verdict is held, missed and by how much, or not measured.
func (g Goal) verdict(v float64) string {
	switch {
	case math.IsNaN(v):
		return "not measured"
	case g.AtLeast > 0 && v < g.AtLeast:
		return fmt.Sprintf("**missed**, %.0f %% short", (1-v/g.AtLeast)*100)
	case g.AtMost > 0 && v > g.AtMost:
		return fmt.Sprintf("**missed**, %.0f %% over", (v/g.AtMost-1)*100)
	}
	return "held"
}

func (g Goal) bound() string {
	if g.AtLeast > 0 {
		return "≥ " + number(g.AtLeast)
	}
	return "≤ " + number(g.AtMost)
}

func writeGoals(b *strings.Builder, sums map[summaryKey]summary, goals []Goal) {
	asked := map[string]bool{}
	for k := range sums {
		if k.peer == peerPatchbay {
			asked[k.scenario] = true
		}
	}
	var lines []string
	for _, g := range goals {
		if asked[g.Scenario] {
			v := g.value(sums)
			lines = append(lines, fmt.Sprintf("| %s | %s | %s | %s | %s |\n", g.Scenario, g.Text, g.bound(), number(v), g.verdict(v)))
		}
	}
	if len(lines) == 0 {
		return
	}
	b.WriteString("\n## Goals\n\n| scenario | patchbay | goal | measured | |\n|---|---|---|---|---|\n" + strings.Join(lines, ""))
}
