//! What a reply may be.

/// A reply may have this much head, in bytes; hyper's own bound is far higher.
pub const MAX_HEAD: usize = 64 * 1024;

/// A reply over HTTP/1.1 may have so many header fields. Over HTTP/2 only their size counts.
pub const MAX_FIELDS: usize = 256;
