package bench

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
)

// column is a measure in a table of the report.
type column struct {
	measure, title string
	scale          float64 // value in the unit of the title
	plain          bool    // no ratio, where the kernel has none or it says nothing
}

type table struct {
	scenario, title string
	columns         []column
}

var tables = []table{
	{scenarioSwitch, "two namespaces joined, MTU 1500", []column{
		{"tcp", "TCP 1 stream Gbit/s", 1, false}, {"tcp 4", "TCP 4 streams Gbit/s", 1, false}, {"tcp iperf3", "TCP by iperf3 Gbit/s", 1, false},
		{"udp 64", "UDP 64 B delivered k/s", 1e-3, false}, {"udp 1400", "UDP 1400 B delivered k/s", 1e-3, false},
		{"rr", "TCP RR k/s", 1e-3, false}, {"rr p50", "RR p50 µs", 1, false}, {"rr p99", "RR p99 µs", 1, false},
		{"crr 1", "connect-request-close k/s", 1e-3, false}, {"crr 1 p50", "its p50 µs", 1, false},
	}},
	{scenarioSwitch, "what it costs", []column{
		{"tcp cpu", "daemon CPU s/GB", 1, true}, {"tcp system cpu", "system CPU s/GB", 1, false}, {"udp 64 loss", "UDP 64 B lost", 1, true}, {"udp 1400 loss", "UDP 1400 B lost", 1, true},
		{"rss", "RSS MiB", 1, true}, {"rss peak", "RSS peak MiB", 1, true}, {"pss", "PSS MiB", 1, true},
	}},
	{scenarioNAT, "throughput", []column{
		{"tcp out", "TCP out Gbit/s", 1, false}, {"tcp in", "TCP in Gbit/s", 1, false},
		{"tcp out 4", "out, 4 streams", 1, false}, {"tcp out 16", "out, 16 streams", 1, false}, {"tcp out iperf3", "out, by iperf3", 1, false},
		{"udp out", "UDP 1400 B out delivered k/s", 1e-3, false}, {"udp in", "UDP 1400 B in delivered k/s", 1e-3, false},
	}},
	{scenarioNAT, "request and response over one connection", []column{
		{"rr", "RR k/s", 1e-3, false}, {"rr p50", "p50 µs", 1, false}, {"rr p99", "p99 µs", 1, false},
	}},
	{scenarioNAT, "connect, request, close; one at a time", []column{
		{"crr 1", "k/s", 1e-3, false}, {"crr 1 p50", "p50 µs", 1, false}, {"crr 1 p99", "p99 µs", 1, false}, {"crr 1 max", "max ms", 1e-3, false}, {"crr 1 failed", "failed", 1, true},
	}},
	{scenarioNAT, "connect, request, close; 16 at a time", []column{
		{"crr 16", "k/s", 1e-3, false}, {"crr 16 p50", "p50 µs", 1, false}, {"crr 16 p99", "p99 µs", 1, false}, {"crr 16 max", "max ms", 1e-3, false}, {"crr 16 failed", "failed", 1, true},
	}},
	{scenarioNAT, "what it costs", []column{
		{"tcp out cpu", "daemon CPU s/GB out", 1, true}, {"tcp in cpu", "daemon CPU s/GB in", 1, true},
		{"tcp out system cpu", "system CPU s/GB out", 1, false}, {"udp out loss", "UDP out lost", 1, true}, {"udp in loss", "UDP in lost", 1, true},
		{"rss", "RSS MiB", 1, true}, {"rss peak", "RSS peak MiB", 1, true}, {"pss", "PSS MiB", 1, true},
	}},
	{scenarioPublish, "into a container by a published port, MTU 1500", []column{
		{"tcp in", "TCP in Gbit/s", 1, false}, {"tcp out", "TCP out Gbit/s", 1, false}, {"udp in", "UDP 1400 B in delivered k/s", 1e-3, false},
		{"rr", "RR k/s", 1e-3, false}, {"rr p50", "RR p50 µs", 1, false},
	}},
	{scenarioPublish, "connect, request, close", []column{
		{"crr 1", "1 at a time k/s", 1e-3, false}, {"crr 1 p50", "p50 µs", 1, false}, {"crr 1 failed", "failed", 1, true},
		{"crr 16", "16 at a time k/s", 1e-3, false}, {"crr 16 p99", "p99 µs", 1, false}, {"crr 16 failed", "failed", 1, true},
	}},
	{scenarioPublish, "what it costs", []column{
		{"tcp in cpu", "daemon CPU s/GB in", 1, true}, {"tcp in system cpu", "system CPU s/GB in", 1, false}, {"udp in loss", "UDP in lost", 1, true},
		{"start", "start s", 1, true}, {"rss", "RSS MiB", 1, true}, {"rss peak", "RSS peak MiB", 1, true}, {"pss", "PSS MiB", 1, true},
	}},
	{scenarioTunnel, "two hosts on an underlay with MTU 1500, plain and encrypted", []column{
		{"tcp", "TCP 1 stream Gbit/s", 1, false}, {"tcp 4", "TCP 4 streams Gbit/s", 1, false},
		{"udp 64", "UDP 64 B delivered k/s", 1e-3, false}, {"udp 1200", "UDP 1200 B delivered k/s", 1e-3, false},
		{"rr", "TCP RR k/s", 1e-3, false}, {"rr p50", "RR p50 µs", 1, false}, {"rr p99", "RR p99 µs", 1, false},
	}},
	{scenarioTunnel, "what it costs, both hosts together", []column{
		{"tcp cpu", "daemons CPU s/GB", 1, true}, {"tcp system cpu", "system CPU s/GB", 1, false}, {"udp 64 loss", "UDP 64 B lost", 1, true}, {"udp 1200 loss", "UDP 1200 B lost", 1, true},
		{"rss", "RSS MiB", 1, true}, {"rss peak", "RSS peak MiB", 1, true}, {"pss", "PSS MiB", 1, true},
	}},
}

// summary is a measure of a contender over all rounds.
type summary struct {
	n                int
	median, min, max float64
	ratio            float64         // median of the rounds' ratios; NaN where there is none
	rounds           map[int]float64 // value by round
}

// of is the median quotient to another contender's values of the same rounds; NaN where they have no round in common.
func (s summary) of(other summary) float64 {
	var qs []float64
	for round, v := range s.rounds {
		if o := other.rounds[round]; o > 0 {
			qs = append(qs, v/o)
		}
	}
	return median(qs)
}

type summaryKey struct{ scenario, peer, measure string }

func summarize(rows []Row) map[summaryKey]summary {
	values, ratios, rounds := map[summaryKey][]float64{}, map[summaryKey][]float64{}, map[summaryKey]map[int]float64{}
	for _, r := range rows {
		k := summaryKey{r.Scenario, r.Peer, r.Measure}
		values[k] = append(values[k], r.Value)
		if rounds[k] == nil {
			rounds[k] = map[int]float64{}
		}
		rounds[k][r.Round] = r.Value
		if r.Ratio != nil {
			ratios[k] = append(ratios[k], *r.Ratio)
		}
	}
	out := map[summaryKey]summary{}
	for k, vs := range values {
		out[k] = summary{n: len(vs), median: median(vs), min: slices.Min(vs), max: slices.Max(vs), ratio: median(ratios[k]), rounds: rounds[k]}
	}
	return out
}

// median of vs, NaN of none.
func median(vs []float64) float64 {
	if len(vs) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(vs))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// number has three significant digits, and as many as it takes before the point.
func number(v float64) string {
	switch a := math.Abs(v); {
	case math.IsNaN(v):
		return "–"
	case a >= 99.95:
		return fmt.Sprintf("%.0f", v)
	case a >= 9.995:
		return fmt.Sprintf("%.1f", v)
	case a >= 0.0995 || a == 0:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

// cell is "median (min–max) ratio×"; a single round has no range.
func (s summary) cell(c column) string {
	if s.n == 0 {
		return "–"
	}
	out := number(s.median * c.scale)
	if s.n > 1 {
		out += fmt.Sprintf(" (%s–%s)", number(s.min*c.scale), number(s.max*c.scale))
	}
	if !c.plain && !math.IsNaN(s.ratio) {
		out += fmt.Sprintf(" **%s×**", number(s.ratio))
	}
	return out
}

// Markdown renders results: where it was measured, a table for each question, the goals, who was measured and who was not.
func Markdown(res Results, goals []Goal) string {
	var b strings.Builder
	sums := summarize(res.Rows)
	b.WriteString("# patchbay bench\n\n")
	if len(res.Rows) > 0 {
		fmt.Fprintf(&b, "%s Cells: median (min–max) **ratio to the kernel of the same round**.\n", machineText(res.Rows))
	}
	for _, t := range allTables() {
		t.write(&b, res.Rows, sums)
	}
	writeGoals(&b, sums, goals)
	writeNotes(&b, res.Rows)
	writeContenders(&b, res.Rows)
	if len(res.Absent) > 0 {
		b.WriteString("\n## Not measured\n\n")
		for _, a := range res.Absent {
			fmt.Fprintf(&b, "- %s: %s\n", a.subject(), a.reason())
		}
	}
	return b.String()
}

// machineText says where, when and how it was measured; empty for no rows.
func machineText(rows []Row) string {
	if len(rows) == 0 {
		return ""
	}
	r := rows[0]
	rounds, foreign := 0, 0.0
	for _, r := range rows {
		rounds, foreign = max(rounds, r.Round), max(foreign, r.Foreign+r.Steal)
	}
	files := ""
	if r.Files > 0 { // rows of before have none
		files = fmt.Sprintf(", %d open files a process", r.Files)
	}
	tcp := congestionText(r.Congestion)
	if tcp != "" {
		tcp = ", " + tcp
	}
	return fmt.Sprintf("%s, %s, %d cores, Linux %s%s%s, patchbay %s. Rounds: %d, %s s a measurement. Others used at most %.0f %% of the machine during a measurement.",
		r.Date.Format("2006-01-02"), r.CPU, r.Cores, r.Kernel, files, tcp, r.Commit, rounds, number(r.Seconds), foreign*100)
}

// contenders is who has rows in a scenario, in the order of their first ones.
func contenders(rows []Row, scenario string) (out []string) {
	for _, r := range rows {
		if r.Scenario == scenario && !slices.Contains(out, r.Peer) {
			out = append(out, r.Peer)
		}
	}
	return out
}

func (t table) write(b *strings.Builder, rows []Row, sums map[summaryKey]summary) {
	measured := slices.ContainsFunc(t.columns, func(c column) bool {
		return slices.ContainsFunc(rows, func(r Row) bool { return r.Scenario == t.scenario && r.Measure == c.measure })
	})
	if !measured {
		return
	}
	peers := contenders(rows, t.scenario)
	fmt.Fprintf(b, "\n## %s: %s\n\n| |", t.scenario, t.title)
	for _, c := range t.columns {
		fmt.Fprintf(b, " %s |", c.title)
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(t.columns)) + "\n")
	for _, p := range peers {
		fmt.Fprintf(b, "| %s |", p)
		for _, c := range t.columns {
			fmt.Fprintf(b, " %s |", sums[summaryKey{t.scenario, p, c.measure}].cell(c))
		}
		b.WriteString("\n")
	}
}

// notes say what went wrong where there is a figure all the same, once a measurement.
func notes(rows []Row) (lines []string) {
	for _, r := range rows {
		measured := slices.ContainsFunc(measurementsOf(r.Scenario), func(m measurement) bool { return m.name == r.Measure })
		if r.Note != "" && measured {
			a := Absence{r.Scenario, r.Peer, r.Round, r.Measure, r.Note}
			lines = append(lines, a.subject()+": "+a.reason())
		}
	}
	return lines
}

func writeNotes(b *strings.Builder, rows []Row) {
	if lines := notes(rows); len(lines) > 0 {
		b.WriteString("\n## Measured, but\n\n- " + strings.Join(lines, "\n- ") + "\n")
	}
}

// writeContenders says what ran: version, MTU and offloads read back, a congestion control of its own, command lines from /proc.
func writeContenders(b *strings.Builder, rows []Row) {
	if len(rows) == 0 {
		return
	}
	b.WriteString("\n## What ran\n\n")
	for _, r := range firstRows(rows) {
		fmt.Fprintf(b, "- **%s %s** %s, MTU %d, offloads: %s%s\n", r.Scenario, r.Peer, r.Version, r.MTU, offloadText(r.Offloads), r.otherwise())
		for _, p := range r.Processes {
			fmt.Fprintf(b, "  - `%s`: `%s`\n", p.Exe, strings.Join(p.Argv, " "))
		}
	}
}

func offloadText(fs []string) string {
	if len(fs) == 0 {
		return "none"
	}
	seen := map[string]bool{}
	for _, f := range fs {
		seen[f] = true
	}
	return strings.Join(slices.Sorted(maps.Keys(seen)), " ")
}
