package bench

import (
	"fmt"
	"time"
)

// Row is one measured value and everything needed to believe it. A results file holds one a line, as JSON.
type Row struct {
	Scenario  string     `json:"scenario"`
	Peer      string     `json:"peer"`
	Version   string     `json:"version"`
	Processes []Process  `json:"processes,omitempty"` // the contender's daemons; none for the kernel
	Round     int        `json:"round"`               // from 1
	Measure   string     `json:"measure"`             // such as "tcp out"
	Direction string     `json:"direction,omitempty"` // out: from the client; in: to the client
	Streams   int        `json:"streams,omitempty"`
	Value     float64    `json:"value"`
	Unit      string     `json:"unit"`
	Ratio     *float64   `json:"ratio,omitempty"` // to the kernel's value of the same round; absent where the kernel has none
	Seconds   float64    `json:"seconds,omitempty"`
	Note      string     `json:"note,omitempty"`           // what went wrong although there is a value
	MTU       int        `json:"mtu"`                      // of the client's interface, read back
	Offloads  []string   `json:"offloads,omitempty"`       // active on the client's interface, read back
	Near      Congestion `json:"near_congestion,omitzero"` // of the agent's side
	Far       Congestion `json:"far_congestion,omitzero"`
	Foreign   float64    `json:"foreign"` // share of the machine's CPU time that others used
	Steal     float64    `json:"steal"`   // share that the hypervisor took
	Date      time.Time  `json:"date"`
	Commit    string     `json:"commit"`
	Machine
}

// Process is a daemon as /proc shows it.
type Process struct {
	Exe  string   `json:"exe"`
	Argv []string `json:"argv"`
}

// Machine is where it was measured.
type Machine struct {
	Kernel string `json:"kernel"`
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Files  int    `json:"files,omitempty"` // that a process may have open
	// Congestion is what the bench's own namespaces have, and its sockets in them.
	Congestion Congestion `json:"congestion,omitzero"`
}

// Absence is a contender, or one of its measurements, that has no figure, and why. In a results file its Measure is empty when nothing at all
// could be measured.
type Absence struct {
	Scenario string `json:"scenario"`
	Peer     string `json:"peer"`
	Round    int    `json:"round,omitempty"` // 0: in every round
	Measure  string `json:"measure,omitempty"`
	Reason   string `json:"reason"`
}

// Step is where a run has come to.
type Step struct {
	Scenario      string
	Round, Rounds int
	Peer, Measure string
	Rate          string        // so far, of the measurement under way
	Left          time.Duration // of the whole run, estimated
}

// event is what the process inside the namespaces tells the one outside; exactly one field is set.
type event struct {
	Row    *Row     `json:",omitempty"`
	Absent *Absence `json:",omitempty"`
	Step   *Step    `json:",omitempty"`
	Failed string   `json:",omitempty"` // the reason why nothing can be measured at all
}

// line is Step as one line for a terminal.
func (s Step) line() string {
	rate := s.Rate
	if rate == "" {
		rate = "…"
	}
	return fmt.Sprintf("%s  round %d/%d  %-12s %-10s %-16s %s left", s.Scenario, s.Round, s.Rounds, s.Peer, s.Measure, rate, roundLeft(s.Left))
}

func roundLeft(d time.Duration) string {
	d = max(d, time.Second).Round(time.Second)
	if d >= time.Minute {
		return fmt.Sprintf("%d:%02d min", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%d s", int(d.Seconds()))
}
