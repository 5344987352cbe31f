package spin

import (
	"runtime"
	"time"
)

// sliceLength is how often a loop that is busy gives way. It has to be less than the 10 ms (forcePreemptNS in the runtime's proc.go) after which the scheduler's monitor takes a goroutine for stuck.
const sliceLength = 5 * time.Millisecond

// Slice has a read loop give way to other goroutines now and then, whether it has anything to wait for or not. It belongs to that loop; the zero Slice is ready.
//
// A goroutine that goes from one system call to the next is never rescheduled: it waits in the kernel and not in the runtime. After 10 ms in which the scheduler has seen no other goroutine on its processor, the
// scheduler's monitor thread takes it for stuck: it sends it a signal, takes the processor away in each system call, and polls every 20 µs from then on (retake and sysmon in runtime/proc.go). That polling alone is
// thousands of wake-ups a second on cores that the loops need: 5 to 7 % of a node's time with a stream through a tunnel. What it costs to give way, by contrast, is that the scheduler wakes a thread that looks
// for work; so it is not done after each batch.
type Slice struct {
	began time.Time
}

// Yield gives way if the time has come. It reads the clock, and is to be called once in each turn of the loop.
func (s *Slice) Yield() {
	now := time.Now()
	if now.Sub(s.began) >= sliceLength {
		s.began = now
		runtime.Gosched()
	}
}
