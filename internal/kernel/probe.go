package kernel

import (
	"errors"
	"os/exec"
	"time"
)

// Result is what came of one probe.
type Result struct {
	// Name is short and stable: "user-namespaces", "tun", "udp-segment".
	Name string `json:"name"`
	// Need is the least kernel that has it, such as "Linux 4.18".
	Need string `json:"need"`
	// Required: `patchbay run` does not work without it. Otherwise it is slower or lacks something, which Detail says.
	Required bool `json:"required"`
	// OK: it was tried and worked.
	OK bool `json:"ok"`
	// Detail is what was seen; for a failure the reason and what is lost.
	Detail string `json:"detail"`
	// Remedy is what to do about a failure, for somebody with the rights to do it. Empty when OK.
	Remedy string `json:"remedy,omitempty"`
}

// Err is nil when the probe succeeded, else the failure and its remedy in one line.
func (r Result) Err() error {
	if r.OK {
		return nil
	}
	s := r.Name + ": " + r.Detail
	if r.Remedy != "" {
		s += ": " + r.Remedy
	}
	return errors.New(s)
}

// Config adapts All to the program it runs in. The zero value is usable.
type Config struct {
	// Child makes the command that starts this program again to call Inside and nothing else. All adds the namespaces. Nil: as an
	// ordinary user the TAP features are reported as not tried.
	Child func() *exec.Cmd
	// Timeout bounds the child; 0 means 10 s.
	Timeout time.Duration
}

// All runs every probe, in the order `patchbay doctor` shows them.
func All(c Config) []Result {
	rs := []Result{UserNS(), TUN()}
	rs = append(rs, insideProbes(c)...)
	return append(rs,
		IPv6(), Ping(4), Ping(6), LowPorts(),
		UDPSegment(), UDPGRO(), Splice(), Landlock(),
	)
}

func ok(r Result, detail string) Result {
	r.OK, r.Detail, r.Remedy = true, detail, ""
	return r
}

func fail(r Result, detail, remedy string) Result {
	r.OK, r.Detail, r.Remedy = false, detail, remedy
	return r
}
