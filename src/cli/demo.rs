//! The command `demo`: runs the gateway on a sandbox of the cloud, with an example request.
//!
//! The gateway is built from a configuration file, as users run it. It shares nothing with the sandbox but a URL and the files
//! with the secrets.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context as _, bail, ensure};
use ccsqm_gateway::app::App;
use ccsqm_gateway::config::ListenAddress;
use ccsqm_gateway::preflight;
use ccsqm_gateway::sandbox::{Options, Sandbox};
use tempfile::TempDir;
use tokio::sync::oneshot;

use super::out::{complain, out};
use super::parse_address;
use super::signals::{Asked, HangUp, Signals, while_listening};

const PATH: &str = "/apiaccess/CCSQM/rest/ccisqm/v1/qualitytask/appointQualityTask";

/// The example of the vendor's page of this call.
const EXAMPLE: &str = r#"{"qualityTaskId":"954645333549048833","setCountsType":1,"isTakeEffect":0,"setCounts":[{"personID":"1600226476732482572","count":2}]}"#;

/// Run the gateway on a sandbox of the cloud, with an example request.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Send the example request, show it, and exit.
    #[arg(long)]
    once: bool,
    /// Address for callers; with `--once` any free port.
    #[arg(long, value_name = "ADDR", value_parser = parse_address, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Address of the admin listener; with `--once` any free port.
    #[arg(long, value_name = "ADDR", value_parser = parse_address, default_value = "127.0.0.1:9090")]
    admin: SocketAddr,
}

pub(super) fn run(args: Args, signals: Signals) -> anyhow::Result<ExitCode> {
    if args.once {
        return demo(&args, None);
    }
    // SIGHUP means that the terminal is gone. A stop removes the temporary directory; the default effect of the signal would not.
    while_listening(signals, HangUp::Stops, move |asked| demo(&args, Some(&asked)))
}

/// Runs the demo: until a stop, or without `asked` for one request, which it shows.
fn demo(args: &Args, asked: Option<&Asked>) -> anyhow::Result<ExitCode> {
    let sandbox = Sandbox::start(options()).context("the sandbox")?;
    let folder = TempDir::with_prefix("ccsqm-gateway-demo-")?;
    let (listen, admin) = if args.once {
        (SocketAddr::from(([127, 0, 0, 1], 0)), SocketAddr::from(([127, 0, 0, 1], 0)))
    } else {
        (args.listen, args.admin)
    };
    let config = write_configuration(folder.path(), &sandbox, listen, admin)?;
    // Without the environment: variables that are set for a real gateway must not reach the demo.
    let config = preflight::load(&config, &[], [])?;
    if !args.once {
        drop(super::begin_log(&config.log)?);
    }
    let app = App::build(config, None)?;
    let Some(ListenAddress::Tcp(address)) = app.addresses().next().cloned() else { bail!("no TCP listener") };
    if let Some(asked) = asked {
        introduce(address, admin, &sandbox, folder.path());
        if asked.started() {
            app.run(asked.clone().stopped(), None)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let (stop, stopped) = oneshot::channel::<()>();
    let running = thread::spawn(move || app.run(async { drop(stopped.await) }, None));
    let shown = show_one(address, &sandbox, folder.path());
    let _ = stop.send(());
    let ran = running.join().map_err(|_| anyhow::anyhow!("the gateway panicked"))?;
    // `--once` has no log, and `cli::run` relies on the log for some errors. Before `shown`, which a gateway that ended explains.
    ran.inspect_err(|error| complain!("ccsqm-gateway: {error}"))?;
    shown?;
    Ok(ExitCode::SUCCESS)
}

/// Returns the options of the sandbox.
// With an app key of 16 bytes and more: the gateway searches replies only for secrets of that length, and warns about others.
fn options() -> Options {
    Options { app_key: "app-key-of-the-demo".into(), ..Options::default() }
}

fn write_configuration(
    folder: &Path,
    sandbox: &Sandbox,
    listen: SocketAddr,
    admin: SocketAddr,
) -> anyhow::Result<std::path::PathBuf> {
    let options = options();
    fs::write(folder.join("app_key"), options.app_key)?;
    fs::write(folder.join("app_secret"), options.app_secret)?;
    let path = folder.join("gateway.toml");
    let text = format!(
        r#"[[listeners]]
address = "{listen}"

[admin]
address = "{admin}"

[upstream]
base_url = "{}"

[[credentials]]
name = "default"
app_key_file = "app_key"
app_secret_file = "app_secret"

[[callers]]
name = "qa-console"
peer = "loopback"
operator_id = "1611917095665261978"
credential = "default"
routes = ["appointQualityTask"]
"#,
        sandbox.url()
    );
    fs::write(&path, text)?;
    Ok(path)
}

fn introduce(address: SocketAddr, admin: SocketAddr, sandbox: &Sandbox, folder: &Path) {
    out!("gateway  http://{address}");
    out!("admin    http://{admin}/status");
    out!("sandbox  {}/_sandbox/requests", sandbox.url());
    out!("audit    {}", folder.join("audit").display());
    out!("");
    out!("Try it:");
    out!("");
    out!("curl -i http://{address}{PATH} -H 'Content-Type: application/json' -d '{EXAMPLE}'");
    out!("");
    out!("Ctrl-C stops it.");
}

fn show_one(address: SocketAddr, sandbox: &Sandbox, folder: &Path) -> anyhow::Result<()> {
    let request = format!(
        "POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{EXAMPLE}",
        EXAMPLE.len()
    );
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(request.as_bytes())?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    show("What the caller sent, with no credential:", &request);
    let received = sandbox.requests();
    let [received] = received.as_slice() else { bail!("the upstream received {} requests", received.len()) };
    let head = String::from_utf8_lossy(&received.head).into_owned();
    // The demo is also a test of the installation: it fails unless the gateway has added each of these once.
    for name in ["authorization", "x-app-key", "x-userid"] {
        let count =
            head.lines().filter(|line| line.to_ascii_lowercase().starts_with(&format!("{name}:"))).count();
        ensure!(count == 1, "the upstream received {count} times {name}");
    }
    let masked: Vec<_> = head.lines().map(mask).collect();
    show(
        "What the upstream received:",
        &format!("{}\n{}", masked.join("\n"), String::from_utf8_lossy(&received.body)),
    );
    show("What the caller got:", &reply);
    ensure!(reply.contains("0409000") && reply.contains("x-gateway-outcome: succeeded"), "not succeeded");
    show("What the audit trail says:", &audit_records(&folder.join("audit"))?);
    Ok(())
}

/// Returns a header line with its token masked: people copy what a demo shows.
fn mask(line: &str) -> String {
    match line.split_once(':') {
        Some((name, value)) if name.eq_ignore_ascii_case("authorization") => {
            format!("{name}: Bearer {}", "*".repeat(value.len().saturating_sub(" Bearer ".len())))
        }
        _ => line.to_owned(),
    }
}

fn show(title: &str, text: &str) {
    out!("{title}");
    out!("");
    for line in text.trim_end().lines() {
        out!("  {line}");
    }
    out!("");
}

/// Returns the two records of the request: intent and outcome.
///
/// # Errors
///
/// They are not in the trail within 5 s.
// Without a key a reply does not wait for its outcome to be written, so that the record may come after it.
fn audit_records(directory: &Path) -> anyhow::Result<String> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let mut records = Vec::new();
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "jsonl") {
                let text = fs::read_to_string(&path)?;
                let of_request =
                    |line: &&str| line.contains(r#""kind":"intent""#) || line.contains(r#""kind":"outcome""#);
                records.extend(text.lines().filter(of_request).map(str::to_owned));
            }
        }
        match records.len() {
            2 => return Ok(records.join("\n")),
            count => ensure!(Instant::now() < deadline, "{count} audit records"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}
