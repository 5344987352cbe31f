package stream

import (
	"bufio"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/porttest"
)

// TestConformance runs what every Port must do.
func TestConformance(t *testing.T) {
	porttest.Run(t, func(t *testing.T) *porttest.Harness {
		p, peer := pair(t, Config{})
		r := bufio.NewReaderSize(peer, 1<<20)
		return &porttest.Harness{
			Port: p, AllocFree: true, Drops: p.Drops().Total, Close: func() { p.Close() },
			Read: func(wait time.Duration) (fs []frame.Frame) {
				for len(fs) < 256 {
					peer.SetReadDeadline(time.Now().Add(wait))
					if _, err := r.Peek(prefixLen); err != nil { // nothing is taken before all of it is there
						if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, io.EOF) {
							t.Logf("peer: %v", err)
						}
						return fs
					}
					peer.SetReadDeadline(time.Time{})
					fs = append(fs, frame.Frame{Data: next(t, r)})
					wait = time.Millisecond
				}
				return fs
			},
		}
	})
}
