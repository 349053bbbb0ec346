//! Hot reload: callers, limits, routes, contracts, quota, log level and the choice of log lines change while the
//! gateway runs.
//!
//! On SIGHUP, and when the configuration file or a contract has changed, everything is read again, validated and
//! compiled. The new [`State`] then replaces the old one with one atomic swap, so that each request sees one
//! configuration. A reload keeps the usage of rate limits, the tokens, the connections, the idempotency keys and the
//! state of the circuit breaker.
//!
//! A configuration that is invalid, or that changes a setting which needs a restart, is refused as a whole. The refusal
//! is reported once, and the configuration is tried again.

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
use crate::file_watch::{FileChange, FileWatch, POLL, SETTLE, digest};
use crate::files::{Aside, read};
use crate::preflight;
use crate::route::Routes;
use crate::state::{Route, State, compile_routes};

/// The sections that may change. The level of the log and its choice of lines may change, too. Everything else is bound
/// to sockets, files and threads.
const CHANGEABLE: [&str; 3] = ["callers", "routes", "quota"];

/// The time after which a refused configuration is tried again, since a file that it names may have been repaired.
const RETRY: Duration = Duration::from_secs(5);

/// Where the configuration comes from, how to change the log, and how a reload is requested.
pub struct Source {
    /// The configuration file.
    pub path: PathBuf,
    /// The keys and values of `--set` flags, which override the file and the environment.
    pub overrides: Vec<(String, String)>,
    /// Sets the log level, and which requests have a log line.
    pub set_log: Box<dyn Fn(&Log) + Send>,
    /// Requests a reload, such as on SIGHUP. A notification that comes before [`Reload::run`] waits for it is not lost.
    pub asked: Arc<Notify>,
}

/// The task that changes the configuration. There is only one, so changes come one after the other.
pub(crate) struct Reload {
    /// `None` if the configuration came through a pipe, which can be read only once.
    reader: Option<Aside<Reader, Read>>,
    asked: Arc<Notify>,
    set_log: Box<dyn Fn(&Log) + Send>,
    state: Arc<ArcSwap<State>>,
    audit: Audit,
    /// Why the last configuration was refused; `None` after one that was accepted.
    reported: Option<String>,
    change: Change,
}

/// Reads and compiles configurations on the blocking pool: a file may hang, and contracts take time to compile. Neither
/// may delay a token fetch or a shutdown.
struct Reader {
    path: PathBuf,
    overrides: Vec<(String, String)>,
    watch: FileWatch<[u8; 32], Infallible>,
    /// The configuration in effect.
    config: Config,
    /// A digest of the contracts in effect.
    contracts: [u8; 32],
    state: Arc<ArcSwap<State>>,
}

/// The result of one turn of the reader.
enum Read {
    /// No change of any file.
    Nothing,
    /// A change that may not be complete: files may be written in several steps.
    Settling,
    /// A configuration that equals the one in effect.
    Same,
    /// A configuration that cannot be put into effect, and why.
    Refused(String),
    /// A new configuration.
    New(Box<New>),
}

/// A new configuration, compiled.
struct New {
    config: Config,
    routes: Routes<Route>,
    /// What changed, for log and trail.
    changed: Vec<&'static str>,
}

impl Reload {
    /// Prepares reloads from `source`. `config` is the configuration in effect.
    pub(crate) fn new(
        source: Source,
        config: Config,
        state: Arc<ArcSwap<State>>,
        audit: Audit,
        change: Change,
    ) -> Self {
        let Source { path, overrides, set_log, asked } = source;
        // If the file is gone, it counts as one: it may come back, and reading it again then is what an operator
        // expects.
        let is_file = fs::metadata(&path).map_or(true, |found| found.is_file());
        let reader = is_file.then(|| {
            let contracts = contents(&contract_files(&config));
            let watch = watch(&path, &config);
            Aside::new(Reader { path, overrides, watch, config, contracts, state: state.clone() })
        });
        Self { reader, asked, set_log, state, audit, reported: None, change }
    }

    /// Runs until its runtime ends. Dropping the future loses at most a reload that is under way, and never leaves half
    /// of one: the swap is one store.
    pub(crate) async fn run(mut self) {
        let Some(mut reader) = self.reader.take() else {
            tracing::info!("the configuration is not a regular file: it is read once, and never again");
            loop {
                self.asked.notified().await;
                tracing::warn!("the configuration is not a regular file, so it is not read again");
            }
        };
        let mut wait = POLL;
        // When everything is read again without a change of the watched files: what was refused may be good by
        // then, and a file may have changed while the configuration was read, at the start, too.
        let mut again = Some(Instant::now() + POLL);
        loop {
            let is_asked = tokio::select! {
                () = self.asked.notified() => true,
                () = sleep(wait) => false,
            };
            let is_due = is_asked || again.is_some_and(|again| again <= Instant::now());
            let mut has_hung = false;
            let read = loop {
                match reader.run(move |reader| reader.check(is_due)).await {
                    Ok(read) => break read,
                    Err(hangs) => self.report(Err(hangs.to_string())),
                }
                has_hung = true;
            };
            // This answer was asked for before the files hung. The next look is due at once, so that the error
            // about the hang is cleared.
            again = if has_hung { Some(Instant::now()) } else { again };
            wait = if matches!(read, Read::Settling) { SETTLE } else { POLL };
            let taken = match read {
                Read::Nothing | Read::Settling => continue,
                Read::Same => Ok(Vec::new()),
                Read::Refused(reason) => Err(reason),
                Read::New(new) => Ok(self.take(*new)),
            };
            let is_changed = taken.as_ref().is_ok_and(|changed| !changed.is_empty());
            self.report(taken);
            // After a change the digest of the files may be newer than what was read of them. One more reading
            // finds that.
            let later = if is_changed { Some(POLL) } else { self.reported.is_some().then_some(RETRY) };
            again = later.map(|later| Instant::now() + later);
        }
    }

    /// Puts a configuration into effect, and returns what changed.
    fn take(&self, New { config, routes, changed }: New) -> Vec<&'static str> {
        // `successor` changes the quota and the callers' limits in place, so that the usage of each limit is kept. The
        // new limits apply to requests that are under way, too.
        let state = self.state.load().successor(&config, routes);
        self.state.store(Arc::new(state));
        (self.set_log)(&config.log);
        changed
    }

    /// Reports the result of a reload to the log, the trail, the metrics and `/status`. A success is reported if
    /// something changed, or if the last configuration was refused. A failure is reported if its reason is not that of
    /// the last one.
    fn report(&mut self, taken: Result<Vec<&'static str>, String>) {
        match taken {
            Ok(changed) => {
                let was_bad = self.reported.take().is_some();
                if was_bad || !changed.is_empty() {
                    self.change.accepted();
                }
                if was_bad && changed.is_empty() {
                    tracing::info!("the configuration is good again, and the same as the one in effect");
                }
                if !changed.is_empty() {
                    tracing::info!(changed = changed.join(", "), "the configuration changed");
                    self.record([("result", json!("accepted")), ("changed", json!(changed))]);
                }
            }
            // A refused file is tried every few seconds. One line for each try would bury the log.
            Err(reason) if self.reported.as_ref() == Some(&reason) => {}
            Err(reason) => {
                self.change.refused(&reason);
                tracing::error!(reason, "the configuration is rejected; the old one stays in effect");
                self.record([("result", json!("refused")), ("reason", json!(reason))]);
                self.reported = Some(reason);
            }
        }
    }

    /// Queues the event `reload` for the trail.
    fn record(&self, details: [(&str, Value); 2]) {
        let details = details.map(|(name, value)| (name.to_owned(), value));
        self.audit.event("reload", Map::from_iter(details));
    }
}

impl Reader {
    /// Checks the files, and reads everything if one has changed or `is_due`. Blocks.
    fn check(&mut self, is_due: bool) -> Read {
        match self.watch.poll() {
            FileChange::Settling if !is_due => Read::Settling,
            FileChange::Nothing if !is_due => Read::Nothing,
            _ => self.read().unwrap_or_else(Read::Refused),
        }
    }

    /// Reads and compiles everything. What it returns as new must be put into effect before the next turn, since
    /// the reader already counts it as in effect.
    fn read(&mut self) -> Result<Read, String> {
        // A pipe in the place of the file would block the reader until something writes to it.
        is_regular(&self.path)?;
        let config = preflight::load(&self.path, &self.overrides, std::env::vars_os());
        let mut config = config.map_err(|problems| problems.to_string())?;
        keep_max_keys(&self.config, &mut config)?;
        // Compared as JSON: one comparison for all sections, and a default that is written out is no change.
        let (old, new) = (self.config.effective(), config.effective());
        if let Some(fixed) = fixed(&old, &new) {
            return Err(format!("{fixed} cannot change while the gateway runs: restart it"));
        }
        // Contracts are compared by content: their paths are part of the routes, and usually stay the same when a
        // file changes.
        let contracts = contents(&contract_files(&config));
        let mut changed: Vec<_> =
            CHANGEABLE.into_iter().filter(|section| old[section] != new[section]).collect();
        changed.extend((contracts != self.contracts).then_some("contracts"));
        changed.extend((self.config.log.level != config.log.level).then_some("log.level"));
        changed.extend((self.config.log.requests != config.log.requests).then_some("log.requests"));
        if changed.is_empty() {
            return Ok(Read::Same);
        }
        // The routes in effect are passed in, so that cool-downs of routes with the same name go on: a reload must
        // not start token fetches again that they hold back.
        let routes =
            compile_routes(&config, Some(&self.state.load().routes)).map_err(|error| error.to_string())?;
        self.watch = watch(&self.path, &config);
        (self.config, self.contracts) = (config.clone(), contracts);
        Ok(Read::New(Box::new(New { config, routes, changed })))
    }
}

/// Fails for anything but a regular file. Only a start may read a configuration from a pipe.
fn is_regular(path: &Path) -> Result<(), String> {
    // If the file cannot be found, the reader's error says more.
    let is_other = fs::metadata(path).is_ok_and(|found| !found.is_file());
    if is_other { Err(format!("{} is not a regular file", path.display())) } else { Ok(()) }
}

/// Watches the files that make up a configuration; their content now counts as known.
fn watch(path: &Path, config: &Config) -> FileWatch<[u8; 32], Infallible> {
    let mut files = contract_files(config);
    files.push(path.to_owned());
    let seen = contents(&files);
    let watched = files.clone();
    FileWatch::new(watched, move || Ok(contents(&files)), seen)
}

/// Carries the effective `idempotency.max_keys` over to the new configuration if neither the old configuration nor the
/// new one sets it. Its default depends on the callers, who may change, but the tables that it bounds have a fixed
/// size. Fails if the `max_keys` of a caller is greater.
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

/// Returns the names of the sections that differ but cannot change while the gateway runs; `None` if there are none.
fn fixed(old: &Value, new: &Value) -> Option<String> {
    let sections = new.as_object()?.keys();
    let changed = |section: &&String| match section.as_str() {
        "log" => old["log"]["format"] != new["log"]["format"],
        section => !CHANGEABLE.contains(&section) && old[section] != new[section],
    };
    let names: Vec<_> = sections.filter(changed).map(String::as_str).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

/// Returns the paths of the contract files, each once: several routes may share one.
fn contract_files(config: &Config) -> Vec<PathBuf> {
    let files: BTreeSet<_> = config.routes.iter().filter_map(|route| route.contract_file.clone()).collect();
    files.into_iter().collect()
}

/// Returns a digest of the contents of the files. For a file that cannot be read, the error text is hashed instead, so
/// that the digest changes when a file becomes unreadable or readable, or fails in another way.
fn contents(files: &[PathBuf]) -> [u8; 32] {
    let parts: Vec<_> =
        files.iter().map(|file| read(file).unwrap_or_else(|error| error.to_string().into())).collect();
    digest(parts.iter().map(Vec::as_slice))
}
