//! The stored reply: what an outcome keeps of the upstream's reply, so that a call repeated with its idempotency key
//! gets the same answer (deduplication).
//!
//! A long or encoded body is not stored; the outcome then has the result code only.

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use serde::de::Error as _;
use serde::ser::SerializeStruct;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::field_values::is_coding;

/// The longest body that is stored, in bytes.
// Each call with a key writes it into the trail once and holds it in memory for the idempotency window.
const MAX_BODY: usize = 8 * 1024;

/// The longest `Content-Type` that is stored, in bytes.
const MAX_TYPE: usize = 256;

/// A reply that can be given again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredReply {
    /// The HTTP status.
    pub status: u16,
    /// The `Content-Type`, if it had a printable one that is not too long.
    pub content_type: Option<String>,
    /// The body, byte for byte.
    pub body: Bytes,
}

impl StoredReply {
    /// Returns what to store of a reply that was read whole; `None` if it cannot be given again as it is.
    pub fn new(status: StatusCode, headers: &HeaderMap, body: &Bytes) -> Option<Self> {
        // A body in a content coding could be given only to callers that accept this coding, and the repeated call
        // may not.
        if body.len() > MAX_BODY || headers.get_all(header::CONTENT_ENCODING).iter().any(is_coding) {
            return None;
        }
        let content_type = headers.get(header::CONTENT_TYPE).filter(|value| value.len() <= MAX_TYPE);
        Some(Self {
            status: status.as_u16(),
            content_type: content_type.and_then(|value| value.to_str().ok()).map(str::to_owned),
            // A copy: the body is a slice of a read buffer, and would keep all of that buffer.
            body: Bytes::copy_from_slice(body),
        })
    }
}

impl Serialize for StoredReply {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut reply = serializer.serialize_struct("reply", 3)?;
        reply.serialize_field("status", &self.status)?;
        reply.serialize_field("content_type", &self.content_type)?;
        match std::str::from_utf8(&self.body) {
            Ok(text) => reply.serialize_field("body", text)?,
            // A JSON string cannot hold bytes that are not UTF-8. The other name tells a reader which form this is.
            Err(_) => reply.serialize_field("body_bytes", &self.body[..])?,
        }
        reply.end()
    }
}

impl<'de> Deserialize<'de> for StoredReply {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Stored {
            status: u16,
            content_type: Option<String>,
            body: Option<String>,
            body_bytes: Option<Vec<u8>>,
        }
        let Stored { status, content_type, body, body_bytes } = Stored::deserialize(deserializer)?;
        let body =
            body.map(String::into_bytes).or(body_bytes).ok_or_else(|| D::Error::missing_field("body"))?;
        Ok(Self { status, content_type, body: body.into() })
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn stored_reply_is_read_back_byte_for_byte() {
        let headers =
            HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
        // An empty body, one with an escape, one with characters that lines and JSON treat specially, and one that is
        // not UTF-8.
        for body in [&b""[..], b"{\"a\":\"\\u00e9\"}", "é\u{0}\u{2028}\"\\".as_bytes(), b"\xff\x00{"] {
            let reply = StoredReply::new(StatusCode::OK, &headers, &Bytes::copy_from_slice(body)).unwrap();
            let text = serde_json::to_string(&reply).unwrap();
            assert!(!text.contains('\n'), "{text}");
            assert_eq!(serde_json::from_str::<StoredReply>(&text).unwrap(), reply, "{text}");
        }
        assert_eq!(StoredReply::new(StatusCode::OK, &headers, &Bytes::from(vec![b' '; MAX_BODY + 1])), None);
    }
}
