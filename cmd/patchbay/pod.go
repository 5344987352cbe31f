package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"patchbay/internal/api"
)

// podFlags are those of run that a pod has too.
var podFlags = []string{"network", "alias", "publish", "ip", "mac", "rate", "hostname", "device", "queues"}

func podCommand() *cli.Command {
	create := &cli.Command{
		Name: "create", Usage: "make namespaces with a network that commands join and leave",
		UsageText: `patchbay pod create NAME [OPTION...]

Examples:
   patchbay pod create shop -p 8080:80
   patchbay run --net container:shop -- ./web &
   patchbay run --net container:shop -- ./cache &`,
	}
	for _, f := range runCommand().Flags {
		for _, name := range podFlags {
			if f.Names()[0] == name {
				create.Flags = append(create.Flags, f)
			}
		}
	}
	return &cli.Command{
		Name: "pod", Usage: "network namespaces that outlive the commands in them",
		UsageText:    "patchbay pod create|ls|rm\n\nExample:\n   patchbay pod create shop && patchbay run --net container:shop -- ./web",
		OnUsageError: usageError,
		Subcommands: []*cli.Command{
			nodeCommand(create, false, "NAME", nil, createPod),
			nodeCommand(&cli.Command{
				Name: "ls", Usage: "list pods", UsageText: "patchbay pod ls [-o json]\n\nExample:\n   patchbay pod ls",
			}, true, "", nil, listPods),
			nodeCommand(&cli.Command{
				Name: "rm", Usage: "end pods; commands that are still in them lose the network", UsageText: "patchbay pod rm NAME...\n\nExample:\n   patchbay pod rm shop",
			}, false, "NAME...", podNames, removePods),
		},
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return fmt.Errorf("pod: %.70q is no command of it; use create, ls or rm", c.Args().First())
			}
			return cli.ShowSubcommandHelp(c)
		},
	}
}

// createPod runs a container without a command in the background.
func createPod(c *cli.Context, client *api.Client) error {
	if _, err := client.Info(c.Context); err != nil {
		return err // before a process is started that would make a network of its own
	}
	args := []string{"run", "--pause", "--detach", "--socket", client.Socket(), "--name", c.Args().First()}
	for _, name := range podFlags {
		if !c.IsSet(name) {
			continue
		}
		values := c.StringSlice(name)
		if len(values) == 0 {
			values = []string{fmt.Sprint(c.Value(name))}
		}
		for _, v := range values {
			args = append(args, "--"+name, v)
		}
	}
	return detach(c.Context, args, "", c.App.Writer)
}

// pods are the attachments of pods, one a pod: that on its first network.
func pods(ctx context.Context, client *api.Client) (out []api.Attachment, err error) {
	as, err := client.Attachments(ctx, "")
	seen := make(map[int]bool)
	for _, a := range as {
		if a.Pod && !seen[a.Holder] {
			seen[a.Holder] = true
			out = append(out, a)
		}
	}
	return out, err
}

func podNames(ctx context.Context, client *api.Client, _ int) (out []string) {
	ps, _ := pods(ctx, client) // a node that does not answer completes nothing
	for _, p := range ps {
		out = append(out, p.Name)
	}
	return out
}

func listPods(c *cli.Context, client *api.Client) error {
	ps, err := pods(c.Context, client)
	if err != nil {
		return err
	}
	return show(c, ps, func(w io.Writer) {
		var rows [][]string
		for _, p := range ps {
			rows = append(rows, []string{p.Name, p.Network, joined(p.Addrs), fmt.Sprint(p.PID), string(p.State), ago(p.Since)})
		}
		table(w, "NAME NETWORK ADDRESSES PID STATE SINCE", rows)
	})
}

// podEnds bounds the wait for a pod to be gone.
const podEnds = 15 * time.Second

func removePods(c *cli.Context, client *api.Client) error {
	return each(c, func(ref string) error { return removePod(c.Context, client, ref) })
}

func removePod(ctx context.Context, client *api.Client, ref string) error {
	a, err := attachmentOf(ctx, client, ref)
	if err != nil {
		return err
	}
	if !a.Pod || a.Holder == 0 {
		return fmt.Errorf("%q is no pod; `patchbay pod ls` shows those there are, and `patchbay detach` takes others off the network", ref)
	}
	fd, err := unix.PidfdOpen(a.Holder, 0)
	if err == nil {
		err = unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0)
		unix.Close(fd)
	}
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end pod %q (pid %d): %w", ref, a.Holder, err)
	}
	for end := time.Now().Add(podEnds); ; time.Sleep(10 * time.Millisecond) {
		as, err := client.Attachments(ctx, a.Network)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(as, func(b api.Attachment) bool { return b.Name == a.Name && b.Holder == a.Holder }) {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("pod %q (pid %d) does not end; kill it", ref, a.Holder)
		}
	}
}

// detachedEnv tells a `run` that it is in the background: the number of the descriptor where it says that its command runs, or why not.
const detachedEnv = "PATCHBAY_DETACHED_FD"

// detach starts this program once more in the background with args, which may say --detach again (where a command line ends and another begins only its parser knows), waits until its command runs and prints the name that it has. What the command writes goes to log, or nowhere.
func detach(ctx context.Context, args []string, log string, out io.Writer) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	defer w.Close()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), detachedEnv+"=3")
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if log != "" {
		f, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return fmt.Errorf("--log: %w; name a file that you may write", err)
		}
		defer f.Close()
		cmd.Stdout, cmd.Stderr = f, f
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start in the background: %w", err)
	}
	w.Close()
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() }) // nobody waits for it any more
	b, err := io.ReadAll(io.LimitReader(r, 64<<10))
	stop()
	name, ok := strings.CutPrefix(string(b), "up ")
	if ok && err == nil {
		fmt.Fprintln(out, strings.TrimSpace(name))
		return cmd.Process.Release()
	}
	werr := cmd.Wait()
	if msg := strings.TrimSpace(strings.TrimPrefix(string(b), "error ")); msg != "" {
		fmt.Fprintln(os.Stderr, msg)
		var exit *exec.ExitError
		if errors.As(werr, &exit) {
			return exitStatus(exit.ExitCode())
		}
	}
	return fmt.Errorf("in the background: it ended without a word (%w)", werr)
}

// detachedEnd is this process's end of detach.
type detachedEnd struct{ f *os.File }

// backgroundKey is where it is in the metadata of the app.
const backgroundKey = "background"

func backgroundOf(c *cli.Context) *detachedEnd {
	if bg, ok := c.App.Metadata[backgroundKey].(*detachedEnd); ok {
		return bg
	}
	return &detachedEnd{}
}

// openBackground takes the descriptor out of the environment, so that the command does not inherit it.
func openBackground() *detachedEnd {
	v, ok := os.LookupEnv(detachedEnv)
	if !ok {
		return &detachedEnd{}
	}
	_ = os.Unsetenv(detachedEnv) // it is there
	if v != "3" {
		return &detachedEnd{}
	}
	unix.CloseOnExec(3)
	return &detachedEnd{f: os.NewFile(3, "background")}
}

// is reports whether this process is in the background already, and has not said how it went.
func (b *detachedEnd) is() bool { return b.f != nil }

// up says that the command runs.
func (b *detachedEnd) up(name string) { b.say("up " + name) }

// failed says why it does not.
func (b *detachedEnd) failed(msg string) { b.say("error " + msg) }

func (b *detachedEnd) say(s string) {
	if b.f == nil {
		return
	}
	_, _ = io.WriteString(b.f, s) // who waited may have gone
	b.f.Close()
	b.f = nil
}
