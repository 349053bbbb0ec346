//! systemd's watchdog (`WatchdogSec=`): it is told that all is well only while every worker's event loop goes round, so
//! that a worker that hangs is a restart and not an outage.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, time::interval};

use crate::server::Stop;

/// The beats of all workers.
#[derive(Debug)]
pub(crate) struct Watchdog {
    /// systemd waits for twice as long.
    period: Duration,
    beats: Vec<AtomicU64>,
}

impl Watchdog {
    /// `None`: nobody watches.
    pub(crate) fn from_env(workers: usize) -> Option<Arc<Self>> {
        let period = sd_notify::watchdog_enabled()? / 2;
        Some(Arc::new(Self { period, beats: (0..workers).map(|_| AtomicU64::new(0)).collect() }))
    }

    /// Beats for a worker, as long as its runtime goes round.
    pub(crate) async fn beat(self: Arc<Self>, worker: usize) {
        let mut beats = interval(self.period / 4);
        loop {
            beats.tick().await;
            self.beats[worker].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Tells systemd as long as all workers beat.
    pub(crate) async fn watch(self: Arc<Self>, stop: watch::Receiver<Stop>) {
        let mut looks = interval(self.period);
        let mut seen = self.seen();
        loop {
            looks.tick().await;
            let now = self.seen();
            // A worker that has nothing left to do ends before the others.
            if all_moved(&seen, &now) || *stop.borrow() != Stop::No {
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
            }
            seen = now;
        }
    }

    fn seen(&self) -> Vec<u64> {
        self.beats.iter().map(|beats| beats.load(Ordering::Relaxed)).collect()
    }
}

fn all_moved(before: &[u64], now: &[u64]) -> bool {
    before.iter().zip(now).all(|(before, now)| before != now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_worker_that_hangs_is_enough() {
        assert!(all_moved(&[1, 5], &[2, 9]), "the control");
        assert!(!all_moved(&[1, 5], &[2, 5]));
        assert!(!all_moved(&[1, 5], &[1, 5]));
    }
}
