package daemon

import (
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"patchbay/internal/api"
	"patchbay/internal/testbed"
)

// TestTakeoverTakesWhatWasAnswered: whatever was answered before a takeover is handed over, and whatever is answered during it was refused: ports are published and closed all the time meanwhile.
func TestTakeoverTakesWhatWasAnswered(t *testing.T) {
	testbed.Leaks(t)
	n := newTunnelNode(t, t.TempDir(), &nameList{}, "[::]:14789")
	mustCreate(t, n, api.NetworkSpec{Name: "lab"})
	if _, err := n.Attach(t.Context(), "lab", api.AttachmentSpec{Name: "vm", Lifetime: api.LifetimeStream, Stream: filepath.Join(t.TempDir(), "vm.sock")}, api.Caller{}); err != nil {
		t.Fatal(err)
	}
	for round := range 20 {
		var mu sync.Mutex
		open := map[string]bool{}
		var busy sync.WaitGroup
		stop := make(chan struct{})
		for worker := range 4 {
			busy.Go(func() {
				var mine []string
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					default:
					}
					if len(mine) < 4 {
						p, err := n.AddPublish(t.Context(), "lab", "vm", api.PublishSpec{Spec: fmt.Sprintf("127.99.0.%d:%d:80", worker+1, 20000+i%20000)})
						if err == nil {
							mine = append(mine, p.ID)
							mu.Lock()
							open[p.ID] = true
							mu.Unlock()
						} else if api.CodeOf(err) != api.CodeUnavailable {
							t.Errorf("publish: %v", err)
							return
						} else {
							time.Sleep(50 * time.Microsecond)
						}
						continue
					}
					if err := n.RemovePublish(t.Context(), mine[0]); err == nil {
						mu.Lock()
						delete(open, mine[0])
						mu.Unlock()
						mine = mine[1:]
					} else if api.CodeOf(err) != api.CodeUnavailable {
						t.Errorf("close: %v", err)
						return
					}
				}
			})
		}
		time.Sleep(time.Duration(round) * time.Millisecond)
		handed := map[string]bool{}
		h, err := n.HandOver(func(p api.Part, _ []int) error {
			if p.Kind == api.PartPublish {
				handed[p.ID] = true
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		close(stop)
		busy.Wait()
		for id := range open {
			if !handed[id] {
				t.Errorf("round %d: %s was answered and is not handed over", round, id)
			}
		}
		if len(handed) != len(open) {
			t.Errorf("round %d: %d are handed over, %d are open", round, len(handed), len(open))
		}
		h.Resume()
		ps := n.Publishes()
		if len(ps) != len(open) || slices.ContainsFunc(ps, func(p api.Publish) bool { return !open[p.ID] }) {
			t.Errorf("round %d: after it %d ports are published, %d were answered", round, len(ps), len(open))
		}
		for id := range open {
			if err := n.RemovePublish(t.Context(), id); err != nil {
				t.Error(err)
			}
		}
	}
}
