package capture

import (
	"testing"

	"patchbay/internal/testbed"
)

func TestMain(m *testing.M) { testbed.Main(m) }
