//! `healthcheck`: for containers without curl.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;

use super::out;

/// Ask a running gateway whether it lives, or is ready.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The admin listener.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9090")]
    admin: SocketAddr,
    /// Ask for readiness, not just for life.
    #[arg(long)]
    ready: bool,
}

const DEADLINE: Duration = Duration::from_secs(3);

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let path = if args.ready { "/readyz" } else { "/livez" };
    let reply = ask(args.admin, path).with_context(|| format!("no answer from {}", args.admin))?;
    let (head, body) = reply.split_once("\r\n\r\n").unwrap_or((&reply, ""));
    out::lines(body.trim_end());
    let is_good = head.starts_with("HTTP/1.1 200 ");
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn ask(admin: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&admin, DEADLINE)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {admin}\r\nconnection: close\r\n\r\n")?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    Ok(reply)
}
