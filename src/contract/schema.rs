//! Compiles a JSON Schema into a table of nodes. What it does not know, or what would not be checked, stops
//! the start with its place.

use std::sync::Arc;

use regex_lite::Regex;
use serde_json::{Map, Value};
use thiserror::Error;

use super::json::{Number, Text};

pub(super) const NULL: u8 = 1;
pub(super) const BOOLEAN: u8 = 2;
pub(super) const INTEGER: u8 = 4;
pub(super) const NUMBER: u8 = 8;
pub(super) const STRING: u8 = 16;
pub(super) const ARRAY: u8 = 32;
pub(super) const OBJECT: u8 = 64;
const ANY: u8 = 127;

/// A schema that cannot be used.
#[derive(Debug, Error)]
#[error("{pointer}: {reason}")]
pub struct SchemaError {
    /// Where, as a JSON Pointer into the schema; `#` for the whole.
    pub pointer: String,
    /// Why.
    pub reason: String,
}

#[derive(Debug)]
pub(super) struct Schema {
    pub(super) nodes: Vec<Node>,
    pub(super) root: usize,
    pub(super) audit: Arc<[AuditMember]>,
}

/// A member of the audit record.
#[derive(Clone, Debug)]
pub(super) struct AuditMember {
    pub(super) name: String,
    pub(super) is_list: bool,
}

/// The compiled rules of one place.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) types: u8,
    pub(super) constant: Option<Scalar>,
    pub(super) enumeration: Option<Vec<Scalar>>,
    pub(super) members: Option<Members>,
    pub(super) items: Option<usize>,
    pub(super) min_items: usize,
    pub(super) max_items: usize,
    pub(super) unique_by: Option<String>,
    pub(super) min_length: usize,
    pub(super) max_length: usize,
    pub(super) pattern: Option<Regex>,
    pub(super) minimum: Option<Limit>,
    pub(super) maximum: Option<Limit>,
    pub(super) any_of: Vec<usize>,
    pub(super) audit: Option<usize>,
}

#[derive(Debug)]
pub(super) enum Scalar {
    Null,
    Boolean(bool),
    Number(Limit),
    Text(String),
}

/// A number of the schema, as a literal.
#[derive(Debug)]
pub(super) struct Limit(String);

#[derive(Debug)]
pub(super) struct Members {
    pub(super) list: Vec<Member>,
    pub(super) additional: bool,
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) name: String,
    pub(super) node: Option<usize>,
    pub(super) required: bool,
}

impl Members {
    pub(super) fn find(&self, key: &Text<'_>) -> Option<usize> {
        self.list.iter().position(|member| key.is(&member.name))
    }
}

impl Limit {
    pub(super) fn number(&self) -> Number<'_> {
        Number(&self.0)
    }
}

impl Schema {
    pub(super) fn compile(text: &str) -> Result<Self, SchemaError> {
        let document: Value = serde_json::from_str(text)
            .map_err(|error| SchemaError { pointer: "#".into(), reason: error.to_string() })?;
        let mut compiler =
            Compiler { document: &document, nodes: Vec::new(), audit: Vec::new(), open: Vec::new() };
        let root = compiler.node(&document, "#", false)?;
        Ok(Self { nodes: compiler.nodes, root, audit: compiler.audit.into() })
    }

    /// What a node wants, in words, for an app developer.
    pub(super) fn wanted(&self, node: &Node) -> String {
        if !node.any_of.is_empty() {
            let alternatives: Vec<_> =
                node.any_of.iter().map(|node| self.wanted(&self.nodes[*node])).collect();
            return alternatives.join(", or ");
        }
        if let Some(constant) = &node.constant {
            return constant.shown();
        }
        if let Some(list) = &node.enumeration {
            let values: Vec<_> = list.iter().map(Scalar::shown).collect();
            return format!("one of {}", values.join(", "));
        }
        let mut words = kind_words(node.types);
        match (&node.minimum, &node.maximum) {
            (Some(low), Some(high)) => words += &format!(" from {} to {}", low.0, high.0),
            (Some(low), None) => words += &format!(" of at least {}", low.0),
            (None, Some(high)) => words += &format!(" of at most {}", high.0),
            (None, None) => {}
        }
        match (node.min_length, node.max_length) {
            (0, usize::MAX) => {}
            (low, usize::MAX) => words += &format!(" of at least {low} characters"),
            (low, high) => words += &format!(" of {low} to {high} characters"),
        }
        if let Some(pattern) = &node.pattern {
            words += &format!(" that matches {}", pattern.as_str());
        }
        words
    }
}

fn kind_words(types: u8) -> String {
    const WORDS: [(u8, &str); 7] = [
        (OBJECT, "an object"),
        (ARRAY, "an array"),
        (INTEGER, "an integer (digits only)"),
        (NUMBER, "a number"),
        (STRING, "a string"),
        (BOOLEAN, "true or false"),
        (NULL, "null"),
    ];
    if types == ANY {
        return "a value".into();
    }
    // A number that may have a fraction may be an integer, too: saying so would be noise.
    let types = if types & NUMBER == 0 { types } else { types & !INTEGER };
    let words: Vec<_> = WORDS.iter().filter(|(kind, _)| types & kind != 0).map(|(_, word)| *word).collect();
    words.join(" or ")
}

impl Scalar {
    fn shown(&self) -> String {
        match self {
            Self::Null => "null".into(),
            Self::Boolean(value) => value.to_string(),
            Self::Number(number) => number.0.clone(),
            Self::Text(text) => format!("{text:?}"),
        }
    }
}

struct Compiler<'a> {
    document: &'a Value,
    nodes: Vec<Node>,
    audit: Vec<AuditMember>,
    /// References that are being compiled.
    open: Vec<String>,
}

impl Compiler<'_> {
    fn node(&mut self, schema: &Value, at: &str, in_items: bool) -> Result<usize, SchemaError> {
        let Value::Object(keywords) = schema else { return fail(at, "must be an object") };
        if let Some(reference) = keywords.get("$ref") {
            return self.reference(keywords, reference, at, in_items);
        }
        let mut node = Node {
            types: ANY,
            constant: None,
            enumeration: None,
            members: None,
            items: None,
            min_items: 0,
            max_items: usize::MAX,
            unique_by: None,
            min_length: 0,
            max_length: usize::MAX,
            pattern: None,
            minimum: None,
            maximum: None,
            any_of: Vec::new(),
            audit: None,
        };
        for (keyword, value) in keywords {
            let at = format!("{at}/{keyword}");
            match keyword.as_str() {
                "type" => node.types = types(value, &at)?,
                "const" => node.constant = Some(scalar(value, &at)?),
                "enum" => {
                    node.enumeration = Some(
                        list(value, &at)?.iter().map(|item| scalar(item, &at)).collect::<Result<_, _>>()?,
                    );
                }
                "items" => node.items = Some(self.node(value, &at, true)?),
                "minItems" => node.min_items = size(value, &at)?,
                "maxItems" => node.max_items = size(value, &at)?,
                "minLength" => node.min_length = size(value, &at)?,
                "maxLength" => node.max_length = size(value, &at)?,
                "minimum" => node.minimum = Some(limit(value, &at)?),
                "maximum" => node.maximum = Some(limit(value, &at)?),
                "pattern" => node.pattern = Some(pattern(value, &at)?),
                "anyOf" => node.any_of = self.alternatives(value, &at)?,
                "x-uniqueBy" => node.unique_by = Some(text(value, &at)?.to_owned()),
                "x-audit" => node.audit = Some(self.audit_member(value, &at, in_items)?),
                "properties" | "required" | "additionalProperties" => {}
                "$defs" if at == "#/$defs" => {}
                "title" | "description" | "$comment" | "examples" | "default" | "$schema" | "$id" => {}
                _ => return fail(&at, "unknown keyword: it would not be checked"),
            }
        }
        node.members = self.members(keywords, &node, at, in_items)?;
        self.nodes.push(node);
        Ok(self.nodes.len() - 1)
    }

    fn reference(
        &mut self,
        keywords: &Map<String, Value>,
        reference: &Value,
        at: &str,
        in_items: bool,
    ) -> Result<usize, SchemaError> {
        if keywords.len() > 1 {
            return fail(at, "$ref must stand alone");
        }
        let target = text(reference, at)?;
        let found = target.strip_prefix("#/$defs/").and_then(|name| self.document.get("$defs")?.get(name));
        let Some(found) = found else {
            return fail(at, "$ref must name an entry of $defs, as in #/$defs/name");
        };
        if self.open.iter().any(|open| open == target) {
            return fail(at, "$ref must not lead back to itself");
        }
        self.open.push(target.to_owned());
        let node = self.node(found, target, in_items);
        self.open.pop();
        node
    }

    fn members(
        &mut self,
        keywords: &Map<String, Value>,
        node: &Node,
        at: &str,
        in_items: bool,
    ) -> Result<Option<Members>, SchemaError> {
        let speaks_of_objects =
            ["properties", "required", "additionalProperties"].iter().any(|k| keywords.contains_key(*k));
        if !speaks_of_objects && (node.types == ANY || node.types & OBJECT == 0) {
            return Ok(None);
        }
        let Some(Value::Bool(additional)) = keywords.get("additionalProperties") else {
            return fail(at, "an object must say additionalProperties: true or false");
        };
        let mut members = Vec::new();
        if let Some(properties) = keywords.get("properties") {
            let Value::Object(properties) = properties else {
                return fail(at, "properties must be an object");
            };
            for (name, schema) in properties {
                let node = self.node(schema, &format!("{at}/properties/{name}"), in_items)?;
                members.push(Member { name: name.clone(), node: Some(node), required: false });
            }
        }
        if let Some(required) = keywords.get("required") {
            for name in list(required, at)? {
                let name = text(name, at)?;
                match members.iter_mut().find(|member| member.name == name) {
                    Some(member) => member.required = true,
                    None if *additional => {
                        members.push(Member { name: name.to_owned(), node: None, required: true });
                    }
                    None => return fail(at, "required names a key that additionalProperties forbids"),
                }
            }
        }
        if members.len() > 128 {
            return fail(at, "more than 128 properties");
        }
        Ok(Some(Members { list: members, additional: *additional }))
    }

    fn alternatives(&mut self, value: &Value, at: &str) -> Result<Vec<usize>, SchemaError> {
        let mut nodes = Vec::new();
        for (i, schema) in list(value, at)?.iter().enumerate() {
            let at = format!("{at}/{i}");
            let node = self.node(schema, &at, false)?;
            if self.nodes[node].types & (ARRAY | OBJECT) != 0 {
                return fail(&at, "alternatives must be scalars and say their type");
            }
            nodes.push(node);
        }
        Ok(nodes)
    }

    fn audit_member(&mut self, value: &Value, at: &str, is_list: bool) -> Result<usize, SchemaError> {
        let name = text(value, at)?;
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') {
            return fail(at, "must be a name of a-z and _");
        }
        if self.audit.iter().any(|member| member.name == name) {
            return fail(at, "this name is taken");
        }
        self.audit.push(AuditMember { name: name.to_owned(), is_list });
        Ok(self.audit.len() - 1)
    }
}

fn fail<T>(pointer: &str, reason: &str) -> Result<T, SchemaError> {
    Err(SchemaError { pointer: pointer.to_owned(), reason: reason.to_owned() })
}

fn text<'a>(value: &'a Value, at: &str) -> Result<&'a str, SchemaError> {
    value.as_str().map_or_else(|| fail(at, "must be a string"), Ok)
}

fn list<'a>(value: &'a Value, at: &str) -> Result<&'a [Value], SchemaError> {
    match value.as_array() {
        Some(items) if !items.is_empty() => Ok(items),
        Some(_) | None => fail(at, "must be an array with something in it"),
    }
}

fn size(value: &Value, at: &str) -> Result<usize, SchemaError> {
    let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
    size.map_or_else(|| fail(at, "must be a whole number"), Ok)
}

fn limit(value: &Value, at: &str) -> Result<Limit, SchemaError> {
    match value {
        Value::Number(number) => Ok(Limit(number.to_string())),
        _ => fail(at, "must be a number"),
    }
}

fn pattern(value: &Value, at: &str) -> Result<Regex, SchemaError> {
    Regex::new(text(value, at)?).or_else(|error| fail(at, &error.to_string()))
}

fn scalar(value: &Value, at: &str) -> Result<Scalar, SchemaError> {
    match value {
        Value::Null => Ok(Scalar::Null),
        Value::Bool(value) => Ok(Scalar::Boolean(*value)),
        Value::Number(_) => limit(value, at).map(Scalar::Number),
        Value::String(text) => Ok(Scalar::Text(text.clone())),
        Value::Array(_) | Value::Object(_) => fail(at, "must be a scalar"),
    }
}

fn types(value: &Value, at: &str) -> Result<u8, SchemaError> {
    let one = |value: &Value| match text(value, at)? {
        "null" => Ok(NULL),
        "boolean" => Ok(BOOLEAN),
        "integer" => Ok(INTEGER),
        "number" => Ok(NUMBER | INTEGER),
        "string" => Ok(STRING),
        "array" => Ok(ARRAY),
        "object" => Ok(OBJECT),
        _ => fail(at, "unknown type"),
    };
    match value {
        Value::Array(_) => list(value, at)?.iter().try_fold(0, |types, value| Ok(types | one(value)?)),
        _ => one(value),
    }
}
