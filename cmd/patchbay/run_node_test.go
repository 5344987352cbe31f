package main

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// TestFileOf holds that a container which has put something else in the place of a file neither stops nor fools the one who reads it.
func TestFileOf(t *testing.T) {
	outside, root := t.TempDir(), t.TempDir()
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(outside, "secret"), "secret")
	write(filepath.Join(root, "file"), "hosts")
	write(filepath.Join(root, "large"), string(make([]byte, maxContainerFile+1)))
	for name, target := range map[string]string{"inside": "/file", "outside": filepath.Join(outside, "secret"), "zero": "/dev/zero", "loop": "loop"} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(root, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"file": "hosts", "inside": "hosts", "outside": "", "zero": "", "loop": "", "fifo": "", "large": "", "absent": "", "../secret": ""} {
		if got := string(fileOf(root, name)); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}
