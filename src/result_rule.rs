//! Classifies a reply of the upstream: what became of the task.
//!
//! Decides from the status and the body alone. If the reply is not clear, the outcome is [`Outcome::Unknown`]: the API is not
//! idempotent, so a wrong "not done" would have people assigned twice, and a wrong "done" would lose a task.

use std::borrow::Cow;

use http::StatusCode;

use crate::json::{Abort, Cursor, ValueStart};
use crate::model::outcome::{Outcome, ResultCode};

/// The rule by which the replies of a route are classified.
#[derive(Debug)]
pub struct ResultRule {
    field: String,
    success: Vec<String>,
}

/// A reply of the upstream, as far as it is read when its outcome is decided.
#[derive(Clone, Copy, Debug)]
pub struct ReplyView<'a> {
    /// The HTTP status.
    pub status: StatusCode,
    /// The body, or its first bytes.
    pub body: &'a [u8],
    /// Whether the body has more bytes than `body`.
    pub truncated: bool,
}

/// What a reply means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Classification {
    /// What became of the task.
    pub outcome: Outcome,
    /// The result code, cut at 64 bytes; `None` if there is none, or more than one.
    pub result_code: Option<ResultCode>,
}

impl ResultRule {
    /// A rule: success is a top-level member `field` with one of the values `success`.
    pub fn new(field: &str, success: &[String]) -> Self {
        Self { field: field.to_owned(), success: success.to_vec() }
    }

    /// The name of the member that holds the result code.
    pub fn field(&self) -> &str {
        &self.field
    }

    /// The result code of success; the first one, if there are several.
    pub fn success_code(&self) -> &str {
        self.success.first().map_or("", String::as_str)
    }

    /// Classifies a reply. Not for one that broke off before its end, whose outcome is unknown in any case.
    // The statuses of `Failed` reject a request for its syntax, target or size, so that it was not processed. Those of
    // `Refused` reject the credential or the rate. That they mean "not applied" is this gateway's decision, on RFC 9110,
    // section 15.5.2, and the vendor's page. Any other status may come from a proxy after the service had the request.
    pub fn classify(&self, reply: ReplyView<'_>) -> Classification {
        let plain = |outcome| Classification { outcome, result_code: None };
        match reply.status.as_u16() {
            200 => self.classify_ok(reply),
            400 | 404 | 405 | 411 | 413 | 414 | 415 | 422 | 431 => plain(Outcome::Failed),
            401 | 403 | 418 | 429 => plain(Outcome::Refused),
            // The service reports its own errors as a JSON object. HTML, say, is from something in front of it.
            500 if !reply.truncated && is_object(reply.body) => plain(Outcome::Failed),
            _ => plain(Outcome::Unknown),
        }
    }

    /// Classifies the reply of a 200.
    fn classify_ok(&self, reply: ReplyView<'_>) -> Classification {
        let unknown = Classification { outcome: Outcome::Unknown, result_code: None };
        // Whatever `Content-Encoding` says: a coded body is no JSON object, and a body in clear is read. An upstream that sent
        // `Content-Encoding: Identity` once made every success unknown.
        self.classify_body(reply.body, reply.truncated)
            .or_else(|| self.classify_body(&quote_slip(reply.body, &self.field)?, reply.truncated))
            .unwrap_or(unknown)
    }

    /// What a body means; `None` if it is not a JSON object.
    fn classify_body(&self, body: &[u8], truncated: bool) -> Option<Classification> {
        let mut codes = Codes::default();
        let mut cursor = Cursor::new(body);
        // Of a truncated body an error counts only where a byte that is there causes it. That the end is missing is expected.
        if codes.read(&mut cursor, &self.field).is_err() && !(truncated && cursor.is_cut()) {
            return None;
        }
        let code = codes.only();
        let outcome = match code {
            None | Some(Code::Other) => Outcome::Unknown,
            Some(code) if self.success.iter().any(|success| code.equals(success)) => Outcome::Succeeded,
            Some(_) => Outcome::Failed,
        };
        Some(Classification { outcome, result_code: code.and_then(Code::text) })
    }
}

/// The top-level values of the result field: the first, and whether there are more.
#[derive(Debug, Default)]
struct Codes<'a> {
    first: Option<Code<'a>>,
    more: bool,
}

impl<'a> Codes<'a> {
    /// Reads a whole JSON object.
    // By hand, not by serde: a map would keep the last of several codes in silence, and could not be read up to a cut. A code
    // counts only once something follows it, since a number that is cut is another number.
    fn read(&mut self, cursor: &mut Cursor<'a>, field: &str) -> Result<(), Abort> {
        cursor.skip_space();
        if !matches!(cursor.begins()?, ValueStart::Object) {
            return Err(cursor.abort_at(cursor.position(), "expected an object"));
        }
        let mut more = cursor.open(b'}')?;
        while more {
            cursor.skip_space();
            let is_code = *cursor.key()?.decoded() == *field.as_bytes();
            cursor.colon()?;
            cursor.skip_space();
            let code =
                if is_code { Some(Code::read(cursor)?) } else { cursor.skip_value().map(|()| None)? };
            more = cursor.next(b'}')?;
            if let Some(code) = code {
                self.more = self.first.is_some();
                self.first.get_or_insert(code);
            }
        }
        cursor.end()
    }

    /// The code, if there is exactly one.
    // Which of two codes counts would depend on the parser. Two equal ones are no clear answer either.
    fn only(&self) -> Option<&Code<'a>> {
        self.first.as_ref().filter(|_| !self.more)
    }
}

/// One value of the result field. `Other` is none that could be a code.
#[derive(Debug, PartialEq, Eq)]
enum Code<'a> {
    Text(Cow<'a, [u8]>),
    Number(u64),
    Other,
}

impl<'a> Code<'a> {
    fn read(cursor: &mut Cursor<'a>) -> Result<Self, Abort> {
        Ok(match cursor.begins()? {
            ValueStart::Text => {
                let text = cursor.string()?.decoded();
                // Texts in another encoding (GBK, say) are allowed elsewhere in the reply. A code must be readable.
                let is_text = text.is_ascii() || std::str::from_utf8(&text).is_ok();
                if is_text { Self::Text(text) } else { Self::Other }
            }
            ValueStart::Number => {
                let literal = std::str::from_utf8(cursor.number()?.literal).unwrap_or_default();
                literal.parse().map_or(Self::Other, Self::Number)
            }
            ValueStart::Word | ValueStart::Array | ValueStart::Object => {
                cursor.skip_value().map(|()| Self::Other)?
            }
        })
    }

    /// Whether the value is this success code: a string by its bytes, a number by its value.
    // The vendor's pages show the code as `"0409000"` and as a number, which has no leading zero.
    fn equals(&self, success: &str) -> bool {
        match self {
            Self::Text(text) => **text == *success.as_bytes(),
            Self::Number(number) => success.parse() == Ok(*number),
            Self::Other => false,
        }
    }

    /// The code as text, for the record and for replays.
    fn text(&self) -> Option<ResultCode> {
        match self {
            Self::Text(text) => Some(cut(text)),
            Self::Number(number) => Some(itoa::Buffer::new().format(*number).as_bytes().into()),
            Self::Other => None,
        }
    }
}

/// The body with quotes around the first value of `field`, if that is a number with a leading zero.
// A page of the vendor for a sibling API shows `"resultCode": 0409000` without quotes, which is not JSON. Nothing else is
// repaired: whether the rest is JSON is decided by the parser.
fn quote_slip(body: &[u8], field: &str) -> Option<Vec<u8>> {
    let key = format!("\"{field}\"");
    let after_key = find(body, key.as_bytes())? + key.len();
    let colon = after_key + body[after_key..].iter().position(|b| !b.is_ascii_whitespace())?;
    let rest = body[colon..].strip_prefix(b":")?;
    let start = body.len() - rest.trim_ascii_start().len();
    let digits = body[start..].iter().take_while(|b| b.is_ascii_digit()).count();
    let is_slip = digits > 1 && body[start] == b'0';
    is_slip.then(|| {
        [&body[..start], b"\"", &body[start..start + digits], b"\"", &body[start + digits..]].concat()
    })
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// Whether a body is one whole JSON object.
fn is_object(body: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(body).is_ok()
}

/// The first 64 bytes of a text in UTF-8, or fewer, so that no character is cut.
fn cut(text: &[u8]) -> ResultCode {
    let is_boundary = |at: usize| text.get(at).is_none_or(|byte| byte & 0xc0 != 0x80);
    let end = (0..=text.len().min(64)).rev().find(|at| is_boundary(*at)).unwrap_or_default();
    ResultCode::from_slice(&text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classify(status: u16, body: &str) -> Outcome {
        classification(status, body, false).outcome
    }

    fn classification(status: u16, body: &str, truncated: bool) -> Classification {
        classified(status, body.as_bytes(), truncated)
    }

    fn classify_bytes(body: &[u8], truncated: bool) -> Outcome {
        classified(200, body, truncated).outcome
    }

    fn classified(status: u16, body: &[u8], truncated: bool) -> Classification {
        let rule = ResultRule::new("resultCode", &["0409000".to_owned()]);
        let status = StatusCode::from_u16(status).unwrap();
        rule.classify(ReplyView { status, body, truncated })
    }

    #[test]
    fn status_200_is_classified_by_exactly_one_top_level_result_code() {
        for (body, outcome) in [
            (r#"{"resultCode":"0409000"}"#, Outcome::Succeeded),
            (r#"{"resultDesc":"x","resultCode" : "0409000" }"#, Outcome::Succeeded),
            (r#"{"result\u0043ode":"0409000"}"#, Outcome::Succeeded),
            (r#"{"resultCode":409000}"#, Outcome::Succeeded),
            (r#"{"resultCode": 0409000, "resultDesc":"x"}"#, Outcome::Succeeded),
            (r#"{"resultCode":0409001}"#, Outcome::Failed),
            (r#"{"resultCode":"409000"}"#, Outcome::Failed),
            (r#"{"resultCode":"0409001"}"#, Outcome::Failed),
            (r#"{"resultCode":5}"#, Outcome::Failed),
            (r#"{"resultCode":"0409000","resultCode":"0409001"}"#, Outcome::Unknown),
            // Equal, but whether it is one answer or two that ran into each other is not known.
            (r#"{"resultCode":"0409000","resultCode":"0409000"}"#, Outcome::Unknown),
            (r#"{"data":{"resultCode":"0409000"}}"#, Outcome::Unknown),
            (r#"{"resultCode":null}"#, Outcome::Unknown),
            (r#"{"resultCode":["0409000"]}"#, Outcome::Unknown),
            (r#"[{"resultCode":"0409000"}]"#, Outcome::Unknown),
            (r#"{"resultCode":"0409000"} x"#, Outcome::Unknown),
            (r#"{"resultCode":"0409000""#, Outcome::Unknown),
            ("{}", Outcome::Unknown),
            ("", Outcome::Unknown),
            ("<html>", Outcome::Unknown),
        ] {
            assert_eq!(classify(200, body), outcome, "{body}");
        }
    }

    #[test]
    fn every_status_has_its_documented_outcome() {
        for status in 100..=599 {
            let expected = match status {
                400 | 404 | 405 | 411 | 413 | 414 | 415 | 422 | 431 | 500 => Outcome::Failed,
                401 | 403 | 418 | 429 => Outcome::Refused,
                200 => Outcome::Succeeded,
                _ => Outcome::Unknown,
            };
            assert_eq!(classify(status, r#"{"resultCode":"0409000"}"#), expected, "{status}");
        }
        assert_eq!(classify(500, "<html>"), Outcome::Unknown);
        assert_eq!(classify(500, "[]"), Outcome::Unknown);
    }

    #[test]
    fn long_reply_is_classified_by_its_beginning() {
        assert_eq!(
            classification(200, r#"{"resultCode":"0409000","rows":[1,2"#, true).outcome,
            Outcome::Succeeded
        );
        assert_eq!(
            classification(200, r#"{"resultCode":409000,"rows":[1,2"#, true).outcome,
            Outcome::Succeeded
        );
        for cut in [r#"{"resultCode":409"#, r#"{"resultCode": 0409"#, r#"{"resultCode":"0409"#] {
            assert_eq!(classification(200, cut, true).outcome, Outcome::Unknown, "{cut}");
        }
        assert_eq!(
            classification(200, r#"{"resultCode":0409000,"rows":[1,2"#, true).outcome,
            Outcome::Succeeded
        );
        assert_eq!(classification(200, r#"{"rows":[1,2"#, true).outcome, Outcome::Unknown);
        assert_eq!(
            classification(200, r#"{"resultCode":"0409000","rows":[1,}"#, true).outcome,
            Outcome::Unknown
        );
    }

    #[test]
    fn result_code_counts_wherever_the_reply_is_cut_after_it() {
        let code = r#"{"resultCode":"0409000""#;
        let reply =
            format!(r#"{code},"t":true,"e":"\ud83d\ude00é","n":-1.5e3,"a":[null,{{"b":{{}}}}],"f":false}}"#);
        for end in 0..reply.len() {
            let cut = &reply.as_bytes()[..end];
            let expected = if end <= code.len() { Outcome::Unknown } else { Outcome::Succeeded };
            assert_eq!(classify_bytes(cut, true), expected, "{}", cut.escape_ascii());
            assert_eq!(classify_bytes(cut, false), Outcome::Unknown, "{}", cut.escape_ascii());
        }
        assert_eq!(classify(200, &reply), Outcome::Succeeded);
    }

    #[test]
    fn reply_in_another_encoding_still_yields_its_result_code() {
        // The description is Chinese in GBK. Only the result code must be UTF-8.
        let gbk = b"{\"resultDesc\":\"\xb3\xc9\xb9\xa6\",\"resultCode\":\"0409000\"}";
        assert_eq!(classify_bytes(gbk, false), Outcome::Succeeded);
        let coded = b"{\"resultCode\":\"\xb3\xc9\"}";
        assert_eq!(classify_bytes(coded, false), Outcome::Unknown);
        assert_eq!(classify_bytes(b"{\"resultCode\":\"\\n\xb3\"}", false), Outcome::Unknown);
    }

    #[test]
    fn result_code_is_truncated_between_characters() {
        let long = "é".repeat(40);
        let code = classification(200, &format!(r#"{{"resultCode":"{long}"}}"#), false).result_code.unwrap();
        assert_eq!(code.as_slice(), "é".repeat(32).as_bytes());
    }

    #[test]
    fn content_coded_reply_has_an_unknown_outcome() {
        // gzip, zlib, zstd and Brotli of {"resultCode":"0409000"}. The last two contain the text in clear, and it must not be
        // found there.
        for coded in [
            &b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff\xabV*J-.\xcd)q\xceOIU\xb2R20\xb104P\xaa\x05\x00"[..],
            b"x\x9c\xabV*J-.\xcd)q\xceOIU\xb2R20\xb104P\xaa\x05\x00r\x9c\x07\xb4",
            b"(\xb5/\xfd \x18\xc1\x00\x00{\"resultCode\":\"0409000\"}",
            b"\x0b\x0b\x80{\"resultCode\":\"0409000\"}\x03",
        ] {
            assert_eq!(classify_bytes(coded, false), Outcome::Unknown);
        }
    }
}
