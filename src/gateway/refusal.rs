//! What the trail tells of a refused request: enough to mend it.

use http::Uri;

use super::RequestOrigin;
use crate::admission::Denied;
use crate::audit::{Detail, OpenRecord};
use crate::contract::Violation;
use crate::error::Error;
use crate::model::code::Code;
use crate::state::State;

/// So many names or violations of a refused request are on record, and so many characters of a name or path.
const MAX_DETAILS: usize = 5;
const MAX_DETAIL: usize = 128;

/// Names the caller of a request that is denied before it was asked for, so that the trail holds it against that caller and not
/// against strangers.
#[cold]
pub(super) fn name_denied(
    state: &State,
    from: &RequestOrigin<'_>,
    record: &mut OpenRecord,
    denied: Denied,
) -> Denied {
    if let Some(caller) = state.admission.who(from.peer, from.names) {
        record.caller(caller.name.clone());
    }
    denied
}

/// What the trail tells of a refusal beyond its code: enough to mend it, and of the body places only.
#[cold]
pub(super) fn detail(error: &Error, from: &RequestOrigin<'_>, target: &Uri) -> Option<Box<Detail>> {
    let cut = |text: &str| text.chars().take(MAX_DETAIL).collect::<String>();
    let detail = match error.code {
        Code::CallerDenied if from.names.is_some_and(|names| !names.is_empty()) => {
            let names = from.names.unwrap_or_default().iter().take(MAX_DETAILS).map(|name| cut(name));
            Detail { names: names.collect(), ..Detail::default() }
        }
        Code::RouteUnknown
        | Code::RouteDenied
        | Code::MethodNotAllowed
        | Code::TargetInvalid
        | Code::OperatorDenied
        | Code::Frozen => Detail { path: Some(cut(target.path())), ..Detail::default() },
        Code::ContractViolation => {
            let first = error.violations.iter().take(MAX_DETAILS);
            let errors = first.map(|Violation { pointer, code, .. }| {
                // The name of an unknown member is the caller's text: its parent's place says enough.
                let is_unknown = *code == "additionalProperties";
                let parent = pointer.rsplit_once('/').filter(|_| is_unknown).map(|(parent, _)| parent);
                (parent.unwrap_or(pointer).to_owned(), *code)
            });
            let errors = errors.collect();
            Detail { errors, ..Detail::default() }
        }
        _ => return None,
    };
    Some(Box::new(detail))
}
