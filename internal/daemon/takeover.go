package daemon

import (
	"context"
	"net"

	"patchbay/internal/api"
)

// TakeOver replaces the node that answers at socket.
func TakeOver(context.Context, Config, string) (*Node, *net.UnixListener, error) {
	return nil, nil, api.Errorf(api.CodeUnavailable, "", "not yet")
}
