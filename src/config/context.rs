//! Diagnostics with error recovery: what is known of a configuration while it is read.
//!
//! The context knows where each key is set, what is wrong so far, and which keys are *poisoned*. A key is poisoned if
//! it has a mistake, or if a misspelt key probably means it. Its value is then not what the author intended. Checks
//! that depend on a poisoned key are skipped, so that one mistake is reported once, without its consequences. Compilers
//! recover from errors in the same way.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use ::config::{Value, ValueKind};
use strsim::levenshtein;

use super::Problem;
use super::named_files::NamedFiles;
use super::source::{ConfigLocation, Layers, Syntax};

/// State of one validation, from the merged layers to the last check.
pub(super) struct Context<'a> {
    /// Where relative paths start: the directory of the configuration file.
    pub(super) folder: &'a Path,
    /// How far the file could be parsed.
    pub(super) syntax: Syntax,
    /// Checks the files that values name.
    pub(super) files: &'a dyn NamedFiles,
    /// Where [`super::Config::load_in_time`] finds the key to report if the validation hangs.
    reading: Reading,
    /// The mistakes so far, in the order in which they were found.
    pub(super) problems: Vec<Problem>,
    /// The tables that were read, by their keys.
    tables: BTreeMap<String, Table>,
    /// The place of each key that is set, and how its value is written there.
    locations: HashMap<String, (ConfigLocation, Option<String>)>,
    /// The poisoned keys.
    poisoned: HashSet<String>,
    /// Required keys that are missing. Kept apart from `problems`, since a misspelt key that is found later may
    /// explain them.
    missing: Vec<Problem>,
    /// Known keys of which a misspelling was found. They are not reported as missing.
    misspelt: HashSet<String>,
}

/// The names that a table may have, and those that it has.
struct Table {
    known: Vec<&'static str>,
    given: BTreeSet<String>,
}

/// The place and key of the value whose file is being read, or was read last; `None` before the first one. Shared with
/// the thread that waits for the validation, which reports this key if a file does not answer.
pub(super) type Reading = Arc<Mutex<Option<(ConfigLocation, String)>>>;

impl<'a> Context<'a> {
    /// Returns a context that knows the places of all values, and no problem yet.
    pub(super) fn new(
        layers: &Layers,
        folder: &'a Path,
        files: &'a dyn NamedFiles,
        reading: Reading,
    ) -> Self {
        let mut locations = HashMap::new();
        locate(layers, &layers.root, String::new(), &mut locations);
        Self {
            folder,
            syntax: layers.syntax,
            files,
            reading,
            problems: Vec::new(),
            tables: BTreeMap::new(),
            locations,
            poisoned: HashSet::new(),
            missing: Vec::new(),
            misspelt: HashSet::new(),
        }
    }

    /// Whether the key is set in any layer, even if its value is invalid.
    pub(super) fn is_set(&self, key: &str) -> bool {
        self.locations.contains_key(key)
    }

    /// Whether the value comes from a variable or a flag. Such a value is a text in the layers, whatever its type
    /// should be.
    pub(super) fn is_loose(&self, key: &str) -> bool {
        !matches!(self.location(key), ConfigLocation::File { .. })
    }

    /// Returns the place of a key, or of the innermost section around it that has a place. A key that is missing has
    /// none of its own.
    pub(super) fn location(&self, key: &str) -> &ConfigLocation {
        let found = ancestors(key).find_map(|key| self.locations.get(key));
        found.map_or(&NOWHERE, |(location, _)| location)
    }

    /// Returns the keys that may be set in the tables that were read, including those that are not set.
    pub(super) fn known(&self) -> Vec<String> {
        let names = |(key, table): (&String, &Table)| {
            table.known.iter().map(|name| member(key, name)).collect::<Vec<_>>()
        };
        self.tables.iter().flat_map(names).collect()
    }

    /// Stores `key` in [`Reading`]. Called before the file that the value of `key` names is read.
    pub(super) fn reads(&self, key: &str) {
        let location = self.location(key).clone();
        *self.reading.lock().unwrap_or_else(PoisonError::into_inner) = Some((location, key.to_owned()));
    }

    /// Notes which names the table at `key` may have, and which it has.
    pub(super) fn expect<'n>(
        &mut self,
        key: &str,
        known: &'static [&'static str],
        given: impl Iterator<Item = &'n String>,
    ) {
        // A table with mistakes is read several times, and each reading ends up here: the entry is replaced, not
        // added to.
        self.tables.insert(key.to_owned(), Table { known: known.into(), given: given.cloned().collect() });
    }

    /// Makes `names` unknown in the table at `key`, though its type has them, and drops the mistakes in their
    /// values.
    pub(super) fn exclude(&mut self, key: &str, names: &[&str]) {
        let is_one = |given: &str| names.iter().any(|name| given == member(key, name));
        // The built-in route shares its type with the others, so that a bad `path` in it was read and reported
        // already. Without this it would be reported twice: as a bad path, and as an unknown key.
        self.problems.retain(|problem| !is_one(&problem.key));
        self.poisoned.retain(|given| !is_one(given));
        if let Some(table) = self.tables.get_mut(key) {
            table.known.retain(|name| !names.contains(name));
        }
    }

    /// Adds a mistake at the place of `key`, and poisons the key. If the file is [`Syntax::Lost`] and sets the key, the
    /// key is poisoned but the mistake is not added: it is unknown to which section the line belongs.
    pub(super) fn problem(&mut self, key: &str, reason: impl Into<String>) {
        self.problem_of(key, key, reason);
    }

    /// Adds a mistake at the place of `at`, reported under `key`. The two differ for an item of a list of texts, which
    /// is reported under the key of the list.
    pub(super) fn problem_of(&mut self, at: &str, key: &str, reason: impl Into<String>) {
        self.poisoned.insert(at.to_owned());
        // A terminal shows the value beside the mistake. It is dropped where it may be a secret: in the sections
        // that name files of secrets, in a URL (`https://user:password@…`), and in `require_header`, where the
        // value of a header may have been written for its name.
        let written = self.locations.get(at).and_then(|(_, written)| written.clone());
        let may_be_secret =
            names_secrets(key) || ["token.url", "require_header"].iter().any(|name| key.ends_with(name));
        self.report(at, key, reason.into(), written.filter(|_| !may_be_secret));
    }

    /// Adds a mistake without poisoning a key. Adds none if the file is [`Syntax::Lost`] and the mistake is in the file.
    fn report(&mut self, at: &str, key: &str, reason: String, written: Option<String>) {
        let location = self.location(at).clone();
        // Variables and flags are still reported: they carry their whole key, so a broken table header cannot mislead.
        if self.syntax != Syntax::Lost || !matches!(location, ConfigLocation::File { .. }) {
            self.problems.push(Problem { location, key: key.to_owned(), reason, written });
        }
    }

    /// Notes that a required key is missing, and poisons it. [`Self::report_missing`] reports it later, unless
    /// something explains why it is missing.
    pub(super) fn lacks(&mut self, key: &str, reason: impl Into<String>) {
        let location = self.location(outer(key).unwrap_or_default()).clone();
        self.missing.push(Problem { location, key: key.to_owned(), reason: reason.into(), written: None });
        self.poisoned.insert(key.to_owned());
    }

    /// Notes each of `names` that is missing in the table.
    pub(super) fn require(&mut self, table: &str, names: &[&str]) {
        for name in names {
            let key = member(table, name);
            if !self.is_set(&key) && !self.poisoned.contains(&key) {
                self.lacks(&key, "is missing");
            }
        }
    }

    /// Notes that `name` is missing, if the table has one of `others` without it. A key that is one letter off counts
    /// as one of `others`.
    pub(super) fn require_beside(&mut self, table: &str, name: &str, others: &[&str]) {
        let given = || self.tables.get(table).into_iter().flat_map(|table| &table.given);
        // A misspelt `client_kexy_file` still shows that a client certificate is wanted. Without this tolerance
        // the missing `client_cert_file` would be found only after the misspelling is corrected: two rounds for
        // one mistake each.
        let is_given = |other: &&&str| given().any(|name| levenshtein(other, name) <= 1);
        if let Some(other) = others.iter().find(is_given)
            && !self.is_set(&member(table, name))
        {
            self.lacks(&member(table, name), format!("is needed for {other}"));
        }
    }

    /// Reports each unknown name in each table, with the nearest known name.
    ///
    /// `meant` corrects the names of variables. It takes a variable's name, finds the setting whose variable has the same
    /// name except for underscores, and returns the key of the setting and the right name of the variable.
    pub(super) fn report_unknown(&mut self, meant: impl Fn(&str) -> Option<(String, String)>) {
        for (path, Table { known, given }) in std::mem::take(&mut self.tables) {
            for name in given.iter().filter(|name| !known.contains(&name.as_str())) {
                let key = member(&path, name);
                // Reported already, with a reason of its own: a secret written into the file, for example.
                if self.poisoned.contains(&key) {
                    continue;
                }
                // A variable with the wrong underscores (SERVER_WORKERS for SERVER__WORKERS) lands at the top
                // level, where no name is near. Comparing all settings with its name without doubled underscores
                // finds the one that is meant.
                let variable = match self.location(&key) {
                    ConfigLocation::Variable(variable) => meant(variable),
                    ConfigLocation::File { .. } | ConfigLocation::Flag(_) => None,
                };
                let near = self.nearest(&path, name, &known, &given);
                let reason = match (&variable, near) {
                    (Some((_, variable)), _) => format!("unknown key; the setting is named {variable}"),
                    (None, Some(near)) => format!("unknown key; did you mean `{near}`?"),
                    (None, None) => format!("unknown key; known here: {}", known.join(", ")),
                };
                let meant = variable.map(|(key, _)| key).or_else(|| near.map(|near| member(&path, near)));
                // The key that was meant is poisoned, too. It may have its default now, and a relation that the
                // default breaks would be a second mistake, about a value that the file does not contain.
                self.misspelt.extend(meant.clone());
                self.poisoned.extend(meant.into_iter().chain([key.clone()]));
                // Where secrets are named, the unknown key may be a pasted secret. The table is reported instead,
                // so that the secret does not get into logs.
                let reported = if names_secrets(&path) { path.clone() } else { key.clone() };
                self.report(&key, &reported, reason, None);
            }
            // Put back, since `known` lists the keys of all tables at the end.
            self.tables.insert(path, Table { known, given });
        }
    }

    /// Returns the known name that is closest to an unknown one by edit distance; `None` if none is close. A name that
    /// the table already has counts as two edits farther away. Of equally close names a required one that is missing is
    /// preferred.
    fn nearest(
        &self,
        path: &str,
        name: &str,
        known: &[&'static str],
        given: &BTreeSet<String>,
    ) -> Option<&'static str> {
        // A name that is present already is rarely what a misspelling means. It is not ruled out: a misspelling
        // that is one letter off a present key explained away a missing key that was four letters off.
        let lacks = |known: &str| self.missing.iter().any(|problem| problem.key == member(path, known));
        let near = known.iter().filter_map(|known| {
            let distance = levenshtein(known, name);
            let is_near = distance <= 1 + known.len() / 4;
            is_near.then_some((distance + 2 * usize::from(given.contains(*known)), !lacks(known), *known))
        });
        near.min_by_key(|(distance, is_optional, _)| (*distance, *is_optional)).map(|(.., known)| known)
    }

    /// Reports the missing keys. A key is not reported if its absence is explained: by a misspelt key that probably means
    /// this one, by a poisoned section around it, or by a line that is not TOML.
    pub(super) fn report_missing(&mut self) {
        let missing = std::mem::take(&mut self.missing);
        if self.syntax != Syntax::Whole {
            return;
        }
        let unexplained = missing.into_iter().filter(|problem| {
            // The key itself is skipped: `lacks` has poisoned it.
            let poisoned = ancestors(&problem.key).skip(1).any(|key| self.poisoned.contains(key));
            !poisoned && !self.misspelt.contains(&problem.key)
        });
        self.problems.extend(unexplained);
    }

    /// Poisons these keys, without a mistake of their own.
    pub(super) fn poison(&mut self, keys: &[String]) {
        self.poisoned.extend(keys.iter().cloned());
    }

    /// Whether the key is set and not poisoned.
    pub(super) fn is_good(&self, key: &str) -> bool {
        self.is_set(key) && !self.is_poisoned(key)
    }

    /// Whether the key or a section around it is poisoned.
    pub(super) fn is_poisoned(&self, key: &str) -> bool {
        ancestors(key).any(|key| self.poisoned.contains(key))
    }

    /// Whether the section, a section around it, or anything in it is poisoned.
    pub(super) fn is_poisoned_within(&self, section: &str) -> bool {
        let is_within =
            |key: &String| key.strip_prefix(section).is_some_and(|rest| rest.starts_with(['.', '[']));
        self.is_poisoned(section) || self.poisoned.iter().any(is_within)
    }
}

/// The fallback of [`Context::location`], which must return a reference. It is not reached, since the whole
/// configuration, whose key is empty, always has a place.
static NOWHERE: ConfigLocation = ConfigLocation::Flag(String::new());

/// Adds to `locations` the places of `value`, whose key is `key`, and of all values in it. A table that exists only because
/// of variables or flags has no place of its own; it gets the first of the places of its members.
fn locate(
    layers: &Layers,
    value: &Value,
    key: String,
    locations: &mut HashMap<String, (ConfigLocation, Option<String>)>,
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
        locate(layers, value, key.clone(), locations);
        first = first.into_iter().chain(locations.get(&key).map(|(location, _)| location.clone())).min();
    }
    let own = own.map(|origin| (origin.location.clone(), origin.written.clone()));
    locations.extend(own.or(first.map(|location| (location, None))).map(|location| (key, location)));
}

/// Returns the key of the member `name` of a table. The key of the table is empty for the whole configuration.
pub(super) fn member(table: &str, name: &str) -> String {
    // TOML allows any name in quotes. One such as "callers[0]" or "upstream.base_url" must not pass for the path
    // of another key, or its mistake would poison a value that is right.
    let name = if name.contains(['.', '[', '"']) { format!("{name:?}") } else { name.to_owned() };
    if table.is_empty() { name } else { format!("{table}.{name}") }
}

/// Returns the key itself, then the sections around it from the inside out, and last the empty key of the whole
/// configuration.
fn ancestors(key: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(key), |key| outer(key))
}

/// Returns the key of the section around a key; `None` if the key is that of the whole configuration.
fn outer(key: &str) -> Option<&str> {
    match key.rfind(['.', '[']) {
        Some(at) => Some(&key[..at]),
        None => (!key.is_empty()).then_some(""),
    }
}

/// Whether the key is in a section whose values name secrets. A value or a key that is written there may be a secret,
/// pasted by mistake.
pub(super) fn names_secrets(key: &str) -> bool {
    // `upstream` and `audit` count, since a proxy's password and the chain's key are named there, and `headers` is
    // where a token might be put by mistake.
    let section = key.split(['.', '[']).next();
    matches!(section, Some("credentials" | "upstream" | "audit")) || key.split('.').any(|name| name == "tls")
}
