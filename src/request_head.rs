//! A caller's head as the stages need it, read in one pass.
//!
//! Guarantees that a header which must occur once can be told from one that is repeated. Decides nothing: each stage
//! rejects what it cannot use.

use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Version, header};

use crate::field_values::is_coding;
use crate::model::header_names::looks_like_credential;

/// What the stages need of a caller's head. Nothing of it but the operator goes to the upstream.
#[derive(Debug, Default)]
pub struct Inbound<'a> {
    /// `Host`.
    pub host: HeaderOccurrences<'a>,
    /// `x-userid`: the operator in whose name the caller asks.
    pub operator: HeaderOccurrences<'a>,
    /// `Content-Type`.
    pub content_type: HeaderOccurrences<'a>,
    transfer_encoding: HeaderOccurrences<'a>,
    /// `x-request-id`: the caller's own id of the request.
    pub caller_id: HeaderOccurrences<'a>,
    /// `traceparent`.
    pub traceparent: HeaderOccurrences<'a>,
    /// `Idempotency-Key`.
    pub idempotency_key: HeaderOccurrences<'a>,
    /// `Idempotency-Force`.
    pub idempotency_force: HeaderOccurrences<'a>,
    /// `Expect: 100-continue` is there.
    pub expects_continue: bool,
    /// Another `Expect` is there, which may be refused with 417 (RFC 9110 §10.1.1).
    pub has_unknown_expectation: bool,
    /// `Content-Encoding` names a coding other than `identity`.
    pub has_content_encoding: bool,
    /// `Origin` or `Sec-Fetch-Site` is there, so a browser sends it. `Sec-Fetch-Mode` alone does not count: Node's
    /// fetch sends it.
    pub is_browser: bool,
    /// `Connection` names a header on which the gateway or the upstream relies, or cannot be read. An intermediary
    /// that drops the header (RFC 9110 §7.6.1) would change who acts or what is done.
    pub drops_end_to_end: bool,
    /// `Transfer-Encoding` is other than `chunked`, or is repeated.
    pub is_transfer_coded: bool,
    /// The request is not HTTP/1.1 but 1.0, in which a reply that breaks off cannot be told from one that ends.
    pub is_http10: bool,
    /// All headers, for [`Self::has`].
    all: Option<&'a HeaderMap>,
    /// How many headers look like a credential. They are dropped as all others are, but counted: an app that sends
    /// one has not understood that it needs none.
    pub credentials: usize,
}

/// The occurrences of a header that must not be repeated.
#[derive(Clone, Copy, Debug, Default)]
pub struct HeaderOccurrences<'a> {
    /// The first one, if there is any.
    pub first: Option<&'a HeaderValue>,
    /// How many there are.
    pub count: usize,
}

impl<'a> HeaderOccurrences<'a> {
    /// Records one occurrence.
    fn note(&mut self, value: &'a HeaderValue) {
        // The first stays, and a repeated header is not joined: two values of `x-userid` are two operators, and which
        // one counts would depend on who reads them.
        self.first.get_or_insert(value);
        self.count += 1;
    }

    /// The value if there is exactly one; `None` if there is none or more than one.
    pub fn only(&self) -> Option<&'a HeaderValue> {
        self.first.filter(|_| self.count == 1)
    }
}

impl<'a> Inbound<'a> {
    /// Reads a head. Never fails: what is wrong is left to the stages.
    pub fn read(head: &'a Parts) -> Self {
        let mut inbound =
            Self { is_http10: head.version != Version::HTTP_11, all: Some(&head.headers), ..Self::default() };
        for (name, value) in &head.headers {
            // The usual ones first. Names that the `http` crate knows are compared as numbers; the others are
            // compared as text, which costs more.
            if *name == header::HOST {
                inbound.host.note(value);
            } else if *name == header::CONTENT_TYPE {
                inbound.content_type.note(value);
            } else if *name != header::CONTENT_LENGTH
                && *name != header::ACCEPT
                && *name != header::USER_AGENT
            {
                inbound.note(name.as_str(), value);
            }
        }
        // Only after all headers, since a repeated one is refused: two parsers that pick different ones see different
        // bodies (request smuggling).
        inbound.is_transfer_coded = match inbound.transfer_encoding.count {
            0 => false,
            _ => inbound.transfer_encoding.only().is_none_or(|coding| !is_token(coding, "chunked")),
        };
        inbound
    }

    /// Returns whether a header is there, with any value.
    pub fn has(&self, name: &HeaderName) -> bool {
        self.all.is_some_and(|headers| headers.contains_key(name))
    }

    /// Records a header that is not among the usual ones.
    fn note(&mut self, name: &str, value: &'a HeaderValue) {
        match name {
            "x-userid" => self.operator.note(value),
            "transfer-encoding" => self.transfer_encoding.note(value),
            "content-encoding" => self.has_content_encoding |= is_coding(value),
            "connection" => self.drops_end_to_end |= names_end_to_end(value),
            "expect" if is_token(value, "100-continue") => {
                self.expects_continue = true;
            }
            "expect" => self.has_unknown_expectation = true,
            "origin" | "sec-fetch-site" => self.is_browser = true,
            "x-request-id" => self.caller_id.note(value),
            "traceparent" => self.traceparent.note(value),
            "idempotency-key" => self.idempotency_key.note(value),
            "idempotency-force" => self.idempotency_force.note(value),
            // Only the name is checked. The value of a credential is read nowhere.
            _ => self.credentials += usize::from(looks_like_credential(name)),
        }
    }
}

/// Compares a value with a token, without case.
fn is_token(value: &HeaderValue, token: &str) -> bool {
    value.as_bytes().eq_ignore_ascii_case(token.as_bytes())
}

/// Returns whether `Connection` names a header that must arrive, or cannot be read.
fn names_end_to_end(connection: &HeaderValue) -> bool {
    const RELIED_ON: [&str; 6] =
        ["authorization", "content-length", "content-type", "host", "x-userid", "x-app-key"];
    if matches!(connection.as_bytes(), b"keep-alive" | b"close") {
        // Clients send these two, and need no search.
        return false;
    }
    // Unreadable counts as naming one, since an intermediary may read it otherwise than this function.
    let Ok(options) = connection.to_str() else { return true };
    options
        .split(',')
        .map(str::trim)
        .any(|option| RELIED_ON.iter().any(|name| option.eq_ignore_ascii_case(name)))
}
