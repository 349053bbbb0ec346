//! Stage 4: the whole body against the route's contract.
//!
//! A contract is a JSON Schema (2020-12, a subset) compiled at start into a checker that walks the bytes
//! once, builds no tree and gathers all violations. The bytes that were checked are the bytes that are sent.
//! Stricter than JSON Schema in one point: an integer is an optional minus and digits; `-0`, a fraction or an
//! exponent is refused.

pub mod body;
mod json;
mod schema;

use std::{borrow::Cow, collections::HashSet, ops::Range, sync::Arc};

use bytes::Bytes;

pub use json::NotJson;
use json::{Cursor, Number, Text, Token};
pub use schema::SchemaError;
use schema::{Members, Node, Scalar, Schema};

/// So many violations are listed; all are counted.
const MAX_LISTED: usize = 100;

/// A compiled contract.
#[derive(Debug)]
pub struct Contract(Schema);

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
    /// The keyword of the contract.
    pub code: &'static str,
    /// What is wanted.
    pub detail: String,
}

/// A body that keeps its contract. Proof type: only this module makes one.
#[derive(Clone, Debug)]
pub struct CheckedBody {
    bytes: Bytes,
    members: Arc<[schema::AuditMember]>,
    captured: Vec<(usize, Range<usize>)>,
}

impl CheckedBody {
    /// The caller's bytes, untouched.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// What the contract wants in the audit trail, as JSON members with a comma in front. The values are
    /// the caller's scalars, verbatim: strict JSON has no raw control character, so that a line stays one.
    pub fn audit_members(&self, out: &mut Vec<u8>) {
        for (index, member) in self.members.iter().enumerate() {
            let mut values = self
                .captured
                .iter()
                .filter(|(i, _)| *i == index)
                .map(|(_, range)| &self.bytes[range.clone()]);
            out.extend_from_slice(format!(",\"{}\":", member.name).as_bytes());
            if member.is_list {
                out.push(b'[');
                for (i, value) in values.enumerate() {
                    if i > 0 {
                        out.push(b',');
                    }
                    out.extend_from_slice(value);
                }
                out.push(b']');
            } else {
                out.extend_from_slice(values.next().unwrap_or(b"null"));
            }
        }
    }
}

impl Contract {
    /// The contract of appointQualityTask, after the vendor's page.
    pub const APPOINT_QUALITY_TASK: &str = include_str!("../config/contracts/appointQualityTask.json");

    /// Compiles a schema; an unknown keyword is an error, since it would silently not be checked.
    pub fn compile(schema: &str) -> Result<Self, SchemaError> {
        Schema::compile(schema).map(Self)
    }

    /// Checks a body.
    pub fn check(&self, body: Bytes) -> Result<CheckedBody, Fault> {
        let mut walk = Walk {
            schema: &self.0,
            cursor: Cursor::new(&body).map_err(Fault::NotJson)?,
            path: Vec::new(),
            keys: Vec::new(),
            captured: Vec::new(),
            violations: Violations::default(),
        };
        walk.value(Some(self.0.root), None).and_then(|_| walk.cursor.end()).map_err(Fault::NotJson)?;
        let Walk { captured, violations, .. } = walk;
        if violations.total > 0 {
            return Err(Fault::Violations(violations));
        }
        let members = self.0.audit.clone();
        Ok(CheckedBody { bytes: body, members, captured })
    }
}

/// One walk over a body.
struct Walk<'a> {
    schema: &'a Schema,
    cursor: Cursor<'a>,
    path: Vec<Step<'a>>,
    /// The keys of all open objects; each object knows where its own begin.
    keys: Vec<Text<'a>>,
    captured: Vec<(usize, Range<usize>)>,
    violations: Violations,
}

enum Step<'a> {
    Key(Text<'a>),
    Index(usize),
}

/// A value of an item's member, for `x-uniqueBy`.
#[derive(PartialEq, Eq, Hash)]
enum Identity<'a> {
    Text(Cow<'a, str>),
    Literal(&'a str),
}

impl<'a> Walk<'a> {
    /// Walks one value. Returns the identity of the member `noted`, if the value is an object that has it.
    fn value(&mut self, node: Option<usize>, noted: Option<&str>) -> Result<Option<Identity<'a>>, NotJson> {
        let start = self.cursor.skip_space();
        let token = self.cursor.token()?;
        let rule = node.map(|node| &self.schema.nodes[node]);
        match token {
            Token::Object => {
                let members = self.container(rule, schema::OBJECT).and_then(|rule| rule.members.as_ref());
                return self.object(members, noted);
            }
            Token::Array => {
                let rule = self.container(rule, schema::ARRAY);
                self.array(rule)?;
            }
            Token::Null | Token::Boolean(_) | Token::Number(_) | Token::Text(_) => {
                if let Some(rule) = rule {
                    self.scalar(rule, &token, start..self.cursor.position());
                }
            }
        }
        Ok(None)
    }

    /// The rule for a container of this type, if it may be one.
    fn container<'r>(&mut self, rule: Option<&'r Node>, kind: u8) -> Option<&'r Node> {
        let rule = rule?;
        if let Some(code) = rule.refuses_container(kind) {
            self.violation(code, format!("must be {}", self.schema.wanted(rule)));
            return None;
        }
        Some(rule)
    }

    fn object(
        &mut self,
        members: Option<&Members>,
        noted: Option<&str>,
    ) -> Result<Option<Identity<'a>>, NotJson> {
        let first_key = self.keys.len();
        let (mut seen, mut identity) = (0_u128, None);
        let mut many = HashSet::new();
        let mut more = self.cursor.open(b'}')?;
        while more {
            let key = self.cursor.key()?;
            if self.is_repeated(&key, first_key, &mut many) {
                return Err(self.cursor.fault_at(key.start(), "a key stands twice in one object"));
            }
            let found = members.and_then(|members| members.find(&key));
            self.path.push(Step::Key(key.clone()));
            if let Some(index) = found {
                seen |= 1 << index;
            } else if members.is_some_and(|members| !members.additional) {
                let detail = format!("unknown key `{}`", key.shown());
                self.violation("additionalProperties", detail);
            }
            let is_noted = noted.is_some_and(|noted| key.is(noted));
            let start = self.cursor.skip_space();
            let node = found.and_then(|index| members.and_then(|members| members.list[index].node));
            self.value(node, None)?;
            if is_noted {
                identity = Some(self.identity(start..self.cursor.position()));
            }
            self.path.pop();
            self.keys.push(key);
            more = self.cursor.next(b'}')?;
        }
        self.keys.truncate(first_key);
        if let Some(members) = members {
            for (index, member) in members.list.iter().enumerate() {
                if member.required && seen & (1 << index) == 0 {
                    let detail = format!("`{}` is missing", member.name);
                    let pointer = format!("{}/{}", self.pointer(), escape(&member.name));
                    self.violation_at(pointer, "required", detail);
                }
            }
        }
        Ok(identity)
    }

    /// A few keys are compared one by one; many go into a set, so that a hostile object costs no square.
    fn is_repeated(&self, key: &Text<'a>, first: usize, many: &mut HashSet<Cow<'a, str>>) -> bool {
        let keys = &self.keys[first..];
        if keys.len() < 16 {
            return keys.iter().any(|other| other.same(key));
        }
        if many.is_empty() {
            many.extend(keys.iter().map(Text::decoded));
        }
        !many.insert(key.decoded())
    }

    fn identity(&self, range: Range<usize>) -> Identity<'a> {
        let raw = self.cursor.text(range);
        match raw.strip_prefix('"') {
            Some(_) => Identity::Text(json::decode(raw)),
            None => Identity::Literal(raw),
        }
    }

    fn array(&mut self, rule: Option<&Node>) -> Result<(), NotJson> {
        let unique_by = rule.and_then(|rule| rule.unique_by.as_deref());
        let mut identities = HashSet::new();
        let mut count = 0;
        let mut more = self.cursor.open(b']')?;
        while more {
            self.path.push(Step::Index(count));
            let identity = self.value(rule.and_then(|rule| rule.items), unique_by)?;
            if let (Some(name), Some(identity)) = (unique_by, identity)
                && !identities.insert(identity)
            {
                let pointer = format!("{}/{}", self.pointer(), escape(name));
                self.violation_at(pointer, "x-uniqueBy", format!("another item has the same `{name}`"));
            }
            self.path.pop();
            count += 1;
            more = self.cursor.next(b']')?;
        }
        if let Some(rule) = rule {
            if count < rule.min_items {
                self.violation("minItems", format!("must have at least {} items", rule.min_items));
            }
            if count > rule.max_items {
                self.violation("maxItems", format!("must have at most {} items", rule.max_items));
            }
        }
        Ok(())
    }

    fn scalar(&mut self, rule: &Node, token: &Token<'a>, range: Range<usize>) {
        if let Some(code) = self.schema.refuses_scalar(rule, token) {
            self.violation(code, format!("must be {}", self.schema.wanted(rule)));
        } else if let Some(member) = rule.audit {
            self.captured.push((member, range));
        }
    }

    fn violation(&mut self, code: &'static str, detail: String) {
        self.violation_at(self.pointer(), code, detail);
    }

    fn violation_at(&mut self, pointer: String, code: &'static str, detail: String) {
        self.violations.total += 1;
        if self.violations.list.len() < MAX_LISTED {
            self.violations.list.push(Violation { pointer, code, detail });
        }
    }

    fn pointer(&self) -> String {
        let steps = self.path.iter().map(|step| match step {
            Step::Key(key) => format!("/{}", escape(&key.shown())),
            Step::Index(index) => format!("/{index}"),
        });
        steps.collect()
    }
}

/// A key as a step of a JSON Pointer (RFC 6901 §3).
fn escape(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}

impl Schema {
    /// The keyword that refuses a scalar, if one does.
    fn refuses_scalar(&self, rule: &Node, token: &Token<'_>) -> Option<&'static str> {
        if !rule.any_of.is_empty()
            && rule.any_of.iter().all(|node| self.refuses_scalar(&self.nodes[*node], token).is_some())
        {
            return Some("anyOf");
        }
        if rule.types & kinds(token) == 0 {
            return Some("type");
        }
        if rule.constant.as_ref().is_some_and(|constant| !equals(constant, token)) {
            return Some("const");
        }
        if rule.enumeration.as_ref().is_some_and(|list| !list.iter().any(|item| equals(item, token))) {
            return Some("enum");
        }
        match token {
            Token::Text(text) => rule.refuses_text(text),
            Token::Number(number) => rule.refuses_number(number),
            Token::Null | Token::Boolean(_) | Token::Object | Token::Array => None,
        }
    }
}

impl Node {
    fn refuses_container(&self, kind: u8) -> Option<&'static str> {
        if self.types & kind == 0 {
            Some("type")
        } else if !self.any_of.is_empty() {
            Some("anyOf")
        } else if self.constant.is_some() {
            Some("const")
        } else if self.enumeration.is_some() {
            Some("enum")
        } else {
            None
        }
    }

    fn refuses_text(&self, text: &Text<'_>) -> Option<&'static str> {
        if self.min_length > 0 || self.max_length < usize::MAX {
            let length = text.decoded().chars().count();
            if length < self.min_length {
                return Some("minLength");
            }
            if length > self.max_length {
                return Some("maxLength");
            }
        }
        let pattern = self.pattern.as_ref()?;
        (!pattern.is_match(&text.decoded())).then_some("pattern")
    }

    fn refuses_number(&self, number: &Number<'_>) -> Option<&'static str> {
        if self.minimum.as_ref().is_some_and(|minimum| number.compare(&minimum.number()).is_lt()) {
            return Some("minimum");
        }
        if self.maximum.as_ref().is_some_and(|maximum| number.compare(&maximum.number()).is_gt()) {
            return Some("maximum");
        }
        None
    }
}

fn kinds(token: &Token<'_>) -> u8 {
    match token {
        Token::Null => schema::NULL,
        Token::Boolean(_) => schema::BOOLEAN,
        Token::Number(number) if number.is_integer() => schema::INTEGER | schema::NUMBER,
        Token::Number(_) => schema::NUMBER,
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
        (Scalar::Text(a), Token::Text(b)) => b.is(a),
        _ => false,
    }
}
