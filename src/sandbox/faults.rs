//! Fault injection: the script, which is a JSON document, and the counters that decide which fault applies to which call.
//!
//! The document has a list for business calls, one for token calls and one for connections. To each call the **first** entry
//! that is due applies, and no other. An entry is due from call `after` on (counted from the moment the script was set) and for
//! `times` calls; without `times`, always. So `[{"times":1,"status":500},{"times":1,"instead":"reset"}]` means: one 500, one
//! reset, then the real answers again.
//!
//! Values are sent as they are given. A header value with a line break is a response splitting attack, which a test may want.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::http::Reply;

/// The whole script. The default has no faults.
// Unknown keys are refused: a fault with a misspelt key would not happen, and its test would pass without it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Faults {
    /// The faults of every request that is neither a token call nor a control call.
    pub business: Vec<Fault>,
    /// The faults of calls of the token endpoint.
    pub token: Vec<Fault>,
    /// The faults of accepted connections of the first listener, before TLS and before a byte is read.
    pub connections: Vec<ConnectionFault>,
    /// Whether the first listener refuses connections; its open ones are closed.
    pub down: bool,
    /// Whether the token listener refuses connections; needs `Options::token_listener`.
    pub token_down: bool,
    /// What happens to older tokens when a new one is issued.
    pub habit: Habit,
    /// The true lifetime of tokens issued from now on, in milliseconds, instead of the requested one. The
    /// reply states whole seconds, at least 1.
    pub lifetime_ms: Option<u64>,
}

impl Faults {
    /// Returns a script with one fault of business calls, or several: `Faults::business([first, second])`.
    pub fn business(faults: impl Into<Vec<Fault>>) -> Self {
        Self { business: faults.into(), ..Self::default() }
    }

    /// Returns a script with one fault of token calls, or several.
    pub fn token(faults: impl Into<Vec<Fault>>) -> Self {
        Self { token: faults.into(), ..Self::default() }
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

    /// Whether no control call over the first listener could end this script.
    pub(super) fn locks_out(&self) -> bool {
        self.down || self.connections.iter().any(|fault| fault.times.is_none())
    }
}

/// One fault of a call. Its fields combine: the content of the answer (`status` … `size`), how it is sent (`delay_ms`,
/// `interim`, `framing`), and what follows (`then`). `instead` overrides all of them but `delay_ms`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fault {
    /// The number of calls to which it applies; without it, all.
    pub times: Option<u64>,
    /// The number of calls that pass before the first one to which it applies.
    pub after: u64,
    /// The time between the decision and the first byte of the answer, in milliseconds.
    // The decision comes first: a call whose answer is late has assigned its task, which is the case that loses an outcome.
    pub delay_ms: u64,
    /// What happens instead of an HTTP answer.
    pub instead: Option<Instead>,
    /// The status of a reply that replaces the real one, with a small JSON body unless `body` is given. 200 to 999.
    pub status: Option<u16>,
    /// The body of a reply that replaces the real one, with status 200 unless `status` is given.
    pub body: Option<String>,
    /// The content type of the reply; if it is empty, the reply has none.
    pub content_type: Option<String>,
    /// More reply headers, in order: `[["Retry-After","5"]]`. A `Content-Encoding` here does not encode the body.
    pub headers: Vec<(String, String)>,
    /// The result code of a call that would have succeeded.
    pub code: Option<Code>,
    /// Members that are set in a reply that is a JSON object: `{"Expires": 600}`.
    pub with: Map<String, Value>,
    /// Members that are left out of a reply that is a JSON object: `["AccessToken"]`.
    pub without: Vec<String>,
    /// Token calls only: `AccessToken` begins with `Bearer `.
    pub prefixed: bool,
    /// Token calls only: the seconds that are added to `CreateTime`.
    pub skew_s: i64,
    /// The size in bytes to which the body is padded.
    pub size: Option<usize>,
    /// The status of an interim reply (1xx) before the real one.
    pub interim: Option<u16>,
    /// How head and body are sent, if not at once and whole.
    pub framing: Option<Framing>,
    /// What follows the reply.
    pub then: Option<Then>,
}

impl Fault {
    /// Returns a fault that answers with this status.
    pub fn status(status: u16) -> Self {
        Self { status: Some(status), ..Self::default() }
    }

    /// Returns a fault that answers 200 with this body.
    pub fn body(body: impl Into<String>) -> Self {
        Self { body: Some(body.into()), ..Self::default() }
    }

    /// Returns a fault that does this instead of answering.
    pub fn instead(instead: Instead) -> Self {
        Self { instead: Some(instead), ..Self::default() }
    }

    /// Returns a fault that answers with this result code.
    pub fn code(code: Code) -> Self {
        Self { code: Some(code), ..Self::default() }
    }

    /// Returns a fault that answers with this failure code.
    pub fn failure(code: impl Into<String>) -> Self {
        Self::code(Code::Failure(code.into()))
    }

    /// Returns a fault that sends the real answer in this way.
    pub fn framing(framing: Framing) -> Self {
        Self { framing: Some(framing), ..Self::default() }
    }

    /// Returns a fault that sends the real answer, then does this.
    pub fn then(then: Then) -> Self {
        Self { then: Some(then), ..Self::default() }
    }

    /// Returns a fault that sends the real answer after this many milliseconds.
    pub fn delayed(delay_ms: u64) -> Self {
        Self { delay_ms, ..Self::default() }
    }

    /// Returns a fault that pads the body of the real answer to this many bytes.
    pub fn sized(size: usize) -> Self {
        Self { size: Some(size), ..Self::default() }
    }

    /// Replaces the body of the answer.
    #[must_use]
    pub fn with_body(self, body: impl Into<String>) -> Self {
        Self { body: Some(body.into()), ..self }
    }

    /// Adds a header to the answer.
    #[must_use]
    pub fn with_header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Lets this many calls pass first.
    #[must_use]
    pub fn after(self, after: u64) -> Self {
        Self { after, ..self }
    }

    /// Limits the fault to this many calls.
    #[must_use]
    pub fn times(self, times: u64) -> Self {
        Self { times: Some(times), ..self }
    }

    pub(super) fn delay(&self) -> Duration {
        Duration::from_millis(self.delay_ms)
    }

    /// Returns the scripted answer, if a status or a body is scripted. The call's rules are not checked then.
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

    /// Applies the scripted members, size and headers to an answer.
    pub(super) fn shape(&self, mut reply: Reply) -> Reply {
        // The members come before the padding, since they change the size of the body.
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
        // A final status below 200 would be an interim reply, and the client would wait for another one: see `interim`.
        if self.status.is_some_and(|status| !(200..=999).contains(&status)) {
            return Err("`status` must be 200 to 999".to_owned());
        }
        if self.interim.is_some_and(|status| !(100..=199).contains(&status)) {
            return Err("`interim` must be 100 to 199".to_owned());
        }
        Ok(())
    }
}

// A script of one fault needs no brackets then.
impl From<Fault> for Vec<Fault> {
    fn from(fault: Fault) -> Self {
        vec![fault]
    }
}

/// One fault of a connection, which happens when it is accepted.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectionFault {
    /// The number of connections to which it applies; without it, all.
    #[serde(default)]
    pub times: Option<u64>,
    /// The number of connections that pass before the first one to which it applies.
    #[serde(default)]
    pub after: u64,
    /// The time before it happens, in milliseconds.
    #[serde(default)]
    pub delay_ms: u64,
    /// What happens. `Hang` on a TLS listener is a handshake that never ends.
    pub instead: Instead,
}

/// What happens instead of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Instead {
    /// Nothing is sent until the client closes the connection.
    Hang,
    /// The connection is reset (RST), after the whole request was read.
    Reset,
    /// The connection is closed (FIN), after the whole request was read.
    Close,
    /// Bytes that are not HTTP are sent, then FIN.
    Garbage,
}

/// The form of the result code in a 200 for a call that meets the rules. Only the forms of success assign the task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// A failure with this code, such as `0409001`.
    Failure(String),
    /// Success as `"resultCode": 0409000`, a slip of a vendor page; it is not JSON.
    Unquoted,
    /// Success as the number 409000.
    Numeric,
    /// Success without a code (`resultCode` is not mandatory).
    Absent,
    /// Two `resultCode` members with these values, which assign nothing.
    // Parsers differ on which of the two counts, so the outcome of such a reply must be unknown.
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

/// How head and body of a reply are sent.
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
    /// Byte by byte, with a pause of so many milliseconds before each.
    #[serde(rename = "slow_body_ms")]
    SlowBody(u64),
}

/// What follows a reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Then {
    /// `Connection: close` in the answer, and FIN.
    Close,
    /// FIN after so many idle milliseconds, though the reply promised to keep the connection open. 0 is at once, even if another
    /// request has arrived.
    #[serde(rename = "close_idle_ms")]
    CloseIdle(u64),
    /// These bytes, in the same write as the reply.
    Extra(String),
}

/// What a new token means for the older ones of the same app key.
// The vendor's pages do not say, so the gateway must work with each of the three.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Habit {
    /// Each token is valid until its own end.
    #[default]
    Independent,
    /// The same token is issued again, with its first `CreateTime` and `Expires`, until it has expired.
    SameUntilExpiry,
    /// A new token invalidates the older ones.
    LastWins,
}

/// The script, and how often each of its faults has applied.
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

    /// Returns the fault of the next business call, and counts the call. The default fault changes nothing.
    pub(super) fn business(&mut self) -> Fault {
        next(&mut self.business, &self.faults.business).unwrap_or_default()
    }

    /// Returns the fault of the next token call, and counts the call.
    pub(super) fn token(&mut self) -> Fault {
        next(&mut self.token, &self.faults.token).unwrap_or_default()
    }

    /// Returns the fault of the next connection, and counts the connection.
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

/// Counts a call and returns the fault that applies to it.
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
    fn faults_apply_in_turn_and_end() {
        let document = r#"{"business":[{"times":2,"status":500},{"times":1,"status":502}]}"#;
        assert_eq!(statuses(document, 4), [Some(500), Some(500), Some(502), None]);
    }

    #[test]
    fn after_skips_the_given_number_of_calls() {
        let document = r#"{"business":[{"after":2,"times":1,"status":500}]}"#;
        assert_eq!(statuses(document, 4), [None, None, Some(500), None]);
    }

    #[test]
    fn unknown_fault_keys_are_rejected() {
        for document in [r#"{"bussiness":[]}"#, r#"{"token":[{"stauts":500}]}"#, r#"{"connections":[{}]}"#] {
            assert!(serde_json::from_str::<Faults>(document).is_err(), "{document}");
        }
    }

    #[test]
    fn faults_of_the_wrong_kind_are_rejected() {
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
    fn fault_script_round_trips_through_json() {
        let document = r#"{"business":[{"times":1,"framing":{"slow_body_ms":5},"then":{"close_idle_ms":0},
            "code":{"two":["0409000","0409001"]},"headers":[["Server","x"]]}],"habit":"last_wins","lifetime_ms":6000}"#;
        let faults: Faults = serde_json::from_str(document).unwrap();
        let again: Faults = serde_json::from_str(&serde_json::to_string(&faults).unwrap()).unwrap();
        assert_eq!(format!("{faults:?}"), format!("{again:?}"));
        assert_eq!(again.business[0].framing, Some(Framing::SlowBody(5)));
    }
}
