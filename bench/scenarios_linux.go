package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// eventFD is where the process inside finds the pipe to the one outside.
const eventFD = 3

// innerConfig is what Run tells the process inside the namespaces.
type innerConfig struct {
	Variants []string
	Peers    string
	Rounds   int
	Time     time.Duration
	Commit   string
	Dir      string // for sockets; removed by Run
	TCP      string // congestion control, or empty for the machine's
}

// More than this share of the machine's time used by others, or stolen, and a measurement is made once more. Below repeatFrom the shares are too
// coarse to tell.
const (
	tooForeign = 0.15
	tooStolen  = 0.05
	repeatFrom = time.Second
)

// scenarios is the process inside: PID 1 of its namespace.
func scenarios(ctx context.Context, args []string) error {
	if len(args) != 1 || os.Getpid() != 1 {
		return errors.New("for Run's own use")
	}
	unix.CloseOnExec(eventFD)
	r := &runner{out: json.NewEncoder(os.NewFile(eventFD, "events")), machine: thisMachine()}
	if err := json.Unmarshal([]byte(args[0]), &r.cfg); err != nil {
		return err
	}
	r.iperf, _ = find(iperfKind) // it is not needed
	if err := r.run(ctx); err != nil {
		return r.emit(event{Failed: err.Error()})
	}
	return nil
}

// runner measures.
type runner struct {
	cfg     innerConfig
	machine Machine
	iperf   string // the program iperf3, or empty

	mu  sync.Mutex
	out *json.Encoder

	began       time.Time
	done, total int // measurements
}

// entrant is a contender that can run here.
type entrant struct {
	peer
	paths   map[string]string
	version string
}

func (r *runner) emit(e event) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.out.Encode(e)
}

func (r *runner) run(ctx context.Context) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc of a new PID namespace: %w; a container that masks parts of /proc forbids that", err)
	}
	var err error
	if r.machine.Congestion, err = settleCongestion(r.cfg.TCP); err != nil { // here too, for whatever does not run in a namespace of a site
		return err
	}
	entrants := map[string][]entrant{}
	for _, name := range r.cfg.Variants {
		v, ok := variantOf(name)
		if !ok {
			return fmt.Errorf("no variant %q", name)
		}
		chosen, _ := choose(v, r.cfg.Peers)
		for _, p := range chosen {
			paths, err := p.findAll()
			if err != nil {
				if err := r.emit(event{Absent: &Absence{Scenario: v.name, Peer: p.name, Reason: err.Error()}}); err != nil {
					return err
				}
				continue
			}
			entrants[v.name] = append(entrants[v.name], entrant{p, paths, p.versionOf(ctx, paths, r.cfg.Commit, r.machine)})
			r.total += r.cfg.Rounds * len(r.measurements(v))
		}
		for _, m := range v.measurements {
			if r.without(m) {
				if err := r.emit(event{Absent: &Absence{Scenario: v.name, Peer: "all", Measure: m.name, Reason: iperfAbsence}}); err != nil {
					return err
				}
			}
		}
	}
	r.began = time.Now()
	for _, name := range r.cfg.Variants {
		v, _ := variantOf(name)
		for round := 1; round <= r.cfg.Rounds; round++ {
			base := map[string]float64{}
			for _, e := range inRound(entrants[v.name], round) {
				if err := r.contend(v, round, e, base); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// without reports whether a measurement cannot be taken here.
func (r *runner) without(m measurement) bool { return m.kind == iperfKind && r.iperf == "" }

// measurements are those of v that can be taken here.
func (r *runner) measurements(v variant) []measurement {
	return slices.DeleteFunc(slices.Clone(v.measurements), r.without)
}

// inRound is the order of a round: the baseline first, the others turned by one each time, so that none always follows the same one.
func inRound(es []entrant, round int) []entrant {
	if len(es) < 3 || es[0].name != peerKernel {
		return es
	}
	out := []entrant{es[0]}
	rest := es[1:]
	for i := range rest {
		out = append(out, rest[(i+round-1)%len(rest)])
	}
	return out
}

// contend measures one contender in one round. base has the kernel's values of the round. An error is one of the bench, not of the contender.
func (r *runner) contend(v variant, round int, e entrant, base map[string]float64) error {
	sc, ms := v.name, r.measurements(v)
	planned := r.done + len(ms)
	defer func() { r.done = planned }()
	dir := filepath.Join(r.cfg.Dir, fmt.Sprintf("%s-%d-%d", sc, round, r.done))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	s := newSite(dir, e.paths, v.condition)
	s.tcp = r.cfg.TCP
	if slices.ContainsFunc(ms, func(m measurement) bool { return m.kind == iperfKind }) {
		s.iperf = r.iperf
	}
	defer s.close()
	step := Step{Scenario: sc, Round: round, Rounds: r.cfg.Rounds, Peer: e.name, Measure: "start", Left: r.left()}
	if err := r.emit(event{Step: &step}); err != nil {
		return err
	}
	if err := s.open(v.scenario); err != nil {
		return err
	}
	absent := func(measure string, err error) error {
		return r.emit(event{Absent: &Absence{Scenario: sc, Peer: e.name, Round: round, Measure: measure, Reason: err.Error()}})
	}
	began := time.Now()
	if err := e.start(s); err != nil {
		return absent("", err)
	}
	took := time.Since(began)
	row := Row{
		Scenario: sc, Peer: e.name, Version: e.version, Round: round, Commit: r.cfg.Commit, Machine: r.machine, Seconds: r.cfg.Time.Seconds(),
		MTU: s.agents[0].greeting.MTU, Offloads: s.agents[0].greeting.Offloads, Processes: describe(daemons()),
	}
	row.Near, row.Far = s.congestion()
	report := func(row Row, vs []value) error {
		for _, v := range vs {
			row.Measure, row.Value, row.Unit, row.Ratio, row.Date = v.measure, v.v, v.unit, nil, time.Now().UTC().Truncate(time.Second)
			if e.name == peerKernel {
				base[v.measure] = v.v
			}
			if b := base[v.measure]; b > 0 {
				q := v.v / b
				row.Ratio = &q
			}
			if err := r.emit(event{Row: &row}); err != nil {
				return err
			}
		}
		return nil
	}
	for _, m := range ms {
		step.Measure, step.Rate, step.Left = m.name, "", r.left()
		vs, note, n, err := r.measure(s, m, step)
		r.done++
		if err != nil {
			if err := absent(m.name, s.why(err)); err != nil {
				return err
			}
			continue
		}
		row := row
		row.Foreign, row.Steal, row.Direction, row.Streams, row.Note = n.foreign, n.steal, m.direction, max(m.cfg.Streams, 1), note
		if err := report(row, vs); err != nil {
			return err
		}
	}
	if e.name == peerKernel {
		return nil
	}
	ds := daemons()
	if len(ds) == 0 && len(row.Processes) > 0 {
		return absent("rss", errors.New("its processes have ended"))
	}
	mem, err := memoryOf(ds)
	if err != nil {
		return absent("rss", err)
	}
	vs := []value{{"rss", float64(mem.rss) / (1 << 20), "MiB"}, {"rss peak", float64(mem.peak) / (1 << 20), "MiB"}, {"pss", float64(mem.pss) / (1 << 20), "MiB"}}
	if sc == scenarioPublish {
		vs = append(vs, value{"start", took.Seconds(), "s"})
	}
	return report(row, vs)
}

// noise is what else happened on the machine, as shares of its time.
type noise struct{ foreign, steal float64 }

func (n noise) loud() bool { return n.foreign > tooForeign || n.steal > tooStolen }

// measure takes one measurement, and takes it once more if the machine was not quiet; the quieter one counts. The note says what went wrong
// although there are values.
func (r *runner) measure(s *site, m measurement, step Step) (vs []value, note string, n noise, err error) {
	vs, note, n, err = r.measureOnce(s, m, step)
	if err == nil && note == "" && n.loud() && r.cfg.Time >= repeatFrom {
		vs2, note2, n2, err2 := r.measureOnce(s, m, step)
		if err2 == nil && note2 == "" && n2.foreign+n2.steal < n.foreign+n.steal {
			return vs2, note2, n2, nil
		}
	}
	return vs, note, n, err
}

func (r *runner) measureOnce(s *site, m measurement, step Step) (vs []value, note string, n noise, err error) {
	stop := r.watch(m, step)
	defer stop()
	s.logs.reset()
	ds := daemons()
	cpu0, err := readCPU()
	if err != nil {
		return nil, "", n, err
	}
	all0, own0 := allTicks(), ticksOf(ds)
	var before memory
	if m.held {
		if before, err = memoryOf(ds); err != nil {
			return nil, "", n, err
		}
	}
	rep, err := s.agents.do(m, r.cfg.Time)
	if err != nil && rep.Result.Bytes > 0 {
		note, err = err.Error(), nil
	}
	if err != nil {
		return nil, "", n, err
	}
	all1, own1 := allTicks(), ticksOf(ds)
	cpu1, err := readCPU()
	if err != nil {
		return nil, "", n, err
	}
	if short := m.short(rep.Result, r.cfg.Time); short != nil {
		if m.held {
			short = fmt.Errorf("%w%s", short, filesText(ds))
		}
		note = s.why(short).Error()
	}
	if vs, err = m.values(rep.Result); err != nil {
		return nil, "", n, err
	}
	if m.held && len(ds) > 0 {
		after, err := memoryOf(ds)
		if err != nil {
			return nil, "", n, err
		}
		vs = append(vs, value{m.name + " memory", float64(after.rss-before.rss) / 1024 / float64(rep.Result.Ops), "KiB each"})
	}
	if gb := float64(rep.Result.Bytes) / 1e9; m.kind == "stream" || m.kind == iperfKind {
		if len(ds) > 0 {
			vs = append(vs, value{m.name + " cpu", float64(own1-own0) / ticksPerSecond / gb, "s/GB"})
		}
		vs = append(vs, value{m.name + " system cpu", float64(cpu1.busy()-cpu0.busy()) / ticksPerSecond / gb, "s/GB"})
	}
	return vs, note, noiseBetween(cpu0, cpu1, all1-min(all0, all1)), nil
}

// noiseBetween is what else happened between two readings, when our own processes used so many ticks.
func noiseBetween(a, b cpuTimes, own uint64) noise {
	total := float64(b.total() - a.total())
	if total <= 0 {
		return noise{}
	}
	foreign := float64(b.tasks-a.tasks) - float64(own)
	return noise{foreign: max(foreign, 0) / total, steal: float64(b.steal-a.steal) / total}
}

func allTicks() (n uint64) {
	for _, p := range processes() {
		n += p.ticks
	}
	return n
}

// left estimates how long the rest of the run takes.
func (r *runner) left() time.Duration {
	each := r.cfg.Time + 300*time.Millisecond
	if r.done > 0 {
		each = time.Since(r.began) / time.Duration(r.done)
	}
	return each * time.Duration(r.total-r.done)
}

// watch tells the rate of the measurement under way, as the far side's interface counts it.
func (r *runner) watch(m measurement, step Step) (stop func()) {
	done, gone := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(gone)
		_ = r.emit(event{Step: &step}) // whoever is gone does not look
		file := fmt.Sprintf("/proc/%d/net/dev", far())
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		began, left := time.Now(), step.Left
		b0, _ := os.ReadFile(file) // the rate is decoration
		bytes0, packets0 := parseNetDev(string(b0))
		for {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			b, _ := os.ReadFile(file)
			bytes, packets := parseNetDev(string(b))
			s := time.Since(began).Seconds()
			if m.kind == "stream" {
				step.Rate = fmt.Sprintf("%.2f Gbit/s", float64(bytes-bytes0)*8/s/1e9)
			} else {
				step.Rate = fmt.Sprintf("%.0f k frames/s", float64(packets-packets0)/s/1e3)
			}
			step.Left = left - time.Since(began)
			_ = r.emit(event{Step: &step})
		}
	}()
	return func() { close(done); <-gone }
}
