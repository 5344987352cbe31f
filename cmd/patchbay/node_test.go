package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"patchbay/internal/api"
	"patchbay/internal/testbed"
)

// daemonProc is a `patchbay daemon` of the test, run by an ordinary user, that can be killed and started again.
type daemonProc struct {
	once   sync.Once
	cl     *api.Client
	t      *testing.T
	dir    string
	args   []string
	login  *testbed.Login // whose it is; nil: some ordinary user's
	host   *testbed.NS    // where it runs; nil: where the tests do
	plain  bool           // it is this process's user's, on a host of its own: see TestPodman
	cmd    *exec.Cmd
	stderr *lockedBuffer
}

// lockedBuffer is a bytes.Buffer that a process writes and a test reads.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// startDaemon starts one with a state directory of its own.
func startDaemon(t *testing.T, args ...string) *daemonProc {
	t.Helper()
	return startDaemonOf(t, nil, args...)
}

// startDaemonOf starts one for a user who is logged in.
func startDaemonOf(t *testing.T, login *testbed.Login, args ...string) *daemonProc {
	t.Helper()
	return (&daemonProc{t: t, args: args, login: login}).begin()
}

// begin starts it for the first time, until the test ends.
func (d *daemonProc) begin() *daemonProc {
	t := d.t
	t.Helper()
	d.dir, d.stderr = t.TempDir(), &lockedBuffer{}
	if err := os.Chmod(d.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if d.host != nil {
		d.login.Own(t, d.dir)
		if err := os.Chmod(filepath.Dir(d.dir), 0o711); err != nil {
			t.Fatal(err)
		}
	}
	d.start()
	t.Cleanup(func() {
		d.end(syscall.SIGTERM)
		if t.Failed() {
			t.Logf("daemon said:\n%s", d.stderr)
		}
	})
	return d
}

func (d *daemonProc) socket() string { return filepath.Join(d.dir, "node.sock") }

// start starts the daemon, again perhaps, and waits until it answers.
func (d *daemonProc) start(more ...string) {
	d.t.Helper()
	d.launch(more...)
	if !testbed.Wait(10*time.Second, d.answers) {
		d.t.Fatalf("the daemon does not answer: %s", d.stderr)
	}
}

// answers reports whether the daemon does. One on a host of its own is another user's, and answers him alone.
func (d *daemonProc) answers() bool {
	if d.host != nil {
		return d.command("ps").Run() == nil
	}
	return d.client().Health(d.t.Context()) == nil
}

// launch is start that does not wait.
func (d *daemonProc) launch(more ...string) {
	d.t.Helper()
	args := append([]string{"daemon", "--socket", d.socket(), "--state-dir", filepath.Join(d.dir, "state"), "-v"}, d.args...)
	d.cmd = d.patchbay(append(args, more...)...)
	d.cmd.Stderr = d.stderr
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
}

// takeOver starts another daemon in the place of the one that runs, and waits until that has ended.
func (d *daemonProc) takeOver() {
	d.t.Helper()
	old := d.cmd
	d.launch("--takeover")
	if err := old.Wait(); err != nil {
		d.t.Fatalf("takeover: the old daemon: %v: %s", err, d.stderr)
	}
}

// end sends the daemon a signal and waits until it is gone.
func (d *daemonProc) end(sig syscall.Signal) {
	if d.cmd.Process == nil || d.cmd.ProcessState != nil {
		return
	}
	if err := d.cmd.Process.Signal(sig); err != nil {
		d.t.Errorf("signal the daemon: %v", err)
	}
	err := d.cmd.Wait()
	if sig == syscall.SIGTERM && err != nil {
		d.t.Errorf("the daemon ended with %v: %s", err, d.stderr)
	}
}

// client is always the same one, so that the daemon is not left with a connection for each question.
func (d *daemonProc) client() *api.Client {
	d.once.Do(func() { d.cl = api.NewClient(d.socket()) })
	return d.cl
}

// patchbay is the binary as the daemon's user starts it.
func (d *daemonProc) patchbay(args ...string) *exec.Cmd {
	d.t.Helper()
	switch {
	case d.plain:
		return exec.Command(testbed.Build(d.t), args...)
	case d.host != nil:
		testbed.RequireTUN(d.t)
		return d.login.In(d.host, testbed.Build(d.t), args...)
	case d.login == nil:
		return patchbay(d.t, args...)
	}
	testbed.RequireTUN(d.t)
	return d.login.As(exec.Command(testbed.Build(d.t), args...))
}

// command is `patchbay ARGS…` that talks to this daemon.
func (d *daemonProc) command(args ...string) *exec.Cmd {
	d.t.Helper()
	cmd := d.patchbay(args...)
	cmd.Env = append(cmd.Environ(), "PATCHBAY_SOCKET="+d.socket())
	return cmd
}

// do runs `patchbay ARGS…` and returns what it wrote.
func (d *daemonProc) do(args ...string) string {
	d.t.Helper()
	cmd := d.command(args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		d.t.Fatalf("patchbay %s: %v: %s", strings.Join(args, " "), err, &stderr)
	}
	return string(out)
}

// running is a container of a test that goes on in the background.
type running struct {
	t      *testing.T
	cmd    *exec.Cmd
	out    *lockedBuffer
	stderr *lockedBuffer
	done   chan error
}

// background starts `patchbay run ARGS…` and waits until its attachment is up.
func (d *daemonProc) background(name string, args ...string) *running {
	d.t.Helper()
	r := &running{t: d.t, out: &lockedBuffer{}, stderr: &lockedBuffer{}, done: make(chan error, 1)}
	r.cmd = d.command(append([]string{"run", "--name", name}, args...)...)
	r.cmd.Stdout, r.cmd.Stderr = r.out, r.stderr
	if err := r.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	go func() { r.done <- r.cmd.Wait() }()
	d.t.Cleanup(func() { r.end() })
	if !testbed.Wait(10*time.Second, func() bool { return d.up(name) || len(r.done) > 0 }) || len(r.done) > 0 {
		d.t.Fatalf("%q does not come up: %s%s", name, r.out, r.stderr)
	}
	return r
}

// end kills the run, and so the container.
func (r *running) end() {
	_ = r.cmd.Process.Signal(syscall.SIGTERM) // it may have ended by itself
	select {
	case <-r.done:
	case <-time.After(15 * time.Second):
		r.t.Error("a container does not end")
		_ = r.cmd.Process.Kill()
	}
	r.done <- nil
}

// attachments are all of them.
func (d *daemonProc) attachments() (as []api.Attachment, err error) {
	if d.host == nil {
		return d.client().Attachments(d.t.Context(), "")
	}
	out, err := d.command("ps", "-o", "json").Output()
	if err == nil {
		err = json.Unmarshal(out, &as)
	}
	return as, err
}

// up reports whether an attachment of that name is plugged in some network.
func (d *daemonProc) up(name string) bool {
	as, err := d.attachments()
	if err != nil {
		return false
	}
	for _, a := range as {
		if a.Name == name && a.State == api.StateUp {
			return true
		}
	}
	return false
}

// inspect is the attachment as the API describes it.
func (d *daemonProc) inspect(network, name string) api.Attachment {
	d.t.Helper()
	a, err := d.client().Attachment(d.t.Context(), network, name)
	if err != nil {
		d.t.Fatal(err)
	}
	return a
}

// interval is a line of iperf3's report.
type interval struct {
	Sum struct {
		Start, End float64
		Bytes      float64
	}
}

// gap is the longest time without a byte in an iperf3 report, in seconds, and how much came in the last second.
func gap(t *testing.T, report []byte) (longest, last float64) {
	t.Helper()
	var r struct {
		Intervals []interval
		Error     string
	}
	if err := json.Unmarshal(report, &r); err != nil || r.Error != "" || len(r.Intervals) < 10 {
		t.Fatalf("iperf3: %v %s: %.2000s", err, r.Error, report)
	}
	silent := 0.0
	end := r.Intervals[len(r.Intervals)-1].Sum.End
	for _, i := range r.Intervals {
		if i.Sum.Bytes == 0 {
			silent += i.Sum.End - i.Sum.Start
		} else {
			silent = 0
		}
		longest = max(longest, silent)
		if i.Sum.Start > end-1 {
			last += i.Sum.Bytes
		}
	}
	return longest, last
}

// TestCrash kills the daemon in the middle of a transfer between two containers and starts it again: everything is back, the connection goes on.
//
//	[srv] eth0 ── tap ┐
//	                  daemon, killed and started again
//	[cli] eth0 ── tap ┘
func TestCrash(t *testing.T) {
	testbed.Leaks(t)
	iperf3 := testbed.Tool(t, "iperf3")
	d := startDaemon(t)
	d.do("network", "create", "lab", "--subnet", "10.66.0.0/24", "--isolate=false", "--vni", "7")
	d.background("srv", "--network", "lab", "--alias", "iperf", "-p", "5301:5201", "--", iperf3, "-s")
	before := d.inspect("lab", "srv")
	cli := d.background("cli", "--network", "lab", "--", "sh", "-c", "sleep 1; exec "+iperf3+" -c iperf -t 6 -i 0.1 -J")
	time.Sleep(3 * time.Second)
	late := lateness()
	d.end(syscall.SIGKILL)
	began := time.Now()
	d.start()
	t.Logf("a new daemon answers %v after the old one was killed", time.Since(began).Round(time.Millisecond))
	if err := <-cli.done; err != nil {
		t.Fatalf("the connection did not survive: %v: %s%s", err, cli.out, cli.stderr)
	}
	cli.done <- nil
	longest, last := gap(t, []byte(cli.out.String()))
	t.Logf("longest time without a byte %.1f s; %.0f MB in the last second; %s", longest, last/1e6, cli.stderr)
	if bound := 1 + 10*late().Seconds(); longest > bound || last == 0 {
		t.Errorf("gap %.1f s, want at most %.1f", longest, bound)
	}
	after := d.inspect("lab", "srv")
	if fmt.Sprint(before.Addrs, before.MAC, before.Aliases, before.Publish) != fmt.Sprint(after.Addrs, after.MAC, after.Aliases, after.Publish) || len(after.Publish) != 1 || after.State != api.StateUp {
		t.Errorf("before %+v\nafter  %+v", before, after)
	}
	nw, err := d.client().Network(t.Context(), "lab")
	if err != nil || nw.VNI != 7 || nw.Subnets[0].String() != "10.66.0.0/24" {
		t.Errorf("network after the restart: %+v, %v", nw, err)
	}
}

// lateness measures how late a thread that sleeps is woken, until the returned function asks: on a shared machine a stall may not be ours.
func lateness() (stop func() time.Duration) {
	done, worst := make(chan struct{}), make(chan time.Duration)
	go func() {
		var w time.Duration
		for {
			select {
			case <-done:
				worst <- w
				return
			default:
			}
			t := time.Now()
			time.Sleep(5 * time.Millisecond)
			w = max(w, time.Since(t)-5*time.Millisecond)
		}
	}()
	return func() time.Duration { close(done); return <-worst }
}

// TestClientDiesWhileTheDaemonIsDown holds that what ended without a witness is cleaned up.
func TestClientDiesWhileTheDaemonIsDown(t *testing.T) {
	testbed.Leaks(t)
	d := startDaemon(t)
	gone := d.background("gone", "-p", "8081:80", "--", "sleep", "1000")
	addr := d.inspect("default", "gone").Addrs[0]
	stays := d.background("stays", "--", "sh", "-c", "echo runs; exec sleep 1000")
	// Whoever has not been answered yet takes the daemon's end for a failure, and ends.
	testbed.Eventually(t, 10*time.Second, func() bool { return stays.out.String() != "" })
	d.end(syscall.SIGKILL)
	if err := gone.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-gone.done
	gone.done <- nil
	d.start()
	if !testbed.Wait(10*time.Second, func() bool {
		as, err := d.client().Attachments(t.Context(), "")
		return err == nil && len(as) == 1 && as[0].Name == "stays" && as[0].State == api.StateUp
	}) {
		t.Fatalf("attachments: %s", d.do("ps"))
	}
	if ps := d.do("publish", "ls", "-o", "json"); strings.Contains(ps, "8081") {
		t.Errorf("its port is still published: %s", ps)
	}
	next := d.background("next", "--ip", addr.String(), "-p", "8081:80", "--", "sleep", "1000")
	next.end()
	stays.end()
}

// TestMetrics holds that what the node counts is there to be scraped.
func TestMetrics(t *testing.T) {
	d := startDaemon(t)
	d.background("one", "--", "sleep", "1000")
	b, err := d.client().Metrics(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`network="default"`, "patchbay_"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("metrics lack %s:\n%s", want, b)
		}
	}
}

// TestTakeover replaces the daemon under a transfer between containers, a client that connects to a published port without a pause, and an idle connection through NAT.
//
//	[external: client, server] ── [host] 8080 ── daemon, replaced ── tap ── [web]
//	                                                          └───── tap ── [cli] ── iperf3 → [srv]
func TestTakeover(t *testing.T) {
	testbed.Leaks(t)
	iperf3, busybox := testbed.Tool(t, "iperf3"), testbed.Tool(t, "busybox")
	ext := testbed.NewExternal(t, "external")
	d := startDaemon(t)
	www := t.TempDir()
	if err := os.WriteFile(filepath.Join(www, "index.html"), []byte("hello\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	d.background("web", "-p", "8080:80", "--", busybox, "httpd", "-f", "-p", "80", "-h", www)
	d.background("srv", "--", iperf3, "-s")
	cli := d.background("cli", "--", "sh", "-c", "sleep 1; exec "+iperf3+" -c srv -t 6 -i 0.1 -J")

	// Somebody outside asks all the time.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	type asked struct{ n, failed int }
	result := make(chan asked, 1)
	url := "http://" + net.JoinHostPort(ext.HostAddr4.String(), "8080") + "/"
	go func() {
		c := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: ext.NS.DialContext, DisableKeepAlives: true}}
		var a asked
		for ctx.Err() == nil {
			a.n++
			r, err := c.Get(url)
			if err == nil {
				_, err = io.Copy(io.Discard, r.Body)
				r.Body.Close()
			}
			// A connection that was accepted by the old daemon ends with it; one that is refused is what must not be.
			if errors.Is(err, syscall.ECONNREFUSED) {
				a.failed++
				t.Errorf("published port: %v", err)
			}
			time.Sleep(2 * time.Millisecond)
		}
		result <- a
	}()

	// An idle connection through NAT, which cannot move: it must end.
	l, err := ext.NS.Listen("tcp", net.JoinHostPort(ext.Addr4.String(), "7000"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	idle := d.background("idle", "--", busybox, "nc", ext.Addr4.String(), "7000")
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()

	time.Sleep(2 * time.Second)
	late := lateness()
	for i := range 2 {
		d.takeOver()
		if !testbed.Wait(10*time.Second, func() bool { return d.up("web") && d.up("srv") && d.up("cli") }) {
			t.Fatalf("takeover %d: %s", i, d.do("ps"))
		}
	}
	if err := <-cli.done; err != nil {
		t.Fatalf("the connection did not survive: %v: %s%s", err, cli.out, cli.stderr)
	}
	cli.done <- nil
	longest, last := gap(t, []byte(cli.out.String()))
	if bound := 1 + 10*late().Seconds(); longest > bound || last == 0 {
		t.Errorf("gap %.1f s, want at most %.1f", longest, bound)
	}
	cancel()
	a := <-result
	t.Logf("longest time without a byte %.1f s; %d requests to the published port, %d refused", longest, a.n, a.failed)
	if a.n < 20 {
		t.Errorf("only %d requests", a.n)
	}
	select {
	case <-idle.done:
		idle.done <- nil
	case <-time.After(20 * time.Second):
		t.Error("a connection through NAT hangs after the takeover")
	}
}

// TestIdleConnectionEndsAfterCrash holds that a container that waits on a connection through NAT is told of its end by the next daemon.
func TestIdleConnectionEndsAfterCrash(t *testing.T) {
	testbed.Leaks(t)
	ext := testbed.NewExternal(t, "external")
	d := startDaemon(t)
	l, err := ext.NS.Listen("tcp", net.JoinHostPort(ext.Addr4.String(), "7000"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	idle := d.background("idle", "--", testbed.Tool(t, "busybox"), "nc", ext.Addr4.String(), "7000")
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// The host connects first: the container's own handshake is known to be over when something has come through.
	if _, err := conn.Write([]byte("hello\n")); err != nil {
		t.Fatal(err)
	}
	testbed.Eventually(t, 10*time.Second, func() bool { return strings.Contains(idle.out.String(), "hello") })
	d.end(syscall.SIGKILL)
	d.start()
	select {
	case <-idle.done:
		idle.done <- nil
	case <-time.After(30 * time.Second):
		t.Error("a connection through NAT hangs after a crash")
	}
}

// TestTakeoverFails holds that a successor that cannot serve leaves everything with the daemon that is there.
func TestTakeoverFails(t *testing.T) {
	testbed.Leaks(t)
	d := startDaemon(t)
	d.background("web", "--", "sleep", "1000")
	others := []*running{d.background("db", "--", "sleep", "1000"), d.background("mail", "--", "sleep", "1000")}
	bad := filepath.Join(d.dir, "bad.yaml")
	if err := os.WriteFile(bad, []byte("networks: 7\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := patchbay(t, "daemon", "--socket", d.socket(), "--state-dir", filepath.Join(d.dir, "state"), "--config", bad, "--takeover")
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "bad.yaml:1") {
		t.Errorf("a bad configuration: %v: %s", err, out)
	}
	cmd = patchbay(t, "daemon", "--socket", d.socket(), "--state-dir", filepath.Join(d.dir, "other"), "--takeover")
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "keeps its state in") {
		t.Errorf("another state directory: %v: %s", err, out)
	}
	half, err := d.client().Attach(t.Context(), "default", api.AttachmentSpec{Name: "half", Lifetime: api.LifetimeNamespace, PID: os.Getpid()})
	if err != nil {
		t.Fatal(err)
	}
	s, err := d.client().TakeOver(t.Context()) // a successor that dies in the middle
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, fds, err := s.Next(); err != nil {
			t.Fatal(err)
		} else {
			for _, fd := range fds {
				syscall.Close(fd)
			}
		}
	}
	half.Close()                       // whoever is on the way up gives up in the middle of it
	time.Sleep(100 * time.Millisecond) // so that the daemon has seen that first, mostly; both orders have to end well
	s.Close()
	if !testbed.Wait(10*time.Second, func() bool {
		out, err := d.command("run", "--", "ping", "-c1", "-W5", "web").CombinedOutput()
		if err != nil {
			t.Logf("%s", out)
		}
		return err == nil
	}) {
		t.Errorf("the daemon does not go on: %s", d.stderr)
	}
	if !testbed.Wait(10*time.Second, func() bool { return !strings.Contains(d.do("ps"), "half") }) {
		t.Errorf("an attachment whose client left during the takeover stays: %s", d.do("ps"))
	}
	// Those whose turn had not come are as they were too.
	for i, name := range []string{"db", "mail"} {
		if out, err := d.command("run", "--", "ping", "-c1", "-W5", name).CombinedOutput(); err != nil {
			t.Errorf("%s: %s", name, out)
		}
		others[i].end()
		d.gone(name)
	}
}

// TestTakeoversAtOnce holds that of several successors one serves, and that the others leave it the socket.
func TestTakeoversAtOnce(t *testing.T) {
	testbed.Leaks(t)
	d := startDaemon(t)
	d.background("web", "--", "sleep", "1000")
	var others []*exec.Cmd
	winner, old := make(chan *exec.Cmd, 3), d.cmd
	for range 3 {
		d.launch("--takeover")
		others = append(others, d.cmd)
	}
	if err := old.Wait(); err != nil {
		t.Fatalf("the old daemon: %v: %s", err, d.stderr)
	}
	losers := make(chan error, len(others))
	for _, c := range others {
		go func() {
			err := c.Wait()
			losers <- err
			winner <- c
		}()
	}
	for range len(others) - 1 { // each of which takes over what the last one has, or is refused
		<-losers
	}
	if !testbed.Wait(10*time.Second, func() bool { return d.client().Health(t.Context()) == nil }) {
		t.Errorf("nobody answers at the socket: %s", d.stderr)
	}
	d.do("run", "--", "ping", "-c1", "-W5", "web")
	for range len(others) - 1 {
		<-winner
	}
	for _, c := range others {
		_ = c.Process.Signal(syscall.SIGTERM) // but for one they have ended
	}
	if err := <-losers; err != nil {
		t.Errorf("the last daemon: %v: %s", err, d.stderr)
	}
	<-winner
}

// TestTakeoverConfig holds that a successor with a bad configuration leaves the daemon that is there alone, and that one whose configuration cannot be applied goes on without.
func TestTakeoverConfig(t *testing.T) {
	testbed.Leaks(t)
	d := startDaemon(t)
	d.background("web", "--", "sleep", "1000")
	file := filepath.Join(d.dir, "lab.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("networks:\n  lab:\n    mtoo: 1400\n")
	cmd := patchbay(t, "daemon", "--socket", d.socket(), "--state-dir", filepath.Join(d.dir, "state"), "--takeover", "--config", file)
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "mtoo") {
		t.Errorf("a bad file: %v: %s", err, out)
	}
	d.do("run", "--", "ping", "-c1", "-W5", "web")
	write("networks:\n  default:\n    mtu: 1400\n") // web is in the way
	d.args = []string{"--config", file}
	d.takeOver()
	d.do("run", "--", "ping", "-c1", "-W5", "web")
	if !strings.Contains(d.stderr.String(), "is in use by web") {
		t.Errorf("the daemon does not say that the file is not applied: %s", d.stderr)
	}
}
