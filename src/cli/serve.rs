//! The command `serve`: loads the configuration, builds the gateway and runs it until a stop.

use std::process::ExitCode;

use ccsqm_gateway::app::App;
use ccsqm_gateway::log;
use ccsqm_gateway::preflight::exposures;
use ccsqm_gateway::reload::Source;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::out::complain;
use super::refusal::StartRefusal;
use super::signals::{Asked, HangUp, Signals, while_listening};
use super::{BAD_CONFIGURATION, Configured, out};

/// The number of file descriptors beside connections: listeners, audit, admin, token calls, the runtimes' own.
const OTHER_FILES: u64 = 128;

/// What to serve.
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    configured: Configured,
    /// Accept the loss of a part of the audit trail. WORD is the one that the refusal or the log names, and is valid for
    /// this loss only. From then on Idempotency-Keys that are not found count as new.
    #[arg(long, value_name = "WORD")]
    accept_loss: Option<String>,
}

pub(super) fn run(args: Args, signals: Signals) -> anyhow::Result<ExitCode> {
    // The thread of the log first: a start that prints its errors must not hang because stderr is not read.
    log::start()?;
    while_listening(signals, HangUp::Reloads, move |asked| serve(args, &asked))
}

fn serve(Args { configured, accept_loss }: Args, asked: &Asked) -> anyhow::Result<ExitCode> {
    // Before the memory holds a secret. A failure is logged below, since there is no log yet.
    let hidden = super::hide_memory();
    let config = match configured.load() {
        Ok(config) => config,
        Err(problems) => {
            out::complain_lines(&problems.to_string());
            return Ok(ExitCode::from(BAD_CONFIGURATION));
        }
    };
    let set_log = super::begin_log(&config.log)?;
    if let Err(error) = hidden {
        tracing::warn!(
            %error,
            "core dumps, or access of other processes to this one's memory, cannot be turned off"
        );
    }
    let misnamed = config.misnamed_variables(std::env::vars_os());
    for notice in misnamed.into_iter().chain(exposures(&config, &configured.config)) {
        tracing::warn!("{notice}");
    }
    allow_files(config.server.max_connections + config.upstream.max_connections);
    let app = match App::build(config, accept_loss) {
        Ok(app) => app,
        Err(error) => {
            let refusal = StartRefusal::of(&error);
            complain!("{}", refusal.line(&configured.config));
            return Ok(ExitCode::from(refusal.code));
        }
    };
    // A stop came during the start. The trail was opened, so it must be closed, and its end may fail to be written.
    if !asked.started() {
        return app.discard().map(|()| ExitCode::SUCCESS);
    }
    let Configured { config: path, overrides } = configured;
    let source = Source { path, overrides, set_log, asked: asked.reload.clone() };
    app.run(asked.clone().stopped(), Some(source)).map(|()| ExitCode::SUCCESS)
}

/// Raises the soft limit on open files to the hard one, and warns if that is less than `connections` need.
// Each connection is a file, and the soft limit is 1,024 by default.
fn allow_files(connections: usize) {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit on open files cannot be raised");
    }
    let needed = u64::try_from(connections).unwrap_or(u64::MAX).saturating_add(OTHER_FILES);
    if let Some(limit) = maximum.filter(|limit| *limit < needed) {
        tracing::warn!(
            limit,
            needed,
            "the limit on open files is lower than max_connections needs: raise it (LimitNOFILE=, ulimit -n)"
        );
    }
}
