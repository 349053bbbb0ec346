//! What goes out to the upstream, and what comes back to the caller: two allow-lists.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use smallvec::SmallVec;

use crate::token::Token;

const X_APP_KEY: HeaderName = HeaderName::from_static("x-app-key");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const UPSTREAM_REQUEST_ID: HeaderName = HeaderName::from_static("x-gateway-upstream-request-id");
const X_USER_ID: HeaderName = HeaderName::from_static("x-userid");
const JSON: HeaderValue = HeaderValue::from_static("application/json; charset=UTF-8");
const ANY: HeaderValue = HeaderValue::from_static("*/*");
const IDENTITY: HeaderValue = HeaderValue::from_static("identity");
const USER_AGENT: HeaderValue =
    HeaderValue::from_static(concat!("ccsqm-gateway/", env!("CARGO_PKG_VERSION")));

/// The head that every upstream request shares, made once.
#[derive(Clone, Debug)]
pub struct Outbound(HeaderMap);

impl Outbound {
    /// `authority` is the upstream's host, with its port where it is not the scheme's own.
    pub fn new(authority: HeaderValue, configured: &HeaderMap) -> Self {
        let mut headers = HeaderMap::with_capacity(16);
        headers.insert(header::HOST, authority);
        headers.insert(header::CONTENT_TYPE, JSON);
        headers.insert(header::ACCEPT, ANY);
        headers.insert(header::ACCEPT_ENCODING, IDENTITY);
        headers.insert(header::USER_AGENT, USER_AGENT);
        for (name, value) in configured {
            let mut value = value.clone();
            value.set_sensitive(true); // nobody's business but the upstream's
            headers.insert(name, value);
        }
        // Places of what each request fills in, so that no copy needs to grow.
        let later = HeaderValue::from_static("");
        for name in [header::AUTHORIZATION, X_APP_KEY, X_USER_ID, header::CONTENT_LENGTH] {
            headers.insert(name, later.clone());
        }
        Self(headers)
    }

    /// The headers of one upstream request with a body of so many bytes. Nothing of the caller's head is in it but
    /// the operator, and only where the configuration lists it.
    pub fn with(&self, token: &Token, operator: &HeaderValue, length: usize) -> HeaderMap {
        let mut headers = token.head(|| self.with_credential(token)).clone();
        fill(&mut headers, X_USER_ID, operator.clone());
        fill(&mut headers, header::CONTENT_LENGTH, decimal(length));
        headers
    }

    fn with_credential(&self, token: &Token) -> HeaderMap {
        let mut headers = self.0.clone();
        headers.insert(header::AUTHORIZATION, token.authorization().clone());
        headers.insert(X_APP_KEY, token.app_key().clone());
        headers
    }
}

/// Fills in a header that has its place. To insert it would first look for room.
fn fill(headers: &mut HeaderMap, name: HeaderName, value: HeaderValue) {
    match headers.get_mut(&name) {
        Some(place) => *place = value,
        None => drop(headers.insert(name, value)),
    }
}

/// The numbers below a thousand as text, so that the length of a usual body is no allocation: one block and 100 instructions a
/// request, more than the budget of allocations has left.
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
fn decimal(number: usize) -> HeaderValue {
    match SMALL.get(number) {
        Some(digits) => {
            let zeros = usize::from(number < 100) + usize::from(number < 10);
            HeaderValue::from_maybe_shared(Bytes::from_static(&digits[zeros..])).expect("ASCII")
        }
        None => HeaderValue::from_str(itoa::Buffer::new().format(number)).expect("ASCII"),
    }
}

/// What is left out of a reply's head, beside what never passes.
#[derive(Debug, Default)]
pub struct Cleaned {
    /// The upstream's own id of the request, if it is plain text.
    pub upstream_id: Option<HeaderValue>,
    /// How many headers were dropped because they quote a secret.
    pub quoting: usize,
}

/// Leaves of a reply's head what is for the caller: an allow-list, and `more` names from the configuration. What
/// `quotes` a secret is dropped, and so are headers that `Connection` names. The upstream's `x-request-id` takes
/// another name, since callers send that one themselves. Of a body that `is_read` as it is, no `Content-Encoding` is told: it would
/// be false.
pub fn clean_reply(
    headers: &mut HeaderMap,
    more: &[HeaderName],
    is_read: bool,
    quotes: impl Fn(&HeaderValue) -> bool,
) -> Cleaned {
    let is_false = |name: &HeaderName| is_read && *name == header::CONTENT_ENCODING;
    let passes = |name: &HeaderName| (FOR_CALLERS.contains(name) || more.contains(name)) && !is_false(name);
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
    let upstream_id = headers.remove(X_REQUEST_ID).filter(|id| is_id(id) && !quotes(id));
    let named = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let named = named.flat_map(|value| value.split(',')).filter_map(|option| option.trim().parse().ok());
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
    if let Some(id) = &upstream_id {
        headers.insert(UPSTREAM_REQUEST_ID, id.clone());
    }
    Cleaned { upstream_id, quoting }
}

/// What says something of the body, of its age, or of when to come back. The usual ones first.
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
    fn a_length_is_stated_in_decimal() {
        for number in (0..=1100).chain([65_536]) {
            assert_eq!(decimal(number), number.to_string());
        }
    }

    #[test]
    fn a_reply_cannot_speak_in_the_gateways_name() {
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
        clean_reply(&mut headers, &[HeaderName::from_static("x-hop")], false, |_| false);
        assert_eq!(headers.keys().collect::<Vec<_>>(), [header::CONTENT_TYPE]);
    }
}
