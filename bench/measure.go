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
}

var natMeasurements = []measurement{
	{name: "tcp out", kind: "stream", direction: "out"},
	{name: "tcp in", kind: "stream", direction: "in", cfg: load.Config{Reverse: true}},
	{name: "udp out", kind: "flood", direction: "out", cfg: load.Config{Size: 1400}},
	{name: "udp in", kind: "flood", direction: "in", cfg: load.Config{Size: 1400, Reverse: true}},
	{name: "rr", kind: "rr"},
	{name: "crr 1", kind: "crr"},
	{name: "crr 16", kind: "crr", cfg: load.Config{Streams: 16}},
}

var switchMeasurements = []measurement{
	{name: "tcp", kind: "stream", direction: "out"},
	{name: "udp 64", kind: "flood", direction: "out", cfg: load.Config{Size: 64}},
	{name: "rr", kind: "rr"},
}

// runLoad is one measurement on the agent's side.
func runLoad(ctx context.Context, kind string, cfg load.Config) (load.Result, error) {
	switch kind {
	case "stream":
		return load.Stream(ctx, cfg)
	case "flood":
		return load.Flood(ctx, cfg)
	case "rr":
		return load.RequestResponse(ctx, cfg)
	case "crr":
		return load.ConnectRequestClose(ctx, cfg)
	}
	return load.Result{}, fmt.Errorf("measurement %q is not known", kind)
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
	case "stream":
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
	return []value{
		{m.name, r.OpsPerSecond(), "requests/s"},
		{m.name + " p50", us(r.P50), "µs"},
		{m.name + " p99", us(r.P99), "µs"},
		{m.name + " max", us(r.Max), "µs"},
		{m.name + " failed", float64(r.Errors), "requests"},
	}, nil
}
