//! What stands in the file, the environment and the flags, each value with its place.
//!
//! Knows nothing of what a key means. Layers by replacing: file, then environment, then flags. A file that is
//! not TOML is read as far as its mistakes let it be, so that all of them are told at once.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::{fmt, fs, io};

use toml::de::{DeTable, DeValue};

use super::{Problem, Problems};
use crate::files;

/// The prefix of the variables that override the file. Kubernetes' own variables for a service of this name
/// (`CCSQM_GATEWAY_SERVICE_HOST`, …) do not have the second underscore.
pub(super) const PREFIX: &str = "CCSQM_GATEWAY__";

/// The table whose keys are names of headers.
const HEADERS: &str = "upstream.headers.";

/// Nobody writes a longer one; whatever is longer is some other file.
const MAX_FILE: u64 = 4 << 20;

/// So many lines that are not TOML are told.
const MAX_SYNTAX: usize = 20;

/// So many lines above an error are searched for the bracket that was left open.
const MAX_OPEN: usize = 50;

/// Why a variable or a flag cannot reach a list of tables.
pub(super) const FILE_ONLY: &str = "lists of tables can be set in the file only";

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
    /// Floats, dates and integers beyond 64 bits: no key takes one.
    Other,
}

/// All layers, one over the other.
pub(super) struct Layers {
    pub(super) root: Value,
    /// What is wrong so far.
    pub(super) problems: Vec<Problem>,
    /// How far the file can be believed.
    pub(super) syntax: Syntax,
}

/// How far a file is TOML.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Syntax {
    /// All of it.
    Whole,
    /// All but some lines: what seems to be missing may stand on one of them.
    Holes,
    /// A header is broken, or too much: nobody knows which section a value belongs to.
    Lost,
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

/// Reads the file, if there is one, and lays the environment and the flags over it.
pub(super) fn read(
    path: Option<&Path>,
    overrides: &[(String, String)],
    environment: &[(OsString, OsString)],
) -> Result<Layers, Problems> {
    let shown: Arc<str> = path.map(|path| path.display().to_string()).unwrap_or_default().into();
    let at = |line| Place::File { path: shown.clone(), line };
    let problem = |(line, reason)| Problem { place: at(line), key: "file".into(), reason };
    let text = path.map_or_else(|| Ok(String::new()), read_text);
    let text = text.map_err(|mistake| Problems(vec![problem(mistake)]))?;
    let (table, mistakes, syntax) = parse(text, &at);
    let mut layers = Layers { root: table, problems: mistakes.into_iter().map(problem).collect(), syntax };
    let mut variables: Vec<_> = environment.iter().filter_map(Override::variable).collect();
    variables.sort_by(|a, b| a.place.cmp(&b.place));
    for Override { place, key, text } in variables.into_iter().chain(overrides.iter().map(Override::flag)) {
        let laid = text.and_then(|text| lay_over(&mut layers.root, &place, &key, text));
        if let Err(reason) = laid {
            layers.problems.push(Problem { place, key, reason: reason.into() });
        }
    }
    Ok(layers)
}

fn read_text(path: &Path) -> Result<String, (usize, String)> {
    let refused = |error: io::Error| (1, format!("cannot be read: {error}"));
    let bytes = match fs::metadata(path) {
        // Only a start reads a pipe, which is waited for.
        Ok(found) if !found.is_file() && !found.is_dir() => {
            let mut bytes = Vec::new();
            let read = File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes));
            read.map(|_| bytes)
        }
        _ => files::read(path),
    };
    let bytes = bytes.map_err(refused)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err((1, "is larger than 4 MiB, so it is no configuration".into()));
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        (valid.iter().filter(|byte| **byte == b'\n').count() + 1, "is not UTF-8".into())
    })
}

/// Parses a file, line by line where it must: a line with a mistake is told and left out, and the rest is
/// parsed again, so that one mistake is one line, and an open bracket is not every line behind it.
fn parse(mut text: String, at: &impl Fn(usize) -> Place) -> (Value, Vec<(usize, String)>, Syntax) {
    let mut mistakes = Vec::new();
    let mut syntax = Syntax::Whole;
    loop {
        let lines = Lines::of(&text);
        let (table, errors) = DeTable::parse_recoverable(&text);
        let offset = |error: &toml::de::Error| error.span().map_or(usize::MAX, |span| span.start);
        let Some(error) = errors.iter().min_by_key(|error| offset(error)) else {
            return (
                convert_table(table.get_ref(), at(1), &|offset| at(lines.number(offset))),
                mistakes,
                syntax,
            );
        };
        let number = error.span().map_or_else(|| lines.first_bad(), |span| lines.number(span.start));
        let (number, reason) = lines.cause(number, error.message());
        let range = lines.range(number);
        let line = text[range.clone()].trim();
        let many = mistakes.len() == MAX_SYNTAX;
        mistakes.push((number, if many { "is no TOML either; no more is told".into() } else { reason }));
        if many || line.is_empty() {
            let nothing = Value { place: at(1), kind: Kind::Table(BTreeMap::new()) };
            return (nothing, mistakes, Syntax::Lost);
        }
        let mark = line.find(['[', ']', '"', '\'', '=', '#']).map(|at| line.as_bytes()[at]);
        let is_header = line.starts_with('[') || mark == Some(b']');
        syntax = if is_header || syntax == Syntax::Lost { Syntax::Lost } else { Syntax::Holes };
        // Blanks, so that every other place stays where it is.
        text.replace_range(range.clone(), &" ".repeat(range.len()));
    }
}

/// Where the lines of a text begin.
struct Lines<'a> {
    text: &'a str,
    starts: Vec<usize>,
}

impl<'a> Lines<'a> {
    fn of(text: &'a str) -> Self {
        let starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Self { text, starts }
    }

    /// The line of an offset, from 1.
    fn number(&self, offset: usize) -> usize {
        self.starts.partition_point(|start| *start <= offset)
    }

    /// The bytes of a line, without its newline.
    fn range(&self, number: usize) -> Range<usize> {
        let start = self.starts[number - 1];
        let end = self.starts.get(number).map_or(self.text.len(), |next| next - 1);
        start..end
    }

    /// The first line that makes a text bad, for an error that does not say where it is.
    fn first_bad(&self) -> usize {
        let good = |start: &usize| DeTable::parse(&self.text[..*start]).is_ok();
        self.starts.partition_point(good)
    }

    /// The line to blame for the first error of a text, and the reason. A line that is good by itself is not
    /// to blame where a bracket or a text was left open above it.
    fn cause(&self, number: usize, reason: &str) -> (usize, String) {
        let before = |number: usize| DeTable::parse(&self.text[..self.range(number).start]);
        let innocent = DeTable::parse(&self.text[self.range(number)]).is_ok();
        if innocent && before(number).is_err() {
            for above in (1..number).rev().take(MAX_OPEN) {
                if let (Ok(_), Err(error)) = (before(above), before(above + 1)) {
                    return (above, error.message().to_owned());
                }
            }
        }
        (number, reason.to_owned())
    }
}

/// A value that goes over what the file says.
struct Override {
    place: Place,
    key: String,
    text: Result<String, &'static str>,
}

impl Override {
    fn variable((name, value): &(OsString, OsString)) -> Option<Self> {
        let shown = name.to_string_lossy();
        let rest = shown.strip_prefix(PREFIX)?;
        let text = if rest.is_empty() || rest != rest.to_ascii_uppercase() {
            Err("must be named CCSQM_GATEWAY__SECTION__KEY, in capitals")
        } else {
            value.to_str().map(str::to_owned).ok_or("is not UTF-8")
        };
        let mut key = rest.to_ascii_lowercase().replace("__", ".");
        // A shell cannot name a variable with dashes, and headers have no underscores.
        if let Some(header) = key.strip_prefix(HEADERS) {
            key = format!("{HEADERS}{}", header.replace('_', "-"));
        }
        Some(Self { place: Place::Variable(shown.clone().into_owned()), key, text })
    }

    fn flag((key, text): &(String, String)) -> Self {
        Self { place: Place::Flag(key.clone()), key: key.clone(), text: Ok(text.clone()) }
    }
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

fn lay_over(root: &mut Value, place: &Place, key: &str, text: String) -> Result<(), &'static str> {
    let mut value = root;
    for part in key.split('.') {
        let members = match &mut value.kind {
            Kind::Table(members) => members,
            Kind::List(_) => return Err(FILE_ONLY),
            _ => return Err("lies below a value, where no key can be"),
        };
        let empty = || Value { place: place.clone(), kind: Kind::Table(BTreeMap::new()) };
        value = members.entry(part.to_owned()).or_insert_with(empty);
    }
    match &value.kind {
        Kind::Table(members) if !members.is_empty() => Err("is a section, not a value"),
        Kind::List(items) if items.iter().any(|item| matches!(item.kind, Kind::Table(_))) => Err(FILE_ONLY),
        _ => {
            *value = Value { place: place.clone(), kind: Kind::Loose(text) };
            Ok(())
        }
    }
}
