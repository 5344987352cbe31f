package bench

import (
	"encoding/binary"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/bench/load"
)

// sendFromMACs sends a frame from each of n addresses, twice, as a bridge with as many hosts behind it does, at a pace that a device's queue can take. They go to an address that nobody has.
func sendFromMACs(device string, n int) (load.Result, error) {
	ifi, err := net.InterfaceByName(device)
	if err != nil {
		return load.Result{}, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return load.Result{}, fmt.Errorf("packet socket: %w", err)
	}
	defer unix.Close(fd)
	const (
		experimental = 0x88b5 // IEEE 802's EtherType for local experiments
		burst        = 100
	)
	frame := make([]byte, 60)
	copy(frame, []byte{0x02, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02, 0xfe})
	binary.BigEndian.PutUint16(frame[12:], experimental)
	to := &unix.SockaddrLinklayer{Ifindex: ifi.Index}
	start := time.Now()
	for range 2 {
		for i := range n {
			binary.BigEndian.PutUint32(frame[8:], uint32(i))
			if err := unix.Sendto(fd, frame, 0, to); err != nil {
				return load.Result{}, fmt.Errorf("%s: %w", device, err)
			}
			if i%burst == burst-1 {
				time.Sleep(time.Millisecond)
			}
		}
	}
	return load.Result{Ops: int64(n), Elapsed: time.Since(start)}, nil
}
