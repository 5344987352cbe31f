package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"patchbay/internal/testbed"
)

// TestScripts runs the command line as a person would: each file of testdata is a session.
func TestScripts(t *testing.T) {
	testbed.RequireTUN(t)
	bin := testbed.Build(t)
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			e.Setenv("PATH", filepath.Dir(bin)+string(os.PathListSeparator)+os.Getenv("PATH")+":/usr/sbin:/sbin")
			return nil
		},
	})
}
