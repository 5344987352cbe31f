// Package api is the contract between the node and everything that talks to it: the types, the server's routes and the client, over HTTP with JSON bodies on
// a unix socket. openapi.yaml describes it for everybody else; a test holds the two together.
//
// # Theory of operation
//
// A [Server] turns requests into calls of a [Backend], which the node implements, and errors into [Error]. A [Client] is the other end. Whoever may use the
// socket may do everything: it is 0600, and the peer's uid is checked with SO_PEERCRED, so that a socket whose mode somebody has loosened still serves its
// owner (and root) alone.
//
// # Attaching
//
// A container's device is opened by a process that is inside the container's namespaces (DESIGN.md §5), and its descriptors are handed to the node.
// HTTP has no way to carry descriptors, so this one request leaves HTTP:
//
//	client → POST /v1/networks/NET/attachments, Upgrade: patchbay-attach/1, body AttachmentSpec
//	server → 101                                   or an ordinary error, and nothing was changed
//	server → Plan                                  what to open inside, and how to configure it
//	client → Device, descriptors (SCM_RIGHTS)      or Device.Error: it was not to be had, and the reservation is undone
//	server → Event{up, Attachment}                 or Event{error}
//
// After the switch each message is one line of JSON; descriptors ride on the first byte of theirs. What follows depends on AttachmentSpec.Lifetime: an attachment
// of LifetimeNamespace lives on when the connection is closed, until it is detached or its namespace ends. One of LifetimeSession (`patchbay run`) lives as long as the
// connection. The node says Event{detached} when it is taken away meanwhile. When the node dies the client keeps the descriptors, so that the interface stays as it
// is, connects to the next node and POSTs to …/attachments/NAME/resume, which goes on like above.
//
// # Peers
//
// A [Peer] is the node on another host that a network with a VNI goes on at, or a kernel's VTEP. It is named HOST or HOST:PORT ([ParsePeer], [PeerRef]) in paths too. One that cannot be had now is kept,
// shown as [PeerWaiting] with the reason, and tried again; what can never be right is refused.
//
// # The socket
//
// [Listen] makes it 0600 from the first moment, in a directory that nobody else can write to, and replaces that of a node that has died, never that of one that lives. A node
// that is to be replaced by another gives its listener away with [Handover]; the next one's [ListenFile] takes it, so that clients see no gap. What specs must be like
// without asking a node, Validate says, for the server, the configuration file and the command line alike.
//
// # Ownership
//
// Descriptors sent are duplicates: each side closes its own. Serve owns its sessions and waits for them; the Backend owns the descriptors it was given with Plug.
//
// # Concurrency
//
// Server and Client are safe for concurrent use; a Session belongs to one goroutine, but for Close.
//
// # Limits
//
// A body is at most MaxBody bytes, a line of a session as well, and a Device has at most MaxQueues descriptors. Names are DNS labels. Every error has the format of Error but
// for what net/http answers by itself: requests that are no HTTP (400), and more than 64 KiB of header (431). How many connections the node's own user holds is not bounded but
// by the process's descriptors. In a user namespace the kernel names every uid that is not mapped 65534; a node that is itself uid 65534 there has the socket's mode alone.
//
// # References
//
// RFC 9110 §7.8 (Upgrade), unix(7) (SCM_RIGHTS, SO_PEERCRED), the Prometheus text format 0.0.4, OpenAPI 3.1.
package api
