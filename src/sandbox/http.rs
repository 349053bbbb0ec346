//! Heads and replies as bytes: reads a request head, writes a reply head. No socket here.

use http::StatusCode;
use serde_json::{Value, json};

/// Longest head that is read, in bytes.
const MAX_HEAD: usize = 64 * 1024;

/// Longest body that is read, in bytes.
const MAX_BODY: usize = 16 * 1024 * 1024;

/// Most headers that are read.
const MAX_HEADERS: usize = 128;

/// A request head.
pub(super) struct Head {
    pub(super) method: String,
    /// The target without its query.
    pub(super) path: String,
    /// Its length in bytes, the empty line included.
    pub(super) length: usize,
    headers: Vec<(String, Vec<u8>)>,
    old: bool,
}

impl Head {
    /// The head at the start of these bytes, if it is all there. An error is the answer to what is no head.
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
            headers: parsed.headers.iter().map(|h| (h.name.to_ascii_lowercase(), h.value.to_vec())).collect(),
            old: parsed.version == Some(0),
        }
    }

    /// All values of this header; the name in lower case.
    pub(super) fn all<'a, 'n>(&'a self, name: &'n str) -> impl Iterator<Item = &'a [u8]> + use<'a, 'n> {
        self.headers.iter().filter(move |(n, _)| n == name).map(|(_, value)| value.as_slice())
    }

    /// The value of this header if it is there exactly once and is text; the name in lower case.
    pub(super) fn only<'a>(&'a self, name: &str) -> Option<&'a str> {
        let mut values = self.all(name);
        let value = values.next()?;
        if values.next().is_some() { None } else { std::str::from_utf8(value).ok() }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.all(name).next().is_some()
    }

    /// The length of the body in bytes, or the answer to a body that is not taken.
    pub(super) fn body_length(&self) -> Result<usize, Reply> {
        if self.has("transfer-encoding") {
            return Err(Reply::error(411, "only Content-Length is taken"));
        }
        if !self.has("content-length") {
            return Ok(0);
        }
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

    /// Whether the client wants the connection closed behind the answer.
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

/// An answer before it is framed.
pub(super) struct Reply {
    pub(super) status: u16,
    /// Empty = no such header.
    pub(super) content_type: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl Reply {
    /// A reply whose body is this text, JSON as all of the vendor's.
    pub(super) fn text(status: u16, body: &str) -> Self {
        let content_type = "application/json; charset=UTF-8".to_owned();
        Self { status, content_type, headers: Vec::new(), body: body.as_bytes().to_vec() }
    }

    pub(super) fn json(status: u16, body: &Value) -> Self {
        Self::text(status, &body.to_string())
    }

    /// An answer outside the vendor's result codes. No error body is documented; this one gives the reason.
    pub(super) fn error(status: u16, reason: &str) -> Self {
        Self::json(status, &json!({"error_code": status.to_string(), "error_msg": reason}))
    }

    /// Lengthens the body to `size` bytes; a JSON object gets a member `padding`, anything else gets spaces.
    pub(super) fn pad(&mut self, size: usize) {
        const FRAME: usize = r#","padding":""#.len() + 1; // the brace that was there is counted already
        let missing = size.saturating_sub(self.body.len());
        if missing >= FRAME && self.body.len() > 2 && self.body.pop_if(|last| *last == b'}').is_some() {
            self.body.extend_from_slice(br#","padding":""#);
            self.body.resize(size - 2, b'x');
            self.body.extend_from_slice(b"\"}");
        } else {
            self.body.resize(self.body.len() + missing, b' ');
        }
    }

    /// The head's bytes. A 204 or 304 has no body (RFC 9110 §15.3.5, §15.4.5), so it announces none.
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

    /// The body that goes out.
    pub(super) fn body(&self) -> &[u8] {
        if self.has_body() { &self.body } else { &[] }
    }

    fn has_body(&self) -> bool {
        !matches!(self.status, 204 | 304)
    }
}

/// An interim answer, whole.
pub(super) fn interim(status: u16) -> Vec<u8> {
    format!("{}\r\n", status_line(status)).into_bytes()
}

/// The body in two chunks and the last one.
pub(super) fn chunks(body: &[u8]) -> Vec<u8> {
    let (front, back) = body.split_at(body.len() / 2);
    let mut bytes = Vec::new();
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
    fn a_header_given_twice_is_not_the_only_one() {
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
    fn json_may_name_utf_8_and_nothing_else() {
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
    fn padding_reaches_the_size_and_stays_json() {
        let mut reply = Reply::json(200, &json!({"resultCode": "0409000"}));
        reply.pad(1000);
        assert_eq!(reply.body.len(), 1000);
        assert_eq!(serde_json::from_slice::<Value>(&reply.body).unwrap()["resultCode"], "0409000");
    }
}
