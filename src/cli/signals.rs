//! Signal handling of a command, from before anything is read until it ends.
//!
//! A signal without a handler ends the process, or is dropped by the kernel if the process is the first one of a container. So
//! the handlers are set up first. The main thread does nothing but wait for signals, so that a stop is noticed whatever the
//! command waits for. A command that has not begun to serve is left behind 500 ms after a stop.

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

/// The longest time in which a start that is asked to stop may end by itself.
// A start may read a long trail, or hang at a file. It has not served any request, so nothing is lost if it is left behind.
const PATIENCE: Duration = Duration::from_millis(500);

/// The stack of the command's thread, in bytes. As large as that of the main thread by default.
const STACK: usize = 8 << 20;

/// The meaning of SIGHUP for a command.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum HangUp {
    /// The configuration is read again.
    Reloads,
    /// The terminal is gone: stop.
    Stops,
}

/// What signals have asked for so far. Clones share it.
#[derive(Clone)]
pub(super) struct Asked {
    stop: watch::Receiver<bool>,
    /// Notified by SIGHUP. A notification that arrives during the start is stored for the reload.
    pub(super) reload: Arc<Notify>,
    /// Whether it is decided how the start ends: in service, or by being left behind.
    // The command and the main thread both try to set it, and the first one wins: a gateway that has begun to serve is never left
    // behind, and one that is left behind never begins.
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

    /// Ends the start: from now on a stop waits for the work. Returns false if a stop came before; the work must end then.
    pub(super) fn started(&self) -> bool {
        !self.to_stop() && self.decide()
    }

    fn decide(&self) -> bool {
        !self.is_decided.swap(true, Ordering::SeqCst)
    }
}

/// The handlers of signals, and the runtime that receives them.
pub(super) struct Signals {
    runtime: Runtime,
    /// `None` for a command that ends by itself.
    stops: Option<Stops>,
}

/// The signals that stop or reload a command.
struct Stops {
    terminate: Signal,
    interrupt: Signal,
    hung_up: Signal,
}

impl Signals {
    /// Sets up the handlers. To be called before anything else. A command that ends by itself keeps the default effect of all
    /// signals but SIGXFSZ.
    ///
    /// # Errors
    ///
    /// The runtime or a handler cannot be set up.
    pub(super) fn take() -> anyhow::Result<Self> {
        let runtime =
            Builder::new_current_thread().enable_all().build().context("the runtime of the signals")?;
        let within = runtime.enter();
        let stops = serves().then(Stops::listen).transpose()?;
        // By default SIGXFSZ ends the process when a file would grow beyond RLIMIT_FSIZE, and outcomes that are not written would
        // be lost. With a handler the write fails instead, as on a full disk. The handler stays when its stream is dropped.
        drop(signal(SignalKind::from_raw(Number::XFSZ.as_raw())).context("SIGXFSZ")?);
        drop(within);
        Ok(Self { runtime, stops })
    }
}

/// Whether the command is one that runs until it is stopped and may be the first process of a container.
// By the first argument alone: parsing them all takes milliseconds, in which a signal could arrive.
fn serves() -> bool {
    env::args_os().nth(1).is_some_and(|command| command == "serve" || command == "sandbox")
}

impl Stops {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind: SignalKind| signal(kind).context("the signal handlers cannot be set up");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hung_up: listen(SignalKind::hangup())?,
        })
    }
}

/// Runs `work` on a thread of its own and listens for signals meanwhile. Returns its result.
///
/// Work that has not called [`Asked::started`] within 500 ms after a stop is left behind, and the result is success.
///
/// # Errors
///
/// The error of the work, or the handlers or the thread cannot be set up.
///
/// # Panics
///
/// Resumes a panic of the work.
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
        // The work has dropped its sender without a result, which only a panic does.
        Some(Err(_)) => match thread.join() {
            Err(panic) => resume_unwind(panic),
            Ok(()) => unreachable!("it had sent its result"),
        },
        None => {
            log::say("ccsqm-gateway: stopped during the start; no request was served");
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Waits for the result of the work and passes signals on to it meanwhile. Returns `None` if a stop was asked for and the work
/// had not started in time.
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
                // Stores one notification if nobody waits, so that a SIGHUP during the start is not lost.
                asked.reload.notify_one();
                if hang_up == HangUp::Reloads {
                    continue;
                }
            }
            () = patience => {
                if asked.decide() {
                    return None;
                }
                // It has begun to serve, so it drains. Its own deadlines bound that.
                end = None;
                continue;
            }
        }
        stop.send_replace(true);
        // A second signal does not extend the time of the first one.
        end = end.or(Some(Instant::now() + PATIENCE));
    }
}
