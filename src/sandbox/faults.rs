//! The script of faults: a JSON document, and the counters that decide which fault meets which call.
//!
//! The document has a list for business calls, one for token calls and one for connections. For each call the
//! **first** entry that is due applies, whole. An entry is due from call `after` on (counted from the moment the
//! script was set) and for `times` calls; without `times`, always. So `[{"times":1,"status":500},{"times":1,
//! "instead":"reset"}]` means: one 500, one reset, then the real answers again.
//!
//! Values are sent as given and never checked for good manners: a header value with a line break is a
//! response splitting, which is what somebody wanted to see.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::http::Reply;

/// The whole script. The default has no faults.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Faults {
    /// For every request that is neither a token call nor a control call.
    pub business: Vec<Fault>,
    /// For the token endpoint.
    pub token: Vec<Fault>,
    /// For accepted connections of the first listener, before TLS and before a byte is read.
    pub connections: Vec<ConnectionFault>,
    /// The first listener refuses connections, and its open ones are closed.
    pub down: bool,
    /// The same for the token listener; needs `Options::token_listener`.
    pub token_down: bool,
    /// What happens to older tokens when a new one is asked for.
    pub habit: Habit,
    /// The true lifetime of tokens issued from now on, in milliseconds, instead of the one asked for. The
    /// reply states whole seconds, at least 1.
    pub lifetime_ms: Option<u64>,
}

impl Faults {
    /// A script with one fault for business calls.
    pub fn business(fault: Fault) -> Self {
        Self { business: vec![fault], ..Self::default() }
    }

    /// A script with one fault for token calls.
    pub fn token(fault: Fault) -> Self {
        Self { token: vec![fault], ..Self::default() }
    }

    pub(super) fn validate(&self) -> Result<(), String> {
        for fault in self.business.iter().chain(&self.token) {
            fault.validate()?;
        }
        if self.business.iter().any(|fault| fault.prefixed || fault.skew_s != 0) {
            return Err("`prefixed` and `skew_s` belong to token faults".to_owned());
        }
        if self.token.iter().any(|fault| fault.code.is_some()) {
            return Err("`code` belongs to business faults".to_owned());
        }
        Ok(())
    }

    /// Whether nobody could end this script over a connection of the first listener.
    pub(super) fn locks_out(&self) -> bool {
        self.down || self.connections.iter().any(|fault| fault.times.is_none())
    }
}

/// One fault of a call. Fields combine: what is said (`status` … `size`), how it is sent (`delay_ms`, `interim`,
/// `framing`), what comes behind it (`then`). `instead` overrides all of them but `delay_ms`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fault {
    /// How many calls it meets; absent = always.
    pub times: Option<u64>,
    /// How many calls go by before the first one that it meets.
    pub after: u64,
    /// Time between the decision and the first byte of the answer, in milliseconds.
    pub delay_ms: u64,
    /// No HTTP answer at all.
    pub instead: Option<Instead>,
    /// This status instead of the real answer, with a small JSON body unless `body` is given.
    pub status: Option<u16>,
    /// This body instead of the real answer, with status 200 unless `status` is given.
    pub body: Option<String>,
    /// This content type; empty = no such header.
    pub content_type: Option<String>,
    /// Further reply headers, in order: `[["Retry-After","5"]]`. A `Content-Encoding` here does not encode the body.
    pub headers: Vec<(String, String)>,
    /// The result code, where the call would have succeeded.
    pub code: Option<Code>,
    /// Members set in a reply that is a JSON object: `{"Expires": 600}`.
    pub with: Map<String, Value>,
    /// Members left out of a reply that is a JSON object: `["AccessToken"]`.
    pub without: Vec<String>,
    /// Token calls: `AccessToken` starts with `Bearer `.
    pub prefixed: bool,
    /// Token calls: seconds added to `CreateTime`.
    pub skew_s: i64,
    /// The body is padded to this many bytes.
    pub size: Option<usize>,
    /// An interim answer (1xx) before the real one.
    pub interim: Option<u16>,
    /// How head and body are sent.
    pub framing: Option<Framing>,
    /// What comes behind the answer.
    pub then: Option<Then>,
}

impl Fault {
    /// Answers with this status.
    pub fn status(status: u16) -> Self {
        Self { status: Some(status), ..Self::default() }
    }

    /// Answers 200 with this body.
    pub fn body(body: impl Into<String>) -> Self {
        Self { body: Some(body.into()), ..Self::default() }
    }

    /// Does this instead of answering.
    pub fn instead(instead: Instead) -> Self {
        Self { instead: Some(instead), ..Self::default() }
    }

    /// Answers with this result code.
    pub fn code(code: Code) -> Self {
        Self { code: Some(code), ..Self::default() }
    }

    /// Sends the real answer in this way.
    pub fn framing(framing: Framing) -> Self {
        Self { framing: Some(framing), ..Self::default() }
    }

    /// Sends the real answer, then does this.
    pub fn then(then: Then) -> Self {
        Self { then: Some(then), ..Self::default() }
    }

    /// Sends the real answer after this many milliseconds.
    pub fn delayed(delay_ms: u64) -> Self {
        Self { delay_ms, ..Self::default() }
    }

    /// The same fault, for this many calls.
    #[must_use]
    pub fn times(self, times: u64) -> Self {
        Self { times: Some(times), ..self }
    }

    pub(super) fn delay(&self) -> Duration {
        Duration::from_millis(self.delay_ms)
    }

    /// The scripted answer, if status or body is scripted.
    pub(super) fn replacement(&self) -> Option<Reply> {
        if self.status.is_none() && self.body.is_none() {
            return None;
        }
        let status = self.status.unwrap_or(200);
        Some(match &self.body {
            Some(body) => Reply::text(status, body),
            None => Reply::error(status, "scripted"),
        })
    }

    /// Lays headers, members and size over an answer.
    pub(super) fn shape(&self, mut reply: Reply) -> Reply {
        if !(self.with.is_empty() && self.without.is_empty()) {
            self.edit_members(&mut reply);
        }
        if let Some(size) = self.size {
            reply.pad(size);
        }
        if let Some(content_type) = &self.content_type {
            reply.content_type.clone_from(content_type);
        }
        reply.headers.extend_from_slice(&self.headers);
        reply
    }

    fn edit_members(&self, reply: &mut Reply) {
        if let Ok(mut members) = serde_json::from_slice::<Map<String, Value>>(&reply.body) {
            members.extend(self.with.clone());
            members.retain(|name, _| !self.without.contains(name));
            reply.body = Value::Object(members).to_string().into_bytes();
        }
    }

    fn validate(&self) -> Result<(), String> {
        if self.status.is_some_and(|status| !(200..=999).contains(&status)) {
            return Err("`status` must be 200 to 999".to_owned());
        }
        if self.interim.is_some_and(|status| !(100..=199).contains(&status)) {
            return Err("`interim` must be 100 to 199".to_owned());
        }
        Ok(())
    }
}

/// One fault of a connection, right after it was accepted.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectionFault {
    /// How many connections it meets; absent = always.
    #[serde(default)]
    pub times: Option<u64>,
    /// How many connections go by before the first one that it meets.
    #[serde(default)]
    pub after: u64,
    /// Time before it happens, in milliseconds.
    #[serde(default)]
    pub delay_ms: u64,
    /// What happens. `Hang` on a TLS listener is a handshake that never ends.
    pub instead: Instead,
}

/// What happens instead of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Instead {
    /// Nothing, until the other side closes.
    Hang,
    /// RST, after the whole request was read.
    Reset,
    /// FIN, after the whole request was read.
    Close,
    /// Bytes that are not HTTP, then FIN.
    Garbage,
}

/// A result code in a 200 whose rules were met. Only the forms of success assign the task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// This code, such as `0409001`.
    Failure(String),
    /// Success as `"resultCode": 0409000`, a slip of a vendor page; it is not JSON.
    Unquoted,
    /// Success as the number 409000.
    Numeric,
    /// Success, but no code is given (`resultCode` is not mandatory).
    Absent,
    /// Two `resultCode` members with these values.
    Two(String, String),
}

impl Code {
    pub(super) fn succeeds(&self) -> bool {
        matches!(self, Self::Unquoted | Self::Numeric | Self::Absent)
    }

    pub(super) fn reply(&self, success: &str) -> Reply {
        let quoted = |code: &str| Value::from(code).to_string();
        let codes = match self {
            Self::Failure(code) => {
                return Reply::text(
                    200,
                    &format!(r#"{{"resultCode":{},"resultDesc":"Operation failed."}}"#, quoted(code)),
                );
            }
            Self::Unquoted => format!(r#""resultCode": {success},"#),
            Self::Numeric => format!(r#""resultCode":{},"#, success.trim_start_matches('0')),
            Self::Absent => String::new(),
            Self::Two(one, two) => {
                format!(r#""resultCode":{},"resultCode":{},"#, quoted(one), quoted(two))
            }
        };
        Reply::text(200, &format!(r#"{{{codes}"resultDesc":"Operation successful."}}"#))
    }
}

/// How head and body are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Framing {
    /// Half of the head, then FIN.
    HalfHead,
    /// The head and half of the body that it announces, then FIN.
    HalfBody,
    /// The head and this many bytes of the body, then FIN.
    Cut(usize),
    /// `Transfer-Encoding: chunked`, in two chunks.
    Chunked,
    /// Byte by byte, this many milliseconds before each.
    #[serde(rename = "slow_body_ms")]
    SlowBody(u64),
}

/// What comes behind an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Then {
    /// `Connection: close` in the answer, and FIN.
    Close,
    /// FIN after this many idle milliseconds, though the answer promised to keep the connection. 0 = at once,
    /// unread bytes notwithstanding.
    #[serde(rename = "close_idle_ms")]
    CloseIdle(u64),
    /// These bytes, in the same write as the answer.
    Extra(String),
}

/// What a new token means for the older ones of the same app key. The vendor does not say; survive all three.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Habit {
    /// Each lives its own life.
    #[default]
    Independent,
    /// The same token comes back, with its first `CreateTime` and `Expires`, until it is over.
    SameUntilExpiry,
    /// A new one ends the older ones.
    LastWins,
}

/// The script and how far it got.
#[derive(Default)]
pub(super) struct Script {
    pub(super) faults: Faults,
    business: Progress,
    token: Progress,
    connections: Progress,
}

impl Script {
    pub(super) fn new(faults: Faults) -> Self {
        Self { faults, ..Self::default() }
    }

    /// The fault that this business call meets; the default fault changes nothing.
    pub(super) fn business(&mut self) -> Fault {
        next(&mut self.business, &self.faults.business).unwrap_or_default()
    }

    /// The same for a token call.
    pub(super) fn token(&mut self) -> Fault {
        next(&mut self.token, &self.faults.token).unwrap_or_default()
    }

    /// The same for a connection.
    pub(super) fn connection(&mut self) -> Option<ConnectionFault> {
        next(&mut self.connections, &self.faults.connections)
    }
}

#[derive(Default)]
struct Progress {
    calls: u64,
    used: Vec<u64>,
}

trait Due: Clone {
    fn after(&self) -> u64;
    fn times(&self) -> Option<u64>;
}

impl Due for Fault {
    fn after(&self) -> u64 {
        self.after
    }
    fn times(&self) -> Option<u64> {
        self.times
    }
}

impl Due for ConnectionFault {
    fn after(&self) -> u64 {
        self.after
    }
    fn times(&self) -> Option<u64> {
        self.times
    }
}

fn next<T: Due>(progress: &mut Progress, faults: &[T]) -> Option<T> {
    let call = progress.calls;
    progress.calls += 1;
    progress.used.resize(faults.len(), 0);
    let due = |(fault, used): &(&T, &mut u64)| {
        call >= fault.after() && fault.times().is_none_or(|times| **used < times)
    };
    let (fault, used) = faults.iter().zip(&mut progress.used).find(due)?;
    *used += 1;
    Some(fault.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statuses(document: &str, calls: usize) -> Vec<Option<u16>> {
        let mut script = Script::new(serde_json::from_str(document).unwrap());
        (0..calls).map(|_| script.business().status).collect()
    }

    #[test]
    fn faults_take_turns_and_end() {
        let document = r#"{"business":[{"times":2,"status":500},{"times":1,"status":502}]}"#;
        assert_eq!(statuses(document, 4), [Some(500), Some(500), Some(502), None]);
    }

    #[test]
    fn after_lets_calls_go_by() {
        let document = r#"{"business":[{"after":2,"times":1,"status":500}]}"#;
        assert_eq!(statuses(document, 4), [None, None, Some(500), None]);
    }

    #[test]
    fn unknown_keys_are_refused() {
        for document in [r#"{"bussiness":[]}"#, r#"{"token":[{"stauts":500}]}"#, r#"{"connections":[{}]}"#] {
            assert!(serde_json::from_str::<Faults>(document).is_err(), "{document}");
        }
    }

    #[test]
    fn faults_of_the_wrong_kind_are_refused() {
        for document in [
            r#"{"business":[{"prefixed":true}]}"#,
            r#"{"business":[{"skew_s":-5}]}"#,
            r#"{"token":[{"code":"numeric"}]}"#,
            r#"{"token":[{"status":100}]}"#,
            r#"{"business":[{"interim":200}]}"#,
        ] {
            assert!(serde_json::from_str::<Faults>(document).unwrap().validate().is_err(), "{document}");
        }
    }

    #[test]
    fn a_script_survives_its_own_json() {
        let document = r#"{"business":[{"times":1,"framing":{"slow_body_ms":5},"then":{"close_idle_ms":0},
            "code":{"two":["0409000","0409001"]},"headers":[["Server","x"]]}],"habit":"last_wins","lifetime_ms":6000}"#;
        let faults: Faults = serde_json::from_str(document).unwrap();
        let again: Faults = serde_json::from_str(&serde_json::to_string(&faults).unwrap()).unwrap();
        assert_eq!(format!("{faults:?}"), format!("{again:?}"));
        assert_eq!(again.business[0].framing, Some(Framing::SlowBody(5)));
    }
}
