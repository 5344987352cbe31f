package tap

import (
	"context"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/testbed"
)

// TestContainerCannotMakeItBlock: O_NONBLOCK belongs to the open file, which root in the container can get at through the duplicate that the edge
// process keeps. A read that blocked for want of it would stop the whole program, this test included, so what tells is that it ends.
func TestContainerCannotMakeItBlock(t *testing.T) {
	testbed.Leaks(t)
	ns := testbed.NewNS(t)
	for _, oc := range []OpenConfig{{Name: "eth0"}, {Name: "eth0", Plain: true}, {Name: "eth0", Kind: KindPacket}} {
		t.Run(fmt.Sprintf("%v plain=%v", oc.Kind, oc.Plain), func(t *testing.T) {
			h := openHandle(t, ns, oc, IfConfig{Addrs: prefixes("10.0.0.1/24")})
			d, err := New(Config{Info: h.Info, FDs: h.FDs})
			if err != nil {
				t.Fatal(err)
			}
			if !d.nowait {
				testbed.Lacking(t, "the kernel does not know RWF_NOWAIT here")
			}
			dup, err := unix.FcntlInt(uintptr(h.FDs[0]), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.SetNonblock(dup, false); err != nil {
				t.Fatal(err)
			}
			unix.Close(dup)
			came := make(chan struct{}, 1)
			ctx, cancel := context.WithCancel(t.Context())
			result := make(chan error, 1)
			go func() {
				result <- d.Serve(ctx, 0, sinkFunc(func([]frame.Frame) {
					select {
					case came <- struct{}{}:
					default:
					}
				}))
			}()
			// An ARP request; behind it the queue is empty, and the next read finds nothing.
			if err := ns.Command(testbed.Tool(t, "ping"), "-c1", "-W1", "10.0.0.2").Run(); err == nil {
				t.Error("somebody answered")
			}
			<-came
			if n := d.Transmit([]frame.Frame{{Data: make([]byte, 60)}}); n != 1 {
				t.Errorf("Transmit took %d", n)
			}
			cancel()
			select {
			case err := <-result:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(5 * time.Second):
				t.Fatal("Serve did not return")
			}
			d.Close()
		})
	}
}
