//! Headers of the upstream request, and the headers of its reply that reach the caller: two allow-lists.
//!
//! Guarantees that of a caller's head only the operator is sent to the upstream, and that no header of a reply which
//! contains a secret reaches a caller. Does not decide what a reply means.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use smallvec::SmallVec;

use crate::token::Token;

const X_APP_KEY: HeaderName = HeaderName::from_static("x-app-key");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const UPSTREAM_REQUEST_ID: HeaderName = HeaderName::from_static("x-gateway-upstream-request-id");
// Lower case, as all names of the `http` crate. Field names are compared without case (RFC 9110 §5.1).
const X_USER_ID: HeaderName = HeaderName::from_static("x-userid");
const JSON: HeaderValue = HeaderValue::from_static("application/json; charset=UTF-8");
const ANY: HeaderValue = HeaderValue::from_static("*/*");
// A coded body cannot be read for its result code, nor searched for secrets.
const IDENTITY: HeaderValue = HeaderValue::from_static("identity");
const USER_AGENT: HeaderValue =
    HeaderValue::from_static(concat!("ccsqm-gateway/", env!("CARGO_PKG_VERSION")));

/// The headers that all upstream requests share, made once for a configuration.
#[derive(Clone, Debug)]
pub struct Outbound(HeaderMap);

impl Outbound {
    /// Makes the shared headers. `authority` is the upstream's host, with its port unless that is the scheme's default.
    /// `configured` are the static headers of the configuration.
    pub fn new(authority: HeaderValue, configured: &HeaderMap) -> Self {
        let mut headers = HeaderMap::with_capacity(16);
        headers.insert(header::HOST, authority);
        headers.insert(header::CONTENT_TYPE, JSON);
        headers.insert(header::ACCEPT, ANY);
        headers.insert(header::ACCEPT_ENCODING, IDENTITY);
        headers.insert(header::USER_AGENT, USER_AGENT);
        // These replace none of the headers above: the configuration refuses such names.
        for (name, value) in configured {
            let mut value = value.clone();
            // Only the upstream needs to know it. A sensitive value is masked in debug output, and HTTP/2 keeps it
            // out of the table by which headers are compressed.
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        // Room for what each request fills in, so that no copy of the map has to grow, and so that the headers stay
        // in this order.
        let later = HeaderValue::from_static("");
        for name in [header::AUTHORIZATION, X_APP_KEY, X_USER_ID, header::CONTENT_LENGTH] {
            headers.insert(name, later.clone());
        }
        Self(headers)
    }

    /// Returns the headers of one upstream request. `length` is the length of its body in bytes. `operator` is the only
    /// value that can come from the caller's head; routing has checked it against the configuration.
    pub fn with(&self, token: &Token, operator: &HeaderValue, length: usize) -> HeaderMap {
        let mut headers = token.head(|| self.with_credential(token)).clone();
        fill(&mut headers, X_USER_ID, operator.clone());
        fill(&mut headers, header::CONTENT_LENGTH, decimal(length));
        headers
    }

    fn with_credential(&self, token: &Token) -> HeaderMap {
        // Called once a token, not once a request: the token keeps the result.
        let mut headers = self.0.clone();
        headers.insert(header::AUTHORIZATION, token.authorization().clone());
        headers.insert(X_APP_KEY, token.app_key().clone());
        headers
    }
}

/// Sets a header that is usually in the map already. `HeaderMap::insert` alone would first make room for a new one.
fn fill(headers: &mut HeaderMap, name: HeaderName, value: HeaderValue) {
    match headers.get_mut(&name) {
        Some(place) => *place = value,
        None => drop(headers.insert(name, value)),
    }
}

/// The numbers below 1000 as decimal text, so that the `Content-Length` of a usual body needs no allocation.
// The allocation would cost 100 instructions a request, and exceed the number that tests/allocations.rs allows.
static SMALL: [[u8; 3]; 1000] = {
    let mut small = [[0; 3]; 1000];
    let mut number = 0;
    while number < small.len() {
        let digits = [number / 100, number / 10 % 10, number % 10];
        small[number] = [b'0' + digits[0] as u8, b'0' + digits[1] as u8, b'0' + digits[2] as u8];
        number += 1;
    }
    small
};

#[expect(clippy::expect_used, reason = "digits")]
/// Returns a number as a header value, in decimal.
fn decimal(number: usize) -> HeaderValue {
    match SMALL.get(number) {
        Some(digits) => {
            let zeros = usize::from(number < 100) + usize::from(number < 10);
            HeaderValue::from_maybe_shared(Bytes::from_static(&digits[zeros..])).expect("ASCII")
        }
        None => HeaderValue::from_str(itoa::Buffer::new().format(number)).expect("ASCII"),
    }
}

/// What [`clean_reply`] found in the head of a reply.
#[derive(Debug, Default)]
pub struct Cleaned {
    /// The upstream's own id of the request, if it has 1 to 128 visible ASCII characters.
    pub upstream_id: Option<HeaderValue>,
    /// How many headers were removed because they contain a secret.
    pub quoting: usize,
}

/// Removes the headers of a reply that are not for the caller.
///
/// A header is kept if it is on an allow-list, or among the `more` names of the configuration. Even so it is removed
/// if `quotes` returns true for its value (it contains a secret), or if `Connection` names it (RFC 9110 §7.6.1). The
/// upstream's `x-request-id` is renamed to `x-gateway-upstream-request-id`, since callers send a header of that name
/// themselves. `is_read` says that the gateway could read the body without decoding it. `Content-Encoding` is then
/// false, and is removed.
pub fn clean_reply(
    headers: &mut HeaderMap,
    more: &[HeaderName],
    is_read: bool,
    quotes: impl Fn(&HeaderValue) -> bool,
) -> Cleaned {
    let is_false = |name: &HeaderName| is_read && *name == header::CONTENT_ENCODING;
    let passes = |name: &HeaderName| (FOR_CALLERS.contains(name) || more.contains(name)) && !is_false(name);
    // The usual reply has nothing to remove, and is not copied.
    let is_clean = headers.iter().all(|(name, value)| passes(name) && !quotes(value));
    if is_clean { Cleaned::default() } else { strip(headers, passes, quotes) }
}

fn strip(
    headers: &mut HeaderMap,
    passes: impl Fn(&HeaderName) -> bool,
    quotes: impl Fn(&HeaderValue) -> bool,
) -> Cleaned {
    let is_id =
        |id: &HeaderValue| (1..=128).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic);
    // Searched for secrets as well: the upstream chooses this text, and it is written to the trail.
    let upstream_id = headers.remove(X_REQUEST_ID).filter(|id| is_id(id) && !quotes(id));
    let named = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let named = named.flat_map(|value| value.split(',')).filter_map(|option| option.trim().parse().ok());
    // Collected first: `headers` cannot change while it is iterated.
    let mut unwanted: SmallVec<[HeaderName; 8]> = named.collect();
    let mut quoting = 0;
    for (name, value) in &*headers {
        let is_quoting = passes(name) && quotes(value);
        quoting += usize::from(is_quoting);
        if is_quoting || !passes(name) {
            unwanted.push(name.clone());
        }
    }
    for name in unwanted {
        headers.remove(name);
    }
    // After the removal, so that a header of this name from the upstream does not pass.
    if let Some(id) = &upstream_id {
        headers.insert(UPSTREAM_REQUEST_ID, id.clone());
    }
    Cleaned { upstream_id, quoting }
}

/// The headers of a reply that reach the caller: they describe the body, its age, or when to call again. The usual ones
/// come first, since the list is searched in order.
///
/// `Set-Cookie`, `Alt-Svc` and `Strict-Transport-Security` are not among them: a client would apply them to the
/// gateway's address.
static FOR_CALLERS: [HeaderName; 12] = [
    header::CONTENT_TYPE,
    header::CONTENT_LENGTH,
    header::DATE,
    header::CONTENT_ENCODING,
    header::CONTENT_LANGUAGE,
    header::CONTENT_RANGE,
    header::ALLOW,
    header::VARY,
    header::AGE,
    header::EXPIRES,
    header::CACHE_CONTROL,
    header::RETRY_AFTER,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn length_is_formatted_in_decimal() {
        // All of the table, its end, and numbers beyond it.
        for number in (0..=1100).chain([65_536]) {
            assert_eq!(decimal(number), number.to_string());
        }
    }

    #[test]
    fn upstream_reply_cannot_set_gateway_headers() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "x-hop"),
            ("x-hop", "1"),
            ("set-cookie", "a=b"),
            ("x-gateway-outcome", "succeeded"),
            ("content-type", "application/json"),
        ] {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        // `x-hop` is allowed by configuration, and must still go because `Connection` names it.
        clean_reply(&mut headers, &[HeaderName::from_static("x-hop")], false, |_| false);
        assert_eq!(headers.keys().collect::<Vec<_>>(), [header::CONTENT_TYPE]);
    }
}
