//! Fuzz targets: each parser of foreign bytes as a function that panics if a promise is broken.
//!
//! Not in the binary. Compiled for the unit tests, which try random and mutated inputs, and for cargo-fuzz
//! (`tests/fuzz`). That strict JSON and contracts agree with other libraries is tested in `tests/it/contract.rs`.

#![allow(clippy::unwrap_used, reason = "a panic is how a target tells")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;
use std::{fmt, fs};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, StatusCode};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use tempfile::TempDir;

use crate::admission::Hosts;
use crate::audit::chain::key_path;
use crate::audit::recovery::{BrokenLine, TrailState, read};
use crate::audit::{Audit, AuditMetrics, Options, Permit};
use crate::config::{BareIds, WithoutKey};
use crate::connect::proxy;
use crate::contract::Contract;
use crate::idempotency::{Idempotency, key};
use crate::keyed_hash::Keys;
use crate::model::outcome::Outcome;
use crate::registry::Registry;
use crate::request_head::Inbound;
use crate::result_rule::{ReplyView, ResultRule};
use crate::{config, preflight};

/// Returns the target of this name; `None` if there is none.
pub fn reader(name: &str) -> Option<fn(&[u8])> {
    Some(match name {
        "body" => body,
        "schema" => schema,
        "reply" => reply,
        "trail" => trail,
        "head" => head,
        "configuration" => configuration,
        "tunnel" => tunnel,
        _ => return None,
    })
}

/// A body against its contract. The walk that decides and the one that collects violations agree, and a body that
/// is accepted becomes one whole line of the trail.
pub fn body(bytes: &[u8]) {
    static CONTRACT: LazyLock<Contract> =
        LazyLock::new(|| Contract::compile(Contract::APPOINT_QUALITY_TASK).unwrap());
    let check = |bare_ids| CONTRACT.check(Bytes::copy_from_slice(bytes), bare_ids).result;
    let is_taken = |bare_ids| check(bare_ids).is_ok();
    let [detected, exact, refused] = BareIds::ALL.map(is_taken);
    // The three ways to take ids are ordered by strictness: what a stricter one accepts, a laxer one accepts, too.
    assert!((exact || !detected) && (detected || !refused));
    let violations = CONTRACT.violations(bytes, BareIds::Exact);
    assert_eq!(exact, violations.is_ok_and(|all| all.total == 0));
    let Ok(checked) = check(BareIds::Exact) else { return };
    assert_eq!(checked.bytes(), bytes);
    let mut line = b"{\"seq\":1".to_vec();
    checked.audit_members(&|_| [0; 16], &mut line);
    // A line break in a member would forge a record: a line of the trail is a record.
    assert!(!line.contains(&b'\n'));
    let record: BTreeMap<String, Value> = serde_json::from_slice(&[&line, &b"}"[..]].concat()).unwrap();
    let sent: Value = serde_json::from_slice(bytes).unwrap();
    let of_inspectors = |name: &str| -> Value {
        sent["setCounts"].as_array().unwrap().iter().map(|inspector| inspector[name].clone()).collect()
    };
    assert_eq!(record["task"], sent["qualityTaskId"]);
    assert_eq!(record["take_effect"], sent["isTakeEffect"]);
    assert_eq!(record["inspectors"], of_inspectors("personID"));
    assert_eq!(record["counts"], of_inspectors("count"));
}

/// A contract: it is compiled or refused, and a compiled one checks any body without a panic.
pub fn schema(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(contract) = Contract::compile(text)
    {
        let _ = contract.check(Bytes::copy_from_slice(bytes), BareIds::Detect);
    }
}

/// A reply. Its first byte says with which status it came, and whether it was cut off. A body that serde_json can
/// read has the outcome that it plainly has.
pub fn reply(bytes: &[u8]) {
    let Some((kind, body)) = bytes.split_first() else { return };
    // Half of the statuses are 200, since the body decides the outcome only there.
    let status = [200, 200, 200, 200, 500, 201, 404, 429][usize::from(kind & 7)];
    let truncated = kind & 8 > 0;
    let rule = ResultRule::new("resultCode", &["0409000".to_owned()]);
    let status = StatusCode::from_u16(status).unwrap();
    let classification = rule.classify(ReplyView { status, body, truncated });
    // A longer code would make the record of an outcome as large as the upstream likes.
    assert!(classification.result_code.is_none_or(|code| code.len() <= 64));
    // The strict reader stops at 32 levels, serde_json at 128: deeper bodies may differ.
    if status == StatusCode::OK && !truncated && depth(body) <= 32 {
        let plain = serde_json::from_slice(body).map(|Members(members)| plain_outcome(&members));
        // Nothing is claimed about a body that serde_json refuses: the rule also reads a bare 0409000, which is
        // not JSON.
        assert_eq!(classification.outcome, plain.unwrap_or(classification.outcome));
    }
}

/// An upper bound of the nesting: brackets in texts count, too.
fn depth(body: &[u8]) -> usize {
    body.iter().filter(|byte| matches!(byte, b'[' | b'{')).count()
}

/// All members of an object, duplicates included, which `serde_json::Map` would drop.
struct Members(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self(Vec::new()))
    }
}

impl<'de> Visitor<'de> for Members {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut members: A) -> Result<Self, A::Error> {
        while let Some(member) = members.next_entry()? {
            self.0.push(member);
        }
        Ok(self)
    }
}

/// The outcome by the documented rule, written as simply as possible: a code that is missing, or there twice, is
/// unknown.
fn plain_outcome(members: &[(String, Value)]) -> Outcome {
    let codes: Vec<_> =
        members.iter().filter(|(name, _)| name == "resultCode").map(|(_, code)| code).collect();
    match codes[..] {
        [Value::String(code)] if code == "0409000" => Outcome::Succeeded,
        [Value::Number(code)] if code.as_u64() == Some(409_000) => Outcome::Succeeded,
        [Value::String(_)] => Outcome::Failed,
        [Value::Number(code)] if code.is_u64() => Outcome::Failed,
        _ => Outcome::Unknown,
    }
}

/// A trail; the byte 1 separates segments. A gateway starts on any trail: damage that was found before is still
/// found, nothing that was whole counts as damaged, and no call stays in flight.
pub fn trail(bytes: &[u8]) {
    let folder = TempDir::new().unwrap();
    fs::write(key_path(folder.path()), KEY).unwrap();
    // An empty lock file: it names neither the newest segment nor the last record, so any trail is consistent with
    // it.
    fs::write(folder.path().join("lock"), "").unwrap();
    let mut first = 1;
    for segment in bytes.split(|byte| *byte == 1) {
        // A segment is named after its first record, so lines are counted to make names that fit.
        fs::write(folder.path().join(format!("audit-{first:020}.jsonl")), segment).unwrap();
        first += segment.iter().filter(|byte| **byte == b'\n').count().max(1);
    }
    let before = verify(folder.path());
    let audit = Audit::start(&options(folder.path()), metrics()).unwrap();
    // The two steps with which a gateway reads back what was there before its start.
    audit.verify_past(folder.path()).unwrap();
    Idempotency::new(&IDEMPOTENCY, &audit, None).rebuild(&IDEMPOTENCY, folder.path(), &audit);
    audit.close();
    let after = verify(folder.path());
    assert!(after.torn.is_none() && after.unresolved.at_work().count() == 0, "{after:?}");
    let known: Vec<_> = before.faults.iter().map(place).collect();
    assert!(
        known.iter().all(|fault| after.faults.iter().map(place).any(|other| other == *fault)),
        "{after:?}"
    );
    assert!(!known.is_empty() || after.faults.is_empty(), "{after:?}");
}

/// The key of all trails here. Fixed, so that a mutated record of the sample still has a valid hash where it was
/// not changed.
const KEY: [u8; 32] = [7; 32];

/// Small bounds, so that many trails can be read in a few seconds.
const IDEMPOTENCY: config::Idempotency = config::Idempotency {
    window: Duration::from_secs(24 * 60 * 60),
    max_keys: 1000,
    is_max_keys_set: true,
    reply_memory: 1 << 20,
    without_key: WithoutKey::Guard,
    fingerprint_window: Duration::from_secs(60),
};

/// The smallest segments that the configuration allows.
fn options(directory: &Path) -> Options {
    Options { segment_size: 64 << 10, ..Options::small(directory) }
}

fn metrics() -> AuditMetrics {
    AuditMetrics::new(&mut Registry::new())
}

fn verify(directory: &Path) -> TrailState {
    read(directory, &Keys::load(&key_path(directory)).unwrap()).unwrap()
}

fn place(fault: &BrokenLine) -> (&Path, usize, &'static str) {
    (&fault.file, fault.line, fault.reason)
}

/// The headers of a request, one a line. An accepted `Idempotency-Key` is plain and is read the same in quotes.
/// `Host` is accepted if and only if it is a name of the listener.
pub fn head(bytes: &[u8]) {
    let mut request = Request::new(());
    for line in bytes.split(|byte| *byte == b'\n') {
        // A line without a colon is a name with an empty value; names and values that HTTP cannot have are left
        // out.
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
        let (name, value) = line.split_at(colon);
        let value = value.strip_prefix(b":").unwrap_or_default().trim_ascii();
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
            request.headers_mut().append(name, value);
        }
    }
    let (parts, ()) = request.into_parts();
    let inbound = Inbound::read(&parts);

    let names = ["localhost", "127.0.0.1", "[::1]"];
    let hosts = Hosts::new(Some(names.map(str::to_owned).into()));
    let is_its = |host: &HeaderValue| names.iter().any(|name| is_with_port(host.as_bytes(), name));
    assert_eq!(hosts.check(inbound.host.first).is_ok(), inbound.host.first.is_some_and(is_its));

    if let Ok(key::Given { key: Some(given), .. }) = key::read(&inbound) {
        let is_plain = |byte: &u8| byte.is_ascii_graphic() && !b"\"\\".contains(byte);
        assert!((1..=255).contains(&given.len()) && given.iter().all(is_plain));
        // The specification of the header has it as a quoted string; many clients send it bare. Both must be the
        // same key.
        let quoted = HeaderValue::from_bytes(&[b"\"", given, b"\""].concat()).unwrap();
        let mut again = Inbound::default();
        (again.idempotency_key.first, again.idempotency_key.count) = (Some(&quoted), 1);
        assert_eq!(key::read(&again).unwrap().key, Some(given));
    }
}

/// Whether a `Host` is this name, alone or with a port.
fn is_with_port(host: &[u8], name: &str) -> bool {
    let host = host.to_ascii_lowercase();
    match host.strip_prefix(name.as_bytes()) {
        Some([]) => true,
        Some([b':', port @ ..]) => port.iter().all(u8::is_ascii_digit),
        _ => false,
    }
}

/// A configuration file: it is accepted, or has mistakes of one line each without control characters.
pub fn configuration(bytes: &[u8]) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("gateway.toml");
    fs::write(&path, bytes).unwrap();
    if let Err(problems) = preflight::load(&path, &[], []) {
        assert!(problems.iter().count() > 0);
        for line in problems.iter().map(ToString::to_string) {
            assert!(!line.is_empty() && !line.chars().any(char::is_control), "{line:?}");
        }
    }
}

/// The reply of a proxy to CONNECT: the tunnel begins where the final head ends, not before. Else bytes of the
/// proxy could be taken for the beginning of TLS, or the other way round.
pub fn tunnel(bytes: &[u8]) {
    let is_open =
        |bytes| proxy::final_head(bytes).is_ok_and(|head| head.is_some_and(|it| it.status.is_success()));
    if is_open(bytes) {
        assert!(bytes.ends_with(b"\n"), "{}", bytes.escape_ascii());
        // Each prefix is tried, since the bytes may arrive one by one.
        assert!((0..bytes.len()).all(|end| !is_open(&bytes[..end])));
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::{Index, select};
    use proptest::test_runner::{Config as Cases, TestRunner};

    use super::*;
    use crate::audit::ExchangeResult;
    use crate::model::code::Code;
    use crate::model::peer::Peer;
    use crate::model::stage::Stage;

    /// Bytes that parsers react to: random bytes alone would rarely form any of them.
    const PIECES: [&str; 40] = [
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "\\",
        "\\u0061",
        "\\ud83d",
        "\\n",
        "0",
        "-0",
        "1e3",
        "18446744073709551616",
        " ",
        "\t",
        "\n",
        "\r\n",
        "\r\n\r\n",
        "\0",
        "\u{1}",
        "\u{7f}",
        "é",
        "\u{feff}",
        "true",
        "null",
        "=",
        "#",
        "'",
        "[[",
        "]]",
        "..",
        "resultCode",
        "\"seq\":2,",
        "\"kind\":\"outcome\"",
        "host: localhost\n",
        "idempotency-key: k\n",
        "connection: close\n",
        "HTTP/1.1 200 ",
    ];

    /// A good input with up to five edits. Most reach deep into a parser, while random bytes are refused at the
    /// first.
    fn mutated(good: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            select(PIECES.to_vec()).prop_map(|piece| piece.as_bytes().to_vec()),
            vec(any::<u8>(), 0..4),
        ];
        vec((any::<Index>(), 0..6_usize, piece), 0..6).prop_map(move |edits| {
            let mut bytes = good.clone();
            for (at, removed, inserted) in edits {
                let at = at.index(bytes.len() + 1);
                bytes.splice(at..(at + removed).min(bytes.len()), inserted);
            }
            bytes
        })
    }

    /// Tries a target with random and mutated inputs. `CCSQM_GATEWAY_TEST_FUZZ` multiplies the number of cases.
    fn try_all(target: fn(&[u8]), cases: u32, good: Vec<Vec<u8>>) {
        let random = prop_oneof![
            vec(any::<u8>(), 0..200),
            vec(select(PIECES.to_vec()), 0..40).prop_map(|pieces| pieces.concat().into_bytes()),
        ];
        let input = prop_oneof![1 => random, 3 => select(good).prop_flat_map(mutated)];
        let longer = std::env::var("CCSQM_GATEWAY_TEST_FUZZ").map_or(1, |times| times.parse().unwrap());
        let cases = cases * longer;
        // Without persistence: proptest would write a file of failures beside the sources.
        let mut runner = TestRunner::new(Cases { cases, failure_persistence: None, ..Cases::default() });
        let tried = runner.run(&input, |bytes| {
            target(&bytes);
            Ok(())
        });
        tried.unwrap();
    }

    fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
        texts.iter().map(|text| text.as_bytes().to_vec()).collect()
    }

    #[test]
    fn any_body_leaves_its_audit_record_on_one_line() {
        let good = r#"{"qualityTaskId":"95464\u0035","setCountsType":1,"isTakeEffect":0,
            "setCounts":[{"personID":"16\n","count":2},{"personID":"é"}]}"#;
        try_all(body, 2000, texts(&[good, &good.replace("\"95464\\u0035\"", "95464")]));
    }

    #[test]
    fn any_schema_is_compiled_or_rejected() {
        try_all(
            schema,
            500,
            texts(&[Contract::APPOINT_QUALITY_TASK, r#"{"type":"string","pattern":"^a[b-d]{2,3}$"}"#]),
        );
    }

    #[test]
    fn any_reply_is_classified_like_its_parsed_json() {
        let good = [
            "\0{\"resultCode\":\"0409000\",\"resultDesc\":\"Operation successful.\"}",
            "\0{\"rows\":[1,{\"resultCode\":null}],\"resultCode\":409000}",
            "\u{8}{\"resultCode\": 0409000, \"rows\":[1,2",
            "\0{\"resultCode\":\"0409000\",\"resultCode\":\"0409001\"}",
        ];
        try_all(reply, 4000, texts(&good));
    }

    #[test]
    fn gateway_starts_on_any_trail_and_hides_no_damage() {
        let (whole, open) = sample();
        let end = whole.iter().position(|byte| *byte == b'\n').unwrap() + 1;
        let two = [&whole[..end], b"\x01", &whole[end..]].concat();
        // The unchanged samples come first: if one fails, it is the sample that is wrong and not a mutation.
        trail(&open);
        trail(&two);
        try_all(trail, 400, vec![whole, open, two]);
    }

    /// A trail of a call with a key, one without and a refusal; and the same trail cut off after its first intent.
    fn sample() -> (Vec<u8>, Vec<u8>) {
        let folder = TempDir::new().unwrap();
        fs::write(key_path(folder.path()), KEY).unwrap();
        let audit = Audit::start(&options(folder.path()), metrics()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let answer = ExchangeResult {
            outcome: Outcome::Succeeded,
            code: None,
            cause: None,
            status: Some(200),
            upstream_status: Some(200),
            upstream_id: None,
            result_code: Some(b"0409000"[..].into()),
            attempts: 1,
            token_generation: 1,
            note: None,
            reply: None,
        };
        // The members are written by hand, as idempotency writes them: a rebuild finds the key by `key` and
        // `print`.
        let key = format!(",\"key\":\"{:032}\",\"print\":\"{:032}\",\"task\":\"7\"", 1, 2);
        for members in [&*key, ",\"task\":7"] {
            let mut record = audit.open(Peer::Tcp(([127, 0, 0, 1], 5000).into()));
            record.caller("qa-console".into());
            record.enter(Stage::Audit);
            let intent = record.intent(&Permit::default(), 2, &[0; 32], &|line| {
                line.extend_from_slice(members.as_bytes());
            });
            runtime.block_on(intent.unwrap()).unwrap().sent().finish(&answer);
        }
        audit.open(Peer::Tcp(([127, 0, 0, 1], 5000).into())).refuse(Code::RouteUnknown, None);
        audit.close();
        let whole = fs::read(folder.path().join("audit-00000000000000000001.jsonl")).unwrap();
        let is_end = |(_, byte): &(usize, &u8)| **byte == b'\n';
        let (second, _) = whole.iter().enumerate().filter(is_end).nth(1).unwrap();
        let open = whole[..=second].to_vec();
        (whole, open)
    }

    #[test]
    fn any_head_has_a_plain_key_and_host_or_is_rejected() {
        let good =
            "host: localhost:8080\nidempotency-key: \"order-7\"\nx-userid: 7\ncontent-type: application/json";
        let bad = "Host: [::1]:80\nidempotency-force: 01\nconnection: host, x\ntransfer-encoding: chunked\nexpect: x";
        try_all(head, 4000, texts(&[good, bad]));
    }

    #[test]
    fn any_configuration_mistake_is_reported_on_one_line() {
        let (minimal, all) = (include_str!("../config/minimal.toml"), include_str!("../config/gateway.toml"));
        // Line breaks and control characters in keys and values must not reach a terminal as they are.
        let odd = format!("\"a\\nb\" = 1\n{minimal}\"\\u0007\" = [\"\\r\"]\n");
        try_all(configuration, 300, texts(&[minimal, all, &odd]));
    }

    #[test]
    fn tunnel_begins_after_the_head_of_any_proxy_response() {
        let good = [
            "HTTP/1.1 200 Connection established\r\n\r\n",
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.0 407 No\r\nvia: x\r\n\r\nno",
        ];
        try_all(tunnel, 2000, texts(&good));
    }
}
