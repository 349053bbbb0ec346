//! Compiles a JSON Schema into a tree of rules.
//!
//! An unknown keyword is an error with its place and stops the start: a rule that is not checked must not look as if it were. A
//! known one that cannot apply, such as `minimum` beside `"type": "string"`, is accepted, as in JSON Schema. A schema cannot be
//! recursive, and its size is bounded. Bodies are checked by [`super::walk`] and [`super::rules`].

mod values;
mod words;

use std::sync::Arc;

use serde_json::{Map, Value};
use thiserror::Error;

use self::values::{boolean, fail, filled, limit, list, object, scalar, size, step, text, types};
use super::Contract;
use super::pattern::Pattern;
use crate::json::Number;
use crate::model::redaction::Redaction;

// Bits, so that one operation checks a value against all types of a rule. `number` has two: every integer is a number, too.
pub(super) const NULL: u8 = 1;
pub(super) const BOOLEAN: u8 = 2;
pub(super) const INTEGER: u8 = 4;
pub(super) const FRACTION: u8 = 8;
pub(super) const STRING: u8 = 16;
pub(super) const ARRAY: u8 = 32;
pub(super) const OBJECT: u8 = 64;
const ANY: u8 = 127;

/// Each type: its name in a schema, its bits, and its words in a violation.
// `number` comes last, since it is two types: messages list the types in this order.
const TYPES: [(&str, u8, &str); 7] = [
    ("null", NULL, "null"),
    ("boolean", BOOLEAN, "true or false"),
    ("integer", INTEGER, "an integer in plain digits"),
    ("string", STRING, "a string"),
    ("array", ARRAY, "an array"),
    ("object", OBJECT, "an object"),
    ("number", INTEGER | FRACTION, "a number"),
];

/// The most rules of one contract.
// A reference is compiled anew at each use, so that a chain of definitions that each name the next one twice has 2^n rules.
const MAX_NODES: usize = 4096;

/// The most members of one object: a `u128` has one bit for each, to note which were seen.
const MAX_MEMBERS: usize = 128;

/// The most bytes that the tables of all patterns of one contract may take.
const MAX_PATTERN_BYTES: usize = 16 << 20;

/// The reason why a schema is refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{pointer}: {reason}")]
pub struct BadSchema {
    /// The place in the schema, as a JSON Pointer in the form of a URI fragment (RFC 6901 §6); `#` is the whole schema.
    pub pointer: String,
    /// What is wrong there, in words.
    pub reason: String,
}

/// The index of a member that a contract adds to the audit record.
// 16 bits, since captured scalars must be small. The index fits, since a schema has at most 4096 rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AuditIndex(pub(super) u16);

/// A member that the contract adds to the audit record (`x-audit`).
#[derive(Clone, Debug)]
pub(super) struct AuditMember {
    pub(super) name: String,
    /// The text in front of the values: `,"name":`, and the bracket of a list.
    pub(super) opening: String,
    /// Whether the member is in the items of an array, so that it has one value for each item.
    pub(super) is_list: bool,
    pub(super) redaction: Redaction,
}

/// The rules for the values at one place. A field is `None` if the schema does not have that keyword.
#[derive(Debug, Default)]
pub(super) struct Node {
    /// The bits of the types that are accepted.
    pub(super) types: u8,
    pub(super) constant: Option<Scalar>,
    pub(super) enumeration: Option<Vec<Scalar>>,
    pub(super) any_of: Option<Vec<Node>>,
    pub(super) members: Option<Members>,
    pub(super) items: Option<Box<Node>>,
    /// The audit members (`x-audit`) in the rules of the items, in the order of the schema. Each item has one value for
    /// each of them.
    pub(super) audited: Vec<AuditIndex>,
    pub(super) min_items: Option<usize>,
    pub(super) max_items: Option<usize>,
    pub(super) unique_by: Option<UniqueBy>,
    pub(super) min_length: Option<usize>,
    pub(super) max_length: Option<usize>,
    pub(super) pattern: Option<Arc<Pattern>>,
    pub(super) minimum: Option<NumberLimit>,
    pub(super) maximum: Option<NumberLimit>,
    /// Whether an integer here is an id, of which no digit may be lost (`x-refuseRounded`).
    pub(super) is_id: bool,
    /// Whether `is_id` is true here or in an alternative of `anyOf`. Most rules have no ids and skip the check by this flag.
    pub(super) has_ids: bool,
    pub(super) audit: Option<AuditIndex>,
}

/// The member in which the items of an array must differ (`x-uniqueBy`).
#[derive(Debug)]
pub(super) struct UniqueBy {
    pub(super) name: String,
    /// The index among the properties of the items.
    pub(super) index: usize,
}

/// A value of `const` or `enum`.
#[derive(Debug)]
pub(super) enum Scalar {
    Null,
    Boolean(bool),
    Number(NumberLimit),
    Text(String),
}

/// A number of the schema, kept as a literal: an integer of any length is compared exactly.
#[derive(Debug)]
pub(super) struct NumberLimit {
    literal: String,
    is_integer: bool,
    small: Option<i64>,
}

/// The members of an object.
#[derive(Debug, Default)]
pub(super) struct Members {
    // In the order of the schema, so that the walk can guess the next key of a body.
    pub(super) list: Vec<Member>,
    /// Whether keys that are not in the list are allowed.
    pub(super) additional: bool,
    /// The bits of the members that must be present.
    pub(super) required: u128,
    /// The indices of `list`, sorted by name.
    by_name: Vec<usize>,
}

/// One member of an object.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) name: String,
    /// The name in quotes and the colon, as most bodies write them.
    pub(super) literal: Vec<u8>,
    /// The rules of its value; `None` for a member that is only required.
    pub(super) node: Option<Box<Node>>,
    /// The bit at the member's index in the list.
    pub(super) bit: u128,
}

/// Compiles a schema, which must be strict JSON. The caller has checked that no key occurs twice.
pub(super) fn compile(text: &str) -> Result<Contract, BadSchema> {
    let document: Value = serde_json::from_str(text).or_else(|error| fail("#", error.to_string()))?;
    let (audit, audited, open, patterns) = Default::default();
    let mut compiler = Compiler { document: &document, nodes: 0, audit, audited, open, patterns };
    let root = compiler.node(&document, "#", Nesting::Single)?;
    // Taken before the definitions are compiled, whose names are not members of the record.
    let audit = std::mem::take(&mut compiler.audit).into();
    compiler.definitions()?;
    Ok(Contract { root, audit })
}

impl Node {
    /// Whether only scalars are accepted.
    // `const`, `enum` and `anyOf` can hold only scalars, so that each of them rules out containers whatever `type` says.
    fn is_scalar(&self) -> bool {
        self.types & (ARRAY | OBJECT) == 0
            || self.constant.is_some()
            || self.enumeration.is_some()
            || self.any_of.is_some()
    }
}

impl NumberLimit {
    /// Returns the number for a comparison.
    pub(super) fn number(&self) -> Number<'_> {
        Number { literal: self.literal.as_bytes(), is_integer: self.is_integer, small: self.small }
    }
}

/// Where in a contract a schema is. Decides whether `x-audit` is allowed there, and whether its audit member is a list.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Nesting {
    Single,
    InItems,
    InAnyOf,
}

struct Compiler<'a> {
    document: &'a Value,
    /// How many rules were compiled.
    nodes: usize,
    audit: Vec<AuditMember>,
    /// The audit members of the items that are being compiled.
    audited: Vec<AuditIndex>,
    /// The references that are being compiled, to find one that leads to itself.
    open: Vec<String>,
    /// The patterns that were compiled. A pattern that occurs again shares its table.
    patterns: Vec<Arc<Pattern>>,
}

impl Compiler<'_> {
    fn node(&mut self, schema: &Value, at: &str, nesting: Nesting) -> Result<Node, BadSchema> {
        let keywords = object(schema, at)?;
        if keywords.contains_key("$ref") {
            return self.reference(keywords, at, nesting);
        }
        let mut node = Node { types: ANY, ..Node::default() };
        for (keyword, value) in keywords {
            self.keyword(&mut node, keyword, value, &step(at, keyword), nesting)?;
        }
        // After the loop, since the rest concerns several keywords, which may come in any order.
        node.members = self.members(keywords, &node, at, nesting)?;
        if node.audit.is_some() && !node.is_scalar() {
            return fail(
                step(at, "x-audit"),
                "only a string, a number, a boolean or null can be recorded: give the schema such a `type`, or move x-audit to a property that has one",
            );
        }
        if let Some(name) = keywords.get("x-uniqueBy") {
            node.unique_by = Some(unique_by(node.items.as_deref(), name, &step(at, "x-uniqueBy"))?);
        }
        if keywords.contains_key("x-refuseRounded") && node.types & INTEGER == 0 {
            return fail(step(at, "x-refuseRounded"), "has no effect: the schema allows no integer");
        }
        node.has_ids = node.is_id || node.any_of.iter().flatten().any(|node| node.has_ids);
        if self.nodes == MAX_NODES {
            return fail(at, "the schema is too large");
        }
        self.nodes += 1;
        Ok(node)
    }

    fn keyword(
        &mut self,
        node: &mut Node,
        keyword: &str,
        value: &Value,
        at: &str,
        nesting: Nesting,
    ) -> Result<(), BadSchema> {
        match keyword {
            "type" => node.types = types(value, at)?,
            "const" => node.constant = Some(scalar(value, at)?),
            "enum" => {
                let values = filled(value, at)?.iter().map(|value| scalar(value, at));
                node.enumeration = Some(values.collect::<Result<_, _>>()?);
            }
            "anyOf" => node.any_of = Some(self.any_of(value, at)?),
            "items" => {
                // The members of nested items belong to the inner array only: each of its items has one value of them.
                let outer = std::mem::take(&mut self.audited);
                node.items = Some(self.node(value, at, Nesting::InItems)?.into());
                node.audited = std::mem::replace(&mut self.audited, outer);
            }
            "minItems" => node.min_items = Some(size(value, at)?),
            "maxItems" => node.max_items = Some(size(value, at)?),
            "minLength" => node.min_length = Some(size(value, at)?),
            "maxLength" => node.max_length = Some(size(value, at)?),
            "minimum" => node.minimum = Some(limit(value, at)?),
            "maximum" => node.maximum = Some(limit(value, at)?),
            "pattern" => node.pattern = Some(self.pattern(value, at)?),
            "x-audit" => node.audit = Some(self.audit_member(value, at, nesting)?),
            "x-refuseRounded" => node.is_id = boolean(value, at)?,
            // These three make one rule, which `members` compiles.
            "properties" | "required" | "additionalProperties" => {}
            // Compiled by `node` after the items, in which it must find its property.
            "x-uniqueBy" => {}
            // Only at the root: references have the form #/$defs/NAME, so that others could not be used.
            "$defs" if at == "#/$defs" => {}
            _ if is_annotation(keyword) => {}
            _ => {
                return fail(
                    at,
                    format!("the keyword `{keyword}` is not supported and would not be checked: remove it"),
                );
            }
        }
        Ok(())
    }

    fn reference(
        &mut self,
        keywords: &Map<String, Value>,
        at: &str,
        nesting: Nesting,
    ) -> Result<Node, BadSchema> {
        let mut target = "";
        for (keyword, value) in keywords {
            match keyword.as_str() {
                "$ref" => target = text(value, &step(at, keyword))?,
                "$defs" if at == "#" => {}
                other if is_annotation(other) => {}
                other => {
                    return fail(
                        step(at, other),
                        "is not allowed beside $ref: only annotations such as `title` are",
                    );
                }
            }
        }
        let found = target.strip_prefix("#/$defs/").and_then(|name| self.document.get("$defs")?.get(name));
        let Some(found) = found else {
            return fail(step(at, "$ref"), "must be #/$defs/NAME, with a NAME that `$defs` has");
        };
        // Each reference is compiled where it is used, so that compiling a recursive one would not end.
        if self.open.iter().any(|open| open == target) {
            return fail(
                step(at, "$ref"),
                "refers to itself, directly or through other schemas: recursive schemas are not supported",
            );
        }
        self.open.push(target.to_owned());
        let node = self.node(found, target, nesting);
        self.open.pop();
        node
    }

    /// Compiles every definition and drops the rules, so that an unused one cannot hide a mistake until it is used.
    fn definitions(&mut self) -> Result<(), BadSchema> {
        let Some(definitions) = self.document.get("$defs") else { return Ok(()) };
        for (name, schema) in object(definitions, "#/$defs")? {
            // A definition that the contract uses has registered its names already. They are not duplicates here.
            self.audit.clear();
            self.node(schema, &step("#/$defs", name), Nesting::Single)?;
        }
        Ok(())
    }

    fn members(
        &mut self,
        keywords: &Map<String, Value>,
        node: &Node,
        at: &str,
        nesting: Nesting,
    ) -> Result<Option<Members>, BadSchema> {
        let speaks_of_objects =
            ["properties", "required", "additionalProperties"].iter().any(|k| keywords.contains_key(*k));
        if !speaks_of_objects && (node.types == ANY || node.types & OBJECT == 0) {
            return Ok(None);
        }
        // JSON Schema's default, true, would let a misspelt key of an optional member pass. The author has to decide.
        let Some(Value::Bool(additional)) = keywords.get("additionalProperties") else {
            return fail(at, "an object must have `additionalProperties`, true or false");
        };
        let mut members = Members { additional: *additional, ..Members::default() };
        if let Some(properties) = keywords.get("properties") {
            let at = step(at, "properties");
            for (name, schema) in object(properties, &at)? {
                let node = self.node(schema, &step(&at, name), nesting)?;
                members.add(name, Some(node.into()));
            }
        }
        if let Some(required) = keywords.get("required") {
            let at = step(at, "required");
            for name in list(required, &at)? {
                members.require(text(name, &at)?, &at)?;
            }
        }
        // After `required`, which may add members that are not among the properties.
        if members.list.len() > MAX_MEMBERS {
            return fail(at, "has more than 128 properties");
        }
        members.by_name = (0..members.list.len()).collect();
        members.by_name.sort_by_key(|index| &members.list[*index].name);
        Ok(Some(members))
    }

    fn any_of(&mut self, value: &Value, at: &str) -> Result<Vec<Node>, BadSchema> {
        let mut nodes = Vec::new();
        for (i, schema) in filled(value, at)?.iter().enumerate() {
            let at = step(at, &i.to_string());
            let node = self.node(schema, &at, Nesting::InAnyOf)?;
            // The walk reads a container once, and cannot go back to try its next alternative.
            if !node.is_scalar() {
                return fail(&at, "each schema in anyOf must have a `type` other than object and array");
            }
            nodes.push(node);
        }
        Ok(nodes)
    }

    fn audit_member(&mut self, value: &Value, at: &str, nesting: Nesting) -> Result<AuditIndex, BadSchema> {
        let name = text(value, at)?;
        // In an alternative the member would be recorded for some values only, and a list would lose its positions.
        if nesting == Nesting::InAnyOf {
            return fail(at, "must be beside anyOf, not in it");
        }
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_') {
            return fail(at, "must be a name of the letters a-z and _");
        }
        // A name of the trail's own would be read back as that member: a body could say that its call was resolved.
        if self.audit.iter().any(|member| member.name == name)
            || crate::model::audit_fields::MEMBERS.contains(&name)
        {
            return fail(
                at,
                format!("`{name}` is taken by another x-audit or by the trail itself: choose another name"),
            );
        }
        let is_list = nesting == Nesting::InItems;
        let opening = format!(",\"{name}\":{}", if is_list { "[" } else { "" });
        let index = AuditIndex(self.audit.len() as u16);
        self.audit.push(AuditMember { name: name.to_owned(), opening, is_list, redaction: Redaction::Clear });
        if is_list {
            self.audited.push(index);
        }
        Ok(index)
    }

    fn pattern(&mut self, value: &Value, at: &str) -> Result<Arc<Pattern>, BadSchema> {
        let source = text(value, at)?;
        if let Some(known) = self.patterns.iter().find(|known| known.source() == source) {
            return Ok(known.clone());
        }
        let pattern = Arc::new(Pattern::compile(source).or_else(|reason| fail(at, reason))?);
        self.patterns.push(pattern.clone());
        // Each table is bounded, but a contract may have thousands of them.
        if self.patterns.iter().map(|pattern| pattern.size()).sum::<usize>() > MAX_PATTERN_BYTES {
            return fail(at, "the patterns of the contract are too large together: simplify them");
        }
        Ok(pattern)
    }
}

impl Members {
    /// Returns the member of this name and its index in the list.
    pub(super) fn find(&self, name: &[u8]) -> Option<(usize, &Member)> {
        let found = self.by_name.binary_search_by(|index| self.list[*index].name.as_bytes().cmp(name));
        found.ok().map(|found| self.by_name[found]).map(|index| (index, &self.list[index]))
    }

    fn require(&mut self, name: &str, at: &str) -> Result<(), BadSchema> {
        self.required |= match self.list.iter().find(|member| member.name == name) {
            Some(member) => member.bit,
            // Allowed as an additional property: a member without rules of its own, which only has to be present.
            None if self.additional => self.add(name, None),
            None => {
                return fail(
                    at,
                    format!("`{name}` is not among the properties, and additionalProperties is false"),
                );
            }
        };
        Ok(())
    }

    /// Adds a member and returns its bit. Returns 0 for a member beyond [`MAX_MEMBERS`]; the caller must refuse such a
    /// schema.
    fn add(&mut self, name: &str, node: Option<Box<Node>>) -> u128 {
        // A plain shift would panic there, or wrap round to the bit of another member.
        let bit = 1_u128.checked_shl(self.list.len() as u32).unwrap_or_default();
        let literal = format!("{}:", Value::from(name)).into();
        self.list.push(Member { name: name.to_owned(), literal, node, bit });
        bit
    }
}

fn unique_by(items: Option<&Node>, name: &Value, at: &str) -> Result<UniqueBy, BadSchema> {
    let name = text(name, at)?;
    let found = items.and_then(|items| items.members.as_ref()?.find(name.as_bytes()));
    match found.filter(|(_, member)| member.node.as_ref().is_some_and(|node| node.is_scalar())) {
        Some((index, _)) => Ok(UniqueBy { name: name.to_owned(), index }),
        None => fail(at, "must name a property of the items whose `type` is neither object nor array"),
    }
}

/// Whether JSON Schema says that a keyword checks nothing, so that it may be ignored.
fn is_annotation(keyword: &str) -> bool {
    matches!(keyword, "title" | "description" | "$comment" | "examples" | "default" | "$schema" | "$id")
}
