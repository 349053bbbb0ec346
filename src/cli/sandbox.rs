//! The command `sandbox`: runs the simulator of the cloud alone, for people who develop against it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use ccsqm_gateway::sandbox::{APPOINT_PATH, Options, Sandbox, Tls};

use super::signals::{Asked, HangUp, Signals, while_listening};
use super::{out, parse_address};

/// Run a local stand-in for the cloud: tokenByAkSk and appointQualityTask, with scripted faults.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Address to listen on.
    #[arg(long, value_name = "ADDR", value_parser = parse_address, default_value = "127.0.0.1:18080")]
    listen: SocketAddr,
    /// Server certificate chain (PEM); switches TLS on.
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// Private key of the certificate (PEM).
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// Allow an address that other machines can reach. Everyone who reaches it can read the records and script the faults.
    #[arg(long)]
    allow_remote: bool,
}

/// Runs until a stop is asked for: Ctrl-C, SIGTERM or SIGHUP.
pub(crate) fn run(args: Args, signals: Signals) -> anyhow::Result<ExitCode> {
    while_listening(signals, HangUp::Stops, move |asked| sandbox(args, &asked))
}

fn sandbox(args: Args, asked: &Asked) -> anyhow::Result<ExitCode> {
    // The control API has no login, and the records show credentials in clear.
    ensure!(
        args.allow_remote || args.listen.ip().is_loopback(),
        "{} can be reached by other machines; add --allow-remote if that is intended",
        args.listen
    );
    let tls = args.cert.zip(args.key).map(|(cert, key)| Tls::read(&cert, &key)).transpose()?;
    let options = Options { listen: args.listen, tls, ..Options::default() };
    let (app_key, app_secret) = (options.app_key.clone(), options.app_secret.clone());
    let sandbox = Sandbox::start(options).with_context(|| format!("can't start on {}", args.listen))?;
    introduce(&sandbox, &app_key, &app_secret);
    // False if a stop came during the start.
    if asked.started() {
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        runtime.block_on(asked.clone().stopped());
    }
    Ok(ExitCode::SUCCESS)
}

fn introduce(sandbox: &Sandbox, app_key: &str, app_secret: &str) {
    let (url, token_url) = (sandbox.url(), sandbox.token_url());
    out::lines(&format!(
        "sandbox    {url}\n\
         app key    {app_key}\n\
         app secret {app_secret}\n\
         \n\
         token      POST {token_url}\n\
         task       POST {url}{APPOINT_PATH}\n\
         received   GET  {url}/_sandbox/requests\n\
         tokens     GET  {url}/_sandbox/token-calls\n\
         tasks      GET  {url}/_sandbox/tasks\n\
         sockets    GET  {url}/_sandbox/connections\n\
         faults     PUT  {url}/_sandbox/faults      such as {{\"business\":[{{\"times\":1,\"status\":500}}]}}\n\
         forget     POST {url}/_sandbox/reset\n\
         revoke     POST {url}/_sandbox/revoke\n\
         \n\
         Ctrl-C stops it."
    ));
}
