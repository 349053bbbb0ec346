//! Stages 8 and 9, the transport to the upstream: connection pool, HTTP/1.1 and HTTP/2, circuit breaker, and the
//! headers of requests and replies.
//!
//! It bounds connections and waits, and tells for every request whether it may have been sent. It does not know who
//! calls or what a request asks for: [`crate::exchange`] decides what is sent, and what a reply means.

pub mod breaker;
mod frames;
pub mod head;
mod http2;
pub mod pool;
mod wait_queue;
