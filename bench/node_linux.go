package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"patchbay/internal/edge"
	"patchbay/internal/node"
	"patchbay/internal/spin"
	"patchbay/nat"
)

// nodeSpec is what the role node is told.
type nodeSpec struct {
	Pairs int
	sideSpec
}

// pairsOfContainers is patchbay in scenario switch: pairs of a far side and an agent on one network. To whoever started it it is one agent, which has all of them measure at
// the same time.
func pairsOfContainers(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("want one argument")
	}
	var spec nodeSpec
	if err := json.Unmarshal([]byte(args[0]), &spec); err != nil {
		return err
	}
	spin.SetProcs(nat.Loops + 2)
	network, err := node.NewNetwork(ctx, node.NetworkConfig{Name: "bench", LoopTAPs: node.FewCores()})
	if err != nil {
		return err
	}
	defer network.Close()
	var agents agentGroup
	out := json.NewEncoder(os.Stdout)
	ahead := 2 * spec.Pairs
	up := func() error { // a container
		if ahead--; ahead == 0 {
			return nil // the greeting says so
		}
		return out.Encode(greeting{Ahead: ahead})
	}
	for i := range spec.Pairs {
		a, end, err := startPair(ctx, network, i, spec.sideSpec, up)
		if err != nil {
			return fmt.Errorf("pair %d of %d: %w", i+1, spec.Pairs, err)
		}
		defer end()
		agents = append(agents, a)
	}
	if err := out.Encode(agents[0].greeting); err != nil {
		return err
	}
	in := json.NewDecoder(os.Stdin)
	for {
		var q request
		if err := in.Decode(&q); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		r, err := agents.ask(q)
		if err != nil {
			r.Failed = err.Error()
		}
		if err := out.Encode(r); err != nil {
			return err
		}
	}
}

// startPair starts the containers of one pair, and calls up when the far side listens and when the agent has reached it. end ends them.
func startPair(ctx context.Context, network *node.Network, number int, side sideSpec, up func() error) (a *agentConn, end func(), err error) {
	var ends []func()
	endAll := func() {
		for _, f := range ends {
			f()
		}
	}
	defer func() {
		if err != nil {
			endAll()
		}
	}()
	pipe := func() (r, w *os.File) {
		if err == nil {
			r, w, err = os.Pipe()
		}
		return r, w
	}
	start := func(name string, role []string, stdio edge.Stdio) *node.Container {
		if err != nil {
			return nil
		}
		c, serr := network.Start(ctx, node.ContainerConfig{
			AttachConfig: node.AttachConfig{Name: fmt.Sprintf("%s%d", name, number)},
			Process:      edge.Spec{Argv: role, Env: os.Environ(), Dir: "/"},
			Stdio:        stdio,
		})
		if err = serr; err != nil {
			return nil
		}
		ends = append(ends, func() { c.Close() })
		return c
	}
	serve, err := argument(serveSpec{Listen: ":" + loadPort, sideSpec: side})
	if err != nil {
		return nil, nil, err
	}
	out, w := pipe()
	far := start("server", role(roleServe, serve), edge.Stdio{Out: w, Err: os.Stderr})
	if err != nil {
		return nil, nil, err
	}
	w.Close()
	defer out.Close()
	var said ready
	if err := json.NewDecoder(out).Decode(&said); err != nil {
		return nil, nil, fmt.Errorf("the far side does not listen: %w", err)
	}
	if len(far.Addrs()) == 0 {
		return nil, nil, errors.New("the far side has no address")
	}
	if err := up(); err != nil {
		return nil, nil, err
	}
	agent, err := argument(agentSpec{Target: net.JoinHostPort(far.Addrs()[0].String(), loadPort), sideSpec: side})
	if err != nil {
		return nil, nil, err
	}
	inR, inW := pipe()
	outR, outW := pipe()
	start("client", role(roleAgent, agent), edge.Stdio{In: inR, Out: outW, Err: os.Stderr})
	if err != nil {
		return nil, nil, err
	}
	inR.Close()
	outW.Close()
	a = newAgentConn(inW, outR)
	ends = append(ends, a.close)
	if err := a.greet(); err != nil {
		return nil, nil, err
	}
	a.greeting.Far = said.Far
	return a, endAll, up()
}
