//! Mistakes of a configuration, each with its place, key and reason.

use std::fmt;

use serde_json::json;

use super::source;
use crate::plain;

/// One mistake.
#[derive(Clone, Debug)]
pub struct Problem {
    pub(super) place: source::Place,
    pub(super) key: String,
    pub(super) reason: String,
}

/// All mistakes of a configuration; displayed one a line, as `file:line: key: reason`.
#[derive(Clone, Debug)]
pub struct Problems(pub(super) Vec<Problem>);

impl Problems {
    /// One by one, in the order of their places.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.0.iter()
    }
}

impl Problem {
    /// For machines.
    pub fn to_json(&self) -> serde_json::Value {
        let (file, line) = match &self.place {
            source::Place::File { path, line } => (Some(&**path), Some(line)),
            source::Place::Variable(_) | source::Place::Flag(_) => (None, None),
        };
        let place = self.place.to_string();
        json!({ "place": place, "file": file, "line": line, "key": self.key, "reason": self.reason })
    }
}

impl std::error::Error for Problems {}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            let line_break = if i == 0 { "" } else { "\n" };
            write!(f, "{line_break}{problem}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Problem {
    /// One line, whatever the file holds: a key may be quoted, long, and full of characters that are not plain.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, key, reason } = self;
        let cut = key.char_indices().nth(200).map_or(key.len(), |(at, _)| at);
        let line = plain::line(&format!("{place}: {}: {reason}", &key[..cut]));
        f.write_str(&line) // at once: standard error has no buffer
    }
}
