// Package spin decides when a loop that reads from the kernel should look again before it sleeps. What was measured is in package tap's documentation.
package spin
