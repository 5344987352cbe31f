package edge

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"patchbay/tap"
)

// The parent and the edge process talk over a SOCK_SEQPACKET socketpair, one JSON object a message. The edge process is inside
// the container, so what it says is bounded and taken as a claim: only its descriptors, before COMMAND exists, and a status.

// maxMessage is the longest message in bytes.
const maxMessage = 64 << 10

type messageKind string

const (
	msgDevice   messageKind = "device"   // edge: one opened interface, its descriptors attached
	msgReady    messageKind = "ready"    // edge: everything is in place
	msgListener messageKind = "listener" // edge: the filter is on COMMAND-to-be, its listener attached
	msgStarted  messageKind = "started"  // edge: COMMAND has been executed
	msgStopped  messageKind = "stopped"  // edge: COMMAND was stopped by a signal
	msgCont     messageKind = "cont"     // edge: COMMAND goes on
	msgExit     messageKind = "exit"     // edge: COMMAND has ended and its descendants too
	msgFail     messageKind = "fail"     // edge: it will not come to COMMAND
	msgRelease  messageKind = "release"  // parent: start COMMAND
	msgDetach   messageKind = "detach"   // parent: close what you hold of the interface
	msgSignal   messageKind = "signal"   // parent: it was sent this signal
	msgKill     messageKind = "direct"   // parent: send COMMAND this signal, whoever else has it
)

type message struct {
	Kind    messageKind
	Device  *tap.Info `json:",omitempty"`
	Notes   []string  `json:",omitempty"`
	PID     int       `json:",omitempty"`
	Name    string    `json:",omitempty"`
	Signal  int       `json:",omitempty"`
	Code    int       `json:",omitempty"`
	Left    []int     `json:",omitempty"`
	Err     string    `json:",omitempty"`
	Errno   int       `json:",omitempty"`
	Gone    bool      `json:",omitempty"` // tap.ErrGone
	Network uint64    `json:",omitempty"` // the container's network namespace, by its cookie
}

// link is one end. One goroutine may receive while any number send.
type link struct {
	c *net.UnixConn
}

// newLink takes over fd.
func newLink(fd int) (*link, error) {
	f := os.NewFile(uintptr(fd), "edge")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("not a unix socket")
	}
	return &link{c: u}, nil
}

func (l *link) Close() error { return l.c.Close() }

func (l *link) send(m message, fds ...int) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > maxMessage {
		return fmt.Errorf("message of %d bytes", len(b))
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err = l.c.WriteMsgUnix(b, oob, nil)
	return err
}

// recv waits for a message. It returns io.EOF when the other process is gone. wantFDs says whether descriptors are taken; if
// not, the kernel discards them.
func (l *link) recv(buf []byte, wantFDs bool) (m message, fds []int, err error) {
	var oob []byte
	if wantFDs {
		oob = make([]byte, unix.CmsgSpace(4*maxQueues))
	}
	n, oobn, flags, _, err := l.c.ReadMsgUnix(buf, oob)
	if oobn > 0 {
		fds = rights(oob[:oobn])
	}
	switch {
	case errors.Is(err, unix.ECONNRESET):
		err = io.EOF
	case err == nil && n == 0:
		err = io.EOF
	case err == nil && flags&unix.MSG_TRUNC != 0:
		err = fmt.Errorf("message longer than %d bytes", len(buf))
	case err == nil:
		err = json.Unmarshal(buf[:n], &m)
	}
	if err != nil {
		closeAll(fds)
		return message{}, nil, err
	}
	return m, fds, nil
}

func rights(oob []byte) (fds []int) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for _, m := range msgs {
		if f, err := unix.ParseUnixRights(&m); err == nil {
			fds = append(fds, f...)
		}
	}
	return fds
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
