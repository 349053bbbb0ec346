//! Hostile input, byte by byte: what reaches the upstream is one clean request of ours, or nothing.
//!
//! A case is a request that passes, its control, and one change to it. Both go to the same gateway, each on a
//! connection of its own and with task ids of its own, so that whatever arrives has a name. When all is sent, the
//! upstream's journal must hold exactly the requests that were to pass, each with our head to the byte; and the
//! trail an intent and an outcome for each of them, and for nothing else.

mod bodies;
mod chunks;
mod framing;
mod heads;
mod slow;
mod targets;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io::{ErrorKind, Read, Write},
    iter::repeat_n,
    net::{Shutdown, TcpStream},
    thread,
    time::Duration,
};

use ccsqm_gateway::sandbox::{Received, Sandbox};

use crate::support::{Gateway, PATH, Setup, command, records, sandbox, start_with, wait_for};

/// Stands in every head that is sent, and must never arrive.
const HEAD_CANARY: &str = "canary-of-heads";
/// Stands in every body that is sent, and must arrive with those that pass.
const BODY_CANARY: &str = "canary-of-bodies";

/// A body; its task's id is that of the first request on a connection.
const BODY: &str = r#"{"qualityTaskId":"100000000000000000","setCountsType":1,"isTakeEffect":0,"setCounts":[{"personID":"canary-of-bodies"}]}"#;

/// The operator as which the gateway acts.
const OPERATOR: &str = "1611917095665261978";
const MAX_BODY: usize = 4096;

/// The intent was not safe in time. It is the one refusal that may leave an intent, with an outcome that says so.
const BUSY: &str = "503 audit_unavailable";

/// The task of a request by its place on its connection. In a case's text the connection is 0.
fn task(place: usize, connection: usize) -> String {
    ((place as u64 + 1) * 100_000_000_000_000_000 + connection as u64).to_string()
}

/// The k-th request of a connection, of the text of a first one.
fn as_number(place: usize, first: &str) -> String {
    first.replace(&task(0, 0), &task(place, 0))
}

/// The usual request.
fn plain() -> String {
    plain_with(BODY)
}

fn plain_with(body: &str) -> String {
    let length = body.chars().count(); // each is a byte
    format!("{}content-length: {length}\r\n\r\n{body}", start_of_head())
}

/// The same, chunked.
fn chunked() -> String {
    format!("{}transfer-encoding: chunked\r\n\r\n{:x}\r\n{BODY}\r\n0\r\n\r\n", start_of_head(), BODY.len())
}

fn start_of_head() -> String {
    format!(
        "POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nx-mark: {HEAD_CANARY}\r\n"
    )
}

/// A request, and a usual one behind it.
fn with_next(first: &str) -> String {
    first.to_owned() + &as_number(1, &plain())
}

/// A request that passes, and one change to it. Texts are bytes: each character is one, U+0000 to U+00FF.
struct Case {
    family: &'static str,
    name: String,
    control: String,
    hostile: String,
    /// What the caller reads, see [`answers`]. The k-th answer is to the k-th request: `200` means that its task
    /// arrived, anything else that it did not.
    answers: Vec<&'static str>,
    /// The body of the first request, if it passes.
    body: String,
    /// The caller keeps its side of the connection open, and waits.
    waits: bool,
}

impl Case {
    /// The control with its first `from` made `to`.
    fn swap(control: &str, from: &str, to: &str, answers: &[&'static str]) -> Self {
        assert!(control.contains(from), "{from:?} is not in {control:?}");
        Self {
            family: "",
            name: format!("{} for {}", shown(to), shown(from)),
            control: control.to_owned(),
            hostile: control.replacen(from, to, 1),
            answers: answers.to_vec(),
            body: BODY.to_owned(),
            waits: false,
        }
    }

    /// The control with something more in front of its first `place`.
    fn insert(control: &str, place: &str, more: &str, answers: &[&'static str]) -> Self {
        let case = Self::swap(control, place, &(more.to_owned() + place), answers);
        Self { name: format!("{} before {}", shown(more), shown(place)), ..case }
    }

    /// The usual request with one more header.
    fn header(line: &str, answers: &[&'static str]) -> Self {
        Self::insert(&plain(), "x-mark", &format!("{line}\r\n"), answers)
    }

    /// The control without what is behind its first `last`.
    fn cut(control: &str, last: &str, answers: &[&'static str]) -> Self {
        let (before, behind) = control.split_once(last).unwrap();
        let case = Self::swap(control, &format!("{last}{behind}"), last, answers);
        Self { name: format!("cut behind byte {}, {}", before.len() + last.len(), shown(last)), ..case }
    }
}

/// A text as part of a name.
fn shown(text: &str) -> String {
    let escaped = text.escape_debug().to_string();
    match escaped.char_indices().nth(100) {
        Some((end, _)) => format!("`{}…` ({} bytes)", &escaped[..end], text.chars().count()),
        None => format!("`{escaped}`"),
    }
}

/// A gateway with a bound that a case can reach, and a token.
fn gateway(sandbox: &Sandbox, setup: Setup) -> Gateway {
    let gateway = start_with(sandbox, setup.set("server.max_body", format!("{MAX_BODY}B")));
    wait_for("the token", || (gateway.admin("/readyz").status == 200).then_some(()));
    gateway
}

/// Writes, reads to the end of the connection.
fn converse(gateway: &Gateway, text: &str, waits: bool) -> Vec<u8> {
    let bytes: Vec<u8> = text.chars().map(|byte| u8::try_from(byte).unwrap()).collect();
    let mut stream = TcpStream::connect(gateway.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let _ = stream.write_all(&bytes); // the gateway may have closed already
    if !waits {
        let _ = stream.shutdown(Shutdown::Write);
    }
    let mut read = Vec::new();
    let end = stream.read_to_end(&mut read); // a reset is an end, too
    let is_open = end.is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
    assert!(!is_open, "the gateway did not close the connection behind {}", shown(text));
    read
}

/// The answers on a connection. `200`: a task of the sandbox's; a status and a code: a refusal of ours, with
/// nothing sent; a status and `bare`: hyper's own, which carries no header of ours.
fn answers(mut bytes: &[u8]) -> Vec<String> {
    let mut answers = Vec::new();
    while !bytes.is_empty() {
        let text = String::from_utf8_lossy(bytes);
        let Some((head, _)) = text.split_once("\r\n\r\n").filter(|(head, _)| head.starts_with("HTTP/1."))
        else {
            answers.push(format!("no HTTP: {}", shown(&text)));
            break;
        };
        let header = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let status = head.split(' ').nth(1).unwrap_or_default();
        answers.push(match (header("x-gateway-outcome"), header("x-gateway-error")) {
            (Some("succeeded"), None) => status.to_owned(),
            (Some("not_sent"), Some(code)) => format!("{status} {code}"),
            (None, None) if status == "100" => status.to_owned(),
            (None, None) => format!("{status} bare"),
            other => format!("{status} {other:?}"),
        });
        let length = header("content-length").map_or(0, |length| length.parse().unwrap());
        bytes = bytes.get(head.len() + 4 + length..).unwrap_or_default(); // an answer to HEAD has no body
    }
    answers
}

/// What was to pass: a task, the case that sent it, its body.
type Passed = BTreeMap<String, (String, String)>;

/// What was sent and read.
#[derive(Default)]
struct Tally {
    passed: Passed,
    /// How often each code of a refusal was read.
    refused: BTreeMap<String, u64>,
    wrong: Vec<String>,
}

impl Case {
    /// The change and the control: a name, what is sent, what must be read.
    fn sides(&self) -> [(String, &str, Vec<&'static str>); 2] {
        let name = format!("{}: {}", self.family, self.name);
        let continued = self.control.contains("expect: 100-continue").then_some("100");
        let requests = self.control.matches("POST ").count();
        let all_pass = continued.into_iter().chain(repeat_n("200", requests)).collect();
        let control = (format!("control of {name}"), &*self.control, all_pass);
        [(name, &self.hostile, self.answers.clone()), control]
    }
}

impl Tally {
    /// Sends both sides of a case, each on a connection of its own.
    fn send(&mut self, gateway: &Gateway, case: &Case, connection: usize) {
        for ((name, text, expected), connection) in case.sides().into_iter().zip(connection..) {
            for attempt in 0..5 {
                let connection = connection + attempt * 1_000_000;
                let placed = |text: String, place| text.replace(&task(place, 0), &task(place, connection));
                let read = converse(gateway, &(0..3).fold(text.to_owned(), placed), case.waits);
                let said = answers(&read);
                // A disk that is busy with something else: nothing was sent, and the same may be asked again.
                let is_busy = attempt < 4 && said.iter().any(|answer| answer == BUSY);
                let expected =
                    if is_busy { said.iter().map(String::as_str).collect() } else { expected.clone() };
                self.compare(&name, &read, &said, &expected);
                self.pass(&name, &case.body, &expected, connection);
                if !is_busy {
                    break;
                }
            }
        }
    }

    fn compare(&mut self, name: &str, read: &[u8], said: &[String], expected: &[&str]) {
        if said != expected {
            self.wrong.push(format!("{name}: read {said:?}, expected {expected:?}"));
        }
        if shows(read, HEAD_CANARY) {
            self.wrong.push(format!("{name}: the canary is in the answer"));
        }
        let words = said.iter().filter(|answer| *answer != BUSY).filter_map(|answer| answer.split_once(' '));
        for (_, code) in words.filter(|(_, word)| *word != "bare") {
            *self.refused.entry(code.to_owned()).or_default() += 1;
        }
    }

    fn pass(&mut self, name: &str, first: &str, expected: &[&str], connection: usize) {
        let requests = expected.iter().filter(|answer| **answer != "100").enumerate();
        for (place, _) in requests.filter(|(_, answer)| **answer == "200") {
            let body = if place == 0 { first } else { BODY };
            let body = body.replace(&task(0, 0), &task(place, connection));
            self.passed.insert(task(place, connection), (name.to_owned(), body));
        }
    }

    fn add(mut self, other: Self) -> Self {
        self.passed.extend(other.passed);
        self.wrong.extend(other.wrong);
        for (code, count) in other.refused {
            *self.refused.entry(code).or_default() += count;
        }
        self
    }
}

fn shows(bytes: &[u8], canary: &str) -> bool {
    String::from_utf8_lossy(bytes).to_ascii_lowercase().contains(canary)
}

/// Sends all cases, several at a time.
fn send_all(gateway: &Gateway, cases: &[Case], at_once: usize) -> Tally {
    let send = |first: usize| {
        let mut tally = Tally::default();
        for at in (first..cases.len()).step_by(at_once) {
            tally.send(gateway, &cases[at], 2 * at + 1);
        }
        tally
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..at_once).map(|first| scope.spawn(move || send(first))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).fold(Tally::default(), Tally::add)
    })
}

/// The only head that may arrive.
fn our_head(sandbox: &Sandbox, length: usize) -> String {
    let token = sandbox.token_calls().last().unwrap().issued.clone().unwrap();
    format!(
        "POST {PATH} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json; charset=UTF-8\r\naccept: */*\r\n\
         accept-encoding: identity\r\nuser-agent: ccsqm-gateway/{}\r\nauthorization: Bearer {token}\r\n\
         x-app-key: sandbox-app-key\r\nx-userid: {OPERATOR}\r\ncontent-length: {length}\r\n\r\n",
        sandbox.address(),
        env!("CARGO_PKG_VERSION"),
    )
}

/// What the upstream received that it should not have, and what it did not receive.
fn wrong_upstream(sandbox: &Sandbox, passed: &Passed) -> Vec<String> {
    let heads: HashMap<usize, String> =
        passed.values().map(|(_, body)| (body.len(), our_head(sandbox, body.len()))).collect();
    let mut missing = passed.clone();
    let mut wrong: Vec<_> = sandbox
        .requests()
        .iter()
        .filter_map(|received| {
            let Received { head, body, complete, .. } = received;
            let sent = serde_json::from_slice::<serde_json::Value>(body)
                .ok()
                .and_then(|body| missing.remove(body["qualityTaskId"].as_str()?));
            let is_right = sent.as_ref().is_some_and(|(_, sent)| {
                *complete && body == sent.as_bytes() && heads[&sent.len()].as_bytes() == head
            });
            let text = || String::from_utf8_lossy(&[&head[..], body].concat()).into_owned();
            let name = sent.map(|(name, _)| name);
            (!is_right).then(|| format!("arrived: {}, of {name:?}", shown(&text())))
        })
        .collect();
    wrong.extend(missing.into_values().map(|(name, _)| format!("{name}: did not arrive")));
    wrong
}

/// What the trail says that it should not, and what it does not say.
fn wrong_trail(gateway: &Gateway, Tally { passed, refused, .. }: &Tally) -> Vec<String> {
    let directory = gateway.audit_directory();
    let mut wrong = Vec::new();
    let mut outcomes = HashMap::<_, Vec<_>>::new();
    for outcome in records(&directory, "outcome") {
        let by = outcome["code"].as_str().map_or_else(String::new, |code| format!(" by {code}"));
        let became = format!("{}{by}", outcome["outcome"].as_str().unwrap());
        outcomes.entry(outcome["id"].to_string()).or_default().push(became);
    }
    let mut missing = passed.clone();
    for intent in records(&directory, "intent") {
        let sent = intent["task"].as_str().and_then(|task| missing.remove(task));
        let became = outcomes.remove(&intent["id"].to_string());
        let expected = if sent.is_some() { "succeeded" } else { "not_sent by audit_unavailable" };
        if became.as_deref() != Some(&[expected.to_owned()]) {
            wrong.push(format!("{:?}: {intent} became {became:?}", sent.map(|(name, _)| name)));
        }
    }
    wrong.extend(missing.into_values().map(|(name, _)| format!("{name}: no intent")));
    wrong.extend(outcomes.into_values().map(|outcome| format!("an outcome without intent: {outcome:?}")));
    let mut recorded = BTreeMap::<String, u64>::new();
    for refusal in records(&directory, "refusal") {
        let code = refusal["code"].as_str().unwrap().to_owned();
        if BUSY.ends_with(&code) {
            continue;
        }
        *recorded.entry(code).or_default() += refusal["count"].as_u64().unwrap_or(1);
    }
    wrong.extend((recorded != *refused).then(|| format!("refused {refused:?}, recorded {recorded:?}")));
    let (code, said, _) = command(&["audit", "verify", directory.to_str().unwrap()]);
    wrong.extend((code != 0).then_some(said));
    let trail = records(&directory, "").iter().map(ToString::to_string).collect::<String>();
    wrong.extend(shows(trail.as_bytes(), HEAD_CANARY).then(|| "the canary is in the trail".to_owned()));
    wrong
}

/// Where a canary is among all that arrived.
fn arrivals(sandbox: &Sandbox, canary: &str) -> usize {
    let calls = sandbox.token_calls().into_iter().map(|call| call.request);
    let all = sandbox.requests().into_iter().chain(calls);
    all.filter(|received| shows(&received.head, canary) || shows(&received.body, canary)).count()
}

/// Sends all cases to one gateway, ends it, and looks at everything.
fn prove(sandbox: &Sandbox, mut gateway: Gateway, cases: &[Case], at_once: usize) {
    let mut tally = send_all(&gateway, cases, at_once);
    let credentials = cases.iter().filter(|case| case.family == "credential").count();
    let metrics = gateway.admin("/metrics").body;
    gateway.signal("-TERM"); // what is on its way arrives before the end
    assert!(gateway.wait().success());
    tally.wrong.extend(wrong_upstream(sandbox, &tally.passed));
    tally.wrong.extend(wrong_trail(&gateway, &tally));
    assert!(tally.wrong.is_empty(), "{} faults:\n{}", tally.wrong.len(), tally.wrong.join("\n"));
    assert_eq!(arrivals(sandbox, BODY_CANARY), tally.passed.len(), "a sweep that finds nothing is none");
    assert_eq!(arrivals(sandbox, HEAD_CANARY), 0);
    let dropped = format!("ccsqm_gateway_credential_headers_dropped_total {credentials}\n");
    assert!(metrics.contains(&dropped), "{metrics}");
}

/// All cases, and how many each family has.
fn table(families: Vec<(&'static str, Vec<Case>)>) -> (Vec<Case>, String) {
    let counts: Vec<_> = families.iter().map(|(family, cases)| format!("{family} {}", cases.len())).collect();
    let name = |(family, cases): (_, Vec<Case>)| {
        cases.into_iter().map(move |case| Case { family, ..case }).collect::<Vec<_>>()
    };
    let cases: Vec<_> = families.into_iter().flat_map(name).collect();
    let mut seen = HashSet::new();
    let mut idle = Vec::new();
    for case in &cases {
        if case.control == case.hostile || !seen.insert(&case.hostile) {
            idle.push(format!("{}: {}", case.family, case.name));
        }
    }
    assert!(idle.is_empty(), "no change, or one that another case has:\n{}", idle.join("\n"));
    (cases, counts.join(", "))
}

#[test]
fn upstream_gets_one_clean_request_or_nothing_from_hostile_input() {
    let (cases, counts) = table(vec![
        ("content-length", framing::content_lengths()),
        ("transfer-encoding", framing::transfer_encodings()),
        ("both", framing::both()),
        ("chunk size", chunks::sizes()),
        ("chunk data", chunks::data()),
        ("chunk end", chunks::ends()),
        ("trailer", chunks::trailers()),
        ("byte", heads::bytes()),
        ("line", heads::lines()),
        ("credential", heads::credentials()),
        ("name", heads::names()),
        ("operator", heads::operators()),
        ("connection", heads::connections()),
        ("upgrade", heads::upgrades()),
        ("expect", heads::expectations()),
        ("head size", heads::sizes()),
        ("host", targets::hosts()),
        ("target", targets::targets()),
        ("method", targets::methods()),
        ("version", targets::versions()),
        ("preface", targets::prefaces()),
        ("media type", bodies::media_types()),
        ("body", bodies::contents()),
        ("body size", bodies::sizes()),
        ("pipeline", bodies::pipelines()),
        ("half", slow::halves()),
    ]);
    println!("{} cases: {counts}", cases.len());
    assert!(cases.len() >= 300, "{} cases: {counts}", cases.len());
    let sandbox = sandbox();
    prove(&sandbox, gateway(&sandbox, Setup::default()), &cases, 4);
}
