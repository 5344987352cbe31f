package bench

import (
	"encoding/xml"
	"io"
	"math"
	"regexp"
	"strings"
	"testing"
)

// The page stands alone, has a plot for each measure with figures, and every figure and reason of the report in it as text.
func TestHTML(t *testing.T) {
	res := fixedResults()
	for i, v := range []float64{50, 300, 7000} {
		r := res.Rows[0]
		r.Peer, r.Measure, r.Unit, r.Value, r.Ratio = "patchbay", []string{"crr 1 p50", "crr 1 p99", "crr 1 max"}[i], "µs", v, nil
		res.Rows = append(res.Rows, r)
	}
	page, err := HTML(res, issueGoals)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Rounds: 2", "throughput: TCP out Gbit/s", "what it costs: RSS MiB", "crr 1: latency", "55.0 (50.0–60.0) 1.00×", "50.0 / 300 / 7000", "<title>p99 300 µs</title>",
		`class="held"`, `class="missed"`, "not measured", "pasta 1.0", "/usr/bin/patchbay: patchbay run", "gvproxy is not installed: build it", "nat pasta round 1 tcp out: it stalled",
		"cubic on the generator&#39;s sockets", "on the far side TCP congestion control reno (cubic: not permitted)"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	if outside := regexp.MustCompile(`(?i)(src|href|url|@import|http)[=:( ]`).FindString(page); outside != "" {
		t.Errorf("the page needs something else: %q", outside)
	}
	svgs := regexp.MustCompile(`(?s)<svg.*?</svg>`).FindAllString(page, -1)
	if len(svgs) != 4 { // TCP out, RSS, latencies of rr and crr 1
		t.Errorf("%d plots", len(svgs))
	}
	for _, svg := range svgs {
		for dec := xml.NewDecoder(strings.NewReader(svg)); ; {
			tok, err := dec.Token()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatalf("%v: %s", err, svg)
			}
			if e, ok := tok.(xml.StartElement); ok && (e.Name.Local == "rect" || e.Name.Local == "line") {
				for _, a := range e.Attr {
					if strings.Contains(a.Value, "NaN") || strings.HasPrefix(a.Value, "-") {
						t.Errorf("%s %s is %s", e.Name.Local, a.Name.Local, a.Value)
					}
				}
			}
		}
	}
	if empty, err := HTML(Results{}, issueGoals); err != nil || strings.Contains(empty, "<svg") {
		t.Errorf("of nothing: %v, %s", err, empty)
	}
}

// What comes from outside, such as a reason that a contender gave, is text.
func TestHTMLEscapes(t *testing.T) {
	page, err := HTML(Results{Absent: []Absence{{Scenario: "nat", Peer: "pasta", Reason: "<script>alert(1)</script>"}}}, nil)
	if err != nil || strings.Contains(page, "<script") {
		t.Errorf("%v: %s", err, page)
	}
}

func TestNiceScale(t *testing.T) {
	for top, want := range map[float64]axisScale{0: {1, 0.25}, 60: {60, 10}, 17.4: {20, 5}, 0.44: {0.5, 0.1}, 101: {120, 20}, 9.9: {10, 2}} {
		s := niceScale(top)
		if math.Abs(s.end-want.end) > 1e-9*want.end || math.Abs(s.step-want.step) > 1e-9*want.step {
			t.Errorf("%v: %+v, want %+v", top, s, want)
		}
	}
}
