package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"patchbay/internal/api"
	"patchbay/internal/testbed"
)

// soakTime is how long the soak goes on, unless SOAKTIME says otherwise; `make soak` says ten minutes.
const soakTime = 10 * time.Second

// TestSoak attaches, detaches, publishes, captures, restarts, takes over and kills at random under traffic, and looks at what is left: no descriptor, goroutine, thread, memory, lease, interface,
// flow or process, and every counter in balance. SOAKSEED repeats a run's choices.
//
//	[boxes]      eth0 ─ tap ┐
//	[spaces]     ethN ─ tap ├─ small (12 addresses), lab, quiet (internal) ── daemon ── [external: iperf3]
func TestSoak(t *testing.T) {
	testbed.Leaks(t)
	t.Setenv("GOMAXPROCS", "4") // netstack has so many goroutines for each network, which would come and go with the attachments otherwise
	s := &soak{t: t, iperf3: testbed.Tool(t, "iperf3"), running: map[string]*running{}, publishes: map[string]string{}, ends: time.Now().Add(soakFor(t))}
	seed := rand.Uint64()
	if v := os.Getenv("SOAKSEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	t.Logf("SOAKSEED=%d", seed)
	s.rand = rand.New(rand.NewPCG(seed, 0))
	login := testbed.NewLogin(t)
	s.ext = testbed.NewExternal(t, "external")
	server := s.ext.Command(s.iperf3, "-s")
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Process.Kill(); _ = server.Wait() })
	s.d = startDaemonOf(t, login)
	s.d.do("network", "create", "small", "--subnet", "10.90.0.0/28", "--subnet", "fd90::/64")
	s.d.do("network", "create", "lab")
	s.d.do("network", "create", "quiet", "--internal")
	for range 3 {
		s.spaces = append(s.spaces, newSpace(t, login))
	}
	fresh := s.footprint()

	// The daemon is not replaced in the last third, so that what leaks has time to show.
	calm := time.Until(s.ends) / 3
	steps := map[string]int{}
	for time.Now().Before(s.ends) {
		name, step := s.choose(time.Until(s.ends) < calm)
		steps[name]++
		step()
		if t.Failed() {
			t.Fatalf("after %v", steps)
		}
	}
	t.Logf("steps: %v", steps)
	s.finish(fresh)
}

func soakFor(t *testing.T) time.Duration {
	v := os.Getenv("SOAKTIME")
	if v == "" {
		return soakTime
	}
	d, err := time.ParseDuration(v)
	if err != nil || d <= 0 {
		t.Fatalf("SOAKTIME=%q is no duration; write one such as 10m", v)
	}
	return d
}

// soak is one run. One goroutine walks through it.
type soak struct {
	t      *testing.T
	d      *daemonProc
	ext    *testbed.External
	rand   *rand.Rand
	iperf3 string
	ends   time.Time

	serial    int
	running   map[string]*running // by name; each serves iperf3
	spaces    []*space
	attached  []string          // NETWORK/NAME of attachments in spaces
	publishes map[string]string // id → name of the container
	port      int
}

var soakNetworks = []string{"small", "lab", "quiet"}

func (s *soak) choose(calm bool) (string, func()) {
	steps := []struct {
		name string
		odds int
		do   func()
	}{
		{"run", 6, s.run}, {"end", 4, s.end}, {"attach", 5, s.attach}, {"detach", 4, s.detach}, {"publish", 5, s.publish}, {"unpublish", 4, s.unpublish},
		{"capture", 3, s.capture}, {"traffic", 6, s.traffic}, {"NAT", 4, s.nat}, {"kill a client", 2, s.killClient}, {"balance", 2, s.balance},
		{"takeover", 2, s.d.takeOver}, {"kill", 2, func() { s.d.end(syscall.SIGKILL); s.d.start(); s.settle() }}, {"restart", 1, func() { s.d.end(syscall.SIGTERM); s.d.start(); s.settle() }},
	}
	if calm {
		steps = steps[:len(steps)-3]
	}
	all := 0
	for _, st := range steps {
		all += st.odds
	}
	k := s.rand.IntN(all)
	for _, st := range steps {
		if k -= st.odds; k < 0 {
			return st.name, st.do
		}
	}
	panic("unreachable")
}

// settle waits until everybody who should be there is there again after the daemon was replaced.
func (s *soak) settle() {
	s.t.Helper()
	if !testbed.Wait(20*time.Second, func() bool {
		for name := range s.running {
			if !s.d.up(name) {
				return false
			}
		}
		return true
	}) {
		s.t.Fatalf("not everybody came back: %s", s.d.do("ps"))
	}
}

// pick is one of the running containers, or "".
func (s *soak) pick() string {
	names := make([]string, 0, len(s.running))
	for n := range s.running {
		names = append(names, n)
	}
	if len(names) == 0 {
		return ""
	}
	slices.Sort(names) // so that the seed decides
	return names[s.rand.IntN(len(names))]
}

func (s *soak) run() {
	if len(s.running) >= 8 {
		return
	}
	s.serial++
	name := fmt.Sprintf("box%d", s.serial) // cN is what the daemon calls who has no name
	network := soakNetworks[s.rand.IntN(len(soakNetworks))]
	s.running[name] = s.d.background(name, "--network", network, "--alias", "any", "--", s.iperf3, "-s")
}

func (s *soak) end() {
	if name := s.pick(); name != "" {
		s.running[name].end()
		s.left(name)
	}
}

func (s *soak) killClient() {
	if name := s.pick(); name != "" {
		_ = s.running[name].cmd.Process.Kill() // what it was doing is what this is about
		s.running[name].end()
		s.left(name)
	}
}

// left forgets a container, when the daemon has done so too.
func (s *soak) left(name string) {
	s.t.Helper()
	delete(s.running, name)
	for id, of := range s.publishes {
		if of == name {
			delete(s.publishes, id)
		}
	}
	s.d.gone(name)
}

func (s *soak) attach() {
	if len(s.attached) >= 6 {
		return
	}
	s.serial++
	sp, network, name := s.spaces[s.rand.IntN(len(s.spaces))], soakNetworks[s.rand.IntN(len(soakNetworks))], fmt.Sprintf("a%d", s.serial)
	s.d.do("attach", network, "--pid", fmt.Sprint(sp.pid), "--name", name)
	s.attached = append(s.attached, network+"/"+name)
}

func (s *soak) detach() {
	if len(s.attached) == 0 {
		return
	}
	i := s.rand.IntN(len(s.attached))
	ref := s.attached[i]
	s.attached = append(s.attached[:i], s.attached[i+1:]...)
	testbed.Eventually(s.t, 20*time.Second, func() bool { return s.d.command("inspect", ref).Run() == nil }) // after a kill it is reopened first
	s.d.do("detach", ref)
}

func (s *soak) publish() {
	name := s.pick()
	if name == "" || len(s.publishes) > 20 {
		return
	}
	s.port++
	out, err := s.d.command("publish", "add", name, fmt.Sprintf("%d-%d:%d-%d/%s", 20000+3*s.port, 20002+3*s.port, 5201, 5203, []string{"tcp", "udp"}[s.rand.IntN(2)])).Output()
	if err == nil {
		s.publishes[strings.TrimSpace(string(out))] = name
	} // a container of quiet has no published ports
}

func (s *soak) unpublish() {
	for id := range s.publishes {
		s.d.do("publish", "rm", id)
		delete(s.publishes, id)
		return
	}
}

func (s *soak) capture() {
	ctx, cancel := context.WithTimeout(s.t.Context(), 300*time.Millisecond)
	defer cancel()
	body, err := s.d.client().Capture(ctx, soakNetworks[s.rand.IntN(len(soakNetworks))], api.CaptureSpec{Filter: "tcp or arp", SnapLen: 100})
	if err != nil {
		s.t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, body) // ends with ctx
	body.Close()
}

// traffic is between two containers.
func (s *soak) traffic() {
	name := s.pick()
	if name == "" {
		return
	}
	as, err := s.d.client().Attachments(s.t.Context(), "")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, a := range as {
		if a.Name == name {
			args := []string{"run", "--network", a.Network, "--", s.iperf3, "-c", name, "-t", "1"}
			if s.rand.IntN(2) == 0 {
				args = append(args, "-u", "-b", "50M")
			}
			s.try(args...)
		}
	}
}

// nat is through NAT, to a server outside.
func (s *soak) nat() {
	args := []string{"run", "--network", []string{"small", "lab"}[s.rand.IntN(2)], "--", s.iperf3, "-c", s.ext.Addr4.String(), "-t", "1"}
	if s.rand.IntN(2) == 0 {
		args = append(args, "-R")
	}
	s.try(args...)
}

// try runs a transfer. A server that is busy with another, or not up yet, is no fault.
func (s *soak) try(args ...string) {
	s.t.Helper()
	var out bytes.Buffer
	cmd := s.d.command(args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil && !regexp.MustCompile(`busy|refused`).MatchString(out.String()) {
		s.t.Errorf("patchbay %s: %v: %s", strings.Join(args, " "), err, &out)
	}
}

// footprint is what the daemon takes of the machine.
type footprint struct{ fds, goroutines, threads, rss int }

func (s *soak) footprint() (f footprint) {
	s.t.Helper()
	b, err := s.d.client().Metrics(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	for _, m := range []struct {
		name string
		to   *int
	}{{"process_open_fds", &f.fds}, {"go_goroutines", &f.goroutines}, {"go_threads", &f.threads}, {"process_resident_memory_bytes", &f.rss}} {
		g := regexp.MustCompile(`(?m)^` + m.name + ` ([0-9.e+]+)$`).FindSubmatch(b)
		if g == nil {
			s.t.Fatalf("no metric %s", m.name)
		}
		v, err := strconv.ParseFloat(string(g[1]), 64)
		if err != nil {
			s.t.Fatal(err)
		}
		*m.to = int(v)
	}
	return f
}

// balance looks at every port there is: what came in has been delivered, flooded or dropped, and nothing twice. Frames that are on their way while it looks settle.
func (s *soak) balance() {
	s.t.Helper()
	var wrong string
	if !testbed.Wait(20*time.Second, func() bool {
		nets, err := s.d.client().Networks(s.t.Context())
		if err != nil {
			s.t.Fatal(err)
		}
		wrong = ""
		for _, n := range nets {
			for _, p := range n.Ports {
				if p.RxFrames != p.Unicast+p.Flooded+p.Dropped {
					wrong += fmt.Sprintf("network %s, port %s: %d frames received, %d unicast + %d flooded + %d dropped; ", n.Name, p.Name, p.RxFrames, p.Unicast, p.Flooded, p.Dropped)
				}
			}
		}
		return wrong == ""
	}) {
		s.t.Errorf("counters out of balance: %s", wrong)
	}
}

// finish ends everything and looks at what is left.
func (s *soak) finish(fresh footprint) {
	t, d := s.t, s.d
	s.balance() // while the ports are there: the counters of one that has gone cannot be asked for
	for len(s.running) > 0 {
		s.end()
	}
	for len(s.attached) > 0 {
		s.detach()
	}
	var nets []api.Network
	if !testbed.Wait(20*time.Second, func() bool {
		var err error
		nets, err = d.client().Networks(t.Context())
		if err != nil {
			return false
		}
		for _, n := range nets {
			if n.Attachments != 0 || n.Flows != (api.Flows{}) || len(n.Ports) != 1 {
				return false
			}
		}
		ps, err := d.client().Publishes(t.Context())
		return err == nil && len(ps) == 0
	}) {
		t.Errorf("attachments, flows or ports are left: %+v", nets)
	}
	s.balance()
	for i, sp := range s.spaces {
		if l := sp.links(); strings.Contains(l, "eth") {
			t.Errorf("interfaces are left in namespace %d: %s", i, l)
		}
	}
	var now footprint
	if !testbed.Wait(20*time.Second, func() bool {
		now = s.footprint()
		// The HTTP server has connections and their goroutines coming and going.
		return now.fds <= fresh.fds+8 && now.goroutines <= fresh.goroutines+8
	}) {
		t.Errorf("descriptors and goroutines: %+v at first, %+v now", fresh, now)
		d.end(syscall.SIGQUIT) // and it says what they are
		return
	}
	if now.rss > fresh.rss+100<<20 || now.threads > fresh.threads+40 {
		t.Errorf("memory and threads: %+v at first, %+v now", fresh, now)
	}
	t.Logf("the daemon's footprint: %+v at first, %+v now", fresh, now)
	// Every address of the small network can be had: no lease is left.
	for i := range 12 {
		d.background(fmt.Sprintf("last%d", i), "--network", "small", "--", "sleep", "1000")
	}
	for _, n := range soakNetworks[1:] {
		d.do("network", "rm", n)
	}
	if l, err := net.Listen("tcp", fmt.Sprintf(":%d", 20000+3*s.port)); err != nil {
		t.Errorf("a published port is still open: %v", err)
	} else {
		l.Close()
	}
}
