package main

import (
	"os"
	"testing"

	"patchbay/internal/testbed"
	"patchbay/internal/testbed/probe"
)

func TestMain(m *testing.M) {
	probe.Main()
	if os.Getenv(envPodmanHost) != "" {
		os.Exit(m.Run()) // script/podman-host has made the host
	}
	testbed.Main(m)
}
