//! Checks one value against the keywords of its place.
//!
//! A scalar is checked whole. Of an array or an object only the type is checked here; [`super::walk`] checks what is in it.

use super::schema;
use super::schema::{Limit, Node, Scalar};
use crate::json::{Halt, Number, Token};

impl Node {
    /// Calls `found` with each keyword that the value breaks. A value of a wrong type breaks `type` only.
    #[inline(always)]
    pub(super) fn broken(
        &self,
        token: &Token<'_>,
        found: &mut impl FnMut(&'static str) -> Result<(), Halt>,
    ) -> Result<(), Halt> {
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
            Token::Number(number) => {
                let against = |limit: &Limit| number.compare(&limit.number());
                check("minimum", self.minimum.as_ref().is_none_or(|limit| against(limit).is_ge()))?;
                check("maximum", self.maximum.as_ref().is_none_or(|limit| against(limit).is_le()))
            }
            Token::Text(text) if self.min_length.or(self.max_length).is_some() || self.pattern.is_some() => {
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

    /// Whether an integer that is accepted here is an id. Only alternatives that accept it count.
    pub(super) fn is_id(&self, number: &Number<'_>) -> bool {
        let token = Token::Number(*number);
        let mut alternatives = self.any_of.iter().flatten();
        number.is_integer
            && (self.is_id
                || self.has_ids && alternatives.all(|node| !node.accepts(&token) || node.is_id(number)))
    }

    fn accepts(&self, token: &Token<'_>) -> bool {
        self.broken(token, &mut |_| Err(Halt)).is_ok()
    }
}

/// Whether a text has at least `count` characters. A character takes one to four bytes, so that most texts need not be counted.
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
