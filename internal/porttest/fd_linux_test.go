package porttest

import "golang.org/x/sys/unix"

func closeFD(fd int) { _ = unix.Close(fd) }

func writeFD(fd int, b []byte) error {
	_, err := unix.Write(fd, b)
	return err
}
