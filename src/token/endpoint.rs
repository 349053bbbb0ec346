//! The client of the token endpoint: one call of tokenByAkSk (`POST …/apigovernance/api/oauth/tokenByAkSk`, vendor's page).
//!
//! A call sends a *pair*, an app key with its app secret. The endpoint does not follow RFC 6749, so no OAuth 2 client fits. Each
//! call has a connection of its own. A reply is read tolerantly, since the vendor's services differ in types and codes, but a
//! token is taken only if it is a bearer token by RFC 6750. Nothing is repeated here, and no redirect is followed: the fetching
//! task decides when to call again.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use thiserror::Error;
use tokio::time::{Instant, timeout_at};
use zeroize::Zeroizing;

use super::schedule::FetchFailure;
use crate::connect::{Connector, Egress, Stream, TlsError};
use crate::field_values::{is_coding, retry_after};
use crate::model::cause::Cause;
use crate::reason::Reason;
use crate::secret::Secret;
use crate::{config, connect};

/// The longest body of a reply that is read, in bytes.
const MAX_REPLY: usize = 64 * 1024;

/// The longest pause that a `Retry-After` can ask for.
// An endpoint that names an hour, perhaps by mistake, would otherwise stop all calls once the present token has expired.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// The lifetime of a token if neither the reply nor the configuration names a usable one: that of the vendor's example.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(600);

/// After this many replies in a row with status 200 and no token the pair counts as refused.
const ANSWERS_WITHOUT_TOKEN: u32 = 3;

/// The authentication scheme and its blank. Schemes are case-insensitive (RFC 9110, section 11.1).
pub(super) const SCHEME: &str = "Bearer ";

/// Why a call brought no token. The text quotes nothing of the reply's body but an error code.
#[derive(Debug, Error)]
pub(super) enum FetchError {
    /// The endpoint refuses the pair by its status.
    #[error("the endpoint refuses the credential with status {0}")]
    Refused(StatusCode),
    /// The endpoint refuses the pair by replying with 200 and no token again and again.
    #[error(
        "the endpoint refuses the credential: {ANSWERS_WITHOUT_TOKEN} answers in a row have status 200 and no usable token; {0}"
    )]
    RefusedWithoutToken(NoToken),
    /// A status other than 200 that does not refuse the pair, and the pause that the endpoint named, if it did.
    #[error("status {0}")]
    Status(StatusCode, Option<Duration>),
    /// A 200 whose body is a JSON object without a usable token.
    #[error("the reply holds no usable token: {0}")]
    NoToken(NoToken),
    /// A 200 whose body is not a JSON object, or is too long.
    #[error("the reply holds no usable token: {0}")]
    Invalid(&'static str),
    /// A 200 with a content coding, though the request accepts none.
    #[error("the reply has the content coding {0:?}, but none was requested")]
    Coded(HeaderValue),
    /// There was no connection, or it broke.
    #[error("{0}")]
    Broken(Reason),
    /// There was no whole reply within `token.timeout`.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

/// Why a JSON object brings no usable token.
#[derive(Debug)]
pub(super) struct NoToken {
    what: &'static str,
    /// The error code in it, as the endpoint wrote it: only [`crate::reason::shown`] may put it into a log line.
    code: Option<String>,
}

impl fmt::Display for NoToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what)?;
        self.code.as_ref().map_or(Ok(()), |code| write!(f, "; its code is {code}"))
    }
}

impl From<Reason> for FetchError {
    fn from(reason: Reason) -> Self {
        Self::Broken(reason)
    }
}

impl From<hyper::Error> for FetchError {
    fn from(error: hyper::Error) -> Self {
        Self::Broken(Reason::of_exchange(&error))
    }
}

impl FetchError {
    /// Returns the cause and the text.
    pub(super) fn reason(&self) -> Reason {
        let cause = match self {
            Self::Refused(_) | Self::RefusedWithoutToken(_) => Cause::TokenRefused,
            Self::Status(..) => Cause::TokenStatus,
            Self::NoToken(_) | Self::Invalid(_) | Self::Coded(_) => Cause::TokenUnreadable,
            Self::Broken(reason) => return reason.clone(),
            Self::Timeout(_) => Cause::Timeout,
        };
        Reason::new(cause, self)
    }

    /// Returns what this failure means for the next call.
    pub(super) fn failure(&self) -> FetchFailure {
        match self {
            Self::Refused(_) | Self::RefusedWithoutToken(_) => FetchFailure::Refused,
            Self::Status(_, Some(wait)) => FetchFailure::NotBefore(*wait),
            Self::Status(_, None)
            | Self::NoToken(_)
            | Self::Invalid(_)
            | Self::Coded(_)
            | Self::Broken(_)
            | Self::Timeout(_) => FetchFailure::Passing,
        }
    }
}

/// A token as the endpoint issued it.
pub(super) struct Fetched {
    /// `Bearer` and the token, marked sensitive.
    pub(super) authorization: HeaderValue,
    /// The lifetime of the token, counted from when the request was sent.
    pub(super) lifetime: Duration,
    /// The endpoint's clock minus ours, in seconds.
    pub(super) skew: Option<i64>,
}

/// Counts the replies in a row with status 200 and no token. Some services report a wrong secret in this way.
// Without the count such a reply was a passing fault, and a wrong secret was sent ten times in fifteen seconds.
#[derive(Debug, Default)]
pub(super) struct WithoutToken(u32);

impl WithoutToken {
    /// Takes the result of one call with the pair, and returns it. From the third reply in a row with status 200 and no token
    /// on, such a reply is returned as a refusal of the pair.
    pub(super) fn on_result(&mut self, fetched: Result<Fetched, FetchError>) -> Result<Fetched, FetchError> {
        // Any other failure ends the row, even a page of HTML: a proxy may have written it, which knows nothing of the pair.
        let Err(FetchError::NoToken(why)) = fetched else {
            self.0 = 0;
            return fetched;
        };
        self.0 = self.0.saturating_add(1);
        Err(if self.0 < ANSWERS_WITHOUT_TOKEN {
            FetchError::NoToken(why)
        } else {
            FetchError::RefusedWithoutToken(why)
        })
    }
}

/// The token endpoint of the configuration.
#[derive(Debug)]
pub(super) struct Endpoint {
    connector: Connector,
    target: Uri,
    host: HeaderValue,
    /// The lifetime to ask for with `x-token-expire`; `None` asks for none.
    lifetime: Option<Duration>,
    /// The time limit of a whole call, connecting included.
    timeout: Duration,
}

/// A reply with a token. Its numbers are strings on the vendor's page.
#[derive(Deserialize)]
struct Reply {
    #[serde(rename = "AccessToken")]
    token: Option<Zeroizing<String>>,
    #[serde(rename = "Expires")]
    expires: Option<serde_json::Value>,
    #[serde(rename = "CreateTime")]
    created: Option<serde_json::Value>,
}

/// A reply without a token. No error body is documented; these are the names that the vendor's services use for a code.
#[derive(Deserialize)]
struct ErrorReply {
    #[serde(rename = "resultCode")]
    result_code: Option<serde_json::Value>,
    error_code: Option<serde_json::Value>,
    #[serde(rename = "errorCode")]
    camel_code: Option<serde_json::Value>,
    code: Option<serde_json::Value>,
    error: Option<serde_json::Value>,
}

impl Endpoint {
    /// Prepares calls of the configured endpoint. Fails if its host is not a server name.
    #[expect(clippy::expect_used, reason = "validation allows host names and plain paths only")]
    pub(super) fn new(token: &config::Token, egress: &Egress) -> Result<Self, TlsError> {
        Ok(Self {
            connector: Connector::new(&token.url, egress, token.timeout)?,
            target: token.url.path.parse().expect("a validated path"),
            host: HeaderValue::from_str(&token.url.authority()).expect("a validated host"),
            lifetime: token.lifetime,
            timeout: token.timeout,
        })
    }

    /// Makes one call on a connection of its own, within `token.timeout`.
    pub(super) async fn fetch(&self, app_key: &Secret, app_secret: &Secret) -> Result<Fetched, FetchError> {
        let end = Instant::now() + self.timeout;
        let request = self.request(app_key, app_secret)?;
        // Outside of `timeout_at`: the connector has the same limit. Of two timers that end together either could be the first,
        // and only the connector's says which step took too long.
        let stream = self.connector.connect().await?;
        let called = timeout_at(end, self.call(stream, request)).await;
        called.unwrap_or(Err(FetchError::Timeout(self.timeout)))
    }

    /// Sends the request and reads the reply.
    async fn call(&self, stream: Stream, request: Request<Full<Bytes>>) -> Result<Fetched, FetchError> {
        let (mut sender, connection) = connect::http1().handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        let result = async {
            let (head, body) = sender.send_request(request).await?.into_parts();
            check_status(&head)?;
            let body = Limited::new(body, MAX_REPLY).collect().await.map_err(|error| {
                match error.downcast::<hyper::Error>() {
                    Ok(error) => FetchError::from(*error),
                    Err(_) => FetchError::Invalid("it is longer than 64 KiB"),
                }
            })?;
            let body = body.to_bytes();
            // Checked after the status, which says more: a 403 with a coding is still a refusal.
            match head.headers.get(header::CONTENT_ENCODING).filter(|value| is_coding(value)) {
                Some(coding) => Err(FetchError::Coded(coding.clone())),
                None => self.read(&body),
            }
        }
        .await;
        // Closes the connection. hyper would keep it open for a next request, which never comes: fetches are minutes apart.
        driver.abort();
        result
    }

    /// Builds the request. Its body holds the pair.
    fn request(&self, app_key: &Secret, app_secret: &Secret) -> Result<Request<Full<Bytes>>, FetchError> {
        // Written by hand: a `serde_json::Value` would hold copies of the secret that nothing overwrites.
        let text = |secret: &Secret| {
            let text = std::str::from_utf8(secret.expose()).map_err(|_| FetchError::Invalid("not UTF-8"))?;
            serde_json::to_string(text).map(Zeroizing::new).map_err(|_| FetchError::Invalid("not text"))
        };
        let (key, secret) = (text(app_key)?, text(app_secret)?);
        // `Zeroed` overwrites the body when hyper drops it.
        // tests/hyper.rs: hyper_drops_a_request_body_once_it_is_written
        let body = format!(r#"{{"app_key":{},"app_secret":{}}}"#, *key, *secret);
        let body = Bytes::from_owner(Zeroed(Zeroizing::new(body.into_bytes())));
        let mut request = Request::post(self.target.clone())
            .header(header::HOST, self.host.clone())
            .header(header::CONTENT_TYPE, "application/json; charset=UTF-8")
            .header(header::CONTENT_LENGTH, body.len())
            .header(header::ACCEPT, "*/*")
            // Without this field a server may choose any coding (RFC 9110, section 12.5.3), and a gzip reply was not readable.
            .header(header::ACCEPT_ENCODING, "identity")
            .header(header::USER_AGENT, concat!("ccsqm-gateway/", env!("CARGO_PKG_VERSION")));
        if let Some(lifetime) = self.lifetime {
            request = request.header("x-token-expire", lifetime.as_secs());
        }
        request.body(Full::new(body)).map_err(|_| FetchError::Invalid("no request can be made"))
    }

    /// Reads the body of a reply with status 200.
    fn read(&self, body: &[u8]) -> Result<Fetched, FetchError> {
        let Ok(reply) = serde_json::from_slice::<Reply>(body) else {
            return Err(no_token(body, "its AccessToken is not a string, or occurs twice"));
        };
        let token = reply.token.unwrap_or_default();
        let token = bare(&token);
        if token.is_empty() {
            return Err(no_token(body, "it has no AccessToken"));
        }
        if !is_bearer_token(token) {
            return Err(no_token(body, "its AccessToken is not valid by RFC 6750, section 2.1"));
        }
        let value = Zeroizing::new(format!("{SCHEME}{token}"));
        let mut authorization =
            HeaderValue::from_str(&value).map_err(|_| FetchError::Invalid("not a header value"))?;
        authorization.set_sensitive(true);
        // The configured lifetime was only asked for. If the reply does not confirm it, assuming an hour could use an expired
        // token.
        let fallback = self.lifetime.unwrap_or(DEFAULT_LIFETIME).min(DEFAULT_LIFETIME);
        // A day at most: beyond that a number is taken for a mistake, such as milliseconds.
        let lifetime =
            reply.expires.as_ref().and_then(integer).filter(|seconds| (1..=86_400).contains(seconds));
        let lifetime = lifetime.map_or(fallback, |seconds| Duration::from_secs(seconds.unsigned_abs()));
        let skew = reply.created.as_ref().and_then(integer).map(|created| created.saturating_sub(now()));
        Ok(Fetched { authorization, lifetime, skew })
    }
}

/// Returns the error for a reply without a token: [`FetchError::NoToken`] if the body is a JSON object, else
/// [`FetchError::Invalid`].
#[cold]
fn no_token(body: &[u8], what: &'static str) -> FetchError {
    // serde also reads a list as a structure, so the first byte is checked.
    if !body.trim_ascii_start().starts_with(b"{") {
        return FetchError::Invalid("not the JSON that is documented");
    }
    let Ok(reply) = serde_json::from_slice::<ErrorReply>(body) else {
        return FetchError::Invalid("not the JSON that is documented");
    };
    let ErrorReply { result_code, error_code, camel_code, code, error } = reply;
    let codes = [result_code, error_code, camel_code, code, error].into_iter().flatten();
    let code = codes.into_iter().find_map(|code| match code {
        serde_json::Value::String(code) => Some(code),
        serde_json::Value::Number(code) => Some(code.to_string()),
        _ => None,
    });
    FetchError::NoToken(NoToken { what, code })
}

/// Returns a token without the scheme.
// A sibling product of the vendor returns its tokens with `Bearer` before them, which must not be sent twice.
fn bare(token: &str) -> &str {
    let token = token.trim();
    match token.split_at_checked(SCHEME.len()) {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case(SCHEME) => rest.trim_start(),
        // The trim above has removed the blank after a scheme without a token.
        _ if token.eq_ignore_ascii_case(SCHEME.trim_end()) => "",
        _ => token,
    }
}

/// Whether a token is a `b64token` (RFC 6750, section 2.1).
// Another character may have a meaning in a header: a comma or a blank would begin something else for the upstream.
fn is_bearer_token(token: &str) -> bool {
    let text = token.trim_end_matches('=');
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~+/".contains(&byte))
}

/// A buffer that [`Bytes`] can own and that is overwritten on drop.
struct Zeroed(Zeroizing<Vec<u8>>);

impl AsRef<[u8]> for Zeroed {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Returns `Ok` for status 200, else an error that says what the status means for the next call.
fn check_status(head: &http::response::Parts) -> Result<(), FetchError> {
    match head.status.as_u16() {
        200 => Ok(()),
        // The vendor documents no error body. 403 was seen for a wrong key, and may mean an address that is not on the allow
        // list; 418 comes from the vendor's web firewall. Another call soon would not help, and a sibling API locks an address
        // out after many bad ones.
        400 | 401 | 403 | 418 => Err(FetchError::Refused(head.status)),
        _ => {
            // `Retry-After: 0` counts as absent: the back-off treats a server that has trouble more gently.
            let wait = retry_after(&head.headers).filter(|wait| !wait.is_zero());
            Err(FetchError::Status(head.status, wait.map(|wait| wait.min(MAX_WAIT))))
        }
    }
}

/// Returns a number, or a string that holds one, as an integer. A fraction is rounded down, so that a life never gets longer.
fn integer(value: &serde_json::Value) -> Option<i64> {
    /// From here on a floating-point number cannot represent every integer.
    const MOST: f64 = (1_u64 << 53) as f64;
    let text = value.as_str().map(str::trim);
    let whole = value.as_i64().or_else(|| text?.parse().ok());
    let rounded = || {
        let number = value.as_f64().or_else(|| text?.parse().ok())?.floor();
        (number.abs() < MOST).then_some(number as i64)
    };
    whole.or_else(rounded)
}

fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::token::tests::configured;

    fn read(lifetime: Option<u64>, reply: &Value) -> Result<Fetched, FetchError> {
        read_text(lifetime, &reply.to_string())
    }

    fn read_text(lifetime: Option<u64>, reply: &str) -> Result<Fetched, FetchError> {
        let address = "127.0.0.1:1".parse().unwrap();
        let token = config::Token { lifetime: lifetime.map(Duration::from_secs), ..configured(address) };
        Endpoint::new(&token, &Egress::plain()).unwrap().read(reply.as_bytes())
    }

    #[test]
    fn invalid_lifetime_falls_back_to_at_most_ten_minutes() {
        for (expires, stated) in [
            (json!("7200"), Some(7200)),
            (json!(7200), Some(7200)),
            (json!(" 7200 "), Some(7200)),
            (json!(1), Some(1)),
            (json!("86400"), Some(86_400)),
            (json!(86_401), None),
            (json!(0), None),
            (json!("0"), None),
            (json!(-1), None),
            (json!("-600"), None),
            (json!(1_000_000_000), None),
            (json!("1000000000"), None),
            (json!("99999999999999999999"), None),
            (json!("abc"), None),
            (json!(""), None),
            // A fraction once counted as no number, so that a token of 4.5 s was used for 600 s.
            (json!("4.5"), Some(4)),
            (json!(" 4.5 "), Some(4)),
            (json!(4.5), Some(4)),
            (json!("1.999"), Some(1)),
            (json!("86400.9"), Some(86_400)),
            (json!("86401.0"), None),
            (json!("0.9"), None),
            (json!("-0.5"), None),
            (json!("4,5"), None),
            (json!("4.5s"), None),
            // Values that Rust reads as floating-point numbers, but that are no lifetimes.
            (json!("NaN"), None),
            (json!("inf"), None),
            (json!(1e300), None),
            (json!("1e300"), None),
            (json!(true), None),
            (json!([600]), None),
            (Value::Null, None),
        ] {
            // Below, above and without a configured lifetime: the fallback is the smaller of it and ten minutes.
            for (configured, fallback) in [(Some(60), 60), (Some(3600), 600), (None, 600)] {
                let fetched = read(configured, &json!({ "AccessToken": "t", "Expires": expires }));
                let lifetime = Duration::from_secs(stated.unwrap_or(fallback));
                assert_eq!(fetched.unwrap().lifetime, lifetime, "{expires} {configured:?}");
            }
        }
        assert_eq!(read(Some(60), &json!({ "AccessToken": "t" })).unwrap().lifetime.as_secs(), 60);
    }

    #[test]
    fn reply_without_a_usable_token_is_a_failure() {
        assert!(read(None, &json!({ "AccessToken": "t" })).is_ok(), "the control");
        for reply in [
            json!({}),
            json!({ "Expires": "600" }),
            json!({ "AccessToken": null }),
            json!({ "AccessToken": "" }),
            json!({ "AccessToken": " " }),
            json!({ "AccessToken": "Bearer" }),
            json!({ "AccessToken": "Bearer  " }),
            json!({ "AccessToken": 7 }),
        ] {
            assert!(matches!(read(None, &reply), Err(FetchError::NoToken(_))), "{reply}");
        }
        // No object: this may come from something between the gateway and the endpoint, and says nothing of the pair.
        for reply in [json!(["AccessToken", "t"]), json!([7, 600, 0]), json!("t"), json!(null)] {
            assert!(matches!(read(None, &reply), Err(FetchError::Invalid(_))), "{reply}");
        }
    }

    #[test]
    fn token_has_only_the_characters_of_rfc_6750() {
        for token in ["t", "AZaz09-._~+/", "YQ==", "a=", "Bearer YQ=="] {
            assert!(read(None, &json!({ "AccessToken": token })).is_ok(), "{token}");
        }
        for token in [
            "tökén",
            "a b",
            "Bearer a b",
            "a\tb",
            "a\r\nb",
            "a\0b",
            "a\"b",
            "a,b",
            "a;b",
            "a:b",
            "a=b",
            "=",
            "\u{7f}a",
        ] {
            let read = read(None, &json!({ "AccessToken": token }));
            let Err(error @ FetchError::NoToken(_)) = read else { panic!("{token}") };
            // The text goes to the log, which must not hold what may be a token in a wrong form.
            assert!(!error.to_string().contains(token), "{error}");
        }
    }

    #[test]
    fn token_that_is_repeated_or_not_a_string_is_reported() {
        assert!(read_text(None, r#"{"AccessToken":"t"}"#).is_ok(), "the control");
        for reply in [r#"{"AccessToken":7}"#, r#"{"AccessToken":"t","AccessToken":"t"}"#] {
            let error = read_text(None, reply).err().unwrap().to_string();
            assert!(error.contains("its AccessToken is not a string, or occurs twice"), "{reply}: {error}");
        }
    }

    #[test]
    fn third_reply_in_a_row_without_a_token_is_a_refusal() {
        let mut answers = WithoutToken::default();
        let mut on_result =
            |reply: Value| answers.on_result(read(None, &reply)).map_err(|error| error.reason().cause);
        let (bad, good) = (json!({ "resultCode": "1" }), json!({ "AccessToken": "t" }));
        // Twice, since a token in between must begin the count anew.
        for _ in 0..2 {
            for cause in
                [Cause::TokenUnreadable, Cause::TokenUnreadable, Cause::TokenRefused, Cause::TokenRefused]
            {
                assert_eq!(on_result(bad.clone()).err(), Some(cause));
            }
            assert!(on_result(good.clone()).is_ok());
        }
        for _ in 0..9 {
            assert_eq!(
                on_result(json!("a page of something that stands between")).err(),
                Some(Cause::TokenUnreadable)
            );
        }
        assert_eq!(on_result(bad).err(), Some(Cause::TokenUnreadable));
    }

    #[test]
    fn error_code_of_a_reply_without_a_token_is_reported() {
        for (reply, code) in [
            (json!({ "resultCode": "1007", "resultDesc": "wrong secret" }), Some("1007")),
            (json!({ "error_code": "APIG.0301", "error_msg": "x" }), Some("APIG.0301")),
            (json!({ "errorCode": 7 }), Some("7")),
            (json!({ "code": "a b", "AccessToken": "" }), Some("a b")),
            (json!({ "error": "invalid_client", "AccessToken": 7 }), Some("invalid_client")),
            (json!({ "error": { "code": "x" } }), None),
            (json!({}), None),
        ] {
            let error = read(None, &reply).err().unwrap().to_string();
            assert_eq!(error.split_once("; its code is ").map(|(_, code)| code), code, "{error}");
        }
    }

    #[test]
    fn authorization_has_one_scheme_and_is_marked_sensitive() {
        for token in ["t-1", "Bearer t-1", "bearer t-1", " Bearer  t-1 "] {
            let fetched = read(None, &json!({ "AccessToken": token })).unwrap();
            assert_eq!(fetched.authorization, "Bearer t-1", "{token}");
            assert!(fetched.authorization.is_sensitive());
        }
    }

    #[test]
    fn creation_time_only_determines_the_clock_skew() {
        for (created, skew) in [(json!(now() + 3600), 3600), (json!((now() - 90).to_string()), -90)] {
            let reply = json!({ "AccessToken": "t", "Expires": 60, "CreateTime": created });
            let fetched = read(None, &reply).unwrap();
            assert!(fetched.skew.unwrap().abs_diff(skew) <= 2, "{:?}", fetched.skew);
            assert_eq!(fetched.lifetime, Duration::from_secs(60));
        }
        for created in [json!("yesterday"), Value::Null] {
            let reply = json!({ "AccessToken": "t", "CreateTime": created });
            assert_eq!(read(None, &reply).unwrap().skew, None);
        }
        // The difference to now does not fit an i64: the subtraction overflowed here once.
        let reply = json!({ "AccessToken": "t", "Expires": 60, "CreateTime": i64::MIN });
        assert_eq!(read(None, &reply).unwrap().skew, Some(i64::MIN), "absurd, and no overflow");
    }

    #[test]
    fn statuses_separate_refused_pairs_from_transient_failures() {
        let failure = |status: u16, retry_after: Option<&str>| {
            let mut response = http::Response::builder().status(status);
            if let Some(value) = retry_after {
                response = response.header(header::RETRY_AFTER, value);
            }
            let (head, ()) = response.body(()).unwrap().into_parts();
            check_status(&head).map_err(|error| error.failure())
        };
        let wait = |seconds| Err(FetchFailure::NotBefore(Duration::from_secs(seconds)));
        assert_eq!(failure(200, None), Ok(()), "the control");
        // A refusal has its own, longer pause, whatever `Retry-After` says.
        for status in [400, 401, 403, 418] {
            assert_eq!(failure(status, Some("5")), Err(FetchFailure::Refused), "{status}");
        }
        for status in [201, 204, 302, 404, 408, 429, 500, 502, 503, 504] {
            assert_eq!(failure(status, None), Err(FetchFailure::Passing), "{status}");
        }
        for (status, value, failed) in [
            (429, "5", wait(5)),
            (503, "60", wait(60)),
            (503, "61", wait(60)),
            (503, "86400", wait(60)),
            (503, "0", Err(FetchFailure::Passing)),
            (503, "-1", Err(FetchFailure::Passing)),
            (503, "soon", Err(FetchFailure::Passing)),
            // Dates (RFC 9110, section 10.2.3): one that is past is 0. The obsolete form with two digits of the year means 1994.
            (503, "Wed, 21 Oct 2015 07:28:00 GMT", Err(FetchFailure::Passing)),
            (503, "Sat, 06 Nov 2094 08:49:37 GMT", wait(60)),
            (503, "Sunday, 06-Nov-94 08:49:37 GMT", Err(FetchFailure::Passing)),
        ] {
            assert_eq!(failure(status, Some(value)), failed, "{status} {value}");
        }
    }
}
