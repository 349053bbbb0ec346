//! Peer rules: a rule identifies the peers of one caller by address, by certificate, or by the user or group of the
//! process.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rustls::pki_types::ServerName;

/// The prefix of SPIFFE IDs, in certificates and in the configuration.
pub const SPIFFE: &str = "spiffe://";
/// The prefix of DNS names of certificates in the configuration.
pub const DNS: &str = "dns:";

/// The rule that says which peers count as one caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerRule {
    /// Any TCP peer with a loopback address.
    Loopback,
    /// Any TCP peer with an address in this network. If the networks of several callers contain the address, the
    /// smallest decides.
    Network(IpNet),
    /// Any peer with a certificate of the listener's client CA that has this name: `spiffe://…` or `dns:…`.
    Certificate(String),
    /// A process of this user, at a Unix socket.
    Uid(u32),
    /// A process whose primary group this is, at a Unix socket. The kernel shows no other groups of a peer
    /// (`SO_PEERCRED`, unix(7)).
    Gid(u32),
}

/// The networks that `loopback` stands for: 127.0.0.0/8 (RFC 1122 section 3.2.1.3) and ::1 (RFC 4291 section
/// 2.5.3).
const LOOPBACK: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128)),
];

/// Whether a network shares an address with loopback.
// Networks of CIDR that overlap are nested, so it is enough to check which one contains the other.
pub(super) fn meets_loopback(network: &IpNet) -> bool {
    LOOPBACK.iter().any(|loopback| loopback.contains(network) || network.contains(loopback))
}

impl PeerRule {
    /// Describes the peers in words, for `check`.
    pub(super) fn who(&self) -> String {
        match self {
            Self::Loopback => "every process of this network namespace".into(),
            Self::Network(network) => format!("every process with an address of {network}"),
            Self::Certificate(name) => format!("every client with a certificate for {name}"),
            Self::Uid(uid) => format!("every process of user {uid}"),
            Self::Gid(gid) => format!("every process whose primary group is {gid}"),
        }
    }

    /// Whether one peer can match both rules. Networks of different sizes count as different, since the smaller one
    /// decides.
    pub(super) fn can_be(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Uid(a), Self::Uid(b)) | (Self::Gid(a), Self::Gid(b)) => a == b,
            // Each process has a user and a primary group. So any `uid` and any `gid` can meet in one, and which
            // caller it is would depend on the order in the file.
            (Self::Uid(_), Self::Gid(_)) | (Self::Gid(_), Self::Uid(_)) => true,
            (Self::Certificate(a), Self::Certificate(b)) => a == b,
            (a, b) => a.networks().iter().any(|network| b.networks().contains(network)),
        }
    }

    /// Returns the networks of a caller that is identified by its address; empty for other callers.
    pub fn networks(&self) -> &[IpNet] {
        match self {
            Self::Loopback => &LOOPBACK,
            Self::Network(network) => std::slice::from_ref(network),
            Self::Certificate(_) | Self::Uid(_) | Self::Gid(_) => &[],
        }
    }
}

impl fmt::Display for PeerRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loopback => f.write_str("loopback"),
            Self::Network(network) => network.fmt(f),
            Self::Certificate(name) => f.write_str(name),
            Self::Uid(uid) => write!(f, "uid:{uid}"),
            Self::Gid(gid) => write!(f, "gid:{gid}"),
        }
    }
}

/// Parses a `peer`. Does not check that a user or group exists.
pub(super) fn parse_peer(text: &str) -> Result<PeerRule, String> {
    let reason = || {
        "must be \"loopback\", a network as in \"10.1.0.0/16\", \"spiffe://…\", \"dns:…\", \"uid:N\" or \"gid:N\"".to_owned()
    };
    match text.split_once(':') {
        None if text == "loopback" => Ok(PeerRule::Loopback),
        Some(("uid", id)) => id.parse().map(PeerRule::Uid).map_err(|_| reason()),
        Some(("gid", id)) => id.parse().map(PeerRule::Gid).map_err(|_| reason()),
        Some(("dns", name)) => parse_dns_name(name).map(PeerRule::Certificate),
        Some(("spiffe", _)) => parse_spiffe_id(text).map(PeerRule::Certificate),
        _ => parse_network(text).map_or_else(|| Err(reason()), |network| network.map(PeerRule::Network)),
    }
}

fn parse_dns_name(name: &str) -> Result<String, String> {
    let is_name = matches!(ServerName::try_from(name), Ok(ServerName::DnsName(_)));
    let name = name.to_ascii_lowercase();
    is_name
        .then(|| format!("{DNS}{name}"))
        .ok_or_else(|| "must be a whole DNS name, without wildcards".into())
}

/// Checks a SPIFFE ID and returns it unchanged. The SPIFFE-ID standard, section 2, allows a trust domain in lower case,
/// and a path without empty, `.` or `..` segments. The text may have at most 2048 bytes.
fn parse_spiffe_id(text: &str) -> Result<String, String> {
    let reason = || "must be a SPIFFE ID, as in \"spiffe://example.org/qa/console\"".to_owned();
    let (domain, path) =
        text.strip_prefix(SPIFFE).and_then(|rest| rest.split_once('/')).ok_or_else(reason)?;
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    let good_domain = !domain.is_empty() && domain.bytes().all(|b| is_plain(b) && !b.is_ascii_uppercase());
    let good_path =
        path.split('/').all(|part| !matches!(part, "" | "." | "..") && part.bytes().all(is_plain));
    let fits = text.len() <= 2048 && good_domain && good_path;
    fits.then(|| text.to_owned()).ok_or_else(reason)
}

/// Parses a network such as `10.1.0.0/16`. Returns `None` if the text is not a network, and an error for bits beyond
/// the prefix and for an IPv4 network written as IPv6.
fn parse_network(text: &str) -> Option<Result<IpNet, String>> {
    let network: IpNet = text.parse().ok()?;
    if network.trunc() != network {
        return Some(Err(format!("has bits beyond its prefix; the network is {}", network.trunc())));
    }
    let is_mapped = matches!(network, IpNet::V6(v6) if v6.addr().to_ipv4_mapped().is_some());
    Some(if is_mapped { Err("must be written as an IPv4 network".into()) } else { Ok(network) })
}
