//! Header fields with a meaning of their own: those that hold credentials, and those of a reply that must not pass to callers.

use http::HeaderName;

/// Whether credentials are usually sent in the header of this name. `name` must be in lower case.
pub fn looks_like_credential(name: &str) -> bool {
    // With `_` for `-` as well: servers that map headers to CGI variables cannot tell the two apart, so that `x_app_key` would
    // count.
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

/// Whether the configuration may let a reply's header of this name pass to callers.
// Never: headers of one connection (RFC 9110, section 7.6.1), cookies, redirects, which would lead a client past the gateway,
// headers that hold or ask for credentials, and names that the gateway uses itself, which an upstream could forge.
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
    fn credential_header_is_recognised_in_either_spelling() {
        assert!(looks_like_credential("authorization"));
        assert!(looks_like_credential("x_app_key"));
        assert!(!looks_like_credential("x-request-id"));
    }
}
