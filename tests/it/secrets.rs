//! The sweep: after all that can happen, no secret stands in any place that a person or a machine reads.

use ccsqm_gateway::sandbox::{Fault, Faults, Framing, Instead, Sandbox};

use crate::support::*;

/// Named so that it shows in every sink: a sweep that does not find it is no sweep.
const CANARY: &str = "canary-credential";
const SECRET: &str = "sandbox-app-secret";
const REFUSED: &str = "another-app-secret";
const ACCEPTED: &str = "rotated-app-secret";
const CALLERS_OWN: &str = "callers-own-credential";

/// The forms in which a text can stand somewhere: plain, hex, and base64 at each of its three alignments.
fn forms(text: &str) -> Vec<String> {
    let hex: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    let mut forms = vec![text.to_owned(), hex.to_uppercase(), hex];
    for shift in 0..3 {
        let padded = [&vec![0; shift][..], text.as_bytes()].concat();
        for alphabet in ["+/", "-_"] {
            let encoded = base64(&padded, alphabet.as_bytes());
            // The first and the last characters depend on what stands beside the text.
            let (from, to) = ((shift * 8).div_ceil(6), padded.len() * 8 / 6);
            forms.push(encoded[from..to].to_owned());
        }
    }
    forms
}

fn base64(bytes: &[u8], last_two: &[u8]) -> String {
    let letters: Vec<u8> =
        (b'A'..=b'Z').chain(b'a'..=b'z').chain(b'0'..=b'9').chain(last_two.iter().copied()).collect();
    let bits = |i: usize| bytes.get(i / 8).map_or(0, |byte| usize::from(byte >> (7 - i % 8) & 1));
    let letter = |start: usize| char::from(letters[(start..start + 6).fold(0, |n, i| n << 1 | bits(i))]);
    (0..bytes.len() * 8).step_by(6).map(letter).collect()
}

pub(crate) fn shows(sink: &str, text: &str) -> bool {
    forms(text).iter().any(|form| sink.contains(form))
}

#[test]
fn every_encoding_of_a_secret_is_detected() {
    for encoded in [
        "x sandbox-app-secret x",
        "73616e64626f782d6170702d736563726574",
        "73616E64626F782D6170702D736563726574",
        "c2FuZGJveC1hcHAtc2VjcmV0",             // by itself
        "eyJhIjoic2FuZGJveC1hcHAtc2VjcmV0In0=", // {"a":"…"}
        "QmVhcmVyIHNhbmRib3gtYXBwLXNlY3JldA==", // Bearer …
    ] {
        assert!(shows(encoded, SECRET), "{encoded}");
    }
    assert!(!shows("sandbox-app-secre", SECRET));
}

/// Everything that a gateway can go through, with the texts that it answered.
fn go_through_everything(sandbox: &Sandbox, gateway: &Gateway) -> String {
    let own = format!(
        "authorization: Bearer {CALLERS_OWN}\r\nx-app-key: {CALLERS_OWN}\r\ncookie: {CALLERS_OWN}\r\n"
    );
    let mut replies = vec![gateway.post_with(&own), gateway.call()];
    for body in ["{}", "", "[", "null", &BODY.replace("qualityTaskId", CALLERS_OWN)[..90]] {
        replies.push(gateway.post(body));
        replies.push(gateway.send(&head(body.len(), &own), body));
    }
    for headers in ["origin: http://evil\r\n", "host: evil\r\n", "x-userid: 7\r\n", "x-app-secret: x\r\n"] {
        replies.push(gateway.post_with(&(headers.to_owned() + &own)));
    }
    let unknown = head(BODY.len(), &own).replacen(PATH, "/nowhere", 1);
    replies.push(gateway.send(&unknown, BODY));
    for fault in [
        Fault::instead(Instead::Reset),
        Fault::instead(Instead::Garbage),
        Fault::framing(Framing::HalfBody),
        Fault::status(500),
        Fault::status(429),
        Fault::status(401).times(1),
    ] {
        script(sandbox, Faults::business(fault));
        replies.push(gateway.call());
    }
    // The endpoint refuses, breaks, and says nonsense that repeats the secret.
    let changes = || {
        records(&gateway.audit_directory(), "event").iter().filter(|e| e["event"] == "secret_change").count()
    };
    let file = gateway.folder.path().join("app_secret");
    let echo = format!(r#"{{"AccessToken":"{SECRET}\u0000{REFUSED}","error":"{SECRET}"}}"#);
    script(
        sandbox,
        Faults::token([Fault::status(403).with_body(&echo).times(1), Fault::body(&echo).times(1)]),
    );
    std::fs::write(&file, REFUSED).unwrap();
    wait_for("the refused trial", || (changes() == 1).then_some(()));
    sandbox.secret("sandbox-app-key", ACCEPTED);
    std::fs::write(&file, format!("{ACCEPTED}\n")).unwrap();
    script(sandbox, Faults::token([Fault::body(&echo).times(1), Fault::instead(Instead::Garbage).times(1)]));
    sandbox.revoke();
    replies.push(gateway.call());
    script(sandbox, Faults::default());
    wait_for("service", || {
        replies.push(gateway.call());
        (replies.last().unwrap().outcome() == "succeeded").then_some(())
    });
    script(sandbox, Faults::business(Fault::status(401)));
    replies.extend([gateway.call(), gateway.call()]);
    script(sandbox, Faults::default());
    replies.iter().map(|reply| format!("{reply:?}\n")).collect()
}

#[test]
fn no_secret_appears_in_any_output() {
    let sandbox = sandbox();
    let setup = Setup { credential: CANARY, ..Setup::default() }
        .set("log.level", "trace")
        .set("token.wait", "300ms")
        .set("upstream.timeout", "4s");
    let mut gateway = start_with(&sandbox, setup);
    let answers = go_through_everything(&sandbox, &gateway)
        + &gateway.post_with(&format!("x-request-id: {CANARY}\r\n")).text();
    let admin = ["/metrics", "/status", "/readyz", "/livez", "/nowhere"].map(|path| gateway.admin(path).body);
    let config = gateway.folder.path().join("gateway.toml");
    let (_, check, check_error) = command(&["check", "--config", config.to_str().unwrap()]);
    let process = |file: &str| {
        let bytes = std::fs::read(format!("/proc/{}/{file}", gateway.id())).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let command_line = process("cmdline") + &process("environ") + CANARY;
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    let audit: String = std::fs::read_dir(gateway.audit_directory())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    let [metrics, status, ..] = admin;
    let issued = sandbox.token_calls().into_iter().filter_map(|call| call.issued);
    let secrets: Vec<String> =
        issued.chain([SECRET, REFUSED, ACCEPTED, CALLERS_OWN].map(str::to_owned)).collect();
    assert!(secrets.len() >= 6, "several tokens were issued: {}", secrets.len());
    for (sink, text) in [
        ("the log at trace", gateway.log()),
        ("an answer", answers),
        ("the metrics", metrics),
        ("the status", status),
        ("the audit trail", audit),
        ("check", check + &check_error),
        ("the command line", command_line),
    ] {
        assert!(shows(&text, CANARY), "the sweep finds what is in {sink}");
        for secret in &secrets {
            assert!(!shows(&text, secret), "{secret} shows in {sink}");
        }
    }
}
