// Package ca is a small certificate authority in a directory: enough to give each node of a sealed network a certificate that says which host it is and which networks it may join.
//
// # Theory of operation
//
// Init makes DIR/ca.key and DIR/ca.crt, a CA that may sign hosts and no other CA (path length 0). Issue makes DIR/HOST.key and DIR/HOST.crt. A node is given those two and ca.crt; ca.key stays
// where it is, best on no node at all. Everything is P-256 with SHA-256, all by crypto/x509.
//
// A certificate is for both roles of a handshake (server and client), names its hosts as DNS or IP SANs, and the networks it is good for as URI SANs (secure.NetworkURI). Without a network it is
// good for all: patchbay://network/*, written out, since a certificate that names none is good for none.
//
// There is no revocation list. Let certificates be short, or make another CA and issue anew.
//
// # Files
//
// Keys are readable by their owner alone (0600), the directory is made for its owner alone (0700), and one that others may write to is refused, as is a CA key that others may read. A file is
// written under another name first and then put in place whole; one that is there is never replaced unless Options.Force says so.
//
// # References
//
// RFC 5280; tunnel/secure; docs/adr/0011-sealing.md.
package ca
