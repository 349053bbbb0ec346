//! Decides whether the wall clock can be trusted, and what the trail does while it cannot.
//!
//! The clock is *doubtful* in two cases. It was set by more than a minute since the start: it differs from
//! *now*, see [`crate::clock`]. Or the newest record at the start comes from another boot of the machine and
//! lies in the future or before the idempotency window. While the clock is doubtful, no segment is removed.
//! Which idempotency keys are alive does not depend on it: see [`super::age`].
//!
//! Doubt ends when the process has run for one window since it began, when the wall clock comes back to within
//! a minute of *now*, or when an operator accepts the clock. None of them changes *now*; the next start takes
//! the wall clock.

use std::fmt;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::age::{ACCEPTED, Ages, Anchor, TrailTime, text};
use super::queue::Shared;
use super::recovery::TrailState;
use crate::clock;

/// The largest difference between two clocks that count as equal, in milliseconds.
// NTP slews and small steps are normal. A minute is far below the window and far above those.
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
    /// The reason as text for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Future => "the newest audit record lies in the future",
            Self::Old => "the newest audit record is older than the idempotency window",
            Self::Set => "the wall clock was set by more than a minute",
        }
    }

    /// What the time of the newest record, written in another boot, says about the wall clock. All times are in
    /// milliseconds since 1970.
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

/// The state of doubt, without I/O. Times are `CLOCK_BOOTTIME` in milliseconds; `ahead` is the wall clock minus
/// *now*.
#[derive(Debug)]
struct DoubtState {
    window: i64,
    /// The doubt that the start found, and when that was.
    at_start: Option<(ClockDoubt, i64)>,
    step: Option<Step>,
    /// The value of `ahead` that counts as correct: it lasted for a whole window, or an operator accepted it.
    settled: i64,
}

/// A step of the wall clock.
#[derive(Clone, Copy, Debug)]
struct Step {
    ahead: i64,
    since: i64,
}

/// How doubt changed at the last check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Begins(ClockDoubt),
    Ends,
}

impl DoubtState {
    fn new(window: Duration, at_start: Option<ClockDoubt>, boottime: i64) -> Self {
        let at_start = at_start.map(|doubt| (doubt, boottime));
        Self { window: millis(window), at_start, step: None, settled: 0 }
    }

    fn doubt(&self) -> Option<ClockDoubt> {
        self.at_start.map(|(doubt, _)| doubt).or(self.step.map(|_| ClockDoubt::Set))
    }

    fn update(&mut self, boottime: i64, ahead: i64) {
        // Doubt must end without an operator: retention would stop forever otherwise, and a full disk stops all
        // calls. One window is enough, since keys older than that no longer matter.
        let is_over = |since: i64| boottime - since >= self.window;
        self.at_start = self.at_start.filter(|(_, since)| !is_over(*since));
        self.step = match self.step {
            _ if is_near(ahead, 0) || is_near(ahead, self.settled) => None,
            Some(step) if is_near(ahead, step.ahead) && is_over(step.since) => {
                self.settled = ahead;
                None
            }
            Some(step) if is_near(ahead, step.ahead) => Some(step),
            // The clock was set again. The window starts again: the time spent at the former value says nothing
            // about this one.
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

/// The clocks of a trail while it is written.
pub(super) struct Clocks {
    state: Mutex<State>,
    /// The anchors from before the start, in order. They are set once the background verification has read the
    /// trail.
    anchors: OnceLock<Vec<Anchor>>,
}

struct State {
    trail: TrailTime,
    doubt_state: DoubtState,
    /// The doubt that was last reported.
    reported: Option<ClockDoubt>,
}

impl Clocks {
    /// The clocks of a process that continues after `found`.
    pub(super) fn go_on(found: &TrailState, window: Duration) -> Self {
        let (last, newest) = (found.anchors.last(), found.newest());
        let (boot, boottime) = (clock::boot_id(), boottime());
        let trail = TrailTime::go_on(last, newest, boot, boottime);
        // A newest record of the same boot needs no wall clock: `CLOCK_BOOTTIME` dates it exactly, however long
        // ago it was.
        let known = newest.filter(|_| last.is_none_or(|last| !last.is_of_boot(boot, boottime)));
        let at_start = known.and_then(|newest| ClockDoubt::of(newest, now(), window));
        let doubt_state = DoubtState::new(window, at_start, boottime);
        Self { state: Mutex::new(State { trail, doubt_state, reported: None }), anchors: OnceLock::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The reason why the wall clock was doubtful at the last check; `None` if it was not.
    pub(super) fn doubt(&self) -> Option<ClockDoubt> {
        self.lock().doubt_state.doubt()
    }

    /// Checks the clocks, and reports it when doubt begins or ends.
    pub(super) fn update(&self, shared: &Shared) {
        let ahead = ahead();
        // The lock is released before anything is logged or queued: both take locks of their own.
        let change = {
            let mut state = self.lock();
            state.doubt_state.update(boottime(), ahead);
            state.change()
        };
        match change {
            Some(Change::Begins(doubt)) => {
                let seconds = ahead / 1000;
                tracing::warn!(
                    %doubt, wall_ahead_seconds = seconds,
                    "the wall clock is doubtful, so no audit segment is removed; if the clock is right, run \
                     `ccsqm-gateway audit accept-clock`"
                );
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

    /// Records that an operator accepts the wall clock, which ends the doubt. Returns the number of the event.
    pub(super) fn accept(&self, shared: &Shared, details: Map<String, Value>) -> u64 {
        let mut members = self.accepted();
        members.extend(details);
        tracing::info!("the wall clock was accepted");
        let seq = shared.event(ACCEPTED, Value::Object(members));
        shared.metrics.doubtful.set(0);
        seq
    }

    /// Accepts the wall clock, and returns the members of the event that records it.
    pub(super) fn accepted(&self) -> Map<String, Value> {
        let (ahead, boottime) = (ahead(), boottime());
        let mut state = self.lock();
        state.doubt_state.accept(ahead);
        // The event `clock_accepted` reports the end of doubt, so no event `clock_trusted` follows.
        state.reported = None;
        state.trail.accept(wall(ahead), boottime);
        state.trail.members(boottime)
    }

    /// The members of the event `start` after what was found.
    pub(super) fn start(&self, found: &TrailState) -> Value {
        let mut members = Map::from_iter([("version".to_owned(), env!("CARGO_PKG_VERSION").into())]);
        members.extend(self.members());
        if let Some(newest) = found.newest() {
            members.insert("newest".into(), text(newest).into());
        }
        Value::Object(members)
    }

    /// The members of an anchor that is written now.
    pub(super) fn members(&self) -> Map<String, Value> {
        self.lock().trail.members(boottime())
    }

    /// The ages of records as of now.
    pub(super) fn ages(&self) -> Ages {
        self.lock().trail.ages(boottime())
    }

    /// The anchors from before the start; `None` until they have been read.
    pub(super) fn anchors(&self) -> Option<&[Anchor]> {
        self.anchors.get().map(Vec::as_slice)
    }

    /// Sets the anchors from before the start. Further calls have no effect.
    pub(super) fn set_anchors(&self, anchors: Vec<Anchor>) {
        // A second set is ignored: both come from the same records.
        let _ = self.anchors.set(anchors);
    }
}

impl State {
    /// Returns whether doubt began or ended since the last call.
    fn change(&mut self) -> Option<Change> {
        let doubt = self.doubt_state.doubt();
        match (std::mem::replace(&mut self.reported, doubt), doubt) {
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

/// *Now* in milliseconds since 1970, read at every call on a thread that does not count turns.
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
    fn clock_is_doubtful_if_the_newest_record_is_outside_the_window() {
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
    fn clock_doubt_found_at_start_lasts_one_window() {
        let mut doubt_state = DoubtState::new(WINDOW, Some(ClockDoubt::Old), 5 * HOUR);
        for (hour, doubt) in [(5, true), (28, true), (29, false), (30, false)] {
            doubt_state.update(hour * HOUR, 0);
            assert_eq!(doubt_state.doubt().is_some(), doubt, "{hour}");
        }
    }

    #[test]
    fn clock_jump_is_doubtful_until_reverted_or_for_one_window() {
        let mut doubt_state = DoubtState::new(WINDOW, None, 0);
        for (hour, ahead, doubt) in [
            (0, 0, false),
            (0, TOLERANCE, false),
            (0, -TOLERANCE, false),
            (1, TOLERANCE + 1, true),
            // The clock came back.
            (2, 0, false),
            // One window begins here.
            (3, 31 * 24 * HOUR, true),
            (26, 31 * 24 * HOUR, true),
            // The window is over, so this value counts as correct from here on.
            (27, 31 * 24 * HOUR, false),
            (90, 31 * 24 * HOUR + TOLERANCE, false),
            (91, -48 * HOUR, true),
            // The clock was set again, and so the window begins again.
            (100, 48 * HOUR, true),
            (123, 48 * HOUR, true),
            (124, 48 * HOUR, false),
            // This value was correct once, and another one has been since.
            (125, 31 * 24 * HOUR, true),
            (126, 0, false),
        ] {
            doubt_state.update(hour * HOUR, ahead);
            assert_eq!(doubt_state.doubt().is_some(), doubt, "{hour} h: {ahead}");
        }
    }

    #[test]
    fn accepted_clock_is_trusted_until_the_next_jump() {
        let mut doubt_state = DoubtState::new(WINDOW, Some(ClockDoubt::Future), 0);
        doubt_state.update(HOUR, 2 * HOUR);
        assert_eq!(doubt_state.doubt(), Some(ClockDoubt::Future));
        doubt_state.accept(2 * HOUR);
        doubt_state.update(2 * HOUR, 2 * HOUR);
        assert_eq!(doubt_state.doubt(), None);
        doubt_state.update(3 * HOUR, 4 * HOUR);
        assert_eq!(doubt_state.doubt(), Some(ClockDoubt::Set));
    }
}
