//! The command `healthcheck`: asks the admin listener of a running gateway. For images without curl.

use std::io;
use std::net::ToSocketAddrs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::anyhow;
use ccsqm_gateway::{admin, preflight};

use super::{BAD_CONFIGURATION, out};

/// Ask a running gateway whether it is alive or ready.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Address of the admin listener, such as localhost:9090. Default: the one in the environment
    /// (CCSQM_GATEWAY__ADMIN__ADDRESS) or in the configuration file, else 127.0.0.1:9090.
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_admin)]
    admin: Option<String>,
    /// The configuration file that names the admin listener.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Ask whether it is ready, not only whether it is alive.
    #[arg(long)]
    ready: bool,
}

fn parse_admin(text: &str) -> Result<String, String> {
    // Checked here, since a name is resolved later, and the error of that would not say what is expected.
    let (host, port) = text.rsplit_once(':').unwrap_or_default();
    let is_plain = !host.is_empty() && host.bytes().all(|b| b.is_ascii_graphic());
    let fits = is_plain && port.parse::<u16>().is_ok();
    fits.then(|| text.to_owned()).ok_or_else(|| "must be HOST:PORT, as in localhost:9090".into())
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let at = match &args.admin {
        Some(admin) => admin.clone(),
        // Only this one setting is read: the command may run without the files that the rest of a configuration names.
        None => match preflight::admin_address(args.config.as_deref(), std::env::vars_os()) {
            Ok(address) => address.to_string(),
            Err(problems) => {
                out::complain_lines(&problems.to_string());
                return Ok(ExitCode::from(BAD_CONFIGURATION));
            }
        },
    };
    let path = if args.ready { "/readyz" } else { "/livez" };
    let reply = ask(&at, path).map_err(|error| {
        anyhow!("no answer from the admin listener at {at}: {error}; is the gateway running, and is this its admin.address?")
    })?;
    let (head, body) = reply.split_once("\r\n\r\n").unwrap_or((&reply, ""));
    out::lines(body.trim_end());
    let is_good = head.starts_with("HTTP/1.1 200 ");
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Returns the reply from the first address of the name that does not refuse the connection.
// `localhost` has two addresses, and a listener often only one of them.
fn ask(at: &str, path: &str) -> io::Result<String> {
    let mut failed = io::Error::other("the name has no address");
    for address in at.to_socket_addrs()? {
        match admin::ask(address, path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => failed = error,
            answered => return answered,
        }
    }
    Err(failed)
}
