//! What an outcome keeps of the upstream's reply, to be given again to a caller that repeats its call.

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use serde::de::Error as _;
use serde::ser::SerializeStruct;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::field_values::is_coding;

/// A longer body is not kept.
const MAX_BODY: usize = 8 * 1024;

/// A longer `Content-Type` is none.
const MAX_TYPE: usize = 256;

/// A reply as it is given again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredReply {
    /// Its status.
    pub status: u16,
    /// Its `Content-Type`.
    pub content_type: Option<String>,
    /// Its body, byte for byte.
    pub body: Bytes,
}

impl StoredReply {
    /// Of a reply that was read whole, if it can be given again as it is.
    pub fn new(status: StatusCode, headers: &HeaderMap, body: &Bytes) -> Option<Self> {
        if body.len() > MAX_BODY || headers.get_all(header::CONTENT_ENCODING).iter().any(is_coding) {
            return None;
        }
        let content_type = headers.get(header::CONTENT_TYPE).filter(|value| value.len() <= MAX_TYPE);
        Some(Self {
            status: status.as_u16(),
            content_type: content_type.and_then(|value| value.to_str().ok()).map(str::to_owned),
            // A piece of a read buffer would keep all of it.
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
            // Not UTF-8, which JSON cannot hold.
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
    fn a_reply_is_read_back_byte_for_byte() {
        let headers =
            HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
        for body in [&b""[..], b"{\"a\":\"\\u00e9\"}", "é\u{0}\u{2028}\"\\".as_bytes(), b"\xff\x00{"] {
            let reply = StoredReply::new(StatusCode::OK, &headers, &Bytes::copy_from_slice(body)).unwrap();
            let text = serde_json::to_string(&reply).unwrap();
            assert!(!text.contains('\n'), "{text}");
            assert_eq!(serde_json::from_str::<StoredReply>(&text).unwrap(), reply, "{text}");
        }
        assert_eq!(StoredReply::new(StatusCode::OK, &headers, &Bytes::from(vec![b' '; MAX_BODY + 1])), None);
    }
}
