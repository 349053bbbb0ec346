//! Stage 4: checks the whole body against the route's contract.
//!
//! A contract is a JSON Schema (2020-12, a subset) that is compiled at start into a tree of rules. One walk checks the bytes
//! and builds no tree of the body. If it finds a violation, a second walk by the same rules lists all violations. A body that
//! is not strict JSON gets that error instead, wherever in the body the error is.
//!
//! Two points are stricter than JSON Schema. An integer is an optional minus and digits: `-0`, a fraction and an exponent are
//! refused. Where a contract says `x-refuseRounded`, an id that is a bare number is refused if a client may have rounded it.
//!
//! The bytes that were checked are the bytes that are sent.

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
use self::findings::{Gathered, Verdict};
pub use self::schema::SchemaError;
use self::schema::{AuditMember, Node};
use self::walk::{Stop, Walk, Walked};
use crate::config::BareIds;
pub use crate::json::NotJson;
use crate::model::redaction::Shown;

/// The code of an id that a client may have rounded.
pub const MAY_BE_ROUNDED: &str = "number_may_be_rounded";

/// The code of an id that is a bare number, from a caller of which none are taken.
pub const MUST_BE_STRING: &str = "number_must_be_string";

/// A compiled contract.
#[derive(Debug)]
pub struct Contract {
    root: Node,
    audit: Arc<[AuditMember]>,
}

/// What a check found.
#[derive(Debug)]
pub struct Checked {
    /// The body, or why it was refused.
    pub result: Result<CheckedBody, Fault>,
    /// How many ids in it are bare numbers of 2^53 and more, where the contract says `x-refuseRounded`.
    pub large_ids: usize,
}

/// Why a body was refused.
#[derive(Debug)]
pub enum Fault {
    /// It is not strict JSON.
    NotJson(NotJson),
    /// It breaks the contract.
    Violations(Violations),
}

/// The violations of one body.
#[derive(Debug, Default)]
pub struct Violations {
    /// The first hundred.
    pub list: Vec<Violation>,
    /// How many there are.
    pub total: usize,
}

/// One violation. Holds no value of the caller's; only an unknown key is named, cut at 64 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Where, as a plain JSON Pointer (RFC 6901).
    pub pointer: String,
    /// The keyword of the contract, [`MAY_BE_ROUNDED`] or [`MUST_BE_STRING`].
    pub code: &'static str,
    /// What is wanted.
    pub detail: String,
}

/// A body that keeps its contract. Proof type: only this module makes one.
#[derive(Clone, Debug)]
pub struct CheckedBody {
    bytes: Bytes,
    members: Arc<[AuditMember]>,
    captured: Captured,
    /// Every byte is below DEL, so that the members in the trail need no escape.
    is_plain: bool,
}

impl Contract {
    /// The contract of appointQualityTask, after the vendor's page.
    pub const APPOINT_QUALITY_TASK: &str = include_str!("../config/contracts/appointQualityTask.json");

    /// Compiles a schema. An unknown keyword is an error, since it would silently not be checked. A key that stands twice in an
    /// object is an error, since one of the two would be ignored.
    pub fn compile(schema: &str) -> Result<Self, SchemaError> {
        match is_strict_json(schema.as_bytes()) {
            Ok(()) => schema::compile(schema),
            Err(error) => Err(SchemaError { pointer: "#".into(), reason: error.to_string() }),
        }
    }

    /// The names of the members that it adds to the audit record.
    pub fn audit_names(&self) -> impl Iterator<Item = &str> {
        self.audit.iter().map(|member| member.name.as_str())
    }

    /// Decides for each of these members how its values are written.
    #[must_use]
    pub fn shown(mut self, shown: impl Fn(&str) -> Shown) -> Self {
        let members = self.audit.iter().cloned();
        self.audit = members.map(|member| AuditMember { shown: shown(&member.name), ..member }).collect();
        self
    }

    /// Checks a body. `bare_ids` says which ids its caller may send as bare numbers.
    pub fn check(&self, body: Bytes, bare_ids: BareIds) -> Checked {
        match Walk::over(&body, Some(&self.root), bare_ids, Verdict) {
            Ok(Walked { is_plain, captured, large_ids, findings: Verdict }) => {
                let checked = CheckedBody { members: self.audit.clone(), captured, is_plain, bytes: body };
                Checked { result: Ok(checked), large_ids }
            }
            Err(Stop::NotJson(fault)) => Checked { result: Err(Fault::NotJson(fault)), large_ids: 0 },
            Err(Stop::Broken) => match self.gather(&body, bare_ids) {
                Ok((found, large_ids)) => Checked { result: Err(Fault::Violations(found)), large_ids },
                Err(fault) => Checked { result: Err(Fault::NotJson(fault)), large_ids: 0 },
            },
        }
    }

    /// Lists the violations of a body; empty if [`Contract::check`] accepts it.
    pub fn violations(&self, body: &[u8], bare_ids: BareIds) -> Result<Violations, NotJson> {
        self.gather(body, bare_ids).map(|(violations, _)| violations)
    }

    /// The second walk: all violations, and how many large ids are bare numbers.
    #[cold]
    fn gather(&self, body: &[u8], bare_ids: BareIds) -> Result<(Violations, usize), NotJson> {
        match Walk::over(body, Some(&self.root), bare_ids, Gathered::default()) {
            Ok(walked) => Ok((walked.findings.violations, walked.large_ids)),
            Err(Stop::NotJson(fault)) => Err(fault),
            Err(Stop::Broken) => Ok(Default::default()), // not reached: this walk does not end at a violation
        }
    }
}

impl CheckedBody {
    /// The caller's bytes, untouched.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

/// Checks the syntax of a document only.
pub(crate) fn is_strict_json(document: &[u8]) -> Result<(), NotJson> {
    match Walk::over(document, None, BareIds::Exact, Verdict) {
        Ok(_) | Err(Stop::Broken) => Ok(()), // not reached: without a contract there is no violation
        Err(Stop::NotJson(fault)) => Err(fault),
    }
}
