//! `serve`.

use std::{process::ExitCode, sync::Arc};

use ccsqm_gateway::app::App;
use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::Notify,
};

use super::{BAD_CONFIGURATION, Configured};

pub(super) fn run(configured: &Configured) -> anyhow::Result<ExitCode> {
    let config = match configured.load() {
        Ok(config) => config,
        Err(problems) => {
            eprintln!("{problems}");
            return Ok(ExitCode::from(BAD_CONFIGURATION));
        }
    };
    super::log(&config.log);
    no_core_dumps();
    let app = App::build(config)?;
    app.run(stopped())?;
    Ok(ExitCode::SUCCESS)
}

/// A core dump would hold the secret.
fn no_core_dumps() {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    if let Err(error) = setrlimit(Resource::Core, none) {
        tracing::warn!(%error, "core dumps cannot be turned off");
    }
}

/// SIGTERM or SIGINT.
pub(super) async fn stopped() {
    let asked = Arc::new(Notify::new());
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        match signal(kind) {
            Ok(mut signal) => {
                let asked = asked.clone();
                tokio::spawn(async move {
                    signal.recv().await;
                    asked.notify_one();
                });
            }
            Err(error) => tracing::error!(%error, "a signal cannot be listened to"),
        }
    }
    asked.notified().await;
}
