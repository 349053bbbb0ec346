//! Opens connections for the pool.
//!
//! Dials, performs the HTTP/1.1 or HTTP/2 handshake, as the upstream picked by ALPN, and counts the attempt by its
//! result.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::{Connection, Counted, NoConnection, Pool, ResultLabel, Transport};
use crate::connect;
use crate::connect::Stream;
use crate::model::cause::Cause;
use crate::reason::Reason;
use crate::upstream::http2;
use crate::upstream::http2::Received;

impl Pool {
    /// Opens a connection, which holds `permit` from then on. Returns an HTTP/1.1 connection, or the first stream of an
    /// HTTP/2 connection, which other exchanges can use at once.
    ///
    /// # Errors
    ///
    /// [`NoConnection::Failed`] with the cause. The permit is then returned.
    pub(super) async fn connect(&self, permit: OwnedSemaphorePermit) -> Result<Transport, NoConnection> {
        let opened = self.open(permit).await;
        let result = opened.as_ref().map_or_else(|reason| reason.cause.as_str(), |_| "ok");
        self.metrics.connects.get_or_create(&ResultLabel { result }).inc();
        Ok(opened?)
    }

    async fn open(&self, permit: OwnedSemaphorePermit) -> Result<Transport, Reason> {
        let (stream, generation) = self.connector.connect_under().await?;
        match &self.http2 {
            Some(http2) if stream.is_http2() => {
                // The connector's time-out ends with the TLS handshake. An upstream that accepts the connection and
                // sends no SETTINGS would delay all requests that wait for this attempt.
                let opened = timeout(self.wait, self.greet_http2(stream, generation, permit)).await;
                let late =
                    |_| Reason::new(Cause::Timeout, "the upstream did not send its HTTP/2 settings in time");
                let connection = Arc::new(opened.map_err(late)??);
                // Taken before others see the connection, so that it cannot be full. `None` means that the upstream
                // announced a limit of 0.
                let stream = connection.stream().ok_or_else(|| {
                    let why = "the upstream allows no request on a new HTTP/2 connection";
                    Reason::new(Cause::NotProcessed, why)
                })?;
                // After the greeting, not after ALPN, so that an attempt which fails changes nothing for the next
                // one.
                http2.negotiated(true);
                http2.add(connection);
                Ok(Transport::Http2(stream))
            }
            _ => {
                let connection = self.greet_http1(stream, generation).await?;
                if let Some(http2) = &self.http2 {
                    http2.negotiated(false);
                }
                Ok(Transport::Http1(connection, permit))
            }
        }
    }

    async fn greet_http1(&self, stream: Stream, generation: u64) -> Result<Connection, Reason> {
        // hyper takes the stream, so the socket is duplicated before.
        let probe = probe(&stream)?;
        let io = Counted::new(stream, None, self.metrics.open.clone());
        let written = io.written.clone();
        let greeted = connect::http1().handshake(TokioIo::new(io)).await;
        let (sender, connection) = greeted.map_err(|error| Reason::of_exchange(&error))?;
        let task = tokio::spawn(async move {
            // At debug level: an exchange on the connection reports its own error, and an idle connection may end at
            // any time.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "upstream connection ended");
            }
        });
        Ok(Connection { sender, task: task.abort_handle(), written, probe, generation })
    }

    async fn greet_http2(
        &self,
        stream: Stream,
        generation: u64,
        permit: OwnedSemaphorePermit,
    ) -> Result<http2::Connection, Reason> {
        let (received, probe) = (Received::default(), probe(&stream)?);
        let reads = received.reads();
        let io = Counted::new(stream, Some(received), self.metrics.open.clone());
        let opened = http2::Connection::open(io, reads, (probe, generation), permit, self.wait).await;
        opened.map_err(|error| Reason::of_exchange(&error))
    }
}

/// Duplicates the socket's descriptor, to ask the kernel later what has arrived on it.
fn probe(stream: &Stream) -> Result<OwnedFd, Reason> {
    let probe = stream.socket().as_fd().try_clone_to_owned();
    probe.map_err(|error| Reason::new(Cause::of_io(&error), error))
}
