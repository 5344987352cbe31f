package api

import (
	"context"
	"io"

	"patchbay/internal/wire"
)

// Backend is the node, as a Server sees it. Its methods are safe for concurrent use; an error that is no *Error is CodeInternal. What changes something is
// on disk when it returns.
type Backend interface {
	Info() Info
	Networks() []Network
	Network(name string) (Network, error)
	CreateNetwork(ctx context.Context, spec NetworkSpec) (Network, error)
	// RemoveNetwork refuses one with attachments (CodeConflict).
	RemoveNetwork(ctx context.Context, name string) error

	// Attachments are those of one network, or of all with "", by network and name.
	Attachments(network string) ([]Attachment, error)
	Attachment(network, name string) (Attachment, error)
	// Attach reserves name, addresses and published ports. The caller ends with Plug or Abort.
	Attach(ctx context.Context, network string, spec AttachmentSpec, peer Caller) (Attaching, error)
	// Resume is Attach for a client that comes back after a restart of the node.
	Resume(ctx context.Context, network, name string, peer Caller) (Attaching, error)
	// AttachStream makes an attachment of LifetimeStream.
	AttachStream(ctx context.Context, network string, spec AttachmentSpec) (Attachment, error)
	Detach(ctx context.Context, network, name string) error

	Publishes() []Publish
	AddPublish(ctx context.Context, network, attachment string, spec PublishSpec) (Publish, error)
	RemovePublish(ctx context.Context, id string) error

	// Peers are those of one network, or of all with "", by network and host.
	Peers(network string) ([]Peer, error)
	// AddPeer keeps the peer also when its name leads nowhere now: it is tried again. peer is HOST or HOST:PORT in what follows.
	AddPeer(ctx context.Context, network string, spec PeerSpec) (Peer, error)
	RemovePeer(ctx context.Context, network, peer string) error
	// AddPeerFDB and RemovePeerFDB make and take back a static entry of a peer, and answer with the peer.
	AddPeerFDB(ctx context.Context, network, peer string, mac wire.MAC) (Peer, error)
	RemovePeerFDB(ctx context.Context, network, peer string, mac wire.MAC) (Peer, error)

	FDB(network string) ([]FDBEntry, error)
	// Drops are those of one network, or of all with "".
	Drops(network string) ([]DropCount, error)
	// HandOver stops the node for a successor and sends everything that is not on disk; the descriptors stay its own. On error it goes on as before.
	HandOver(send func(p Part, fds []int) error) (Handing, error)
	// Capture prepares a capture, so that a bad filter is an error before the answer begins; run blocks until ctx or w ends.
	Capture(network string, spec CaptureSpec) (run func(ctx context.Context, w io.Writer) error, err error)
}

// Caller is the process at the other end of the socket, as the kernel says.
type Caller struct {
	PID int
	UID int
}

// Attaching is an attachment on its way up.
type Attaching interface {
	Plan() Plan
	// Plug connects the device. It takes over d.FDs, on error too. On error nothing of the attachment is left.
	Plug(ctx context.Context, d Device) (Attachment, error)
	// Abort undoes the reservation. After a Plug, whatever came of it, it does nothing.
	Abort()
	// Detached is closed when the attachment was taken away after Plug.
	Detached() <-chan struct{}
	// Leave says that the session has ended after a Plug that succeeded: an attachment of LifetimeSession goes with it, another stays. When it is the server
	// that ends, it is not called: the attachment waits for its client to resume it at the next node.
	Leave()
}
