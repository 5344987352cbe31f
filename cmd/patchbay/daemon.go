package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"

	"patchbay/internal/api"
	"patchbay/internal/config"
	"patchbay/internal/daemon"
	"patchbay/tunnel/secure"
)

func daemonCommand() *cli.Command {
	return &cli.Command{
		Name:  "daemon",
		Usage: "own networks that outlive a command, and serve the API",
		UsageText: `patchbay daemon [OPTION...]

Examples:
   patchbay daemon &
   patchbay daemon --config lab.yaml --state-dir ~/lab
   patchbay daemon --listen 192.0.2.1 --psk-file ~/mesh.key
   patchbay daemon --identity ~/mesh-ca/host1.example.net.crt,~/mesh-ca/host1.example.net.key,~/mesh-ca/ca.crt
   patchbay daemon --takeover        # replace the running one, with this binary, under traffic`,
		Description: `Everything else is a client of its socket. Networks, attachments, leases and published ports are kept in the state directory, so a daemon that is killed and
started again has them back, and connections between containers go on. SIGHUP reads the configuration file again; SIGTERM ends the daemon and leaves the state as it is.`,
		OnUsageError: usageError,
		Before:       noArgs,
		Flags: []cli.Flag{
			socketFlag(),
			&cli.StringFlag{Name: "state-dir", Usage: "`DIR` for what must outlive the daemon (default: $XDG_STATE_HOME/patchbay; /var/lib/patchbay for root)"},
			&cli.StringFlag{Name: "config", Usage: "`FILE` in YAML that names networks and published ports"},
			&cli.BoolFlag{Name: "takeover", Usage: "replace the daemon that runs now: its interfaces, listening sockets and UDP sockets go on in this one"},
			&cli.StringFlag{Name: "listen", Usage: "`ADDR[:PORT]` where tunnels from other hosts arrive, once a network has a peer (default: [::]:4789)"},
			&cli.StringFlag{Name: "identity", Usage: "who this node is on sealed networks: `CERT,KEY,CA`, three files in PEM"},
			&cli.StringFlag{Name: "psk-file", Usage: "`FILE` with a key that all nodes of sealed networks have, instead of --identity"},
			&cli.IntFlag{Name: "max-flows", Usage: "at most `N` TCP connections, and as many UDP flows, through NAT of each network"},
			&cli.IntFlag{Name: "max-dials", Usage: "at most `N` connections waiting for an answer, of each network"},
			&cli.StringFlag{Name: "profile", Usage: "write a CPU and a heap profile into `DIR` when it ends"},
			&cli.BoolFlag{Name: "verbose", Aliases: []string{"v"}, Usage: "log every attachment and network that comes and goes, not warnings alone"},
		},
		Action: func(c *cli.Context) error {
			if err := runDaemon(c); err != nil {
				return fmt.Errorf("daemon: %w", err)
			}
			return nil
		},
	}
}

// socketFlag is on every command that talks to the node.
func socketFlag() cli.Flag {
	return &cli.StringFlag{Name: "socket", Usage: "the daemon's unix socket `PATH` (default: $PATCHBAY_SOCKET, or $XDG_RUNTIME_DIR/patchbay/node.sock)"}
}

// socketPath is what socketFlag says.
func socketPath(c *cli.Context) (string, error) {
	if c.IsSet("socket") {
		if c.String("socket") == "" {
			return "", errors.New("--socket: the path is empty; leave it out for the usual one")
		}
		return c.String("socket"), nil
	}
	return api.DefaultSocket()
}

func runDaemon(c *cli.Context) error {
	path, err := socketPath(c)
	if err != nil {
		return err
	}
	dir := c.String("state-dir")
	if dir == "" {
		if dir, err = api.DefaultStateDir(); err != nil {
			return err
		}
	}
	stopProfile, err := startProfile(c.String("profile"))
	if err != nil {
		return err
	}
	defer stopProfile()
	level := slog.LevelWarn
	if c.Bool("verbose") {
		level = slog.LevelInfo
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	ctx, stop := signal.NotifyContext(c.Context, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	limits, err := limitFlags(c)
	if err != nil {
		return err
	}
	cfg := daemon.Config{StateDir: dir, Version: version, ConfigFile: c.String("config"), Limits: limits, Logger: log}
	if err := tunnelFlags(c, &cfg); err != nil {
		return err
	}
	var n *daemon.Node
	var l *net.UnixListener
	takeover := c.Bool("takeover")
	if takeover {
		if cfg.ConfigFile != "" { // what is wrong with it is to be said while the other one is still there
			if _, err := config.Load(cfg.ConfigFile); err != nil {
				return err
			}
		}
		n, l, err = daemon.TakeOver(ctx, cfg, path)
	} else if l, err = api.Listen(path); err == nil {
		if n, err = daemon.New(ctx, cfg); err != nil {
			l.Close()
		}
	}
	if err != nil {
		return err
	}
	defer n.Close()
	defer l.Close()
	if err := configure(ctx, n, cfg.ConfigFile); err != nil && !takeover {
		return err
	} else if err != nil { // there is no way back, and what is there is worth more than the configuration
		log.Error("configuration is not applied; everything stays as it was", "reason", err)
	}
	go func() {
		<-n.TakenOver()
		log.Warn("another node has taken over")
		stop()
	}()
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	go func() {
		for range hup {
			if err := configure(ctx, n, cfg.ConfigFile); err != nil {
				log.Error("configuration is not read again; everything stays as it was", "reason", err)
			} else {
				log.Info("configuration read again", "file", cfg.ConfigFile)
			}
		}
	}()
	fmt.Fprintf(os.Stderr, "patchbay: daemon: ready at %s (pid %d, state in %s)\n", path, os.Getpid(), dir)
	s := api.NewServer(api.ServerConfig{Backend: n, Logger: log})
	if err := s.Serve(ctx, l); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// tunnelFlags reads --listen, --identity and --psk-file.
func tunnelFlags(c *cli.Context, cfg *daemon.Config) (err error) {
	if c.IsSet("listen") {
		if cfg.Listen, err = daemon.ParseListen(c.String("listen")); err != nil {
			return fmt.Errorf("--listen: %w", err)
		}
	}
	if c.IsSet("identity") && c.IsSet("psk-file") {
		return errors.New("--identity and --psk-file are two ways to the same; give one of them")
	}
	if c.IsSet("identity") {
		if cfg.Identity, err = daemon.LoadIdentity(c.String("identity")); err != nil {
			return fmt.Errorf("--identity: %w", err)
		}
	}
	if c.IsSet("psk-file") {
		if cfg.Identity, err = secure.LoadPSK(c.String("psk-file")); err != nil {
			return fmt.Errorf("--psk-file: %w", err)
		}
	}
	return nil
}

// configure brings the node to what the file says; without one there is the default network.
func configure(ctx context.Context, n *daemon.Node, file string) error {
	if file != "" {
		if err := n.Configure(ctx, file); err != nil {
			return err
		}
	}
	return n.EnsureDefault(ctx)
}
