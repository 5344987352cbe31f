package spin

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// switches is how often the threads of this process but the caller's have gone to sleep so far, by what the kernel says.
func switches(t *testing.T) (n int) {
	t.Helper()
	files, err := filepath.Glob("/proc/self/task/*/status")
	if err != nil {
		t.Fatal(err)
	}
	own := fmt.Sprintf("/task/%d/", unix.Gettid())
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil || strings.Contains(file, own) {
			continue // a thread that has ended
		}
		_, after, ok := strings.Cut(string(b), "\nvoluntary_ctxt_switches:")
		if !ok {
			t.Fatalf("%s says nothing of its switches of context:\n%s", file, b)
		}
		one, err := strconv.Atoi(strings.Fields(after)[0])
		if err != nil {
			t.Fatal(err)
		}
		n += one
	}
	return n
}

// A loop that sleeps in the kernel, a tenth of a millisecond at a time, as one does that serves a round trip: the monitor polls every 20 µs unless the loop gives way.
func TestSliceQuietsTheMonitor(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(runtime.NumCPU() + 2)) // as SetProcs has it
	others := func(turn func()) int {
		before := make(chan int)
		after := make(chan int)
		go func() {
			runtime.LockOSThread() // so that switches knows whose the loop's are; the thread ends with the goroutine
			before <- switches(t)
			tenth := unix.NsecToTimespec(int64(100 * time.Microsecond))
			for start := time.Now(); time.Since(start) < 300*time.Millisecond; {
				turn()
				_, _ = unix.Ppoll(nil, &tenth, nil)
			}
			after <- switches(t)
		}()
		return -<-before + <-after
	}
	for range 5 { // other tests' threads, and other programs, are on the machine too
		var s Slice
		with, without := others(s.Yield), others(func() {})
		t.Logf("the others slept %d times beside a loop that gives way, %d beside one that does not", with, without)
		if 3*with < 2*without {
			return
		}
	}
	t.Error("giving way does not keep the monitor from polling")
}
