//! A gateway that lets internal apps call CCSQM without holding a credential.

pub mod admission;
pub mod outcome;
pub mod error;
pub mod metrics;
pub mod config;
