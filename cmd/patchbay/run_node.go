package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"patchbay/internal/api"
	"patchbay/internal/attach"
	"patchbay/internal/daemon"
	"patchbay/internal/edge"
	"patchbay/internal/netns"
)

// ownNetworkFlags describe a network. A `run` that has one of them makes its own, whether a daemon runs or not.
var ownNetworkFlags = []string{"host-loopback", "bypass", "link-local", "subnet", "mtu", "dns", "max-flows", "max-dials", "max-memory", "plain-tap", "stats"}

// nodeFor is the daemon that this run is to use, and the networks to join, or nil for a network of its own: that is when it describes one, or when no daemon
// answers and no network of one was asked for.
func nodeFor(ctx context.Context, c *cli.Context) (*api.Client, []string, error) {
	networks := c.StringSlice("network")
	own := ""
	for _, f := range ownNetworkFlags {
		if c.IsSet(f) {
			own = f
		}
	}
	if len(networks) > 0 && own != "" {
		return nil, nil, fmt.Errorf("--%s describes a network and --network names one that is there; give one or the other", own)
	}
	if own != "" || (c.String("socket") == "none" && len(networks) == 0) {
		return nil, nil, nil
	}
	path, err := socketPath(c)
	if err != nil {
		if len(networks) == 0 {
			return nil, nil, nil // there is no place where a daemon could be
		}
		return nil, nil, err
	}
	client := api.NewClient(path)
	_, err = client.Info(ctx)
	switch {
	case err == nil:
	case errors.Is(err, api.ErrNoNode) && len(networks) == 0 && !c.IsSet("socket"):
		return nil, nil, nil
	default:
		return nil, nil, err
	}
	if len(networks) == 0 {
		networks = []string{daemon.DefaultNetwork}
		if _, err := client.Network(ctx, daemon.DefaultNetwork); api.CodeOf(err) == api.CodeNotFound {
			if _, err := client.CreateNetwork(ctx, api.NetworkSpec{Name: daemon.DefaultNetwork}); err != nil && api.CodeOf(err) != api.CodeConflict {
				return nil, nil, err
			}
		}
	}
	return client, networks, nil
}

// runOnNode runs the command on networks of a daemon.
func runOnNode(ctx context.Context, c *cli.Context, client *api.Client, networks []string, spec edge.Spec, stdio edge.Stdio) error {
	ctr, err := containerConfig(c, spec, stdio)
	if err != nil {
		return err
	}
	at := api.AttachmentSpec{
		Name: ctr.Name, Aliases: c.StringSlice("alias"), Hostname: c.String("hostname"), Addrs: ctr.Addrs, MAC: ctr.MAC, Publish: c.StringSlice("publish"),
		Device: c.String("device"), Queues: c.Int("queues"), Pod: c.Bool("pause"),
	}
	if s := c.String("rate"); s != "" {
		if at.Rate, err = parseRate(s); err != nil {
			return fmt.Errorf("--rate: %w", err)
		}
	}
	container, err := attach.Start(ctx, attach.Config{
		Client: client, Networks: networks, Spec: at, Process: spec, Stdio: stdio, ForwardSignals: true, Logger: runLogger(c),
	})
	if err != nil {
		return err
	}
	defer container.Close()
	backgroundOf(c).up(container.Name())
	return wait(container)
}

// runLogger is what a person at the terminal is told while the command runs: warnings, and with --verbose everything.
func runLogger(c *cli.Context) *slog.Logger {
	level := slog.LevelWarn
	if c.Bool("verbose") {
		level = slog.LevelInfo
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}

// joinPrefix is how --net names a container whose namespaces the command joins.
const joinPrefix = "container:"

// joinTarget opens the namespaces of the container that --net container:NAME names, and fills in what the command gets of it.
func joinTarget(ctx context.Context, c *cli.Context, spec *edge.Spec) (*netns.Target, error) {
	ref := strings.TrimPrefix(c.String("net"), joinPrefix)
	pid, err := strconv.Atoi(ref)
	if err != nil {
		path, err := socketPath(c)
		if err != nil {
			return nil, err
		}
		client := api.NewClient(path)
		network, name, err := client.Resolve(ctx, ref)
		if err != nil {
			return nil, err
		}
		at, err := client.Attachment(ctx, network, name)
		if err != nil {
			return nil, err
		}
		if at.PID == 0 {
			return nil, fmt.Errorf("--net %s%s: it has no process whose namespaces could be joined; attach it by --pid", joinPrefix, ref)
		}
		pid = at.PID
	}
	t, err := netns.OpenTarget(pid)
	if err != nil {
		return nil, fmt.Errorf("--net %s%s: %w", joinPrefix, ref, err)
	}
	// What it sees is in its own mount namespace; a container whose files cannot be read, as one that is not ours, keeps the host's.
	root := fmt.Sprintf("/proc/%d/root", pid)
	spec.ResolvConf, spec.Hosts = fileOf(root, "etc/resolv.conf"), fileOf(root, "etc/hosts")
	return t, nil
}

// maxContainerFile bounds what is read of a file that a container could have put there.
const maxContainerFile = 64 << 10

// fileOf reads a small regular file below root, whose owner is not trusted: links lead nowhere outside it, and nothing is waited for. Nil: there is none.
func fileOf(root, name string) []byte {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return nil
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() || fi.Size() > maxContainerFile {
		return nil
	}
	b, err := io.ReadAll(io.LimitReader(f, maxContainerFile))
	if err != nil {
		return nil
	}
	return b
}
