package bench

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
)

// Goal is what a project promised itself about patchbay's figures in one run.
type Goal struct {
	Scenario, Text string
	// Peer is which patchbay, peerPatchbay if empty. Measure is of it, against the same of Of; Of "" means the value itself.
	Peer, Measure, Of string
	// AtLeast and AtMost bound the quotient, or the value; 0 means no bound.
	AtLeast, AtMost float64
}

var pastas = []string{"pasta", "pasta@newest"}

// issueGoals are those of issues 2, 4 and 5; where two ask for the same, the higher one.
var issueGoals = func() []Goal {
	gs := []Goal{
		{Scenario: scenarioSwitch, Text: "TCP, of kernel bridge", Measure: "tcp", Of: peerKernel, AtLeast: 0.45},
		{Scenario: scenarioSwitch, Text: "UDP 64 B, of kernel bridge", Measure: "udp 64", Of: peerKernel, AtLeast: 0.85},
		{Scenario: scenarioSwitch, Text: "request-response, of kernel bridge", Measure: "rr", Of: peerKernel, AtLeast: 0.95},
	}
	for _, p := range []string{"vde_switch", "openvswitch"} {
		gs = append(gs,
			Goal{Scenario: scenarioSwitch, Text: "TCP, of " + p, Measure: "tcp", Of: p, AtLeast: 6},
			Goal{Scenario: scenarioSwitch, Text: "UDP 64 B, of " + p, Measure: "udp 64", Of: p, AtLeast: 1},
			Goal{Scenario: scenarioSwitch, Text: "TCP: CPU s/GB, of " + p, Measure: "tcp cpu", Of: p, AtMost: 1})
	}
	gs = append(gs, Goal{Scenario: scenarioSwitch, Text: "TCP, of gvproxy", Measure: "tcp", Of: "gvproxy", AtLeast: 25})
	for _, dir := range []string{"out", "in"} {
		gs = append(gs, Goal{Scenario: scenarioNAT, Text: "TCP " + dir + ", of kernel masquerade", Measure: "tcp " + dir, Of: peerKernel, AtLeast: 0.3})
		for _, p := range []string{"slirp4netns", "pasta", "pasta@newest", "gvproxy"} {
			gs = append(gs,
				Goal{Scenario: scenarioNAT, Text: "TCP " + dir + ", of " + p, Measure: "tcp " + dir, Of: p, AtLeast: 6},
				Goal{Scenario: scenarioNAT, Text: "TCP " + dir + ": CPU s/GB, of " + p, Measure: "tcp " + dir + " cpu", Of: p, AtMost: 1})
		}
		gs = append(gs,
			Goal{Scenario: scenarioNAT, Text: "UDP 1400 B " + dir + ", of kernel masquerade", Measure: "udp " + dir, Of: peerKernel, AtLeast: 0.6})
		for _, p := range []string{"pasta@65520", "pasta@newest65520"} {
			gs = append(gs, Goal{Scenario: scenarioNAT, Text: "TCP " + dir + ", of " + p, Measure: "tcp " + dir, Of: p, AtLeast: 1})
		}
		for _, p := range pastas {
			gs = append(gs, Goal{Scenario: scenarioNAT, Text: "UDP 1400 B " + dir + ", of " + p, Measure: "udp " + dir, Of: p, AtLeast: 1})
		}
	}
	for _, p := range pastas {
		gs = append(gs,
			Goal{Scenario: scenarioNAT, Text: "request-response p50, of " + p, Measure: "rr p50", Of: p, AtMost: 1},
			Goal{Scenario: scenarioNAT, Text: "connections a second, one at a time, of " + p, Measure: "crr 1", Of: p, AtLeast: 1},
			Goal{Scenario: scenarioNAT, Text: "connections a second, 16 at a time, of " + p, Measure: "crr 16", Of: p, AtLeast: 1})
	}
	gs = append(gs,
		Goal{Scenario: scenarioNAT, Text: "request-response p50, of kernel masquerade", Measure: "rr p50", Of: peerKernel, AtMost: 1.3},
		Goal{Scenario: scenarioNAT, Text: peerBypass + ": request-response p50, of kernel masquerade", Peer: peerBypass, Measure: "rr p50", Of: peerKernel, AtMost: 1.3},
		Goal{Scenario: scenarioNAT, Text: "connections a second, one at a time (on this machine)", Measure: "crr 1", AtLeast: 3000},
		Goal{Scenario: scenarioNAT, Text: "connections a second, 16 at a time (on this machine)", Measure: "crr 16", AtLeast: 5000},
		Goal{Scenario: scenarioNAT, Text: "their p99, µs (on this machine)", Measure: "crr 16 p99", AtMost: 50000},
		Goal{Scenario: scenarioNAT, Text: "RSS of `run` after it all, MiB", Measure: "rss", AtMost: 100e6 / (1 << 20)},
		Goal{Scenario: scenarioPublish, Text: "TCP in, of rootlesskit", Measure: "tcp in", Of: "rootlesskit", AtLeast: 1},
		Goal{Scenario: scenarioPublish, Text: "RSS with 10,000 ports more, of that without", Peer: peerManyPorts, Measure: "rss", Of: peerPatchbay, AtMost: 1.2})
	for _, p := range []string{"slirp4netns", "pasta", "pasta@newest", "rootlesskit"} {
		gs = append(gs, Goal{Scenario: scenarioPublish, Text: "TCP in: CPU s/GB, of " + p, Measure: "tcp in cpu", Of: p, AtMost: 1})
	}
	for _, p := range []string{"openvswitch", "wireguard-go"} {
		gs = append(gs, Goal{Scenario: scenarioTunnel, Text: "TCP, VXLAN, of " + p, Measure: "tcp", Of: p, AtLeast: 3})
	}
	for _, own := range []string{peerPatchbay, peerSealed} {
		gs = append(gs,
			Goal{Scenario: scenarioTunnel, Text: own + ": UDP 64 B, of wireguard-go", Peer: own, Measure: "udp 64", Of: "wireguard-go", AtLeast: 2},
			Goal{Scenario: scenarioTunnel, Text: own + ": request-response p50, of nebula", Peer: own, Measure: "rr p50", Of: "nebula", AtMost: 1})
	}
	for _, p := range []string{"openvswitch", "wireguard-go", "nebula"} {
		own := peerSealed
		if p == "openvswitch" { // it encrypts nothing
			own = peerPatchbay
		}
		gs = append(gs, Goal{Scenario: scenarioTunnel, Text: own + ": TCP: CPU s/GB, of " + p, Peer: own, Measure: "tcp cpu", Of: p, AtMost: 1})
	}
	return append(gs,
		Goal{Scenario: scenarioTunnel, Text: "TCP, superframes, of our own VXLAN", Peer: peerSuperframe, Measure: "tcp", Of: peerPatchbay, AtLeast: 1.8},
		Goal{Scenario: scenarioTunnel, Text: "TCP, superframes, of kernel vxlan", Peer: peerSuperframe, Measure: "tcp", Of: peerKernel, AtLeast: 0.4},
		Goal{Scenario: scenarioTunnel, Text: "TCP, sealed superframes, of nebula", Peer: peerSealed, Measure: "tcp", Of: "nebula", AtLeast: 1.4},
		Goal{Scenario: scenarioTunnel, Text: "TCP, sealed superframes, of wireguard-go", Peer: peerSealed, Measure: "tcp", Of: "wireguard-go", AtLeast: 4})
}()

// value is what the goal is about: NaN where it was not measured.
func (g Goal) value(sums map[summaryKey]summary) float64 {
	own, ok := sums[summaryKey{g.Scenario, g.peer(), g.Measure}]
	if !ok {
		return math.NaN()
	}
	if g.Of == "" {
		return own.median
	}
	return own.of(sums[summaryKey{g.Scenario, g.Of, g.Measure}])
}

func (g Goal) peer() string { return cmp.Or(g.Peer, peerPatchbay) }

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

// askedGoals are those of the scenarios in which a patchbay has figures.
func askedGoals(sums map[summaryKey]summary, goals []Goal) []Goal {
	asked := map[string]bool{}
	for k := range sums {
		if strings.HasPrefix(k.peer, peerPatchbay) {
			asked[k.scenario] = true
		}
	}
	return slices.DeleteFunc(slices.Clone(goals), func(g Goal) bool { return !asked[g.Scenario] })
}

func writeGoals(b *strings.Builder, sums map[summaryKey]summary, goals []Goal) {
	var lines []string
	for _, g := range askedGoals(sums, goals) {
		v := g.value(sums)
		lines = append(lines, fmt.Sprintf("| %s | %s | %s | %s | %s |\n", g.Scenario, g.Text, g.bound(), number(v), g.verdict(v)))
	}
	if len(lines) == 0 {
		return
	}
	b.WriteString("\n## Goals\n\n| scenario | patchbay | goal | measured | |\n|---|---|---|---|---|\n" + strings.Join(lines, ""))
}
