//! Whether every event loop goes round: that of each worker, and the one behind them. `/livez` says it, and systemd's watchdog
//! (`WatchdogSec=`) is told, so that a loop that hangs is a restart and not an outage.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::interval;

use crate::clock;
use crate::server::Stop;

/// A loop that has not turned for so long hangs.
const HANGS: Duration = Duration::from_secs(10);

/// How often a loop says that it turns, at least.
const BEAT: Duration = Duration::from_secs(1);

/// The beats of all loops.
#[derive(Debug)]
pub(crate) struct Watchdog {
    /// systemd waits for twice as long. `None`: it does not watch.
    period: Option<Duration>,
    /// When each loop turned last, as [`clock::nanos`]. The last one is the background's.
    beats: Vec<AtomicU64>,
}

impl Watchdog {
    /// For so many workers, and the background.
    pub(crate) fn from_env(workers: usize) -> Arc<Self> {
        let period = sd_notify::watchdog_enabled().map(|wait| wait / 2);
        Arc::new(Self { period, beats: (0..=workers).map(|_| AtomicU64::new(clock::nanos())).collect() })
    }

    /// Beats for a worker, as long as its loop goes round.
    pub(crate) async fn beat(self: Arc<Self>, worker: usize) {
        let mut beats = interval(self.period.map_or(BEAT, |period| BEAT.min(period / 4)));
        loop {
            beats.tick().await;
            self.beats[worker].store(clock::nanos(), Ordering::Relaxed);
        }
    }

    /// A worker has ended in order: from now on it counts as one that turns.
    pub(crate) fn retire(&self, worker: usize) {
        self.beats[worker].store(u64::MAX, Ordering::Relaxed);
    }

    /// Beats for the background.
    pub(crate) async fn beat_background(self: Arc<Self>) {
        let background = self.beats.len() - 1;
        self.beat(background).await;
    }

    /// Tells systemd, if it watches, as long as all loops beat. A worker that has nothing left to do ends before the others.
    pub(crate) async fn watch(self: Arc<Self>, stop: watch::Receiver<Stop>) {
        let Some(period) = self.period else { return std::future::pending().await };
        let mut looks = interval(period);
        loop {
            looks.tick().await;
            if self.late(period).is_none() || *stop.borrow() != Stop::No {
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
            }
        }
    }

    /// What hangs, if something does.
    pub(crate) fn hangs(&self) -> Option<String> {
        self.late(HANGS)
    }

    /// The first loop that has not turned for longer than this.
    fn late(&self, than: Duration) -> Option<String> {
        let now = clock::nanos();
        self.beats.iter().enumerate().find_map(|(place, beat)| {
            let still = Duration::from_nanos(now.saturating_sub(beat.load(Ordering::Relaxed)));
            let is_worker = place + 1 < self.beats.len();
            let name = if is_worker { format!("worker {place}") } else { "the background".to_owned() };
            (still > than).then(|| format!("{name} has not turned for {} s", still.as_secs()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_loop_that_hangs_is_enough() {
        let watchdog = Watchdog::from_env(2);
        assert_eq!(watchdog.hangs(), None, "the control");
        for (late, name) in [(1, "worker 1"), (2, "the background")] {
            for (place, beat) in watchdog.beats.iter().enumerate() {
                beat.store(if place == late { 0 } else { u64::MAX }, Ordering::Relaxed);
            }
            assert!(watchdog.late(Duration::ZERO).unwrap().starts_with(name));
        }
    }
}
