//! A configuration that changes while the gateway runs: callers, limits, routes, contracts, quota, log level, and which
//! requests have a log line.
//!
//! On SIGHUP, and when the file or a contract has changed, everything is read anew, validated and compiled; then it is
//! swapped at once, so that each request sees one configuration. What is remembered stays: limits keep what is spent
//! of them, and tokens, connections, keys and the breaker are not touched. One that is bad, or that changes what
//! cannot change, changes nothing; it is told once.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use serde_json::{Map, Value, json};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use crate::audit::Audit;
use crate::changes::Change;
use crate::config::{Config, Log};
use crate::files::{Aside, read};
use crate::preflight;
use crate::route::Routes;
use crate::state::{Route, State, compile_routes};
use crate::watched::{Noticed, POLL, SETTLE, Watched, digest};

/// The sections that may change, and the log's level and requests. The rest is bound to sockets, files and threads.
const CHANGEABLE: [&str; 3] = ["callers", "routes", "quota"];

/// What was refused is tried again after this time.
const RETRY: Duration = Duration::from_secs(5);

/// Where a configuration comes from, who asks for it again, and who hears of what is new for the log.
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// What goes over it, after the environment.
    pub overrides: Vec<(String, String)>,
    /// Sets the level of the log, and which requests have a line.
    pub set_log: Box<dyn Fn(&Log) + Send>,
    /// Whoever wants it read again, such as SIGHUP, notifies. It may have done so before the start was over.
    pub asked: Arc<Notify>,
}

/// The one task that changes the configuration.
pub(crate) struct Reload {
    /// `None`: it came through a pipe, and can be read only once.
    reader: Option<Aside<Reader, Read>>,
    asked: Arc<Notify>,
    set_log: Box<dyn Fn(&Log) + Send>,
    state: Arc<ArcSwap<State>>,
    audit: Audit,
    /// Why the last one was refused.
    told: Option<String>,
    change: Change,
}

/// Reads and compiles, on a thread of its own: files may hang, and contracts take time.
struct Reader {
    path: PathBuf,
    overrides: Vec<(String, String)>,
    watched: Watched<[u8; 32], Infallible>,
    /// What is in effect.
    config: Config,
    contracts: [u8; 32],
    state: Arc<ArcSwap<State>>,
}

/// What a reader found.
enum Read {
    /// Nothing, or nothing new.
    Nothing,
    /// A change that may go on.
    Settling,
    /// A configuration like the one in effect.
    Same,
    /// One that cannot be taken, and why.
    Refused(String),
    /// Another one.
    New(Box<New>),
}

/// Another configuration, compiled.
struct New {
    config: Config,
    routes: Routes<Route>,
    /// What is new in it.
    changed: Vec<&'static str>,
}

impl Reload {
    /// `config` is what is in effect.
    pub(crate) fn new(
        source: Source,
        config: Config,
        state: Arc<ArcSwap<State>>,
        audit: Audit,
        change: Change,
    ) -> Self {
        let Source { path, overrides, set_log, asked } = source;
        let is_file = fs::metadata(&path).map_or(true, |found| found.is_file());
        let reader = is_file.then(|| {
            let contracts = contents(&contract_files(&config));
            let watched = watch(&path, &config);
            Aside::new(Reader { path, overrides, watched, config, contracts, state: state.clone() })
        });
        Self { reader, asked, set_log, state, audit, told: None, change }
    }

    /// Runs until its runtime ends.
    pub(crate) async fn run(mut self) {
        let Some(mut reader) = self.reader.take() else {
            tracing::info!(
                "the configuration comes from no regular file: it is read once, and does not change"
            );
            loop {
                self.asked.notified().await;
                tracing::warn!("the configuration comes from no regular file, and is not read again");
            }
        };
        let mut wait = POLL;
        // Another look is due: what was refused may be good by then, and what was taken, now or at the start, may have
        // changed while it was.
        let mut again = Some(Instant::now() + POLL);
        loop {
            let is_asked = tokio::select! {
                () = self.asked.notified() => true,
                () = sleep(wait) => false,
            };
            let is_due = is_asked || again.is_some_and(|again| again <= Instant::now());
            let mut has_hung = false;
            let read = loop {
                match reader.run(move |reader| reader.turn(is_due)).await {
                    Ok(read) => break read,
                    Err(hangs) => self.tell(Err(hangs.to_string())),
                }
                has_hung = true;
            };
            // What answers now was asked before: the next look is due, so that what was told of the hang is taken back.
            again = if has_hung { Some(Instant::now()) } else { again };
            wait = if matches!(read, Read::Settling) { SETTLE } else { POLL };
            let taken = match read {
                Read::Nothing | Read::Settling => continue,
                Read::Same => Ok(Vec::new()),
                Read::Refused(reason) => Err(reason),
                Read::New(new) => Ok(self.take(*new)),
            };
            let is_changed = taken.as_ref().is_ok_and(|changed| !changed.is_empty());
            self.tell(taken);
            let later = if is_changed { Some(POLL) } else { self.told.is_some().then_some(RETRY) };
            again = later.map(|later| Instant::now() + later);
        }
    }

    /// Puts a configuration into effect.
    fn take(&self, New { config, routes, changed }: New) -> Vec<&'static str> {
        let state = self.state.load().successor(&config, routes);
        self.state.store(Arc::new(state));
        (self.set_log)(&config.log);
        changed
    }

    fn tell(&mut self, taken: Result<Vec<&'static str>, String>) {
        match taken {
            Ok(changed) => {
                let was_bad = self.told.take().is_some();
                if was_bad || !changed.is_empty() {
                    self.change.accepted();
                }
                if was_bad && changed.is_empty() {
                    tracing::info!("the configuration is good again; nothing in it is new");
                }
                if !changed.is_empty() {
                    tracing::info!(changed = changed.join(", "), "the configuration changed");
                    self.record([("result", json!("accepted")), ("changed", json!(changed))]);
                }
            }
            Err(reason) if self.told.as_ref() == Some(&reason) => {}
            Err(reason) => {
                self.change.refused(&reason);
                tracing::error!(reason, "the configuration is not taken; the old one stays in effect");
                self.record([("result", json!("refused")), ("reason", json!(reason))]);
                self.told = Some(reason);
            }
        }
    }

    fn record(&self, details: [(&str, Value); 2]) {
        let details = details.map(|(name, value)| (name.to_owned(), value));
        self.audit.event("reload", Map::from_iter(details));
    }
}

impl Reader {
    /// Looks whether something has changed, and reads everything if it has, or if that is due.
    fn turn(&mut self, is_due: bool) -> Read {
        match self.watched.look() {
            Noticed::Settling if !is_due => Read::Settling,
            Noticed::Nothing if !is_due => Read::Nothing,
            _ => self.read().unwrap_or_else(Read::Refused),
        }
    }

    /// Reads and compiles all. What is new will be in effect before the next turn.
    fn read(&mut self) -> Result<Read, String> {
        is_regular(&self.path)?;
        let config = preflight::load(&self.path, &self.overrides, std::env::vars_os());
        let mut config = config.map_err(|problems| problems.to_string())?;
        keep_max_keys(&self.config, &mut config)?;
        let (old, new) = (self.config.effective(), config.effective());
        if let Some(fixed) = fixed(&old, &new) {
            return Err(format!("{fixed} cannot change while the gateway runs: restart it"));
        }
        let contracts = contents(&contract_files(&config));
        let mut changed: Vec<_> =
            CHANGEABLE.into_iter().filter(|section| old[section] != new[section]).collect();
        changed.extend((contracts != self.contracts).then_some("contracts"));
        changed.extend((self.config.log.level != config.log.level).then_some("log.level"));
        changed.extend((self.config.log.requests != config.log.requests).then_some("log.requests"));
        if changed.is_empty() {
            return Ok(Read::Same);
        }
        let routes =
            compile_routes(&config, Some(&self.state.load().routes)).map_err(|error| error.to_string())?;
        self.watched = watch(&self.path, &config);
        (self.config, self.contracts) = (config.clone(), contracts);
        Ok(Read::New(Box::new(New { config, routes, changed })))
    }
}

/// Only a start reads a configuration from anything else.
fn is_regular(path: &Path) -> Result<(), String> {
    let is_other = fs::metadata(path).is_ok_and(|found| !found.is_file());
    if is_other { Err(format!("{} is not a regular file", path.display())) } else { Ok(()) }
}

/// The files that make up a configuration, as they are now.
fn watch(path: &Path, config: &Config) -> Watched<[u8; 32], Infallible> {
    let mut files = contract_files(config);
    files.push(path.to_owned());
    let seen = contents(&files);
    let watched = files.clone();
    Watched::new(watched, move || Ok(contents(&files)), seen)
}

/// A default of `idempotency.max_keys` follows the callers, who may change. While the gateway runs, the one in effect stays: it
/// must suffice for them.
fn keep_max_keys(old: &Config, new: &mut Config) -> Result<(), String> {
    if old.idempotency.is_max_keys_set || new.idempotency.is_max_keys_set {
        return Ok(());
    }
    let max_keys = old.idempotency.max_keys;
    if let Some(i) = new.callers.iter().position(|caller| caller.max_keys > Some(max_keys)) {
        return Err(format!(
            "callers[{i}].max_keys is more than idempotency.max_keys, which is {max_keys} and cannot change while the gateway \
             runs: restart it"
        ));
    }
    new.idempotency.max_keys = max_keys;
    Ok(())
}

/// What of a configuration would change that cannot.
fn fixed(old: &Value, new: &Value) -> Option<String> {
    let sections = new.as_object()?.keys();
    let changed = |section: &&String| match section.as_str() {
        "log" => old["log"]["format"] != new["log"]["format"],
        section => !CHANGEABLE.contains(&section) && old[section] != new[section],
    };
    let names: Vec<_> = sections.filter(changed).map(String::as_str).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

fn contract_files(config: &Config) -> Vec<PathBuf> {
    let files: BTreeSet<_> = config.routes.iter().filter_map(|route| route.contract_file.clone()).collect();
    files.into_iter().collect()
}

/// A file that cannot be read is told from any that can, by why.
fn contents(files: &[PathBuf]) -> [u8; 32] {
    let parts: Vec<_> =
        files.iter().map(|file| read(file).unwrap_or_else(|error| error.to_string().into())).collect();
    digest(parts.iter().map(Vec::as_slice))
}
