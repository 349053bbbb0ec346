//! Capacity planning of the audit trail: how large it becomes if all callers send as many calls as their limits allow.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::fs::statvfs;

use super::{Config, RateLimit};

/// A margin before the idempotency window, for calls that began before the window and ended within it.
pub const SLACK: Duration = Duration::from_secs(60 * 60);

/// With less free space than this, in bytes, refusals are no longer recorded, so that intents and outcomes still
/// fit.
pub const LOW_WATER: u64 = 64 << 20;

/// The bytes that one call takes in the trail: its intent and its outcome. The example call of
/// `tests/it/trail_size.rs`, which measures this, took 1268 bytes with a key and 1074 without one. A longer reply or
/// more inspectors take more.
pub const CALL: u64 = 1300;

/// The segments that are added to the size of the kept records: the open one, which is not full, and the oldest one,
/// which is removed only as a whole.
const PARTIAL: u64 = 2;

/// The fewest segments that `max_size` must hold.
// Segments are removed as a whole. With four, one removal takes away a quarter of the trail at most.
pub(super) const LEAST_SEGMENTS: u64 = 4;

const HOUR: Duration = Duration::from_secs(60 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The size that the trail can reach at the configured limits.
#[derive(Clone, Debug)]
pub struct SizeBound<'a> {
    config: &'a Config,
}

impl Config {
    /// Returns the size that the trail can reach at the configured limits. Copies nothing.
    pub fn trail_size(&self) -> SizeBound<'_> {
        SizeBound { config: self }
    }
}

impl SizeBound<'_> {
    /// Returns the two bounds on the calls that are sent: the limits of all callers together, and the quota. A frozen
    /// caller counts, since it may be unfrozen while the gateway runs.
    fn limits(&self) -> [CallRate; 2] {
        let callers = self.config.callers.iter().map(|caller| CallRate::of(&caller.limit()));
        // Kept apart from the quota, and not reduced to a minimum: over a short time the smaller burst decides,
        // over a long one the smaller rate.
        let callers = callers.fold(CallRate { hourly: 0, burst: 0 }, |sum, rate| CallRate {
            hourly: sum.hourly.saturating_add(rate.hourly),
            burst: sum.burst.saturating_add(rate.burst),
        });
        [callers, CallRate::of(&self.config.quota.limit())]
    }

    /// Returns the most calls that can be sent in an hour, without bursts.
    pub fn calls_per_hour(&self) -> u64 {
        let [callers, quota] = self.limits();
        callers.hourly.min(quota.hourly)
    }

    /// Returns the bytes that the calls of a day take, at [`Self::calls_per_hour`].
    pub fn calls_per_day(&self) -> u64 {
        self.calls_per_hour().saturating_mul(24).saturating_mul(CALL)
    }

    /// Returns the most bytes that refusals, replays and dry runs take in a day.
    pub fn refusals_per_day(&self) -> u64 {
        24 * (self.config.audit.stranger_refusals + self.config.audit.caller_refusals)
    }

    /// Returns the size in bytes of a trail that goes back by `time` and contains calls only.
    fn of(&self, time: Duration) -> u64 {
        let [callers, quota] = self.limits().map(|rate| rate.calls(time));
        let calls = callers.min(quota).saturating_mul(CALL);
        calls.saturating_add(PARTIAL * self.config.audit.segment_size)
    }

    /// Returns the age up to which a record is never removed to keep the trail within `max_size`.
    fn protected(&self) -> Duration {
        self.config.idempotency.window + SLACK
    }

    /// Returns why `max_size` is too small; `None` if it is large enough or not set.
    pub(super) fn refusal(&self) -> Option<String> {
        let max_size = self.config.audit.max_size?;
        let least = LEAST_SEGMENTS * self.config.audit.segment_size;
        if max_size < least {
            return Some(format!(
                "must be \"{}\" or more, which is {LEAST_SEGMENTS} times audit.segment_size",
                setting(least)
            ));
        }
        // Refusals are not counted: they have budgets of their own, and `check` prints how long `max_size` lasts
        // with and without them.
        let needed = self.of(self.protected());
        (max_size < needed).then(|| {
            format!(
                "must be \"{}\" or more, or rate_limit, quota.rate or idempotency.window must be lower: no record of the last {} \
                 hours is removed (idempotency.window and one hour), {} calls an hour are allowed, and a call takes about {CALL} bytes",
                setting(needed),
                self.protected().as_secs().div_ceil(HOUR.as_secs()),
                self.calls_per_hour(),
            )
        })
    }

    /// Returns how long `max_size` suffices if all callers send as many calls as they may. With `with_refusals`,
    /// refusals take their whole budget as well; without it, they take nothing. Returns `None` if `max_size` is not
    /// set.
    pub fn max_size_lasts(&self, with_refusals: bool) -> Option<Duration> {
        let room = self.config.audit.max_size?.saturating_sub(PARTIAL * self.config.audit.segment_size);
        let refusals = if with_refusals { self.refusals_per_day() / 24 } else { 0 };
        let lasts = |CallRate { hourly, burst }| {
            let room = room.saturating_sub(burst.saturating_mul(CALL));
            let hourly = hourly.saturating_mul(CALL).saturating_add(refusals).max(1);
            let seconds = u128::from(room) * u128::from(HOUR.as_secs()) / u128::from(hourly);
            Duration::from_secs(u64::try_from(seconds).unwrap_or(u64::MAX))
        };
        // The stricter of the two bounds: fewer calls last longer.
        self.limits().map(lasts).into_iter().max()
    }

    /// Returns the bytes that the calls within `retain` need; `None` if records are kept for ever.
    pub fn retain_needs(&self) -> Option<u64> {
        self.config.audit.retain.map(|retain| self.of(retain + SLACK))
    }

    /// Returns the sizes as lines of text, for `check`.
    pub fn lines(&self) -> Vec<String> {
        let hourly = self.calls_per_hour();
        let (calls, refusals) = (text(self.calls_per_day()), text(self.refusals_per_day()));
        let mut lines = vec![format!(
            "Audit trail: a call takes about {CALL} bytes. {hourly} calls an hour are allowed, which take {calls} a day. Refusals, \
             replays and dry runs take {refusals} a day at most."
        )];
        let lasts = |with_refusals| self.max_size_lasts(with_refusals).map(days).unwrap_or_default();
        lines.push(match (self.config.audit.max_size, self.config.audit.retain, self.retain_needs()) {
            (Some(size), ..) => format!(
                "max_size = {} holds {} of these calls, or {} of calls and refusals.",
                text(size),
                lasts(false),
                lasts(true),
            ),
            (None, Some(retain), Some(needed)) => format!(
                "retain = {} needs {} for calls. Nothing else bounds the trail, since max_size is not set.",
                days(retain),
                text(needed),
            ),
            _ => "Nothing bounds the trail: retain is \"forever\", and max_size is not set.".to_owned(),
        });
        lines
    }

    /// Returns a warning if the file system of the trail is too small for `max_size`, one more segment and
    /// [`LOW_WATER`]. Returns `None` if it is large enough, if its size is unknown, or if `max_size` is not set.
    pub fn notice(&self) -> Option<String> {
        self.notice_of(file_system(&self.config.audit.directory)?)
    }

    /// As [`Self::notice`], for a file system of `available` bytes.
    fn notice_of(&self, available: u64) -> Option<String> {
        let max_size = self.config.audit.max_size?;
        let needed = max_size.saturating_add(self.config.audit.segment_size).saturating_add(LOW_WATER);
        (needed > available).then(|| {
            format!(
                "audit.max_size is {}, and the file system of {} has {}: it may be full before a segment is removed early. A volume \
                 needs max_size, one segment and 64 MiB",
                text(max_size),
                self.config.audit.directory.display(),
                text(available),
            )
        })
    }
}

/// The calls that a limit allows: a number per hour, and a burst.
#[derive(Clone, Copy)]
struct CallRate {
    hourly: u64,
    burst: u64,
}

impl CallRate {
    fn of(limit: &RateLimit) -> Self {
        let periods = HOUR.as_secs() / limit.period.as_secs().max(1);
        Self { hourly: u64::from(limit.count.get()) * periods, burst: limit.burst.get().into() }
    }

    /// Returns the most calls in this time, with one burst.
    fn calls(self, time: Duration) -> u64 {
        // In 128 bits: with two dozen callers at the highest rate, the calls of ten years, times seconds, do not
        // fit into 64.
        let calls = u128::from(self.hourly) * u128::from(time.as_secs()) / u128::from(HOUR.as_secs());
        u64::try_from(calls).unwrap_or(u64::MAX).saturating_add(self.burst)
    }
}

/// Returns the size in bytes of the file system that contains the directory, or will contain it once it is created.
fn file_system(directory: &Path) -> Option<u64> {
    let whole = std::path::absolute(directory).ok()?;
    // `check` may run before the directory exists: the nearest directory above it has the same file system then.
    let there = whole.ancestors().find(|path| fs::metadata(path).is_ok())?;
    let found = statvfs(there).ok()?;
    Some(found.f_blocks.saturating_mul(found.f_frsize))
}

/// Formats a size for people, rounded up to a tenth.
fn text(bytes: u64) -> String {
    let (unit, name) = if bytes >= 1 << 30 { (1 << 30, "GiB") } else { (1 << 20, "MiB") };
    let tenths = (u128::from(bytes) * 10).div_ceil(unit);
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{whole} {name}"),
        (whole, rest) => format!("{whole}.{rest} {name}"),
    }
}

/// Formats a size, rounded up to MiB, so that it can be copied into the configuration.
fn setting(bytes: u64) -> String {
    format!("{}MiB", bytes.div_ceil(1 << 20))
}

/// Formats a duration for people. It is rounded down to a tenth, so that it promises nothing too much.
fn days(time: Duration) -> String {
    let (unit, name) = if time < 2 * DAY { (HOUR, "hours") } else { (DAY, "days") };
    let tenths = time.as_secs() * 10 / unit.as_secs();
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{whole} {name}"),
        (whole, rest) => format!("{whole}.{rest} {name}"),
    }
}
