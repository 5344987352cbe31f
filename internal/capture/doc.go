// Package capture records what goes through a switch as pcapng: which port a frame came from, and for a frame that was dropped the reason as its comment.
//
// # Theory of operation
//
// A [Capture] is an observer of a switch (vswitch.Switch.Observe) while [Capture.Run] runs: each goroutine that forwards frames shows it what it is about to do with them. A frame that the
// filter takes is copied into a list that is bounded in bytes; Run takes the list, writes it and flushes, so that a reader at the other end of a pipe sees a frame within some
// milliseconds. When the reader is slow the list fills up, and further frames are counted and not kept: forwarding never waits. The count stands in the statistics block at the end.
//
// A frame is recorded where it enters the switch, and once more when the port that it was for refuses it (its device is full). Each port is an interface of the file. With
// Config.Port, frames from, to and flooded towards that port are recorded alone, those that were on their way there and isolated too.
//
// Filters are tcpdump's expressions (filter.go); the part of the language that is understood is described at [ParseFilter].
//
// # Ownership and concurrency
//
// A Capture belongs to the goroutine that runs it; Stats may be called from any.
//
// # Limits
//
// Config.BufferBytes of frames that wait to be written. Superframes are recorded whole, up to 64 KiB, with checksums that the receiving kernel has yet to complete.
//
// # References
//
// pcapng: draft-ietf-opsawg-pcapng; filters: pcap-filter(7).
package capture
