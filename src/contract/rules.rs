//! Validates one value against the keywords of its rule.
//!
//! A scalar is checked completely. Of an array or an object only the type is checked here; [`super::walk`] checks its content.

use super::schema;
use super::schema::{Node, NumberLimit, Scalar};
use crate::json::{Abort, Lexeme, Number};

impl Node {
    /// Calls `found` with each keyword that the value breaks. A value of a wrong type breaks `type` only.
    ///
    /// # Errors
    ///
    /// Returns the error of `found` at once, without checking more.
    // Inlined once for each kind of token, so that the compiler drops the branches for the other kinds.
    #[inline(always)]
    pub(super) fn violations_of(
        &self,
        token: &Lexeme<'_>,
        found: &mut impl FnMut(&'static str) -> Result<(), Abort>,
    ) -> Result<(), Abort> {
        if self.types & kind(token) == 0 {
            return found("type");
        }
        let mut check = |code, keeps: bool| if keeps { Ok(()) } else { found(code) };
        if let Some(list) = &self.any_of {
            check("anyOf", list.iter().any(|node| node.accepts(token)))?;
        }
        if let Some(value) = &self.constant {
            check("const", equals(value, token))?;
        }
        if let Some(list) = &self.enumeration {
            check("enum", list.iter().any(|value| equals(value, token)))?;
        }
        match token {
            Lexeme::Number(number) => {
                let against = |limit: &NumberLimit| number.compare(&limit.number());
                check("minimum", self.minimum.as_ref().is_none_or(|limit| against(limit).is_ge()))?;
                check("maximum", self.maximum.as_ref().is_none_or(|limit| against(limit).is_le()))
            }
            // Only with a keyword that needs the text: a string with escapes is copied to decode it.
            Lexeme::Text(text) if self.min_length.or(self.max_length).is_some() || self.pattern.is_some() => {
                let text = text.decoded();
                check("minLength", self.min_length.is_none_or(|least| has_chars(&text, least)))?;
                // Saturating, since a schema may say `"maxLength": 18446744073709551615`.
                check(
                    "maxLength",
                    self.max_length.is_none_or(|most| !has_chars(&text, most.saturating_add(1))),
                )?;
                check("pattern", self.pattern.as_ref().is_none_or(|pattern| pattern.is_match(&text)))
            }
            _ => Ok(()),
        }
    }

    /// Whether an integer that this rule accepts is an id (`x-refuseRounded`).
    // Only alternatives that accept the integer count. If one of them takes it as a plain number, it is not an id: then refusing
    // it would refuse what the contract allows.
    pub(super) fn is_id(&self, number: &Number<'_>) -> bool {
        let token = Lexeme::Number(*number);
        let mut alternatives = self.any_of.iter().flatten();
        number.is_integer
            && (self.is_id
                || self.has_ids && alternatives.all(|node| !node.accepts(&token) || node.is_id(number)))
    }

    /// Whether the value breaks none of the keywords.
    fn accepts(&self, token: &Lexeme<'_>) -> bool {
        self.violations_of(token, &mut |_| Err(Abort)).is_ok()
    }
}

/// Whether a UTF-8 text has at least `count` characters, as code points.
// A code point takes one to four bytes, so the number of bytes alone decides for most texts; the others are counted.
fn has_chars(text: &[u8], count: usize) -> bool {
    let begins_char = |byte: &&u8| **byte & 0xc0 != 0x80;
    text.len() >= count
        && (text.len().div_ceil(4) >= count || text.iter().filter(begins_char).count() >= count)
}

fn kind(token: &Lexeme<'_>) -> u8 {
    match token {
        Lexeme::Null => schema::NULL,
        Lexeme::Boolean(_) => schema::BOOLEAN,
        // By the literal: unlike in JSON Schema, 1.0 and 1e3 are not integers here, since not every parser reads them as such.
        Lexeme::Number(number) if number.is_integer => schema::INTEGER,
        Lexeme::Number(_) => schema::FRACTION,
        Lexeme::Text(_) => schema::STRING,
        Lexeme::Array => schema::ARRAY,
        Lexeme::Object => schema::OBJECT,
    }
}

fn equals(scalar: &Scalar, token: &Lexeme<'_>) -> bool {
    match (scalar, token) {
        (Scalar::Null, Lexeme::Null) => true,
        (Scalar::Boolean(a), Lexeme::Boolean(b)) => a == b,
        (Scalar::Number(a), Lexeme::Number(b)) => b.compare(&a.number()).is_eq(),
        (Scalar::Text(a), Lexeme::Text(b)) => *b.decoded() == *a.as_bytes(),
        _ => false,
    }
}
