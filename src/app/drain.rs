//! The stop: in steps, and within `drain_timeout`.

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout_at};

use crate::concurrency::Bounds;
use crate::config;
use crate::server::Stop;

/// Stops, step by step, within `drain_timeout`. Who comes next takes over inherited sockets; nobody does others, so that
/// callers get a grace to look elsewhere.
pub(super) async fn drain(
    server: &config::Server,
    hands_over: bool,
    bounds: &Bounds,
    stopping: &watch::Sender<Stop>,
    alive: mpsc::Sender<()>,
    done: &mut mpsc::Receiver<()>,
) {
    let end = Instant::now() + server.drain_timeout;
    if hands_over || !server.drain_grace.is_zero() {
        bounds.close();
    } else {
        bounds.drain();
    }
    tracing::info!("stopping"); // who reads this may rely on it
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    let _ = stopping.send(Stop::Begins);
    if !hands_over {
        sleep(server.drain_grace).await;
        bounds.drain();
    }
    let _ = stopping.send(Stop::Now);
    drop(alive); // behind the grace, in which others may come yet
    if timeout_at(end, done.recv()).await.is_err() {
        tracing::warn!(
            connections = bounds.connections(),
            in_flight = bounds.in_flight(),
            "drain_timeout is over; what is left is cut off"
        );
    }
}
