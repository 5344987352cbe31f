package bench

import (
	"fmt"
	"io"
	"strings"
)

// progress shows a run to whoever waits for it.
type progress struct {
	w    io.Writer
	live bool
	last string // contender last named, where lines cannot be written over
	dirt bool   // the live line is on the screen
}

func (p *progress) step(s Step) {
	if p.live {
		fmt.Fprintf(p.w, "\r\x1b[K%s", s.line())
		p.dirt = true
		return
	}
	if who := fmt.Sprintf("%s round %d/%d %s", s.Scenario, s.Round, s.Rounds, s.Peer); who != p.last {
		p.last = who
		fmt.Fprintf(p.w, "%s, %s left\n", who, roundLeft(s.Left))
	}
}

func (p *progress) absent(a Absence) {
	p.end()
	fmt.Fprintf(p.w, "%s: %s\n", a.subject(), a.reason())
}

// end clears the live line.
func (p *progress) end() {
	if p.dirt {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.dirt = false
	}
}

func (a Absence) subject() string {
	s := a.Scenario + " " + a.Peer
	if a.Round > 0 {
		s += fmt.Sprintf(" round %d", a.Round)
	}
	if a.Measure != "" {
		s += " " + a.Measure
	}
	return s
}

// reason is on one line, whatever a program said.
func (a Absence) reason() string { return strings.Join(strings.Fields(a.Reason), " ") }
