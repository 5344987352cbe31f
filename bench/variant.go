package bench

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"patchbay/bench/load"
)

// variant is a scenario under one condition. Its name is what rows and the command line call it.
type variant struct {
	name, scenario, title string   // scenario is whose topology and contenders it has
	family                string   // what the command line calls it together with others, if that is not the scenario
	peers                 []string // whose contenders take part beside the kernel; none: all of the scenario
	measurements          []measurement
	condition
}

// condition is what a variant has otherwise than its scenario. The zero value is the scenario itself: IPv4, MTU 1500, nothing delayed or lost, superframes allowed, one pair.
type condition struct {
	rtt   time.Duration // added to the round trip between the host and the machine outside
	loss  int           // of 1,000 packets on the underlay, each way; they are lost one by one, so superframes are cut before
	mtu   int           // of the underlay, 1500
	v6    bool
	noGSO bool // the two sides send packets of the MTU
	pairs int  // of containers that talk at the same time, 1
	peers int  // further peers of a network between hosts, which do not answer
	bare  bool // patchbay's switch alone, with a large table, and no node around it
}

// baseName names the scenario itself, among its variants, on the command line.
const baseName = "@base"

var (
	streams = []measurement{
		{name: "tcp", kind: "stream", direction: "out"},
		{name: "tcp 4", kind: "stream", direction: "out", cfg: load.Config{Streams: 4}},
	}
	outAndIn = natMeasurements[:2]
	rr       = measurement{name: "rr", kind: "rr"}
	crr      = measurement{name: "crr 1", kind: "crr"}
)

// variants is every variant, in the order they are measured; the scenario itself is the first of its own.
var variants = []variant{
	{name: scenarioSwitch, scenario: scenarioSwitch, measurements: switchMeasurements},
	{
		name: "switch@nogso", scenario: scenarioSwitch, title: "without superframes: each side's kernel sends packets of the MTU",
		measurements: streams, condition: condition{noGSO: true},
	},
	pairsOf(4), pairsOf(32),
	{name: scenarioNAT, scenario: scenarioNAT, measurements: natMeasurements},
	{
		name: "nat@v6", scenario: scenarioNAT, title: "IPv6", peers: []string{peerPatchbay, "slirp4netns", "pasta", "pasta@newest", "gvproxy", peerHost},
		measurements: append(slices.Clone(outAndIn), rr, crr), condition: condition{v6: true},
	},
	farAway(10 * time.Millisecond), farAway(50 * time.Millisecond),
	{name: scenarioPublish, scenario: scenarioPublish, measurements: publishMeasurements},
	{name: scenarioTunnel, scenario: scenarioTunnel, measurements: tunnelMeasurements},
	{
		name: "tunnel@9000", scenario: scenarioTunnel, title: "an underlay with MTU 9000",
		measurements: append(slices.Clone(streams), rr), condition: condition{mtu: 9000},
	},
	lossy(1), lossy(10),
	{
		name: "scale@flows", family: scenarioScale, scenario: scenarioNAT, title: "connections held, and a long row of short ones", peers: []string{peerPatchbay, "slirp4netns", "pasta", "pasta@newest", "gvproxy"},
		measurements: []measurement{
			{name: "flows", kind: "hold", cfg: load.Config{Streams: 4}, count: 10000, held: true},
			rr,
			{name: "crr row", kind: "crr", cfg: load.Config{Streams: 16}, count: 100000},
		},
	},
	{
		name: "scale@macs", family: scenarioScale, scenario: scenarioSwitch, title: "an FDB of 100,000 MACs", peers: []string{peerPatchbay, "vde_switch", "openvswitch"},
		measurements: []measurement{
			{name: "udp 64", kind: "flood", direction: "out", cfg: load.Config{Size: 64}}, rr,
			{name: "macs", kind: "macs", count: 100000, held: true},
			{name: "udp 64 beside", kind: "flood", direction: "out", cfg: load.Config{Size: 64}},
			{name: "rr beside", kind: "rr"},
		},
		condition: condition{bare: true},
	},
	{
		name: "scale@peers", family: scenarioScale, scenario: scenarioTunnel, title: "a network with 100 peers more, which do not answer", peers: []string{peerPatchbay},
		measurements: []measurement{streams[0], rr}, condition: condition{peers: 100},
	},
}

func pairsOf(n int) variant {
	return variant{
		name: fmt.Sprintf("switch@pairs%d", n), scenario: scenarioSwitch, title: fmt.Sprintf("%d pairs on %d ports at the same time, all together", n, 2*n),
		peers: []string{peerPatchbay, "vde_switch", "openvswitch"}, measurements: streams[:1], condition: condition{pairs: n},
	}
}

func farAway(rtt time.Duration) variant {
	return variant{
		name: fmt.Sprintf("nat@rtt%d", rtt.Milliseconds()), scenario: scenarioNAT, title: fmt.Sprintf("%d ms further away", rtt.Milliseconds()),
		peers: []string{peerPatchbay, "slirp4netns", "pasta", "pasta@newest", "gvproxy"}, measurements: append(slices.Clone(outAndIn), crr), condition: condition{rtt: rtt},
	}
}

func lossy(perMille int) variant {
	return variant{
		name: fmt.Sprintf("tunnel@loss%g", float64(perMille)/10), scenario: scenarioTunnel, title: fmt.Sprintf("%g %% of the underlay's packets lost, each way", float64(perMille)/10),
		measurements: append(slices.Clone(streams), rr), condition: condition{loss: perMille},
	}
}

// variantOf finds a variant by its name. There is one for every row that this version writes.
func variantOf(name string) (variant, bool) {
	i := slices.IndexFunc(variants, func(v variant) bool { return v.name == name })
	if i < 0 {
		return variant{}, false
	}
	return variants[i], true
}

// variantsOf is what a name on the command line stands for: a scenario for all its variants, "nat@base" for the scenario itself, "nat@v6" for one. It is empty for others.
func variantsOf(name string) (out []variant) {
	for _, v := range variants {
		if cmp.Or(v.family, v.scenario) == name || v.name == name || v.name == v.scenario && v.name+baseName == name {
			out = append(out, v)
		}
	}
	return out
}

// Variants is every name that means one variant of a scenario that has several.
func Variants() (out []string) {
	for _, v := range variants {
		switch {
		case v.name != v.scenario:
			out = append(out, v.name)
		case len(variantsOf(v.name)) > 1:
			out = append(out, v.name+baseName)
		}
	}
	return out
}

// takesPart reports whether a contender of the scenario is measured under the variant.
func (v variant) takesPart(peer string) bool {
	return peer == peerKernel || len(v.peers) == 0 || slices.ContainsFunc(v.peers, func(p string) bool {
		return p == peer || v.scenario == scenarioTunnel && strings.HasPrefix(peer, p+"@")
	})
}

func measurementsOf(name string) []measurement {
	v, _ := variantOf(name)
	return v.measurements
}

// table is what the report shows of a variant that is not its scenario's first.
func (v variant) table() table {
	t := table{scenario: v.name, title: v.title}
	for _, m := range v.measurements {
		switch m.kind {
		case "stream":
			t.columns = append(t.columns, column{m.name, strings.Replace(m.name, "tcp", "TCP", 1) + " Gbit/s", 1, false})
		case "flood":
			t.columns = append(t.columns, column{m.name, strings.Replace(m.name, "udp", "UDP", 1) + " delivered k/s", 1e-3, false})
		case "hold", "macs":
			t.columns = append(t.columns, column{m.name, m.name, 1, true}, column{m.name + " rate", m.name + " k/s", 1e-3, false}, column{m.name + " failed", "failed", 1, true},
				column{m.name + " memory", "KiB each", 1, true})
		default:
			t.columns = append(t.columns, column{m.name, m.name + " k/s", 1e-3, false}, column{m.name + " p50", m.name + " p50 µs", 1, false})
		}
	}
	t.columns = append(t.columns, column{"rss", "RSS MiB", 1, true}, column{"pss", "PSS MiB", 1, true})
	return t
}

// allTables is every table of the report, in the order of the variants.
func allTables() (out []table) {
	for _, v := range variants {
		if v.name != v.scenario {
			out = append(out, v.table())
			continue
		}
		for _, t := range tables {
			if t.scenario == v.name {
				out = append(out, t)
			}
		}
	}
	return out
}
