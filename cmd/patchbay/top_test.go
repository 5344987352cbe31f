package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
	"golang.org/x/sys/unix"

	"patchbay/internal/api"
	"patchbay/internal/testbed"
)

// twoLooks are a network with two attachments, two seconds apart.
func twoLooks() (before, now look) {
	at := time.Date(2026, 11, 25, 3, 0, 0, 0, time.UTC)
	of := func(name string, p api.Port) api.Attachment {
		p.Name = name
		return api.Attachment{Network: "lab", Name: name, Since: at, State: api.StateUp, Addrs: []netip.Addr{netip.MustParseAddr("10.9.0.2"), netip.MustParseAddr("fd09::2")}, Traffic: p}
	}
	lookOf := func(t time.Time, drops uint64, as ...api.Attachment) look {
		n := api.Network{NetworkSpec: api.NetworkSpec{Name: "lab"}, ID: "1", Attachments: len(as), Flows: api.Flows{TCP: 3, UDP: 2}}
		for _, a := range as {
			n.Ports = append(n.Ports, a.Traffic)
		}
		return look{at: t, networks: []api.Network{n}, attachments: as, drops: []api.DropCount{{Network: "lab", Reason: "storm", Count: drops, Meaning: "too many"}, {Network: "lab", Reason: "never"}}}
	}
	return lookOf(at, 10, of("web", api.Port{RxBytes: 100, TxBytes: 1000}), of("db", api.Port{RxBytes: 5000, TxBytes: 50})),
		lookOf(at.Add(2*time.Second), 30, of("web", api.Port{RxBytes: 300, TxBytes: 5000, RxFrames: 8, Dropped: 2, TxRefused: 4}), of("db", api.Port{RxBytes: 40, TxBytes: 2050}))
}

func TestTopRates(t *testing.T) {
	before, now := twoLooks()
	s := topRates(before, now)
	web, db := s.Attachments[0], s.Attachments[1]
	if web.RxRate != 100 || web.TxRate != 2000 || web.RxFrame != 4 || web.Drops != 3 {
		t.Errorf("web: %+v", web)
	}
	if db.RxRate != 0 || db.TxRate != 1000 {
		t.Errorf("db, whose rx counter began anew: %+v", db)
	}
	if n := s.Networks[0]; n.Rate != 100 || n.Drops != 10 || n.FrameRate != 4 {
		t.Errorf("network: %+v", n)
	}
	if len(s.Drops) != 1 || s.Drops[0].Rate != 10 || s.Drops[0].Count != 30 {
		t.Errorf("drops: %+v", s.Drops)
	}
	for key, first := range map[string]string{"name": "db", "rx": "web", "tx": "web", "drops": "web"} {
		if s.sortBy(key); s.Attachments[0].Name != first {
			t.Errorf("by %s: %s is first, want %s", key, s.Attachments[0].Name, first)
		}
	}
	if s = topRates(now, now); s.Attachments[0].TxRate != 0 {
		t.Errorf("one look gave a rate: %+v", s.Attachments[0])
	}
	now.attachments[0].Since = now.at
	if s = topRates(before, now); s.Attachments[0].TxRate != 0 {
		t.Errorf("an attachment of the same name that is another one: %+v", s.Attachments[0])
	}
}

// TestTopFits holds that no screen is written over its edges, however small, and however much there is to tell.
func TestTopFits(t *testing.T) {
	before, now := twoLooks()
	for i := range 100 {
		a := now.attachments[0]
		a.Name = fmt.Sprintf("a-very-long-name-of-a-container-that-nobody-would-type-%d", i)
		now.attachments = append(now.attachments, a)
		now.drops = append(now.drops, api.DropCount{Network: "lab", Reason: fmt.Sprint("reason", i), Count: 1, Meaning: strings.Repeat("why ", 40)})
		now.networks = append(now.networks, api.Network{NetworkSpec: api.NetworkSpec{Name: fmt.Sprint("net", i)}, ID: fmt.Sprint("n", i)})
	}
	for _, size := range [][2]int{{80, 24}, {200, 60}, {20, 5}, {1, 1}, {80, 2}} {
		m, _ := topModel{last: before, by: "rx"}.Update(topSeen{look: now})
		m, _ = m.Update(tea.WindowSizeMsg{Width: size[0], Height: size[1]})
		lines := strings.Split(m.View().Content, "\n")
		if len(lines) > size[1] {
			t.Errorf("%v: %d lines", size, len(lines))
		}
		for _, l := range lines {
			if n := len([]rune(l)); n > size[0] {
				t.Errorf("%v: a line of %d: %q", size, n, l)
			}
		}
		if size[1] == 24 {
			for _, want := range []string{"NETWORK", "ADDRESS", "MEANING", "10.9.0.2"} {
				if !strings.Contains(m.View().Content, want) {
					t.Errorf("%v: no %q in\n%s", size, want, m.View().Content)
				}
			}
		}
	}
}

func TestTopKeys(t *testing.T) {
	before, now := twoLooks()
	var m tea.Model = topModel{last: before, by: "rx"}
	m, _ = m.Update(topSeen{look: now})
	press := func(r rune) tea.Cmd {
		var cmd tea.Cmd
		m, cmd = m.Update(tea.KeyPressMsg{Code: r, Text: string(r)})
		return cmd
	}
	for key, by := range topKeys {
		if press(rune(key[0])); m.(topModel).by != by {
			t.Errorf("%s: sorted by %s, want %s", key, m.(topModel).by, by)
		}
	}
	for range 5 {
		press('j')
	}
	if skip := m.(topModel).skip; skip != 1 {
		t.Errorf("scrolled to %d of 2 attachments", skip)
	}
	press('k')
	press('k')
	if skip := m.(topModel).skip; skip != 0 {
		t.Errorf("scrolled back to %d", skip)
	}
	m, cmd := m.Update(topSeen{err: api.ErrNoNode})
	if cmd == nil || m.(topModel).err == nil || len(m.(topModel).sample.Attachments) != 2 {
		t.Error("a node that has gone for a while ends the view, or empties it")
	}
	for _, k := range []tea.KeyPressMsg{{Code: 'q', Text: "q"}, {Code: 'c', Mod: tea.ModCtrl}, {Code: tea.KeyEscape}} {
		_, cmd := m.Update(k)
		if cmd == nil {
			t.Fatalf("%s does not end it", k)
		}
		if _, ok := cmd().(tea.QuitMsg); !ok {
			t.Errorf("%s does not end it", k)
		}
	}
}

// terminal opens a pseudo-terminal of 80x24.
func terminal(t *testing.T) (ours, theirs *os.File) {
	t.Helper()
	ours, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close() })
	fd := int(ours.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80}); err != nil {
		t.Fatal(err)
	}
	if theirs, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Close() })
	return ours, theirs
}

// TestTop looks at a daemon, on a terminal and for a script.
func TestTop(t *testing.T) {
	testbed.RequireTUN(t)
	d := startDaemon(t)
	d.do("network", "create", "lab")

	var s topSample
	if err := json.Unmarshal([]byte(d.do("top", "-o", "json", "--interval", "200ms")), &s); err != nil {
		t.Fatal(err)
	}
	if s.Seconds < 0.2 || len(s.Networks) != 2 {
		t.Errorf("the sample is %+v", s)
	}
	if text := d.do("top", "--once", "--interval", "200ms"); !strings.Contains(text, "\nlab ") || strings.Contains(text, "\x1b") {
		t.Errorf("top --once wrote %q", text)
	}

	for _, end := range []string{"q", "\x03"} {
		ours, theirs := terminal(t)
		cmd := d.command("top", "--interval", "200ms")
		cmd.Env = append(cmd.Env, "TERM=xterm")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, theirs
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		theirs.Close()
		screen := &lockedBuffer{}
		go func() {
			b := make([]byte, 4096)
			for {
				n, err := ours.Read(b)
				if _, _ = screen.Write(b[:n]); err != nil {
					return
				}
			}
		}()
		if !testbed.Wait(20*time.Second, func() bool { return strings.Contains(screen.String(), "lab") }) {
			t.Errorf("the network is not on the screen: %q", screen)
		}
		if _, err := ours.WriteString("d"); err != nil {
			t.Error(err)
		}
		if !testbed.Wait(20*time.Second, func() bool { return strings.Contains(screen.String(), "drops") }) {
			t.Errorf("the key d changes nothing: %q", screen)
		}
		if _, err := ours.WriteString(end); err != nil {
			t.Error(err)
		}
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("%q ends top with %v: %q", end, err, screen)
			}
		case <-time.After(20 * time.Second):
			_ = cmd.Process.Kill()
			<-done
			t.Errorf("%q does not end top", end)
		}
	}
}

func TestUnits(t *testing.T) {
	for v, want := range map[uint64]string{0: "0B", 999: "999B", 1000: "1kB", 1234: "1.23kB", 999_400: "999kB", 999_700: "1MB", 12_345_678: "12.3MB"} {
		if got := bytesText(v); got != want {
			t.Errorf("bytesText(%d) is %s, want %s", v, got, want)
		}
	}
	var b bytes.Buffer
	table(&b, "A B", [][]string{{"", "x"}})
	if b.String() != "A  B\n-  x\n" {
		t.Errorf("table: %q", b.String())
	}
}
