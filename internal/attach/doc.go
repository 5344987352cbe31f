// Package attach is the client's half of attaching: what `patchbay run` does between the node, which has the networks, and the edge process, which has the
// container.
//
// # Theory of operation
//
// [Start] opens a session with the node for each network (api.Session), has the edge process open an interface for each, hands the descriptors to the node and lets the command
// start. It keeps the sessions and its own copies of the descriptors for as long as the command runs:
//
//	node          says "detached"   →  the edge process lets go of that interface, and so does this one: it is gone
//	node          dies              →  the interfaces stay as they are; this process connects to the next node, hands it the descriptors again (resume), and
//	                                    traffic goes on. Nobody in the container notices more than a pause.
//	this process  dies              →  the node sees the session end, the edge process too: the container ends
//
// A next node that does not know the attachment, because its state is another's, is asked for a new one with the same name, addresses and MAC.
//
// # Ownership and concurrency
//
// A Container owns its process, sessions and descriptors; Wait or Close gives them back. It is safe for concurrent use.
//
// # References
//
// DESIGN.md §5.
package attach
