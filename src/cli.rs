//! The command line: parses the arguments, sets up signals and the log, runs a command, and returns its exit code.
//!
//! | exit code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | the command found something wrong, or failed in a way that may pass |
//! | 2 | wrong arguments |
//! | 70 | a part of the gateway ended that must not, or the trail lacks its end |
//! | 78 | an operator must change the configuration or something that it names |

mod out;

mod audit;
mod check;
mod contract;
mod demo;
mod healthcheck;
mod refusal;
mod sandbox;
mod serve;
mod signals;
mod snippet;

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use self::out::{complain, out};
use self::signals::Signals;
use anyhow::Context as _;
use ccsqm_gateway::app::UnexpectedEnd;
use ccsqm_gateway::config::{Config, Log, LogFormat, Problems};
use ccsqm_gateway::{log, plain, preflight};
use clap::{Parser, Subcommand};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;
use tracing_subscriber::reload;
use uuid::Uuid;

/// The exit code of a bad configuration (`EX_CONFIG`).
const BAD_CONFIGURATION: u8 = 78;

/// The exit code of a gateway of which a thread or a task ended that must not (`EX_SOFTWARE`).
const PART_ENDED: u8 = 70;

/// The longest time for reading a configuration and the files that it names.
// A file may be on a network mount whose server is gone. Without a limit the start would hang and say nothing.
const PATIENCE: Duration = Duration::from_secs(20);

/// Lets internal apps call CCSQM without holding a credential.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the gateway.
    Serve(serve::Args),
    /// Check a configuration and list who can use each credential.
    Check(check::Args),
    /// Run the gateway on a sandbox of the cloud, with an example request.
    Demo(demo::Args),
    /// Run the sandbox of the cloud alone.
    Sandbox(sandbox::Args),
    /// Ask a running gateway whether it is alive or ready.
    Healthcheck(healthcheck::Args),
    /// Check a body against a contract.
    Contract(contract::Args),
    /// Verify and read an audit trail.
    Audit(audit::Args),
}

/// A configuration file and what overrides it.
#[derive(clap::Args)]
struct Configured {
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Set one value of the configuration. Overrides the file and the environment.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = parse_override)]
    overrides: Vec<(String, String)>,
}

impl Configured {
    /// Loads and checks the configuration with the process's environment, and checks the files that it names.
    fn load(&self) -> Result<Config, Problems> {
        preflight::load_in_time(&self.config, &self.overrides, std::env::vars_os(), PATIENCE)
    }
}

fn parse_address(text: &str) -> Result<SocketAddr, &'static str> {
    text.parse().map_err(|_| "must be an address with a port, as in 127.0.0.1:8080")
}

fn parse_id(text: &str) -> Result<Uuid, &'static str> {
    text.parse().map_err(|_| "must be a request id, as x-gateway-request-id and the trail have it")
}

fn parse_override(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("must be KEY=VALUE, as in server.workers=2")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// Runs the command of the process's arguments and returns its exit code.
// The handlers of signals come first, before arguments are parsed: as the first process of a container, the gateway would lose a
// SIGTERM that arrives before.
pub(crate) fn run() -> ExitCode {
    let signals = Signals::take();
    let _flushed = Flushed;
    // For all commands: `check` reads secrets, too, and `audit` the key of the chain. `serve` does it again and logs a failure.
    let _ = hide_memory();
    let signals = match signals {
        Ok(signals) => signals,
        Err(error) => {
            complain!("ccsqm-gateway: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(said) => return out::exit_code(usage(&said)),
    };
    let run = || match arguments.command {
        Command::Serve(args) => serve::run(args, signals),
        Command::Check(args) => Ok(check::run(&args)),
        Command::Demo(args) => demo::run(args, signals),
        Command::Sandbox(args) => sandbox::run(args, signals),
        Command::Healthcheck(args) => healthcheck::run(&args),
        Command::Contract(args) => contract::run(args),
        Command::Audit(args) => audit::run(&args),
    };
    let code = run().unwrap_or_else(|error| {
        // What ended was logged when it ended.
        if error.is::<UnexpectedEnd>() {
            return ExitCode::from(PART_ENDED);
        }
        complain!("ccsqm-gateway: {error:#}");
        ExitCode::FAILURE
    });
    out::exit_code(code)
}

/// Prints the help, or what is wrong with the arguments. Returns the exit code.
fn usage(said: &clap::Error) -> ExitCode {
    // clap's text has several lines and quotes the arguments. A line break in an argument would look like a line of clap's. So
    // the arguments are escaped and parsed again, and the error about those is printed.
    let made_plain = std::env::args_os().map(|argument| plain::line(&argument.to_string_lossy()));
    let of_plain = Arguments::try_parse_from(made_plain).err();
    let text = of_plain.as_ref().unwrap_or(said).render().to_string();
    let text = text.trim_end();
    if said.use_stderr() {
        out::complain_lines(text);
    } else {
        out::lines(text);
    }
    ExitCode::from(u8::try_from(said.exit_code()).unwrap_or(1))
}

/// Turns off core dumps, and access of other processes of the same user to the memory of this one.
// Both hold the secrets. `PR_SET_DUMPABLE` forbids ptrace and makes the files in /proc/PID root's.
fn hide_memory() -> rustix::io::Result<()> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
}

/// Writes the rest of the log when it is dropped: at the end of the command, also by a panic.
struct Flushed;

impl Drop for Flushed {
    fn drop(&mut self) {
        log::requests::finish();
        log::flush();
    }
}

/// Sets another level of the log, and which requests have a line. A reload calls it.
type SetLog = Box<dyn Fn(&Log) + Send>;

/// Starts logging to stderr, as configured. Returns a function that changes the level. To be called once in a process.
///
/// # Errors
///
/// The thread of the log cannot be started.
fn begin_log(settings: &Log) -> anyhow::Result<SetLog> {
    log::start().context("the thread of the log")?;
    let filter = targets(&settings.level);
    let json = match settings.format {
        LogFormat::Auto => !std::io::stderr().is_terminal(),
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    let layer = tracing_subscriber::fmt::layer().with_writer(log::ToQueue);
    let layer = if json { layer.json().boxed() } else { layer.boxed() };
    let (filter, level) = reload::Layer::new(filter);
    tracing_subscriber::registry().with(layer.with_filter(filter)).init();
    // The default hook writes several lines past the queue of the log, which a reader of JSON cannot parse, and may block on a
    // full pipe.
    std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "panic")));
    log::requests::set(settings.requests);
    Ok(Box::new(move |settings| {
        let _ = level.reload(targets(&settings.level));
        log::requests::set(settings.requests);
    }))
}

/// Returns the filter for a level. The text was validated with the configuration.
// Without the HTTP/2 library, whatever the level: it logs frames with texts of the upstream, which may quote the credential.
fn targets(text: &str) -> Targets {
    text.parse::<Targets>().unwrap_or_default().with_target("h2", LevelFilter::OFF)
}
