package nat

import (
	"fmt"
	"os"
	"testing"

	"patchbay/internal/testbed"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && (os.Args[1] == "load-serve" || os.Args[1] == "load-crr") {
		if err := loadMain(os.Args[1], os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) == 3 && os.Args[1] == "journal-churn" {
		fmt.Fprintln(os.Stderr, journalChurn(os.Args[2]))
		os.Exit(1)
	}
	testbed.Main(m)
}
