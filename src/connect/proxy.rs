//! A tunnel through an HTTP proxy (`CONNECT`, RFC 9110 §9.3.6): the cloud may know the company by the proxy's address.
//!
//! The proxy sees the name and port of the host, and TLS. It is not told who we are: one that wants credentials
//! refuses.

use http::StatusCode;
use thiserror::Error;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::cause::Cause;

/// A proxy has no more to say than this.
const MAX_HEAD: usize = 8 * 1024;

const MAX_HEADERS: usize = 64;

/// Why there is no tunnel.
#[derive(Debug, Error)]
pub enum ProxyError {
    /// It answered, but not with a tunnel.
    #[error("the proxy refuses with status {0}")]
    Refused(StatusCode),
    /// Its answer is not HTTP, too long, or is followed by something.
    #[error("the proxy's answer is not one to CONNECT")]
    NoAnswer,
    /// The connection broke off.
    #[error("the proxy closed the connection: {0}")]
    Closed(#[from] std::io::Error),
}

impl ProxyError {
    /// The word for it.
    pub fn cause(&self) -> Cause {
        match self {
            Self::Refused(_) => Cause::ProxyRefused,
            Self::NoAnswer => Cause::ProxyUnreadable,
            Self::Closed(_) => Cause::ProxyCut,
        }
    }
}

/// Opens a tunnel to `authority`, a host and port.
pub(super) async fn tunnel(stream: &mut TcpStream, authority: &str) -> Result<(), ProxyError> {
    let head = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut answer = Vec::new();
    loop {
        if answer.len() >= MAX_HEAD {
            return Err(ProxyError::NoAnswer);
        }
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(ProxyError::Closed(std::io::ErrorKind::UnexpectedEof.into()));
        }
        match status(&answer)? {
            Some(status) if status.is_success() => return Ok(()),
            Some(status) => return Err(ProxyError::Refused(status)),
            None => {}
        }
    }
}

/// The status of an answer that is whole. Of a tunnel nothing comes behind the head before we speak; what says that it
/// does is no tunnel to the cloud.
pub(crate) fn status(answer: &[u8]) -> Result<Option<StatusCode>, ProxyError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(answer) {
        Ok(httparse::Status::Partial) => Ok(None),
        Ok(httparse::Status::Complete(length)) => {
            let status = response.code.and_then(|code| StatusCode::from_u16(code).ok());
            let status = status.ok_or(ProxyError::NoAnswer)?;
            if status.is_success() && length < answer.len() {
                Err(ProxyError::NoAnswer)
            } else {
                Ok(Some(status))
            }
        }
        Err(_) => Err(ProxyError::NoAnswer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_head_with_nothing_behind_it_is_a_tunnel() {
        let said = |answer: &str| status(answer.as_bytes()).ok().flatten().map(|status| status.as_u16());
        assert_eq!(said("HTTP/1.1 200 Connection established\r\n\r\n"), Some(200));
        assert_eq!(said("HTTP/1.0 200 OK\r\nVia: x\r\n\r\n"), Some(200));
        assert_eq!(
            said("HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 2\r\n\r\nno"),
            Some(407)
        );
        for wrong in ["HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\n\r\nx", "SSH-2.0\r\n\r\n", ""] {
            assert_eq!(said(wrong), None, "{wrong}");
        }
    }
}
