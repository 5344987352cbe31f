// Package frame is the vocabulary of the data plane: Frame, Caps, Drop reasons, counters and Sink. It makes no
// system calls and knows no device.
//
// # Theory of operation
//
// A frame enters at an edge (a TAP queue, a tunnel socket, the gateway), is looked at by the switch and leaves at one or
// more ports. Between entry and exit nobody copies it: the bytes belong to the scratch of the goroutine that read them, and
// every call down the line borrows them until it returns.
//
// # Ownership
//
// A []Frame handed to Forward or Transmit is lent: the callee reads it, may not write to it, keeps nothing of it after it returns, and
// must assume that the same bytes go to other ports too.
//
// # Concurrency
//
// Frame and Caps are plain values. DropCounters and Counter may be used from any goroutine.
package frame
