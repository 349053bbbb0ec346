//! What goes out to the upstream, an allow-list, and what does not come back to the caller, a deny-list.

use http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::token::Token;

const X_APP_KEY: HeaderName = HeaderName::from_static("x-app-key");
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
        headers.extend(configured.clone());
        Self(headers)
    }

    /// The headers of one upstream request. Nothing of the caller's head is in it but the operator, and
    /// only where the configuration lists it.
    pub fn with(&self, token: &Token, operator: &HeaderValue, body: usize) -> HeaderMap {
        let mut headers = self.0.clone();
        headers.insert(header::AUTHORIZATION, token.authorization().clone());
        headers.insert(X_APP_KEY, token.app_key().clone());
        headers.insert(X_USER_ID, operator.clone());
        headers.insert(header::CONTENT_LENGTH, body.into());
        headers
    }
}

/// How many headers of a caller look like a credential. They are dropped like all others, but counted: an
/// app that sends one has not understood that it needs none.
pub fn credentials_in(headers: &HeaderMap) -> usize {
    headers.keys().filter(|name| looks_like_credential(name.as_str())).count()
}

/// Whether a header's name, in lower case, is one that credentials are sent in.
pub fn looks_like_credential(name: &str) -> bool {
    const SPELLINGS: [&str; 8] = [
        "authorization",
        "proxy-authorization",
        "cookie",
        "x-api-key",
        "x-app-key",
        "x-app-secret",
        "x-auth-token",
        "x-access-token",
    ];
    SPELLINGS.iter().any(|known| {
        known.len() == name.len()
            && known.bytes().zip(name.bytes()).all(|(k, n)| k == n || (k == b'-' && n == b'_'))
    })
}

/// Strips a reply's head of what is not for the caller: hop-by-hop headers, those that `Connection` names,
/// cookies, the server's name, and whatever could be taken for a word of the gateway.
pub fn clean_reply(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|option| option.trim().parse().ok())
        .collect();
    let ours: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with("x-gateway-")).cloned().collect();
    for name in named.iter().chain(&ours).chain(&NOT_FOR_CALLERS) {
        headers.remove(name);
    }
}

const NOT_FOR_CALLERS: [HeaderName; 13] = [
    header::LOCATION, // a client that follows it would send the task somewhere else
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    HeaderName::from_static("proxy-connection"),
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::SET_COOKIE,
    header::SERVER,
    HeaderName::from_static("x-request-id"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_is_known_in_either_spelling() {
        assert!(looks_like_credential("authorization"));
        assert!(looks_like_credential("x_app_key"));
        assert!(!looks_like_credential("x-request-id"));
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
        clean_reply(&mut headers);
        assert_eq!(headers.keys().collect::<Vec<_>>(), [header::CONTENT_TYPE]);
    }
}
