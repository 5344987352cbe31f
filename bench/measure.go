package bench

import (
	"context"
	"fmt"
	"time"

	"patchbay/bench/load"
)

// measurement is one run of the generator.
type measurement struct {
	name      string
	kind      string // of an agent's request
	cfg       load.Config
	direction string
	// count is how many operations, or things held, it takes at fullTime or longer a measurement, and fewer at less, instead of a time.
	count int
	// held says that they are there afterwards: the daemons' memory for each is a figure too.
	held bool
}

// fullTime is the time of a measurement from which on counts are whole.
const fullTime = 1500 * time.Millisecond

// config is what the generator is told.
func (m measurement) config(d time.Duration) load.Config {
	cfg := m.cfg
	cfg.Duration = d
	if m.count > 0 {
		cfg.Count = max(16, int(float64(m.count)*min(1, d.Seconds()/fullTime.Seconds())))
	}
	return cfg
}

// short is what a result lacks of what was asked for, and why; nil if nothing.
func (m measurement) short(r load.Result, d time.Duration) error {
	count := int64(m.config(d).Count)
	switch done := r.Ops + r.Errors; {
	case m.held && r.Ops < count:
		return fmt.Errorf("held %d of %d: %s", r.Ops, count, r.FirstErr)
	case r.Errors > 0 && done < count:
		return fmt.Errorf("made %d of %d within %v, of which %d failed, the first with: %s", done, count, r.Elapsed.Round(time.Second), r.Errors, r.FirstErr)
	case done < count:
		return fmt.Errorf("made %d of %d within %v", done, count, r.Elapsed.Round(time.Second))
	case r.Errors > 0:
		return fmt.Errorf("%d requests failed, the first with: %s", r.Errors, r.FirstErr)
	}
	return nil
}

var natMeasurements = []measurement{
	{name: "tcp out", kind: "stream", direction: "out"},
	{name: "tcp in", kind: "stream", direction: "in", cfg: load.Config{Reverse: true}},
	{name: "tcp out 4", kind: "stream", direction: "out", cfg: load.Config{Streams: 4}},
	{name: "tcp out 16", kind: "stream", direction: "out", cfg: load.Config{Streams: 16}},
	{name: "tcp out iperf3", kind: iperfKind, direction: "out"},
	{name: "udp out", kind: "flood", direction: "out", cfg: load.Config{Size: 1400}},
	{name: "udp in", kind: "flood", direction: "in", cfg: load.Config{Size: 1400, Reverse: true}},
	{name: "rr", kind: "rr"},
	{name: "crr 1", kind: "crr"},
	{name: "crr 16", kind: "crr", cfg: load.Config{Streams: 16}},
}

var switchMeasurements = []measurement{
	{name: "tcp", kind: "stream", direction: "out"},
	{name: "tcp 4", kind: "stream", direction: "out", cfg: load.Config{Streams: 4}},
	{name: "tcp iperf3", kind: iperfKind, direction: "out"},
	{name: "udp 64", kind: "flood", direction: "out", cfg: load.Config{Size: 64}},
	{name: "udp 1400", kind: "flood", direction: "out", cfg: load.Config{Size: 1400}},
	{name: "rr", kind: "rr"},
	{name: "crr 1", kind: "crr"},
}

var publishMeasurements = []measurement{
	{name: "tcp in", kind: "stream", direction: "in"},
	{name: "tcp out", kind: "stream", direction: "out", cfg: load.Config{Reverse: true}},
	{name: "udp in", kind: "flood", direction: "in", cfg: load.Config{Size: 1400}},
	{name: "rr", kind: "rr"},
	{name: "crr 1", kind: "crr"},
	{name: "crr 16", kind: "crr", cfg: load.Config{Streams: 16}},
}

var tunnelMeasurements = []measurement{
	{name: "tcp", kind: "stream", direction: "out"},
	{name: "tcp 4", kind: "stream", direction: "out", cfg: load.Config{Streams: 4}},
	{name: "udp 64", kind: "flood", direction: "out", cfg: load.Config{Size: 64}},
	{name: "udp 1200", kind: "flood", direction: "out", cfg: load.Config{Size: 1200}},
	{name: "rr", kind: "rr"},
}

// holder takes measurements on the agent's side, one after the other.
type holder struct {
	device     string // the side's interface
	iperf      string // the program
	congestion string // of the generator's sockets
	letGo      func() error
}

// measure takes one. What is held stays for round trips, and is let go before anything else.
func (h *holder) measure(ctx context.Context, q request) (load.Result, error) {
	if h.letGo != nil && q.Kind != "rr" {
		err := h.letGo()
		h.letGo = nil
		if err != nil {
			return load.Result{}, err
		}
	}
	q.Config.Congestion = h.congestion
	switch q.Kind {
	case "stream":
		return load.Stream(ctx, q.Config)
	case "flood":
		return load.Flood(ctx, q.Config)
	case "rr":
		return load.RequestResponse(ctx, q.Config)
	case "crr":
		return load.ConnectRequestClose(ctx, q.Config)
	case "hold":
		res, letGo, err := load.Hold(ctx, q.Config)
		h.letGo = letGo
		return res, err
	case "macs":
		return sendFromMACs(h.device, q.Config.Count)
	case iperfKind:
		return iperf(ctx, h.iperf, q.Config)
	}
	return load.Result{}, fmt.Errorf("measurement %q is not known", q.Kind)
}

// value is one figure of a measurement.
type value struct {
	measure string
	v       float64
	unit    string
}

// values is what a result says, by the names the report knows.
func (m measurement) values(r load.Result) ([]value, error) {
	us := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }
	switch m.kind {
	case "stream", iperfKind:
		if r.Bytes == 0 {
			return nil, fmt.Errorf("no byte arrived")
		}
		return []value{{m.name, r.BitsPerSecond() / 1e9, "Gbit/s"}}, nil
	case "flood":
		if r.Received == 0 {
			return nil, fmt.Errorf("none of %d datagrams arrived", r.Sent)
		}
		vs := []value{{m.name, r.PacketsPerSecond(), "datagrams/s"}}
		if r.Sent > 0 {
			vs = append(vs, value{m.name + " loss", 1 - float64(r.Received)/float64(r.Sent), "share"})
		}
		return vs, nil
	}
	if r.Ops == 0 {
		return nil, fmt.Errorf("no request was answered: %s", r.FirstErr)
	}
	if m.held {
		return []value{{m.name, float64(r.Ops), "held"}, {m.name + " rate", r.OpsPerSecond(), "a second"}, {m.name + " failed", float64(r.Errors), "requests"}}, nil
	}
	return []value{
		{m.name, r.OpsPerSecond(), "requests/s"},
		{m.name + " p50", us(r.P50), "µs"},
		{m.name + " p99", us(r.P99), "µs"},
		{m.name + " max", us(r.Max), "µs"},
		{m.name + " failed", float64(r.Errors), "requests"},
	}, nil
}
