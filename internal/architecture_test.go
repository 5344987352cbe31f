package internal_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// methodName is how ARCHITECTURE.md names a function: `folder.(*Type).Method`.
var methodName = regexp.MustCompile("`([a-z/]+)\\.\\(\\*(\\w+)\\)\\.(\\w+)`")

// TestFramePathsExist fails when ARCHITECTURE.md tells of a function that the code has not.
func TestFramePathsExist(t *testing.T) {
	text, err := os.ReadFile("../ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	names := methodName.FindAllStringSubmatch(string(text), -1)
	if len(names) < 20 {
		t.Fatalf("ARCHITECTURE.md names %d functions; the test does not understand it any more", len(names))
	}
	for _, n := range names {
		folder, typ, method := n[1], n[2], n[3]
		files, err := filepath.Glob(filepath.Join("..", folder, "*.go"))
		if err != nil || len(files) == 0 {
			t.Errorf("%s: no such room", n[0])
			continue
		}
		decl := regexp.MustCompile(`(?m)^func \(\w+ \*?` + typ + `\) ` + method + `\(`)
		found := false
		for _, f := range files {
			if strings.HasSuffix(f, "_test.go") {
				continue
			}
			src, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			found = found || decl.Match(src)
		}
		if !found {
			t.Errorf("%s: no such function", n[0])
		}
	}
}
