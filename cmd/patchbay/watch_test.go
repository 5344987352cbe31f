package main

import (
	"bytes"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"patchbay/internal/api"
	"patchbay/internal/testbed"
)

// TestCaptureEnds holds that pcapng is not written to a terminal, and that ^C ends a capture with its summary and a whole file.
func TestCaptureEnds(t *testing.T) {
	testbed.RequireTUN(t)
	d := startDaemon(t)

	_, theirs := terminal(t)
	var stderr bytes.Buffer
	cmd := d.command("capture", "default")
	cmd.Stdout, cmd.Stderr = theirs, &stderr
	if err := cmd.Run(); err == nil || !strings.HasPrefix(stderr.String(), "patchbay: capture: standard output is a terminal") {
		t.Errorf("a capture to a terminal ends with %v: %s", err, &stderr)
	}

	file := filepath.Join(t.TempDir(), "c.pcapng")
	said := &lockedBuffer{}
	cmd = d.command("capture", "-w", file, "default")
	cmd.Stderr = said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	written := func() bool { fi, err := os.Stat(file); return err == nil && fi.Size() > 0 }
	if !testbed.Wait(20*time.Second, written) {
		t.Errorf("no section header is written: %s", said)
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil || !strings.Contains(said.String(), "written to "+file) {
		t.Errorf("^C ends a capture with %v: %s", err, said)
	}
	if b, err := os.ReadFile(file); err != nil || !bytes.HasPrefix(b, []byte{0x0a, 0x0d, 0x0d, 0x0a}) {
		t.Errorf("the file is no pcapng: % x, %v", b[:min(len(b), 8)], err)
	}
}

// TestVersionOfAnotherDaemon has one answer that is older than the command.
func TestVersionOfAnotherDaemon(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	old := api.Info{Version: "0.0.1", PID: 77, Started: time.Now()}
	s := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(old); err != nil {
			t.Error(err)
		}
	})}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { s.Close() })
	var out, stderr bytes.Buffer
	cmd := patchbay(t, "version", "--socket", socket)
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, &stderr)
	}
	if !strings.Contains(out.String(), "daemon   0.0.1 (pid 77, since") || !strings.Contains(stderr.String(), "patchbay daemon --takeover replaces it") {
		t.Errorf("wrote %q and %q", &out, &stderr)
	}
}
