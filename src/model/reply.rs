//! The bounds of a reply's head.

/// The largest head of a reply, in bytes.
// hyper's own bound is far higher, and each connection could take as much memory.
pub const MAX_HEAD: usize = 64 * 1024;

/// The most header fields of a reply over HTTP/1.1. Over HTTP/2 only their size is bounded.
// With hyper's default of 100 a reply of 101 fields failed as a broken connection.
pub const MAX_FIELDS: usize = 256;
