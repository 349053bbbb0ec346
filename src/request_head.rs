//! A caller's head, as far as the stages want to know of it.

use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Version, header};

use crate::field_values::is_coding;
use crate::model::header_names::looks_like_credential;

/// What the stages want to know of a caller's head, read in one pass.
#[derive(Debug, Default)]
pub struct Inbound<'a> {
    /// `Host`, and how often it stands there.
    pub host: Once<'a>,
    /// `x-userid`.
    pub operator: Once<'a>,
    /// `Content-Type`.
    pub content_type: Once<'a>,
    transfer_encoding: Once<'a>,
    /// `x-request-id`.
    pub caller_id: Once<'a>,
    /// `traceparent`.
    pub traceparent: Once<'a>,
    /// `Idempotency-Key`.
    pub idempotency_key: Once<'a>,
    /// `Idempotency-Force`.
    pub idempotency_force: Once<'a>,
    /// `Expect: 100-continue`.
    pub expects_continue: bool,
    /// Any other `Expect`.
    pub expects_more: bool,
    /// `Content-Encoding` names a coding.
    pub is_coded: bool,
    /// `Origin` or `Sec-Fetch-Site`. `Sec-Fetch-Mode` alone is no browser: Node's fetch sends it.
    pub is_browser: bool,
    /// `Connection` names a header on which the gateway or the upstream relies, so that dropping it on the way
    /// would change who acts; or cannot be read.
    pub drops_end_to_end: bool,
    /// `Transfer-Encoding` is another than `chunked`, or stands twice.
    pub is_transfer_coded: bool,
    /// HTTP/1.0, which can't be told that a reply broke off.
    pub is_old: bool,
    /// All of them.
    all: Option<&'a HeaderMap>,
    /// Headers that look like a credential. They are dropped like all others, but counted: an app that sends
    /// one has not understood that it needs none.
    pub credentials: usize,
}

/// A header that should stand in a head at most once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Once<'a> {
    /// The first one.
    pub first: Option<&'a HeaderValue>,
    /// How many there are.
    pub count: usize,
}

impl<'a> Once<'a> {
    fn note(&mut self, value: &'a HeaderValue) {
        self.first.get_or_insert(value);
        self.count += 1;
    }

    /// The only one; `None` if there is none, or more than one.
    pub fn only(&self) -> Option<&'a HeaderValue> {
        self.first.filter(|_| self.count == 1)
    }
}

impl<'a> Inbound<'a> {
    /// Reads a caller's head.
    pub fn read(head: &'a Parts) -> Self {
        let mut inbound =
            Self { is_old: head.version != Version::HTTP_11, all: Some(&head.headers), ..Self::default() };
        for (name, value) in &head.headers {
            // The usual ones first. Names that the crate knows are compared as numbers, others as text.
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
        inbound.is_transfer_coded = match inbound.transfer_encoding.count {
            0 => false,
            _ => inbound.transfer_encoding.only().is_none_or(|coding| !is_token(coding, "chunked")),
        };
        inbound
    }

    /// Whether a header is there, with whatever value.
    pub fn has(&self, name: &HeaderName) -> bool {
        self.all.is_some_and(|headers| headers.contains_key(name))
    }

    fn note(&mut self, name: &str, value: &'a HeaderValue) {
        match name {
            "x-userid" => self.operator.note(value),
            "transfer-encoding" => self.transfer_encoding.note(value),
            "content-encoding" => self.is_coded |= is_coding(value),
            "connection" => self.drops_end_to_end |= names_end_to_end(value),
            "expect" if is_token(value, "100-continue") => {
                self.expects_continue = true;
            }
            "expect" => self.expects_more = true,
            "origin" | "sec-fetch-site" => self.is_browser = true,
            "x-request-id" => self.caller_id.note(value),
            "traceparent" => self.traceparent.note(value),
            "idempotency-key" => self.idempotency_key.note(value),
            "idempotency-force" => self.idempotency_force.note(value),
            _ => self.credentials += usize::from(looks_like_credential(name)),
        }
    }
}

fn is_token(value: &HeaderValue, token: &str) -> bool {
    value.as_bytes().eq_ignore_ascii_case(token.as_bytes())
}

fn names_end_to_end(connection: &HeaderValue) -> bool {
    const RELIED_ON: [&str; 6] =
        ["authorization", "content-length", "content-type", "host", "x-userid", "x-app-key"];
    if matches!(connection.as_bytes(), b"keep-alive" | b"close") {
        return false; // the usual case
    }
    let Ok(options) = connection.to_str() else { return true };
    options
        .split(',')
        .map(str::trim)
        .any(|option| RELIED_ON.iter().any(|name| option.eq_ignore_ascii_case(name)))
}
