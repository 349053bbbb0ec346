//! Metrics. Every one is moved by some test.
