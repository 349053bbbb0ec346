//! Parsers of single values: durations, sizes, rates, addresses, peers, operators, paths, URLs.
//!
//! Each parser is strict. Nothing is trimmed or guessed. An error is a text that is printed after the key.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use rustls::pki_types::ServerName;
use tracing_subscriber::filter::{LevelFilter, Targets};

use super::peer_rule::parse_peer;
use super::{ListenAddress, PeerRule, ProxyUrl, Rate, Url};
use crate::ids;
use crate::model::header_names::{looks_like_credential, may_pass};

/// Parses a duration: a whole number with the unit `ms`, `s`, `m`, `h` or `d`. Returns `None` without a unit, with
/// another unit, or if the milliseconds do not fit 64 bits.
pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text[..digits].parse().ok()?;
    let milliseconds = match &text[digits..] {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    number.checked_mul(milliseconds).map(Duration::from_millis)
}

/// Parses a size, and returns it in bytes: a whole number with the unit `B`, `KiB`, `MiB` or `GiB`.
pub(super) fn parse_size(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text[..digits].parse().ok()?;
    let unit = match &text[digits..] {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.checked_mul(unit)
}

/// Parses a rate such as `20/s`: a number from 1 to 1,000,000 per second (`s`), minute (`m`) or hour (`h`).
pub(super) fn parse_rate(text: &str) -> Result<Rate, String> {
    let reason =
        || "must be a number per second, minute or hour, as in \"20/s\", \"100/m\" or \"5/h\"".to_owned();
    let (count, unit) = text.split_once('/').ok_or_else(reason)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(reason()),
    };
    let count = count.parse::<NonZeroU32>().map_err(|_| reason())?;
    // The limiter keeps the interval between requests in whole nanoseconds. At this rate it is 1000 of them; far
    // beyond, rounding would change the rate.
    let sane = count.get() <= 1_000_000;
    sane.then_some(Rate { count, period: Duration::from_secs(seconds) })
        .ok_or_else(|| "must be at most 1000000".into())
}

/// Parses a TCP address with a port, or `unix:` followed by the absolute path of a Unix socket.
pub(super) fn parse_listen_address(text: &str) -> Result<ListenAddress, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        // `sun_path` has 108 bytes, the final NUL included (unix(7)). A relative path would depend on the working
        // directory.
        let fits = path.starts_with('/') && path.len() < 108;
        let address = ListenAddress::Unix { path: path.into(), mode: 0o660 };
        return fits
            .then_some(address)
            .ok_or_else(|| "a Unix socket needs an absolute path of less than 108 bytes".into());
    }
    text.parse()
        .map(ListenAddress::Tcp)
        .map_err(|_| "must be an address with a port, as in \"127.0.0.1:8080\", or \"unix:/path\"".into())
}

/// Parses a log level, or a filter with levels for single targets.
pub(super) fn parse_level(text: &str) -> Result<String, String> {
    // A bare word in a filter is a target to `tracing`. Here it is taken for a misspelt level: `inof` would be
    // accepted and silence the log.
    let known = |part: &str| part.contains('=') || part.parse::<LevelFilter>().is_ok();
    // Both checks are needed: `Targets` takes a bare word, and `known` takes any text with `=` in it.
    let fits = text.split(',').all(known) && text.parse::<Targets>().is_ok();
    fits.then(|| text.to_owned()).ok_or_else(|| {
        "must be error, warn, info, debug or trace, or a filter such as \"info,ccsqm_gateway::token=debug\"".into()
    })
}

/// Parses a name or the id of an operator. Only characters are allowed that need no escaping in logs, metrics and
/// headers.
pub(super) fn parse_name(text: &str) -> Result<String, String> {
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    let fits = plain && (1..=64).contains(&text.len());
    fits.then(|| text.to_owned()).ok_or_else(|| "must be 1 to 64 letters, digits, '.', '_' or '-'".into())
}

/// Parses a result code of a reply: visible ASCII characters. Codes are compared byte by byte, so that an invisible
/// character here would make every success count as a failure.
pub(super) fn parse_code(text: &str) -> Result<String, String> {
    let fits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
    fits.then(|| text.to_owned()).ok_or_else(|| "must be visible ASCII characters, without blanks".into())
}

/// Parses the name of a member of a reply: visible ASCII characters, and blanks between them but not at the ends.
pub(super) fn parse_member(text: &str) -> Result<String, String> {
    let fits =
        !text.is_empty() && text.trim() == text && text.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
    fits.then(|| text.to_owned())
        .ok_or_else(|| "must be visible ASCII characters, with blanks at most between them".into())
}

/// Parses a name that `Host` may carry, without a port. Returns it in lower case.
pub(super) fn parse_host(text: &str) -> Result<String, String> {
    let fits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
    fits.then(|| text.to_ascii_lowercase())
        .ok_or_else(|| "must be visible ASCII characters without blanks, as in \"gateway.internal\"".into())
}

/// Parses the exact path of a route.
pub(super) fn parse_route_path(text: &str) -> Result<String, String> {
    if !text.starts_with("/apiaccess/") {
        // The vendor's token is for these paths only. On another path it would be handed to a service that it is
        // not meant for.
        return Err("must start with /apiaccess/: the token is for those paths only".into());
    }
    // Paths are compared as bytes, on both sides. `%2e`, `//` and `..` could mean another path to the upstream
    // than the one that was checked here.
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-~".contains(&b));
    let clean = plain && !text.contains("//") && !text.split('/').any(|part| part == ".." || part == ".");
    clean
        .then(|| text.to_owned())
        .ok_or_else(|| "must be a plain path: no query, no encoding, no `//`, no `..`".into())
}

/// Parses the URL of an HTTP proxy: `http://`, a host and a port.
pub(super) fn parse_proxy(text: &str) -> Result<ProxyUrl, String> {
    let uri: http::Uri = text.parse().map_err(|_| "is not a URL".to_owned())?;
    if uri.scheme_str() != Some("http") {
        return Err("must start with http://: TLS to the cloud goes through it".into());
    }
    let authority = uri.authority().ok_or("has no host")?;
    if authority.as_str().contains('@') {
        return Err("must not contain a user: put user and password into files and name these in proxy_user_file and \
             proxy_password_file"
            .into());
    }
    if uri.path() != "/" || uri.query().is_some() {
        return Err("must have neither a path nor a query".into());
    }
    let host = authority.host().trim_matches(['[', ']']).to_ascii_lowercase();
    ServerName::try_from(host.as_str()).map_err(|_| "has a host that is neither a name nor an address")?;
    // No default: 80, 3128 and 8080 are all usual for a proxy.
    let port = authority.port_u16().ok_or("must name the port, as in \"http://egress.internal:3128\"")?;
    Ok(ProxyUrl { host, port })
}

/// Parses an `https` URL without user and query. `http` is accepted for a loopback address only.
pub(super) fn parse_url(text: &str) -> Result<Url, String> {
    let not_url = || "is not a URL, as in \"https://service.besclouds.com\"".to_owned();
    let uri: http::Uri = text.parse().map_err(|_| not_url())?;
    let tls = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => return Err("must start with https://, as in \"https://service.besclouds.com\"".into()),
    };
    let authority = uri.authority().ok_or("has no host")?;
    if authority.as_str().contains('@') || uri.query().is_some() {
        return Err("must have neither a user (`name@`) nor a query (`?…`)".into());
    }
    let host = authority.host().trim_matches(['[', ']']).to_ascii_lowercase();
    // `localhost` counts by its name: what it resolves to is up to the administrator of this machine.
    let is_loopback =
        host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
    if !tls && !is_loopback {
        return Err("http:// is allowed for a loopback address only: the credential would cross the network unencrypted"
            .into());
    }
    ServerName::try_from(host.as_str()).map_err(|_| "has a host that is neither a name nor an address")?;
    let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
    Ok(Url { tls, host, port, path: uri.path().to_owned() })
}

/// Parses the address of the admin listener: a TCP address with a port.
pub(super) fn parse_admin_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "must be an address with a port, as in \"127.0.0.1:9090\"".into())
}

/// Parses permission bits in octal, at most `0777`: the set-user-id and sticky bits mean nothing for a socket.
pub(super) fn parse_mode(text: &str) -> Result<u32, String> {
    let bits = u32::from_str_radix(text, 8).ok().filter(|bits| *bits <= 0o777);
    bits.ok_or_else(|| "must be octal permission bits, as in \"0660\"".into())
}

/// Parses a path, relative or absolute, of at least one character.
pub(super) fn parse_path(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() { Err("must not be empty".into()) } else { Ok(text.into()) }
}

/// Parses a URL without a path. The path of a route is appended to it later.
pub(super) fn parse_base_url(text: &str) -> Result<Url, String> {
    let mut url = parse_url(text)?;
    if url.path != "/" {
        return Err("must have no path: each route has a whole path of its own".into());
    }
    url.path.clear();
    Ok(url)
}

/// Parses the peer of a caller. Fails for the id of a user or group that is not mapped in this user namespace, since
/// the kernel shows all of these as one id.
pub(super) fn parse_peer_of_caller(text: &str) -> Result<PeerRule, String> {
    let peer = parse_peer(text)?;
    match peer {
        // Users that the namespace does not map all appear as one id (65534). `uid:65534` would let every one of
        // them in, and `uid:1000` would never match.
        PeerRule::Uid(uid) => ids::users().check(uid)?,
        PeerRule::Gid(gid) => ids::groups().check(gid)?,
        PeerRule::Loopback | PeerRule::Network(_) | PeerRule::Certificate(_) => {}
    }
    Ok(peer)
}

/// Returns the default of `hosts` on a loopback listener: the names by which clients on this machine reach it.
pub(super) fn loopback_names() -> Vec<String> {
    ["localhost", "127.0.0.1", "[::1]"].map(str::to_owned).into()
}

/// Parses the name of a reply header that is passed to callers, in addition to those that are always passed.
pub(super) fn parse_reply_header(text: &str) -> Result<HeaderName, String> {
    match HeaderName::try_from(text) {
        Ok(name) if may_pass(&name) => Ok(name),
        Ok(name) => Err(format!("{name} never passes to callers")),
        Err(_) => Err("must be a list of header names, as in [\"x-trace-id\"]".into()),
    }
}

/// Checks a static header of upstream requests. Fails for one that the gateway sets itself, and for one that looks
/// like a secret.
pub(super) fn check_static_header(name: &str, value: &str) -> Result<(), &'static str> {
    let header = HeaderName::try_from(name).map_err(|_| "is not a header name")?;
    if is_ours(&header) {
        return Err("is set by the gateway itself");
    }
    if looks_like_credential(header.as_str()) {
        return Err("looks like a secret, which must not be in the configuration");
    }
    HeaderValue::from_str(value).map(drop).map_err(|_| "must be a string that a header can have as its value")
}

/// Whether the gateway itself decides about this request header.
fn is_ours(name: &HeaderName) -> bool {
    const OURS: [&str; 19] = [
        "accept",
        "accept-encoding",
        "authorization",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "cookie",
        "expect",
        "host",
        "keep-alive",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "user-agent",
        "x-app-key",
        "x-userid",
    ];
    // Some servers take underscores and dashes for the same (CGI does), so that `x_app_key` could replace
    // `x-app-key`.
    OURS.contains(&&*name.as_str().replace('_', "-"))
}

/// Parses the name of a header that a caller's requests must carry. Fails for a header that generic clients and proxies
/// send by themselves, and for one that looks like a secret.
pub(super) fn parse_required_header(text: &str) -> Result<HeaderName, String> {
    let name = HeaderName::try_from(text).map_err(|_| "must be the name of a header".to_owned())?;
    // The header protects against SSRF: an app that can be made to fetch a URL can rarely be made to add a header. A
    // header that is sent anyway protects against nothing.
    let is_usual = is_ours(&name) || !name.as_str().starts_with("x-") || looks_like_credential(name.as_str());
    let reason = "must begin with x-, and must not be a header that clients or proxies send by themselves";
    if is_usual || USUAL.contains(&name.as_str()) { Err(reason.into()) } else { Ok(name) }
}

/// Request headers that proxies and browsers add by themselves, though they begin with `x-`.
const USUAL: [&str; 7] = [
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-forwarded-port",
    "x-real-ip",
    "x-request-id",
    "x-requested-with",
];
