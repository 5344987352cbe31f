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
