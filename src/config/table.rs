//! One table of a configuration, read key by key. What was not asked for is unknown.
//!
//! Every reading method takes a key, and goes on with a default after a mistake.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    Problem,
    raw::{Kind, Place, Value},
    values::{parse_duration, parse_size},
};

pub(super) struct Context<'a> {
    pub(super) folder: &'a Path,
    pub(super) variables: &'a HashSet<String>,
    pub(super) problems: Vec<Problem>,
    /// Every key that was looked for, for the test that holds the reference file against the code.
    pub(super) asked: Vec<String>,
}

impl Context<'_> {
    pub(super) fn problem(&mut self, place: &Place, key: impl Into<String>, reason: impl Into<String>) {
        self.problems.push(Problem { place: place.clone(), key: key.into(), reason: reason.into() });
    }
}

/// One table while it is read: what is left at the end is unknown.
pub(super) struct Table {
    pub(super) path: String,
    pub(super) place: Place,
    pub(super) members: BTreeMap<String, Value>,
    known: Vec<&'static str>,
}

/// A value with the place that an error about it names.
pub(super) struct Found<T> {
    pub(super) value: T,
    pub(super) place: Place,
    pub(super) key: String,
}

impl Table {
    pub(super) fn open(context: &mut Context<'_>, path: String, value: Value) -> Self {
        let Value { place, kind } = value;
        let members = match kind {
            Kind::Table(members) => members,
            _ => {
                context.problem(&place, path.clone(), "must be a table");
                BTreeMap::new()
            }
        };
        Self { path, place, members, known: Vec::new() }
    }

    pub(super) fn key(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    pub(super) fn take(&mut self, context: &mut Context<'_>, name: &'static str) -> Option<Value> {
        self.known.push(name);
        context.asked.push(self.key(name));
        self.members.remove(name)
    }

    pub(super) fn section(&mut self, context: &mut Context<'_>, name: &'static str) -> Self {
        let empty = Value { place: self.place.clone(), kind: Kind::Table(BTreeMap::new()) };
        let value = self.take(context, name).unwrap_or(empty);
        Self::open(context, self.key(name), value)
    }

    pub(super) fn tables(&mut self, context: &mut Context<'_>, name: &'static str) -> Vec<Self> {
        let Some(value) = self.take(context, name) else { return Vec::new() };
        let key = self.key(name);
        let Kind::List(items) = value.kind else {
            context.problem(&value.place, key, format!("must be written as [[{name}]]"));
            return Vec::new();
        };
        let open = |(i, item)| Self::open(context, format!("{key}[{i}]"), item);
        items.into_iter().enumerate().map(open).collect()
    }

    pub(super) fn text(&mut self, context: &mut Context<'_>, name: &'static str) -> Option<Found<String>> {
        let Value { place, kind } = self.take(context, name)?;
        let key = self.key(name);
        match kind {
            Kind::Text(value) | Kind::Loose(value) => Some(Found { value, place, key }),
            Kind::Integer(_) => {
                context.problem(
                    &place,
                    key,
                    "must be a text in quotes; a quantity needs its unit, as in \"10s\" or \"64MiB\"",
                );
                None
            }
            Kind::Boolean(_) | Kind::List(_) | Kind::Table(_) | Kind::Other => {
                context.problem(&place, key, "must be a text in quotes");
                None
            }
        }
    }

    pub(super) fn texts(
        &mut self,
        context: &mut Context<'_>,
        name: &'static str,
    ) -> Option<Vec<Found<String>>> {
        let Value { place, kind } = self.take(context, name)?;
        let key = self.key(name);
        let found = |value: String, place: &Place| Found { value, place: place.clone(), key: key.clone() };
        match kind {
            Kind::List(items) => {
                let mut texts = Vec::new();
                for item in items {
                    match item.kind {
                        Kind::Text(text) => texts.push(found(text, &item.place)),
                        Kind::Integer(number) => texts.push(found(number.to_string(), &item.place)),
                        _ => context.problem(&item.place, key.clone(), "must be a list of texts"),
                    }
                }
                Some(texts)
            }
            Kind::Loose(text) => {
                let bare = text.trim_matches(['[', ']']);
                let parts = bare.split(',').map(|part| part.trim().trim_matches('"').to_owned());
                Some(parts.filter(|part| !part.is_empty()).map(|part| found(part, &place)).collect())
            }
            _ => {
                context.problem(&place, key, "must be a list of texts");
                None
            }
        }
    }

    /// A text that `parse` understands, else the default.
    pub(super) fn parsed<T>(
        &mut self,
        context: &mut Context<'_>,
        name: &'static str,
        default: T,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> T {
        let Some(found) = self.text(context, name) else { return default };
        match parse(&found.value) {
            Ok(value) => value,
            Err(reason) => {
                context.problem(&found.place, found.key, reason);
                default
            }
        }
    }

    pub(super) fn required<T>(
        &mut self,
        context: &mut Context<'_>,
        name: &'static str,
        default: T,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> T {
        if !self.members.contains_key(name) {
            context.problem(&self.place, self.key(name), "is missing");
        }
        self.parsed(context, name, default, parse)
    }

    pub(super) fn duration(
        &mut self,
        context: &mut Context<'_>,
        name: &'static str,
        default: &str,
        bounds: (&str, &str),
    ) -> Duration {
        let parse = |text: &str| {
            parse_duration(text)
                .ok_or_else(|| "must be a number with a unit: ms, s, m, h or d, as in \"10s\"".to_owned())
        };
        let (low, high) = (parse(bounds.0).unwrap_or_default(), parse(bounds.1).unwrap_or_default());
        let default = parse(default).unwrap_or_default();
        self.parsed(context, name, default, |text| {
            let value = parse(text)?;
            let within = (low..=high).contains(&value);
            within.then_some(value).ok_or(format!("must be from {} to {}", bounds.0, bounds.1))
        })
    }

    pub(super) fn size(
        &mut self,
        context: &mut Context<'_>,
        name: &'static str,
        default: u64,
        bounds: (&str, &str),
    ) -> u64 {
        let parse = |text: &str| {
            parse_size(text)
                .ok_or_else(|| "must be a number with a unit: B, KiB, MiB or GiB, as in \"64MiB\"".to_owned())
        };
        let (low, high) = (parse(bounds.0).unwrap_or_default(), parse(bounds.1).unwrap_or_default());
        self.parsed(context, name, default, |text| {
            let value = parse(text)?;
            let within = (low..=high).contains(&value);
            within.then_some(value).ok_or(format!("must be from {} to {}", bounds.0, bounds.1))
        })
    }

    pub(super) fn integer(
        &mut self,
        context: &mut Context<'_>,
        name: &'static str,
        default: usize,
        bounds: std::ops::RangeInclusive<usize>,
    ) -> usize {
        let Some(Value { place, kind }) = self.take(context, name) else { return default };
        let number = match kind {
            Kind::Integer(number) => usize::try_from(number).ok(),
            Kind::Loose(text) => text.parse().ok(),
            _ => None,
        };
        match number.filter(|number| bounds.contains(number)) {
            Some(number) => number,
            None => {
                let (low, high) = bounds.into_inner();
                context.problem(
                    &place,
                    self.key(name),
                    format!("must be a whole number from {low} to {high}"),
                );
                default
            }
        }
    }

    pub(super) fn boolean(&mut self, context: &mut Context<'_>, name: &'static str) -> bool {
        let Some(Value { place, kind }) = self.take(context, name) else { return false };
        match kind {
            Kind::Boolean(value) => value,
            Kind::Loose(text) if text == "true" || text == "false" => text == "true",
            _ => {
                context.problem(&place, self.key(name), "must be true or false");
                false
            }
        }
    }

    pub(super) fn path(&mut self, context: &mut Context<'_>, name: &'static str) -> Option<Found<PathBuf>> {
        let Found { value, place, key } = self.text(context, name)?;
        Some(Found { value: context.folder.join(value), place, key })
    }

    /// Whatever was not asked for is unknown.
    pub(super) fn close(self, context: &mut Context<'_>) {
        for (name, value) in &self.members {
            let near = self.known.iter().min_by_key(|known| distance(known, name));
            let hint = match near {
                Some(near) if distance(near, name) <= 3 => format!("unknown key; did you mean `{near}`?"),
                _ => format!("unknown key; known here: {}", self.known.join(", ")),
            };
            context.problem(&value.place, self.key(name), hint);
        }
    }
}

/// How many single edits lie between two words.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let substitute = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
