//! A configuration that changes while the gateway runs: callers, limits, routes, contracts, quota, log level.
//!
//! On SIGHUP, and when the file or a contract has changed, everything is read anew, validated and compiled; then it is
//! swapped at once, so that each request sees one configuration. What is remembered stays: limits keep what is spent
//! of them, and tokens, connections, keys and the breaker are not touched. One that is bad, or that changes what
//! cannot change, changes nothing; it is told once.

use std::{convert::Infallible, fs, path::PathBuf, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use serde_json::{Map, Value, json};
use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{Instant, sleep},
};

use crate::{
    audit::Audit,
    config::{Config, ContractSource},
    state::State,
    watched::{Noticed, POLL, SETTLE, Watched, digest},
};

/// The sections that may change, and the log's level. The rest is bound to sockets, files and threads.
const CHANGEABLE: [&str; 3] = ["callers", "routes", "quota"];

/// What was refused is tried again after this time.
const RETRY: Duration = Duration::from_secs(5);

/// Where a configuration comes from, who asks for it again, and who hears of a new log level.
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// What goes over it, after the environment.
    pub overrides: Vec<(String, String)>,
    /// Sets the level of the log.
    pub set_level: Box<dyn Fn(&str) + Send>,
    /// Whoever wants it read again, such as SIGHUP, notifies. It may have done so before the start was over.
    pub asked: Arc<Notify>,
}

/// The one task that changes the configuration.
pub(crate) struct Reload {
    source: Source,
    /// What is in effect.
    config: Config,
    contracts: [u8; 32],
    state: Arc<ArcSwap<State>>,
    audit: Audit,
    /// Why the last one was refused.
    told: Option<String>,
}

impl Reload {
    /// `config` is what is in effect.
    pub(crate) fn new(source: Source, config: Config, state: Arc<ArcSwap<State>>, audit: Audit) -> Self {
        let contracts = contents(&contract_files(&config));
        Self { source, config, contracts, state, audit, told: None }
    }

    /// Runs until its runtime ends.
    pub(crate) async fn run(mut self) {
        let mut watched = self.watch();
        let mut wait = POLL;
        // Another look is due: what was refused may be good by then, and what was taken, now or at the start, may have
        // changed while it was.
        let mut again = Some(Instant::now() + POLL);
        loop {
            let is_asked = tokio::select! {
                () = self.source.asked.notified() => true,
                () = sleep(wait) => false,
            };
            let noticed = watched.look();
            wait = if matches!(noticed, Noticed::Settling) { SETTLE } else { POLL };
            let is_due = again.is_some_and(|again| again <= Instant::now());
            if is_asked || is_due || matches!(noticed, Noticed::Changed(_)) {
                let is_changed = self.reload().await;
                if is_changed {
                    watched = self.watch();
                }
                let later = if is_changed { Some(POLL) } else { self.told.is_some().then_some(RETRY) };
                again = later.map(|later| Instant::now() + later);
            }
        }
    }

    /// The files that make up the configuration.
    fn watch(&self) -> Watched<[u8; 32], Infallible> {
        let mut files = contract_files(&self.config);
        files.push(self.source.path.clone());
        let seen = contents(&files);
        Watched::new(move || Ok(contents(&files)), seen)
    }

    /// Whether another configuration is in effect.
    #[expect(clippy::disallowed_methods, reason = "on the background runtime, where no request waits")]
    async fn reload(&mut self) -> bool {
        let (path, overrides) = (self.source.path.clone(), self.source.overrides.clone());
        let load = move || Config::load(&path, &overrides, std::env::vars_os());
        let taken = match spawn_blocking(load).await {
            Ok(Ok(config)) => self.take(config),
            Ok(Err(problems)) => Err(problems.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let is_changed = taken.as_ref().is_ok_and(|changed| !changed.is_empty());
        self.tell(taken);
        is_changed
    }

    /// Puts a configuration into effect, and says what is new in it.
    fn take(&mut self, config: Config) -> Result<Vec<&'static str>, String> {
        let (old, new) = (self.config.effective(), config.effective());
        if let Some(fixed) = fixed(&old, &new) {
            return Err(format!("{fixed} cannot change while the gateway runs: restart it"));
        }
        let contracts = contents(&contract_files(&config));
        let mut changed: Vec<_> =
            CHANGEABLE.into_iter().filter(|section| old[section] != new[section]).collect();
        changed.extend((contracts != self.contracts).then_some("contracts"));
        changed.extend((self.config.log.level != config.log.level).then_some("log.level"));
        if !changed.is_empty() {
            let state = self.state.load().successor(&config).map_err(|error| error.to_string())?;
            self.state.store(Arc::new(state));
            (self.source.set_level)(&config.log.level);
            (self.config, self.contracts) = (config, contracts);
        }
        Ok(changed)
    }

    fn tell(&mut self, taken: Result<Vec<&'static str>, String>) {
        match taken {
            Ok(changed) => {
                self.told = None;
                if !changed.is_empty() {
                    tracing::info!(changed = changed.join(", "), "the configuration changed");
                    self.record([("result", json!("accepted")), ("changed", json!(changed))]);
                }
            }
            Err(reason) if self.told.as_ref() == Some(&reason) => {}
            Err(reason) => {
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
    let file = |source: &ContractSource| match source {
        ContractSource::BuiltIn => None,
        ContractSource::File(path) => Some(path.clone()),
    };
    config.routes.iter().filter_map(|route| file(&route.contract)).collect()
}

/// A file that cannot be read is told from any that can, by why.
fn contents(files: &[PathBuf]) -> [u8; 32] {
    let parts: Vec<_> =
        files.iter().map(|file| fs::read(file).unwrap_or_else(|error| error.to_string().into())).collect();
    digest(parts.iter().map(Vec::as_slice))
}
