// Package store keeps the records of address pools where they outlive the process: [Bolt] in a file of this host.
//
// # Theory of operation
//
// A pool is a bucket inside the bucket that New is given, an address its key, the record JSON. A change is one transaction that compares the version first; versions come from the
// outer bucket's sequence, which only ever grows, so that none is used twice, not even after a record was deleted or the process restarted.
//
// Writers that come at the same time share one transaction and its fsync (bbolt.DB.Batch): five hundred leases at once cost a few, not five hundred.
//
// # Ownership
//
// The database is the caller's, who opens and closes it and may keep other buckets in it.
//
// # Concurrency
//
// Bolt is safe for concurrent use. Its calls block on the disk; ctx is looked at before a transaction begins.
//
// # References
//
// ipam.Store; bbolt's README ("Batch read-write transactions").
package store
