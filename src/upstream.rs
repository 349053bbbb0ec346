//! Stages 8 and 9, the transport to the upstream: connection pool, HTTP/1.1 and HTTP/2, circuit breaker, and the
//! headers of requests and replies.
//!
//! Guarantees bounds on connections and waits, and says for every request whether it may have been sent. Knows
//! neither callers nor tasks: [`crate::exchange`] decides what is sent, and what a reply means.

pub mod breaker;
mod frames;
pub mod head;
mod http2;
pub mod pool;
mod wait_queue;
