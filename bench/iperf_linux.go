package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/bench/load"
)

// iperf3 measures beside the bench's own generator where it is installed, so that the two can be compared.
const (
	iperfKind    = "iperf3"
	iperfPort    = "7072"
	iperfAbsence = "install package iperf3 to have its figure beside the generator's own"
)

// isIperf reports whether a command line is iperf3's.
func isIperf(a []string) bool { return len(a) > 0 && filepath.Base(a[0]) == iperfKind }

// serveIperf starts iperf3's far side, until this process ends.
func serveIperf(ctx context.Context, program string) error {
	cmd := exec.CommandContext(ctx, program, "-s", "-p", iperfPort)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }() // an early end is a measurement that fails
	return nil
}

// iperf measures one stream to the far side.
func iperf(ctx context.Context, program string, cfg load.Config) (load.Result, error) {
	host, _, err := net.SplitHostPort(cfg.Addr)
	if err != nil {
		return load.Result{}, err
	}
	seconds := max(1, int(cfg.Duration.Round(time.Second)/time.Second)) // its -t takes whole ones
	out, err := exec.CommandContext(ctx, program, "-c", host, "-p", iperfPort, "-t", strconv.Itoa(seconds), "-J").Output()
	var report struct {
		Error string
		End   struct {
			Received struct {
				Bytes   int64
				Seconds float64
			} `json:"sum_received"`
		}
	}
	if jerr := json.Unmarshal(out, &report); err == nil {
		err = jerr
	}
	if report.Error != "" {
		err = errors.New(report.Error)
	}
	if err != nil {
		return load.Result{}, fmt.Errorf("iperf3 to %s: %w", host, err)
	}
	got := report.End.Received
	return load.Result{Bytes: got.Bytes, Elapsed: time.Duration(got.Seconds * float64(time.Second))}, nil
}
