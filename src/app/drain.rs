//! The stop: a graceful shutdown in steps, within `drain_timeout`.
//!
//! Guarantees that a request which has begun is not cut off before `drain_timeout`, and that no step waits beyond it.

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout_at};

use crate::concurrency::Limits;
use crate::config;
use crate::server::Lifecycle;

/// Stops, step by step: the grace, then no new connections, then the wait until every connection and request has
/// ended. Returns after `drain_timeout` at the latest.
///
/// `hands_over` says that all sockets are inherited. The next process then takes over the connections that wait, and
/// there is no grace; otherwise callers get `drain_grace` to find another gateway.
pub(super) async fn drain(
    server: &config::Server,
    hands_over: bool,
    limits: &Limits,
    stopping: &watch::Sender<Lifecycle>,
    alive: mpsc::Sender<()>,
    done: &mut mpsc::Receiver<()>,
) {
    let end = Instant::now() + server.drain_timeout;
    // With inherited sockets, too: requests on open connections are still served, each as the last one.
    if hands_over || !server.drain_grace.is_zero() {
        limits.close();
    } else {
        limits.drain();
    }
    // Logged after the bounds have changed: whoever reads the line may rely on it.
    tracing::info!("shutdown started");
    // Fails without systemd, which is no error.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    // After `close`, so that a worker which sees the step also marks its replies as the last ones.
    let _ = stopping.send(Lifecycle::Draining);
    if !hands_over {
        sleep(server.drain_grace).await;
        limits.drain();
    }
    let _ = stopping.send(Lifecycle::Stopping);
    // After the grace, in which new connections still take an `InFlightPermit`. From here on the last one ends `done`.
    drop(alive);
    if timeout_at(end, done.recv()).await.is_err() {
        tracing::warn!(
            connections = limits.connections(),
            in_flight = limits.in_flight(),
            "drain_timeout has passed; the remaining connections and requests are cut off"
        );
    }
}
