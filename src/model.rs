//! The words that the rest of the gateway speaks in: plain data without I/O, which imports nothing but tools.
//!
//! An enum here has `as_str`, the word of the wire, and `ALL`, in the order of the documentation.

pub mod audit_fields; // the members of the trail's records
pub mod cause; // why a step on the way to the cloud failed
pub mod code; // why the gateway itself answered
pub mod durability; // when a record is safe
pub mod header_names; // which header fields mean something
pub mod index; // places in the lists of the configuration
pub mod outcome; // what became of the task, and what a client may do about it
pub mod peer; // the other end of a connection
pub mod redaction; // what the trail hides
pub mod reply; // what a reply may be
pub mod request_id; // the ids of requests
pub mod stage; // the steps of a request
