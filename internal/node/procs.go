package node

import (
	"os"
	"runtime"
)

// natLoops is how many threads of a network's NAT block in epoll_wait.
const natLoops = 2

// SetProcs gives the Go scheduler a processor for each thread of this process that blocks in the kernel by design: a reader for each TAP queue, and NAT's
// loops. readers is how many TAP queues there will be. A program calls it once, before NewNetwork; GOMAXPROCS in the environment wins.
//
// Such a thread keeps its processor while it sleeps in poll or epoll_wait, so that it runs on at once when it wakes, until the scheduler's monitor takes it away for
// somebody else. With as few processors as cores that happens at every sleep: the monitor then polls every 20 µs, and each wake-up begins with a search for a free processor.
func SetProcs(readers int) {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(runtime.NumCPU() + natLoops + readers)
	}
}
