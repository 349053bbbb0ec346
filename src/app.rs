//! Composition root: turns a configuration into a running gateway, supervises it and stops it.
//!
//! It is the only module that knows all parts. It builds and binds everything before it serves, so that a start which
//! fails has served no request. It decides nothing about requests.

mod beside;
mod drain;
mod file_changes;
mod sockets;
mod worker;

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use std::{io, net, thread};

use arc_swap::ArcSwap;
use http::uri::Authority;
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, oneshot, watch};

use crate::admin::Admin;
use crate::audit::{Audit, Early, OpenError, Unfinished};
use crate::concurrency::Limits;
use crate::config::trail::{LOW_WATER, SLACK};
use crate::config::{Config, LOOPBACK_NOTICE, ListenAddress};
use crate::connect::{Connector, Egress};
use crate::control::Resources;
use crate::gateway::Gateway;
use crate::idempotency::Idempotency;
use crate::idempotency::memory::KeyMemory;
use crate::metrics::Metrics;
use crate::model::audit_fields::REDACTABLE;
use crate::reload::{Reload, Source};
use crate::secret::needles;
use crate::server::connection::Deadlines;
use crate::server::inherited::Inherited;
use crate::server::{BoundListener, Lifecycle};
use crate::state::{State, compile_routes};
use crate::supervisor::{Supervisor, Vital, Vitals, fault};
use crate::token::Slot;
use crate::upstream::pool;
use crate::upstream::pool::Pool;
use crate::watchdog::Watchdog;
use crate::{admin, audit, config, control};
use beside::{check_each_second, read_past};
use drain::drain;
use file_changes::watch;
use worker::{StopTerms, Worker, join, of_worker, share};

pub use crate::supervisor::UnexpectedEnd;
pub use sockets::BindError;

/// The least number of records that may wait for the audit writer. Each exchange reserves room for two: its intent
/// and its outcome.
const AUDIT_QUEUE: usize = 16 * 1024;

/// An intent that is not committed within this time is rejected with 503, so that a stuck disk does not hold callers
/// up.
const INTENT_DEADLINE: Duration = Duration::from_millis(250);

/// A gateway that is built and bound, and does not serve yet.
pub struct App {
    config: Config,
    background: Runtime,
    state: Arc<ArcSwap<State>>,
    audit: Audit,
    idempotency: Arc<Idempotency>,
    metrics: Arc<Metrics>,
    pool_metrics: pool::ConnectionMetrics,
    connector: Connector,
    /// The `:authority` of upstream requests, if HTTP/2 is offered.
    http2: Option<Authority>,
    egress: Egress,
    limits: Arc<Limits>,
    // Nothing is sent. Each `InFlightPermit` of a connection or request holds a sender, so `done` ends when the last one is
    // dropped.
    alive: mpsc::Sender<()>,
    done: mpsc::Receiver<()>,
    bound: Vec<BoundListener>,
    admin: net::TcpListener,
    control: Option<control::BoundSocket>,
}

impl App {
    /// Builds a gateway: compiles the configuration, opens the audit trail, reads the secrets and binds all
    /// listeners.
    ///
    /// `accept_loss` is the word by which the operator accepts a loss of the audit trail.
    ///
    /// # Errors
    ///
    /// Fails if any of this fails. No request was served then, but the trail may have been opened.
    pub fn build(config: Config, accept_loss: Option<String>) -> anyhow::Result<Self> {
        // First, before there are threads: it changes the environment.
        let mut inherited = Inherited::from_env()?;
        let background = Builder::new_current_thread().enable_all().build()?;
        let (metrics, parts, audit_metrics) = Metrics::new();
        let (egress, connector, http2) = outward(&config)?;
        let options = audit_options(&config, accept_loss.clone());
        // Before the trail is opened: under too low a limit on file sizes its first segment could not be written to
        // its end.
        audit::limit::check(&config).map_err(OpenError::from)?;
        let audit = Audit::start(&options, audit_metrics)?;
        let idempotency = Arc::new(Idempotency::new(&config.idempotency, &audit, accept_loss));
        let slots = slots(&config, &egress, &parts.token, &audit)?;
        let state = Arc::new(ArcSwap::from_pointee(State::new(&config, slots, parts.upstream)?));
        let (alive, done) = mpsc::channel(1);
        let limits = Arc::new(Limits::new(&config.server, &alive));
        // Late, since a bound socket makes callers wait: whatever can fail before has been done.
        let bound = sockets::bind(&config, &mut inherited)?;
        // After all listeners have taken theirs. A socket that is left would hold its callers up forever.
        inherited.finish()?;
        let admin = sockets::bind_admin(&config)?;
        let control = sockets::bind_control(&config)?;
        let metrics = Arc::new(metrics);
        let pool_metrics = parts.pool;
        Ok(Self {
            config,
            background,
            state,
            audit,
            idempotency,
            metrics,
            pool_metrics,
            connector,
            http2,
            egress,
            limits,
            alive,
            done,
            bound,
            admin,
            control,
        })
    }

    /// Checks whether a start would succeed, were the gateway that runs now with this configuration gone. Changes
    /// nothing.
    ///
    /// `file` is the file of the configuration. Returns warnings: what may stop a start nevertheless.
    ///
    /// # Errors
    ///
    /// Fails as [`App::build`] would.
    pub fn dry_run(config: &Config, file: &Path) -> anyhow::Result<Vec<String>> {
        outward(config)?;
        // In the order of `build`, so that both report the same mistake first.
        audit::limit::check(config).map_err(OpenError::from)?;
        audit::dry_run(&audit_options(config, None))?;
        compile_routes(config, None)?;
        sockets::check(config, file)
    }

    /// The addresses of the listeners, with the real ports.
    pub fn addresses(&self) -> impl Iterator<Item = &ListenAddress> {
        self.bound.iter().map(|bound| &bound.address)
    }

    /// Closes the audit trail of a gateway that has served nothing.
    ///
    /// # Errors
    ///
    /// Returns [`UnexpectedEnd`] if the trail could not be written to its end.
    pub fn discard(self) -> anyhow::Result<()> {
        close(&self.audit, None).map_or(Ok(()), |ended| Err(ended.into()))
    }

    /// Serves until `stop` completes, then drains: no new connections, requests in flight run to their end or to
    /// `drain_timeout`, and the audit trail closes last.
    ///
    /// With a `source` the configuration can change meanwhile: see [`crate::reload`]. Blocks the calling thread.
    ///
    /// # Errors
    ///
    /// Returns [`UnexpectedEnd`] if a thread or a task ended that must not; the gateway drains before that. Fails if a thread
    /// cannot be started, before any request was served.
    // The order matters in some places:
    // * The trail is read before the workers start: until that is done, calls with a key get 503.
    // * If all sockets are inherited (`hands_over`), the next process accepts on them at once, so callers need no grace.
    // * `begin` is sent when all threads are there. Had one failed to start, the others would have served already, and
    //   their requests would be cut off.
    // * Tasks of the background runtime run only as long as `block_on` drives it, which is to the end of the drain: a
    //   request in flight may still need a token.
    // * `join` comes after the drain, and the trail is closed after `join`: records close themselves when a worker drops
    //   what is left.
    // * The first thread or task that ended counts as the cause. One that ended during the drain is still looked for, or
    //   the exit code would hide it.
    // * `admin` is dropped last, so that `/readyz` and `/metrics` answer to the end.
    // * `shutdown_background` does not wait: a file or a resolver that hangs must not hold up the stop.
    pub fn run(mut self, stop: impl Future<Output = ()>, source: Option<Source>) -> anyhow::Result<()> {
        self.log_start()?;
        let mut supervisor = Supervisor::new();
        read_past(&self, supervisor.vital("the reading of the trail"))?;
        watch(&self, &supervisor);
        self.background.spawn(check_each_second(self.audit.clone(), supervisor.vitals()));
        let (stopping, stopped) = watch::channel(Lifecycle::Serving);
        let (begin, may_begin) = watch::channel(false);
        let (accepts, accepting) = watch::channel(0);
        let hands_over = self.bound.iter().all(|bound| bound.is_inherited);
        let watchdog = Watchdog::from_env(self.config.server.workers);
        let admin = self.admin_state(source.as_ref(), accepting.clone(), watchdog.clone())?;
        let change = self.metrics.changes.of("configuration");
        let (config, state, audit) = (self.config.clone(), self.state.clone(), self.audit.clone());
        let reload = source.map(|source| Reload::new(source, config, state, audit, change));
        let workers = self.start_workers(&StopTerms {
            stopped,
            grace: if hands_over { Duration::ZERO } else { self.config.server.drain_grace },
            watchdog: watchdog.clone(),
            may_begin,
            accepts,
            vitals: supervisor.vitals(),
        })?;
        let Self { config, background, state, audit, idempotency, limits, alive, mut done, control, .. } =
            self;
        let admin = serve_admin(self.admin, Arc::new(admin), supervisor.vital("the admin listener"))?;
        begin.send_replace(true);
        let ended = background.block_on(async {
            for slot in &state.load().terms.slots {
                let vital = supervisor.vital(format!("the token fetcher of {}", slot.name()));
                tokio::spawn(vital.run(slot.clone().run()));
            }
            if let Some(reload) = reload {
                tokio::spawn(supervisor.vital("the reload of the configuration").run(reload.run()));
            }
            if let Some(bound) = control {
                let vital = supervisor.vital("the commit waiters of the control socket");
                let (audit, directory) = (audit.for_worker(vital), config.audit.directory.clone());
                let control = Arc::new(Resources { audit, directory, idempotency });
                tokio::spawn(supervisor.vital("the control socket").run(bound.serve(control)));
            }
            tokio::spawn(watchdog.clone().beat_background());
            let watching = watchdog.watch(stopping.subscribe());
            let ready = ready(accepting, config.server.workers, watching);
            tokio::spawn(supervisor.vital("the watchdog").run(ready));
            let ended = tokio::select! {
                () = stop => None,
                ended = supervisor.ended() => Some(ended),
            };
            drain(&config.server, hands_over, &limits, &stopping, alive, &mut done).await;
            ended
        });
        let hangs = join(&workers);
        let ended = close(&audit, ended.or_else(|| supervisor.has_ended()).or(hangs));
        drop(admin);
        background.shutdown_background();
        ended.map_or(Ok(()), |ended| Err(ended.into()))
    }

    /// Logs where the gateway listens, and warns of what the configuration leaves open.
    fn log_start(&self) -> io::Result<()> {
        let Self { config, .. } = self;
        if config.trusts_loopback() {
            tracing::warn!("{LOOPBACK_NOTICE}");
        }
        let memory = KeyMemory::new(&config.idempotency).notice();
        let (limit, size) = (audit::limit::notice(config), config.trail_size().notice());
        for notice in memory.into_iter().chain(size).chain(limit).chain(needles::notices(config)) {
            tracing::warn!("{notice}");
        }
        for listener in &self.bound {
            tracing::info!(address = %listener.address, "listening");
        }
        tracing::info!(address = %self.admin.local_addr()?, "listening (admin)");
        Ok(())
    }

    /// What the admin listener shows.
    fn admin_state(
        &self,
        source: Option<&Source>,
        accepting: watch::Receiver<usize>,
        watchdog: Arc<Watchdog>,
    ) -> anyhow::Result<Admin> {
        let (file, admin) = (source.map(|source| &*source.path), self.admin.local_addr()?);
        let addresses: Vec<_> = self.addresses().map(ToString::to_string).collect();
        Ok(Admin {
            hosts: self.config.admin.hosts.clone(),
            state: self.state.clone(),
            audit: self.audit.clone(),
            idempotency: self.idempotency.clone(),
            limits: self.limits.clone(),
            metrics: self.metrics.clone(),
            place: sockets::place(&self.config, file, &addresses, admin)?,
            addresses,
            accepting,
            workers: self.config.server.workers,
            watchdog,
        })
    }

    /// Starts the threads of all workers, each with its part of every listener. They serve once `terms.may_begin` is
    /// set.
    fn start_workers(&mut self, terms: &StopTerms) -> io::Result<Vec<JoinHandle<()>>> {
        let server = &self.config.server;
        let mut listeners: Vec<Vec<_>> = (0..server.workers).map(|_| Vec::new()).collect();
        for bound in self.bound.drain(..) {
            for (worker, listener) in bound.split().into_iter().enumerate() {
                listeners[worker].push(listener);
            }
        }
        let start = |(number, listeners)| {
            let worker = Worker {
                number,
                gateway: Arc::new(self.gateway(number, &terms.vitals)),
                deadlines: Deadlines::new(server),
                // The grace is a part of `drain_timeout`, and a worker's clock begins after it.
                drain: server.drain_timeout.saturating_sub(terms.grace),
                terms: terms.clone(),
            };
            worker.start(listeners)
        };
        listeners.into_iter().enumerate().map(start).collect()
    }

    /// What one worker needs to answer requests.
    fn gateway(&self, worker: usize, vitals: &Vitals) -> Gateway {
        let upstream = &self.config.upstream;
        let pool = Pool::new(
            self.connector.clone(),
            // Divided among the workers: pools share nothing, so that no connection crosses threads.
            share(upstream.max_connections, self.config.server.workers, worker),
            upstream.connect_timeout,
            upstream.idle_timeout,
            self.http2.clone(),
            self.pool_metrics.clone(),
        );
        Gateway {
            state: self.state.clone(),
            pool: Arc::new(pool),
            exchanges: Arc::default(),
            audit: self.audit.for_worker(of_worker(vitals, worker, "the commit waiters")),
            idempotency: self.idempotency.clone(),
            limits: self.limits.clone(),
            metrics: self.metrics.clone(),
        }
    }
}

/// Reports to systemd that all workers accept connections, then runs `watching`, which reports that they go on.
async fn ready(mut accepting: watch::Receiver<usize>, workers: usize, watching: impl Future<Output = ()>) {
    // It fails if the workers end before: the gateway was then never ready, though the count has ended. A start that
    // failed was once reported as ready.
    if accepting.wait_for(|accepting| *accepting == workers).await.is_ok() {
        // Fails without systemd, which is no error. It must come before the first report of the watchdog.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    }
    watching.await;
}

/// Closes the audit trail, and logs why it could not be written to its end. Returns what ended first.
fn close(audit: &Audit, ended: Option<UnexpectedEnd>) -> Option<UnexpectedEnd> {
    // A panic of the writer was reported when it happened, unless it happens now.
    let unfinished = audit.close().filter(|why| ended.is_none() || *why != Unfinished::Panic);
    let unfinished = unfinished.map(|why| UnexpectedEnd::logged("the audit writer", &why.to_string()));
    ended.or(unfinished)
}

/// Serves the admin listener on a thread of its own, until the returned sender is dropped.
fn serve_admin(
    listener: net::TcpListener,
    admin: Arc<Admin>,
    vital: Vital,
) -> io::Result<oneshot::Sender<()>> {
    let (end, ended) = oneshot::channel();
    // A thread of its own: probes must get an answer when a worker or the background hangs, or they could not say so.
    let serve = move || -> io::Result<()> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let listener = TcpListener::from_std(listener)?;
            tokio::select! {
                () = fault::beside("the admin listener", admin::serve(listener, admin)) => {}
                _ = ended => {}
            }
            Ok(())
        })
    };
    // Its end in order is an end as well, so `vital` is dropped, which reports it. After the stop nobody listens.
    let run = move || match serve() {
        Ok(()) => drop(vital),
        Err(error) => vital.fail(error),
    };
    thread::Builder::new().name("admin".into()).spawn(run)?;
    Ok(end)
}

/// How and where the trail is kept. `accept_loss` is the word by which the operator accepts a loss.
fn audit_options(config: &Config, accept_loss: Option<String>) -> audit::Options {
    let window = config.idempotency.window;
    audit::Options {
        directory: config.audit.directory.clone(),
        must_exist: config.audit.must_exist,
        durability: config.audit.durability,
        segment_size: config.audit.segment_size,
        key_file: config.audit.key_file.clone(),
        // Four for each request in flight: twice what all exchanges reserve, so that records without a reservation
        // find room, too.
        queue: AUDIT_QUEUE.max(4 * config.server.max_in_flight),
        intent_deadline: INTENT_DEADLINE,
        redactions: REDACTABLE.map(|name| config.audit.redaction(name)),
        refusals: config.audit.refusals(),
        hour: audit::HOUR,
        // A call that began before the idempotency window and ended within it still matters, so `SLACK` is added.
        retain: config.audit.retain.map(|retain| retain + SLACK),
        early: config.audit.max_size.map(|max_size| Early { max_size, after: window + SLACK }),
        window,
        low_water: LOW_WATER,
        accept_loss,
    }
}

/// A token slot for each credential. Its events go to the trail with the credential's name.
fn slots(
    config: &Config,
    egress: &Egress,
    metrics: &crate::token::TokenMetrics,
    audit: &Audit,
) -> anyhow::Result<Vec<Arc<Slot>>> {
    config
        .credentials
        .iter()
        .map(|credential| {
            let (audit, name) = (audit.clone(), credential.name.clone());
            let events = Box::new(move |event: &'static str, mut details: Map<String, Value>| {
                details.insert("credential".into(), json!(name));
                audit.event(event, details);
            });
            Ok(Slot::new(credential, &config.token, egress, metrics.clone(), events)?)
        })
        .collect()
}

/// The way to the cloud: TLS and proxy, the connector to the upstream, and its `:authority` if HTTP/2 is offered.
fn outward(config: &Config) -> anyhow::Result<(Egress, Connector, Option<Authority>)> {
    let upstream = &config.upstream;
    let egress = Egress::new(upstream, upstream.base_url.tls || config.token.url.tls)?;
    let connector = Connector::new(&upstream.base_url, &egress, upstream.connect_timeout)?;
    // Over TLS only, since ALPN picks the protocol and a plain connection has no ALPN.
    let offered = upstream.http2 == config::Http2::Auto && upstream.base_url.tls;
    let http2 = offered.then(|| upstream.base_url.authority().parse()).transpose()?;
    Ok((egress, connector, http2))
}
