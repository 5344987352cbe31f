// Package edge runs a command in new namespaces, with the process in between that opens the container's interfaces from inside.
package edge
