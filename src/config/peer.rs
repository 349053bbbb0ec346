//! Which peers a caller is: by its address, its certificate, or the user of its process.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rustls::pki_types::ServerName;

/// How the names in certificates begin.
pub const SPIFFE: &str = "spiffe://";
/// How DNS names in certificates begin in the configuration.
pub const DNS: &str = "dns:";

/// Which peers a caller is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerRule {
    /// Any TCP peer with a loopback address.
    Loopback,
    /// Any TCP peer with an address of this network. Of several networks that hold it, the smallest counts.
    Network(IpNet),
    /// Who shows a certificate of the listener's client CA with this name in it: `spiffe://…` or `dns:…`.
    Certificate(String),
    /// A process of this user at a Unix socket.
    Uid(u32),
    /// A process whose primary group this is, at a Unix socket: the kernel names no others.
    Gid(u32),
}

/// What `loopback` means.
const LOOPBACK: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128)),
];

/// Of two networks one lies within the other, or they share no address.
pub(super) fn meets_loopback(network: &IpNet) -> bool {
    LOOPBACK.iter().any(|loopback| loopback.contains(network) || network.contains(loopback))
}

impl PeerRule {
    /// In words.
    pub(super) fn who(&self) -> String {
        match self {
            Self::Loopback => "every process of this network namespace".into(),
            Self::Network(network) => format!("every process with an address of {network}"),
            Self::Certificate(name) => format!("whoever holds a certificate for {name}"),
            Self::Uid(uid) => format!("every process of user {uid}"),
            Self::Gid(gid) => format!("every process whose primary group is {gid}"),
        }
    }

    /// Whether one peer can be both. A process has a user and a primary group, so that any `uid` and any `gid` can meet in one. Of
    /// nested networks the smaller one counts.
    pub(super) fn can_be(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Uid(a), Self::Uid(b)) | (Self::Gid(a), Self::Gid(b)) => a == b,
            (Self::Uid(_), Self::Gid(_)) | (Self::Gid(_), Self::Uid(_)) => true,
            (Self::Certificate(a), Self::Certificate(b)) => a == b,
            (a, b) => a.networks().iter().any(|network| b.networks().contains(network)),
        }
    }

    /// The networks of a caller that is known by its address.
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

/// The spelling of the SPIFFE-ID standard, section 2: a trust domain in lower case, and a path without empty, `.` or
/// `..` segments.
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

/// `None`: it is no network at all.
fn parse_network(text: &str) -> Option<Result<IpNet, String>> {
    let network: IpNet = text.parse().ok()?;
    if network.trunc() != network {
        return Some(Err(format!("has bits beyond its prefix; the network is {}", network.trunc())));
    }
    let is_mapped = matches!(network, IpNet::V6(v6) if v6.addr().to_ipv4_mapped().is_some());
    Some(if is_mapped { Err("must be written as an IPv4 network".into()) } else { Ok(network) })
}
