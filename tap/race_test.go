//go:build race

package tap

// The race detector makes a sync.Pool forget things on purpose.
func init() { poolForgets = true }
