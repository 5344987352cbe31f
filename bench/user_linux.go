package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// userSpec is what the role user starts.
type userSpec struct {
	// Inside runs in the new namespace, and Daemon where the role runs; placePID in it becomes the process id of what runs inside.
	Inside, Daemon []string
	// Slirp is the API socket of a slirp4netns that is to publish ports: loadPort, and these.
	Slirp string `json:",omitempty"`
	Ports []int  `json:",omitempty"`
}

const placePID = "{PID}"

// userNamespace is an ordinary user who makes a network namespace and then lets a daemon give it a network. What runs in it has this process's standard
// input and output.
func userNamespace(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("want one argument")
	}
	var spec userSpec
	if err := json.Unmarshal([]byte(args[0]), &spec); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	inside := exec.CommandContext(ctx, spec.Inside[0], spec.Inside[1:]...)
	inside.Stdin, inside.Stdout, inside.Stderr = os.Stdin, os.Stdout, os.Stderr
	inside.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	if err := inside.Start(); err != nil {
		return err
	}
	for i, a := range spec.Daemon {
		if a == placePID {
			spec.Daemon[i] = fmt.Sprint(inside.Process.Pid)
		}
	}
	daemon := exec.CommandContext(ctx, spec.Daemon[0], spec.Daemon[1:]...)
	daemon.Stdout, daemon.Stderr = os.Stderr, os.Stderr
	if err := daemon.Start(); err != nil {
		cancel()
		return errors.Join(err, inside.Wait())
	}
	if spec.Slirp != "" {
		if err := slirpForward(spec.Slirp, spec.Ports); err != nil {
			cancel()
			return errors.Join(err, daemon.Wait(), inside.Wait())
		}
	}
	var daemonErr, insideErr error
	gone, ended := make(chan struct{}), make(chan struct{})
	go func() { daemonErr = daemon.Wait(); close(gone) }()
	go func() { insideErr = inside.Wait(); close(ended) }()
	select {
	case <-ended:
		cancel()
		<-gone // killed
		return insideErr
	case <-gone:
		cancel()
		<-ended
		return fmt.Errorf("%s has ended: %w", spec.Daemon[0], orExit(daemonErr))
	}
}

// orExit is err, or that there was none.
func orExit(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}
