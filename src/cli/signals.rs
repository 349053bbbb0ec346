//! Signals that a command takes, from before anything is read until it ends.
//!
//! What a process has no handler for ends it, or is dropped by the kernel where it is the first process of a container. So the
//! handlers come first. They belong to a thread that does nothing else: whatever the work waits for, a stop is heard of.

use std::panic::resume_unwind;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{env, thread};

use anyhow::Context as _;
use ccsqm_gateway::log;
use rustix::process::Signal as Number;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::{Instant, sleep_until};

/// A start that is asked to stop may take so long to end by itself. What it reads may be long, or hang.
const PATIENCE: Duration = Duration::from_millis(500);

/// The stack of the work, as large as the first thread's.
const STACK: usize = 8 << 20;

/// What SIGHUP means.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum HangUp {
    /// The configuration is read again.
    Reloads,
    /// The terminal is gone: stop.
    Stops,
}

/// What signals have asked for so far.
#[derive(Clone)]
pub(super) struct Asked {
    stop: watch::Receiver<bool>,
    /// SIGHUP came, perhaps before anybody waited for it.
    pub(super) reload: Arc<Notify>,
    /// Somebody has decided whether the start ends in service or in a stop.
    is_decided: Arc<AtomicBool>,
}

impl Asked {
    /// Whether a stop was asked for.
    pub(super) fn to_stop(&self) -> bool {
        *self.stop.borrow()
    }

    /// Waits until a stop is asked for.
    pub(super) async fn stopped(mut self) {
        let _ = self.stop.wait_for(|stop| *stop).await;
    }

    /// The start is over: from now on a stop waits for the work. Returns false if a stop came before.
    pub(super) fn started(&self) -> bool {
        !self.to_stop() && self.decide()
    }

    fn decide(&self) -> bool {
        !self.is_decided.swap(true, Ordering::SeqCst)
    }
}

/// The handlers of signals, and what hears of them.
pub(super) struct Signals {
    runtime: Runtime,
    stops: Option<Stops>,
}

struct Stops {
    terminate: Signal,
    interrupt: Signal,
    hung_up: Signal,
}

impl Signals {
    /// To be called before anything else: what comes before a handler is lost to the first process of a container. Of commands
    /// that end by themselves a signal does what it always does.
    pub(super) fn take() -> anyhow::Result<Self> {
        let runtime =
            Builder::new_current_thread().enable_all().build().context("the runtime of the signals")?;
        let within = runtime.enter();
        let stops = serves().then(Stops::listen).transpose()?;
        // From now on a file that would grow beyond RLIMIT_FSIZE is an error of who writes it, as on a full disk; by default
        // SIGXFSZ ends the process. The handler stays when nobody listens any more.
        drop(signal(SignalKind::from_raw(Number::XFSZ.as_raw())).context("SIGXFSZ")?);
        drop(within);
        Ok(Self { runtime, stops })
    }
}

/// Whether the command is one that runs until it is stopped. The arguments are not parsed yet: that takes milliseconds.
fn serves() -> bool {
    env::args_os().nth(1).is_some_and(|command| command == "serve" || command == "sandbox")
}

impl Stops {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind: SignalKind| signal(kind).context("signals cannot be listened to");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hung_up: listen(SignalKind::hangup())?,
        })
    }
}

/// Runs work on a thread of its own, and listens for signals meanwhile. Work that has not called [`Asked::started`] when a stop is
/// asked for is left behind after a while: it has served nobody.
pub(super) fn while_listening(
    Signals { runtime, stops }: Signals,
    hang_up: HangUp,
    work: impl FnOnce(Asked) -> anyhow::Result<ExitCode> + Send + 'static,
) -> anyhow::Result<ExitCode> {
    let listen = || {
        let _within = runtime.enter();
        Stops::listen()
    };
    let mut stops = stops.map_or_else(listen, Ok)?;

    let (stop, asked) = watch::channel(false);
    let asked = Asked { stop: asked, reload: Arc::default(), is_decided: Arc::default() };
    let (done, mut finished) = oneshot::channel();
    let thread = thread::Builder::new().name("gateway".into()).stack_size(STACK);
    let thread = thread.spawn({
        let asked = asked.clone();
        move || drop(done.send(work(asked)))
    })?;
    let result = runtime.block_on(wait(&mut finished, &mut stops, hang_up, &stop, &asked));
    match result {
        Some(Ok(result)) => result,
        Some(Err(_)) => match thread.join() {
            Err(panic) => resume_unwind(panic),
            Ok(()) => unreachable!("it had sent its result"),
        },
        None => {
            log::say("ccsqm-gateway: stopped while it started; it has served nobody");
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Waits for the result of the work, and passes signals on to it meanwhile. `None`: the work was to stop, and had not started.
async fn wait<T>(
    finished: &mut oneshot::Receiver<T>,
    Stops { terminate, interrupt, hung_up }: &mut Stops,
    hang_up: HangUp,
    stop: &watch::Sender<bool>,
    asked: &Asked,
) -> Option<Result<T, oneshot::error::RecvError>> {
    let mut end = None;
    loop {
        let patience = async {
            match end {
                Some(end) => sleep_until(end).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            result = &mut *finished => return Some(result),
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hung_up.recv() => {
                asked.reload.notify_one();
                if hang_up == HangUp::Reloads {
                    continue;
                }
            }
            () = patience => {
                if asked.decide() {
                    return None;
                }
                end = None; // it serves, and drains
                continue;
            }
        }
        stop.send_replace(true);
        end = end.or(Some(Instant::now() + PATIENCE));
    }
}
