package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// upgrade is the protocol that a session speaks after HTTP.
const upgrade = "patchbay-attach/1"

// sendLine writes v as one line, with descriptors beside its first byte.
func sendLine(c *net.UnixConn, v any, fds ...int) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) >= MaxBody {
		return fmt.Errorf("message of %d bytes; at most %d", len(b), MaxBody)
	}
	b = append(b, '\n')
	if len(fds) > 0 {
		n, _, err := c.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	_, err = c.Write(b)
	return err
}

// recvLine reads one line into v, and the descriptors that came with it, at most MaxQueues. Nothing may follow the line. On error no descriptor stays open.
func recvLine(c *net.UnixConn, v any) (fds []int, err error) {
	defer func() {
		if err != nil {
			closeAll(fds)
			fds = nil
		}
	}()
	var line []byte
	buf := make([]byte, 4096)
	oob := make([]byte, unix.CmsgSpace(4*MaxQueues))
	for {
		n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob) // sets MSG_CMSG_CLOEXEC
		if err != nil {
			return fds, err // the counts mean nothing then
		}
		got, rerr := rights(oob[:oobn])
		fds = append(fds, got...)
		line = append(line, buf[:n]...)
		switch {
		case rerr != nil:
			return fds, rerr
		case flags&unix.MSG_CTRUNC != 0 && len(fds) < MaxQueues:
			return fds, fmt.Errorf("%d descriptors have come, and those behind them are lost: this process may open no more; raise its limit of open files (ulimit -n)", len(fds))
		case flags&unix.MSG_CTRUNC != 0 || len(fds) > MaxQueues:
			return fds, fmt.Errorf("more than %d descriptors", MaxQueues)
		case n == 0 && len(line) == 0:
			return fds, io.EOF
		case n == 0:
			return fds, io.ErrUnexpectedEOF
		}
		i := bytes.IndexByte(line, '\n')
		switch {
		case i < 0 && len(line) < MaxBody:
			continue
		case i < 0:
			return fds, fmt.Errorf("line longer than %d bytes", MaxBody)
		case i != len(line)-1:
			return fds, errors.New("more than one line, where one is due")
		}
		return fds, decodeStrict(line, v)
	}
}

// rights are the descriptors of a control message. What of it cannot be read leaves none open.
func rights(oob []byte) (fds []int, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control message: %w", err)
	}
	for _, m := range msgs {
		f, err := unix.ParseUnixRights(&m)
		if err != nil {
			return fds, fmt.Errorf("control message: %w", err)
		}
		fds = append(fds, f...)
	}
	return fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// decodeStrict reads exactly one JSON value, with no field that v does not have.
func decodeStrict(b []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return explainJSON(err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the JSON value")
	}
	return nil
}

// explainJSON words what encoding/json says for people who have never seen Go.
func explainJSON(err error) error {
	var syntax *json.SyntaxError
	var typ *json.UnmarshalTypeError
	switch {
	case errors.Is(err, io.EOF):
		return errors.New("it is empty")
	case errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("the JSON ends too early")
	case errors.As(err, &syntax):
		return fmt.Errorf("not JSON at byte %d: %s", syntax.Offset, abbreviate(syntax.Error()))
	case errors.As(err, &typ) && typ.Field == "":
		return fmt.Errorf("a %s where an object is due", typ.Value)
	case errors.As(err, &typ):
		return fmt.Errorf("field %q: a %s does not fit", typ.Field, abbreviate(typ.Value))
	}
	return errors.New(abbreviate(err.Error()))
}
