//! HTTP/1.1 messages as bytes: parses a request head, formats a reply. Does no I/O.

use http::StatusCode;
use serde_json::{Value, json};

/// The longest head that is read, in bytes.
const MAX_HEAD: usize = 64 * 1024;

/// The longest body that is read, in bytes.
const MAX_BODY: usize = 16 * 1024 * 1024;

/// The most headers that are read.
const MAX_HEADERS: usize = 128;

/// A request head.
pub(super) struct Head {
    pub(super) method: String,
    /// The target without its query.
    pub(super) path: String,
    /// The length of the head in bytes, the empty line included.
    pub(super) length: usize,
    headers: Vec<(String, Vec<u8>)>,
    /// Whether the request is HTTP/1.0.
    old: bool,
}

impl Head {
    /// Parses the head at the start of these bytes; `None` if more are needed. The error is the reply to what is not a head.
    pub(super) fn parse(bytes: &[u8]) -> Result<Option<Self>, Reply> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Request::new(&mut headers);
        match parsed.parse(bytes) {
            Ok(httparse::Status::Complete(length)) => Ok(Some(Self::of(&parsed, length))),
            Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => Ok(None),
            Ok(httparse::Status::Partial) => Err(Reply::error(431, "head too long")),
            Err(httparse::Error::TooManyHeaders) => Err(Reply::error(431, "too many headers")),
            Err(error) => Err(Reply::error(400, &format!("not HTTP/1.1: {error}"))),
        }
    }

    fn of(parsed: &httparse::Request<'_, '_>, length: usize) -> Self {
        let target = parsed.path.unwrap_or_default();
        Self {
            method: parsed.method.unwrap_or_default().to_owned(),
            path: target.split('?').next().unwrap_or_default().to_owned(),
            length,
            // Names are compared without regard to case (RFC 9110 §5.1). The journal has the bytes as they arrived.
            headers: parsed.headers.iter().map(|h| (h.name.to_ascii_lowercase(), h.value.to_vec())).collect(),
            old: parsed.version == Some(0),
        }
    }

    /// Returns all values of a header. The name must be in lower case.
    pub(super) fn all<'a, 'n>(&'a self, name: &'n str) -> impl Iterator<Item = &'a [u8]> + use<'a, 'n> {
        self.headers.iter().filter(move |(n, _)| n == name).map(|(_, value)| value.as_slice())
    }

    /// Returns the value of a header that occurs exactly once and is text. The name must be in lower case.
    // Twice is as bad as never: a server that took one of the values would hide that the gateway let both through.
    pub(super) fn only<'a>(&'a self, name: &str) -> Option<&'a str> {
        let mut values = self.all(name);
        let value = values.next()?;
        if values.next().is_some() { None } else { std::str::from_utf8(value).ok() }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.all(name).next().is_some()
    }

    /// Returns the length of the body in bytes. The error is the reply to a body that is not read.
    pub(super) fn body_length(&self) -> Result<usize, Reply> {
        if self.has("transfer-encoding") {
            return Err(Reply::error(411, "only Content-Length is taken"));
        }
        if !self.has("content-length") {
            return Ok(0);
        }
        // Digits only, since `parse` would accept "+5", which is no Content-Length (RFC 9110 §8.6).
        let digits = self.only("content-length").filter(|text| text.bytes().all(|b| b.is_ascii_digit()));
        match digits.and_then(|digits| digits.parse().ok()) {
            Some(length) if length > MAX_BODY => Err(Reply::error(413, "body too large")),
            Some(length) => Ok(length),
            None => Err(Reply::error(400, "Content-Length is not one number")),
        }
    }

    pub(super) fn expects_continue(&self) -> bool {
        self.only("expect").is_some_and(|value| value.eq_ignore_ascii_case("100-continue"))
    }

    /// Whether the client asks for the connection to be closed behind the reply (RFC 9112 §9.3).
    pub(super) fn closes(&self) -> bool {
        let says = |word: &[u8]| {
            let mut options = self.all("connection").flat_map(|value| value.split(|byte| *byte == b','));
            options.any(|option| option.trim_ascii().eq_ignore_ascii_case(word))
        };
        says(b"close") || (self.old && !says(b"keep-alive"))
    }

    /// Whether the content type is JSON, in UTF-8 if a charset is named.
    pub(super) fn is_json(&self) -> bool {
        let Some(value) = self.only("content-type") else { return false };
        let mut parts = value.split(';').map(|part| part.trim().to_ascii_lowercase());
        parts.next().is_some_and(|media| media == "application/json")
            && parts.all(|parameter| matches!(parameter.as_str(), "" | "charset=utf-8" | "charset=\"utf-8\""))
    }
}

/// A reply before it is framed.
pub(super) struct Reply {
    pub(super) status: u16,
    /// If it is empty, the reply has no such header.
    pub(super) content_type: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl Reply {
    /// Returns a reply with this text as its body, and the content type of all replies of the vendor.
    pub(super) fn text(status: u16, body: &str) -> Self {
        let content_type = "application/json; charset=UTF-8".to_owned();
        Self { status, content_type, headers: Vec::new(), body: body.as_bytes().to_vec() }
    }

    pub(super) fn json(status: u16, body: &Value) -> Self {
        Self::text(status, &body.to_string())
    }

    /// Returns a reply without one of the vendor's result codes. The vendor documents no body for it; this one has the reason.
    pub(super) fn error(status: u16, reason: &str) -> Self {
        Self::json(status, &json!({"error_code": status.to_string(), "error_msg": reason}))
    }

    /// Lengthens the body to `size` bytes. A JSON object gets a member `padding`, anything else gets spaces. Never shortens it.
    pub(super) fn pad(&mut self, size: usize) {
        // One more for the closing quote. The brace at the end was in the body before.
        const FRAME: usize = r#","padding":""#.len() + 1;
        let missing = size.saturating_sub(self.body.len());
        if missing >= FRAME && self.body.len() > 2 && self.body.pop_if(|last| *last == b'}').is_some() {
            self.body.extend_from_slice(br#","padding":""#);
            self.body.resize(size - 2, b'x');
            self.body.extend_from_slice(b"\"}");
        } else {
            self.body.resize(self.body.len() + missing, b' ');
        }
    }

    /// Returns the bytes of the head. A 204 or 304 has no body (RFC 9110 §15.3.5, §15.4.5), so it announces none.
    pub(super) fn head(&self, chunked: bool, close: bool) -> Vec<u8> {
        let mut head = status_line(self.status);
        let mut line = |name: &str, value: &str| head.push_str(&format!("{name}: {value}\r\n"));
        if self.has_body() {
            if !self.content_type.is_empty() {
                line("Content-Type", &self.content_type);
            }
            if chunked {
                line("Transfer-Encoding", "chunked");
            } else {
                line("Content-Length", &self.body.len().to_string());
            }
        }
        if close {
            line("Connection", "close");
        }
        self.headers.iter().for_each(|(name, value)| line(name, value));
        head.push_str("\r\n");
        head.into_bytes()
    }

    /// Returns the body that is sent.
    pub(super) fn body(&self) -> &[u8] {
        if self.has_body() { &self.body } else { &[] }
    }

    fn has_body(&self) -> bool {
        !matches!(self.status, 204 | 304)
    }
}

/// Returns an interim reply, complete.
pub(super) fn interim(status: u16) -> Vec<u8> {
    format!("{}\r\n", status_line(status)).into_bytes()
}

/// Returns the body in two chunks and the last chunk (RFC 9112 §7.1).
pub(super) fn chunks(body: &[u8]) -> Vec<u8> {
    let (front, back) = body.split_at(body.len() / 2);
    let mut bytes = Vec::new();
    // An empty chunk would be the last one, and end the body.
    for chunk in [front, back].into_iter().filter(|chunk| !chunk.is_empty()) {
        bytes.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
        bytes.extend_from_slice(chunk);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"0\r\n\r\n");
    bytes
}

fn status_line(status: u16) -> String {
    let reason = StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason());
    format!("HTTP/1.1 {status} {}\r\n", reason.unwrap_or("Scripted"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(lines: &str) -> Head {
        Head::parse(format!("POST /a?b HTTP/1.1\r\n{lines}\r\n").as_bytes()).ok().flatten().unwrap()
    }

    #[test]
    fn repeated_header_has_no_single_value() {
        let head = head("X-A: 1\r\nx-a: 2\r\nX-B: 3\r\n");
        assert_eq!((head.only("x-a"), head.only("x-b")), (None, Some("3")));
        assert_eq!(head.path, "/a");
    }

    #[test]
    fn content_length_must_be_one_plain_number() {
        assert_eq!(head("Content-Length: 5\r\n").body_length().ok(), Some(5));
        for lines in ["Content-Length: 5\r\nContent-Length: 5\r\n", "Content-Length: +5\r\n"] {
            assert_eq!(head(lines).body_length().err().map(|reply| reply.status), Some(400), "{lines}");
        }
    }

    #[test]
    fn json_content_type_allows_only_utf_8() {
        for (value, json) in [
            ("application/json", true),
            ("application/json; charset=UTF-8", true),
            ("application/json;charset=gbk", false),
            ("text/plain", false),
        ] {
            assert_eq!(head(&format!("Content-Type: {value}\r\n")).is_json(), json, "{value}");
        }
    }

    #[test]
    fn padded_reply_has_the_requested_size_and_stays_json() {
        let mut reply = Reply::json(200, &json!({"resultCode": "0409000"}));
        reply.pad(1000);
        assert_eq!(reply.body.len(), 1000);
        assert_eq!(serde_json::from_slice::<Value>(&reply.body).unwrap()["resultCode"], "0409000");
    }
}
