//! Parses the values of a schema's keywords.
//!
//! Each function returns the value, or an error with the place `at` if the value is of the wrong kind. None has a default: a
//! mistake in a contract must stop the start, not weaken the check.

use serde_json::{Map, Value};

use super::{BadSchema, NumberLimit, Scalar, TYPES};
use crate::contract::findings::escape;
use crate::json::Number;

/// 2^53. Below it a double holds every integer exactly.
const FLOAT_EXACT: f64 = 9_007_199_254_740_992.0;

/// Returns the error for a place of the schema.
pub(super) fn fail<T>(pointer: impl Into<String>, reason: impl Into<String>) -> Result<T, BadSchema> {
    Err(BadSchema { pointer: pointer.into(), reason: reason.into() })
}

/// Returns the place of a member of the object at `at`.
pub(super) fn step(at: &str, name: &str) -> String {
    format!("{at}/{}", escape(name))
}

pub(super) fn object<'a>(value: &'a Value, at: &str) -> Result<&'a Map<String, Value>, BadSchema> {
    value.as_object().map_or_else(|| fail(at, "must be an object"), Ok)
}

pub(super) fn boolean(value: &Value, at: &str) -> Result<bool, BadSchema> {
    value.as_bool().map_or_else(|| fail(at, "must be true or false"), Ok)
}

pub(super) fn text<'a>(value: &'a Value, at: &str) -> Result<&'a str, BadSchema> {
    value.as_str().map_or_else(|| fail(at, "must be a string"), Ok)
}

pub(super) fn list<'a>(value: &'a Value, at: &str) -> Result<&'a [Value], BadSchema> {
    value.as_array().map_or_else(|| fail(at, "must be an array"), |list| Ok(list.as_slice()))
}

pub(super) fn filled<'a>(value: &'a Value, at: &str) -> Result<&'a [Value], BadSchema> {
    let list = list(value, at)?;
    if list.is_empty() { fail(at, "must not be empty") } else { Ok(list) }
}

pub(super) fn size(value: &Value, at: &str) -> Result<usize, BadSchema> {
    let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
    size.map_or_else(|| fail(at, "must be a whole number"), Ok)
}

pub(super) fn limit(value: &Value, at: &str) -> Result<NumberLimit, BadSchema> {
    let Value::Number(number) = value else { return fail(at, "must be a number") };
    // Everything is a float here that has a fraction or an exponent, or does not fit 64 bits. Its text was rounded when it was
    // parsed, so that a large bound would be another one than the schema shows.
    if number.is_f64() && number.as_f64().is_none_or(|float| float.abs() >= FLOAT_EXACT) {
        return fail(
            at,
            "is too large to be compared exactly: 2^53 is the bound for numbers with a fraction or an exponent",
        );
    }
    // Back to a literal, since numbers of bodies are compared as literals, too.
    let literal = number.to_string();
    let Some(Number { is_integer, small, .. }) = Number::known(&literal) else {
        return fail(at, "must be a number");
    };
    Ok(NumberLimit { literal, is_integer, small })
}

pub(super) fn scalar(value: &Value, at: &str) -> Result<Scalar, BadSchema> {
    match value {
        Value::Null => Ok(Scalar::Null),
        Value::Bool(value) => Ok(Scalar::Boolean(*value)),
        Value::Number(_) => limit(value, at).map(Scalar::Number),
        Value::String(text) => Ok(Scalar::Text(text.clone())),
        // The walk builds no tree of the body, so there is nothing to compare a container with.
        Value::Array(_) | Value::Object(_) => fail(at, "must be a string, a number, a boolean or null"),
    }
}

pub(super) fn types(value: &Value, at: &str) -> Result<u8, BadSchema> {
    match value {
        Value::Array(_) => filled(value, at)?.iter().try_fold(0, |types, one| Ok(types | kind(one, at)?)),
        _ => kind(value, at),
    }
}

fn kind(value: &Value, at: &str) -> Result<u8, BadSchema> {
    let name = text(value, at)?;
    if let Some((_, kind, _)) = TYPES.iter().find(|(known, ..)| *known == name) {
        return Ok(*kind);
    }
    fail(at, format!("unknown type `{name}`; there are {}", TYPES.map(|(known, ..)| known).join(", ")))
}
