//! Who may call: networks, TLS, certificates and their revocation, what callers must send, what is frozen.

use std::{
    fs,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::Arc,
    time::Duration,
};

use ccsqm_gateway::sandbox::{Fault, Faults};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber, date_time_ymd,
};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tempfile::TempDir;

use crate::support::*;

/// A CA that is trusted, or not.
pub(crate) struct Ca(pub(crate) CertifiedIssuer<'static, KeyPair>);

/// A certificate with its key, in PEM.
#[derive(Clone)]
pub(crate) struct Identity {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

#[derive(Clone, Copy)]
pub(crate) struct Subject<'a> {
    pub(crate) names: &'a [&'a str],
    pub(crate) is_server: bool,
    pub(crate) is_expired: bool,
    pub(crate) serial: u64,
}

pub(crate) const CONSOLE: &str = "spiffe://example.org/qa/console";

pub(crate) const CALLER: Subject<'static> =
    Subject { names: &[CONSOLE], is_server: false, is_expired: false, serial: 100 };

pub(crate) const SERVER: Subject<'static> = Subject { names: &["localhost"], is_server: true, ..CALLER };

impl Ca {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub(crate) fn issue(&self, subject: Subject<'_>) -> Identity {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        let name = |name: &&str| match name.starts_with("spiffe:") {
            true => SanType::URI((*name).try_into().unwrap()),
            false => SanType::DnsName((*name).try_into().unwrap()),
        };
        params.subject_alt_names = subject.names.iter().map(name).collect();
        let server = ExtendedKeyUsagePurpose::ServerAuth;
        params.extended_key_usages =
            vec![if subject.is_server { server } else { ExtendedKeyUsagePurpose::ClientAuth }];
        params.serial_number = Some(SerialNumber::from(subject.serial));
        if subject.is_expired {
            params.not_after = date_time_ymd(2020, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap().pem();
        Identity { certificate, key: key.serialize_pem() }
    }

    /// A revocation list of these serial numbers.
    pub(crate) fn revoke(&self, serials: &[u64], until: i32) -> String {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(until, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.0).unwrap().pem().unwrap()
    }

    /// A connection to a listener whose certificate this CA has signed.
    fn connect(
        &self,
        address: SocketAddr,
        identity: Option<&Identity>,
    ) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
        Self::connect_trusting(self.0.der(), address, identity)
    }

    fn connect_trusting(
        root: &CertificateDer<'static>,
        address: SocketAddr,
        identity: Option<&Identity>,
    ) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(root.clone()).unwrap();
        let builder =
            ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(roots);
        let config = match identity {
            None => builder.with_no_client_auth(),
            Some(Identity { certificate, key }) => {
                let chain = CertificateDer::pem_slice_iter(certificate.as_bytes()).map(Result::unwrap);
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
                builder.with_client_auth_cert(chain.collect(), key).unwrap()
            }
        };
        let session = ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
        let socket = TcpStream::connect(address)?;
        socket.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(StreamOwned::new(session, socket))
    }

    /// The example request; `None` if there is no TLS with this identity.
    pub(crate) fn call(&self, address: SocketAddr, identity: Option<&Identity>) -> Option<Reply> {
        Self::call_trusting(self.0.der(), address, identity)
    }

    /// The same of a caller that trusts this root.
    pub(crate) fn call_trusting(
        root: &CertificateDer<'static>,
        address: SocketAddr,
        identity: Option<&Identity>,
    ) -> Option<Reply> {
        let mut stream = Self::connect_trusting(root, address, identity).unwrap();
        stream.write_all((head(BODY.len(), "") + BODY).as_bytes()).ok()?;
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        (!bytes.is_empty()).then(|| parse_reply(&String::from_utf8(bytes).unwrap()))
    }
}

/// A revocation list with nothing in it.
pub(crate) fn empty_list() -> String {
    Ca::new().revoke(&[], 2124)
}

/// Sends the example request on a connection that stays open.
fn call_on(stream: &mut StreamOwned<ClientConnection, TcpStream>) -> Option<Reply> {
    let keep = head(BODY.len(), "").replace("connection: close\r\n", "");
    stream.write_all((keep + BODY).as_bytes()).ok()?;
    let (mut bytes, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let length = stream.read(&mut piece).ok().filter(|length| *length > 0)?;
        bytes.extend_from_slice(&piece[..length]);
        let reply = parse_reply(&String::from_utf8_lossy(&bytes));
        let whole = reply.headers.get("content-length").and_then(|length| length.parse().ok());
        if whole == Some(reply.body.len()) {
            return Some(reply);
        }
    }
}

/// A caller of a test; `more` are further keys.
pub(crate) fn caller(name: &str, peer: &str, more: &str) -> String {
    format!(
        "[[callers]]\nname = \"{name}\"\npeer = \"{peer}\"\noperator_id = \"7\"\ncredential = \"default\"\n\
         routes = [\"appointQualityTask\"]\n{more}\n"
    )
}

/// A listener at a Unix socket that everybody may open.
pub(crate) fn unix_listener(socket: &Path) -> String {
    format!("[[listeners]]\naddress = \"unix:{}\"\nmode = \"0666\"\n", socket.display())
}

/// A listener with TLS whose files lie in the folder; `more` are further keys of its `tls`.
pub(crate) fn listener(folder: &TempDir, identity: &Identity, more: &str) -> String {
    fs::write(folder.path().join("server.pem"), &identity.certificate).unwrap();
    fs::write(folder.path().join("server.key"), &identity.key).unwrap();
    format!(
        "[[listeners]]\naddress = \"127.0.0.1:0\"\n\
         tls = {{ cert_file = \"server.pem\", key_file = \"server.key\"{more} }}\n"
    )
}

/// A gateway whose second listener asks for certificates of `ca`, but for those on the list.
pub(crate) fn start_with_certificates(
    sandbox: &ccsqm_gateway::sandbox::Sandbox,
    ca: &Ca,
    list: &str,
) -> Gateway {
    start_with_certificates_and(sandbox, ca, list, Setup::default())
}

pub(crate) fn start_with_certificates_and(
    sandbox: &ccsqm_gateway::sandbox::Sandbox,
    ca: &Ca,
    list: &str,
    setup: Setup,
) -> Gateway {
    let folder = Arc::new(TempDir::new().unwrap());
    fs::write(folder.path().join("ca.pem"), ca.0.pem()).unwrap();
    fs::write(folder.path().join("revoked.pem"), list).unwrap();
    let more = ", client_ca_file = \"ca.pem\", client_crl_file = \"revoked.pem\"";
    let caller = listener(&folder, &ca.issue(SERVER), more)
        + &caller("console", CONSOLE, "")
        + &caller("batch", "dns:batch.qa.internal", "");
    start_with(sandbox, Setup { folder: Some(folder), caller, ..setup })
}

/// The example request, from an address of the loopback network.
pub(crate) fn call_from(source: &str, gateway: &Gateway, headers: &str) -> Reply {
    post_from(source, gateway, headers, BODY)
}

/// The same with another body.
pub(crate) fn post_from(source: &str, gateway: &Gateway, headers: &str, body: &str) -> Reply {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&format!("{source}:0").parse::<SocketAddr>().unwrap().into()).unwrap();
    socket.connect(&gateway.address.into()).unwrap();
    let mut stream = TcpStream::from(socket);
    stream.write_all((head(body.len(), headers) + body).as_bytes()).unwrap();
    read_reply(&mut stream)
}

#[test]
fn smallest_nested_network_identifies_the_caller() {
    let sandbox = sandbox();
    let config = caller("net", "127.5.0.0/16", "") + &caller("host", "127.5.6.7/32", "");
    let gateway = start_with(&sandbox, Setup { caller: config, ..Setup::default() });
    for (count, (source, name)) in [
        ("127.0.0.1", "qa-console"),
        ("127.5.6.6", "net"),
        ("127.5.6.7", "host"),
        ("127.6.0.1", "qa-console"),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(call_from(source, &gateway, "").outcome(), "succeeded", "{source}");
        assert_eq!(gateway.records("intent", count + 1)[count]["caller"], name, "{source}");
    }
}

#[test]
fn peer_outside_all_networks_is_not_a_caller() {
    let sandbox = sandbox();
    for (peer, outcome) in [("127.0.0.2/32", "not_sent"), ("127.0.0.0/31", "succeeded")] {
        let reply = start_with(&sandbox, Setup { peer, ..Setup::default() }).call();
        assert_eq!(reply.outcome(), outcome, "{peer}: {reply:?}");
        assert_eq!(reply.code() == "caller_denied", outcome == "not_sent", "{peer}");
    }
    assert_eq!(sandbox.requests().len(), 1);
}

#[test]
fn tls_listener_identifies_callers_by_network_and_rejects_plaintext() {
    let (sandbox, ca) = (sandbox(), Ca::new());
    let folder = Arc::new(TempDir::new().unwrap());
    let caller = listener(&folder, &ca.issue(SERVER), "");
    let gateway = start_with(&sandbox, Setup { folder: Some(folder), caller, ..Setup::default() });
    let address = gateway.second.unwrap();
    let reply = ca.call(address, None).unwrap();
    assert_eq!(reply.outcome(), "succeeded", "{reply:?}");
    assert_eq!(gateway.records("intent", 1)[0]["caller"], "qa-console");
    assert!(Ca::new().call(address, None).is_none(), "who trusts another CA goes away");
    let mut plain = TcpStream::connect(address).unwrap();
    plain.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
    let reply = read_reply(&mut plain);
    let said = (reply.status, reply.outcome(), reply.body.contains("use https://"));
    assert_eq!(said, (400, "not_sent", true), "plain HTTP on a TLS port: {reply:?}");
    assert_eq!(sandbox.requests().len(), 1);
    wait_for("the metric", || {
        let metrics = gateway.admin("/metrics").body;
        metrics.contains(r#"connections_closed_total{reason="tls_failed"} 2"#).then_some(())
    });
}

#[test]
fn only_a_valid_certificate_with_a_known_name_is_accepted() {
    let (sandbox, ca) = (sandbox(), Ca::new());
    let gateway = start_with_certificates(&sandbox, &ca, &ca.revoke(&[666], 2124));
    let address = gateway.second.unwrap();
    let call = |identity: Option<&Identity>| ca.call(address, identity);
    let good = ca.issue(CALLER);
    for (case, identity) in [
        ("none", None),
        ("wrong CA", Some(Ca::new().issue(CALLER))),
        ("expired", Some(ca.issue(Subject { is_expired: true, ..CALLER }))),
        ("revoked", Some(ca.issue(Subject { serial: 666, ..CALLER }))),
        ("wrong usage", Some(ca.issue(Subject { is_server: true, ..CALLER }))),
    ] {
        assert!(call(identity.as_ref()).is_none(), "{case}");
        assert_eq!(call(Some(&good)).unwrap().outcome(), "succeeded", "the control of {case}");
    }
    for (case, names) in [
        ("wrong name", &["spiffe://example.org/qa/consol"][..]),
        ("wrong trust domain", &["spiffe://example.com/qa/console"]),
        ("a DNS name like the ID", &["example.org"]),
        ("no name", &[]),
        ("names of two callers", &[CONSOLE, "batch.qa.internal"]),
        ("a wildcard", &["*.qa.internal"]),
    ] {
        let reply = call(Some(&ca.issue(Subject { names, ..CALLER }))).unwrap();
        assert_eq!((reply.status, reply.code()), (403, "caller_denied"), "{case}");
    }
    let batch = ca.issue(Subject { names: &["batch.qa.internal", "other.internal"], ..CALLER });
    assert_eq!(call(Some(&batch)).unwrap().outcome(), "succeeded");
    let intents = gateway.records("intent", 6);
    assert_eq!((intents.len(), sandbox.requests().len()), (6, 6));
    assert!(intents[..5].iter().all(|intent| intent["caller"] == "console"));
    assert_eq!(intents[5]["caller"], "batch");
    assert_eq!(gateway.call().outcome(), "succeeded", "the plain listener still knows loopback");
}

#[test]
fn expired_revocation_list_rejects_all_callers() {
    let (sandbox, ca) = (sandbox(), Ca::new());
    for (until, is_in) in [(2124, true), (2025, false)] {
        let gateway = start_with_certificates(&sandbox, &ca, &ca.revoke(&[], until));
        assert_eq!(ca.call(gateway.second.unwrap(), Some(&ca.issue(CALLER))).is_some(), is_in, "{until}");
    }
}

/// Puts a file in the place of another, as one step.
pub(crate) fn swap(folder: &TempDir, name: &str, content: &str) {
    let new = folder.path().join("new");
    fs::write(&new, content).unwrap();
    fs::rename(new, folder.path().join(name)).unwrap();
}

/// Waits for so many events of changed certificates, and returns what came of the last.
pub(crate) fn change(gateway: &Gateway, count: usize) -> String {
    let events = wait_for(&format!("{count} changes"), || {
        let mut events = records(&gateway.audit_directory(), "event");
        events.retain(|event| event["event"] == "certificate_change");
        (events.len() >= count).then_some(events)
    });
    assert_eq!(events.len(), count);
    events[count - 1]["result"].as_str().unwrap().to_owned()
}

#[test]
fn revoked_certificate_is_rejected_at_once_on_open_connections() {
    let (sandbox, ca) = (sandbox(), Ca::new());
    let gateway = start_with_certificates(&sandbox, &ca, &ca.revoke(&[], 2124));
    let address = gateway.second.unwrap();
    let (stays, goes) = (ca.issue(CALLER), ca.issue(Subject { serial: 666, ..CALLER }));
    let mut connections = [&stays, &goes].map(|identity| ca.connect(address, Some(identity)).unwrap());
    for connection in &mut connections {
        assert_eq!(call_on(connection).unwrap().outcome(), "succeeded");
    }
    swap(&gateway.folder, "revoked.pem", &ca.revoke(&[666], 2124));
    assert_eq!(change(&gateway, 1), "accepted");
    let [stayed, gone] = connections.each_mut().map(|connection| call_on(connection).unwrap());
    assert_eq!(stayed.outcome(), "succeeded");
    assert_eq!((gone.status, gone.code()), (403, "caller_denied"));
    assert!(ca.call(address, Some(&goes)).is_none(), "a new connection");
    assert_eq!(sandbox.requests().len(), 3);
}

#[test]
fn certificates_reload_at_run_time_and_bad_files_are_ignored() {
    let (sandbox, ca) = (sandbox(), Ca::new());
    let gateway = start_with_certificates(&sandbox, &ca, &ca.revoke(&[], 2124));
    let address = gateway.second.unwrap();
    let caller = ca.issue(CALLER);
    let shown = || {
        let mut stream = ca.connect(address, Some(&caller)).unwrap();
        assert_eq!(call_on(&mut stream).unwrap().outcome(), "succeeded");
        stream.conn.peer_certificates().unwrap()[0].clone()
    };
    let first = shown();
    let other = ca.issue(SERVER);
    for (count, (name, content)) in [
        ("server.pem", other.certificate.as_str()), // not this key's
        ("server.pem", "rubbish"),
        ("revoked.pem", ""),
        ("ca.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
    ]
    .into_iter()
    .enumerate()
    {
        let good = fs::read_to_string(gateway.folder.path().join(name)).unwrap();
        swap(&gateway.folder, name, content);
        assert_eq!(change(&gateway, 2 * count + 1), "refused", "{name}");
        assert_eq!(shown(), first, "{name}");
        swap(&gateway.folder, name, &good);
        assert_eq!(change(&gateway, 2 * count + 2), "accepted", "{name}");
    }
    fs::write(gateway.folder.path().join("server.key"), &other.key).unwrap();
    fs::write(gateway.folder.path().join("server.pem"), &other.certificate).unwrap();
    wait_for("the new certificate", || (shown() != first).then_some(()));
    let log = gateway.log();
    assert_eq!(log.matches("the old ones stay in use").count(), 4, "{log}");
}

#[test]
fn world_writable_revocation_list_is_not_reloaded() {
    let (sandbox, ca) = (sandbox(), Ca::new());
    let gateway = start_with_certificates(&sandbox, &ca, &ca.revoke(&[666], 2124));
    let address = gateway.second.unwrap();
    let revoked = ca.issue(Subject { serial: 666, ..CALLER });
    let path = gateway.folder.path().join("revoked.pem");
    let mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    mode(0o666);
    fs::write(&path, ca.revoke(&[], 2124)).unwrap();
    assert_eq!(change(&gateway, 1), "refused");
    assert!(ca.call(address, Some(&revoked)).is_none(), "the old one stays in use");
    assert!(gateway.log().contains("every user can change it (mode 0666)"), "{}", gateway.log());
    mode(0o644);
    fs::write(&path, ca.revoke(&[], 2125)).unwrap();
    assert_eq!(change(&gateway, 2), "accepted");
    assert_eq!(ca.call(address, Some(&revoked)).unwrap().outcome(), "succeeded", "the control");
    assert_eq!(sandbox.requests().len(), 1);
}

#[test]
fn caller_disconnect_over_tls_while_waiting_sends_nothing() {
    for says_so in [true, false] {
        let (sandbox, ca) = (sandbox(), Ca::new());
        script(&sandbox, Faults::token(Fault::delayed(1500).times(1)));
        let gateway = start_with_certificates(&sandbox, &ca, &ca.revoke(&[], 2124));
        let caller = ca.issue(CALLER);
        std::thread::scope(|scope| {
            let stays = scope.spawn(|| ca.call(gateway.second.unwrap(), Some(&caller)));
            let mut leaves = ca.connect(gateway.second.unwrap(), Some(&caller)).unwrap();
            leaves.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
            let sent = std::time::Instant::now();
            wait_for("both requests, and time", || {
                let both = gateway.admin("/metrics").body.contains("requests_in_flight 2");
                (both && sent.elapsed() > Duration::from_millis(400)).then_some(())
            });
            if says_so {
                leaves.conn.send_close_notify();
                leaves.flush().unwrap();
            }
            drop(leaves);
            assert_eq!(gateway.records("refusal", 1)[0]["code"], "caller_left", "{says_so}");
            assert_eq!(stays.join().unwrap().unwrap().outcome(), "succeeded", "the control");
        });
        assert_eq!(sandbox.requests().len(), 1, "{says_so}");
    }
}

/// What counts in the metric as closed for this reason.
fn closed(gateway: &Gateway, reason: &str) -> u64 {
    let metrics = gateway.admin("/metrics").body;
    let name = format!("ccsqm_gateway_connections_closed_total{{reason=\"{reason}\"}} ");
    metrics.lines().find_map(|line| line.strip_prefix(&name)).map_or(0, |count| count.parse().unwrap())
}

#[test]
fn handshake_aborted_by_its_peer_is_not_counted_as_displaced() {
    let (sandbox, ca) = (sandbox(), Ca::new());
    let files = TempDir::new().unwrap();
    let abort = files.path().join("abort");
    let library = compile("callers/abort");
    let through =
        ["env", &format!("LD_PRELOAD={}", library.display()), &format!("ABORT={}", abort.display())];
    let setup = Setup { through: through.map(str::to_owned).into(), ..Setup::default() };
    let gateway = start_with_certificates_and(&sandbox, &ca, &ca.revoke(&[], 2124), setup);
    let (address, caller) = (gateway.second.unwrap(), ca.issue(CALLER));
    assert_eq!(ca.call(address, Some(&caller)).unwrap().outcome(), "succeeded", "the control");
    fs::write(&abort, address.port().to_string()).unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(&[22]).unwrap();
    wait_for("its end", || (closed(&gateway, "tls_failed") == 1).then_some(()));
    assert_eq!(closed(&gateway, "too_many_handshakes"), 0);
}

/// What the TLS library decrypts ahead is in no budget, so that it must be little.
#[test]
fn tls_connection_buffers_little_after_its_request() {
    const CONNECTIONS: usize = 40; // the burst of a caller
    let each_takes = |behind: usize| {
        let (sandbox, ca) = (sandbox(), Ca::new());
        script(&sandbox, Faults::business(Fault::delayed(8000)));
        let setup =
            Setup::default().set("upstream.max_connections", 2 * CONNECTIONS).set("server.max_head", "8KiB");
        let gateway = start_with_certificates_and(&sandbox, &ca, &ca.revoke(&[], 2124), setup);
        let caller = ca.issue(CALLER);
        let memory = || {
            let status = fs::read_to_string(format!("/proc/{}/status", gateway.id())).unwrap();
            let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
        };
        let open = |_| ca.connect(gateway.second.unwrap(), Some(&caller)).unwrap();
        let mut streams: Vec<_> = (0..CONNECTIONS).map(open).collect();
        let before = memory();
        let whole = head(BODY.len(), "").replace("connection: close\r\n", "") + BODY;
        for stream in &mut streams {
            stream.write_all(whole.as_bytes()).unwrap();
            stream.write_all(&vec![b'x'; behind]).unwrap();
            stream.flush().unwrap();
        }
        wait_for("all requests", || (sandbox.requests().len() == CONNECTIONS).then_some(()));
        // They are worked on, and woken now and then.
        let seen = std::time::Instant::now();
        wait_for("time", || (seen.elapsed() > Duration::from_millis(1500)).then_some(()));
        memory().saturating_sub(before) / CONNECTIONS
    };
    let (without, with) = (each_takes(0), each_takes(160 * 1024));
    println!("{without} and {with} KiB");
    assert!(
        with < without + 64,
        "{with} KiB for each connection, {without} without anything behind its request"
    );
}

#[test]
fn require_header_rejects_requests_without_that_header() {
    let sandbox = sandbox();
    let folder = Arc::new(TempDir::new().unwrap());
    let config = caller("careful", "127.0.0.2/31", "require_header = \"x-ccsqm-gateway\"");
    let gateway = start_with(&sandbox, Setup { folder: Some(folder), caller: config, ..Setup::default() });
    for (count, (headers, code)) in
        [("", "header_missing"), ("x-ccsqm-gatewa: 1\r\n", "header_missing"), ("x-ccsqm-gateway: 1\r\n", "")]
            .into_iter()
            .enumerate()
    {
        let reply = call_from("127.0.0.2", &gateway, headers);
        assert_eq!(reply.code(), code, "{headers}");
        assert_eq!(sandbox.requests().len(), usize::from(count == 2), "{headers}");
    }
    let refusal = &gateway.records("refusal", 1)[0];
    assert_eq!((&refusal["caller"], &refusal["stage"]), (&"careful".into(), &"admission".into()));
    assert_eq!(gateway.call().outcome(), "succeeded", "another caller need not");
}

#[test]
fn only_frozen_callers_and_routes_are_rejected() {
    let sandbox = sandbox();
    let config = caller("cold", "127.0.0.2/32", "frozen = true") + &caller("warm", "127.0.0.3/32", "");
    let gateway = start_with(&sandbox, Setup { caller: config, ..Setup::default() });
    let cold = call_from("127.0.0.2", &gateway, "");
    assert_eq!((cold.status, cold.code(), cold.outcome()), (403, "frozen", "not_sent"));
    assert!(!cold.headers.contains_key("retry-after"));
    assert_eq!(call_from("127.0.0.3", &gateway, "").outcome(), "succeeded", "the control");
    assert_eq!(gateway.records("refusal", 1)[0]["caller"], "cold");
    drop(gateway);
    let folder = Arc::new(TempDir::new().unwrap());
    let mut config = String::from("[[routes]]\nname = \"appointQualityTask\"\nfrozen = true\n");
    let setup =
        |caller: &str| Setup { folder: Some(folder.clone()), caller: caller.to_owned(), ..Setup::default() };
    let reply = start_with(&sandbox, setup(&config)).call();
    assert_eq!((reply.status, reply.code()), (403, "frozen"));
    config = config.replace("true", "false");
    assert_eq!(start_with(&sandbox, setup(&config)).call().outcome(), "succeeded", "the control");
    assert_eq!(sandbox.requests().len(), 2);
}

#[test]
fn caller_disconnect_over_tls_before_a_success_is_detected() {
    for says_so in [true, false] {
        let (sandbox, ca) = (sandbox(), Ca::new());
        script(&sandbox, Faults::business(Fault::delayed(500).times(1)));
        let guarded = Setup::default().set("idempotency.without_key", "guard");
        let gateway = start_with_certificates_and(&sandbox, &ca, &ca.revoke(&[], 2124), guarded);
        let caller = ca.issue(CALLER);
        let mut leaves = ca.connect(gateway.second.unwrap(), Some(&caller)).unwrap();
        leaves.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
        wait_for("the upstream", || (sandbox.requests().len() == 1).then_some(()));
        if says_so {
            leaves.conn.send_close_notify();
            leaves.flush().unwrap();
        }
        drop(leaves);
        wait_for("the event", || {
            gateway.records("event", 1).iter().any(|event| event["event"] == "undelivered").then_some(())
        });
        let told = ca.call(gateway.second.unwrap(), Some(&caller)).unwrap();
        assert_eq!((told.code(), told.outcome()), ("duplicate_suspected", "succeeded"), "{says_so}");
        let again = ca.call(gateway.second.unwrap(), Some(&caller)).unwrap();
        assert_eq!(again.outcome(), "succeeded", "told once");
        let more = ca.call(gateway.second.unwrap(), Some(&caller)).unwrap();
        assert_eq!(more.outcome(), "succeeded", "the control: an answer that is taken is delivered");
        assert_eq!(sandbox.requests().len(), 3, "{says_so}");
    }
}
