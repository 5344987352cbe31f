package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"patchbay/bench/load"
	"patchbay/internal/edge"
	"patchbay/internal/node"
	"patchbay/internal/spin"
	"patchbay/nat"
	"patchbay/tap"
)

// demoLimit bounds the whole demonstration.
const demoLimit = 28 * time.Second

// Ports that the demonstration's servers listen on.
const (
	demoHTTPPort = "80"
	demoLoadPort = "7070"
)

// demoEnd is the last line of the client's report.
const demoEnd = "."

// demoCommand runs the main job where everyone can see it: two containers on one network, on the real data path.
func demoCommand() *cli.Command {
	return &cli.Command{
		Name:         "demo",
		Usage:        "two containers on one network, measured and shown, in under 30 seconds",
		UsageText:    "patchbay demo [--port N]",
		OnUsageError: usageError,
		Flags: []cli.Flag{
			&cli.IntFlag{Name: "port", Usage: "host `PORT` to publish the web server on (default: 8080, or the next that is free)"},
		},
		Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(c.Context, unix.SIGINT, unix.SIGTERM)
			defer stop()
			ctx, cancel := context.WithTimeout(ctx, demoLimit)
			defer cancel()
			if err := demo(ctx, c.App.Writer, c.Int("port")); err != nil {
				return fmt.Errorf("demo: %w", err)
			}
			return nil
		},
		Subcommands: []*cli.Command{
			{Name: "web", Hidden: true, Action: func(c *cli.Context) error { return demoWeb(c.Context) }},
			{Name: "client", Hidden: true, Action: func(c *cli.Context) error {
				return demoClient(c.Context, c.App.Writer, c.Args().Get(0), c.Args().Get(1))
			}},
		},
	}
}

func demo(ctx context.Context, out io.Writer, port int) (err error) {
	began := time.Now()
	// The host's side of the container-to-host measurement listens on loopback alone, so nothing is opened to the outside.
	hostLoad, err := load.Listen(load.ServerConfig{Addr: "127.0.0.1:0"})
	if err != nil {
		return err
	}
	loadCtx, stopLoad := context.WithCancel(ctx)
	loadDone := make(chan error, 1)
	go func() { loadDone <- hostLoad.Serve(loadCtx) }()
	defer func() { stopLoad(); err = errors.Join(err, <-loadDone) }()

	spin.SetProcs(nat.Loops + 2)
	network, err := node.NewNetwork(ctx, node.NetworkConfig{Name: "demo", HostLoopback: true, LoopTAPs: node.FewCores()})
	if err != nil {
		return err
	}
	defer network.Close()

	spec, err := demoPublish(port)
	if err != nil {
		return err
	}
	web, err := startDemo(ctx, network, "web", edge.Stdio{Out: os.Stderr}, []nat.Spec{spec}, "web")
	if err != nil {
		return err
	}
	defer web.Close()
	report, reportIn, err := os.Pipe()
	if err != nil {
		return err
	}
	defer report.Close()
	hold, release, err := os.Pipe() // the client stays until release is closed, so that its port can be shown
	if err != nil {
		reportIn.Close()
		return err
	}
	defer release.Close()
	client, err := startDemo(ctx, network, "client", edge.Stdio{In: hold, Out: reportIn}, nil, "client", "web", hostLoad.Addr().String())
	reportIn.Close()
	hold.Close()
	if err != nil {
		return err
	}
	defer client.Close()
	who := "as an ordinary user"
	if os.Geteuid() == 0 {
		who = "as root this time, which it does not need"
	}
	fmt.Fprintf(out, "Two containers are up after %d ms, %s, without a change to this host.\n\n", time.Since(began).Milliseconds(), who)
	printTopology(out, network.Status(), spec)

	fmt.Fprintf(out, "measuring, about 9 seconds …\n\n")
	url := fmt.Sprintf("http://127.0.0.1:%d/", spec.HostPort)
	published, err := demoFetch(ctx, url)
	if err != nil {
		return fmt.Errorf("published port: %w", err)
	}
	fmt.Fprintf(out, "host → published port  GET %s\n    %s\n", url, published)
	finished := false
	for sc := bufio.NewScanner(report); !finished && sc.Scan(); {
		if finished = sc.Text() == demoEnd; !finished {
			fmt.Fprintln(out, sc.Text())
		}
	}
	end := network.Status()
	release.Close()
	st, err := client.Wait()
	if err != nil {
		return err
	}
	if st.ExitCode() != 0 || !finished {
		return fmt.Errorf("the client container ended with %s", st)
	}
	fmt.Fprintln(out)
	printCounters(out, end)
	fmt.Fprintf(out, "\nDone in %.1f s; both containers are gone.\n", time.Since(began).Seconds())
	return nil
}

// demoPublish picks the host port: the one asked for, or the first free one from 8080.
func demoPublish(port int) (nat.Spec, error) {
	if port != 0 {
		return nat.ParseSpec(fmt.Sprintf("127.0.0.1:%d:%s", port, demoHTTPPort))
	}
	for port = 8080; port < 8180; port++ {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			l.Close()
			return nat.ParseSpec(fmt.Sprintf("127.0.0.1:%d:%s", port, demoHTTPPort))
		}
	}
	return nat.Spec{}, errors.New("no free port from 8080 to 8179; name one with --port")
}

func startDemo(ctx context.Context, network *node.Network, name string, stdio edge.Stdio, publish []nat.Spec, args ...string) (*node.Container, error) {
	cfg := node.ContainerConfig{
		AttachConfig: node.AttachConfig{Name: name, Publish: publish, Device: tap.KindAuto},
		Process:      edge.Spec{Net: edge.NetPrivate, PID: true, Argv: append([]string{"/proc/self/exe", "demo"}, args...), Env: os.Environ(), Dir: "/"},
		Stdio:        stdio,
	}
	container, err := network.Start(ctx, cfg)
	if err != nil {
		// Where /proc is partly covered, as in many sandboxes, there can be no PID namespace with a /proc of its own. The demonstration can do without.
		cfg.Process.PID = false
		if c, again := network.Start(ctx, cfg); again == nil {
			return c, nil
		}
	}
	return container, err
}

func demoFetch(ctx context.Context, url string) (string, error) {
	// The server inside may need a moment more than its container.
	var err error
	for range 100 {
		var body string
		if body, err = fetch(ctx, url); err == nil {
			return strings.TrimSpace(body), nil
		}
		select {
		case <-ctx.Done():
			return "", err
		case <-time.After(30 * time.Millisecond):
		}
	}
	return "", err
}

func fetch(ctx context.Context, url string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	tr := &http.Transport{DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	return string(b), err
}

// demoWeb is the command of the container "web".
func demoWeb(ctx context.Context) error {
	errs := make(chan error, 2)
	go func() { errs <- load.Run(ctx, ":"+demoLoadPort) }()
	go func() {
		name, _ := os.Hostname() // shown only
		srv := &http.Server{Addr: ":" + demoHTTPPort, ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "hello from %s; you are %s\n", name, r.RemoteAddr)
		})}
		errs <- srv.ListenAndServe()
	}()
	return <-errs
}

// demoClient is the command of the container "client": it measures and prints, a line a finding.
func demoClient(ctx context.Context, out io.Writer, peer, hostLoad string) error {
	body, err := demoFetch(ctx, "http://"+peer+"/")
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "client → %s by name    GET http://%s/\n    %s\n", peer, peer, body)
	_, port, err := net.SplitHostPort(hostLoad)
	if err != nil {
		return err
	}
	inside := net.JoinHostPort(peer, demoLoadPort)
	outside := net.JoinHostPort("host.patchbay.internal", port)
	for _, p := range []struct{ label, name string }{{"client → " + peer, peer}, {"client → gateway", "gateway.patchbay.internal"}} {
		line, err := pingLine(ctx, p.name)
		if err != nil {
			return fmt.Errorf("ping %s: %w", p.name, err)
		}
		fmt.Fprintf(out, "%-22s ping: %s\n", p.label, line)
	}
	const each = 1500 * time.Millisecond
	for _, m := range []struct {
		label, kind string
		run         func(context.Context, load.Config) (load.Result, error)
		cfg         load.Config
	}{
		{"client → " + peer, "stream", load.Stream, load.Config{Addr: inside}},
		{"client → host (NAT)", "stream", load.Stream, load.Config{Addr: outside}},
		{"host → client (NAT)", "stream", load.Stream, load.Config{Addr: outside, Reverse: true}},
		{"client → " + peer, "rr", load.RequestResponse, load.Config{Addr: inside}},
		{"client → host (NAT)", "rr", load.RequestResponse, load.Config{Addr: outside}},
		{"client → host (NAT)", "crr", load.ConnectRequestClose, load.Config{Addr: outside, Streams: 16}},
	} {
		m.cfg.Duration = each
		res, err := m.run(ctx, m.cfg)
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "%-22s %s\n", m.label, demoText[m.kind]+describe(m.kind, res))
	}
	fmt.Fprintln(out, demoEnd)
	_, err = io.Copy(io.Discard, os.Stdin) // until the demonstration has looked at the counters
	return err
}

var demoText = map[string]string{
	"stream": "TCP throughput: ",
	"rr":     "request and response: ",
	"crr":    "connections, 16 at a time: ",
}

func printTopology(out io.Writer, st node.Status, spec nat.Spec) {
	var addrs []string
	for _, p := range st.Subnets {
		addrs = append(addrs, p.String())
	}
	fmt.Fprintf(out, "      this host: 127.0.0.1:%d\n          │ published → web:%s\n", spec.HostPort, demoHTTPPort)
	fmt.Fprintf(out, "   ┌──────┴──────┐\n   │   gateway   │  NAT, DNS, DHCP   %s\n   └──────┬──────┘\n", join(st.Gateway))
	fmt.Fprintf(out, "   ═══════╪════════ switch of network %q ═══  %s, MTU %d\n", st.Name, strings.Join(addrs, "  "), st.MTU)
	for i, c := range st.Containers {
		branch := "├"
		if i == len(st.Containers)-1 {
			branch = "└"
		}
		fmt.Fprintf(out, "          %s── %-8s %s  %s\n", branch, c.Name, c.MAC, join(c.Addrs))
	}
	fmt.Fprintln(out)
}

func join(addrs []netip.Addr) string {
	var s []string
	for _, a := range addrs {
		s = append(s, a.String())
	}
	return strings.Join(s, " ")
}

func printCounters(out io.Writer, st node.Status) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "FDB  MAC\tPORT\tAGE\t")
	for _, e := range st.FDB {
		age := e.Age.Truncate(time.Millisecond).String()
		if e.Static {
			age = "static"
		}
		fmt.Fprintf(w, "     %s\t%s\t%s\t\n", e.MAC, e.Port, age)
	}
	fmt.Fprintln(w, "PORT NAME\tRX FRAMES\tTX FRAMES\tFLOODED\tDROPPED\t")
	for _, p := range st.Ports {
		fmt.Fprintf(w, "     %s\t%d\t%d\t%d\t%d\t\n", p.Name, p.RxFrames, p.TxFrames, p.Flooded, p.Dropped)
	}
	if err := w.Flush(); err != nil {
		return // the terminal is gone; there is nobody to tell
	}
	if len(st.Drops) == 0 {
		fmt.Fprintln(out, "DROPS none")
	}
	for _, d := range st.Drops {
		fmt.Fprintf(out, "DROPS %s %d (%s)\n", d.Reason, d.Count, d.Meaning)
	}
}
