//! `check`: the configuration in effect, and who can use the credential.

use std::process::ExitCode;

use ccsqm_gateway::{
    config::{Config, LOOPBACK_NOTICE, PeerRule, SecretSource},
    route::Routes,
};

use super::{BAD_CONFIGURATION, Configured};

pub(super) fn run(configured: &Configured) -> anyhow::Result<ExitCode> {
    let config = match configured.load() {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    if let Err(error) = Routes::new(&config) {
        eprintln!("{}: {error}", configured.config.display());
        return Ok(ExitCode::from(BAD_CONFIGURATION));
    }
    println!("{} is a good configuration\n", configured.config.display());
    print(&config);
    Ok(ExitCode::SUCCESS)
}

fn print(config: &Config) {
    println!("upstream    {}", config.upstream.base_url);
    println!("token       {}", config.token.url);
    println!("admin       {}", config.admin.address);
    println!("audit       {}", config.audit.directory.display());
    let server = &config.server;
    println!(
        "server      workers {}, connections {}, in flight {}, body {} B; head {:?}, body {:?}, idle {:?}, drain {:?}",
        server.workers,
        server.max_connections,
        server.max_in_flight,
        server.max_body,
        server.header_timeout,
        server.body_timeout,
        server.idle_timeout,
        server.drain_timeout,
    );
    println!(
        "exchange    connect {:?}, whole {:?}",
        config.upstream.connect_timeout, config.upstream.timeout
    );
    println!("quota       {}/{:?}, burst {}", config.quota.count, config.quota.period, config.quota.burst);
    for credential in &config.credentials {
        let place = |source: &SecretSource| match source {
            SecretSource::File(path) => format!("file {}", path.display()),
            SecretSource::Env(name) => format!("variable {name}"),
        };
        let (key, secret) = (place(&credential.app_key), place(&credential.app_secret));
        println!("credential  {}: app key from {key}, secret from {secret}", credential.name);
    }
    println!("\nWho can use a credential:");
    for caller in &config.callers {
        let peer = match caller.peer {
            PeerRule::Loopback => "every process that reaches a loopback listener".to_owned(),
            PeerRule::Uid(uid) => format!("processes of user {uid} at a Unix socket"),
            PeerRule::Gid(gid) => format!("processes of group {gid} at a Unix socket"),
        };
        let operators: Vec<_> =
            std::iter::once(&caller.operator_id).chain(&caller.operators).map(String::as_str).collect();
        println!(
            "  {}: {peer}; with {}; {}; as operator {}; {}/{:?}, burst {}",
            caller.name,
            caller.credential,
            caller.routes.join(", "),
            operators.join(" or "),
            caller.rate_limit.count,
            caller.rate_limit.period,
            caller.rate_limit.burst,
        );
    }
    for listener in &config.listeners {
        println!("  listening on {}", listener.address);
    }
    if config.trusts_loopback() {
        println!("\nNote: {LOOPBACK_NOTICE}");
    }
}
