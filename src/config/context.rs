//! What is known of a configuration while it is read: where each key stands, which do not have the value that somebody
//! meant, and what is wrong.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use ::config::{Value, ValueKind};
use strsim::levenshtein;

use super::Problem;
use super::named_files::NamedFiles;
use super::source::{Layers, Place, Syntax};

pub(super) struct Context<'a> {
    pub(super) folder: &'a Path,
    pub(super) syntax: Syntax,
    /// Looks at what the values name.
    pub(super) files: &'a dyn NamedFiles,
    reading: Reading,
    pub(super) problems: Vec<Problem>,
    /// The tables that were read, by their keys.
    tables: BTreeMap<String, Table>,
    /// Where each key stands that stands anywhere, and how its value is written there.
    places: HashMap<String, (Place, Option<String>)>,
    /// Keys that do not have the value that somebody meant. What seems to follow from it is not told: one
    /// mistake is one line.
    doubtful: HashSet<String>,
    /// What should be somewhere and is not.
    lacking: Vec<Problem>,
    /// Keys of which a misspelling was found.
    misspelt: HashSet<String>,
}

/// The names in a table: those that are known, and those that are there.
struct Table {
    known: Vec<&'static str>,
    given: BTreeSet<String>,
}

/// Where the value stands whose file is being read, and its key. `None`: the configuration itself is.
pub(super) type Reading = Arc<Mutex<Option<(Place, String)>>>;

impl<'a> Context<'a> {
    pub(super) fn new(
        layers: &Layers,
        folder: &'a Path,
        files: &'a dyn NamedFiles,
        reading: Reading,
    ) -> Self {
        let mut places = HashMap::new();
        locate(layers, &layers.root, String::new(), &mut places);
        Self {
            folder,
            syntax: layers.syntax,
            files,
            reading,
            problems: Vec::new(),
            tables: BTreeMap::new(),
            places,
            doubtful: HashSet::new(),
            lacking: Vec::new(),
            misspelt: HashSet::new(),
        }
    }

    /// Whether somebody set this key, well or not.
    pub(super) fn is_set(&self, key: &str) -> bool {
        self.places.contains_key(key)
    }

    /// Whether a value comes from a variable or a flag: it is a text, whatever it stands for.
    pub(super) fn is_loose(&self, key: &str) -> bool {
        !matches!(self.place(key), Place::File { .. })
    }

    /// Where a key stands, or the section around it.
    pub(super) fn place(&self, key: &str) -> &Place {
        let found = ancestors(key).find_map(|key| self.places.get(key));
        found.map_or(&NOWHERE, |(place, _)| place)
    }

    /// All keys that the tables may have which were read.
    pub(super) fn known(&self) -> Vec<String> {
        let names = |(key, table): (&String, &Table)| {
            table.known.iter().map(|name| member(key, name)).collect::<Vec<_>>()
        };
        self.tables.iter().flat_map(names).collect()
    }

    /// From now on what a value names is read.
    pub(super) fn reads(&self, key: &str) {
        let place = self.place(key).clone();
        *self.reading.lock().unwrap_or_else(PoisonError::into_inner) = Some((place, key.to_owned()));
    }

    /// Notes which names a table may hold, and which it does.
    pub(super) fn expect<'n>(
        &mut self,
        key: &str,
        known: &'static [&'static str],
        given: impl Iterator<Item = &'n String>,
    ) {
        self.tables.insert(key.to_owned(), Table { known: known.into(), given: given.cloned().collect() });
    }

    /// Makes names unknown to a table whose type has them. Mistakes in their values are forgotten: the names are told as unknown.
    pub(super) fn exclude(&mut self, key: &str, names: &[&str]) {
        let is_one = |told: &str| names.iter().any(|name| told == member(key, name));
        self.problems.retain(|problem| !is_one(&problem.key));
        self.doubtful.retain(|told| !is_one(told));
        if let Some(table) = self.tables.get_mut(key) {
            table.known.retain(|name| !names.contains(name));
        }
    }

    /// A mistake in a value, or between values, at the place of a key. Where nobody knows which section a line of the file
    /// belongs to, nothing is said of it.
    pub(super) fn problem(&mut self, key: &str, reason: impl Into<String>) {
        self.problem_of(key, key, reason);
    }

    /// Adds a mistake at the place of `at` that is told under `key`: for an item of a list of texts, the key of the list.
    pub(super) fn problem_of(&mut self, at: &str, key: &str, reason: impl Into<String>) {
        self.doubtful.insert(at.to_owned());
        let written = self.places.get(at).and_then(|(_, written)| written.clone());
        let may_be_secret =
            names_secrets(key) || ["token.url", "require_header"].iter().any(|name| key.ends_with(name));
        self.tell(at, key, reason.into(), written.filter(|_| !may_be_secret));
    }

    fn tell(&mut self, at: &str, key: &str, reason: String, written: Option<String>) {
        let place = self.place(at).clone();
        if self.syntax != Syntax::Lost || !matches!(place, Place::File { .. }) {
            self.problems.push(Problem { place, key: key.to_owned(), reason, written });
        }
    }

    /// Notes a key that is required and missing.
    pub(super) fn lacks(&mut self, key: &str, reason: impl Into<String>) {
        let place = self.place(outer(key).unwrap_or_default()).clone();
        self.lacking.push(Problem { place, key: key.to_owned(), reason: reason.into(), written: None });
        self.doubtful.insert(key.to_owned());
    }

    /// Requires keys in a table.
    pub(super) fn require(&mut self, table: &str, names: &[&str]) {
        for name in names {
            let key = member(table, name);
            if !self.is_set(&key) && !self.doubtful.contains(&key) {
                self.lacks(&key, "is missing");
            }
        }
    }

    /// Requires a key if the table has one of the others, which may be misspelt by one letter.
    pub(super) fn require_beside(&mut self, table: &str, name: &str, others: &[&str]) {
        let given = || self.tables.get(table).into_iter().flat_map(|table| &table.given);
        let is_given = |other: &&&str| given().any(|name| levenshtein(other, name) <= 1);
        if let Some(other) = others.iter().find(is_given)
            && !self.is_set(&member(table, name))
        {
            self.lacks(&member(table, name), format!("is needed for {other}"));
        }
    }

    /// Tells of each name that no table has. `meant` finds the setting of a variable: its key, and the name of its variable.
    pub(super) fn tell_unknown(&mut self, meant: impl Fn(&str) -> Option<(String, String)>) {
        for (path, Table { known, given }) in std::mem::take(&mut self.tables) {
            for name in given.iter().filter(|name| !known.contains(&name.as_str())) {
                let key = member(&path, name);
                if self.doubtful.contains(&key) {
                    continue; // told already
                }
                let variable = match self.place(&key) {
                    Place::Variable(variable) => meant(variable),
                    Place::File { .. } | Place::Flag(_) => None,
                };
                let near = self.nearest(&path, name, &known, &given);
                let reason = match (&variable, near) {
                    (Some((_, variable)), _) => format!("unknown key; the setting is named {variable}"),
                    (None, Some(near)) => format!("unknown key; did you mean `{near}`?"),
                    (None, None) => format!("unknown key; known here: {}", known.join(", ")),
                };
                let meant = variable.map(|(key, _)| key).or_else(|| near.map(|near| member(&path, near)));
                self.misspelt.extend(meant.clone());
                self.doubtful.extend(meant.into_iter().chain([key.clone()]));
                // Where secrets are named, somebody may have pasted one.
                let told = if names_secrets(&path) { path.clone() } else { key.clone() };
                self.tell(&key, &told, reason, None);
            }
            self.tables.insert(path, Table { known, given });
        }
    }

    /// Returns the known name that is closest to an unknown one by edit distance, if any is close. A name that the table already
    /// holds counts two edits more. Of equally close names a missing required one is returned.
    fn nearest(
        &self,
        path: &str,
        name: &str,
        known: &[&'static str],
        given: &BTreeSet<String>,
    ) -> Option<&'static str> {
        let lacks = |known: &str| self.lacking.iter().any(|problem| problem.key == member(path, known));
        let near = known.iter().filter_map(|known| {
            let distance = levenshtein(known, name);
            let is_near = distance <= 1 + known.len() / 4;
            is_near.then_some((distance + 2 * usize::from(given.contains(*known)), !lacks(known), *known))
        });
        near.min_by_key(|(distance, is_optional, _)| (*distance, *is_optional)).map(|(.., known)| known)
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

    /// These keys do not have the value that somebody meant.
    pub(super) fn doubt(&mut self, keys: &[String]) {
        self.doubtful.extend(keys.iter().cloned());
    }

    /// Whether somebody set this key, and well as far as is known.
    pub(super) fn is_good(&self, key: &str) -> bool {
        self.is_set(key) && !self.is_doubtful(key)
    }

    /// Whether a key, or the section around it, does not have the value that somebody meant.
    pub(super) fn is_doubtful(&self, key: &str) -> bool {
        ancestors(key).any(|key| self.doubtful.contains(key))
    }

    /// The same of a section as a whole: with anything in it.
    pub(super) fn is_doubtful_within(&self, section: &str) -> bool {
        let is_within =
            |key: &String| key.strip_prefix(section).is_some_and(|rest| rest.starts_with(['.', '[']));
        self.is_doubtful(section) || self.doubtful.iter().any(is_within)
    }
}

/// Of no key: the whole configuration has a place.
static NOWHERE: Place = Place::Flag(String::new());

/// Notes where each value stands. A table that variables or flags made stands where the first of them does.
fn locate(
    layers: &Layers,
    value: &Value,
    key: String,
    places: &mut HashMap<String, (Place, Option<String>)>,
) {
    let own = value.origin().and_then(|number| layers.origins.get(number.parse::<usize>().ok()?));
    let mut inner = Vec::new();
    match &value.kind {
        ValueKind::Table(members) => {
            inner.extend(members.iter().map(|(name, value)| (member(&key, name), value)));
        }
        ValueKind::Array(items) => {
            inner.extend(items.iter().enumerate().map(|(i, value)| (format!("{key}[{i}]"), value)));
        }
        _ => {}
    }
    let mut first = None;
    for (key, value) in inner {
        locate(layers, value, key.clone(), places);
        first = first.into_iter().chain(places.get(&key).map(|(place, _)| place.clone())).min();
    }
    let own = own.map(|origin| (origin.place.clone(), origin.written.clone()));
    places.extend(own.or(first.map(|place| (place, None))).map(|place| (key, place)));
}

/// The key of a name in a table.
pub(super) fn member(table: &str, name: &str) -> String {
    // A name in quotes may look like a path.
    let name = if name.contains(['.', '[', '"']) { format!("{name:?}") } else { name.to_owned() };
    if table.is_empty() { name } else { format!("{table}.{name}") }
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

/// Whether secrets are named at a key, or in a table.
pub(super) fn names_secrets(key: &str) -> bool {
    let section = key.split(['.', '[']).next();
    matches!(section, Some("credentials" | "upstream" | "audit")) || key.split('.').any(|name| name == "tls")
}
