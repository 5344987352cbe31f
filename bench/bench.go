package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Config says what to measure. The zero value of a field is its documented default.
type Config struct {
	// Scenarios are "switch", "nat", "publish", "tunnel" and "scale"; default all, in this order. A scenario stands for all its variants, such as "nat@v6", which may be named alone; "nat@base"
	// is the scenario under no condition.
	Scenarios []string
	// Peers are names separated by commas, or "all" (default, also by the name of "auto"). The kernel is always measured too.
	Peers string
	// Rounds of every contender, 3.
	Rounds int
	// Time of each measurement, 5 s.
	Time time.Duration
	// Congestion is the name of TCP's congestion control, the same for all contenders, or "machine" for what each namespace has by itself. Default cubic, or reno where the kernel has not loaded that.
	Congestion string
	// Report is a directory for the rows and the report; "" writes no files.
	Report string
	// Commit is the version of the binary.
	Commit string
	// Exe is the program that calls Inner; default this one.
	Exe string
	// Out gets the report, Progress what is going on. Default: nothing.
	Out, Progress io.Writer
	// Live makes Progress one line that is written over and over, for a terminal; otherwise it gets a line for every contender of a round.
	Live bool
}

// Scenarios is every scenario's name.
func Scenarios() []string {
	return []string{scenarioSwitch, scenarioNAT, scenarioPublish, scenarioTunnel, scenarioScale}
}

// Bounds of a Config.
const (
	maxRounds = 100
	minTime   = 50 * time.Millisecond
	maxTime   = time.Minute
)

func (c Config) withDefaults() (Config, error) {
	if len(c.Scenarios) == 0 {
		c.Scenarios = Scenarios()
	}
	for _, s := range c.Scenarios {
		vs := variantsOf(s)
		if len(vs) == 0 {
			return c, fmt.Errorf("scenario %q is not known; use %s", s, strings.Join(append(Scenarios(), Variants()...), ", "))
		}
		if _, unknown := choose(vs[0], c.Peers); len(unknown) > 0 {
			return c, fmt.Errorf("peer %q is not known; use auto, all, or some of %s", unknown[0], strings.Join(peerNames(), ","))
		}
	}
	if c.Rounds == 0 {
		c.Rounds = 3
	}
	if c.Rounds < 1 || c.Rounds > maxRounds {
		return c, fmt.Errorf("%d rounds: use 1 to %d", c.Rounds, maxRounds)
	}
	if c.Time == 0 {
		c.Time = 5 * time.Second
	}
	if c.Time < minTime || c.Time > maxTime {
		return c, fmt.Errorf("%v a measurement: use %v to %v", c.Time, minTime, maxTime)
	}
	available, err := availableCongestion()
	if err != nil {
		return c, err
	}
	if c.Congestion, err = chooseCongestion(c.Congestion, available); err != nil {
		return c, err
	}
	if c.Exe == "" {
		c.Exe = self
	}
	if c.Out == nil {
		c.Out = io.Discard
	}
	if c.Progress == nil {
		c.Progress = io.Discard
	}
	return c, nil
}

// variants are the names of what is to be measured, each once.
func (c Config) variants() (names []string) {
	for _, s := range c.Scenarios {
		for _, v := range variantsOf(s) {
			if !slices.Contains(names, v.name) {
				names = append(names, v.name)
			}
		}
	}
	return names
}

// Results is what a run has found.
type Results struct {
	Rows   []Row
	Absent []Absence
}

// Run measures, writes the report and returns what it is made of. A contender that fails is an Absence, not an error. When ctx ends, every
// process ends, and what was measured until then is reported along with ctx's error. The limit of open files of the calling process is set, and stays so; see raiseFiles.
func Run(ctx context.Context, cfg Config) (res Results, err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return res, err
	}
	tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return res, fmt.Errorf("%w; every contender needs a TUN device that you may open: chmod 666 /dev/net/tun, or run as root", err)
	}
	tun.Close()
	if err := raiseFiles(); err != nil {
		return res, err
	}
	dir, err := os.MkdirTemp("", "pbbench")
	if err != nil {
		return res, err
	}
	defer os.RemoveAll(dir)
	rows, err := openRows(cfg)
	if err != nil {
		return res, err
	}
	events := make(chan event, 64)
	ended := make(chan error, 1)
	go func() { ended <- inside(ctx, cfg, dir, events) }()
	show := progress{w: cfg.Progress, live: cfg.Live}
	for e := range events {
		switch {
		case e.Row != nil:
			res.Rows = append(res.Rows, *e.Row)
			err = errors.Join(err, rows.write(e.Row))
		case e.Absent != nil:
			res.Absent = append(res.Absent, *e.Absent)
			show.absent(*e.Absent)
			err = errors.Join(err, rows.write(e.Absent))
		case e.Step != nil:
			show.step(*e.Step)
		case e.Failed != "":
			err = errors.Join(err, errors.New(e.Failed))
		}
	}
	show.end()
	err = errors.Join(err, <-ended, ctx.Err())
	report := Markdown(res, issueGoals)
	fmt.Fprint(cfg.Out, report)
	html, herr := HTML(res, issueGoals)
	return res, errors.Join(err, herr, rows.close(report, html))
}

// inside starts the process in the namespaces and passes its events on until it has ended; then it closes events.
func inside(ctx context.Context, cfg Config, dir string, events chan<- event) error {
	defer close(events)
	runtime.LockOSThread() // Pdeathsig means the thread, which ends with this goroutine, as makeTenant wants it
	uids, gids, err := makeTenant(dir)
	everyID := err == nil
	if !everyID { // a contender that needs the tenant says so
		uids, gids = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}, []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	tcp := cfg.Congestion
	if tcp == congestionMachine {
		tcp = ""
	}
	arg, err := json.Marshal(innerConfig{Variants: cfg.variants(), Peers: cfg.Peers, Rounds: cfg.Rounds, Time: cfg.Time, Commit: cfg.Commit, Dir: dir, TCP: tcp})
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.CommandContext(ctx, cfg.Exe, "bench", "inner", roleScenarios, string(arg))
	var logs tail
	cmd.Stderr = &logs
	cmd.ExtraFiles = []*os.File{w} // eventFD
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC,
		UidMappings: uids,
		GidMappings: gids,
		Pdeathsig:   syscall.SIGKILL,

		GidMappingsEnableSetgroups: everyID,

		Setpgid: true, // an interrupt from the terminal is for Run, which ends the others
	}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("namespaces: %w; look at the sysctls user.max_user_namespaces and kernel.apparmor_restrict_unprivileged_userns", err)
	}
	dec := json.NewDecoder(r)
	for {
		var e event
		if err := dec.Decode(&e); err != nil {
			break // the process has ended, or Wait tells why not
		}
		events <- e
	}
	if err := cmd.Wait(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("the measuring process: %w: %s", err, &logs)
	}
	return nil
}

// rowFile writes rows as they come, so that a run that is cut off keeps what it has.
type rowFile struct {
	f    *os.File
	base string
}

func openRows(cfg Config) (rowFile, error) {
	if cfg.Report == "" {
		return rowFile{}, nil
	}
	if err := os.MkdirAll(cfg.Report, 0o755); err != nil {
		return rowFile{}, err
	}
	base := filepath.Join(cfg.Report, time.Now().UTC().Format("20060102T150405Z")+"-"+strings.Join(cfg.Scenarios, "-"))
	f, err := os.Create(base + ".jsonl")
	return rowFile{f, base}, err
}

func (r rowFile) write(v any) error {
	if r.f == nil {
		return nil
	}
	return json.NewEncoder(r.f).Encode(v)
}

func (r rowFile) close(report, html string) error {
	if r.f == nil {
		return nil
	}
	return errors.Join(r.f.Close(), os.WriteFile(r.base+".md", []byte(report), 0o644), os.WriteFile(r.base+".html", []byte(html), 0o644))
}
