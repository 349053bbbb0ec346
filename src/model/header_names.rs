//! Names of header fields that mean something.

use http::HeaderName;

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

/// Whether a header of a reply can pass to callers if the configuration wants it: not what belongs to one connection, sets
/// cookies, sends a client elsewhere, holds a credential or asks for one, or is the gateway's own word.
pub fn may_pass(name: &HeaderName) -> bool {
    let name = name.as_str();
    let never = matches!(
        name,
        "connection"
            | "keep-alive"
            | "proxy-authenticate"
            | "proxy-connection"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "location"
            | "refresh"
            | "set-cookie"
            | "set-cookie2"
            | "x-userid"
            | "www-authenticate"
            | "x-request-id"
    );
    !never && !looks_like_credential(name) && !name.starts_with("x-gateway-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_is_known_in_either_spelling() {
        assert!(looks_like_credential("authorization"));
        assert!(looks_like_credential("x_app_key"));
        assert!(!looks_like_credential("x-request-id"));
    }
}
