package main

import (
	"testing"

	"patchbay/internal/testbed"
	"patchbay/internal/testbed/probe"
)

func TestMain(m *testing.M) {
	probe.Main()
	testbed.Main(m)
}
