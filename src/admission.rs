//! Stage 1: is there room, and who calls.
//!
//! Decides from what the kernel says about the peer and from the head alone; not a byte of the body is
//! read. Guarantees that whoever passes is exactly one configured caller, speaks to a name of this
//! listener, and is not a browser. Does not decide what the caller may do: that is `route`.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use foldhash::fast::RandomState;
use http::{HeaderName, HeaderValue};
use ipnet::IpNet;
use thiserror::Error;

use crate::concurrency::NoRoom;
use crate::config::{BareIds, PeerRule};
use crate::model::index::CallerIndex;
use crate::model::peer::Peer;
use crate::rate_limit::Limiter;
use crate::request_head::Inbound;
use crate::{config, ids};

/// A configured caller.
#[derive(Debug)]
pub struct Caller {
    /// Its place in the configuration.
    pub index: CallerIndex,
    /// There is no other caller.
    pub is_alone: bool,
    /// The most keys that it may hold; `None`: half of all, or all if it is alone.
    pub max_keys: Option<usize>,
    /// Its name in the configuration, the audit trail and the metrics.
    pub name: Arc<str>,
    /// The operator it acts as when it names none.
    pub operator: HeaderValue,
    /// Other operators it may name.
    pub operators: Vec<HeaderValue>,
    /// Its own limit.
    pub limit: Arc<Limiter>,
    /// A header that its requests must carry. No secret: an app that can be made to send requests, as by a URL
    /// that it fetches, can rarely be made to send a header; nor can a page in a browser.
    pub require_header: Option<HeaderName>,
    /// Which ids it may send as bare numbers.
    pub bare_ids: BareIds,
    /// Its requests are refused for now.
    pub frozen: bool,
}

/// Who calls; not admitted yet.
#[derive(Debug)]
pub struct Known<'a>(&'a Arc<Caller>);

impl<'a> Known<'a> {
    /// Who calls.
    pub fn caller(&self) -> &'a Arc<Caller> {
        self.0
    }

    /// Admits the request, unless something is missing or the caller is frozen.
    pub fn admit(self, head: &Inbound<'_>) -> Result<Admitted<'a>, Denied> {
        let Self(caller) = self;
        match &caller.require_header {
            Some(name) if !head.has(name) => Err(Denied::HeaderMissing(name.clone())),
            _ if caller.frozen => Err(Denied::Frozen),
            _ => Ok(Admitted { caller }),
        }
    }
}

/// Proof that a request was admitted: only this module makes one.
#[derive(Debug)]
pub struct Admitted<'a> {
    caller: &'a Arc<Caller>,
}

impl<'a> Admitted<'a> {
    /// Who calls.
    pub fn caller(&self) -> &'a Arc<Caller> {
        self.caller
    }
}

/// The names that a listener answers to. `None`: any, as on a Unix socket.
#[derive(Clone, Debug)]
pub struct Hosts(Option<Vec<String>>);

/// Why a request was not admitted.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Denied {
    /// There is no room.
    #[error(transparent)]
    Room(#[from] NoRoom),
    /// The head is ambiguous.
    #[error("{0}")]
    Head(&'static str),
    /// `Host` is not a name of the listener.
    #[error(
        "the gateway does not answer to the name in Host; call it by the name that its operators gave you, or ask them to add yours to `hosts` of the listener"
    )]
    Host,
    /// `Origin` or `Sec-Fetch-Site` is present.
    #[error(
        "requests from browsers, which send Origin or Sec-Fetch-Site, are refused; call from a server-side process"
    )]
    Browser,
    /// No caller is configured for the peer.
    #[error("no caller is configured for this peer; ask the operators of the gateway to add one")]
    Caller,
    /// The caller's `require_header` is not there.
    #[error("requests of this caller must carry the header {0}, with any value")]
    HeaderMissing(HeaderName),
    /// The caller is `frozen`.
    #[error("the operators of the gateway have frozen this caller, so that nothing is sent for it; ask them")]
    Frozen,
}

/// Whom the gateway knows.
#[derive(Debug, Default)]
pub struct Admission {
    /// The caller of all loopback addresses, where one has them all: the sidecar's case, found without a hash.
    local: Option<Arc<Caller>>,
    networks: HashMap<IpNet, Arc<Caller>, RandomState>,
    /// The lengths of their prefixes, of IPv4 and of IPv6, the longest first.
    prefixes: [Vec<u8>; 2],
    /// By the names in their certificates.
    names: HashMap<String, Arc<Caller>>,
    uids: HashMap<u32, Arc<Caller>>,
    gids: HashMap<u32, Arc<Caller>>,
}

impl Admission {
    /// Compiles the callers of a configuration. Those that have limits already, by name, go on with what is spent.
    pub fn new(callers: &[config::Caller], limits: &HashMap<Arc<str>, Arc<Limiter>>) -> Self {
        let mut admission = Self::default();
        for (index, raw) in callers.iter().enumerate() {
            let caller = Arc::new(Caller::new(index, callers.len(), raw, limits.get(raw.name.as_str())));
            match &raw.peer {
                PeerRule::Loopback | PeerRule::Network(_) => {
                    raw.peer.networks().iter().for_each(|network| admission.add(*network, &caller));
                }
                PeerRule::Certificate(name) => drop(admission.names.insert(name.clone(), caller)),
                PeerRule::Uid(uid) => drop(admission.uids.insert(*uid, caller)),
                PeerRule::Gid(gid) => drop(admission.gids.insert(*gid, caller)),
            }
        }
        admission.find_local();
        admission
    }

    fn find_local(&mut self) {
        let local = PeerRule::Loopback.networks();
        let is_smaller =
            |network: &IpNet| !local.contains(network) && local.iter().any(|l| l.contains(network));
        let is_whole = !self.networks.keys().any(is_smaller);
        let mut callers = local.iter().map(|network| self.networks.get(network));
        let first = callers.next().flatten().filter(|_| is_whole);
        self.local = first.filter(|first| callers.all(|c| c.is_some_and(|c| Arc::ptr_eq(c, first)))).cloned();
    }

    /// The limits of all callers, by name.
    pub fn limits(&self) -> HashMap<Arc<str>, Arc<Limiter>> {
        let Self { local: _, networks, prefixes: _, names, uids, gids } = self;
        let callers = networks.values().chain(names.values()).chain(uids.values()).chain(gids.values());
        callers.map(|caller| (caller.name.clone(), caller.limit.clone())).collect()
    }

    fn add(&mut self, network: IpNet, caller: &Arc<Caller>) {
        self.networks.insert(network, caller.clone());
        let lengths = &mut self.prefixes[usize::from(network.addr().is_ipv6())];
        if let Err(place) = lengths.binary_search_by(|length| network.prefix_len().cmp(length)) {
            lengths.insert(place, network.prefix_len());
        }
    }

    /// Finds out who calls, and whether the head may be trusted. `names` are those in the peer's certificate, on a
    /// listener that asks for one.
    pub fn recognise(
        &self,
        peer: Peer,
        names: Option<&[String]>,
        hosts: &Hosts,
        head: &Inbound<'_>,
    ) -> Result<Known<'_>, Denied> {
        check_head(head)?;
        hosts.check(head.host.first)?;
        if head.is_browser {
            return Err(Denied::Browser);
        }
        self.who(peer, names).map(Known).ok_or(Denied::Caller)
    }

    /// Whose connection it is, whatever comes on it; names as in [`Admission::recognise`].
    pub fn who(&self, peer: Peer, names: Option<&[String]>) -> Option<&Arc<Caller>> {
        names.map_or_else(|| self.find(peer), |names| self.find_name(names))
    }

    /// Whether a caller is known by its address or user.
    pub(crate) fn knows(&self, peer: Peer) -> bool {
        self.find(peer).is_some()
    }

    /// Whether a caller is known by the names in its certificate.
    pub(crate) fn knows_name(&self, names: &[String]) -> bool {
        self.find_name(names).is_some()
    }

    /// A certificate that names two callers is neither's.
    fn find_name(&self, names: &[String]) -> Option<&Arc<Caller>> {
        let mut found = names.iter().filter_map(|name| self.names.get(name));
        let caller = found.next()?;
        found.all(|other| Arc::ptr_eq(other, caller)).then_some(caller)
    }

    fn find(&self, peer: Peer) -> Option<&Arc<Caller>> {
        match peer {
            Peer::Tcp(address) => self.find_address(address.ip().to_canonical()),
            Peer::Unix { uid, gid } => {
                let by_uid = self.uids.get(&uid).filter(|_| !ids::users().is_nobody(uid));
                by_uid.or_else(|| self.gids.get(&gid).filter(|_| !ids::groups().is_nobody(gid)))
            }
        }
    }

    /// The caller of the smallest network that holds an address.
    fn find_address(&self, address: IpAddr) -> Option<&Arc<Caller>> {
        if self.local.is_some() && address.is_loopback() {
            return self.local.as_ref();
        }
        let lengths = &self.prefixes[usize::from(address.is_ipv6())];
        lengths.iter().find_map(|length| self.networks.get(&IpNet::new(address, *length).ok()?.trunc()))
    }
}

impl Caller {
    /// The caller of this index among so many.
    fn new(index: usize, count: usize, raw: &config::Caller, limit: Option<&Arc<Limiter>>) -> Self {
        let limit = match limit {
            Some(limit) => {
                limit.set(raw.limit());
                limit.clone()
            }
            None => Arc::new(Limiter::new(raw.limit())),
        };
        Self {
            index: CallerIndex(index),
            is_alone: count == 1,
            max_keys: raw.max_keys,
            name: raw.name.as_str().into(),
            operator: operator(&raw.operator_id),
            operators: raw.operators.iter().map(|id| operator(id)).collect(),
            limit,
            require_header: raw.require_header.clone(),
            bare_ids: raw.bare_ids,
            frozen: raw.frozen,
        }
    }
}

#[expect(clippy::expect_used, reason = "validation allows letters, digits, `.`, `_` and `-` only")]
fn operator(id: &str) -> HeaderValue {
    HeaderValue::from_str(id).expect("a validated operator id")
}

/// Rules that keep a head unambiguous, whoever reads it.
fn check_head(head: &Inbound<'_>) -> Result<(), Denied> {
    if head.is_old {
        return Err(Denied::Head("the request is not HTTP/1.1; set the client to that version"));
    }
    if head.is_transfer_coded {
        return Err(Denied::Head("the only Transfer-Encoding that is supported is `chunked`, given once"));
    }
    if head.host.count != 1 {
        return Err(Denied::Head("Host is missing, or is given more than once; send it once"));
    }
    if head.operator.count > 1 {
        return Err(Denied::Head("x-userid is given more than once; send it once, or leave it out"));
    }
    if head.drops_end_to_end {
        return Err(Denied::Head(
            "Connection names a header that the gateway reads or passes on, such as x-userid (RFC 9110 §7.6.1); take its name out of Connection",
        ));
    }
    Ok(())
}

impl Hosts {
    /// The names of a listener, lower case, without port.
    pub fn new(names: Option<Vec<String>>) -> Self {
        Self(names)
    }

    /// Is this `Host` a name of this listener?
    pub fn check(&self, host: Option<&HeaderValue>) -> Result<(), Denied> {
        let Some(names) = &self.0 else { return Ok(()) };
        if host.is_some_and(|host| names.iter().any(|name| is_plainly(host.as_bytes(), name.as_bytes()))) {
            return Ok(());
        }
        let host = host.and_then(|value| value.to_str().ok()).unwrap_or_default();
        let host = without_port(host);
        if names.iter().any(|name| name.eq_ignore_ascii_case(host)) { Ok(()) } else { Err(Denied::Host) }
    }
}

/// The usual case: spelt as configured, with a port or without.
fn is_plainly(host: &[u8], name: &[u8]) -> bool {
    match host.strip_prefix(name) {
        Some([]) => true,
        Some([b':', port @ ..]) => port.iter().all(u8::is_ascii_digit),
        Some(_) | None => false,
    }
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if !name.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => {
            if name.contains(':') && !name.ends_with(']') { host } else { name }
        }
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    #[test]
    fn a_host_is_compared_without_its_port() {
        let hosts = Hosts::new(Some(vec!["localhost".into(), "[::1]".into(), "127.0.0.1".into()]));
        let verdict = |host: &'static str| hosts.check(Some(&HeaderValue::from_static(host))).is_ok();
        for good in ["localhost", "LOCALHOST:8080", "[::1]", "[::1]:8080", "127.0.0.1:1"] {
            assert!(verdict(good), "{good}");
        }
        for bad in ["", "evil", "localhost.evil", "localhost:80:80", "localhost:x", "::1", "127.0.0.1@evil"] {
            assert!(!verdict(bad), "{bad}");
        }
    }

    #[test]
    fn of_networks_that_hold_an_address_the_smallest_counts() {
        let mut admission = Admission::default();
        let add = |admission: &mut Admission, name: &str, rule: PeerRule| {
            let caller = Arc::new(Caller {
                index: CallerIndex(0),
                is_alone: false,
                max_keys: None,
                name: name.into(),
                operator: HeaderValue::from_static("1"),
                operators: Vec::new(),
                limit: Arc::new(Limiter::unlimited()),
                require_header: None,
                bare_ids: BareIds::Detect,
                frozen: false,
            });
            rule.networks().iter().for_each(|network| admission.add(*network, &caller));
        };
        let network = |text: &str| PeerRule::Network(text.parse().unwrap());
        add(&mut admission, "net", network("10.1.0.0/16"));
        add(&mut admission, "local", PeerRule::Loopback);
        add(&mut admission, "host", network("10.1.2.3/32"));
        add(&mut admission, "wide", network("10.0.0.0/8"));
        add(&mut admission, "six", network("fd00::/8"));
        admission.find_local();
        let known = |ip: &str| {
            let caller = admission.find(Peer::Tcp(SocketAddr::new(ip.parse().unwrap(), 1)));
            caller.map(|caller| &*caller.name)
        };
        for (ip, name) in [
            ("127.0.0.1", Some("local")),
            ("127.255.0.9", Some("local")),
            ("::1", Some("local")),
            ("::ffff:127.0.0.1", Some("local")),
            ("10.1.2.3", Some("host")),
            ("::ffff:10.1.2.3", Some("host")),
            ("10.1.2.4", Some("net")),
            ("10.2.0.0", Some("wide")),
            ("11.0.0.0", None),
            ("::", None),
            ("fd00::1", Some("six")),
            ("fe00::1", None),
        ] {
            assert_eq!(known(ip), name, "{ip}");
        }
        assert!(admission.find(Peer::Unix { uid: 0, gid: 0 }).is_none());
        assert_eq!(admission.local.as_ref().map(|caller| &*caller.name), Some("local"));
        add(&mut admission, "inner", network("127.255.0.0/16"));
        admission.find_local();
        assert!(admission.local.is_none());
        let mut two = Admission::default();
        add(&mut two, "four", network("127.0.0.0/8"));
        two.find_local();
        assert!(two.local.is_none() && two.find(Peer::Tcp("[::1]:1".parse().unwrap())).is_none());
        add(&mut two, "six", network("::1/128"));
        two.find_local();
        assert!(two.local.is_none(), "two callers");
        let inner = admission.find(Peer::Tcp("127.255.0.9:1".parse().unwrap()));
        assert_eq!(inner.map(|caller| &*caller.name), Some("inner"));
    }
}
