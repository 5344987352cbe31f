package stack

import (
	"io"
	"net"
	"testing"
	"time"

	"patchbay/tap"
)

func TestKernelEcho(t *testing.T) {
	cfg := testConfig()
	cfg.Handlers.TCP = accepting(func(c Conn) {
		defer c.Close()
		io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
	})
	w := newWorld(t, cfg, tap.OpenConfig{})
	for _, a := range []string{"192.0.2.7:80", "[2001:db8::7]:80", "10.88.0.1:99"} {
		w.Do(func() {
			c, err := net.DialTimeout("tcp", a, 3*time.Second)
			if err != nil {
				t.Fatalf("%v; drops %v", err, drops(w.gw))
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(3 * time.Second))
			if _, err := c.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			var b [5]byte
			if _, err := io.ReadFull(c, b[:]); err != nil || string(b[:]) != "hello" {
				t.Fatalf("got %q, %v", b, err)
			}
		})
	}
}
