//! Stage 2: routing and authorisation. Which route, and may this caller use it as this operator.
//!
//! A route is found by the exact bytes of its path: no decoding, no normalising, no prefix. A request that matches no route is
//! refused, never forwarded.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;
use http::{HeaderValue, Method, Uri};
use thiserror::Error;

use crate::admission::{Admitted, Caller};
use crate::model::index::CredentialIndex;
use crate::request_head::Inbound;

/// The rules of a route's use: by whom, with which credential.
#[derive(Debug)]
pub struct AccessRule {
    /// The route's name in the configuration, the audit trail and the metrics.
    pub name: Arc<str>,
    /// The path of its requests, the same for callers and upstream.
    pub path: String,
    /// Whether all its requests are refused for now.
    pub frozen: bool,
    /// The credential with which each caller may use it, by the caller's index; `None` for a caller that may not.
    pub credentials: Vec<Option<CredentialIndex>>,
}

impl AccessRule {
    /// The credential with which a caller may use the route.
    fn credential_of(&self, caller: &Caller) -> Option<CredentialIndex> {
        *self.credentials.get(caller.index.0)?
    }
}

/// A route that the caller may use, as the operator it may act as.
#[derive(Debug)]
pub struct Routed<'a, R> {
    /// The route.
    pub route: &'a R,
    /// The operator that the request acts as, for `x-UserId`.
    pub operator: &'a HeaderValue,
    /// The credential to send it with.
    pub credential: CredentialIndex,
    /// Whether the request is a dry run, so that nothing may be sent.
    pub is_dry_run: bool,
}

/// The prefix that makes a request to a route's path a dry run.
// A path, not a header: a header could be lost on the way, and the task would be assigned.
pub const DRY_RUN: &str = "/.gateway/dry-run";

/// Why no route was found, or not for this caller.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum NoRoute {
    /// The target is not a plain path.
    #[error("{0}")]
    Target(&'static str),
    /// No route has this path.
    #[error("no route has this path; you may use: {}", .0.join(", "))]
    Unknown(Vec<String>),
    /// The path is right, the method is not.
    #[error("this route takes POST only")]
    Method,
    /// The caller's `routes` do not list the route.
    #[error("this caller may not use this route; you may use: {}", .0.join(", "))]
    Denied(Vec<String>),
    /// The route is `frozen`.
    #[error("the operators of the gateway have frozen this route, so that nothing is sent on it; ask them")]
    Frozen,
    /// The operator in `x-userid` is not one of the caller's.
    #[error(
        "this caller may not act as the operator in x-userid; leave the header out, or ask the operators of the gateway to add it"
    )]
    Operator,
}

/// All routes, by exact path. `R` is what else a route consists of.
#[derive(Debug)]
pub struct Routes<R>(HashMap<String, R, RandomState>);

impl<R: AsRef<AccessRule>> FromIterator<R> for Routes<R> {
    fn from_iter<I: IntoIterator<Item = R>>(routes: I) -> Self {
        Self(routes.into_iter().map(|route| (route.as_ref().path.clone(), route)).collect())
    }
}

impl<R: AsRef<AccessRule>> Routes<R> {
    /// The routes, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = &R> {
        self.0.values()
    }

    /// Finds the route of a request, and checks that its caller may use it as the operator that it names.
    ///
    /// Fails if the target is not a plain path, if no route has it, if the method is not POST, or if route or operator are not
    /// allowed to this caller.
    pub fn find<'a>(
        &'a self,
        admitted: &Admitted<'a>,
        method: &Method,
        target: &Uri,
        head: &Inbound<'_>,
    ) -> Result<Routed<'a, R>, NoRoute> {
        let caller = admitted.caller();
        let path = plain_path(target)?;
        let dry_run = path.strip_prefix(DRY_RUN);
        let (path, is_dry_run) = (dry_run.unwrap_or(path), dry_run.is_some());
        // Both refusals name only paths that the caller may use: it learns of no other route by asking.
        let route = self.0.get(path).ok_or_else(|| NoRoute::Unknown(self.usable_by(caller)))?;
        let access = route.as_ref();
        if *method != Method::POST {
            return Err(NoRoute::Method);
        }
        let credential =
            access.credential_of(caller).ok_or_else(|| NoRoute::Denied(self.usable_by(caller)))?;
        // After the check of the caller: only a route's own callers learn that it is frozen.
        if access.frozen {
            return Err(NoRoute::Frozen);
        }
        let operator = acting_operator(caller, head)?;
        Ok(Routed { route, operator, credential, is_dry_run })
    }

    /// The paths that a caller may use, sorted.
    fn usable_by(&self, caller: &Caller) -> Vec<String> {
        let usable = self.iter().map(R::as_ref).filter(|access| access.credential_of(caller).is_some());
        let mut paths: Vec<_> = usable.map(|access| access.path.clone()).collect();
        paths.sort();
        paths
    }
}

/// The path of an origin-form target (RFC 9112, section 3.2.1) without a query. Its bytes are not changed: a path with an encoded
/// or doubled slash is another path, and so is refused.
// To decode or normalise would be a second reading of the path, and the upstream may do it differently: that is how requests get
// past rules for paths.
fn plain_path(uri: &Uri) -> Result<&str, NoRoute> {
    if uri.scheme().is_some() || uri.authority().is_some() {
        return Err(NoRoute::Target(
            "the request target is a full URL, as clients send it to a proxy; is http_proxy set? Call the gateway itself, with a path",
        ));
    }
    if uri.query().is_some() {
        return Err(NoRoute::Target(
            "the request target has a query, which no route takes; send the path alone",
        ));
    }
    Ok(uri.path())
}

/// The operator that a request acts as: the one in `x-userid`, if the caller may name it, else the caller's own.
// The configured value is returned, not the one that was sent: nothing of a caller's head is passed on.
fn acting_operator<'a>(caller: &'a Caller, head: &Inbound<'_>) -> Result<&'a HeaderValue, NoRoute> {
    let Some(named) = head.operator.first else { return Ok(&caller.operator) };
    std::iter::once(&caller.operator)
        .chain(&caller.operators)
        .find(|allowed| *allowed == named)
        .ok_or(NoRoute::Operator)
}
