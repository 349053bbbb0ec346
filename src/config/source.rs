//! The layers of the configuration, merged by the `config` crate: the file, then variables, then flags.
//!
//! Knows nothing of what a key means. The origin of each value is its place, which survives the merge. A file that is
//! not TOML is read as far as its mistakes let it be, so that all of them are told at once.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::{fmt, fs, io};

use ::config::{ConfigError, Map, Source, Value, ValueKind};
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use super::{Problem, Problems};
use crate::files;

/// The prefix of the variables that override the file. Kubernetes' own variables for a service of this name
/// (`CCSQM_GATEWAY_SERVICE_HOST`, …) do not have the second underscore.
pub(super) const PREFIX: &str = "CCSQM_GATEWAY__";

/// The table whose keys are names of headers.
const HEADERS: &str = "upstream.headers.";

/// Floats, dates and integers beyond 64 bits: no key takes one.
const NO_VALUE: ValueKind = ValueKind::Float(f64::NAN);

/// Nobody writes a longer one; whatever is longer is some other file.
const MAX_FILE: u64 = 4 << 20;

/// Why a flag cannot reach an item.
const NO_ITEM: &str = "names no item of the list, and not the next one: they are counted from 0";

/// As deep as TOML may be nested.
const MAX_STEPS: usize = 80;

/// The longest value that is shown beside a mistake, in bytes. Nested lists would be kept once a level otherwise.
const MAX_WRITTEN: usize = 200;

/// So many lines that are not TOML are told.
const MAX_SYNTAX: usize = 20;

/// So many lines above an error are searched for the bracket that was left open.
const MAX_OPEN: usize = 50;

/// Why a variable cannot reach into a list of tables, and a flag not the list as a whole.
pub(super) const LIST_OF_TABLES: &str = "lists of tables can be set in the file, and their items by flags, as in --set listeners[0].address=127.0.0.1:8080";

/// Where a value stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    File { path: Arc<str>, line: usize },
    Variable(String),
    Flag(String),
}

/// All layers, one over the other.
pub(super) struct Layers {
    pub(super) root: Value,
    /// The origin of a value is its number here.
    pub(super) origins: Vec<Origin>,
    /// What is wrong so far.
    pub(super) problems: Vec<Problem>,
    /// How far the file can be believed.
    pub(super) syntax: Syntax,
}

/// Where a value stands, and how it is written there, if that is short and on one line of the file.
pub(super) struct Origin {
    pub(super) place: Place,
    pub(super) written: Option<String>,
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
    let problem = |(line, reason)| Problem { place: at(line), key: "file".into(), reason, written: None };
    let text = path.map_or_else(|| Ok(String::new()), read_text);
    let text = text.map_err(|mistake| Problems(vec![problem(mistake)]))?;
    let mut origins = Vec::new();
    let mut in_file = |line, written, kind| located(&mut origins, at(line), written, kind);
    let (mut root, mistakes, syntax) = parse(text, &mut in_file);
    let mut problems: Vec<_> = mistakes.into_iter().map(problem).collect();
    let mut variables: Vec<_> = environment.iter().filter_map(Override::variable).collect();
    variables.sort_by(|a, b| a.place.cmp(&b.place));
    for Override { place, key, text } in variables.into_iter().chain(overrides.iter().map(Override::flag)) {
        match text.and_then(|text| fits(&root, &place, &key).map(|()| text)) {
            Ok(text) => {
                let value = located(&mut origins, place, None, ValueKind::String(text));
                lay_over(&mut root, &key, value);
            }
            // The item may stand on a line that is no TOML.
            Err(NO_ITEM) if syntax != Syntax::Whole => {}
            Err(reason) => problems.push(Problem { place, key, reason: reason.into(), written: None }),
        }
    }
    Ok(Layers { root, origins, problems, syntax })
}

/// A value that remembers where it stands.
fn located(origins: &mut Vec<Origin>, place: Place, written: Option<String>, kind: ValueKind) -> Value {
    origins.push(Origin { place, written });
    Value::new(Some(&(origins.len() - 1).to_string()), kind)
}

/// Lays a value over what is there. Not by the crate's builder, which forgets where tables stand.
fn lay_over(root: &mut Value, key: &str, value: Value) {
    let layer = if key.contains('[') {
        Layer(key.to_owned(), value) // the crate reads the path
    } else {
        let (first, rest) = key.split_once('.').map_or((key, None), |(first, rest)| (first, Some(rest)));
        // Tables, whose names may be any.
        let names = rest.into_iter().flat_map(|rest| rest.rsplit('.'));
        let inner = names.fold(value, |value, name| Map::from([(name.to_owned(), value)]).into());
        Layer(first.to_owned(), inner)
    };
    // No source fails here: its value is there.
    drop(layer.collect_to(root));
}

/// A value that goes over those below it, with its key, which is a path.
#[derive(Clone, Debug)]
struct Layer(String, Value);

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, ConfigError> {
        Ok(Map::from([(self.0.clone(), self.1.clone())]))
    }
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
fn parse(
    mut text: String,
    make: &mut impl FnMut(usize, Option<String>, ValueKind) -> Value,
) -> (Value, Vec<(usize, String)>, Syntax) {
    let mut mistakes = Vec::new();
    let mut syntax = Syntax::Whole;
    loop {
        let lines = Lines::of(&text);
        let (table, errors) = DeTable::parse_recoverable(&text);
        let offset = |error: &toml::de::Error| error.span().map_or(usize::MAX, |span| span.start);
        let Some(error) = errors.iter().min_by_key(|error| offset(error)) else {
            let mut make = |offset, span: Range<usize>, kind| {
                let fits = (1..=MAX_WRITTEN).contains(&span.len());
                let written = text.get(span).filter(|written| fits && !written.contains('\n'));
                make(lines.number(offset), written.map(str::to_owned), kind)
            };
            return (convert_table(table.get_ref(), 0, &mut make), mistakes, syntax);
        };
        let number = error.span().map_or_else(|| lines.first_bad(), |span| lines.number(span.start));
        let (number, reason) = lines.cause(number, error.message());
        let range = lines.range(number);
        let line = text[range.clone()].trim();
        let many = mistakes.len() == MAX_SYNTAX;
        mistakes.push((number, if many { "is no TOML either; no more is told".into() } else { reason }));
        if many || line.is_empty() {
            return (make(1, None, ValueKind::Table(Map::new())), mistakes, Syntax::Lost);
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

/// A table and the offset at which it begins. `make` locates a value by its offset and its span.
fn convert_table(
    table: &DeTable<'_>,
    offset: usize,
    make: &mut impl FnMut(usize, Range<usize>, ValueKind) -> Value,
) -> Value {
    let member = |(key, value): (&Spanned<DeString<'_>>, &Spanned<DeValue<'_>>)| {
        (key.get_ref().to_string(), convert(value, key.span().start, make))
    };
    let members = table.iter().map(member).collect();
    make(offset, 0..0, ValueKind::Table(members))
}

fn convert(
    value: &Spanned<DeValue<'_>>,
    offset: usize,
    make: &mut impl FnMut(usize, Range<usize>, ValueKind) -> Value,
) -> Value {
    let kind = match value.get_ref() {
        DeValue::String(text) => ValueKind::String(text.to_string()),
        DeValue::Integer(integer) => {
            i64::from_str_radix(integer.as_str(), integer.radix()).map_or(NO_VALUE, ValueKind::I64)
        }
        DeValue::Boolean(boolean) => ValueKind::Boolean(*boolean),
        DeValue::Float(_) | DeValue::Datetime(_) => NO_VALUE,
        // A table of an array of tables spans its header, which is the line to name.
        DeValue::Array(items) => {
            ValueKind::Array(items.iter().map(|item| convert(item, item.span().start, make)).collect())
        }
        DeValue::Table(table) => return convert_table(table, offset, make),
    };
    make(offset, value.span(), kind)
}

/// One step of the path of a key.
enum Step<'a> {
    Name(&'a str),
    Item(usize),
}

/// The steps of a key such as `listeners[0].address`. The `config` crate reads paths of the same form. A name without an item is
/// any text: what is no name of a key is told as an unknown one.
fn steps(key: &str) -> Option<Vec<Step<'_>>> {
    let is_plain = |name: &str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    let has_items = key.contains('[');
    let mut steps = Vec::new();
    for part in key.split('.') {
        let (name, mut items) = part.split_at(part.find('[').unwrap_or(part.len()));
        if has_items && (name.is_empty() || !is_plain(name)) {
            return None;
        }
        steps.push(Step::Name(name));
        while !items.is_empty() {
            let (number, rest) = items.strip_prefix('[')?.split_once(']')?;
            let is_number = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
            steps.push(Step::Item(number.parse().ok().filter(|_| is_number)?));
            items = rest;
        }
    }
    Some(steps).filter(|steps| steps.len() <= MAX_STEPS)
}

/// Whether an override goes over what is there: it replaces a value or adds one, and no table.
fn fits(root: &Value, place: &Place, key: &str) -> Result<(), &'static str> {
    let steps = steps(key).ok_or("is no key, such as server.workers or listeners[0].address")?;
    if steps.iter().any(|step| matches!(step, Step::Item(_))) && matches!(place, Place::Variable(_)) {
        return Err(LIST_OF_TABLES);
    }
    let mut there = Some(root);
    for step in steps {
        there = match (there.map(|value| &value.kind), step) {
            (Some(ValueKind::Table(members)), Step::Name(name)) => members.get(name),
            (Some(ValueKind::Array(_)), Step::Name(_)) => return Err(LIST_OF_TABLES),
            // One more than there are is added.
            (Some(ValueKind::Array(items)), Step::Item(number)) if number <= items.len() => items.get(number),
            (None, Step::Name(_) | Step::Item(0)) => None,
            (None | Some(ValueKind::Array(_)), Step::Item(_)) => {
                return Err(NO_ITEM);
            }
            _ => return Err("lies below a value, where no key can be"),
        };
    }
    match there.map(|value| &value.kind) {
        Some(ValueKind::Table(members)) if !members.is_empty() => Err("is a section, not a value"),
        Some(ValueKind::Array(items))
            if items.iter().any(|item| matches!(item.kind, ValueKind::Table(_))) =>
        {
            Err(LIST_OF_TABLES)
        }
        _ => Ok(()),
    }
}
