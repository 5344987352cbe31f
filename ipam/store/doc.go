// Package store keeps the records of address pools where they outlive the process: [Bolt] in a file of this host, a [File] that others may keep their records in too.
//
// # Theory of operation
//
// A pool is a bucket inside the bucket that New is given, an address its key, the record JSON. A change is one transaction that compares the version first; versions come from the
// outer bucket's sequence, which only ever grows, so that none is used twice, not even after a record was deleted or the process restarted.
//
// Writers that come while a transaction is on its way to the disk share the next one and its fsync: five hundred leases at once cost a few, not five hundred. Nobody waits for
// company, as with bbolt.DB.Batch, whose writers wait 10 ms when they are alone; a Pool, which holds its lock while it writes, is always alone.
//
// # Ownership
//
// The database is the caller's, who opens and closes it and may keep other buckets in it; who writes to them does so through the same File.
//
// # Concurrency
//
// Bolt and File are safe for concurrent use. Their calls block on the disk; ctx is looked at when the transaction begins; a change whose ctx ends later is written, and says so.
//
// # References
//
// ipam.Store; bbolt's README ("Batch read-write transactions", for comparison).
package store
