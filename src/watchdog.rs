//! Liveness of the event loops: of each worker, and of the background runtime. `/livez` fails if one does not
//! turn, and systemd's watchdog (`WatchdogSec=`) is fed only while all of them turn, so that a loop that hangs
//! causes a restart and not an outage.
//!
//! The audit writer and the admin listener are not watched: a stuck disk makes intents fail, and probes notice
//! a dead admin listener.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::interval;

use crate::clock;
use crate::server::Lifecycle;

/// How long a loop may go without turning before `/livez` fails.
// Longer than any turn should take, even while the machine is overloaded: a false alarm restarts every replica
// at once.
const HANGS: Duration = Duration::from_secs(10);

/// The longest interval between two beats of a loop.
const BEAT: Duration = Duration::from_secs(1);

/// The last beat of each loop.
#[derive(Debug)]
pub(crate) struct Watchdog {
    /// Half of what systemd waits for; `None` if it does not watch.
    period: Option<Duration>,
    /// When each loop turned last, in [`clock::nanos`]. The last entry is the background's.
    beats: Vec<AtomicU64>,
}

impl Watchdog {
    /// A watchdog for `workers` workers and the background. `WATCHDOG_USEC` and `WATCHDOG_PID` say whether
    /// systemd watches.
    pub(crate) fn from_env(workers: usize) -> Arc<Self> {
        let period = sd_notify::watchdog_enabled().map(|wait| wait / 2);
        Arc::new(Self { period, beats: (0..=workers).map(|_| AtomicU64::new(clock::nanos())).collect() })
    }

    /// Beats for a worker forever. The beats stop if the event loop hangs, since this task is on it.
    pub(crate) async fn beat(self: Arc<Self>, worker: usize) {
        // Four beats in each period: one that is late does not count as a hang.
        let mut beats = interval(self.period.map_or(BEAT, |period| BEAT.min(period / 4)));
        loop {
            beats.tick().await;
            self.beats[worker].store(clock::nanos(), Ordering::Relaxed);
        }
    }

    /// Marks a worker as ended cleanly. It counts as turning from now on.
    // A worker without connections ends before the others in a long drain. `/livez` failed in that time before.
    pub(crate) fn mark_ended(&self, worker: usize) {
        self.beats[worker].store(u64::MAX, Ordering::Relaxed);
    }

    /// Beats for the background forever.
    pub(crate) async fn beat_background(self: Arc<Self>) {
        let background = self.beats.len() - 1;
        self.beat(background).await;
    }

    /// Feeds systemd's watchdog, if there is one, while all loops beat. From the stop on it is fed in any case:
    /// the drain has a deadline of its own.
    pub(crate) async fn watch(self: Arc<Self>, stop: watch::Receiver<Lifecycle>) {
        let Some(period) = self.period else { return std::future::pending().await };
        let mut looks = interval(period);
        loop {
            looks.tick().await;
            if self.late(period).is_none() || *stop.borrow() != Lifecycle::Serving {
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
            }
        }
    }

    /// Returns the name of a loop that hangs and for how long, as text; `None` if none does.
    pub(crate) fn hangs(&self) -> Option<String> {
        self.late(HANGS)
    }

    /// The first loop that has not run for longer than `than`.
    fn late(&self, than: Duration) -> Option<String> {
        let now = clock::nanos();
        self.beats.iter().enumerate().find_map(|(index, beat)| {
            let still = Duration::from_nanos(now.saturating_sub(beat.load(Ordering::Relaxed)));
            let is_worker = index + 1 < self.beats.len();
            let name =
                if is_worker { format!("worker {index}") } else { "the background runtime".to_owned() };
            (still > than).then(|| format!("the event loop of {name} has not run for {} s", still.as_secs()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watchdog_reports_a_single_hanging_loop() {
        let watchdog = Watchdog::from_env(2);
        assert_eq!(watchdog.hangs(), None, "the control");
        for (late, name) in [(1, "worker 1"), (2, "the background runtime")] {
            for (index, beat) in watchdog.beats.iter().enumerate() {
                beat.store(if index == late { 0 } else { u64::MAX }, Ordering::Relaxed);
            }
            assert!(
                watchdog.late(Duration::ZERO).unwrap().starts_with(&format!("the event loop of {name} "))
            );
        }
    }
}
