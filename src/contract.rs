//! Stage 4: the whole body against the route's contract.
//!
//! A contract is a JSON Schema (2020-12, a subset) compiled at start into a table. The check walks the bytes
//! once, builds no tree and gathers all violations; a body that is not strict JSON is told so instead, wherever
//! the fault stands. Stricter than JSON Schema in one point: an integer is an optional minus and digits; `-0`,
//! a fraction or an exponent is refused. The bytes that were checked are the bytes that are sent.

pub mod body;
mod json;
mod schema;

use std::{borrow::Cow, collections::HashSet, ops::Range, sync::Arc};

use bytes::Bytes;

pub use self::{json::NotJson, schema::SchemaError};
use self::{
    json::{Cursor, Text, Token},
    schema::{AuditMember, Limit, Members, Node, Scalar, Schema},
};

/// So many violations are listed; all are counted.
const MAX_LISTED: usize = 100;

/// Up to so many keys are compared one by one.
const FEW_KEYS: usize = 16;

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
    members: Arc<[AuditMember]>,
    captured: Vec<(usize, Range<usize>)>,
}

impl CheckedBody {
    /// The caller's bytes, untouched.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// What the contract wants in the audit trail, as JSON members with a comma in front of each; `null` for a
    /// single one that is absent. The values are the caller's scalars, verbatim: strict JSON has no raw control
    /// character, so that a line stays one.
    pub fn audit_members(&self, out: &mut Vec<u8>) {
        for (index, member) in self.members.iter().enumerate() {
            let values = self
                .captured
                .iter()
                .filter(|(i, _)| *i == index)
                .map(|(_, range)| &self.bytes[range.clone()]);
            let values = values.collect::<Vec<_>>().join(&b',');
            out.extend_from_slice(format!(",\"{}\":", member.name).as_bytes());
            match (member.is_list, values.is_empty()) {
                (true, _) => out.extend_from_slice(&[b"[", &values[..], b"]"].concat()),
                (false, true) => out.extend_from_slice(b"null"),
                (false, false) => out.extend_from_slice(&values),
            }
        }
    }
}

impl Contract {
    /// The contract of appointQualityTask, after the vendor's page.
    pub const APPOINT_QUALITY_TASK: &str = include_str!("../config/contracts/appointQualityTask.json");

    /// Compiles a schema. A keyword that is not known is an error, since it would silently not be checked; so
    /// is a key that stands twice, since one of the two would be.
    pub fn compile(schema: &str) -> Result<Self, SchemaError> {
        let strict = Cursor::new(schema.as_bytes()).and_then(|cursor| Walk::over(cursor, &[], None));
        match strict {
            Ok(_) => Schema::compile(schema).map(Self),
            Err(error) => Err(SchemaError { pointer: "#".into(), reason: error.to_string() }),
        }
    }

    /// Checks a body.
    pub fn check(&self, body: Bytes) -> Result<CheckedBody, Fault> {
        let Schema { nodes, root, audit } = &self.0;
        let walk = Cursor::new(&body).and_then(|cursor| Walk::over(cursor, nodes, Some(*root)));
        let (captured, violations) = walk.map_err(Fault::NotJson)?;
        if violations.total == 0 {
            return Ok(CheckedBody { bytes: body, members: Arc::clone(audit), captured });
        }
        Err(Fault::Violations(violations))
    }
}

/// Where the scalars for the audit trail stand: index of the audit member, and bytes.
type Captured = Vec<(usize, Range<usize>)>;

/// One walk over a body.
struct Walk<'a> {
    nodes: &'a [Node],
    cursor: Cursor<'a>,
    /// Names of the contract and indices only: below an unknown key nothing is checked.
    path: Vec<Step<'a>>,
    /// The keys of all open objects; each object knows where its own begin.
    keys: Vec<Text<'a>>,
    captured: Captured,
    violations: Violations,
}

enum Step<'a> {
    Key(&'a str),
    Index(usize),
}

/// A value of an item's member, for `x-uniqueBy`.
#[derive(PartialEq, Eq, Hash)]
enum Identity<'a> {
    Text(Cow<'a, str>),
    Literal(&'a str),
}

impl<'a> Walk<'a> {
    fn over(
        cursor: Cursor<'a>,
        nodes: &'a [Node],
        root: Option<usize>,
    ) -> Result<(Captured, Violations), NotJson> {
        let (path, keys, captured, violations) = Default::default();
        let mut walk = Walk { nodes, cursor, path, keys, captured, violations };
        walk.value(root, None)?;
        walk.cursor.end()?;
        Ok((walk.captured, walk.violations))
    }

    /// Walks one value; without a node only its syntax is checked. If the value is an object, returns the
    /// identity of its member `noted`.
    fn value(&mut self, node: Option<usize>, noted: Option<&str>) -> Result<Option<Identity<'a>>, NotJson> {
        let start = self.cursor.skip_space();
        let token = self.cursor.token()?;
        let rule = node.map(|node| &self.nodes[node]);
        let rule = rule.filter(|rule| self.keeps(rule, &token)); // of what is no such thing, no parts are checked
        match token {
            Token::Object => return self.object(rule.and_then(|rule| rule.members.as_ref()), noted),
            Token::Array => self.array(rule)?,
            Token::Null | Token::Boolean(_) | Token::Number(_) | Token::Text(_) => {
                let member = rule.and_then(|rule| rule.audit);
                self.captured.extend(member.map(|member| (member, start..self.cursor.position())));
            }
        }
        Ok(None)
    }

    fn object(
        &mut self,
        members: Option<&'a Members>,
        noted: Option<&str>,
    ) -> Result<Option<Identity<'a>>, NotJson> {
        let first_key = self.keys.len();
        let (mut many, mut seen, mut identity) = (HashSet::new(), 0_u128, None);
        let mut more = self.cursor.open(b'}')?;
        while more {
            let (offset, key) = self.cursor.key()?;
            if self.is_repeated(key, first_key, &mut many) {
                return Err(NotJson { offset, reason: "a key stands twice in one object" });
            }
            self.keys.push(key);
            let found = members.and_then(|members| members.list.iter().position(|m| key == *m.name));
            let start = self.cursor.skip_space();
            match (members, found) {
                (Some(members), Some(index)) => {
                    seen |= 1 << index;
                    let member = &members.list[index];
                    self.path.push(Step::Key(&member.name));
                    self.value(member.node, None)?;
                    self.path.pop();
                }
                _ => {
                    if members.is_some_and(|members| !members.additional) {
                        let detail = || format!("unknown key `{}`", key.shown());
                        self.violation("additionalProperties", Some(&key.shown()), detail);
                    }
                    self.value(None, None)?;
                }
            }
            if noted.is_some_and(|noted| key == *noted) {
                identity = Some(self.identity(start));
            }
            more = self.cursor.next(b'}')?;
        }
        self.keys.truncate(first_key);
        let wanted = members.map_or(&[][..], |members| &members.list).iter().enumerate();
        for (_, member) in wanted.filter(|(index, member)| member.required && seen & 1 << index == 0) {
            self.violation("required", Some(&member.name), || format!("`{}` is missing", member.name));
        }
        Ok(identity)
    }

    /// A few keys are compared one by one; many go into a set, so that a hostile object costs no square.
    fn is_repeated(&self, key: Text<'a>, first: usize, many: &mut HashSet<Cow<'a, str>>) -> bool {
        let keys = &self.keys[first..];
        if keys.len() < FEW_KEYS {
            return keys.iter().any(|other| other.decoded() == key.decoded());
        }
        if many.is_empty() {
            many.extend(keys.iter().map(Text::decoded));
        }
        !many.insert(key.decoded())
    }

    /// The identity of the value that has just been walked.
    fn identity(&self, start: usize) -> Identity<'a> {
        let literal = self.cursor.text(start..self.cursor.position());
        match Text::read(literal) {
            Some(text) => Identity::Text(text.decoded()),
            None => Identity::Literal(literal),
        }
    }

    fn array(&mut self, rule: Option<&'a Node>) -> Result<(), NotJson> {
        let unique_by = rule.and_then(|rule| rule.unique_by.as_deref());
        let (mut identities, mut count) = (HashSet::new(), 0);
        let mut more = self.cursor.open(b']')?;
        while more {
            self.path.push(Step::Index(count));
            let identity = self.value(rule.and_then(|rule| rule.items), unique_by)?;
            if let (Some(name), Some(identity)) = (unique_by, identity)
                && !identities.insert(identity)
            {
                self.violation("x-uniqueBy", Some(name), || format!("another item has the same `{name}`"));
            }
            self.path.pop();
            count += 1;
            more = self.cursor.next(b']')?;
        }
        let Some(rule) = rule else { return Ok(()) };
        if let Some(least) = rule.min_items.filter(|least| count < *least) {
            self.violation("minItems", None, || format!("must have {least} or more items"));
        }
        if let Some(most) = rule.max_items.filter(|most| count > *most) {
            self.violation("maxItems", None, || format!("must have {most} or fewer items"));
        }
        Ok(())
    }

    /// What a value says by itself, before its members or items; true if that keeps the rule.
    fn keeps(&mut self, rule: &Node, token: &Token<'_>) -> bool {
        let mut is_kept = true;
        let nodes = self.nodes;
        rule.broken(nodes, token, &mut |code| {
            is_kept = false;
            let wanted = || rule.wants(nodes).into_iter().find(|(keyword, _)| *keyword == code);
            self.violation(code, None, || {
                format!("must be {}", wanted().map_or_else(String::new, |(_, words)| words))
            });
        });
        is_kept
    }

    /// Notes a violation at the present place, or at a member of it.
    fn violation(&mut self, code: &'static str, member: Option<&str>, detail: impl FnOnce() -> String) {
        self.violations.total += 1;
        if self.violations.list.len() < MAX_LISTED {
            let pointer = self.pointer(member);
            self.violations.list.push(Violation { pointer, code, detail: detail() });
        }
    }

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
    fn broken(&self, nodes: &[Node], token: &Token<'_>, found: &mut dyn FnMut(&'static str)) {
        if self.types & kind(token) == 0 {
            return found("type");
        }
        let mut check = |code, keeps: bool| {
            if !keeps {
                found(code);
            }
        };
        check(
            "anyOf",
            self.any_of.as_ref().is_none_or(|list| list.iter().any(|i| nodes[*i].accepts(nodes, token))),
        );
        check("const", self.constant.as_ref().is_none_or(|value| equals(value, token)));
        check(
            "enum",
            self.enumeration.as_ref().is_none_or(|list| list.iter().any(|value| equals(value, token))),
        );
        match token {
            Token::Number(number) => {
                let against = |limit: &Limit| number.compare(&limit.number());
                check("minimum", self.minimum.as_ref().is_none_or(|limit| against(limit).is_ge()));
                check("maximum", self.maximum.as_ref().is_none_or(|limit| against(limit).is_le()));
            }
            Token::Text(text) => {
                let text = text.decoded();
                let length = || text.chars().count();
                check("minLength", self.min_length.is_none_or(|least| length() >= least));
                check("maxLength", self.max_length.is_none_or(|most| length() <= most));
                check("pattern", self.pattern.as_ref().is_none_or(|pattern| pattern.is_match(&text)));
            }
            Token::Null | Token::Boolean(_) | Token::Array | Token::Object => {}
        }
    }

    fn accepts(&self, nodes: &[Node], token: &Token<'_>) -> bool {
        let mut is_kept = true;
        self.broken(nodes, token, &mut |_| is_kept = false);
        is_kept
    }
}

fn kind(token: &Token<'_>) -> u8 {
    match token {
        Token::Null => schema::NULL,
        Token::Boolean(_) => schema::BOOLEAN,
        Token::Number(number) if number.is_integer() => schema::INTEGER,
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
        (Scalar::Text(a), Token::Text(b)) => *b == **a,
        _ => false,
    }
}
