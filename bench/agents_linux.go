package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// greetTime is how long whoever waits for an agent's greeting waits for a sign of it: until a process has come up, in its container if there is one, and has found its target or
// given it up.
const greetTime = reachTime + 5*time.Second

// agentConn is the other end of an agent.
type agentConn struct {
	in, out  *os.File
	dec      *json.Decoder
	patience time.Duration // greetTime, but for tests
	greeting greeting
}

// newAgentConn makes one of the pipes that are an agent's standard input and output. They are its own then.
func newAgentConn(in, out *os.File) *agentConn {
	return &agentConn{in: in, out: out, dec: json.NewDecoder(out), patience: greetTime}
}

func (a *agentConn) close() {
	a.in.Close()
	a.out.Close()
}

// greet waits until the agent has reached its target. An agent that has containers to start for that says so of each, and its time begins anew with each: all of 64 take as
// long as a machine that is busy otherwise lets them.
func (a *agentConn) greet() error {
	ahead := ""
	for {
		_ = a.out.SetReadDeadline(time.Now().Add(a.patience)) // a pipe can
		var g greeting
		if err := a.dec.Decode(&g); err != nil {
			return fmt.Errorf("no agent%s: %w", ahead, err)
		}
		switch {
		case g.Failed != "":
			return errors.New(g.Failed)
		case g.Ahead == 0:
			a.greeting = g
			return nil
		}
		ahead = fmt.Sprintf(" with %d containers not started yet", g.Ahead)
	}
}

// ask has the agent take a measurement, which takes its duration, or as long as its count does, and at most two minutes more. Along with an error there may be a result, of
// what worked.
func (a *agentConn) ask(q request) (reply, error) {
	_ = a.out.SetReadDeadline(time.Now().Add(q.Config.Duration + 2*time.Minute)) // a pipe can
	if err := json.NewEncoder(a.in).Encode(q); err != nil {
		return reply{}, err
	}
	var r reply
	if err := a.dec.Decode(&r); err != nil {
		return r, fmt.Errorf("the agent does not answer: %w", err)
	}
	if r.Failed != "" {
		return r, errors.New(r.Failed)
	}
	return r, nil
}

// agentGroup is agents that measure at the same time.
type agentGroup []*agentConn

func (g agentGroup) do(m measurement, d time.Duration) (reply, error) {
	return g.ask(request{Kind: m.kind, Config: m.config(d)})
}

// ask asks all of them at once, and adds up what they say. Latencies are those of the first.
func (g agentGroup) ask(q request) (sum reply, err error) {
	replies, errs := make([]reply, len(g)), make([]error, len(g))
	var wg sync.WaitGroup
	for i, a := range g {
		wg.Go(func() { replies[i], errs[i] = a.ask(q) })
	}
	wg.Wait()
	for i, r := range replies {
		if i == 0 {
			sum = r
			continue
		}
		to, from := &sum.Result, r.Result
		to.Bytes += from.Bytes
		to.Sent += from.Sent
		to.Received += from.Received
		to.Ops += from.Ops
		to.Errors += from.Errors
		to.Elapsed = max(to.Elapsed, from.Elapsed)
		if to.FirstErr == "" {
			to.FirstErr = from.FirstErr
		}
	}
	return sum, errors.Join(errs...)
}
