//! Stage 4: JSON Schema validation of the whole request body against the route's contract.
//!
//! A contract is a JSON Schema (2020-12, a subset) that is compiled at start into a tree of rules. One walk checks the
//! bytes and builds no tree of the body. If it finds a violation, a second walk by the same rules lists all violations.
//! If the body is not strict JSON, only the first fault of its syntax is reported, even if violations come before it.
//!
//! Two points are stricter than JSON Schema. An integer is an optional minus and digits: `-0`, a fraction and an
//! exponent are refused. Where a contract says `x-refuseRounded`, integers are ids. An id that is sent as a bare number,
//! not as a string, is refused if a client may have rounded it; the caller's [`BareIds`] can change that.
//!
//! The gateway forwards exactly the bytes that it checked. It neither repairs nor rewrites a body.

pub mod body;
mod captured;
mod findings;
mod pattern;
mod rounded;
mod rules;
mod schema;
mod seen;
mod walk;

use std::sync::Arc;

use bytes::Bytes;

use self::captured::Captured;
use self::findings::{FailFast, Gathered};
pub use self::schema::BadSchema;
use self::schema::{AuditMember, Node};
use self::walk::{Interrupted, Walk, Walked};
use crate::config::BareIds;
pub use crate::json::NotJson;
use crate::model::redaction::Redaction;

/// The code of a violation: an id is a bare number that a client may have rounded (`bare_ids = "detect"`).
pub const MAY_BE_ROUNDED: &str = "number_may_be_rounded";

/// The code of a violation: an id is a bare number, and this caller must send ids as strings (`bare_ids = "refuse"`).
pub const MUST_BE_STRING: &str = "number_must_be_string";

/// A compiled contract: the rules for a body, and the members that it adds to the audit record.
#[derive(Debug)]
pub struct Contract {
    root: Node,
    // Shared, since each checked body holds the list until its record is written, and a reload may drop the contract before.
    audit: Arc<[AuditMember]>,
}

/// The result of one check.
#[derive(Debug)]
pub struct Checked {
    /// The body, or why it was refused.
    pub result: Result<CheckedBody, BodyFault>,
    /// How many ids in the body are bare numbers of 2^53 and more, at places where the contract says `x-refuseRounded`.
    // Counted in accepted bodies, too: operators learn from it which callers send ids as numbers before they refuse them.
    pub large_ids: usize,
}

/// Why a body was refused.
#[derive(Debug)]
pub enum BodyFault {
    /// It is not strict JSON.
    NotJson(NotJson),
    /// It breaks the contract.
    Violations(Violations),
}

/// The violations of one body.
#[derive(Debug, Default)]
pub struct Violations {
    /// The first hundred, in the order of the body.
    pub list: Vec<Violation>,
    /// The number of all violations, listed or not.
    pub total: usize,
}

/// One violation. It quotes no value of the body. The only text that it takes from the body is the name of an unknown key, cut
/// at 64 bytes.
// Values may be personal data, and violations are written to the audit record and to the logs of callers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The place in the body, as a JSON Pointer that is no URI fragment (RFC 6901 §3); empty for the whole body.
    pub pointer: String,
    /// The keyword of the contract that is broken, or [`MAY_BE_ROUNDED`] or [`MUST_BE_STRING`].
    pub code: &'static str,
    /// What the contract requires there, as a sentence.
    pub detail: String,
}

/// A body that satisfies its contract. A proof type: only [`Contract::check`] constructs it, and an exchange needs one.
// The fields are private, so that no other stage can forward a body that was not checked.
#[derive(Clone, Debug)]
pub struct CheckedBody {
    bytes: Bytes,
    members: Arc<[AuditMember]>,
    captured: Captured,
    /// Whether every byte is below DEL, so that the members of the audit record need no escapes.
    is_plain: bool,
}

impl Contract {
    /// The built-in contract of `appointQualityTask` as a JSON Schema, after the vendor's page of this API.
    pub const APPOINT_QUALITY_TASK: &str = include_str!("../config/contracts/appointQualityTask.json");

    /// Compiles a schema.
    ///
    /// # Errors
    ///
    /// The text is not strict JSON, a keyword is unknown, a value does not fit its keyword, or the schema is too large or
    /// recursive. The error names the place.
    pub fn compile(schema: &str) -> Result<Self, BadSchema> {
        // Before serde_json, which takes the last of two equal keys: a rule that is given twice would be dropped in silence.
        match is_strict_json(schema.as_bytes()) {
            Ok(()) => schema::compile(schema),
            Err(error) => Err(BadSchema { pointer: "#".into(), reason: error.to_string() }),
        }
    }

    /// Returns the names of the members that this contract adds to the audit record (`x-audit`).
    pub fn audit_names(&self) -> impl Iterator<Item = &str> {
        self.audit.iter().map(|member| member.name.as_str())
    }

    /// Sets how each audit member (`x-audit`) is written to the trail: in clear, as a keyed hash, or not at all. Calls
    /// `redaction` with the name of each member to learn which. Returns the changed contract.
    // Not part of `compile`: the schema belongs to the API, but what to redact belongs to the `[audit]` table of this gateway.
    #[must_use]
    pub fn redacted(mut self, redaction: impl Fn(&str) -> Redaction) -> Self {
        let members = self.audit.iter().cloned();
        self.audit =
            members.map(|member| AuditMember { redaction: redaction(&member.name), ..member }).collect();
        self
    }

    /// Checks a body. `bare_ids` says which ids its caller may send as bare numbers. Takes time linear in the size of the body.
    // Two walks, since most bodies are accepted: the first one stores no path and formats no text.
    pub fn check(&self, body: Bytes, bare_ids: BareIds) -> Checked {
        match Walk::over(&body, Some(&self.root), bare_ids, FailFast) {
            Ok(Walked { is_plain, captured, large_ids, findings: FailFast }) => {
                let checked = CheckedBody { members: self.audit.clone(), captured, is_plain, bytes: body };
                Checked { result: Ok(checked), large_ids }
            }
            Err(Interrupted::NotJson(fault)) => {
                Checked { result: Err(BodyFault::NotJson(fault)), large_ids: 0 }
            }
            // The first walk ended within the body. Only a walk to its end can tell that the rest is strict JSON.
            Err(Interrupted::Broken) => match self.gather(&body, bare_ids) {
                Ok((found, large_ids)) => Checked { result: Err(BodyFault::Violations(found)), large_ids },
                Err(fault) => Checked { result: Err(BodyFault::NotJson(fault)), large_ids: 0 },
            },
        }
    }

    /// Returns the violations of a body; none if [`Contract::check`] accepts it. For tools; requests go through
    /// `check`.
    ///
    /// # Errors
    ///
    /// The body is not strict JSON. Violations before the place of that error are not returned then.
    pub fn violations(&self, body: &[u8], bare_ids: BareIds) -> Result<Violations, NotJson> {
        self.gather(body, bare_ids).map(|(violations, _)| violations)
    }

    /// The second walk. Returns all violations, and how many large ids are bare numbers.
    #[cold]
    fn gather(&self, body: &[u8], bare_ids: BareIds) -> Result<(Violations, usize), NotJson> {
        match Walk::over(body, Some(&self.root), bare_ids, Gathered::default()) {
            Ok(walked) => Ok((walked.findings.violations, walked.large_ids)),
            Err(Interrupted::NotJson(fault)) => Err(fault),
            // Not reached: `Gathered` ends no walk at a violation.
            Err(Interrupted::Broken) => Ok(Default::default()),
        }
    }
}

impl CheckedBody {
    /// Returns the bytes as the caller sent them.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

/// Checks that a document is strict JSON in which no object has the same key twice. Checks no contract.
///
/// # Errors
///
/// The first fault, with its line and column.
pub(crate) fn is_strict_json(document: &[u8]) -> Result<(), NotJson> {
    match Walk::over(document, None, BareIds::Exact, FailFast) {
        // `Broken` is not reached: without a contract there are no violations.
        Ok(_) | Err(Interrupted::Broken) => Ok(()),
        Err(Interrupted::NotJson(fault)) => Err(fault),
    }
}
