//! A tunnel through an HTTP proxy (`CONNECT`, RFC 9110, section 9.3.6).
//!
//! The cloud may have the proxy's address on its allow list, and not the gateway's. The proxy sees the name and port of the
//! host, and TLS. If a user and password are configured, the first request already has them, since `Basic` needs no challenge.
//! They cross the network between gateway and proxy in clear text: TLS to the proxy itself is not implemented.

use std::io;
use std::time::Duration;

use http::StatusCode;
use httparse::{EMPTY_HEADER, Header, ParserConfig, Response, Status};
use memchr::memchr_iter;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::login::{Basic, Leave};
use crate::model::cause::Cause;

/// The longest answer that is read, in bytes: all interim heads (RFC 9110, section 15.2) and the final one together.
// This bound and the next are those of the upstream's replies.
const MAX_ANSWER: usize = 64 * 1024;

/// The most header fields of one head.
const MAX_FIELDS: usize = 256;

/// How long the first connection with an unproven password waits for the proxy's answer. Some proxies delay a refusal by seconds.
const LATEST: Duration = Duration::from_secs(30);

/// The first bytes of every answer.
const HTTP: &[u8] = b"HTTP/1.";

/// Why there is no tunnel. The text quotes nothing that the proxy sent.
#[derive(Debug, Error)]
pub enum TunnelError {
    /// The proxy answered with another status.
    #[error("the proxy refuses with status {0}")]
    Refused(StatusCode),
    /// The proxy wants credentials, and none are configured.
    #[error(
        "the proxy wants credentials (status 407): name the files of a user and a password in [upstream] \
         proxy_user_file and proxy_password_file"
    )]
    NoLogin,
    /// The proxy refuses the user and password.
    #[error(
        "the proxy refuses the user and password of proxy_user_file and proxy_password_file (status 407): put those that \
         it accepts into these files; they are read again when they change"
    )]
    WrongLogin,
    /// The proxy wants credentials by another scheme than `Basic`.
    #[error(
        "the proxy wants credentials (status 407), but not by Basic (RFC 7617), the only scheme that the gateway \
         has: let the proxy offer Basic, or let the gateway's address pass without credentials"
    )]
    NotBasic,
    /// The proxy did not answer twice in a row, which may be its refusal.
    #[error(
        "twice in a row the proxy did not answer when it was sent the user and password of proxy_user_file and \
         proxy_password_file, which counts as a refusal: they are not sent again for a while. Check whether they are \
         right, and look into the proxy's log"
    )]
    Unanswered,
    /// The answer is not HTTP, or a success is followed by bytes.
    #[error("the proxy's answer is not a valid answer to CONNECT")]
    NoAnswer,
    /// The answer is longer than the bound.
    #[error("the proxy's answer is longer than {} KiB", MAX_ANSWER / 1024)]
    TooLong,
    /// A head of the answer has more fields than the bound.
    #[error("the proxy's answer has more than {MAX_FIELDS} header fields")]
    TooManyFields,
    /// The connection to the proxy broke.
    #[error("the proxy closed the connection: {0}")]
    Closed(#[from] io::Error),
}

impl TunnelError {
    /// Returns the cause for metrics, audit and callers.
    pub fn cause(&self) -> Cause {
        match self {
            Self::Refused(_) => Cause::ProxyRefused,
            Self::NoLogin | Self::WrongLogin | Self::NotBasic | Self::Unanswered => Cause::ProxyCredentials,
            Self::NoAnswer | Self::TooLong | Self::TooManyFields => Cause::ProxyUnreadable,
            Self::Closed(_) => Cause::ProxyCut,
        }
    }
}

/// Opens a tunnel to `authority`, a host and port, through a connection to the proxy, and returns that connection.
///
/// Cancellation: a connection that has the turn goes on in a task of its own if this future is dropped. Its answer counts
/// however late it is, since otherwise the next connection would send a refused password again.
pub(super) async fn tunnel(
    stream: TcpStream,
    authority: &str,
    leave: Option<Leave>,
) -> Result<TcpStream, TunnelError> {
    let request = request(authority, leave.as_ref().map(|leave| &*leave.login));
    let Some(Leave { login, turn }) = leave else {
        let (stream, head) = ask(stream, &request).await?;
        return match head.status {
            // Any 2xx (RFC 9110, section 9.3.6).
            status if status.is_success() => Ok(stream),
            StatusCode::PROXY_AUTHENTICATION_REQUIRED if head.takes_basic => Err(TunnelError::NoLogin),
            StatusCode::PROXY_AUTHENTICATION_REQUIRED => Err(TunnelError::NotBasic),
            status => Err(TunnelError::Refused(status)),
        };
    };
    let Some(turn) = turn else { return record_result(&login, ask(stream, &request).await) };
    // No other connection may send an unproven password before the answer, so the task holds the turn, even if this future is
    // dropped. If it has been accepted before, a late answer is more likely the fault of the host behind the proxy. Connections
    // to another host must not wait for that, so this future holds the turn.
    let (held_here, held_there) = if login.is_proven() { (Some(turn), None) } else { (None, Some(turn)) };
    let asking = tokio::spawn(async move {
        let asked = timeout(LATEST, ask(stream, &request)).await;
        let opened = record_result(
            &login,
            asked.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into())),
        );
        drop(held_there);
        opened
    });
    let opened = asking.await.unwrap_or_else(|error| Err(io::Error::other(error).into()));
    drop(held_here);
    opened
}

/// Records what the result of a request says about its user and password, and returns the tunnel.
// A 5xx is the proxy's own error, or that of the host behind it, so it has accepted them. Other statuses, such as 403, leave it
// open: a proxy may refuse a host before it checks who asks.
fn record_result(
    login: &Basic,
    asked: Result<(TcpStream, Head), TunnelError>,
) -> Result<TcpStream, TunnelError> {
    let (stream, head) = asked.inspect_err(|_| login.unanswered())?;
    match head.status {
        StatusCode::PROXY_AUTHENTICATION_REQUIRED => return Err(login.refused(head.takes_basic)),
        status if status.is_success() || status.is_server_error() => login.taken(),
        _ => {}
    }
    if head.status.is_success() { Ok(stream) } else { Err(TunnelError::Refused(head.status)) }
}

/// Sends a request and reads the final head of its answer.
async fn ask(mut stream: TcpStream, request: &[u8]) -> Result<(TcpStream, Head), TunnelError> {
    stream.write_all(request).await?;
    let mut answer = Vec::new();
    loop {
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(TunnelError::Closed(io::ErrorKind::UnexpectedEof.into()));
        }
        if let Some(head) = final_head(&answer)? {
            return Ok((stream, head));
        }
    }
}

/// Returns the CONNECT request, in a buffer that is overwritten on drop, since it may hold a password.
fn request(authority: &str, login: Option<&Basic>) -> Zeroizing<Vec<u8>> {
    let authority = authority.as_bytes();
    let [name, login, end] = match login {
        Some(login) => [b"Proxy-Authorization: Basic ".as_slice(), login.encoded(), b"\r\n"],
        None => [b"".as_slice(); 3],
    };
    // Joined in one step: a buffer that grows would leave copies of the password in freed memory.
    let parts =
        [b"CONNECT ", authority, b" HTTP/1.1\r\nHost: ", authority, b"\r\n", name, login, end, b"\r\n"];
    Zeroizing::new(parts.concat())
}

/// A complete head of an answer.
pub(crate) struct Head {
    pub(crate) status: StatusCode,
    length: usize,
    /// Whether there is no challenge, or one of them is `Basic`.
    takes_basic: bool,
}

/// Returns the final head of an answer, behind all interim ones; `None` until it is complete. Fails if the answer is not HTTP, or
/// exceeds a bound, or if bytes follow a success.
pub(crate) fn final_head(answer: &[u8]) -> Result<Option<Head>, TunnelError> {
    let mut rest = &answer[..answer.len().min(MAX_ANSWER)];
    while let Some(head) = whole_head(rest)? {
        rest = &rest[head.length..];
        // 101 is a final answer, and one that nobody asked for.
        let is_interim = head.status.is_informational() && head.status != StatusCode::SWITCHING_PROTOCOLS;
        if is_interim {
            continue;
        }
        // In TLS the client speaks first. Bytes behind a success are not from the cloud, and must not be taken for its handshake.
        let is_followed = !rest.is_empty() || answer.len() > MAX_ANSWER;
        return if head.status.is_success() && is_followed {
            Err(TunnelError::NoAnswer)
        } else {
            Ok(Some(head))
        };
    }
    if answer.len() >= MAX_ANSWER { Err(TunnelError::TooLong) } else { Ok(None) }
}

/// Returns the first head of an answer; `None` while it is incomplete.
// Each read parses the whole answer again, which is simpler than keeping a parser's state. An answer is short as a rule, and
// bounded.
fn whole_head(answer: &[u8]) -> Result<Option<Head>, TunnelError> {
    // Checked before the head is complete: something that is not HTTP may never send an empty line.
    if !answer.starts_with(HTTP) {
        return if HTTP.starts_with(answer) { Ok(None) } else { Err(TunnelError::NoAnswer) };
    }
    let Some(length) = end_of_head(answer) else { return Ok(None) };
    let mut fields = [EMPTY_HEADER; MAX_FIELDS];
    let mut response = Response::new(&mut fields);
    let mut parser = ParserConfig::default();
    // As for replies of the upstream: some proxies write `Via : x`.
    parser.allow_spaces_after_header_name_in_responses(true);
    match parser.parse_response(&mut response, &answer[..length]) {
        Ok(Status::Complete(_)) => {}
        Ok(Status::Partial) => return Err(TunnelError::NoAnswer),
        Err(httparse::Error::TooManyHeaders) => return Err(TunnelError::TooManyFields),
        Err(_) => return Err(TunnelError::NoAnswer),
    }
    let status =
        response.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or(TunnelError::NoAnswer)?;
    Ok(Some(Head { status, length, takes_basic: takes_basic(response.headers) }))
}

/// Returns the length of the first head: the place behind the first empty line.
// A line may end with LF alone (RFC 9112, section 2.2).
fn end_of_head(answer: &[u8]) -> Option<usize> {
    memchr_iter(b'\n', answer).find_map(|line| match &answer[line + 1..] {
        [b'\n', ..] => Some(line + 2),
        [b'\r', b'\n', ..] => Some(line + 3),
        _ => None,
    })
}

/// Whether one of the challenges (RFC 9110, section 11.7.1) is `Basic`, or there is none.
// A comma within a quoted parameter splits, too. A wrong result changes only the text of the error: both kinds hold the
// password back.
fn takes_basic(fields: &[Header<'_>]) -> bool {
    let mut challenges =
        fields.iter().filter(|field| field.name.eq_ignore_ascii_case("proxy-authenticate")).peekable();
    challenges.peek().is_none()
        || challenges.any(|field| field.value.split(|byte| *byte == b',').any(is_basic))
}

fn is_basic(challenge: &[u8]) -> bool {
    let scheme = challenge.trim_ascii_start().split(u8::is_ascii_whitespace).next();
    scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"basic"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(answer: &str) -> Option<u16> {
        final_head(answer.as_bytes()).ok().flatten().map(|head| head.status.as_u16())
    }

    #[test]
    fn tunnel_requires_a_complete_head_without_trailing_bytes() {
        assert_eq!(said("HTTP/1.1 200 Connection established\r\n\r\n"), Some(200));
        assert_eq!(said("HTTP/1.0 200 OK\r\nVia: x\r\n\r\n"), Some(200));
        assert_eq!(said("HTTP/1.1 200 OK\nVia : x\n\n"), Some(200));
        assert_eq!(
            said("HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 2\r\n\r\nno"),
            Some(407)
        );
        // Incomplete, followed by a byte, not HTTP, and empty.
        for wrong in ["HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\n\r\nx", "SSH-2.0\r\n\r\n", ""] {
            assert_eq!(said(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn only_interim_heads_are_skipped() {
        let interim = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n";
        assert_eq!(said(interim), None);
        assert_eq!(said(&format!("{interim}HTTP/1.1 200 OK\r\n\r\n")), Some(200));
        assert_eq!(said(&format!("{interim}HTTP/1.1 403 No\r\n\r\n")), Some(403));
        assert_eq!(said(&format!("{interim}HTTP/1.1 200 OK\r\n\r\nx")), None);
        assert_eq!(said("HTTP/1.1 101 Switching Protocols\r\n\r\n"), Some(101), "nobody asked for that");
    }

    #[test]
    fn oversized_proxy_response_is_rejected_with_the_exceeded_limit() {
        let long = |length: usize| {
            let empty = "HTTP/1.1 200 OK\r\nx: \r\n\r\n";
            empty.replace("x: ", &format!("x: {}", "y".repeat(length - empty.len())))
        };
        let many = |count| format!("HTTP/1.1 200 OK\r\n{}\r\n", "x: y\r\n".repeat(count));
        let error = |answer: &str| final_head(answer.as_bytes()).err().map(|error| error.to_string());
        for good in [long(64 * 1024), many(256)] {
            assert_eq!(said(&good), Some(200));
        }
        for (bad, told) in [
            (long(64 * 1024 + 1), "longer than 64 KiB"),
            ("HTTP/1.1 100 Continue\r\n\r\n".repeat(3000), "longer than 64 KiB"),
            (many(257), "more than 256 header fields"),
        ] {
            let error = error(&bad).unwrap();
            assert!(error.contains(told), "{error}");
        }
        // A refusal may have a body of any length, which is not read.
        assert_eq!(said(&format!("HTTP/1.1 403 No\r\n\r\n{}", "x".repeat(1 << 17))), Some(403));
    }

    #[test]
    fn proxy_challenges_show_whether_basic_is_supported() {
        let takes = |fields: &str| {
            let answer = format!("HTTP/1.1 407 No\r\n{fields}\r\n");
            final_head(answer.as_bytes()).unwrap().unwrap().takes_basic
        };
        for basic in [
            "",
            "Proxy-Authenticate: Basic realm=\"x\"\r\n",
            "proxy-authenticate: basic\r\n",
            "proxy-authenticate: Negotiate, Basic realm=\"x\"\r\n",
            "proxy-authenticate: NTLM\r\nproxy-authenticate: BASIC realm=x\r\n",
        ] {
            assert!(takes(basic), "{basic}");
        }
        for other in ["proxy-authenticate: NTLM\r\n", "proxy-authenticate: Digest realm=\"basic\"\r\n"] {
            assert!(!takes(other), "{other}");
        }
    }
}
