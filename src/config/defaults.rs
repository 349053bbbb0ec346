//! Defaults that depend on other values.

use std::num::NonZeroUsize;
use std::thread::available_parallelism;

use super::context::Context;
use super::forms::AUTO;
use super::trail::LEAST_SEGMENTS;
use super::{Config, Url};

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
