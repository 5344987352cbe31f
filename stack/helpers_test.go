package stack

import (
	"patchbay/frame"
)

// drops is what g dropped so far, by the names of the reasons.
func drops(g *Gateway) map[string]uint64 {
	m := map[string]uint64{}
	g.Drops().Each(func(d frame.Drop, n uint64) { m[d.String()] = n })
	return m
}

// waiting is how many requests wait, and of how many sources.
func (g *Gateway) waiting() (requests, sources int) {
	g.pending.mu.Lock()
	defer g.pending.mu.Unlock()
	return len(g.pending.m), len(g.pending.bySrc)
}
