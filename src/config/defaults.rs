//! Defaults: of each section, and those that give way to what somebody set.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::thread::available_parallelism;
use std::time::Duration;

use http::StatusCode;

use super::context::Context;
use super::forms::AUTO;
use super::trail::LEAST_SEGMENTS;
use super::{
    Admin, Audit, BareIds, Caller, Config, Control, Http2, Idempotency, ListenAddress, Listener, Log,
    LogFormat, LogRequests, PeerRule, Quota, Rate, RefusalBudget, Route, Server, Token, Upstream, Url,
    WithoutKey,
};
use crate::model::durability::Durability;

const SECOND: Duration = Duration::from_secs(1);

impl Default for Listener {
    fn default() -> Self {
        let address = ListenAddress::Tcp((Ipv4Addr::LOCALHOST, 8080).into());
        Self { address, mode: None, hosts: None, allow_plaintext: None, tls: None }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self { address: (Ipv4Addr::LOCALHOST, 9090).into(), hosts: Vec::new(), control: Control::Default }
    }
}

impl Default for Server {
    fn default() -> Self {
        Self {
            workers: 1,
            max_connections: 4096,
            max_in_flight: 1024,
            max_body: 256 << 10,
            max_head: 16 << 10,
            max_unfinished: 32 << 20,
            header_timeout: 10 * SECOND,
            body_timeout: 10 * SECOND,
            idle_timeout: 60 * SECOND,
            drain_grace: SECOND,
            drain_timeout: 10 * SECOND,
        }
    }
}

impl Default for Upstream {
    fn default() -> Self {
        Self {
            // What the credential is sent to is named by somebody.
            base_url: Url { tls: true, host: String::new(), port: 443, path: String::new() },
            connect_timeout: 3 * SECOND,
            timeout: 30 * SECOND,
            idle_timeout: 10 * SECOND,
            max_connections: 64,
            breaker_failures: 10,
            breaker_pause: SECOND,
            http2: Http2::Off,
            ca_file: None,
            client_cert_file: None,
            client_key_file: None,
            proxy: None,
            proxy_user_file: None,
            proxy_password_file: None,
            headers: BTreeMap::new(),
            reply_headers: Vec::new(),
        }
    }
}

impl Default for Token {
    fn default() -> Self {
        Self {
            url: Upstream::default().base_url, // see `give_way`
            lifetime: Some(600 * SECOND),
            timeout: 5 * SECOND,
            wait: 5 * SECOND,
            refused_statuses: vec![StatusCode::UNAUTHORIZED],
        }
    }
}

impl Default for Caller {
    fn default() -> Self {
        Self {
            name: String::new(),
            peer: PeerRule::Loopback,
            operator_id: String::new(),
            operators: Vec::new(),
            credential: String::new(),
            routes: Vec::new(),
            rate_limit: Rate::per_second(20),
            burst: 40,
            require_header: None,
            bare_ids: BareIds::default(),
            max_keys: None,
            frozen: false,
        }
    }
}

impl Default for Quota {
    fn default() -> Self {
        Self { rate: Rate::per_second(50), burst: 100 }
    }
}

impl Rate {
    fn per_second(count: u32) -> Self {
        Self { count: NonZeroU32::new(count).unwrap_or(NonZeroU32::MIN), period: SECOND }
    }
}

impl Default for Audit {
    fn default() -> Self {
        let RefusalBudget { strangers, callers } = RefusalBudget::default();
        Self {
            directory: PathBuf::from("audit"),
            must_exist: false,
            durability: Durability::default(),
            segment_size: 64 << 20,
            retain: Some(30 * 86_400 * SECOND),
            max_size: None,
            stranger_refusals: strangers,
            caller_refusals: callers,
            key_file: None,
            fields: BTreeMap::new(),
        }
    }
}

impl Default for Idempotency {
    fn default() -> Self {
        Self {
            window: 86_400 * SECOND,
            max_keys: 1_000_000,
            is_max_keys_set: false,
            reply_memory: 64 << 20,
            without_key: WithoutKey::Guard,
            fingerprint_window: 600 * SECOND,
        }
    }
}

impl Default for Route {
    fn default() -> Self {
        Self {
            name: String::new(),
            path: String::new(),
            contract_file: None,
            result_field: "resultCode".into(),
            success_codes: Vec::new(),
            credential: None,
            timeout: None,
            frozen: false,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Auto, requests: LogRequests::Failures }
    }
}

const TOKEN_PATH: &str = "/apigovernance/api/oauth/tokenByAkSk";

/// What nobody set gives way to what somebody set, where the two must stand in a relation. Limits of callers, the window of
/// keys and addresses give way to nothing: another value there would be another promise.
pub(super) fn give_way(context: &Context<'_>, config: &mut Config) {
    let is_set = |key: &str| context.is_set(key);
    let Config { server, upstream, token, audit, idempotency, callers, .. } = config;
    if server.workers == AUTO {
        // No worker is without a connection to the upstream.
        let cores = available_parallelism().map_or(1, NonZeroUsize::get);
        server.workers = cores.min(4).min(upstream.max_connections);
    }
    if !is_set("token.url") {
        token.url = Url { path: TOKEN_PATH.to_owned(), ..upstream.base_url.clone() };
    }
    if !is_set("upstream.connect_timeout") {
        upstream.connect_timeout = upstream.connect_timeout.min(upstream.timeout);
    } else if !is_set("upstream.timeout") {
        upstream.timeout = upstream.timeout.max(upstream.connect_timeout);
    }
    if !is_set("server.drain_grace") {
        server.drain_grace = server.drain_grace.min(server.drain_timeout / 2);
    } else if !is_set("server.drain_timeout") {
        server.drain_timeout = server.drain_timeout.max(server.drain_grace * 2);
    }
    if let Some(max_size) = audit.max_size
        && !is_set("audit.segment_size")
    {
        audit.segment_size = audit.segment_size.min((max_size / LEAST_SEGMENTS) & !0x3ff); // whole KiB
    }
    idempotency.is_max_keys_set = is_set("idempotency.max_keys");
    if !idempotency.is_max_keys_set {
        let shares = callers.iter().filter_map(|caller| caller.max_keys);
        idempotency.max_keys = shares.fold(idempotency.max_keys, usize::max);
    }
}
