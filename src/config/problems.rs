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
    /// The value as it is written in the file, if it may be shown.
    pub(super) written: Option<String>,
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
    /// File and line, if it is in a file.
    pub fn line(&self) -> Option<(&str, usize)> {
        match &self.place {
            source::Place::File { path, line } => Some((path, *line)),
            source::Place::Variable(_) | source::Place::Flag(_) => None,
        }
    }

    /// Key and reason.
    pub fn title(&self) -> String {
        let Self { key, reason, .. } = self;
        let cut = key.char_indices().nth(200).map_or(key.len(), |(at, _)| at);
        plain::line(&format!("{}: {reason}", &key[..cut]))
    }

    /// The key and its value as they are written in the file, where it is certain that no secret is among them: the value of a key that
    /// is known, and names no secret.
    pub fn shown(&self) -> Option<String> {
        let (_, name) = self.key.rsplit_once('.').unwrap_or(("", &self.key));
        self.written.as_ref().map(|written| plain::line(&format!("{name} = {written}")))
    }

    /// For machines.
    pub fn to_json(&self) -> serde_json::Value {
        let (file, line) = self.line().unzip();
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
        let line = format!("{}: {}", plain::line(&self.place.to_string()), self.title());
        f.write_str(&line) // at once: standard error has no buffer
    }
}
