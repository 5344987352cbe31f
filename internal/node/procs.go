package node

import (
	"os"
	"runtime"
)

// maxProcs bounds what SetProcs adds to the number of cores. Above it threads share processors, which costs a wake-up more now and then; but the garbage collector
// starts a worker for every fourth of them.
const maxProcs = 32

// NATLoops is how many threads of a network's NAT block in epoll_wait.
const NATLoops = 2

// SetProcs gives the Go scheduler a processor for each thread of this process that blocks in the kernel by design, blocked of them: a reader for each TAP queue, and NATLoops for
// each network. It never takes any away, since that stops the world for nothing. GOMAXPROCS in the environment wins.
//
// Such a thread keeps its processor while it sleeps in poll or epoll_wait, so that it runs on at once when it wakes, until the scheduler's monitor takes it away for
// somebody else. With as few processors as cores that happens at every sleep: the monitor then polls every 20 µs, and each wake-up begins with a search for a free processor.
func SetProcs(blocked int) {
	want := runtime.NumCPU() + min(blocked, maxProcs)
	if os.Getenv("GOMAXPROCS") == "" && want > runtime.GOMAXPROCS(0) {
		runtime.GOMAXPROCS(want)
	}
}
