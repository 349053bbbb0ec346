//! Whether the wall clock can be believed, and what the trail does while it cannot.
//!
//! The clock is *doubtful* when it was set by more than a minute since the start (it differs from *now*, see
//! [`crate::clock`]), or when a start finds a newest record that lies in the future or is older than the idempotency window
//! and comes from another boot of the machine. While it is doubtful, no segment is removed. Which keys are alive does not depend on
//! it: see [`super::age`].
//!
//! Doubt ends when the process has run for one window since it began, when the wall clock comes back to within a minute of
//! *now*, or when an operator accepts the clock. *Now* stays what it is in each case; the next start takes the wall clock.

use std::fmt;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::age::{ACCEPTED, Ages, Anchor, TrailTime, text};
use super::queue::Shared;
use super::recovery::Found;
use crate::clock;

/// Clocks that differ by no more are taken for equal, in milliseconds.
const TOLERANCE: i64 = 60_000;

/// Why the wall clock is doubtful.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockDoubt {
    /// The start found a record that lies more than a minute in the future.
    Future,
    /// The start found no record within the idempotency window.
    Old,
    /// The wall clock was set by more than a minute since the start.
    Set,
}

impl ClockDoubt {
    /// What it is, for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Future => "the newest audit record lies in the future",
            Self::Old => "the newest audit record is older than the idempotency window",
            Self::Set => "the wall clock was set by more than a minute",
        }
    }

    /// What it says of the clock that the newest record of another boot has this time, in milliseconds.
    fn of(newest: i64, now: i64, window: Duration) -> Option<Self> {
        match now - newest {
            age if age < -TOLERANCE => Some(Self::Future),
            age if age > millis(window) => Some(Self::Old),
            _ => None,
        }
    }
}

impl fmt::Display for ClockDoubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Watches the wall clock; pure. Times are `CLOCK_BOOTTIME` in milliseconds; `ahead` is the wall clock minus *now*.
#[derive(Debug)]
struct Watch {
    window: i64,
    /// What the start found, and when that was.
    at_start: Option<(ClockDoubt, i64)>,
    step: Option<Step>,
    /// By how much the wall clock is ahead without being doubtful: it was for a whole window, or was accepted.
    settled: i64,
}

/// The wall clock was set.
#[derive(Clone, Copy, Debug)]
struct Step {
    ahead: i64,
    since: i64,
}

/// What a look at the clocks changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Begins(ClockDoubt),
    Ends,
}

impl Watch {
    fn new(window: Duration, at_start: Option<ClockDoubt>, boottime: i64) -> Self {
        let at_start = at_start.map(|doubt| (doubt, boottime));
        Self { window: millis(window), at_start, step: None, settled: 0 }
    }

    fn doubt(&self) -> Option<ClockDoubt> {
        self.at_start.map(|(doubt, _)| doubt).or(self.step.map(|_| ClockDoubt::Set))
    }

    fn look(&mut self, boottime: i64, ahead: i64) {
        let is_over = |since: i64| boottime - since >= self.window;
        self.at_start = self.at_start.filter(|(_, since)| !is_over(*since));
        self.step = match self.step {
            _ if is_near(ahead, 0) || is_near(ahead, self.settled) => None,
            Some(step) if is_near(ahead, step.ahead) && is_over(step.since) => {
                self.settled = ahead;
                None
            }
            Some(step) if is_near(ahead, step.ahead) => Some(step),
            _ => Some(Step { ahead, since: boottime }),
        };
    }

    fn accept(&mut self, ahead: i64) {
        (self.at_start, self.step, self.settled) = (None, None, ahead);
    }
}

fn is_near(one: i64, other: i64) -> bool {
    (one - other).abs() <= TOLERANCE
}

/// The clocks of a trail that is written.
pub(super) struct Clocks {
    state: Mutex<State>,
    /// The anchors that were there before the start, in their order; they are read beside everything else.
    anchors: OnceLock<Vec<Anchor>>,
}

struct State {
    trail: TrailTime,
    watch: Watch,
    /// What was told last.
    told: Option<ClockDoubt>,
}

impl Clocks {
    /// The clocks of a process that goes on behind what it found.
    pub(super) fn go_on(found: &Found, window: Duration) -> Self {
        let (last, newest) = (found.anchors.last(), found.newest());
        let (boot, boottime) = (clock::boot_id(), boottime());
        let trail = TrailTime::go_on(last, newest, boot, boottime);
        let known = newest.filter(|_| last.is_none_or(|last| !last.is_of_boot(boot, boottime)));
        let at_start = known.and_then(|newest| ClockDoubt::of(newest, now(), window));
        let watch = Watch::new(window, at_start, boottime);
        Self { state: Mutex::new(State { trail, watch, told: None }), anchors: OnceLock::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the wall clock is doubtful, if it was when it was last looked at.
    pub(super) fn doubt(&self) -> Option<ClockDoubt> {
        self.lock().watch.doubt()
    }

    /// Looks at the clocks, and tells when doubt begins or ends.
    pub(super) fn look(&self, shared: &Shared) {
        let ahead = ahead();
        let change = {
            let mut state = self.lock();
            state.watch.look(boottime(), ahead);
            state.change()
        };
        match change {
            Some(Change::Begins(doubt)) => {
                let seconds = ahead / 1000;
                tracing::warn!(%doubt, wall_ahead_seconds = seconds, "the wall clock is doubtful; no audit segment is removed meanwhile");
                let details = json!({ "reason": doubt.as_str(), "wall": text(wall(ahead)) });
                shared.event("clock_doubtful", details);
            }
            Some(Change::Ends) => {
                tracing::info!("the wall clock is no longer doubtful");
                shared.event("clock_trusted", json!({ "wall": text(wall(ahead)) }));
            }
            None => {}
        }
        shared.metrics.doubtful.set(self.doubt().is_some().into());
    }

    /// An operator accepts the wall clock as it is: doubt ends, on record.
    pub(super) fn accept(&self, shared: &Shared, details: Map<String, Value>) -> u64 {
        let mut members = self.accepted();
        members.extend(details);
        tracing::info!("the wall clock was accepted");
        let seq = shared.event(ACCEPTED, Value::Object(members));
        shared.metrics.doubtful.set(0);
        seq
    }

    /// Accepts the wall clock; returns what the event says.
    pub(super) fn accepted(&self) -> Map<String, Value> {
        let (ahead, boottime) = (ahead(), boottime());
        let mut state = self.lock();
        state.watch.accept(ahead);
        state.told = None;
        state.trail.accept(wall(ahead), boottime);
        state.trail.members(boottime)
    }

    /// What a start says that found the newest record at this time.
    pub(super) fn start(&self, found: &Found) -> Value {
        let mut members = Map::from_iter([("version".to_owned(), env!("CARGO_PKG_VERSION").into())]);
        members.extend(self.members());
        if let Some(newest) = found.newest() {
            members.insert("newest".into(), text(newest).into());
        }
        Value::Object(members)
    }

    /// What an anchor says at this moment.
    pub(super) fn members(&self) -> Map<String, Value> {
        self.lock().trail.members(boottime())
    }

    /// The ages of records at this moment.
    pub(super) fn ages(&self) -> Ages {
        self.lock().trail.ages(boottime())
    }

    /// The anchors that were there before the start; None while they are not read yet.
    pub(super) fn anchors(&self) -> Option<&[Anchor]> {
        self.anchors.get().map(Vec::as_slice)
    }

    /// These anchors were there before the start.
    pub(super) fn know(&self, anchors: Vec<Anchor>) {
        let _ = self.anchors.set(anchors); // known already is as good
    }
}

impl State {
    fn change(&mut self) -> Option<Change> {
        let doubt = self.watch.doubt();
        match (std::mem::replace(&mut self.told, doubt), doubt) {
            (None, Some(doubt)) => Some(Change::Begins(doubt)),
            (Some(_), None) => Some(Change::Ends),
            _ => None,
        }
    }
}

/// `CLOCK_BOOTTIME` in milliseconds.
pub(super) fn boottime() -> i64 {
    millis(clock::boottime())
}

/// *Now* in milliseconds since 1970, read anew on a thread without turns.
pub(super) fn now() -> i64 {
    i64::try_from(clock::unix_nanos() / 1_000_000).unwrap_or(i64::MAX)
}

/// The wall clock minus *now*, in milliseconds.
fn ahead() -> i64 {
    clock::wall_ahead() / 1_000_000
}

fn wall(ahead: i64) -> i64 {
    now() + ahead
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_secs(24 * 60 * 60);
    const HOUR: i64 = 60 * 60 * 1000;

    #[test]
    fn a_start_doubts_a_clock_that_puts_the_newest_record_out_of_the_window() {
        let now = 1_795_824_000_000;
        for (age, doubt) in [
            (0, None),
            (24 * HOUR, None),
            (24 * HOUR + 1, Some(ClockDoubt::Old)),
            (31 * 24 * HOUR, Some(ClockDoubt::Old)),
            (-TOLERANCE, None),
            (-TOLERANCE - 1, Some(ClockDoubt::Future)),
            (-48 * HOUR, Some(ClockDoubt::Future)),
        ] {
            assert_eq!(ClockDoubt::of(now - age, now, WINDOW), doubt, "{age}");
        }
    }

    #[test]
    fn what_a_start_found_is_doubtful_for_one_window() {
        let mut watch = Watch::new(WINDOW, Some(ClockDoubt::Old), 5 * HOUR);
        for (hour, doubt) in [(5, true), (28, true), (29, false), (30, false)] {
            watch.look(hour * HOUR, 0);
            assert_eq!(watch.doubt().is_some(), doubt, "{hour}");
        }
    }

    #[test]
    fn a_wall_clock_that_is_set_is_doubtful_until_it_comes_back_or_for_one_window() {
        let mut watch = Watch::new(WINDOW, None, 0);
        for (hour, ahead, doubt) in [
            (0, 0, false),
            (0, TOLERANCE, false),
            (0, -TOLERANCE, false),
            (1, TOLERANCE + 1, true),
            (2, 0, false),               // it came back
            (3, 31 * 24 * HOUR, true),   // from here on one window
            (26, 31 * 24 * HOUR, true),  // not yet over
            (27, 31 * 24 * HOUR, false), // it is settled
            (90, 31 * 24 * HOUR + TOLERANCE, false),
            (91, -48 * HOUR, true),
            (100, 48 * HOUR, true), // it was set again: from here on one window
            (123, 48 * HOUR, true),
            (124, 48 * HOUR, false),
            (125, 31 * 24 * HOUR, true), // settled long ago
            (126, 0, false),
        ] {
            watch.look(hour * HOUR, ahead);
            assert_eq!(watch.doubt().is_some(), doubt, "{hour} h: {ahead}");
        }
    }

    #[test]
    fn an_accepted_clock_is_not_doubtful_until_it_is_set_again() {
        let mut watch = Watch::new(WINDOW, Some(ClockDoubt::Future), 0);
        watch.look(HOUR, 2 * HOUR);
        assert_eq!(watch.doubt(), Some(ClockDoubt::Future));
        watch.accept(2 * HOUR);
        watch.look(2 * HOUR, 2 * HOUR);
        assert_eq!(watch.doubt(), None);
        watch.look(3 * HOUR, 4 * HOUR);
        assert_eq!(watch.doubt(), Some(ClockDoubt::Set));
    }
}
