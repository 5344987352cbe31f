package api

import (
	"io"
	"os"
	"testing"
	"time"
)

// TestTakeover holds that parts and descriptors arrive, that a successor that dies leaves the node as it was, and that one that serves ends it.
func TestTakeover(t *testing.T) {
	for _, done := range []bool{false, true} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		n := start(t, ServerConfig{})
		f := n.fake
		f.handing = &fakeHanding{fds: []int{int(w.Fd())}, ended: make(chan string, 1)}
		s, err := n.client.TakeOver(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		p, fds, err := s.Next()
		if err != nil || p.Kind != PartAPI {
			t.Fatalf("%+v, %v", p, err)
		}
		l, err := ListenFD(fds)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		p, fds, err = s.Next()
		if err != nil || p.Kind != PartTAP || p.Name != "web" || len(fds) != 1 {
			t.Fatalf("%+v, %v, %v", p, fds, err)
		}
		if p, _, err := s.Next(); err != nil || p.Kind != PartEnd {
			t.Fatalf("%+v, %v", p, err)
		}
		w.Close()
		out := os.NewFile(uintptr(fds[0]), "pipe")
		if _, err := out.WriteString("x"); err != nil {
			t.Error(err)
		}
		out.Close()
		if b, err := io.ReadAll(r); err != nil || string(b) != "x" {
			t.Errorf("the descriptor is another: %q, %v", b, err)
		}
		want := "resumed"
		if done {
			want = "committed"
			go s.Done()
		} else {
			s.Close()
		}
		select {
		case got := <-f.handing.ended:
			if got != want {
				t.Errorf("%s, want %s", got, want)
			}
		case <-time.After(10 * time.Second):
			t.Error("the old node waits for ever")
		}
	}
}

// TestTakeoverRefused holds that a node which cannot hand over says so and goes on.
func TestTakeoverRefused(t *testing.T) {
	n := start(t, ServerConfig{})
	s, err := n.client.TakeOver(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_, fds, err := s.Next()
	if err != nil {
		t.Fatal(err)
	}
	closeAll(fds)
	if p, _, err := s.Next(); err == nil {
		t.Errorf("%+v", p)
	}
	if _, err := n.client.Info(t.Context()); err != nil {
		t.Error(err)
	}
}
