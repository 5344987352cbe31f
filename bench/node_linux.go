package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"

	"patchbay/internal/edge"
	"patchbay/internal/node"
)

// twoContainers is patchbay in scenario switch: a far side and an agent on one network. The agent has this process's standard input and output.
func twoContainers(ctx context.Context) error {
	node.SetProcs(node.NATLoops + 2)
	network, err := node.NewNetwork(ctx, node.NetworkConfig{Name: "bench"})
	if err != nil {
		return err
	}
	defer network.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	far, err := network.Start(ctx, node.ContainerConfig{
		AttachConfig: node.AttachConfig{Name: "server"},
		Process:      edge.Spec{Argv: role(roleServe, ":"+loadPort), Env: os.Environ(), Dir: "/"},
		Stdio:        edge.Stdio{Out: w, Err: os.Stderr},
	})
	w.Close()
	if err != nil {
		return err
	}
	defer far.Close()
	if line, err := bufio.NewReader(r).ReadString('\n'); err != nil {
		return fmt.Errorf("the far side said %q: %w", line, err)
	}
	if len(far.Addrs()) == 0 {
		return errors.New("the far side has no address")
	}
	spec, err := json.Marshal(agentSpec{Target: net.JoinHostPort(far.Addrs()[0].String(), loadPort)})
	if err != nil {
		return err
	}
	near, err := network.Start(ctx, node.ContainerConfig{
		AttachConfig: node.AttachConfig{Name: "client"},
		Process:      edge.Spec{Argv: role(roleAgent, string(spec)), Env: os.Environ(), Dir: "/"},
		Stdio:        edge.Stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr},
	})
	if err != nil {
		return err
	}
	defer near.Close()
	st, err := near.Wait()
	if err == nil && st.ExitCode() != 0 {
		err = fmt.Errorf("the agent ended with %s", st)
	}
	return err
}
