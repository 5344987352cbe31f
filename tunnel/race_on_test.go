//go:build race

package tunnel

// raceEnabled: sync.Pool forgets at random under the race detector, so allocations say nothing.
const raceEnabled = true
