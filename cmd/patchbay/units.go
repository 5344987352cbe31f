package main

import (
	"fmt"
	"strconv"
	"strings"
)

// parseRate reads what --rate takes: bytes a second, with k, M or G for thousands, millions and billions, or bits where it ends in "bit", as 100Mbit.
func parseRate(s string) (bytesPerSecond int64, err error) {
	n, bits := strings.CutSuffix(strings.TrimSuffix(s, "/s"), "bit")
	factor := 1.0
	if len(n) > 0 {
		switch n[len(n)-1] {
		case 'k', 'K':
			factor = 1e3
		case 'M':
			factor = 1e6
		case 'G':
			factor = 1e9
		}
	}
	if factor > 1 {
		n = n[:len(n)-1]
	}
	v, err := strconv.ParseFloat(n, 64)
	if bits {
		factor /= 8
	}
	v *= factor
	if err != nil || !(v >= 1 && v < 1<<62) {
		return 0, fmt.Errorf("%.40q is not a rate; write bytes a second such as 500k or 10M, or bits such as 100Mbit", s)
	}
	return int64(v), nil
}
