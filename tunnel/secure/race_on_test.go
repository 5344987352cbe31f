//go:build race

package secure

// raceEnabled: sync.Pool forgets at random under the race detector, so allocations say nothing.
const raceEnabled = true
