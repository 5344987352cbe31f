//go:build race

package nat

// raceEnabled says that the race detector is on, whose own allocations are counted with ours.
const raceEnabled = true
