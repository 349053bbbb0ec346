//! The details of a refused request in the trail: enough to correct it, and no value of its body.

use http::Uri;

use super::RequestOrigin;
use crate::admission::Denied;
use crate::audit::{Detail, OpenRecord};
use crate::contract::Violation;
use crate::error::Error;
use crate::model::code::Code;
use crate::state::State;

/// The most names or violations of a refused request that are recorded, and the most characters of a name or path.
// Both are text of a caller, perhaps of a stranger, and take room in the trail.
const MAX_DETAILS: usize = 5;
const MAX_DETAIL: usize = 128;

/// Records the caller of a request that was denied before it was looked up, and returns `denied`.
// All strangers share one budget of refusals in the trail. A known caller's refusals must not use it up, and must say whose they
// are.
#[cold]
pub(super) fn name_denied(
    state: &State,
    from: &RequestOrigin<'_>,
    record: &mut OpenRecord,
    denied: Denied,
) -> Denied {
    if let Some(caller) = state.admission.caller_of(from.peer, from.names) {
        record.caller(caller.name.clone());
    }
    denied
}

/// The details of a refusal beyond its code; `None` if the code says all. Of the body only places, never values.
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
                // The name of an unknown member is the caller's text, and may be anything. Its parent's place says enough.
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
