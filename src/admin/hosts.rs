//! Which `Host` the admin listener answers to.
//!
//! A page in a browser can make a name of its own lead to this listener (DNS rebinding) and read what it answers: the
//! request looks as if it came from here, but `Host` holds the page's name. So a name must be one that no stranger can
//! own: an address, or a name that public DNS does not have. Others are listed in the configuration.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::{Request, header};

/// Suffixes that are not for sale.
const PRIVATE: [&str; 4] = [".svc", ".cluster.local", ".internal", ".local"];

/// Why a request is not answered.
const REFUSED: &str = "This listener does not answer to this Host. It takes IP addresses, localhost, names without a dot, and names \
     under .svc, .cluster.local, .internal or .local. List another name in `[admin] hosts` of the configuration, without a port.\n";
const REFUSED_STATUS: &str = "/status does not answer to this Host. It takes localhost and loopback addresses. List another name in \
     `[admin] hosts` of the configuration, without a port.\n";
const MISSING: &str = "Host is missing; without it only /livez and /readyz are answered. Send localhost, an IP address, or a name \
     that is listed in `[admin] hosts` of the configuration.\n";

/// The names of the admin listener.
#[derive(Debug)]
pub(super) struct Hosts {
    /// In lower case.
    listed: Vec<String>,
}

/// One name of the listener, as a request has it.
enum Name {
    Address(IpAddr),
    /// In lower case, without port.
    Text(String),
}

impl Hosts {
    pub(super) fn new(listed: &[String]) -> Self {
        Self { listed: listed.iter().map(|name| whole(name).to_owned()).collect() }
    }

    /// Whether the request is for this listener; else what its sender should know.
    pub(super) fn check<B>(&self, request: &Request<B>) -> Result<(), &'static str> {
        let path = request.uri().path();
        let is_status = path == "/status";
        let in_target = request.uri().authority().map(|authority| authority.as_str().as_bytes());
        let in_heads = request.headers().get_all(header::HOST).iter().map(http::HeaderValue::as_bytes);
        let mut is_named = false;
        for name in in_target.into_iter().chain(in_heads).filter(|name| !name.is_empty()) {
            is_named = true;
            if !parse(name).is_some_and(|name| self.takes(&name, is_status)) {
                return Err(if is_status { REFUSED_STATUS } else { REFUSED });
            }
        }
        // No browser leaves it out; some load balancers do.
        if is_named || matches!(path, "/livez" | "/readyz") { Ok(()) } else { Err(MISSING) }
    }

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

/// Whether no stranger can own a name. A name without a dot is one of the local network.
fn is_private(name: &str) -> bool {
    !name.contains('.')
        || PRIVATE.iter().any(|suffix| whole(name).strip_suffix(suffix).is_some_and(|name| !name.is_empty()))
}

/// A name without the dot that says that it is a whole one.
fn whole(name: &str) -> &str {
    name.strip_suffix('.').unwrap_or(name)
}

fn bracketed(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

/// Takes the port off. Nothing if it is neither an address nor a name.
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
