//! Protection of the admin listener against DNS rebinding, by the names in `Host`.
//!
//! The owner of a web page can let its name resolve to this listener's address. A browser then sends the page's requests here
//! and lets the page read the answers. `Host` shows it: it has the page's name. So a name must be one that no stranger can own:
//! an address, or a name that public DNS does not have. Other names are listed in the configuration. This does not authenticate
//! anyone: a program that is no browser sends any `Host`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::{Request, header};

/// Suffixes under which nobody can register a name in public DNS.
const PRIVATE: [&str; 4] = [".svc", ".cluster.local", ".internal", ".local"];

/// The texts of the refusals. They name the setting, since the operator who set up a probe reads them.
const REFUSED: &str = "This listener does not answer to this Host. It takes IP addresses, localhost, names without a dot, and names \
     under .svc, .cluster.local, .internal or .local. List another name in `[admin] hosts` of the configuration, without a port.\n";
const REFUSED_STATUS: &str = "/status does not answer to this Host. It takes localhost and loopback addresses. List another name in \
     `[admin] hosts` of the configuration, without a port.\n";
const MISSING: &str = "Host is missing; without it only /livez and /readyz are answered. Send localhost, an IP address, or a name \
     that is listed in `[admin] hosts` of the configuration.\n";

/// The names that the admin listener answers to.
#[derive(Debug)]
pub(super) struct AdminHosts {
    /// The names of `[admin] hosts`, in lower case, without a dot at the end.
    listed: Vec<String>,
}

/// The name or address in a request.
enum Name {
    Address(IpAddr),
    /// A name in lower case, without port.
    Text(String),
}

impl AdminHosts {
    /// Admits these names beside the usual ones.
    pub(super) fn new(listed: &[String]) -> Self {
        Self { listed: listed.iter().map(|name| whole(name).to_owned()).collect() }
    }

    /// Fails with a text for its sender if a request names another host.
    pub(super) fn check<B>(&self, request: &Request<B>) -> Result<(), &'static str> {
        let path = request.uri().path();
        let is_status = path == "/status";
        let in_target = request.uri().authority().map(|authority| authority.as_str().as_bytes());
        let in_heads = request.headers().get_all(header::HOST).iter().map(http::HeaderValue::as_bytes);
        // Every name must be admitted, the one of an absolute target too: what another reader takes for the host may be any of
        // them.
        let mut is_named = false;
        for name in in_target.into_iter().chain(in_heads).filter(|name| !name.is_empty()) {
            is_named = true;
            if !parse(name).is_some_and(|name| self.takes(&name, is_status)) {
                return Err(if is_status { REFUSED_STATUS } else { REFUSED });
            }
        }
        // Some load balancers probe without `Host` (HTTP/1.0). Browsers always send it, so rebinding is no risk there.
        if is_named || matches!(path, "/livez" | "/readyz") { Ok(()) } else { Err(MISSING) }
    }

    /// Whether the listener answers to a name. `/status` admits only loopback and listed names: it shows addresses and routes.
    fn takes(&self, name: &Name, is_status: bool) -> bool {
        match name {
            Name::Address(address) => !is_status || address.is_loopback() || self.lists(&bracketed(*address)),
            Name::Text(name) => {
                let known = whole(name);
                known == "localhost" || self.lists(known) || (!is_status && is_private(name))
            }
        }
    }

    fn lists(&self, name: &str) -> bool {
        self.listed.iter().any(|listed| listed == name)
    }
}

/// Whether no stranger can own a name.
fn is_private(name: &str) -> bool {
    // A name without any dot is resolved in the local network. With a dot at its end it would be a top-level domain.
    !name.contains('.')
        || PRIVATE.iter().any(|suffix| whole(name).strip_suffix(suffix).is_some_and(|name| !name.is_empty()))
}

/// Returns a name without the dot at its end, which marks it as fully qualified.
fn whole(name: &str) -> &str {
    name.strip_suffix('.').unwrap_or(name)
}

fn bracketed(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

/// Reads a `Host`, without its port. `None` if it is neither an address nor a name.
// Strict: a value that is read in two ways could be an admitted name here and another one to a browser.
fn parse(host: &[u8]) -> Option<Name> {
    let host = std::str::from_utf8(host).ok()?;
    let is_port = |rest: &str| {
        rest.is_empty() || rest.strip_prefix(':').is_some_and(|port| port.bytes().all(|b| b.is_ascii_digit()))
    };
    if let Some(rest) = host.strip_prefix('[') {
        let (address, rest) = rest.split_once(']')?;
        let address: Ipv6Addr = address.parse().ok()?;
        return is_port(rest).then_some(Name::Address(address.into()));
    }
    let (name, port) = host.split_at(host.find(':').unwrap_or(host.len()));
    let is_plain = |label: &str| {
        !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
    };
    if !is_port(port) || !whole(name).split('.').all(is_plain) {
        return None;
    }
    let address = name.parse::<Ipv4Addr>().map(|address| Name::Address(address.into()));
    Some(address.unwrap_or_else(|_| Name::Text(name.to_ascii_lowercase())))
}
