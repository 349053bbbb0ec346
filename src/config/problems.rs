//! Diagnostics: the mistakes of a configuration, each with its place, key and reason, as lines of text or as JSON.
//!
//! A value that may be a secret is never shown. What is shown is one line of plain characters, whatever the file
//! contains.

use std::fmt;

use serde_json::json;

use super::source;
use crate::plain;

/// A mistake: where, at which key, and why.
#[derive(Clone, Debug)]
pub struct Problem {
    /// The file and line, variable or flag.
    pub(super) location: source::ConfigLocation,
    /// The key, such as `callers[0].peer`; `file` for the file as a whole.
    pub(super) key: String,
    /// The reason, worded to be printed after the key, such as `must be true or false`.
    pub(super) reason: String,
    /// The value as it is written in the file, if it may be shown.
    pub(super) written: Option<String>,
}

/// All mistakes of a configuration, at least one. `Display` writes one line for each, as `place: key: reason`.
#[derive(Clone, Debug)]
pub struct Problems(pub(super) Vec<Problem>);

impl Problems {
    /// The mistakes in the order of their places: those of the file by line, then those of variables, then those of
    /// flags.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.0.iter()
    }
}

impl Problem {
    /// The path and the line, from 1; `None` for a variable or a flag.
    pub fn line(&self) -> Option<(&str, usize)> {
        match &self.location {
            source::ConfigLocation::File { path, line } => Some((path, *line)),
            source::ConfigLocation::Variable(_) | source::ConfigLocation::Flag(_) => None,
        }
    }

    /// Returns key and reason as one plain line. The key is cut after 200 characters.
    pub fn title(&self) -> String {
        let Self { key, reason, .. } = self;
        // A key in quotes may be as long as the file, which would push the reason out of sight. Cut between characters:
        // slicing within one would panic.
        let cut = key.char_indices().nth(200).map_or(key.len(), |(at, _)| at);
        plain::line(&format!("{}: {reason}", &key[..cut]))
    }

    /// Returns the key and its value as they are written in the file, as one plain line. `None` if the value is not
    /// from the file, is long, or may be a secret: only values of known keys that name no secret are shown.
    pub fn shown(&self) -> Option<String> {
        let (_, name) = self.key.rsplit_once('.').unwrap_or(("", &self.key));
        self.written.as_ref().map(|written| plain::line(&format!("{name} = {written}")))
    }

    /// Returns the mistake as JSON: `place`, `file` and `line` (null outside the file), `key` and `reason`.
    pub fn to_json(&self) -> serde_json::Value {
        let (file, line) = self.line().unzip();
        let location = self.location.to_string();
        json!({ "place": location, "file": file, "line": line, "key": self.key, "reason": self.reason })
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
    /// Writes one line, `place: key: reason`. Control characters in the key are escaped, and a long key is cut: a
    /// quoted key of the file can hold any text.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = format!("{}: {}", plain::line(&self.location.to_string()), self.title());
        // In one piece: standard error has no buffer, and another thread's line could come between two pieces.
        f.write_str(&line)
    }
}
