package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
)

// outputFlag is on every command that lists or describes.
func outputFlag() cli.Flag {
	return &cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "`FORMAT` text or json", Value: "text"}
}

// show writes v as JSON, or as text does, as outputFlag says.
func show(c *cli.Context, v any, text func(w io.Writer)) error {
	if err := checkOutput(c); err != nil {
		return err
	}
	if c.String("output") == "text" {
		text(c.App.Writer)
		return nil
	}
	enc := json.NewEncoder(c.App.Writer)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// checkOutput refuses a format that show does not know.
func checkOutput(c *cli.Context) error {
	if format := c.String("output"); format != "text" && format != "json" {
		return fmt.Errorf("output format %.40q is not known; use text or json", format)
	}
	return nil
}

// table writes rows in columns, the head first.
func table(w io.Writer, head string, rows [][]string) {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, strings.ReplaceAll(head, " ", "\t"))
	for _, r := range rows {
		for i, s := range r {
			if s == "" {
				r[i] = "-"
			}
		}
		fmt.Fprintln(tw, strings.Join(r, "\t"))
	}
	_ = tw.Flush() // w is what everything else is written to, too
}

// joined writes a list of anything that has a String, with commas.
func joined[T fmt.Stringer](vs []T) string {
	var s []string
	for _, v := range vs {
		s = append(s, v.String())
	}
	return strings.Join(s, ",")
}

// resolvers writes a resolver without its port where that is the usual one.
func resolvers(as []netip.AddrPort) string {
	var s []string
	for _, a := range as {
		if a.Port() == 53 {
			s = append(s, a.Addr().String())
		} else {
			s = append(s, a.String())
		}
	}
	return strings.Join(s, ",")
}

// bytesText is a number of bytes in three digits: 1.21G.
func bytesText(n uint64) string { return siText(float64(n), "B") }

// rateText is bytes a second as bits: 1.21Gbit/s.
func rateText(bytesPerSecond float64) string { return siText(bytesPerSecond*8, "bit/s") }

func siText(v float64, unit string) string {
	prefix := ""
	for _, p := range []string{"k", "M", "G", "T", "P"} {
		if v < 999.5 { // it would be rounded to four digits
			break
		}
		v /= 1000
		prefix = p
	}
	if prefix == "" {
		return fmt.Sprintf("%.0f%s", v, unit)
	}
	return fmt.Sprintf("%.3g%s%s", v, prefix, unit)
}

// ago is how long ago t was, as people say it: 7s, 3m, 2h, 5d. The zero Time is never.
func ago(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	d := time.Since(t)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", max(int(d.Seconds()), 0))
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd", int(d.Hours())/24)
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// parseRate reads what --rate takes: bytes a second, with k, M or G for thousands, millions and billions, or bits where it ends in "bit", as 100Mbit.
func parseRate(s string) (bytesPerSecond int64, err error) {
	n, bits := strings.CutSuffix(strings.TrimSuffix(s, "/s"), "bit")
	factor := 1.0
	if len(n) > 0 {
		switch n[len(n)-1] {
		case 'k', 'K':
			factor = 1e3
		case 'M':
			factor = 1e6
		case 'G':
			factor = 1e9
		}
	}
	if factor > 1 {
		n = n[:len(n)-1]
	}
	v, err := strconv.ParseFloat(n, 64)
	if bits {
		factor /= 8
	}
	v *= factor
	if err != nil || !(v >= 1 && v < 1<<62) {
		return 0, fmt.Errorf("%.40q is not a rate; write bytes a second such as 500k or 10M, or bits such as 100Mbit", s)
	}
	return int64(v), nil
}
