//! What stands in the file, the environment and the flags, each value with its place.
//!
//! Knows nothing of what a key means. Layers by replacing: file, then environment, then flags.

use std::{collections::BTreeMap, fmt, path::Path, sync::Arc};

use toml::de::{DeTable, DeValue};

use super::{Problem, Problems};

/// The prefix of the variables that override the file.
pub(super) const PREFIX: &str = "CCSQM_GATEWAY__";

/// Where a value stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    File { path: Arc<str>, line: usize },
    Variable(String),
    Flag(String),
}

#[derive(Clone, Debug)]
pub(super) struct Value {
    pub(super) place: Place,
    pub(super) kind: Kind,
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    Text(String),
    /// From the environment or a flag: text that may stand for a number or a list, too.
    Loose(String),
    Integer(i64),
    Boolean(bool),
    List(Vec<Value>),
    Table(BTreeMap<String, Value>),
    /// Floats and dates: no key takes one.
    Other,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line } => write!(f, "{path}:{line}"),
            Self::Variable(name) => write!(f, "environment {name}"),
            Self::Flag(key) => write!(f, "--set {key}"),
        }
    }
}

/// Reads the file and lays the environment and the flags over it.
pub(super) fn read(
    path: &Path,
    overrides: &[(String, String)],
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Value, Problems> {
    let shown: Arc<str> = path.display().to_string().into();
    let whole = Place::File { path: shown.clone(), line: 1 };
    let fail = |place, reason: String| Problems::one(Problem { place, key: "file".into(), reason });
    let text = std::fs::read_to_string(path).map_err(|error| fail(whole.clone(), error.to_string()))?;
    let line = |offset: usize| text[..offset.min(text.len())].matches('\n').count() + 1;
    let place = |offset| Place::File { path: shown.clone(), line: line(offset) };
    let table = DeTable::parse(&text).map_err(|error| {
        fail(place(error.span().map_or(0, |span| span.start)), error.message().to_owned())
    })?;
    let mut root = convert_table(table.get_ref(), whole, &place);
    let mut problems = Vec::new();
    let variables = environment.into_iter().filter_map(|(name, text)| {
        let key = name.strip_prefix(PREFIX)?.to_ascii_lowercase().replace("__", ".");
        Some((Place::Variable(name), key, text))
    });
    let flags = overrides.iter().map(|(key, text)| (Place::Flag(key.clone()), key.clone(), text.clone()));
    for (place, key, text) in variables.chain(flags) {
        if let Err(reason) = lay_over(&mut root, &place, &key, text) {
            problems.push(Problem { place, key, reason });
        }
    }
    if problems.is_empty() { Ok(root) } else { Err(Problems(problems)) }
}

fn convert_table(table: &DeTable<'_>, at: Place, place: &impl Fn(usize) -> Place) -> Value {
    let members = table
        .iter()
        .map(|(key, value)| {
            let at = place(key.span().start);
            (key.get_ref().to_string(), convert(value.get_ref(), at, place))
        })
        .collect();
    Value { place: at, kind: Kind::Table(members) }
}

fn convert(value: &DeValue<'_>, at: Place, place: &impl Fn(usize) -> Place) -> Value {
    let kind = match value {
        DeValue::String(text) => Kind::Text(text.to_string()),
        DeValue::Integer(integer) => {
            i64::from_str_radix(integer.as_str(), integer.radix()).map_or(Kind::Other, Kind::Integer)
        }
        DeValue::Boolean(boolean) => Kind::Boolean(*boolean),
        DeValue::Float(_) => Kind::Other,
        DeValue::Datetime(_) => Kind::Other,
        DeValue::Array(items) => Kind::List(
            items
                .iter()
                .map(|item| {
                    // A table of an array of tables spans its header, which is the line to name.
                    convert(item.get_ref(), place(item.span().start), place)
                })
                .collect(),
        ),
        DeValue::Table(table) => return convert_table(table, at, place),
    };
    Value { place: at, kind }
}

fn lay_over(root: &mut Value, place: &Place, key: &str, text: String) -> Result<(), String> {
    let mut value = root;
    for part in key.split('.') {
        let Kind::Table(members) = &mut value.kind else {
            return Err("lists of tables can be set in the file only".into());
        };
        let empty = || Value { place: place.clone(), kind: Kind::Table(BTreeMap::new()) };
        value = members.entry(part.to_owned()).or_insert_with(empty);
    }
    match &value.kind {
        Kind::Table(members) if !members.is_empty() => Err("is a section, not a value".into()),
        Kind::List(items) if items.iter().any(|item| matches!(item.kind, Kind::Table(_))) => {
            Err("lists of tables can be set in the file only".into())
        }
        _ => {
            *value = Value { place: place.clone(), kind: Kind::Loose(text) };
            Ok(())
        }
    }
}
