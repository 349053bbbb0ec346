//! The composition root: configuration in, a running gateway out. The only place that knows everything.
//!
//! Builds all, binds all, and only then serves, so that a start that fails has served nobody.

mod sockets;

use std::{
    future::Future,
    io, net,
    panic::{self, AssertUnwindSafe},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use arc_swap::ArcSwap;
use http::uri::Authority;
use serde_json::{Map, Value, json};
use tokio::{
    net::TcpListener,
    runtime::{Builder, Runtime},
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, timeout, timeout_at},
};

use crate::{
    admin::{self, Admin},
    audit::{self, Audit, Early, StartError, Unfinished},
    changes::Changes,
    clock,
    concurrency::Bounds,
    config::{
        self, Config, LOOPBACK_NOTICE, ListenAddress,
        trail::{LOW_WATER, SLACK},
    },
    connect::{Connector, Egress},
    control::{self, Control},
    gateway::Gateway,
    idempotency::{Idempotency, memory::MemoryBound},
    log,
    metrics::Metrics,
    model::audit_fields::SHOWN,
    reload::{Reload, Source},
    secret::needles,
    server::{self, Bound, Listen, Stop, connection::Deadlines, inherited::Inherited},
    state::{State, compile_routes},
    supervisor::{Supervisor, Vital, Vitals, fault},
    token::Slot,
    upstream::pool::{self, Pool},
    watchdog::Watchdog,
};

pub use crate::supervisor::Ended;
pub use sockets::BindError;

/// So many records may wait for the audit writer, at least; each exchange keeps room for two.
const AUDIT_QUEUE: usize = 16 * 1024;

/// An intent that is not safe by then is refused.
const INTENT_DEADLINE: Duration = Duration::from_millis(250);

/// A worker that has not ended so long after the drain hangs.
const WORKERS_END: Duration = Duration::from_secs(3);

/// How often the wall clock is looked at, and whether the threads of trail and log are there.
const LOOK: Duration = Duration::from_secs(1);

/// A gateway that is built and bound, and serves nobody yet.
pub struct App {
    config: Config,
    background: Runtime,
    state: Arc<ArcSwap<State>>,
    audit: Audit,
    idempotency: Arc<Idempotency>,
    metrics: Arc<Metrics>,
    pool_metrics: pool::Metrics,
    connector: Connector,
    /// What `:authority` holds, where HTTP/2 is offered.
    http2: Option<Authority>,
    egress: Egress,
    bounds: Arc<Bounds>,
    alive: mpsc::Sender<()>,
    done: mpsc::Receiver<()>,
    bound: Vec<Bound>,
    admin: net::TcpListener,
    control: Option<control::Bound>,
}

impl App {
    /// Compiles the configuration, opens the audit trail, reads the secrets and binds every listener.
    /// `accept_loss` is the word of a loss of the audit trail that the operator accepts.
    pub fn build(config: Config, accept_loss: Option<String>) -> anyhow::Result<Self> {
        let mut inherited = Inherited::from_env()?; // before there are threads
        let background = Builder::new_current_thread().enable_all().build()?;
        let (metrics, parts, audit_metrics) = Metrics::new()?;
        let (egress, connector, http2) = outward(&config)?;
        let options = audit_options(&config, accept_loss.clone());
        audit::limit::check(&config).map_err(StartError::from)?;
        let audit = Audit::start(&options, audit_metrics)?;
        let idempotency = Arc::new(Idempotency::new(&config.idempotency, &audit, accept_loss));
        let slots = slots(&config, &egress, &parts.token, &audit)?;
        let state = Arc::new(ArcSwap::from_pointee(State::new(&config, slots, parts.upstream)?));
        let (alive, done) = mpsc::channel(1);
        let bounds = Arc::new(Bounds::new(&config.server, &alive));
        let bound = sockets::bind(&config, &mut inherited)?;
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
            bounds,
            alive,
            done,
            bound,
            admin,
            control,
        })
    }

    /// Checks whether a start would succeed once a gateway that now runs with this configuration has stopped. Makes and changes
    /// nothing. Returns warnings: what may stop a start nevertheless.
    ///
    /// # Errors
    ///
    /// Fails as [`App::build`] would.
    pub fn rehearse(config: &Config) -> anyhow::Result<Vec<String>> {
        outward(config)?;
        audit::limit::check(config).map_err(StartError::from)?;
        audit::rehearse(&audit_options(config, None))?;
        compile_routes(config, None)?;
        sockets::look(config)
    }

    /// Where callers connect, with the real ports.
    pub fn addresses(&self) -> impl Iterator<Item = &ListenAddress> {
        self.bound.iter().map(|bound| &bound.address)
    }

    /// Closes the audit trail. It has served nobody. Fails with [`Ended`] if the trail lacks its end.
    pub fn discard(self) -> anyhow::Result<()> {
        close(&self.audit, None).map_or(Ok(()), |ended| Err(ended.into()))
    }

    /// Serves until `stop` is over, then drains: no new connections, work in flight runs to its end or to
    /// `drain_timeout`, and the audit trail closes last.
    /// With a `source` the configuration changes while it serves: see [`crate::reload`]. Fails with [`Ended`] if a thread or a
    /// task ended that must not; it drains before that.
    pub fn run(self, stop: impl Future<Output = ()>, source: Option<Source>) -> anyhow::Result<()> {
        let Self {
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
            bounds,
            alive,
            mut done,
            bound,
            admin,
            control,
        } = self;
        let change = metrics.changes.of("configuration");
        let reload =
            source.map(|source| Reload::new(source, config.clone(), (state.clone(), audit.clone(), change)));
        if config.trusts_loopback() {
            tracing::warn!("{LOOPBACK_NOTICE}");
        }
        let memory = MemoryBound::new(&config.idempotency).notice();
        let (limit, size) = (audit::limit::notice(&config), config.trail_size().notice());
        for notice in memory.into_iter().chain(size).chain(limit).chain(needles::notices(&config)) {
            tracing::warn!("{notice}");
        }
        for listener in &bound {
            tracing::info!(address = %listener.address, "listening");
        }
        tracing::info!(address = %admin.local_addr()?, "listening (admin)");
        let mut supervisor = Supervisor::new();
        read_past(&config, &audit, &idempotency, supervisor.vital("the reading of the trail"))?;
        keep_up((&background, &supervisor), &bound, &egress, (&audit, &metrics.changes));
        background.spawn(look(audit.clone(), supervisor.vitals()));
        let (stopping, stopped) = watch::channel(Stop::No);
        let (begin, may_begin) = watch::channel(false);
        let (accepts, mut accepting) = watch::channel(0);
        let hands_over = bound.iter().all(|bound| bound.is_inherited);
        let watchdog = Watchdog::from_env(config.server.workers);
        let addresses: Vec<_> = bound.iter().map(|bound| bound.address.to_string()).collect();
        let gateways: Vec<_> = (0..config.server.workers)
            .map(|worker| {
                let max = share(config.upstream.max_connections, config.server.workers, worker);
                let upstream = &config.upstream;
                let pool = Pool::new(
                    connector.clone(),
                    max,
                    upstream.connect_timeout,
                    upstream.idle_timeout,
                    http2.clone(),
                    pool_metrics.clone(),
                );
                Arc::new(Gateway {
                    state: state.clone(),
                    pool: Arc::new(pool),
                    exchanges: Arc::default(),
                    audit: audit.for_worker(of_worker(&supervisor.vitals(), worker, "the audit lane")),
                    idempotency: idempotency.clone(),
                    bounds: bounds.clone(),
                    metrics: metrics.clone(),
                })
            })
            .collect();
        let mut listeners: Vec<Vec<_>> = gateways.iter().map(|_| Vec::new()).collect();
        for bound in bound {
            for (worker, listener) in bound.split().into_iter().enumerate() {
                listeners[worker].push(listener);
            }
        }
        let workers = gateways
            .into_iter()
            .zip(listeners)
            .enumerate()
            .map(|(number, (gateway, listeners))| {
                let grace = if hands_over { Duration::ZERO } else { config.server.drain_grace };
                let worker = Worker {
                    number,
                    gateway,
                    deadlines: Deadlines::new(&config.server),
                    stopped: stopped.clone(),
                    drain: config.server.drain_timeout.saturating_sub(grace),
                    watchdog: watchdog.clone(),
                    may_begin: may_begin.clone(),
                    accepts: accepts.clone(),
                    vitals: supervisor.vitals(),
                };
                worker.start(listeners)
            })
            .collect::<io::Result<Vec<_>>>()?;
        let admin_state = Admin {
            hosts: config.admin.hosts.clone(),
            state: state.clone(),
            audit: audit.clone(),
            idempotency: idempotency.clone(),
            bounds: bounds.clone(),
            metrics,
            addresses,
            accepting: accepting.clone(),
            workers: config.server.workers,
            watchdog: watchdog.clone(),
        };
        let admin = serve_admin(admin, Arc::new(admin_state), supervisor.vital("the admin listener"))?;
        begin.send_replace(true); // all threads are there
        let ended = background.block_on(async {
            for slot in &state.load().terms.slots {
                let vital = supervisor.vital(format!("the token fetcher of {}", slot.name()));
                tokio::spawn(vital.run(slot.clone().run()));
            }
            if let Some(reload) = reload {
                tokio::spawn(supervisor.vital("the reload of the configuration").run(reload.run()));
            }
            if let Some(bound) = control {
                let vital = supervisor.vital("the audit lane of the control socket");
                let (audit, directory) = (audit.for_worker(vital), config.audit.directory.clone());
                let control = Arc::new(Control { audit, directory, idempotency: idempotency.clone() });
                tokio::spawn(supervisor.vital("the control socket").run(bound.serve(control)));
            }
            tokio::spawn(watchdog.clone().beat_background());
            let watching = watchdog.watch(stopping.subscribe());
            let ready = async move {
                let all = |accepting: &usize| *accepting == config.server.workers;
                let _ = accepting.wait_for(all).await;
                // Without systemd there is nobody to tell, and that is no error. It hears of the start first.
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
                watching.await;
            };
            tokio::spawn(supervisor.vital("the watchdog").run(ready));
            let ended = tokio::select! {
                () = stop => None,
                ended = supervisor.ended() => Some(ended),
            };
            drain(&config.server, hands_over, &bounds, &stopping, (alive, &mut done)).await;
            ended
        });
        let hangs = join(&workers);
        let ended = ended.or_else(|| supervisor.has_ended()).or(hangs);
        let ended = close(&audit, ended);
        drop(admin);
        background.shutdown_background();
        ended.map_or(Ok(()), |ended| Err(ended.into()))
    }
}

/// Closes the audit trail, and logs what keeps it from being written to its end. Returns what ended first.
fn close(audit: &Audit, ended: Option<Ended>) -> Option<Ended> {
    // A panic of the writer was told when it happened, unless it happens now.
    let unfinished = audit.close().filter(|why| ended.is_none() || *why != Unfinished::Panic);
    let unfinished = unfinished.map(|why| Ended::logged("the audit writer", &why.to_string()));
    ended.or(unfinished)
}

/// Waits until the workers have ended, as they do soon after the drain. Returns the first one that has not: it hangs.
fn join(workers: &[JoinHandle<()>]) -> Option<Ended> {
    let end = std::time::Instant::now() + WORKERS_END;
    let hangs = |worker: &JoinHandle<()>| !worker.is_finished();
    while workers.iter().any(hangs) && std::time::Instant::now() < end {
        thread::sleep(Duration::from_millis(1));
    }
    let worker = workers.iter().position(hangs)?;
    Some(Ended::logged(&format!("worker {worker}"), "it hangs, and is not waited for"))
}

/// A worker: its thread, and all that runs on it.
struct Worker {
    number: usize,
    gateway: Arc<Gateway>,
    deadlines: Deadlines,
    stopped: watch::Receiver<Stop>,
    drain: Duration,
    watchdog: Arc<Watchdog>,
    /// Set once every thread is there, so that a start that fails has served nobody.
    may_begin: watch::Receiver<bool>,
    /// Counts the workers that accept connections.
    accepts: watch::Sender<usize>,
    vitals: Vitals,
}

/// For a task of a worker.
fn of_worker(vitals: &Vitals, number: usize, what: &str) -> Vital {
    vitals.until_stop(format!("{what} of worker {number}"))
}

impl Worker {
    /// Starts its thread.
    fn start(self, listeners: Vec<Listen>) -> io::Result<JoinHandle<()>> {
        let name = format!("worker {}", self.number);
        let thread = thread::Builder::new().name(format!("worker-{}", self.number));
        let vital = self.vitals.vital(name.clone());
        let run = move || match self.run(&name, listeners) {
            Ok(()) => vital.done(),
            Err(error) => vital.fail(error),
        };
        thread.spawn(run)
    }

    /// Runs as long as its connections and the exchanges that outlived theirs do.
    fn run(self, name: &str, listeners: Vec<Listen>) -> io::Result<()> {
        Audit::defer_wake_ups();
        clock::turns();
        let audit = self.gateway.audit.clone();
        let runtime = Builder::new_current_thread()
            .enable_all()
            .on_thread_park(move || {
                audit.flush();
                clock::next_turn();
            })
            .build()?;
        let work = AssertUnwindSafe(|| runtime.block_on(fault::beside(name, self.serve(listeners))));
        let served = panic::catch_unwind(work).unwrap_or_else(|_| Err(io::Error::other("a panic")));
        runtime.shutdown_background(); // a resolver that hangs must not hold the stop
        served
    }

    async fn serve(mut self, listeners: Vec<Listen>) -> io::Result<()> {
        if self.may_begin.wait_for(|may_begin| *may_begin).await.is_err() {
            return Ok(());
        }
        let listeners = listeners.into_iter().map(|listener| listener()).collect::<io::Result<_>>()?;
        let (number, vitals) = (self.number, self.vitals);
        let beats = of_worker(&vitals, number, "the watchdog").run(self.watchdog.clone().beat(number));
        tokio::spawn(beats);
        self.accepts.send_modify(|accepting| *accepting += 1);
        let vital = move |what: &str| of_worker(&vitals, number, what);
        serve_until_drained(self.gateway, listeners, self.deadlines, self.stopped, self.drain, vital).await;
        self.watchdog.retire(number);
        Ok(())
    }
}

/// Serves the admin listener on a thread of its own, until what this returns is dropped.
fn serve_admin(
    listener: net::TcpListener,
    admin: Arc<Admin>,
    vital: Vital,
) -> io::Result<oneshot::Sender<()>> {
    let (end, ended) = oneshot::channel();
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
    let run = move || match serve() {
        Ok(()) => drop(vital),
        Err(error) => vital.fail(error),
    };
    thread::Builder::new().name("admin".into()).spawn(run)?;
    Ok(end)
}

/// Stops, step by step, within `drain_timeout`. Who comes next takes over inherited sockets; nobody does others, so that
/// callers get a grace to look elsewhere.
async fn drain(
    server: &config::Server,
    hands_over: bool,
    bounds: &Bounds,
    stopping: &watch::Sender<Stop>,
    (alive, done): (mpsc::Sender<()>, &mut mpsc::Receiver<()>),
) {
    let end = Instant::now() + server.drain_timeout;
    if hands_over || !server.drain_grace.is_zero() {
        bounds.close();
    } else {
        bounds.drain();
    }
    tracing::info!("stopping"); // who reads this may rely on it
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    let _ = stopping.send(Stop::Begins);
    if !hands_over {
        sleep(server.drain_grace).await;
        bounds.drain();
    }
    let _ = stopping.send(Stop::Now);
    drop(alive); // behind the grace, in which others may come yet
    if timeout_at(end, done.recv()).await.is_err() {
        tracing::warn!(
            connections = bounds.connections(),
            in_flight = bounds.in_flight(),
            "drain_timeout is over; what is left is cut off"
        );
    }
}

/// Takes certificates, and user and password for the proxy, that change while the gateway runs, and puts on record what
/// came of it.
fn keep_up(
    (background, supervisor): (&Runtime, &Supervisor),
    bound: &[Bound],
    egress: &Egress,
    (audit, changes): (&Audit, &Changes),
) {
    for (tls, address) in bound.iter().filter_map(|bound| Some((bound.tls()?, bound.address.to_string()))) {
        let vital = supervisor.vital(format!("the certificates of {address}"));
        let change = file_change(&CERTIFICATES, "listener", address, (audit, changes));
        background.spawn(vital.run(tls.clone().keep_up(change)));
    }
    if let Some(identity) = egress.identity().cloned() {
        let vital = supervisor.vital("the client certificate");
        let change = file_change(&CERTIFICATES, "upstream", "client_cert_file".into(), (audit, changes));
        background.spawn(vital.run(identity.keep_up(change)));
    }
    if let Some(roots) = egress.roots().cloned() {
        let vital = supervisor.vital("the roots of the upstream");
        let change = file_change(&CERTIFICATES, "upstream", "ca_file".into(), (audit, changes));
        background.spawn(vital.run(roots.keep_up(change)));
    }
    if let Some(login) = egress.login().cloned() {
        let vital = supervisor.vital("user and password for the proxy");
        let change = file_change(&LOGIN, "upstream", "proxy_password_file".into(), (audit, changes));
        background.spawn(vital.run(login.keep_up(change)));
    }
}

/// Where and how the trail is kept. `accept_loss` is the word of a loss that the operator accepts.
fn audit_options(config: &Config, accept_loss: Option<String>) -> audit::Options {
    let window = config.idempotency.window;
    audit::Options {
        directory: config.audit.directory.clone(),
        must_exist: config.audit.must_exist,
        durability: config.audit.durability,
        segment_size: config.audit.segment_size,
        key_file: config.audit.key_file.clone(),
        queue: AUDIT_QUEUE.max(4 * config.server.max_in_flight),
        intent_deadline: INTENT_DEADLINE,
        shown: SHOWN.map(|name| config.audit.shown(name)),
        refusals: config.audit.refusals,
        hour: audit::HOUR,
        retain: config.audit.retain.map(|retain| retain + SLACK),
        early: config.audit.max_size.map(|max_size| Early { max_size, after: window + SLACK }),
        window,
        low_water: LOW_WATER,
        accept_loss,
    }
}

/// Looks at the wall clock once a second, and whether the threads of trail and log are there.
async fn look(audit: Audit, vitals: Vitals) {
    let looks = async {
        loop {
            sleep(LOOK).await;
            audit.look_at_clock();
            log::requests::fold_up();
            if !audit.is_written() {
                return vitals.vital("the audit writer");
            }
            if log::has_ended() {
                return vitals.vital("the log");
            }
        }
    };
    let gone = vitals.until_stop("the look at clock and threads").run(looks).await;
    gone.fail("a panic");
}

/// What is read again: the event in the trail, and its name in the log.
struct Kind {
    event: &'static str,
    what: &'static str,
}

const CERTIFICATES: Kind = Kind { event: "certificate_change", what: "the certificates" };
const LOGIN: Kind = Kind { event: "secret_change", what: "user and password for the proxy" };

fn file_change(
    Kind { event, what }: &'static Kind,
    whose: &'static str,
    name: String,
    (audit, changes): (&Audit, &Changes),
) -> impl Fn(Result<(), String>) + use<> {
    let (audit, change) = (audit.clone(), changes.of(format!("{whose} {name}")));
    move |taken| {
        let mut details = Map::from_iter([(whose.to_owned(), json!(name))]);
        match taken {
            Ok(()) => {
                change.accepted();
                tracing::info!(whose, name, "{what} were read again and are in use");
                details.insert("result".into(), json!("accepted"));
            }
            Err(error) => {
                change.refused(&error);
                tracing::warn!(whose, name, %error, "{what} cannot be used; the old ones stay in use");
                details.insert("result".into(), json!("refused"));
                details.insert("reason".into(), json!(error));
            }
        }
        audit.event(event, details);
    }
}

/// Reads what was there before the start, beside everything else: calls without a key are served meanwhile.
fn read_past(config: &Config, audit: &Audit, idempotency: &Arc<Idempotency>, vital: Vital) -> io::Result<()> {
    let (idempotency, settings) = (idempotency.clone(), config.idempotency.clone());
    let (directory, audit) = (config.audit.directory.clone(), audit.clone());
    let read = move || {
        idempotency.rebuild(&settings, &directory, &audit);
        if let Err(error) = audit.verify_past(&directory) {
            tracing::error!(%error, "the audit trail cannot be read");
        }
        vital.done();
    };
    thread::Builder::new().name("past".into()).spawn(read).map(drop)
}

/// A worker runs as long as its connections and the exchanges that outlived theirs do. The process waits
/// for at most `drain_timeout`, and so does each worker; then its runtime drops what is left, and each
/// record closes itself.
async fn serve_until_drained(
    gateway: Arc<Gateway>,
    listeners: Vec<server::Listener>,
    deadlines: Deadlines,
    mut stopped: watch::Receiver<Stop>,
    drain: Duration,
    vital: impl Fn(&str) -> Vital + Send + 'static,
) {
    let bounds = gateway.bounds.clone();
    let served = tokio::spawn(server::run(gateway, listeners, deadlines, stopped.clone(), vital));
    let _ = stopped.wait_for(|stop| *stop == Stop::Now).await;
    let idle = async {
        let _ = served.await;
        while bounds.in_flight() > 0 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    let _ = timeout(drain, idle).await;
}

fn slots(
    config: &Config,
    egress: &Egress,
    metrics: &crate::token::Metrics,
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

/// The way out: TLS and proxy, the connector to the upstream, and what `:authority` holds where HTTP/2 is offered: over TLS only,
/// since nothing picks it on a plain connection.
fn outward(config: &Config) -> anyhow::Result<(Egress, Connector, Option<Authority>)> {
    let upstream = &config.upstream;
    let egress = Egress::new(upstream, upstream.base_url.tls || config.token.url.tls)?;
    let connector = Connector::new(&upstream.base_url, &egress, upstream.connect_timeout)?;
    let offered = upstream.http2 == config::Http2::Auto && upstream.base_url.tls;
    let http2 = offered.then(|| upstream.base_url.authority().parse()).transpose()?;
    Ok((egress, connector, http2))
}

/// A worker's part of a cap that is for all workers together.
fn share(total: usize, workers: usize, worker: usize) -> usize {
    total / workers + usize::from(worker < total % workers)
}
