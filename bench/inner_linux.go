package bench

import (
	"context"
	"errors"
	"fmt"
	"os/signal"

	"golang.org/x/sys/unix"
)

// Roles of Inner; the first of its arguments.
const (
	roleScenarios = "scenarios"
	roleServe     = "serve"
	roleAgent     = "agent"
	roleUser      = "user"
	roleNode      = "node"
	roleWire      = "wire"
	roleSwitch    = "switch"
)

// self is how the bench starts its own binary, which may be replaced on disk meanwhile.
const self = "/proc/self/exe"

// role is the command line of a role.
func role(args ...string) []string { return append([]string{self, "bench", "inner"}, args...) }

// Inner is what a program does that Run started again with the arguments "bench inner" and args.
func Inner(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("bench inner: for the bench's own use")
	}
	if args[0] != roleScenarios { // which ends with its parent
		var stop func()
		ctx, stop = signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
		defer stop()
	}
	var err error
	switch r, args := args[0], args[1:]; r {
	case roleScenarios:
		err = scenarios(ctx, args)
	case roleServe:
		err = serve(ctx, args)
	case roleAgent:
		err = agent(ctx, args)
	case roleUser:
		err = userNamespace(ctx, args)
	case roleNode:
		err = pairsOfContainers(ctx, args)
	case roleWire:
		err = wire(ctx, args)
	case roleSwitch:
		err = bareSwitch(ctx, args)
	default:
		err = fmt.Errorf("no role %q", r)
	}
	if err != nil {
		return fmt.Errorf("bench inner %s: %w", args[0], err)
	}
	return nil
}
