//! The part of a route that an exchange needs.
//!
//! It outlives a reload that removes the route: an exchange keeps the one with which it began.

use std::sync::Arc;
use std::time::Duration;

use http::Uri;

use super::Cooldown;
use crate::result_rule::ResultRule;

/// A route, as an exchange needs it.
#[derive(Debug)]
pub struct UpstreamRoute {
    /// The name in the configuration, the audit trail and the metrics.
    pub name: Arc<str>,
    /// The path, as the target of the upstream request.
    pub target: Uri,
    /// The rule that finds the outcome of a reply.
    pub result: ResultRule,
    /// The longest time of a whole exchange, replay included.
    pub timeout: Duration,
    /// The cool-downs of refused tokens on this route, by [`CredentialIndex`](crate::model::index::CredentialIndex).
    // Shared with the route of the same name after a reload: a reload must not start the fetches of refused tokens anew.
    pub cooldowns: Vec<Arc<Cooldown>>,
}
