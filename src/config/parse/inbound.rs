//! Where callers and operators connect, and within which bounds.

use super::{good_file, read_admin_address, read_list};
use crate::config::named_files::FileKind;
use crate::config::raw::Kind;
use crate::config::table::{Context, Table};
use crate::config::values::{parse_host, parse_listen_address};
use crate::config::{Admin, Control, ListenAddress, Listener, ListenerTls, Server};

pub(super) fn read_listeners(context: &mut Context<'_>, root: &mut Table) -> Vec<Listener> {
    let tables = root.tables(context, "listeners");
    if tables.is_empty() {
        let address = ListenAddress::Tcp(([127, 0, 0, 1], 8080).into());
        return vec![Listener { address, hosts: Some(loopback_names()), allow_plaintext: false, tls: None }];
    }
    tables.into_iter().map(|table| read_listener(context, table)).collect()
}

fn read_listener(context: &mut Context<'_>, mut table: Table) -> Listener {
    let fallback = ListenAddress::Tcp(([127, 0, 0, 1], 0).into());
    let mut address = table.required(context, "address", fallback, parse_listen_address);
    let named = read_list(context, &mut table, "hosts", parse_host);
    let allow_plaintext = table.boolean(context, "allow_plaintext");
    let tls = table.section_if_any(context, "tls");
    let has_tls = tls.is_some() || context.is_doubtful(&table.key("tls"));
    let tls = tls.and_then(|section| read_tls(context, section));
    let mode = table.parsed(context, "mode", None, |text| {
        let bits = u32::from_str_radix(text, 8).ok().filter(|bits| *bits <= 0o777);
        bits.map(Some).ok_or_else(|| "must be octal permission bits, as in \"0660\"".into())
    });
    match (&mut address, mode) {
        (_, None) => {}
        (ListenAddress::Unix { mode, .. }, Some(bits)) => *mode = bits,
        (ListenAddress::Tcp(_), Some(_)) if context.is_doubtful(&table.key("address")) => {}
        (ListenAddress::Tcp(_), Some(_)) => {
            context.problem_at(&table.key("mode"), "is for Unix sockets only");
        }
    }
    if tls.is_some() && matches!(address, ListenAddress::Unix { .. }) {
        context.problem_at(
            &table.key("tls"),
            "is for TCP listeners only: nobody can read a Unix socket on its way",
        );
    }
    if has_tls && allow_plaintext {
        context.problem_at(
            &table.key("allow_plaintext"),
            "contradicts tls: nothing crosses the network unencrypted there",
        );
    }
    let hosts = match &address {
        ListenAddress::Unix { .. } => None,
        ListenAddress::Tcp(tcp) if tcp.ip().is_loopback() => Some(named.unwrap_or_else(loopback_names)),
        ListenAddress::Tcp(_) => {
            if named.as_ref().is_none_or(Vec::is_empty) && !context.is_doubtful(&table.key("hosts")) {
                let reason = "is needed on a listener that is not on loopback: the names that Host may carry";
                table.lacks(context, "hosts", reason);
            }
            if !allow_plaintext && !has_tls && !context.is_doubtful(&table.key("allow_plaintext")) {
                let reason = "must be true on a listener that is not on loopback and has no tls: callers' requests cross the network unencrypted";
                table.lacks(context, "allow_plaintext", reason);
            }
            named
        }
    };
    table.close(context);
    Listener { address, hosts, allow_plaintext, tls }
}

fn read_tls(context: &mut Context<'_>, mut table: Table) -> Option<ListenerTls> {
    for name in ["cert_file", "key_file"] {
        if !table.members.contains_key(name) {
            table.lacks(context, name, "is missing");
        }
    }
    if table.members.contains_key("client_crl_file") && !table.members.contains_key("client_ca_file") {
        table.lacks(context, "client_ca_file", "is needed for client_crl_file");
    }
    let mut file = |name, kind| table.path(context, name).and_then(|found| good_file(context, found, kind));
    let cert_file = file("cert_file", FileKind::Certificates);
    let client_ca_file = file("client_ca_file", FileKind::ClientCa);
    let client_crl_file = file("client_crl_file", FileKind::ClientCrl);
    let key_file = file("key_file", FileKind::PrivateKey);
    let path = table.path.clone();
    table.close(context);
    let tls = ListenerTls { cert_file: cert_file?, key_file: key_file?, client_ca_file, client_crl_file };
    if let Err((key, reason)) = context.files.check_listener(&tls) {
        context.problem_at(&format!("{path}.{key}"), reason);
    }
    Some(tls)
}

fn loopback_names() -> Vec<String> {
    ["localhost", "127.0.0.1", "[::1]"].map(str::to_owned).into()
}

pub(super) fn read_admin(context: &mut Context<'_>, root: &mut Table) -> Admin {
    let mut table = root.section(context, "admin");
    let address = read_admin_address(context, &mut table);
    let hosts = read_list(context, &mut table, "hosts", parse_host).unwrap_or_default();
    let control = match table.path(context, "control") {
        None => Control::Default,
        Some(path) if path.value == context.folder.join("off") => Control::Off,
        Some(path) => Control::Path(path.value),
    };
    table.close(context);
    Admin { address, hosts, control }
}

/// No worker is without a connection to the upstream, of which there are `connections`.
pub(super) fn read_server(context: &mut Context<'_>, root: &mut Table, connections: usize) -> Server {
    let mut table = root.section(context, "server");
    let auto = || std::thread::available_parallelism().map_or(1, |cores| cores.get().min(4).min(connections));
    let workers = match table.members.get("workers").map(|value| &value.kind) {
        Some(Kind::Text(text) | Kind::Loose(text)) if text == "auto" => {
            drop(table.take(context, "workers"));
            auto()
        }
        _ => table.integer(context, "workers", 1, 1..=64),
    };
    let server = Server {
        workers,
        max_connections: table.integer(context, "max_connections", 4096, 1..=1_000_000),
        max_in_flight: table.integer(context, "max_in_flight", 1024, 1..=100_000),
        max_body: usize::try_from(table.size(context, "max_body", 256 * 1024, ("1KiB", "16MiB")))
            .unwrap_or(usize::MAX),
        max_head: usize::try_from(table.size(context, "max_head", 16 * 1024, ("8KiB", "64KiB")))
            .unwrap_or(usize::MAX),
        max_unfinished: usize::try_from(table.size(context, "max_unfinished", 32 << 20, ("1MiB", "16GiB")))
            .unwrap_or(usize::MAX),
        header_timeout: table.duration(context, "header_timeout", "10s", ("100ms", "5m")),
        body_timeout: table.duration(context, "body_timeout", "10s", ("100ms", "5m")),
        idle_timeout: table.duration(context, "idle_timeout", "60s", ("100ms", "1h")),
        drain_grace: table.duration(context, "drain_grace", "1s", ("0s", "5m")),
        drain_timeout: table.duration(context, "drain_timeout", "10s", ("0s", "10m")),
    };
    table.close(context);
    server
}
