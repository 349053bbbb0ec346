//! Stage 9: the way to the upstream: what is sent, on which connection, and whether any is sent at all.
//!
//! Knows neither callers nor tasks: [`crate::exchange`] decides what is sent, and what an answer means.

pub mod breaker;
mod frames;
pub mod head;
mod http2;
pub mod pool;
mod queue;
