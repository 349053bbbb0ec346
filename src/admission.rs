//! Stage 1: admission. Authenticates the caller: is there room, and which configured caller sends this request.
//!
//! Decides from what the kernel says about the peer, from the names in its certificate, and from the head; not a byte of the
//! body is read. Guarantees that a request that passes is of exactly one configured caller, is addressed to a name of this
//! listener, and does not come from a browser. Does not decide what the caller may do: that is [`crate::route`].

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
    /// The caller's index in the configuration.
    pub index: CallerIndex,
    /// Whether no other caller is configured.
    pub is_alone: bool,
    /// The most `Idempotency-Key`s that the caller may hold; `None` for half of all, or all if it is alone.
    pub max_keys: Option<usize>,
    /// The name in the configuration, the audit trail and the metrics.
    pub name: Arc<str>,
    /// The operator as which it acts if a request names none.
    pub operator: HeaderValue,
    /// Other operators that its requests may name in `x-userid`.
    pub operators: Vec<HeaderValue>,
    /// The caller's own rate limit.
    pub limit: Arc<Limiter>,
    /// A header that its requests must have, with any value.
    // No secret, but a protection against request forgery: an app that can be made to fetch a URL can rarely be made to send a
    // header of one's choice, and neither can a page in a browser.
    pub require_header: Option<HeaderName>,
    /// Which ids it may send as bare numbers.
    pub bare_ids: BareIds,
    /// Whether all its requests are refused for now.
    pub frozen: bool,
}

/// The configured caller of a request that is not admitted yet.
// A step of its own, so that a refusal after it is recorded with the caller's name.
#[derive(Debug)]
pub struct Identified<'a>(&'a Arc<Caller>);

impl<'a> Identified<'a> {
    /// The caller of the request.
    pub fn caller(&self) -> &'a Arc<Caller> {
        self.0
    }

    /// Admits the request. Fails if a required header is missing or if the caller is frozen.
    pub fn admit(self, head: &Inbound<'_>) -> Result<Admitted<'a>, Denied> {
        let Self(caller) = self;
        match &caller.require_header {
            Some(name) if !head.has(name) => Err(Denied::HeaderMissing(name.clone())),
            _ if caller.frozen => Err(Denied::Frozen),
            _ => Ok(Admitted { caller }),
        }
    }
}

/// Proof that a request was admitted. Later stages ask for one, and only this module can make it.
#[derive(Debug)]
pub struct Admitted<'a> {
    caller: &'a Arc<Caller>,
}

impl<'a> Admitted<'a> {
    /// The caller of the request.
    pub fn caller(&self) -> &'a Arc<Caller> {
        self.caller
    }
}

/// The host names that a listener answers to; `None` for any, as on a Unix socket.
// Without them a page in a browser could reach the gateway by a name of its own that resolves to this address (DNS rebinding).
#[derive(Clone, Debug)]
pub struct Hosts(Option<Vec<String>>);

/// Why a request was not admitted.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Denied {
    /// A bound on concurrent work is reached, or the gateway is stopping.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// The head can be read in more than one way.
    #[error("{0}")]
    Head(&'static str),
    /// `Host` is not a name of the listener.
    #[error(
        "the gateway does not answer to the name in Host; call it by the name that its operators gave you, or ask them to add yours to `hosts` of the listener"
    )]
    Host,
    /// The request has `Origin` or `Sec-Fetch-Site`, which only browsers send.
    #[error(
        "requests from browsers, which send Origin or Sec-Fetch-Site, are refused; call from a server-side process"
    )]
    Browser,
    /// No caller is configured for the peer.
    #[error("no caller is configured for this peer; ask the operators of the gateway to add one")]
    Caller,
    /// The caller's `require_header` is missing.
    #[error("requests of this caller must carry the header {0}, with any value")]
    HeaderMissing(HeaderName),
    /// The caller is `frozen`.
    #[error("the operators of the gateway have frozen this caller, so that nothing is sent for it; ask them")]
    Frozen,
}

/// The configured callers, by what identifies them.
#[derive(Debug, Default)]
pub struct Admission {
    /// The caller of all loopback addresses, if one caller has all of them.
    // The usual case of a sidecar, which is found without a hash.
    local: Option<Arc<Caller>>,
    networks: HashMap<IpNet, Arc<Caller>, RandomState>,
    /// The prefix lengths that `networks` has, of IPv4 and of IPv6, the longest first.
    prefixes: [Vec<u8>; 2],
    /// By a name in the certificate.
    names: HashMap<String, Arc<Caller>>,
    uids: HashMap<u32, Arc<Caller>>,
    gids: HashMap<u32, Arc<Caller>>,
}

impl Admission {
    /// Compiles the callers of a configuration. A caller whose name is in `limits` goes on with that limiter and what is spent of
    /// it, at the configured rate.
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

    /// Sets `local`, if one caller has all loopback networks and no smaller network inside of them belongs to another rule.
    fn find_local(&mut self) {
        let local = PeerRule::Loopback.networks();
        let is_smaller =
            |network: &IpNet| !local.contains(network) && local.iter().any(|l| l.contains(network));
        let is_whole = !self.networks.keys().any(is_smaller);
        let mut callers = local.iter().map(|network| self.networks.get(network));
        let first = callers.next().flatten().filter(|_| is_whole);
        self.local = first.filter(|first| callers.all(|c| c.is_some_and(|c| Arc::ptr_eq(c, first)))).cloned();
    }

    /// The limiters of all callers, by name, for the configuration that takes this one's place.
    pub fn limits(&self) -> HashMap<Arc<str>, Arc<Limiter>> {
        // Every field is named, so that a new kind of rule does not compile before it is listed here.
        let Self { local: _, networks, prefixes: _, names, uids, gids } = self;
        let callers = networks.values().chain(names.values()).chain(uids.values()).chain(gids.values());
        callers.map(|caller| (caller.name.clone(), caller.limit.clone())).collect()
    }

    /// Adds a network and its prefix length.
    fn add(&mut self, network: IpNet, caller: &Arc<Caller>) {
        self.networks.insert(network, caller.clone());
        let lengths = &mut self.prefixes[usize::from(network.addr().is_ipv6())];
        if let Err(index) = lengths.binary_search_by(|length| network.prefix_len().cmp(length)) {
            lengths.insert(index, network.prefix_len());
        }
    }

    /// Identifies the caller of a request. `names` are those in the peer's certificate, on a listener that asks for one.
    ///
    /// Fails if the head is ambiguous, if `Host` is not a name of the listener, if the request comes from a browser, or if no
    /// caller is configured for the peer.
    pub fn identify(
        &self,
        peer: Peer,
        names: Option<&[String]>,
        hosts: &Hosts,
        head: &Inbound<'_>,
    ) -> Result<Identified<'_>, Denied> {
        // In this order: what an ambiguous head says about `Host` or `Origin` cannot be trusted.
        check_head(head)?;
        hosts.check(head.host.first)?;
        if head.is_browser {
            return Err(Denied::Browser);
        }
        self.caller_of(peer, names).map(Identified).ok_or(Denied::Caller)
    }

    /// The caller of a connection, whatever is sent on it; `names` as in [`Admission::identify`].
    pub fn caller_of(&self, peer: Peer, names: Option<&[String]>) -> Option<&Arc<Caller>> {
        // On a listener that asks for certificates the address proves nothing, so it is not a second way in.
        names.map_or_else(|| self.find(peer), |names| self.find_name(names))
    }

    /// Whether a caller is configured for the peer's address or user.
    pub(crate) fn knows(&self, peer: Peer) -> bool {
        self.find(peer).is_some()
    }

    /// Whether exactly one caller is configured for the names in a certificate.
    pub(crate) fn knows_name(&self, names: &[String]) -> bool {
        self.find_name(names).is_some()
    }

    /// The caller of a certificate.
    // A certificate that names two callers is of neither: which of them calls would be a guess.
    fn find_name(&self, names: &[String]) -> Option<&Arc<Caller>> {
        let mut found = names.iter().filter_map(|name| self.names.get(name));
        let caller = found.next()?;
        found.all(|other| Arc::ptr_eq(other, caller)).then_some(caller)
    }

    /// The caller of a peer, by address or user.
    fn find(&self, peer: Peer) -> Option<&Arc<Caller>> {
        match peer {
            // Canonical, since a dual-stack socket shows an IPv4 peer as `::ffff:a.b.c.d`, which no IPv4 rule would match.
            Peer::Tcp(address) => self.find_address(address.ip().to_canonical()),
            // In a user namespace the kernel shows every id that is not mapped as the overflow id (65534). A rule for that id
            // would let all of them in. The uid goes first, as the narrower rule.
            Peer::Unix { uid, gid } => {
                let by_uid = self.uids.get(&uid).filter(|_| !ids::users().is_nobody(uid));
                by_uid.or_else(|| self.gids.get(&gid).filter(|_| !ids::groups().is_nobody(gid)))
            }
        }
    }

    /// The caller of the smallest network that contains an address: longest prefix match.
    fn find_address(&self, address: IpAddr) -> Option<&Arc<Caller>> {
        if self.local.is_some() && address.is_loopback() {
            return self.local.as_ref();
        }
        // One look-up for each length that is configured, of which there are few, instead of a tree of prefixes.
        let lengths = &self.prefixes[usize::from(address.is_ipv6())];
        lengths.iter().find_map(|length| self.networks.get(&IpNet::new(address, *length).ok()?.trunc()))
    }
}

impl Caller {
    /// A caller of the configuration, of `count` in all. `limit` is the limiter that it had before a reload.
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

/// Checks the rules that make a head mean one thing to every reader on the way.
// A head that two readers understand in two ways is how requests are smuggled: one of them sees the end of the request elsewhere,
// or another caller's operator.
fn check_head(head: &Inbound<'_>) -> Result<(), Denied> {
    // HTTP/1.0 has no chunks, so that a reply that breaks off would look complete.
    if head.is_http10 {
        return Err(Denied::Head("the request is not HTTP/1.1; set the client to that version"));
    }
    if head.is_transfer_coded {
        return Err(Denied::Head("the only Transfer-Encoding that is supported is `chunked`, given once"));
    }
    // RFC 9112, section 3.2: more than one Host, or none, must be answered with 400.
    if head.host.count != 1 {
        return Err(Denied::Head("Host is missing, or is given more than once; send it once"));
    }
    if head.operator.count > 1 {
        return Err(Denied::Head("x-userid is given more than once; send it once, or leave it out"));
    }
    // A proxy on the way removes what Connection names. Without x-userid the call would act as the default operator.
    if head.drops_end_to_end {
        return Err(Denied::Head(
            "Connection names a header that the gateway reads or passes on, such as x-userid (RFC 9110 §7.6.1); take its name out of Connection",
        ));
    }
    Ok(())
}

impl Hosts {
    /// The names of a listener, in lower case and without a port; `None` for any name.
    pub fn new(names: Option<Vec<String>>) -> Self {
        Self(names)
    }

    /// Checks that a `Host` is a name of this listener; its port does not count. Fails with [`Denied::Host`] if it is not.
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

/// Whether a `Host` is a name as it is configured, with or without a port. Other spellings are compared by [`Hosts::check`].
fn is_plainly(host: &[u8], name: &[u8]) -> bool {
    match host.strip_prefix(name) {
        Some([]) => true,
        Some([b':', port @ ..]) => port.iter().all(u8::is_ascii_digit),
        Some(_) | None => false,
    }
}

/// A host without its port.
// The colons of a bare IPv6 address are no port: `::1` must not become `:`. Only in brackets it may have one (RFC 3986, section
// 3.2.2).
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
    fn host_is_compared_without_its_port() {
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
    fn smallest_matching_network_takes_precedence() {
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
        // A smaller network inside of loopback ends the short way: its own caller must be found.
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
