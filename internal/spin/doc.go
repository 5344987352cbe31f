// Package spin is about when a loop that reads from the kernel lets others run: Spinner decides when it looks again before it sleeps, Slice when it gives way to other goroutines, and SetProcs how many may wait there.
// What was measured of spinning is in the documentation of package tap, and of giving way in docs/performance.md.
package spin
