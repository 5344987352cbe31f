package bench

import (
	_ "embed"
	"html/template"
	"math"
	"slices"
	"strconv"
	"strings"
)

// HTML renders results as one page that needs nothing else: a plot for each column of the report's tables, with the spread of the rounds, latency percentiles side by side, the goals, and the
// Markdown report's other lists. Plots are SVG; numbers are in the page as text, too.
func HTML(res Results, goals []Goal) (string, error) {
	var b strings.Builder
	err := page.Execute(&b, newView(res, goals))
	return b.String(), err
}

//go:embed page.html
var pageText string

var page = template.Must(template.New("page").Parse(pageText))

// view is what the page shows.
type view struct {
	Machine   string
	Scenarios []section
	Goals     []goalView
	Notes     []string
	Ran       []ranView
	Absent    []string
}

type section struct {
	Name  string
	Plots []plot
}

type goalView struct{ Scenario, Text, Bound, Value, Verdict, Class string }

type ranView struct {
	Name, Version, Offloads, Otherwise string
	MTU                                int
	Processes                          []string
}

// Sizes of a plot, in pixels.
const (
	plotWidth  = 720
	plotLeft   = 170 // of names
	plotRight  = 170 // of figures
	plotRow    = 24
	plotTop    = 8
	plotBottom = 22 // of the axis
	barHeight  = 14
)

// plot is one SVG: a line for each contender.
type plot struct {
	Title         string
	Width, Height int
	Axis          int // y of the axis
	Ticks         []tick
	Lines         []plotLine
}

type tick struct {
	X    int
	Text string
}

// plotLine is a bar from the axis' begin to Bar with its range, or marks joined by a line.
type plotLine struct {
	Name, Text string
	Own        bool
	Y          int
	Bar        int // width; 0 for marks
	Lo, Hi     int // x of the range
	Range      bool
	Marks      []mark
}

type mark struct {
	X     int
	Title string
}

func newView(res Results, goals []Goal) view {
	v := view{Machine: machineText(res.Rows)}
	sums := summarize(res.Rows)
	for _, variant := range variants {
		scenario := variant.name
		s := section{Name: scenario}
		for _, t := range allTables() {
			if t.scenario != scenario {
				continue
			}
			for _, c := range t.columns {
				if slices.ContainsFunc(percentileParts, func(part string) bool { return strings.HasSuffix(c.measure, part) }) {
					continue // they have a plot together
				}
				if p, ok := bars(t, c, contenders(res.Rows, scenario), sums); ok {
					s.Plots = append(s.Plots, p)
				}
			}
		}
		for _, m := range variant.measurements {
			if p, ok := percentiles(scenario, m.name, contenders(res.Rows, scenario), sums); ok {
				s.Plots = append(s.Plots, p)
			}
		}
		if len(s.Plots) > 0 {
			v.Scenarios = append(v.Scenarios, s)
		}
	}
	for _, g := range askedGoals(sums, goals) {
		value := g.value(sums)
		verdict := strings.ReplaceAll(g.verdict(value), "**", "")
		class, _, _ := strings.Cut(verdict, ",")
		v.Goals = append(v.Goals, goalView{g.Scenario, g.Text, g.bound(), number(value), verdict, strings.ReplaceAll(class, " ", "-")})
	}
	for _, r := range firstRows(res.Rows) {
		x := ranView{Name: r.Scenario + " " + r.Peer, Version: r.Version, MTU: r.MTU, Offloads: offloadText(r.Offloads), Otherwise: r.otherwise()}
		for _, p := range r.Processes {
			x.Processes = append(x.Processes, p.Exe+": "+strings.Join(p.Argv, " "))
		}
		v.Ran = append(v.Ran, x)
	}
	v.Notes = notes(res.Rows)
	for _, a := range res.Absent {
		v.Absent = append(v.Absent, a.subject()+": "+a.reason())
	}
	return v
}

// bars plots one column. ok is false when nobody has a figure in it.
func bars(t table, c column, peers []string, sums map[summaryKey]summary) (p plot, ok bool) {
	var names []string
	top := 0.0
	for _, peer := range peers {
		if s := sums[summaryKey{t.scenario, peer, c.measure}]; s.n > 0 {
			names = append(names, peer)
			top = max(top, s.max*c.scale)
		}
	}
	if len(names) == 0 {
		return p, false
	}
	p = newPlot(t.title+": "+c.title, len(names))
	scale := niceScale(top)
	x := func(v float64) int { return plotLeft + int(v/scale.end*float64(plotWidth-plotLeft-plotRight)+0.5) }
	for v := 0.0; v <= scale.end*1.0001; v += scale.step {
		p.Ticks = append(p.Ticks, tick{x(v), strconv.FormatFloat(v, 'g', 4, 64)})
	}
	for i, name := range names {
		s := sums[summaryKey{t.scenario, name, c.measure}]
		p.Lines = append(p.Lines, plotLine{
			Name: name, Text: strings.ReplaceAll(s.cell(c), "**", ""), Own: strings.HasPrefix(name, peerPatchbay), Y: plotTop + i*plotRow + plotRow/2,
			Bar: max(x(s.median*c.scale)-plotLeft, 1), Lo: x(s.min * c.scale), Hi: x(s.max * c.scale), Range: s.n > 1,
		})
	}
	return p, true
}

// percentileParts end the names of a latency's measures.
var percentileParts = []string{" p50", " p99", " max"}

// percentiles plots what a latency has of "p50", "p99" and "max", on a logarithmic axis in µs.
func percentiles(scenario, measure string, peers []string, sums map[summaryKey]summary) (p plot, ok bool) {
	var names []string
	least, most := math.Inf(1), 0.0
	for _, peer := range peers {
		if sums[summaryKey{scenario, peer, measure + percentileParts[0]}].n == 0 {
			continue
		}
		names = append(names, peer)
		for _, part := range percentileParts {
			if v := sums[summaryKey{scenario, peer, measure + part}].median; v > 0 {
				least, most = min(least, v), max(most, v)
			}
		}
	}
	if len(names) == 0 || most == 0 {
		return p, false
	}
	p = newPlot(measure+": latency in µs, median of the rounds' p50, p99 and slowest (logarithmic)", len(names))
	lo, hi := math.Floor(math.Log10(least)), math.Ceil(math.Log10(most))
	if hi == lo {
		hi++
	}
	x := func(v float64) int {
		return plotLeft + int((math.Log10(v)-lo)/(hi-lo)*float64(plotWidth-plotLeft-plotRight)+0.5)
	}
	for e := lo; e <= hi; e++ {
		p.Ticks = append(p.Ticks, tick{x(math.Pow(10, e)), strconv.FormatFloat(math.Pow(10, e), 'f', -1, 64)})
	}
	for i, name := range names {
		l := plotLine{Name: name, Own: strings.HasPrefix(name, peerPatchbay), Y: plotTop + i*plotRow + plotRow/2}
		var texts []string
		for _, part := range percentileParts {
			s := sums[summaryKey{scenario, name, measure + part}]
			if s.n == 0 || s.median <= 0 {
				continue
			}
			l.Marks = append(l.Marks, mark{x(s.median), strings.TrimSpace(part) + " " + number(s.median) + " µs"})
			texts = append(texts, number(s.median))
		}
		l.Text = strings.Join(texts, " / ")
		if len(l.Marks) > 0 {
			l.Lo, l.Hi, l.Range = l.Marks[0].X, l.Marks[len(l.Marks)-1].X, true
		}
		p.Lines = append(p.Lines, l)
	}
	return p, true
}

func newPlot(title string, lines int) plot {
	axis := plotTop + lines*plotRow
	return plot{Title: title, Width: plotWidth, Height: axis + plotBottom, Axis: axis}
}

// axisScale is a linear axis from 0.
type axisScale struct{ end, step float64 }

// niceScale ends above top, after four to ten round steps.
func niceScale(top float64) axisScale {
	if top <= 0 {
		return axisScale{1, 0.25}
	}
	unit := math.Pow(10, math.Floor(math.Log10(top)))
	for _, f := range []float64{0.1, 0.2, 0.25, 0.5, 1, 2} {
		if n := math.Ceil(top / (unit * f)); n <= 6 {
			return axisScale{n * unit * f, unit * f}
		}
	}
	return axisScale{10 * unit, 2 * unit}
}

// BarTop, TextY and the ends of the range's line are where the parts of a line stand.
func (l plotLine) BarTop() int { return l.Y - barHeight/2 }
func (l plotLine) TextY() int  { return l.Y + 4 }

// Left and Figures are the x of a plot's bars and of the figures behind them.
func (p plot) Left() int    { return plotLeft }
func (p plot) Names() int   { return plotLeft - 8 }
func (p plot) Figures() int { return plotWidth - plotRight + 8 }
func (p plot) Label() int   { return p.Axis + 15 }
func (p plot) BarH() int    { return barHeight }

// firstRows is the first row of each contender in each scenario.
func firstRows(rows []Row) (out []Row) {
	for _, r := range rows {
		if !slices.ContainsFunc(out, func(o Row) bool { return o.Scenario == r.Scenario && o.Peer == r.Peer }) {
			out = append(out, r)
		}
	}
	return out
}
