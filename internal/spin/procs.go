package spin

import (
	"os"
	"runtime"
)

// maxProcs bounds what SetProcs adds to the number of cores. Above it threads share processors, which costs a wake-up more now and then; but the garbage collector
// starts a worker for every fourth of them.
const maxProcs = 32

// SetProcs gives the Go scheduler a processor for each thread of this process that blocks in the kernel by design, blocked of them: for a node a reader for each TAP queue and nat.Loops for
// each network, for a load generator one for each flow. It never takes any away, since that stops the world for nothing. GOMAXPROCS in the environment wins.
//
// Such a thread keeps its processor while it sleeps in poll or epoll_wait, so that it runs on at once when it wakes, until the scheduler's monitor takes it away for
// somebody else. With as few processors as cores that happens at every sleep: the monitor then polls every 20 µs, and each wake-up begins with a search for a free processor.
func SetProcs(blocked int) {
	want := runtime.NumCPU() + min(blocked, maxProcs)
	if os.Getenv("GOMAXPROCS") == "" && want > runtime.GOMAXPROCS(0) {
		runtime.GOMAXPROCS(want)
	}
}
