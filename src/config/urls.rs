//! URLs, split into the parts that connections and `Host` need.

use std::fmt;

/// An `http` or `https` URL in parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// Whether the scheme is `https`.
    pub tls: bool,
    /// Host name in lower case, or IP address; IPv6 without brackets.
    pub host: String,
    /// The port, 443 or 80 if the URL names none.
    pub port: u16,
    /// The path, without a query. It is `/` at least, except in `upstream.base_url`, where it is empty: the path of a
    /// route is appended there.
    pub path: String,
}

/// The address of an HTTP proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyUrl {
    /// Host name in lower case, or IP address; IPv6 without brackets.
    pub host: String,
    /// The port, which the URL must name.
    pub port: u16,
}

impl Url {
    /// Returns the value for `Host`: the host, and the port unless it is the default port of the scheme.
    pub fn authority(&self) -> String {
        let own = if self.tls { 443 } else { 80 };
        if self.port == own { bracketed(&self.host) } else { self.authority_with_port() }
    }

    /// Returns the host and the port, as CONNECT needs them (RFC 9110 section 9.3.6).
    pub fn authority_with_port(&self) -> String {
        format!("{}:{}", bracketed(&self.host), self.port)
    }
}

/// Returns a host as it is written in a URL: IPv6 in brackets (RFC 3986 section 3.2.2).
fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

impl fmt::Display for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}:{}", bracketed(&self.host), self.port)
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority(), self.path)
    }
}
