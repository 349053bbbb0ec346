//! A caller's TLS handshake: its deadline, and what is told of one that fails.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_rustls::server::TlsStream;

use super::Stop;
use super::connection::{LINGER_BYTES, LINGER_TIME, STOP_HEADER};
use super::tls::{Certificate, NotAccepted, Tls};
use crate::concurrency::Unproven;
use crate::metrics::Metrics;
use crate::model::cause::Cause;
use crate::model::peer::Peer;
use crate::reason::Reason;

/// What a caller gets that speaks HTTP without TLS. It was no request to us, and it cannot be one.
const PLAIN_HTTP: &str = "HTTP/1.1 400 Bad Request\r\n\
    content-type: text/plain\r\n\
    content-length: 61\r\n\
    connection: close\r\n\
    x-gateway-outcome: not_sent\r\n\
    x-gateway-retry: after-correction\r\n\
    \r\n\
    This port speaks TLS, and this was plain HTTP: use https://.\n";

/// Why a handshake came to no end.
#[derive(Debug, Error)]
pub(super) enum NoTls {
    /// A newer one took its place.
    #[error("a newer handshake took its place")]
    Displaced,
    #[error("the handshake was not over in time")]
    Late,
    /// The peer closed or reset the connection before it had said anything, as a probe does.
    #[error("the caller said nothing")]
    Silent,
    #[error("no TLS, but what looks like plain HTTP, or a line of the PROXY protocol")]
    Plain,
    /// The connection.
    #[error(transparent)]
    Broken(#[from] io::Error),
    /// The peer, or what it sent.
    #[error(transparent)]
    Failed(#[from] NotAccepted),
}

impl NoTls {
    /// Counts it, and tells operators what they can mend.
    #[cold]
    pub(super) fn tell(&self, peer: Peer, metrics: &Metrics) {
        let (cause, names) = match self {
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
        metrics.caller_tls.succeeded(); // it is over at once: the next one is another matter
    }
}

/// Who stops or is over a cap gives a handshake no longer than a head.
pub(super) async fn shake_hands(
    tls: &Arc<Tls>,
    stream: TcpStream,
    header: u64,
    mut stop: watch::Receiver<Stop>,
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
                let _ = stop.wait_for(|stop| *stop == Stop::Now).await;
                sleep(Duration::from_nanos(STOP_HEADER)).await;
            } => {}
        }
    };
    let accepted = tokio::select! {
        biased;
        accepted = accept(tls, stream) => accepted?,
        () = late => return Err(NoTls::Late),
        () = displaced => return Err(NoTls::Displaced),
    };
    match accepted {
        Accepted::Tls(stream, certificate) => Ok((stream, certificate)),
        Accepted::Plain(stream) => {
            let _ = timeout(LINGER_TIME, refuse_plain_http(stream)).await;
            Err(NoTls::Plain)
        }
    }
}

/// What a connection turned out to be.
enum Accepted {
    Tls(Box<TlsStream<TcpStream>>, Option<Certificate>),
    /// Plain HTTP, of which nothing is read.
    Plain(TcpStream),
}

async fn accept(tls: &Arc<Tls>, stream: TcpStream) -> Result<Accepted, NoTls> {
    let mut first = [0];
    match stream.peek(&mut first).await {
        Ok(0) => Err(NoTls::Silent),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(NoTls::Silent),
        Err(error) => Err(error.into()),
        // No TLS record begins with a letter (RFC 8446, section 5.1), and the methods of HTTP do.
        Ok(_) if first[0].is_ascii_uppercase() => Ok(Accepted::Plain(stream)),
        Ok(_) => {
            let (stream, certificate) = tls.accept(stream).await?;
            Ok(Accepted::Tls(Box::new(stream), certificate))
        }
    }
}

/// Answers, and reads what the caller still sends, so that no reset takes the answer away.
async fn refuse_plain_http(mut stream: TcpStream) -> io::Result<()> {
    stream.write_all(PLAIN_HTTP.as_bytes()).await?;
    stream.shutdown().await?;
    let mut rest = stream.take(LINGER_BYTES as u64);
    tokio::io::copy(&mut rest, &mut tokio::io::sink()).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_to_plain_http_states_its_length() {
        let (head, body) = PLAIN_HTTP.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}", body.len())), "{}", body.len());
    }
}
