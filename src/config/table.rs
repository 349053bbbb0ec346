//! One table of a configuration, read key by key. What was not asked for is unknown.
//!
//! Every reading method takes a key, and goes on with a default after a mistake.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::Problem;
use super::named_files::NamedFiles;
use super::raw::{FILE_ONLY, Kind, Place, Syntax, Value};
use super::values::{parse_duration, parse_size};

/// What is known across all tables.
pub(super) struct Context<'a> {
    pub(super) folder: &'a Path,
    pub(super) syntax: Syntax,
    /// Looks at what the values name.
    pub(super) files: &'a dyn NamedFiles,
    reading: Reading,
    pub(super) problems: Vec<Problem>,
    /// Every key that was looked for, for the test that holds the reference file against the code.
    pub(super) asked: Vec<String>,
    /// Names that must be those of something else, resolved when all is read.
    pub(super) references: Vec<Reference>,
    /// Where each key stands that stands anywhere.
    places: HashMap<String, Place>,
    /// Keys that do not have the value that somebody meant. What seems to follow from it is not told: one
    /// mistake is one line.
    doubtful: HashSet<String>,
    /// What should be somewhere and is not.
    lacking: Vec<Problem>,
    /// Keys of which a misspelling was found.
    misspelt: HashSet<String>,
    /// Indexes of the problems that are unknown keys of variables.
    unknown_variables: Vec<usize>,
}

/// Where the value stands whose file is being read, and its key. `None`: the configuration itself is.
pub(super) type Reading = Arc<Mutex<Option<(Place, String)>>>;

/// A name that must be that of something else.
pub(super) struct Reference {
    pub(super) to: Referent,
    pub(super) found: Found<String>,
}

/// What can be referred to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Referent {
    Credential,
    Route,
}

impl<'a> Context<'a> {
    pub(super) fn new(folder: &'a Path, syntax: Syntax, files: &'a dyn NamedFiles, reading: Reading) -> Self {
        Self {
            folder,
            syntax,
            files,
            reading,
            problems: Vec::new(),
            asked: Vec::new(),
            references: Vec::new(),
            places: HashMap::new(),
            doubtful: HashSet::new(),
            lacking: Vec::new(),
            misspelt: HashSet::new(),
            unknown_variables: Vec::new(),
        }
    }

    /// Whether somebody set this key, well or not.
    pub(super) fn is_set(&self, key: &str) -> bool {
        self.places.contains_key(key)
    }

    /// From now on what a value names is read.
    pub(super) fn reads(&self, place: &Place, key: &str) {
        *self.reading.lock().unwrap_or_else(PoisonError::into_inner) = Some((place.clone(), key.to_owned()));
    }

    /// The same, of a value that may stand nowhere.
    pub(super) fn reads_at(&self, key: &str) {
        if let Some(place) = ancestors(key).find_map(|key| self.places.get(key)) {
            self.reads(place, key);
        }
    }

    /// A mistake in a value that is there. Where nobody knows which section a line of the file belongs to,
    /// nothing is said of it.
    pub(super) fn problem(&mut self, place: &Place, key: impl Into<String>, reason: impl Into<String>) {
        let key = key.into();
        self.doubtful.insert(key.clone());
        self.tell(place, key, reason);
    }

    fn tell(&mut self, place: &Place, key: String, reason: impl Into<String>) {
        if self.syntax != Syntax::Lost || !matches!(place, Place::File { .. }) {
            self.problems.push(Problem { place: place.clone(), key, reason: reason.into() });
        }
    }

    /// A mistake between values, at the place of `key` or of the section around it.
    pub(super) fn problem_at(&mut self, key: &str, reason: impl Into<String>) {
        let place = ancestors(key).find_map(|key| self.places.get(key)).cloned();
        if let Some(place) = place {
            self.problem(&place, key, reason);
        }
    }

    /// Tells what is missing, unless a misspelling here or around it, or a line that is no TOML, explains it.
    pub(super) fn tell_what_lacks(&mut self) {
        let lacking = std::mem::take(&mut self.lacking);
        if self.syntax != Syntax::Whole {
            return;
        }
        let unexplained = lacking.into_iter().filter(|problem| {
            let doubtful = ancestors(&problem.key).skip(1).any(|key| self.doubtful.contains(key));
            !doubtful && !self.misspelt.contains(&problem.key)
        });
        self.problems.extend(unexplained);
    }

    /// Tells of each variable with an unknown key which setting was meant. `meant` finds that by the variable's name: the
    /// setting's key, and the name of its variable.
    pub(super) fn name_unknown_variables(&mut self, meant: impl Fn(&str) -> Option<(String, String)>) {
        for index in std::mem::take(&mut self.unknown_variables) {
            let Problem { place: Place::Variable(name), reason, .. } = &mut self.problems[index] else {
                continue;
            };
            if let Some((key, name)) = meant(name) {
                *reason = format!("unknown key; the setting is named {name}");
                self.misspelt.insert(key.clone());
                self.doubtful.insert(key);
            }
        }
    }

    /// Notes a name that must be that of something else.
    pub(super) fn refer(&mut self, to: Referent, found: Found<String>) -> String {
        let name = found.value.clone();
        self.references.push(Reference { to, found });
        name
    }

    /// Whether a key, or the section around it, does not have the value that somebody meant.
    pub(super) fn is_doubtful(&self, key: &str) -> bool {
        ancestors(key).any(|key| self.doubtful.contains(key))
    }

    /// The same of a section as a whole: with anything in it.
    pub(super) fn is_doubtful_within(&self, section: &str) -> bool {
        self.is_doubtful(section) || self.doubtful.iter().any(|key| is_within(key, section))
    }
}

/// Whether a key stands in a section, or in an item of a list.
fn is_within(key: &str, section: &str) -> bool {
    key.strip_prefix(section).is_some_and(|rest| rest.starts_with(['.', '[']))
}

/// A key and the sections around it, the whole configuration (an empty key) last.
fn ancestors(key: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(key), |key| outer(key))
}

fn outer(key: &str) -> Option<&str> {
    match key.rfind(['.', '[']) {
        Some(at) => Some(&key[..at]),
        None => (!key.is_empty()).then_some(""),
    }
}

/// One table while it is read: what is left at the end is unknown.
pub(super) struct Table {
    pub(super) path: String,
    pub(super) place: Place,
    pub(super) members: BTreeMap<String, Value>,
    known: Vec<&'static str>,
    /// Of these, those that are there.
    given: Vec<&'static str>,
    lacking: Vec<&'static str>,
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
        context.places.insert(path.clone(), place.clone());
        let members = match kind {
            Kind::Table(members) => members,
            _ => {
                context.problem(&place, path.clone(), "must be a table");
                BTreeMap::new()
            }
        };
        Self { path, place, members, known: Vec::new(), given: Vec::new(), lacking: Vec::new() }
    }

    pub(super) fn key(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    pub(super) fn take(&mut self, context: &mut Context<'_>, name: &'static str) -> Option<Value> {
        self.known.push(name);
        let key = self.key(name);
        context.asked.push(key.clone());
        let value = self.members.remove(name)?;
        self.given.push(name);
        context.places.insert(key, value.place.clone());
        Some(value)
    }

    /// Whether a key is there that was not taken yet, perhaps with a slip in its name.
    pub(super) fn seems_given(&self, name: &str) -> bool {
        self.members.keys().any(|key| distance(name, key) <= 1)
    }

    /// Something should be here and is not.
    pub(super) fn lacks(&mut self, context: &mut Context<'_>, name: &'static str, reason: impl Into<String>) {
        let problem = Problem { place: self.place.clone(), key: self.key(name), reason: reason.into() };
        context.doubtful.insert(problem.key.clone());
        context.lacking.push(problem);
        self.lacking.push(name);
    }

    pub(super) fn section(&mut self, context: &mut Context<'_>, name: &'static str) -> Self {
        let empty = Value { place: self.place.clone(), kind: Kind::Table(BTreeMap::new()) };
        let value = self.take(context, name).unwrap_or(empty);
        Self::open(context, self.key(name), value)
    }

    pub(super) fn section_if_any(&mut self, context: &mut Context<'_>, name: &'static str) -> Option<Self> {
        let value = self.take(context, name)?;
        Some(Self::open(context, self.key(name), value))
    }

    pub(super) fn tables(&mut self, context: &mut Context<'_>, name: &'static str) -> Vec<Self> {
        let Some(value) = self.take(context, name) else { return Vec::new() };
        let key = self.key(name);
        let items = match (value.kind, &value.place) {
            (Kind::List(items), _) => items,
            (_, Place::File { .. }) => {
                context.problem(&value.place, key, format!("must be written as [[{name}]]"));
                return Vec::new();
            }
            (_, Place::Variable(_) | Place::Flag(_)) => {
                context.problem(&value.place, key, FILE_ONLY);
                return Vec::new();
            }
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
            self.lacks(context, name, "is missing");
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
        let default = parse(default).unwrap_or_default();
        self.parsed(context, name, default, |text| between(text, bounds, parse))
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
        self.parsed(context, name, default, |text| between(text, bounds, parse))
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
        if value.is_empty() {
            context.problem(&place, key, "must not be empty");
            return None;
        }
        Some(Found { value: context.folder.join(value), place, key })
    }

    /// The key that somebody probably meant by an unknown one: of those that are not there the nearest, rather one that lacks.
    fn meant(&self, name: &str) -> Option<&'static str> {
        let absent = self.known.iter().copied().filter(|known| !self.given.contains(known));
        let (lacking, optional): (Vec<_>, Vec<_>) = absent.partition(|known| self.lacking.contains(known));
        nearest(name, lacking.into_iter().chain(optional))
            .or_else(|| nearest(name, self.known.iter().copied()))
    }

    /// Whatever was not asked for is unknown.
    pub(super) fn close(self, context: &mut Context<'_>) {
        for (name, value) in &self.members {
            // Where secrets are named, somebody may have pasted one.
            let key = if self.names_secrets() { self.path.clone() } else { self.key(name) };
            let reason = match self.meant(name) {
                Some(meant) => {
                    context.misspelt.insert(self.key(meant));
                    context.doubtful.insert(self.key(meant));
                    format!("unknown key; did you mean `{meant}`?")
                }
                None => format!("unknown key; known here: {}", self.known.join(", ")),
            };
            context.doubtful.insert(self.key(name));
            if matches!(value.place, Place::Variable(_)) {
                context.unknown_variables.push(context.problems.len());
            }
            context.tell(&value.place, key, reason);
        }
    }

    fn names_secrets(&self) -> bool {
        let (path, _) = self.path.split_once('[').unwrap_or((&self.path, ""));
        matches!(path, "credentials" | "upstream" | "audit") || self.path.ends_with(".tls")
    }
}

/// The nearest name that is near enough.
fn nearest(name: &str, known: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    // The first of those that are equally near.
    let near = known.map(|known| (distance(known, name), known)).min_by_key(|(distance, _)| *distance)?;
    (near.0 <= 1 + near.1.len() / 4).then_some(near.1)
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

/// A quantity that lies within bounds, which are written as it is.
fn between<T: PartialOrd + Default>(
    text: &str,
    (low, high): (&str, &str),
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<T, String> {
    let value = parse(text)?;
    let within = (parse(low).unwrap_or_default()..=parse(high).unwrap_or_default()).contains(&value);
    within.then_some(value).ok_or(format!("must be from {low} to {high}"))
}
