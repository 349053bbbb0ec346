//! What an exchange needs to know of its route.

use std::sync::Arc;
use std::time::Duration;

use http::Uri;

use super::Cooldown;
use crate::result_rule::ResultRule;

/// A route, as an exchange sees it.
#[derive(Debug)]
pub struct Route {
    /// Its name in the configuration, the audit trail and the metrics.
    pub name: Arc<str>,
    /// Its path, as the upstream request's target.
    pub target: Uri,
    /// How a reply says what became of the task.
    pub result: ResultRule,
    /// The longest that an exchange may take.
    pub timeout: Duration,
    /// By credential: whether its refused tokens still cause fetches on this route.
    pub cooldowns: Vec<Arc<Cooldown>>,
}
