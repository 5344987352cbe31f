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
// # Ownership
//
// Descriptors sent are duplicates: each side closes its own.
//
// # Concurrency
//
// Server and Client are safe for concurrent use; a Session belongs to one goroutine, but for Close.
//
// # Limits
//
// A body is at most MaxBody bytes, a line of a session as well. Names are DNS labels.
//
// # References
//
// RFC 9110 §7.8 (Upgrade), unix(7) (SCM_RIGHTS, SO_PEERCRED), the Prometheus text format 0.0.4, OpenAPI 3.1.
package api
