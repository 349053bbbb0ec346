//! Stage 4: the whole body against the route's contract.
//!
//! A contract is a JSON Schema (2020-12, a subset) compiled at start into a table. The check walks the bytes
//! once and builds no tree. A body that breaks it is walked a second time, by the same rules, to gather all
//! violations; a body that is not strict JSON is told so instead, wherever the fault stands. Stricter than JSON
//! Schema in two points: an integer is an optional minus and digits; `-0`, a fraction or an exponent is refused. And where
//! a contract says `x-refuseRounded`, an id that is a bare number is refused if a client may have rounded it.
//! The bytes that were checked are the bytes that are sent.

pub mod body;
mod pattern;
mod rounded;
mod schema;
mod seen;

use std::{
    borrow::Cow,
    hash::{Hash, Hasher},
    ops::Range,
    sync::Arc,
};

use bytes::Bytes;
use smallvec::SmallVec;

pub use crate::json::NotJson;
use crate::json::{self, Begins, Cursor, Halt, Number, Token, check_encoding};
use crate::plain;
use crate::{
    config::BareIds,
    keyed_hash::{Mark, hidden},
    model::redaction::Shown,
};

pub use self::schema::SchemaError;
use self::{
    schema::{AuditMember, Limit, Member, Members, Node, Scalar, Schema, UniqueBy},
    seen::Seen,
};

/// So many violations are listed; all are counted.
const MAX_LISTED: usize = 100;

/// The code of an id that a client may have rounded.
pub const MAY_BE_ROUNDED: &str = "number_may_be_rounded";

/// The code of an id that is a bare number, from a caller of which none are taken.
pub const MUST_BE_STRING: &str = "number_must_be_string";

const TWICE: &str = "this key stands twice in the object";

/// A compiled contract.
#[derive(Debug)]
pub struct Contract(Schema);

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

/// What breaks the contract.
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

/// The scalars for the audit trail. Three inspectors with their counts need no allocation; room for more would be paid by
/// every request's future.
type Captured = SmallVec<[AuditScalar; 9]>;

/// A scalar for the audit trail, or that an item of a list has none.
#[derive(Clone, Copy, Debug)]
struct AuditScalar {
    /// Index of the audit member; a schema has at most 4096 nodes.
    member: u16,
    /// In bytes; 0 if there is no scalar, [`u16::MAX`] if it is longer than fits.
    length: u16,
    start: u32,
}

impl AuditScalar {
    fn new(member: usize, place: Range<usize>) -> Self {
        let length = u16::try_from(place.len()).unwrap_or(u16::MAX);
        Self { member: member as u16, length, start: place.start as u32 }
    }

    fn is_of(self, member: usize) -> bool {
        usize::from(self.member) == member
    }

    /// The scalar's literal; empty if there is none.
    fn literal(self, body: &[u8]) -> &[u8] {
        let start = self.start as usize;
        let length = if self.length == u16::MAX { length_at(start, body) } else { usize::from(self.length) };
        body.get(start..start + length).unwrap_or_default()
    }
}

/// Whether it is a number whose magnitude no double has. The least has five characters, 1e309.
fn is_beyond_a_double(literal: &[u8]) -> bool {
    let may_be = literal.len() >= 5 && matches!(literal[0], b'-' | b'0'..=b'9');
    may_be && str::from_utf8(literal).is_ok_and(|text| text.parse().is_ok_and(f64::is_infinite))
}

/// How long a value is that was read once already.
#[cold]
fn length_at(start: usize, body: &[u8]) -> usize {
    let mut cursor = Cursor::new(body.get(start..).unwrap_or_default());
    cursor.skip_value().map_or(0, |()| cursor.position())
}

impl CheckedBody {
    /// The caller's bytes, untouched.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// What the contract wants in the audit trail, as JSON members with a comma in front of each. A member that stands in
    /// the items of an array is a list with one value for each item, so that lists of the same items match by
    /// position. What is absent is `null`. The values are the caller's scalars, verbatim but for characters that may be taken
    /// for something else: strict JSON has no raw control character, so that a line stays one. A number beyond a double is a
    /// string, since many readers refuse a line that has one (RFC 8259, section 6). What is to be hidden is left out, or written
    /// as its `mark`.
    pub fn audit_members(&self, mark: &dyn Fn(&[&[u8]]) -> Mark, out: &mut Vec<u8>) {
        let (from, captured) = (out.len(), &self.captured[..]);
        for (index, member) in self.members.iter().enumerate() {
            if member.shown == Shown::Omit {
                continue;
            }
            out.extend_from_slice(member.opening.as_bytes());
            let before = out.len();
            for scalar in captured.iter().filter(|scalar| scalar.is_of(index)) {
                if out.len() > before {
                    out.push(b',');
                }
                let literal = scalar.literal(&self.bytes);
                match member.shown {
                    _ if literal.is_empty() => out.extend_from_slice(b"null"),
                    Shown::Clear | Shown::Omit if is_beyond_a_double(literal) => {
                        out.extend_from_slice(&[b"\"", literal, b"\""].concat());
                    }
                    Shown::Clear | Shown::Omit => out.extend_from_slice(literal),
                    Shown::Hmac => {
                        let hidden = hidden(mark(&[b"field", member.name.as_bytes(), literal]));
                        out.extend_from_slice(format!("\"{hidden}\"").as_bytes());
                    }
                }
                if !member.is_list {
                    break;
                }
            }
            if member.is_list {
                out.push(b']');
            } else if out.len() == before {
                out.extend_from_slice(b"null");
            }
        }
        if !self.is_plain {
            plain::escape(out, from);
        }
    }
}

impl Contract {
    /// The contract of appointQualityTask, after the vendor's page.
    pub const APPOINT_QUALITY_TASK: &str = include_str!("../config/contracts/appointQualityTask.json");

    /// Compiles a schema. A keyword that is not known is an error, since it would silently not be checked; so
    /// is a key that stands twice, since one of the two would be.
    pub fn compile(schema: &str) -> Result<Self, SchemaError> {
        match is_strict_json(schema.as_bytes()) {
            Ok(()) => Schema::compile(schema).map(Self),
            Err(error) => Err(SchemaError { pointer: "#".into(), reason: error.to_string() }),
        }
    }

    /// What it wants in the audit trail.
    pub fn audit_names(&self) -> impl Iterator<Item = &str> {
        self.0.audit.iter().map(|member| member.name.as_str())
    }

    /// Decides how each of that is written.
    #[must_use]
    pub fn shown(mut self, shown: impl Fn(&str) -> Shown) -> Self {
        let members = self.0.audit.iter().cloned();
        self.0.audit = members.map(|member| AuditMember { shown: shown(&member.name), ..member }).collect();
        self
    }

    /// Checks a body. `bare_ids` says which ids its caller may send as bare numbers.
    pub fn check(&self, body: Bytes, bare_ids: BareIds) -> Checked {
        match Walk::over(&body, &self.0.nodes, Some(self.0.root), bare_ids, Verdict) {
            Ok(Walked { is_plain, captured, large_ids, findings: Verdict }) => {
                let checked = CheckedBody { members: self.0.audit.clone(), captured, is_plain, bytes: body };
                Checked { result: Ok(checked), large_ids }
            }
            Err(Stop::NotJson(fault)) => Checked { result: Err(Fault::NotJson(fault)), large_ids: 0 },
            Err(Stop::Broken) => match self.gather(&body, bare_ids) {
                Ok((violations, large_ids)) => {
                    Checked { result: Err(Fault::Violations(violations)), large_ids }
                }
                Err(fault) => Checked { result: Err(Fault::NotJson(fault)), large_ids: 0 },
            },
        }
    }

    /// All that breaks the contract in a body; nothing, if [`Contract::check`] takes it.
    pub fn violations(&self, body: &[u8], bare_ids: BareIds) -> Result<Violations, NotJson> {
        self.gather(body, bare_ids).map(|(violations, _)| violations)
    }

    /// All violations of a body, and how many large ids in it are bare numbers.
    #[cold]
    fn gather(&self, body: &[u8], bare_ids: BareIds) -> Result<(Violations, usize), NotJson> {
        let gathered = Gathered { path: Vec::new(), violations: Violations::default() };
        match Walk::over(body, &self.0.nodes, Some(self.0.root), bare_ids, gathered) {
            Ok(walked) => Ok((walked.findings.violations, walked.large_ids)),
            Err(Stop::NotJson(fault)) => Err(fault),
            Err(Stop::Broken) => Ok(Default::default()), // this kind of walk goes on
        }
    }
}

/// Walks a document without a contract.
pub(crate) fn is_strict_json(document: &[u8]) -> Result<(), NotJson> {
    match Walk::over(document, &[], None, BareIds::Exact, Verdict) {
        Ok(_) | Err(Stop::Broken) => Ok(()), // without a contract nothing is broken
        Err(Stop::NotJson(fault)) => Err(fault),
    }
}

/// One walk over a body. All rules are here; what becomes of a violation is the findings' matter.
struct Walk<'a, F> {
    nodes: &'a [Node],
    cursor: Cursor<'a>,
    bare_ids: BareIds,
    captured: Captured,
    large_ids: usize,
    /// Of the present item, if it must differ from the others.
    identity: Option<Identity<'a>>,
    findings: F,
}

/// What a walk that came to the end of its document noted.
struct Walked<F> {
    is_plain: bool,
    captured: Captured,
    large_ids: usize,
    findings: F,
}

/// The member that is meant, and what is wanted.
type Told = (Option<String>, String);

/// What becomes of violations.
trait Findings<'a> {
    /// The walk goes down to a member of the contract, or to an item.
    fn enter(&mut self, step: Step<'a>);

    /// And up again.
    fn leave(&mut self);

    /// A violation at the present place, or at the member that is told together with the detail.
    fn note(&mut self, code: &'static str, told: impl FnOnce() -> Told) -> Result<(), Halt>;
}

/// Ends the walk at the first one: the body is refused.
struct Verdict;

/// Goes on and tells of all.
struct Gathered<'a> {
    /// Names of the contract and indices only: below an unknown key nothing is checked.
    path: Vec<Step<'a>>,
    violations: Violations,
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Key(&'a str),
    Index(usize),
}

/// Why a walk ended early.
enum Stop {
    NotJson(NotJson),
    Broken,
}

/// A value of an item's member, for `x-uniqueBy`.
#[derive(PartialEq, Eq)]
enum Identity<'a> {
    Text(Cow<'a, [u8]>),
    Literal(&'a [u8]),
}

impl Hash for Identity<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(match self {
            Self::Text(text) => text,
            Self::Literal(literal) => literal,
        });
    }
}

/// What of a value is noted as an identity.
#[derive(Clone, Copy)]
enum Noted<'a> {
    Nothing,
    /// A member of it, if it is an object.
    Member(&'a UniqueBy),
    /// The value itself.
    This,
}

/// The key of an object's member.
enum Key<'a> {
    /// Of the contract, with its index.
    Known(usize, &'a Member),
    Other(Cow<'a, [u8]>),
}

impl<'a, F: Findings<'a>> Walk<'a, F> {
    fn over(
        document: &'a [u8],
        nodes: &'a [Node],
        root: Option<usize>,
        bare_ids: BareIds,
        findings: F,
    ) -> Result<Walked<F>, Stop> {
        let is_plain = check_encoding(document).map_err(Stop::NotJson)?;
        let cursor = Cursor::new(document);
        let captured = Captured::new();
        let mut walk = Walk { nodes, cursor, bare_ids, captured, large_ids: 0, identity: None, findings };
        match walk.whole(root) {
            Ok(()) => {
                let Walk { captured, large_ids, findings, .. } = walk;
                Ok(Walked { is_plain, captured, large_ids, findings })
            }
            Err(Halt) => Err(walk.cursor.fault().map_or(Stop::Broken, Stop::NotJson)),
        }
    }

    fn whole(&mut self, root: Option<usize>) -> Result<(), Halt> {
        self.cursor.skip_space();
        self.value(root, Noted::Nothing)?;
        self.cursor.end()
    }

    /// Walks the value that begins here; without a node only its syntax is checked.
    #[inline(always)]
    fn value(&mut self, node: Option<usize>, noted: Noted<'a>) -> Result<(), Halt> {
        let rule = node.map(|node| &self.nodes[node]);
        let start = self.cursor.position();
        // A branch for each, so that the rule is looked at with the kind known.
        match self.cursor.begins()? {
            Begins::Text => {
                let text = self.cursor.string()?;
                self.scalar(rule, start, noted, Token::Text(text))
            }
            Begins::Number => {
                let number = self.cursor.number()?;
                self.scalar(rule, start, noted, Token::Number(number))
            }
            Begins::Word => {
                let token = self.cursor.word()?;
                self.scalar(rule, start, noted, token)
            }
            Begins::Object | Begins::Array => self.container(rule, start, noted),
        }
    }

    /// Not inlined, so that only what nests pays for a call.
    #[inline(never)]
    fn container(&mut self, rule: Option<&'a Node>, start: usize, noted: Noted<'a>) -> Result<(), Halt> {
        if let Begins::Object = self.cursor.begins()? {
            let members = self.kept(rule, &Token::Object)?.and_then(|rule| rule.members.as_ref());
            self.object(members, if let Noted::Member(member) = noted { Some(member) } else { None })?;
        } else {
            let rule = self.kept(rule, &Token::Array)?;
            self.array(rule)?;
        }
        self.note_literal(start, noted);
        Ok(())
    }

    #[inline(always)]
    fn scalar(
        &mut self,
        rule: Option<&'a Node>,
        start: usize,
        noted: Noted<'a>,
        token: Token<'a>,
    ) -> Result<(), Halt> {
        if let Some(member) = self.kept(rule, &token)?.and_then(|rule| rule.audit) {
            self.captured.push(AuditScalar::new(member, start..self.cursor.position()));
        }
        match (noted, token) {
            (Noted::This, Token::Text(text)) => self.identity = Some(Identity::Text(text.decoded())),
            _ => self.note_literal(start, noted),
        }
        Ok(())
    }

    #[inline(always)]
    fn note_literal(&mut self, start: usize, noted: Noted<'a>) {
        if let Noted::This = noted {
            self.identity = Some(Identity::Literal(self.cursor.since(start)));
        }
    }

    fn object(&mut self, members: Option<&'a Members>, noted: Option<&'a UniqueBy>) -> Result<(), Halt> {
        let (mut seen, mut others, mut expected) = (0_u128, None, 0);
        let mut more = self.cursor.open(b'}')?;
        while more {
            let offset = self.cursor.skip_space();
            match self.key(members, expected)? {
                Key::Known(index, member) => {
                    if seen & member.bit != 0 {
                        return Err(self.cursor.halt_at(offset, TWICE));
                    }
                    (seen, expected) = (seen | member.bit, index + 1);
                    let is_noted = noted.is_some_and(|noted| noted.index == index);
                    self.cursor.skip_space();
                    self.findings.enter(Step::Key(&member.name));
                    self.value(member.node, if is_noted { Noted::This } else { Noted::Nothing })?;
                    self.findings.leave();
                }
                Key::Other(name) => {
                    if members.is_some_and(|members| !members.additional) {
                        self.unknown(&name)?;
                    }
                    let is_noted = noted.is_some_and(|noted| noted.name.as_bytes() == &*name);
                    if !others.get_or_insert_with(Seen::new).insert(name) {
                        return Err(self.cursor.halt_at(offset, TWICE));
                    }
                    self.cursor.skip_space();
                    self.value(None, if is_noted { Noted::This } else { Noted::Nothing })?;
                }
            }
            more = self.cursor.next(b'}')?;
        }
        match members {
            Some(members) if members.required & !seen != 0 => self.missing(members, seen),
            _ => Ok(()),
        }
    }

    #[cold]
    fn missing(&mut self, members: &Members, seen: u128) -> Result<(), Halt> {
        let missing = members.list.iter().filter(|member| member.required && seen & member.bit == 0);
        for Member { name, .. } in missing {
            self.findings.note("required", || (Some(name.clone()), format!("`{name}` is missing")))?;
        }
        Ok(())
    }

    /// Reads a key and its colon. Most callers write the members in the order of the contract: the next one
    /// is tried first.
    #[inline(always)]
    fn key(&mut self, members: Option<&'a Members>, expected: usize) -> Result<Key<'a>, Halt> {
        let next = members.and_then(|members| members.list.get(expected));
        if let Some(member) = next.filter(|member| self.cursor.skip_key(&member.literal)) {
            return Ok(Key::Known(expected, member));
        }
        let name = self.cursor.key()?.decoded();
        self.cursor.colon()?;
        let found = members.and_then(|members| members.find(&name));
        Ok(found.map_or(Key::Other(name), |(index, member)| Key::Known(index, member)))
    }

    #[cold]
    fn unknown(&mut self, name: &[u8]) -> Result<(), Halt> {
        self.findings.note("additionalProperties", || {
            let shown = json::shown(name);
            let detail = format!("unknown key `{shown}`");
            (Some(shown), detail)
        })
    }

    fn array(&mut self, rule: Option<&'a Node>) -> Result<(), Halt> {
        let unique_by = rule.and_then(|rule| rule.unique_by.as_ref());
        let (items, mut identities, mut count) = (rule.and_then(|rule| rule.items), Seen::new(), 0);
        let outer = self.identity.take();
        let mut more = self.cursor.open(b']')?;
        while more {
            self.cursor.skip_space();
            self.findings.enter(Step::Index(count));
            let captured = self.captured.len();
            self.value(items, unique_by.map_or(Noted::Nothing, Noted::Member))?;
            if let Some(rule) = rule.filter(|rule| rule.max_items.is_none_or(|most| count < most)) {
                self.note_absent(rule, captured); // of too many items nothing is recorded: they cost no memory
            }
            if let (Some(UniqueBy { name, .. }), Some(identity)) = (unique_by, self.identity.take())
                && !identities.insert(identity)
            {
                let detail = || {
                    (
                        Some(name.clone()),
                        format!("an earlier item has the same `{name}`; each must have its own"),
                    )
                };
                self.findings.note("x-uniqueBy", detail)?;
            }
            self.findings.leave();
            count += 1;
            more = self.cursor.next(b']')?;
        }
        self.identity = outer;
        let Some(rule) = rule else { return Ok(()) };
        if let Some(least) = rule.min_items.filter(|least| count < *least) {
            self.findings.note("minItems", || (None, format!("must have {least} or more items")))?;
        }
        if let Some(most) = rule.max_items.filter(|most| count > *most) {
            self.findings.note("maxItems", || (None, format!("must have {most} or fewer items")))?;
        }
        Ok(())
    }

    /// Notes which scalars for the audit trail an item does not have. `captured` is how many there were before it.
    #[inline(always)]
    fn note_absent(&mut self, list: &Node, captured: usize) {
        let found = self.captured[captured..].iter().map(|scalar| usize::from(scalar.member));
        if found.eq(list.audited.iter().copied()) {
            return; // the usual case: all, in the order of the contract
        }
        for member in &list.audited {
            if !self.captured[captured..].iter().any(|scalar| scalar.is_of(*member)) {
                self.captured.push(AuditScalar::new(*member, 0..0));
            }
        }
    }

    /// The rule, if the value by itself keeps it: of what is no such thing, no parts are checked.
    #[inline(always)]
    fn kept(&mut self, rule: Option<&'a Node>, token: &Token<'_>) -> Result<Option<&'a Node>, Halt> {
        let Some(rule) = rule else { return Ok(None) };
        let (nodes, findings, mut is_kept) = (self.nodes, &mut self.findings, true);
        rule.broken(nodes, token, &mut |code| {
            is_kept = false;
            findings.note(code, || (None, format!("must be {}", rule.wanted(nodes, code))))
        })?;
        if rule.has_ids
            && let Token::Number(number) = token
            && is_kept
        {
            is_kept = self.bare_id(rule, number)?;
        }
        Ok(is_kept.then_some(rule))
    }

    /// Whether a bare number may stand where a contract takes ids.
    #[inline(never)]
    fn bare_id(&mut self, rule: &Node, number: &Number<'_>) -> Result<bool, Halt> {
        let is_large = rounded::is_large(number);
        if !(is_large || self.bare_ids == BareIds::Refuse) || !rule.is_id(self.nodes, number) {
            return Ok(true);
        }
        self.large_ids += usize::from(is_large);
        let (code, detail) = match self.bare_ids {
            BareIds::Detect if rounded::may_be_rounded(number) => (
                MAY_BE_ROUNDED,
                "an id above 2^53 may have lost digits in a client that holds numbers as doubles: send it as a string",
            ),
            BareIds::Refuse => {
                (MUST_BE_STRING, "must be a string: the gateway takes no id of this caller as a number")
            }
            BareIds::Detect | BareIds::Exact => return Ok(true),
        };
        self.findings.note(code, || (None, detail.to_owned()))?;
        Ok(false)
    }
}

impl<'a> Findings<'a> for Verdict {
    fn enter(&mut self, _: Step<'a>) {}

    fn leave(&mut self) {}

    fn note(&mut self, _: &'static str, _: impl FnOnce() -> Told) -> Result<(), Halt> {
        Err(Halt)
    }
}

impl<'a> Findings<'a> for Gathered<'a> {
    fn enter(&mut self, step: Step<'a>) {
        self.path.push(step);
    }

    fn leave(&mut self) {
        self.path.pop();
    }

    fn note(&mut self, code: &'static str, told: impl FnOnce() -> Told) -> Result<(), Halt> {
        self.violations.total += 1;
        if self.violations.list.len() < MAX_LISTED {
            let (member, detail) = told();
            let pointer = self.pointer(member.as_deref());
            self.violations.list.push(Violation { pointer, code, detail });
        }
        Ok(())
    }
}

impl Gathered<'_> {
    fn pointer(&self, member: Option<&str>) -> String {
        let steps = self.path.iter().map(|step| match step {
            Step::Key(key) => format!("/{}", escape(key)),
            Step::Index(index) => format!("/{index}"),
        });
        steps.chain(member.map(|member| format!("/{}", escape(member)))).collect()
    }
}

/// A key as a step of a JSON Pointer (RFC 6901 §3).
fn escape(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}

impl Node {
    /// Names every keyword that the value breaks by itself; of a wrong type nothing else is said.
    #[inline(always)]
    fn broken(
        &self,
        nodes: &[Node],
        token: &Token<'_>,
        found: &mut impl FnMut(&'static str) -> Result<(), Halt>,
    ) -> Result<(), Halt> {
        if self.types & kind(token) == 0 {
            return found("type");
        }
        let mut check = |code, keeps: bool| if keeps { Ok(()) } else { found(code) };
        if let Some(list) = &self.any_of {
            check("anyOf", list.iter().any(|node| nodes[*node].accepts(nodes, token)))?;
        }
        if let Some(value) = &self.constant {
            check("const", equals(value, token))?;
        }
        if let Some(list) = &self.enumeration {
            check("enum", list.iter().any(|value| equals(value, token)))?;
        }
        match token {
            Token::Number(number) => {
                let against = |limit: &Limit| number.compare(&limit.number());
                check("minimum", self.minimum.as_ref().is_none_or(|limit| against(limit).is_ge()))?;
                check("maximum", self.maximum.as_ref().is_none_or(|limit| against(limit).is_le()))
            }
            Token::Text(text) if self.speaks_of_text() => {
                let text = text.decoded();
                check("minLength", self.min_length.is_none_or(|least| has_chars(&text, least)))?;
                check(
                    "maxLength",
                    self.max_length.is_none_or(|most| !has_chars(&text, most.saturating_add(1))),
                )?;
                check("pattern", self.pattern.as_ref().is_none_or(|pattern| pattern.is_match(&text)))
            }
            _ => Ok(()),
        }
    }

    /// Whether an integer that is accepted here is an id: of alternatives those count that accept it.
    fn is_id(&self, nodes: &[Node], number: &Number<'_>) -> bool {
        let token = Token::Number(*number);
        let mut accepting = self.any_of.iter().flatten().map(|node| &nodes[*node]);
        number.is_integer
            && (self.is_id
                || self.has_ids
                    && accepting.all(|node| !node.accepts(nodes, &token) || node.is_id(nodes, number)))
    }

    fn accepts(&self, nodes: &[Node], token: &Token<'_>) -> bool {
        self.broken(nodes, token, &mut |_| Err(Halt)).is_ok()
    }

    fn speaks_of_text(&self) -> bool {
        self.min_length.is_some() || self.max_length.is_some() || self.pattern.is_some()
    }
}

/// Whether a text has so many characters or more. Each takes one to four bytes, so that most texts need not
/// be counted.
fn has_chars(text: &[u8], count: usize) -> bool {
    let begins_char = |byte: &&u8| **byte & 0xc0 != 0x80;
    text.len() >= count
        && (text.len().div_ceil(4) >= count || text.iter().filter(begins_char).count() >= count)
}

fn kind(token: &Token<'_>) -> u8 {
    match token {
        Token::Null => schema::NULL,
        Token::Boolean(_) => schema::BOOLEAN,
        Token::Number(number) if number.is_integer => schema::INTEGER,
        Token::Number(_) => schema::FRACTION,
        Token::Text(_) => schema::STRING,
        Token::Array => schema::ARRAY,
        Token::Object => schema::OBJECT,
    }
}

fn equals(scalar: &Scalar, token: &Token<'_>) -> bool {
    match (scalar, token) {
        (Scalar::Null, Token::Null) => true,
        (Scalar::Boolean(a), Token::Boolean(b)) => a == b,
        (Scalar::Number(a), Token::Number(b)) => b.compare(&a.number()).is_eq(),
        (Scalar::Text(a), Token::Text(b)) => *b.decoded() == *a.as_bytes(),
        _ => false,
    }
}
