//go:build race

package node

// raceEnabled says that the race detector slows this process down, several times over.
const raceEnabled = true
