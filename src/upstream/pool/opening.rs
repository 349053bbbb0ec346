//! Opens connections.
//!
//! Connects, does the handshake of the protocol that the upstream picked, and counts the attempt by its result.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::{Connection, Counted, NoConnection, Place, Pool, ResultLabel};
use crate::connect;
use crate::connect::Stream;
use crate::model::cause::Cause;
use crate::reason::Reason;
use crate::upstream::http2;
use crate::upstream::http2::Received;

impl Pool {
    /// Opens a connection; one of HTTP/2 is shared, and gives a stream.
    pub(super) async fn connect(&self, permit: OwnedSemaphorePermit) -> Result<Place, NoConnection> {
        let opened = self.open(permit).await;
        let result = opened.as_ref().map_or_else(|reason| reason.cause.as_str(), |_| "ok");
        self.metrics.connects.get_or_create(&ResultLabel { result }).inc();
        Ok(opened?)
    }

    async fn open(&self, permit: OwnedSemaphorePermit) -> Result<Place, Reason> {
        let (stream, generation) = self.connector.connect_under().await?;
        match &self.http2 {
            Some(http2) if stream.is_http2() => {
                let opened = timeout(self.wait, self.greet_http2(stream, generation, permit)).await;
                let late = |_| Reason::new(Cause::Timeout, "the upstream did not greet over HTTP/2 in time");
                let connection = Arc::new(opened.map_err(late)??);
                let stream = connection.stream().ok_or_else(|| {
                    let why = "the upstream allows no request on a new HTTP/2 connection";
                    Reason::new(Cause::NotProcessed, why)
                })?;
                http2.picked(true);
                http2.add(connection);
                Ok(Place::Http2(stream))
            }
            _ => {
                let connection = self.greet_http1(stream, generation).await?;
                if let Some(http2) = &self.http2 {
                    http2.picked(false);
                }
                Ok(Place::Http1(connection, permit))
            }
        }
    }

    async fn greet_http1(&self, stream: Stream, generation: u64) -> Result<Connection, Reason> {
        let probe = probe(&stream)?;
        let io = Counted::new(stream, None, self.metrics.open.clone());
        let written = io.written.clone();
        let greeted = connect::http1().handshake(TokioIo::new(io)).await;
        let (sender, connection) = greeted.map_err(|error| Reason::of_exchange(&error))?;
        let task = tokio::spawn(async move {
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

fn probe(stream: &Stream) -> Result<OwnedFd, Reason> {
    let probe = stream.socket().as_fd().try_clone_to_owned();
    probe.map_err(|error| Reason::new(Cause::of_io(&error), error))
}
