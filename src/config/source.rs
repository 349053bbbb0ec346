//! Layered configuration source: the file, then environment variables, then flags, merged with the `config` crate.
//!
//! Each value keeps its origin through the merge, so that a mistake can be reported at its line, variable or flag.
//! This module does not know what a key means.
//!
//! A file that is not TOML is parsed with error recovery: a bad line is reported and blanked, and the rest is
//! parsed again, so that all mistakes are reported at once.

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

/// The prefix of the variables that override the file. It ends with two underscores, so that it does not match the
/// variables that Kubernetes sets for a service named `ccsqm-gateway`, such as `CCSQM_GATEWAY_SERVICE_HOST`.
pub(super) const PREFIX: &str = "CCSQM_GATEWAY__";

/// The prefix of keys that end with the name of a header.
const HEADERS: &str = "upstream.headers.";

/// The value that replaces floats, dates and integers beyond 64 bits. No key accepts it, so each of them is refused
/// with the error text of its key.
const NO_VALUE: ValueKind = ValueKind::Float(f64::NAN);

/// The largest file that is read, in bytes. A larger one is not a configuration; the bound also ends the reading of
/// a device.
const MAX_FILE: u64 = 4 << 20;

/// The error for a flag whose index is neither that of an item of the list nor the next one.
const NO_ITEM: &str = "names neither an item of the list nor the next one; items are counted from 0";

/// The most [`Step`]s of a key in a variable or a flag. The TOML parser accepts the same depth of nesting.
// Values are walked recursively: a flag with thousands of names overflowed the stack.
const MAX_STEPS: usize = 80;

/// The longest value that is kept to be shown beside a mistake, in bytes.
// Each level of nested lists keeps its own text. Without a bound a file of 4 MB nested 70 deep took 578 MB.
const MAX_WRITTEN: usize = 200;

/// The most lines that are reported as not TOML. Each costs one more parse of the whole file.
const MAX_SYNTAX: usize = 20;

/// How many lines above an error are searched for a bracket that was left open. Each line costs two parses of the text
/// above it.
const MAX_OPEN: usize = 50;

/// The error for a variable that sets a list of tables or one of its items, and for a flag that sets a list of tables
/// as a whole.
pub(super) const LIST_OF_TABLES: &str = "set a list of tables in the file, or keys of its items by flags, as in --set \
     listeners[0].address=127.0.0.1:8080";

/// Where a value was set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
// The order of the variants is the order of the layers. Problems are sorted by it, and of two spellings of a
// header the greater one wins.
pub(super) enum ConfigLocation {
    File { path: Arc<str>, line: usize },
    Variable(String),
    Flag(String),
}

/// All layers, merged.
pub(super) struct Layers {
    /// The merged values: a table.
    pub(super) root: Value,
    /// The origins of all values. The `config` crate carries a text with each value through the merge; here that text
    /// is the index of the value's origin in this list.
    pub(super) origins: Vec<Origin>,
    /// Lines that are not TOML, and overrides that cannot be applied.
    pub(super) problems: Vec<Problem>,
    /// How far the file could be parsed.
    pub(super) syntax: Syntax,
}

/// The origin of a value.
pub(super) struct Origin {
    /// Where the value was set.
    pub(super) location: ConfigLocation,
    /// The text of the value in the file; `None` for other layers, for tables, for values of several lines, and for
    /// texts of more than [`MAX_WRITTEN`] bytes.
    pub(super) written: Option<String>,
}

/// How much of a file could be parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Syntax {
    /// Everything.
    Whole,
    /// Everything but some lines. What seems to be missing may be on one of them.
    Holes,
    /// A table header such as `[server]` is broken, or the bad lines could not all be skipped. So it is unknown to which
    /// section a line belongs.
    Lost,
}

impl fmt::Display for ConfigLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line } => write!(f, "{path}:{line}"),
            Self::Variable(name) => write!(f, "environment {name}"),
            Self::Flag(key) => write!(f, "--set {key}"),
        }
    }
}

/// Reads the file, if `path` names one. Then applies the variables and after them the flags. Fails if the file cannot
/// be read; other mistakes are in [`Layers::problems`].
pub(super) fn read(
    path: Option<&Path>,
    overrides: &[(String, String)],
    environment: &[(OsString, OsString)],
) -> Result<Layers, Problems> {
    let shown: Arc<str> = path.map(|path| path.display().to_string()).unwrap_or_default().into();
    let at = |line| ConfigLocation::File { path: shown.clone(), line };
    let problem = |(line, reason)| Problem { location: at(line), key: "file".into(), reason, written: None };
    let text = path.map_or_else(|| Ok(String::new()), read_text);
    let text = text.map_err(|mistake| Problems(vec![problem(mistake)]))?;
    let mut origins = Vec::new();
    let mut in_file = |line, written, kind| located(&mut origins, at(line), written, kind);
    let (mut root, mistakes, syntax) = parse(text, &mut in_file);
    let mut problems: Vec<_> = mistakes.into_iter().map(problem).collect();
    let mut variables: Vec<_> = environment.iter().filter_map(Override::variable).collect();
    // The environment has no fixed order. Of `SERVER` and `SERVER__WORKERS` the first one that is applied decides
    // which is refused.
    variables.sort_by(|a, b| a.location.cmp(&b.location));
    for Override { location, key, text } in variables.into_iter().chain(overrides.iter().map(Override::flag))
    {
        // Each override is checked against all that is merged so far, since an item that one flag adds may be set
        // further by the next.
        match text.and_then(|text| fits(&root, &location, &key).map(|()| text)) {
            Ok(text) => {
                let value = located(&mut origins, location, None, ValueKind::String(text));
                lay_over(&mut root, &key, value);
            }
            // The item may be on a line that is not TOML, which is reported already.
            Err(NO_ITEM) if syntax != Syntax::Whole => {}
            Err(reason) => problems.push(Problem { location, key, reason: reason.into(), written: None }),
        }
    }
    Ok(Layers { root, origins, problems, syntax })
}

/// Adds an origin to `origins`, and returns a value that refers to it.
fn located(
    origins: &mut Vec<Origin>,
    location: ConfigLocation,
    written: Option<String>,
    kind: ValueKind,
) -> Value {
    origins.push(Origin { location, written });
    Value::new(Some(&(origins.len() - 1).to_string()), kind)
}

/// Sets a value in the merged layers. The builder of the `config` crate is not used: it copies all layers once
/// more, splits a key in quotes like a path, and loses the origins of tables.
fn lay_over(root: &mut Value, key: &str, value: Value) {
    let layer = if key.contains('[') {
        // Only a key with an item is left to the crate's path parser, which takes fewer names than TOML allows.
        Layer(key.to_owned(), value)
    } else {
        let (first, rest) = key.split_once('.').map_or((key, None), |(first, rest)| (first, Some(rest)));
        // Built from the inside out as tables, whose names may be any text, such as `x-a~b`.
        let names = rest.into_iter().flat_map(|rest| rest.rsplit('.'));
        let inner = names.fold(value, |value, name| Map::from([(name.to_owned(), value)]).into());
        Layer(first.to_owned(), inner)
    };
    // The result is dropped: `Layer::collect` cannot fail.
    drop(layer.collect_to(root));
}

/// One override as a source of the `config` crate: the path of a key, and its value.
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

/// Returns the text of the file, or the line and reason of a mistake.
fn read_text(path: &Path) -> Result<String, (usize, String)> {
    let refused = |error: io::Error| (1, format!("cannot be read: {error}"));
    let bytes = match fs::metadata(path) {
        // `--config /dev/stdin` and `<(…)` are pipes. Only a start reads one, and waits for it. `/dev/zero` never
        // ends, which the bound catches. A directory goes to the reader below, whose error says what it is.
        Ok(found) if !found.is_file() && !found.is_dir() => {
            let mut bytes = Vec::new();
            let read = File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes));
            read.map(|_| bytes)
        }
        _ => files::read(path),
    };
    let bytes = bytes.map_err(refused)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err((1, "is larger than 4 MiB, which is too large for a configuration".into()));
    }
    String::from_utf8(bytes).map_err(|error| {
        // Everything before the first bad byte is valid, so its newlines give the line.
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        (valid.iter().filter(|byte| **byte == b'\n').count() + 1, "is not UTF-8".into())
    })
}

/// Parses a file with error recovery. A line with a mistake is reported and blanked, and the rest is parsed again until
/// nothing is wrong. So an open bracket is one mistake, and not one for every line below it. `make` builds a value with
/// its origin.
///
/// Returns the table, the mistakes with their lines, and how much of the file the table covers.
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
        // The parser recovers by itself, but reports what follows from the first error as further ones. Only the
        // first is certain.
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
        mistakes.push((
            number,
            if many { "is not TOML either; further mistakes are not reported".into() } else { reason },
        ));
        // An empty line cannot be blanked: parsing again would give the same error for ever.
        if many || line.is_empty() {
            return (make(1, None, ValueKind::Table(Map::new())), mistakes, Syntax::Lost);
        }
        // A header without its opening bracket (`listeners]]`) is known by the first of these marks being a
        // closing one.
        let mark = line.find(['[', ']', '"', '\'', '=', '#']).map(|at| line.as_bytes()[at]);
        let is_header = line.starts_with('[') || mark == Some(b']');
        syntax = if is_header || syntax == Syntax::Lost { Syntax::Lost } else { Syntax::Holes };
        // As many blanks as bytes, so that the offsets of all other values stay right.
        text.replace_range(range.clone(), &" ".repeat(range.len()));
    }
}

/// A text, and the offsets at which its lines begin.
struct Lines<'a> {
    text: &'a str,
    starts: Vec<usize>,
}

impl<'a> Lines<'a> {
    fn of(text: &'a str) -> Self {
        let starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Self { text, starts }
    }

    /// The number of the line at an offset, counted from 1. An offset beyond the text is on the last line.
    fn number(&self, offset: usize) -> usize {
        self.starts.partition_point(|start| *start <= offset)
    }

    /// The bytes of a line, without its newline.
    fn range(&self, number: usize) -> Range<usize> {
        let start = self.starts[number - 1];
        let end = self.starts.get(number).map_or(self.text.len(), |next| next - 1);
        start..end
    }

    /// Returns the first line with which the text no longer parses. Used for an error without a span.
    fn first_bad(&self) -> usize {
        // A binary search: a few parses instead of one for each line of a long file.
        let good = |start: &usize| DeTable::parse(&self.text[..*start]).is_ok();
        self.starts.partition_point(good)
    }

    /// Returns the line that caused the first error of a text, and the reason. Usually this is line `number`, where the
    /// parser stopped. If that line parses by itself, the cause may be a bracket or a string that was left open on an
    /// earlier line, which is then returned.
    fn cause(&self, number: usize, reason: &str) -> (usize, String) {
        let before = |number: usize| DeTable::parse(&self.text[..self.range(number).start]);
        let innocent = DeTable::parse(&self.text[self.range(number)]).is_ok();
        if innocent && before(number).is_err() {
            for above in (1..number).rev().take(MAX_OPEN) {
                // The opening line is the one up to which everything parses, and with which it no longer does.
                if let (Ok(_), Err(error)) = (before(above), before(above + 1)) {
                    return (above, error.message().to_owned());
                }
            }
        }
        (number, reason.to_owned())
    }
}

/// A value from a variable or a flag, or why it cannot be used.
struct Override {
    location: ConfigLocation,
    key: String,
    text: Result<String, &'static str>,
}

impl Override {
    /// Returns the override of a variable; `None` if it does not have our prefix.
    fn variable((name, value): &(OsString, OsString)) -> Option<Self> {
        let shown = name.to_string_lossy();
        let rest = shown.strip_prefix(PREFIX)?;
        // A name with our prefix is meant for us. It is refused and not ignored: a setting that silently does
        // nothing is worse than a start that fails.
        let text = if rest.is_empty() || rest != rest.to_ascii_uppercase() {
            Err("must be named CCSQM_GATEWAY__SECTION__KEY, in capitals")
        } else {
            value.to_str().map(str::to_owned).ok_or("is not UTF-8")
        };
        let mut key = rest.to_ascii_lowercase().replace("__", ".");
        // A shell cannot name a variable with dashes, so underscores stand for them. Headers with underscores are
        // rare: nginx, for one, drops them.
        if let Some(header) = key.strip_prefix(HEADERS) {
            key = format!("{HEADERS}{}", header.replace('_', "-"));
        }
        Some(Self { location: ConfigLocation::Variable(shown.clone().into_owned()), key, text })
    }

    fn flag((key, text): &(String, String)) -> Self {
        Self { location: ConfigLocation::Flag(key.clone()), key: key.clone(), text: Ok(text.clone()) }
    }
}

/// Converts a table that begins at `offset`. `make` builds a value with its origin, from the offset and the span of the
/// value.
fn convert_table(
    table: &DeTable<'_>,
    offset: usize,
    make: &mut impl FnMut(usize, Range<usize>, ValueKind) -> Value,
) -> Value {
    let member = |(key, value): (&Spanned<DeString<'_>>, &Spanned<DeValue<'_>>)| {
        (key.get_ref().to_string(), convert(value, key.span().start, make))
    };
    let members = table.iter().map(member).collect();
    // An empty span, so that the text of a table is not kept: only single values are shown beside a mistake.
    make(offset, 0..0, ValueKind::Table(members))
}

/// Converts one value. `offset` is the offset of its key, or of the value itself if it is an item of a list.
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
        // The span of an item in an array of tables is its header, which is the line to name.
        DeValue::Array(items) => {
            ValueKind::Array(items.iter().map(|item| convert(item, item.span().start, make)).collect())
        }
        DeValue::Table(table) => return convert_table(table, offset, make),
    };
    make(offset, value.span(), kind)
}

/// One step of a key: the name of a member, or the index of an item, from 0.
enum Step<'a> {
    Name(&'a str),
    Item(usize),
}

/// Returns the steps of a key such as `listeners[0].address`. Returns `None` if the text is not a key, or has more than
/// [`MAX_STEPS`].
///
/// In a key without an index a name may be any text; unknown names are reported later. In a key with an index a name
/// may contain only letters, digits, `_` and `-`.
fn steps(key: &str) -> Option<Vec<Step<'_>>> {
    let is_plain = |name: &str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    let has_items = key.contains('[');
    let mut steps = Vec::new();
    for part in key.split('.') {
        let (name, mut items) = part.split_at(part.find('[').unwrap_or(part.len()));
        // The `config` crate reads such a key with a parser of its own. A name that it might read differently is
        // refused.
        if has_items && (name.is_empty() || !is_plain(name)) {
            return None;
        }
        steps.push(Step::Name(name));
        while !items.is_empty() {
            let (number, rest) = items.strip_prefix('[')?.split_once(']')?;
            // `parse` alone would take `+1`.
            let is_number = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
            steps.push(Step::Item(number.parse().ok().filter(|_| is_number)?));
            items = rest;
        }
    }
    Some(steps).filter(|steps| steps.len() <= MAX_STEPS)
}

/// Checks that an override replaces a value or adds one. It must not replace a section or a list of tables.
fn fits(root: &Value, location: &ConfigLocation, key: &str) -> Result<(), &'static str> {
    let steps = steps(key).ok_or("is no key, such as server.workers or listeners[0].address")?;
    // Brackets in a variable's name are refused: no shell can set one, and the form for flags is named instead.
    if steps.iter().any(|step| matches!(step, Step::Item(_)))
        && matches!(location, ConfigLocation::Variable(_))
    {
        return Err(LIST_OF_TABLES);
    }
    let mut there = Some(root);
    for step in steps {
        there = match (there.map(|value| &value.kind), step) {
            (Some(ValueKind::Table(members)), Step::Name(name)) => members.get(name),
            (Some(ValueKind::Array(_)), Step::Name(_)) => return Err(LIST_OF_TABLES),
            // The index after that of the last item adds an item. A larger one would leave holes.
            (Some(ValueKind::Array(items)), Step::Item(number)) if number <= items.len() => items.get(number),
            (None, Step::Name(_) | Step::Item(0)) => None,
            (None | Some(ValueKind::Array(_)), Step::Item(_)) => {
                return Err(NO_ITEM);
            }
            _ => return Err("lies below a value, where no key can be"),
        };
    }
    match there.map(|value| &value.kind) {
        // An empty table passes: `headers = {}` has nothing to lose, and its type is checked later.
        Some(ValueKind::Table(members)) if !members.is_empty() => Err("is a section, not a value"),
        Some(ValueKind::Array(items))
            if items.iter().any(|item| matches!(item.kind, ValueKind::Table(_))) =>
        {
            Err(LIST_OF_TABLES)
        }
        _ => Ok(()),
    }
}
