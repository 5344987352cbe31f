package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"patchbay/internal/api"
)

// topKeys are what attachments may be sorted by, each with the key that chooses it.
var topKeys = map[string]string{"n": "name", "r": "rx", "t": "tx", "d": "drops"}

func topCommand() *cli.Command {
	return nodeCommand(&cli.Command{
		Name: "top", Usage: "watch networks, attachments, rates, flows and drops",
		UsageText: `patchbay top [--interval DURATION] [--sort KEY] [--once] [-o json]

Examples:
   patchbay top --sort drops
   patchbay top -o json | jq '.attachments[] | {name, rxRate}'`,
		Description: `Rates are seen from the switch: RX is what a container sends. Keys: n, r, t and d sort by name, RX, TX and drops; up and down scroll; q or ^C ends.
--once, or -o json, prints one sample: the difference between two looks, an interval apart. JSON rates are bytes and frames a second.`,
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "interval", Usage: "look every `DURATION`, 100ms to 1m", Value: time.Second},
			&cli.StringFlag{Name: "sort", Usage: "order attachments by `KEY`: name, rx, tx or drops", Value: "rx"},
			&cli.BoolFlag{Name: "once", Usage: "print one sample, and end"},
		},
	}, true, "", nil, runTop)
}

func runTop(c *cli.Context, client *api.Client) error {
	interval, by := c.Duration("interval"), c.String("sort")
	if interval < 100*time.Millisecond || interval > time.Minute {
		return fmt.Errorf("--interval: %s is out of range; use 100ms to 1m", interval)
	}
	if !slices.Contains([]string{"name", "rx", "tx", "drops"}, by) {
		return fmt.Errorf("--sort: %.40q is no key; use name, rx, tx or drops", by)
	}
	once := c.Bool("once") || c.String("output") == "json"
	if _, err := unix.IoctlGetTermios(int(os.Stdout.Fd()), unix.TCGETS); err != nil && !once {
		return errors.New("standard output is no terminal; give --once, or -o json")
	}
	first, err := topLook(c.Context, client)
	if err != nil {
		return err
	}
	if !once {
		m := topModel{ctx: c.Context, client: client, interval: interval, by: by, last: first, sample: topRates(first, first)}
		_, err := tea.NewProgram(m, tea.WithContext(c.Context)).Run()
		return err
	}
	select {
	case <-c.Context.Done():
		return c.Context.Err()
	case <-time.After(interval):
	}
	second, err := topLook(c.Context, client)
	if err != nil {
		return err
	}
	s := topRates(first, second)
	s.sortBy(by)
	return show(c, s, func(w io.Writer) { s.write(w, 0, 0, 0) })
}

// look is everything the node says at one time.
type look struct {
	at          time.Time
	networks    []api.Network
	attachments []api.Attachment
	drops       []api.DropCount
}

func topLook(ctx context.Context, client *api.Client) (l look, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	l.at = time.Now()
	if l.networks, err = client.Networks(ctx); err != nil {
		return l, err
	}
	if l.attachments, err = client.Attachments(ctx, ""); err != nil {
		return l, err
	}
	l.drops, err = client.Drops(ctx, "")
	return l, err
}

// topSample is what top shows: the difference between two looks. Rates are a second's.
type topSample struct {
	Time        time.Time       `json:"time"`
	Seconds     float64         `json:"seconds"` // between the looks
	Networks    []topNetwork    `json:"networks"`
	Attachments []topAttachment `json:"attachments"`
	Drops       []topDrop       `json:"drops"` // the reasons that have occurred, the most frequent of now first
}

// topNetwork is a network; Rate is of the bytes that came into its switch.
type topNetwork struct {
	Name        string    `json:"name"`
	Attachments int       `json:"attachments"`
	Rate        float64   `json:"rate"`
	FrameRate   float64   `json:"frameRate"`
	Drops       float64   `json:"drops"` // of all reasons
	Flows       api.Flows `json:"flows"`
}

// topAttachment is an attachment; Drops are frames of it, and for it, that were not delivered.
type topAttachment struct {
	Name    string       `json:"name"`
	Network string       `json:"network"`
	Addrs   []netip.Addr `json:"addrs"`
	State   api.State    `json:"state"`
	RxRate  float64      `json:"rxRate"`
	TxRate  float64      `json:"txRate"`
	RxFrame float64      `json:"rxFrameRate"`
	TxFrame float64      `json:"txFrameRate"`
	Drops   float64      `json:"drops"`
}

// topDrop is a drop reason of a network.
type topDrop struct {
	api.DropCount
	Rate float64 `json:"rate"`
}

// topRates is the sample between two looks. What was not there at the first, or began anew since, as after a restart of the node, has no rate yet.
func topRates(before, now look) topSample {
	s := topSample{Time: now.at, Seconds: now.at.Sub(before.at).Seconds(), Networks: []topNetwork{}, Attachments: []topAttachment{}, Drops: []topDrop{}}
	rate := func(was, is uint64) float64 {
		if s.Seconds <= 0 || is < was {
			return 0
		}
		return float64(is-was) / s.Seconds
	}
	networks := make(map[string]api.Network, len(before.networks))
	for _, n := range before.networks {
		networks[n.ID] = n
	}
	drops := make(map[[2]string]uint64, len(before.drops))
	for _, d := range before.drops {
		drops[[2]string{d.Network, d.Reason}] = d.Count
	}
	dropped := make(map[string]float64)
	for _, d := range now.drops {
		if d.Count == 0 {
			continue
		}
		// A reason that has never occurred is in no list, so one that was not there was zero.
		r := rate(drops[[2]string{d.Network, d.Reason}], d.Count)
		dropped[d.Network] += r
		s.Drops = append(s.Drops, topDrop{d, r})
	}
	slices.SortFunc(s.Drops, func(a, b topDrop) int {
		return cmp.Or(cmp.Compare(b.Rate, a.Rate), cmp.Compare(b.Count, a.Count), cmp.Compare(a.Network, b.Network), cmp.Compare(a.Reason, b.Reason))
	})
	for _, n := range now.networks {
		t := topNetwork{Name: n.Name, Attachments: n.Attachments, Drops: dropped[n.Name], Flows: n.Flows}
		ports := make(map[string]api.Port)
		for _, p := range networks[n.ID].Ports {
			ports[p.Name] = p
		}
		for _, p := range n.Ports {
			if was, ok := ports[p.Name]; ok {
				t.Rate += rate(was.RxBytes, p.RxBytes)
				t.FrameRate += rate(was.RxFrames, p.RxFrames)
			}
		}
		s.Networks = append(s.Networks, t)
	}
	attachments := make(map[[2]string]api.Attachment, len(before.attachments))
	for _, a := range before.attachments {
		attachments[[2]string{a.Network, a.Name}] = a
	}
	for _, a := range now.attachments {
		t := topAttachment{Name: a.Name, Network: a.Network, Addrs: a.Addrs, State: a.State}
		if b, ok := attachments[[2]string{a.Network, a.Name}]; ok && b.Since.Equal(a.Since) {
			was, is := b.Traffic, a.Traffic
			t.RxRate, t.TxRate = rate(was.RxBytes, is.RxBytes), rate(was.TxBytes, is.TxBytes)
			t.RxFrame, t.TxFrame = rate(was.RxFrames, is.RxFrames), rate(was.TxFrames, is.TxFrames)
			t.Drops = rate(was.Dropped, is.Dropped) + rate(was.TxRefused, is.TxRefused)
		}
		s.Attachments = append(s.Attachments, t)
	}
	return s
}

// sortBy orders the attachments by one of topKeys; equal ones by network and name.
func (s *topSample) sortBy(key string) {
	slices.SortFunc(s.Attachments, func(a, b topAttachment) int {
		first := 0
		switch key {
		case "name":
			first = cmp.Compare(a.Name, b.Name)
		case "rx":
			first = cmp.Compare(b.RxRate, a.RxRate)
		case "tx":
			first = cmp.Compare(b.TxRate, a.TxRate)
		case "drops":
			first = cmp.Compare(b.Drops, a.Drops)
		}
		return cmp.Or(first, cmp.Compare(a.Network, b.Network), cmp.Compare(a.Name, b.Name))
	})
}

// write lays the sample out in width columns and height lines, attachments from the skip-th on. Zero is as much as it takes.
func (s *topSample) write(w io.Writer, width, height, skip int) {
	var networks, attachments, drops [][]string
	for _, n := range s.Networks {
		networks = append(networks, []string{fit(n.Name, width, 16), fmt.Sprint(n.Attachments), rateText(n.Rate), fmt.Sprintf("%.0f", n.FrameRate), fmt.Sprintf("%.0f", n.Drops),
			fmt.Sprint(n.Flows.TCP), fmt.Sprint(n.Flows.UDP), fmt.Sprint(n.Flows.Ping), fmt.Sprint(n.Flows.Published)})
	}
	for _, a := range s.Attachments[min(skip, len(s.Attachments)):] {
		addrs := joined(a.Addrs)
		if width > 0 && len(a.Addrs) > 0 {
			addrs = a.Addrs[0].String()
		}
		attachments = append(attachments, []string{fit(a.Name, width, 16), fit(a.Network, width, 12), fit(addrs, width, 18), string(a.State), rateText(a.RxRate), rateText(a.TxRate), fmt.Sprintf("%.0f", a.Drops)})
	}
	for _, d := range s.Drops {
		drops = append(drops, []string{fit(d.Network, width, 16), d.Reason, fmt.Sprintf("%.0f", d.Rate), fmt.Sprint(d.Count), d.Meaning})
	}
	if height > 0 {
		// Three heads and two empty lines; attachments get what the others leave.
		room := max(height-5, 3)
		networks = networks[:min(len(networks), max(room/4, 1))]
		drops = drops[:min(len(drops), max(room/4, 1))]
		attachments = attachments[:min(len(attachments), max(room-len(networks)-len(drops), 1))]
	}
	var b bytes.Buffer
	table(&b, "NETWORK ATTACHMENTS RATE FRAMES/s DROPS/s TCP UDP PING PUBLISHED", networks)
	b.WriteByte('\n')
	table(&b, "NAME NETWORK ADDRESS STATE RX TX DROPS/s", attachments)
	b.WriteByte('\n')
	table(&b, "NETWORK DROPPED RATE/s COUNT MEANING", drops)
	lines := 0
	for line := range strings.Lines(b.String()) {
		if lines++; height > 0 && lines > height {
			return
		}
		fmt.Fprintln(w, fit(strings.TrimRight(line, " \n"), width, width))
	}
}

// fit cuts text to n columns where the width of the screen is bounded.
func fit(text string, width, n int) string {
	if r := []rune(text); width > 0 && len(r) > n {
		return string(r[:n-1]) + "~"
	}
	return text
}

// topModel is the live view, as bubbletea wants it: values in, values out.
type topModel struct {
	ctx           context.Context
	client        *api.Client
	interval      time.Duration
	by            string
	skip          int // attachments that have been scrolled away
	width, height int
	last          look
	sample        topSample
	err           error // of the last look; it goes on, as a node may come back
}

type (
	topTick struct{}
	topSeen struct {
		look look
		err  error
	}
)

// Init waits for the second look.
func (m topModel) Init() tea.Cmd { return m.wait() }

func (m topModel) wait() tea.Cmd {
	return tea.Tick(m.interval, func(time.Time) tea.Msg { return topTick{} })
}

// Update is told of keys, sizes and looks.
func (m topModel) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
	case tea.KeyPressMsg:
		switch key := msg.String(); key {
		case "q", "ctrl+c", "esc":
			return m, tea.Quit
		case "down", "j":
			m.skip = min(m.skip+1, max(len(m.sample.Attachments)-1, 0))
		case "up", "k":
			m.skip = max(m.skip-1, 0)
		default:
			if by, ok := topKeys[key]; ok {
				m.by, m.skip = by, 0
			}
		}
	case topTick:
		return m, func() tea.Msg {
			l, err := topLook(m.ctx, m.client)
			return topSeen{l, err}
		}
	case topSeen:
		if m.err = msg.err; m.err == nil {
			m.sample = topRates(m.last, msg.look)
			m.last = msg.look
			m.skip = min(m.skip, max(len(m.sample.Attachments)-1, 0))
		}
		return m, m.wait()
	}
	return m, nil
}

// View is the screen.
func (m topModel) View() tea.View {
	var b strings.Builder
	if m.width > 0 && m.height > 0 {
		title := fmt.Sprintf("patchbay top  %s  %d networks, %d attachments by %s  (n r t d sort, q ends)", m.sample.Time.Format(time.TimeOnly), len(m.sample.Networks), len(m.sample.Attachments), m.by)
		if m.err != nil {
			title = "patchbay top  " + strings.ReplaceAll(m.err.Error(), "\n", "; ")
		}
		fmt.Fprintln(&b, fit(title, m.width, m.width))
	}
	if m.width > 0 && m.height > 1 {
		s := m.sample
		s.Attachments = slices.Clone(s.Attachments)
		s.sortBy(m.by)
		s.write(&b, m.width, m.height-1, m.skip)
	}
	v := tea.NewView(strings.TrimSuffix(b.String(), "\n"))
	v.AltScreen = true
	return v
}
