//! Defaults that depend on other values.
//!
//! Only values that are not set are changed. The limits of callers, the idempotency window and the addresses have fixed
//! defaults: adapting them would break a promise to a caller.

use std::num::NonZeroUsize;
use std::thread::available_parallelism;

use super::context::Context;
use super::forms::AUTO;
use super::trail::LEAST_SEGMENTS;
use super::{Config, Url};

/// The path of the token endpoint, from the vendor's page.
const TOKEN_PATH: &str = "/apigovernance/api/oauth/tokenByAkSk";

/// Replaces defaults that would contradict a value that is set. For example, `upstream.connect_timeout` is lowered to
/// an `upstream.timeout` that is shorter than its default.
pub(super) fn give_way(context: &Context<'_>, config: &mut Config) {
    let is_set = |key: &str| context.is_set(key);
    let Config { server, upstream, token, audit, idempotency, callers, .. } = config;
    if server.workers == AUTO {
        // Each worker needs a connection to the upstream, or it could forward nothing.
        let cores = available_parallelism().map_or(1, NonZeroUsize::get);
        server.workers = cores.min(4).min(upstream.max_connections);
    }
    if !is_set("token.url") {
        token.url = Url { path: TOKEN_PATH.to_owned(), ..upstream.base_url.clone() };
    }
    // `upstream.timeout = "1s"` was refused before, because of a connect time-out of 3 s that was only a default.
    if !is_set("upstream.connect_timeout") {
        upstream.connect_timeout = upstream.connect_timeout.min(upstream.timeout);
    } else if !is_set("upstream.timeout") {
        upstream.timeout = upstream.timeout.max(upstream.connect_timeout);
    }
    if !is_set("server.drain_grace") {
        // Half, not all: the rest is for what is in flight when the grace ends.
        server.drain_grace = server.drain_grace.min(server.drain_timeout / 2);
    } else if !is_set("server.drain_timeout") {
        server.drain_timeout = server.drain_timeout.max(server.drain_grace * 2);
    }
    if let Some(max_size) = audit.max_size
        && !is_set("audit.segment_size")
    {
        // Rounded down to whole KiB, so that the effective configuration shows a size that can be set.
        audit.segment_size = audit.segment_size.min((max_size / LEAST_SEGMENTS) & !0x3ff);
    }
    // Kept for a reload, which must not mistake a default that changed with the callers for a change of the setting.
    idempotency.is_max_keys_set = is_set("idempotency.max_keys");
    if !idempotency.is_max_keys_set {
        let shares = callers.iter().filter_map(|caller| caller.max_keys);
        idempotency.max_keys = shares.fold(idempotency.max_keys, usize::max);
    }
}
