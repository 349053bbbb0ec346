//! The TLS handshake of a caller: its deadline, the answer to plain HTTP, and the report of a failure.
//!
//! Guarantees that a handshake holds a connection no longer than `header_timeout` (the answer to plain HTTP: a second
//! more), and that each failure is counted and reported to operators. A probe that connects and closes is no failure.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_rustls::server::TlsStream;

use super::Lifecycle;
use super::connection::{LINGER_BYTES, LINGER_TIME, STOP_HEADER};
use super::tls::{Certificate, NotAccepted, Tls};
use crate::concurrency::Unproven;
use crate::metrics::Metrics;
use crate::model::cause::Cause;
use crate::model::peer::Peer;
use crate::reason::Reason;

/// The reply to plain HTTP on a TLS port. It was no request to the gateway, so it has no request id and no record.
const PLAIN_HTTP: &str = "HTTP/1.1 400 Bad Request\r\n\
    content-type: text/plain\r\n\
    content-length: 61\r\n\
    connection: close\r\n\
    x-gateway-outcome: not_sent\r\n\
    x-gateway-retry: after-correction\r\n\
    \r\n\
    This port speaks TLS, and this was plain HTTP: use https://.\n";

/// Why a handshake did not complete.
#[derive(Debug, Error)]
pub(super) enum NoTls {
    /// A newer one took its place.
    #[error("a newer handshake took its place")]
    Displaced,
    #[error("the handshake did not end in time")]
    /// It exceeded its deadline.
    Late,
    /// The peer closed or reset the connection before it had said anything, as a probe does.
    #[error("the caller sent nothing")]
    Silent,
    #[error("the caller sent no TLS, but what looks like plain HTTP, or a line of the PROXY protocol")]
    /// The first byte is that of an HTTP method, or of the PROXY protocol.
    Plain,
    /// The connection failed before the handshake.
    #[error(transparent)]
    Broken(#[from] io::Error),
    /// The handshake failed: by what the peer sent, or by its connection.
    #[error(transparent)]
    Failed(#[from] NotAccepted),
}

impl NoTls {
    /// Counts the failure, and reports it to operators if they can repair its cause.
    #[cold]
    pub(super) fn report(&self, peer: Peer, metrics: &Metrics) {
        let (cause, names) = match self {
            // Only a handshake that we displaced counts here: operators read this label as a flood.
            Self::Displaced => return metrics.connection_closed("too_many_handshakes"),
            Self::Silent => return metrics.connection_closed("tls_failed"),
            Self::Late => (Cause::Timeout, None),
            Self::Plain => (Cause::TlsProtocol, None),
            Self::Broken(error) => (Cause::of_io(error), None),
            Self::Failed(failed) => (Cause::of_io(&failed.error), failed.names.as_deref()),
        };
        metrics.connection_closed("tls_failed");
        let said = names.map(|names| match names {
            [] => format!("{self}; the caller's certificate has no SPIFFE ID and no DNS name"),
            names => format!("{self}; the caller's certificate has the names {names:?}"),
        });
        let reason = Reason::new(cause, said.unwrap_or_else(|| self.to_string()));
        if let Some((error, times)) = metrics.caller_tls.failed(&reason, []) {
            tracing::warn!(%cause, %peer, error, times, "a caller's TLS handshake failed");
        }
        // Handshakes are independent, so a failure counts as over at once. Otherwise `/status` would show it
        // for good.
        metrics.caller_tls.succeeded();
    }
}

/// Performs the handshake, within `header` nanoseconds, or within a second once the gateway stops.
///
/// `unproven` is the place of a handshake that asks for a certificate; the handshake ends if a newer one takes it.
///
/// # Errors
///
/// Returns a [`NoTls`]. The connection is closed then.
pub(super) async fn shake_hands(
    tls: &Arc<Tls>,
    stream: TcpStream,
    header: u64,
    mut stop: watch::Receiver<Lifecycle>,
    mut unproven: Option<Unproven>,
) -> Result<(Box<TlsStream<TcpStream>>, Option<Certificate>), NoTls> {
    let displaced = async {
        match &mut unproven {
            Some(unproven) => unproven.displaced().await,
            None => std::future::pending().await,
        }
    };
    let late = async {
        tokio::select! {
            () = sleep(Duration::from_nanos(header)) => {}
            () = async {
                let _ = stop.wait_for(|stop| *stop == Lifecycle::Stopping).await;
                sleep(Duration::from_nanos(STOP_HEADER)).await;
            } => {}
        }
    };
    let accepted = tokio::select! {
        // A handshake that is complete counts, even if its deadline has come in the same turn.
        biased;
        accepted = accept(tls, stream) => accepted?,
        () = late => return Err(NoTls::Late),
        () = displaced => return Err(NoTls::Displaced),
    };
    match accepted {
        Accepted::Tls(stream, certificate) => Ok((stream, certificate)),
        Accepted::Plain(stream) => {
            // Outside the deadline of the handshake, which would report a client that reads slowly as a time-out.
            let _ = timeout(LINGER_TIME, refuse_plain_http(stream)).await;
            Err(NoTls::Plain)
        }
    }
}

/// What the peer of a connection speaks.
enum Accepted {
    Tls(Box<TlsStream<TcpStream>>, Option<Certificate>),
    /// Plain HTTP. Nothing of it was read.
    Plain(TcpStream),
}

/// Tells TLS from plain HTTP by the first byte, and completes the handshake if it is TLS.
async fn accept(tls: &Arc<Tls>, stream: TcpStream) -> Result<Accepted, NoTls> {
    // Peeked, since rustls must see the whole stream.
    let mut first = [0];
    match stream.peek(&mut first).await {
        Ok(0) => Err(NoTls::Silent),
        // A load balancer's probe often ends by a reset. Reported as a failure it would fill the log.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(NoTls::Silent),
        Err(error) => Err(error.into()),
        // No TLS record begins with a letter (RFC 8446 §5.1), and methods of HTTP do.
        Ok(_) if first[0].is_ascii_uppercase() => Ok(Accepted::Plain(stream)),
        Ok(_) => {
            let (stream, certificate) = tls.accept(stream).await?;
            Ok(Accepted::Tls(Box::new(stream), certificate))
        }
    }
}

/// Sends the reply, then reads what the peer still sends. A socket that is closed with unread bytes sends a reset,
/// which may overtake the reply.
async fn refuse_plain_http(mut stream: TcpStream) -> io::Result<()> {
    stream.write_all(PLAIN_HTTP.as_bytes()).await?;
    stream.shutdown().await?;
    let mut rest = stream.take(LINGER_BYTES as u64);
    tokio::io::copy(&mut rest, &mut tokio::io::sink()).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The length is part of a literal. It was one too small once, and clients lost the last byte.
    #[test]
    fn reply_to_plain_http_on_a_tls_port_states_its_length() {
        let (head, body) = PLAIN_HTTP.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}", body.len())), "{}", body.len());
    }
}
