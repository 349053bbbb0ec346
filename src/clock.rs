//! The time as a worker sees it: read once a turn of its event loop, not at every look.
//!
//! A look costs some 25 ns and a request looks thirty times. On a thread that called [`turns`], the time stands
//! still until the thread has nothing left to do, or was looked at so often that the turn must be a long one;
//! on any other thread it is always read anew. Stages that take no wait so take no time.
//!
//! There are three times:
//!
//! * [`nanos`], monotonic, for deadlines, limits and what a stage took. It stops while the machine sleeps.
//! * [`unix_nanos`], called *now*: the wall clock as this process found it at its start, plus `CLOCK_BOOTTIME` since then. It
//!   never jumps, and it counts the time that the machine sleeps. Times of records, request ids and ages are made from it.
//! * [`wall`], the wall clock as it is at the moment. It may jump. A token's life is judged by it and by *now*, whichever
//!   ends it sooner; certificates and revocation lists are judged by it alone.

use std::cell::Cell;
use std::fs;
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use rustix::time::{ClockId, clock_gettime};
use tokio::time::Instant;
use uuid::Uuid;

/// So many looks share a reading at most.
const SHARED: u32 = 256;

/// A reading of the wall clock serves a thread with turns for so long, in nanoseconds: it is asked at every request, and
/// most turns are shorter.
const WALL_SERVES: u64 = 1_000_000;

/// The clock that also counts the time that the machine sleeps. The monotonic one of macOS does.
#[cfg(target_os = "linux")]
const BOOTTIME: ClockId = ClockId::Boottime;
#[cfg(not(target_os = "linux"))]
const BOOTTIME: ClockId = ClockId::Monotonic;

/// Which boot of the machine this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// By how much the clocks of this process's time namespace differ from the machine's.
const TIME_NAMESPACE: &str = "/proc/self/timens_offsets";

/// When this process first looked.
static EPOCH: LazyLock<Epoch> = LazyLock::new(Epoch::begin);

/// The first look, by all clocks.
struct Epoch {
    monotonic: Instant,
    /// *Now* minus `CLOCK_BOOTTIME`, in nanoseconds.
    offset: i64,
}

thread_local! {
    static CLOCK: Clock = const { Clock::new() };
}

/// The clock of a thread.
struct Clock {
    has_turns: Cell<bool>,
    turn: Cell<u64>,
    /// Looks that may still share the reading.
    left: Cell<u32>,
    /// The reading: nanoseconds since [`EPOCH`], and since 1970.
    nanos: Cell<u64>,
    unix_nanos: Cell<u64>,
    /// The wall clock minus *now*, in nanoseconds, and until when that serves.
    wall_ahead: Cell<i64>,
    wall_serves: Cell<u64>,
}

/// From now on this thread reads the time once a turn: it calls [`next_turn`] before it sleeps.
pub fn turns() {
    CLOCK.with(|clock| clock.has_turns.set(true));
}

/// The next look reads the time anew.
pub fn next_turn() {
    CLOCK.with(|clock| clock.turn.set(clock.turn.get() + 1));
    refresh();
}

/// The next look reads the time anew, because this turn has taken long.
pub fn refresh() {
    CLOCK.with(|clock| clock.left.set(0));
}

/// Counts the turns. Between two of them the event loop has looked at all sockets.
pub fn turn() -> u64 {
    CLOCK.with(|clock| clock.turn.get())
}

/// The monotonic time in nanoseconds of this process: what is only compared and subtracted needs no more.
pub fn nanos() -> u64 {
    CLOCK.with(|clock| {
        clock.look();
        clock.nanos.get()
    })
}

/// The monotonic time.
pub fn now() -> Instant {
    instant(nanos())
}

/// The instant of a number of nanoseconds of this process.
pub fn instant(nanos: u64) -> Instant {
    EPOCH.monotonic + Duration::from_nanos(nanos)
}

/// *Now*, in nanoseconds since 1970: the wall clock at this process's first look, plus `CLOCK_BOOTTIME` since then.
pub fn unix_nanos() -> u64 {
    CLOCK.with(|clock| {
        clock.look();
        clock.unix_nanos.get()
    })
}

/// The wall clock in nanoseconds since 1970; 0 for one that stands before it. On a thread with turns a jump shows within a
/// millisecond.
pub fn wall_nanos() -> u64 {
    CLOCK.with(|clock| {
        clock.look();
        clock.look_at_wall();
        clock.unix_nanos.get().saturating_add_signed(clock.wall_ahead.get())
    })
}

/// The wall clock, as [`wall_nanos`] has it.
pub fn wall() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(wall_nanos())
}

/// The wall clock minus *now*, in nanoseconds, read anew. It differs from 0 by as much as the wall clock was set since this
/// process's first look.
pub fn wall_ahead() -> i64 {
    signed(unix_nanos_at(SystemTime::now())) - signed(EPOCH.now(boottime()))
}

/// `CLOCK_BOOTTIME`, read anew: the time since the machine was booted, with the time that it slept.
pub fn boottime() -> Duration {
    Duration::try_from(clock_gettime(BOOTTIME)).unwrap_or_default()
}

/// Which boot of the machine this is; [`boottime`] of two processes can be compared if it is the same one. None if that
/// cannot be read (`ProcSubset=pid`), or if this process's time namespace has a boot time of its own.
pub fn boot_id() -> Option<Uuid> {
    let offsets = fs::read_to_string(TIME_NAMESPACE).unwrap_or_default();
    let id = fs::read_to_string(BOOT_ID).ok().filter(|_| !has_own_boottime(&offsets));
    id?.trim().parse().ok()
}

/// Whether a time namespace with these offsets has a boot time of its own.
fn has_own_boottime(offsets: &str) -> bool {
    let boottime = offsets.lines().find_map(|line| line.strip_prefix("boottime"));
    boottime.is_some_and(|offset| offset.split_whitespace().any(|part| part != "0"))
}

/// A wall's time in nanoseconds since 1970; 0 before that.
pub fn unix_nanos_at(wall: SystemTime) -> u64 {
    nanos_of(wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

/// A duration in nanoseconds, at most some 584 years.
pub fn nanos_of(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Clock {
    const fn new() -> Self {
        Self {
            has_turns: Cell::new(false),
            turn: Cell::new(0),
            left: Cell::new(0),
            nanos: Cell::new(0),
            unix_nanos: Cell::new(0),
            wall_ahead: Cell::new(0),
            wall_serves: Cell::new(0),
        }
    }

    fn look(&self) {
        match self.left.get() {
            0 => self.read(),
            left => self.left.set(left - 1),
        }
    }

    #[cold]
    fn read(&self) {
        let epoch = &*EPOCH; // before the reading, which would lie before it otherwise
        self.nanos.set(nanos_of(Instant::now().saturating_duration_since(epoch.monotonic)));
        self.unix_nanos.set(epoch.now(boottime()));
        self.left.set(if self.has_turns.get() { SHARED } else { 0 });
    }

    fn look_at_wall(&self) {
        let now = self.unix_nanos.get();
        if now >= self.wall_serves.get() {
            self.wall_ahead.set(wall_ahead());
            self.wall_serves.set(if self.has_turns.get() { now + WALL_SERVES } else { 0 });
        }
    }
}

impl Epoch {
    fn begin() -> Self {
        let offset = signed(unix_nanos_at(SystemTime::now())) - signed(nanos_of(boottime()));
        Self { monotonic: Instant::now(), offset }
    }

    /// *Now* at a reading of `CLOCK_BOOTTIME`.
    fn now(&self, boottime: Duration) -> u64 {
        nanos_of(boottime).saturating_add_signed(self.offset)
    }
}

/// Nanoseconds up to the year 2262.
fn signed(nanos: u64) -> i64 {
    i64::try_from(nanos).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn time_stands_still_within_a_turn_and_only_on_a_thread_that_has_turns() {
        let differs = || {
            let first = now();
            thread::sleep(Duration::from_millis(2)); // time goes by
            now() != first
        };
        assert!(differs(), "no turns, the control");
        thread::spawn(move || {
            turns();
            assert!(!differs(), "the same turn");
            let (first, first_unix, first_wall) = (now(), unix_nanos(), wall());
            next_turn();
            assert!(now() > first && unix_nanos() > first_unix && wall() > first_wall, "the next turn");
            let first = now();
            thread::sleep(Duration::from_millis(2));
            for _ in 0..SHARED {
                std::hint::black_box(now());
            }
            assert!(now() > first, "a long turn");
        })
        .join()
        .unwrap();
    }

    #[test]
    fn now_goes_as_the_boot_time_does_from_the_wall_clock_at_the_start() {
        let apart = |now: u64| wall_ahead().unsigned_abs() + now.abs_diff(unix_nanos_at(SystemTime::now()));
        assert!(apart(unix_nanos()) < 1_000_000_000, "nobody set the clock meanwhile");
        let booted = boottime();
        let first = unix_nanos();
        thread::sleep(Duration::from_millis(2)); // time goes by
        let went = Duration::from_nanos(unix_nanos() - first);
        assert!(went >= Duration::from_millis(2) && went <= boottime() - booted, "{went:?}");
    }

    #[test]
    fn a_time_namespace_may_have_a_boot_time_of_its_own() {
        for (offsets, has) in [
            ("", false),
            ("monotonic           0         0\nboottime            0         0\n", false),
            ("monotonic           7         0\nboottime            0         0\n", false),
            ("monotonic           0         0\nboottime        90000         0\n", true),
            ("monotonic           0         0\nboottime            0       100\n", true),
        ] {
            assert_eq!(has_own_boottime(offsets), has, "{offsets}");
        }
    }

    #[test]
    fn the_wall_clock_of_a_turn_follows_a_jump_within_a_millisecond() {
        thread::spawn(|| {
            turns();
            let first = wall_nanos();
            CLOCK.with(|clock| clock.wall_ahead.set(-3_600_000_000_000)); // as if it had been an hour behind then
            assert!(wall_nanos() < first, "the same millisecond");
            thread::sleep(Duration::from_millis(2)); // time goes by
            next_turn();
            assert!(wall_nanos() > first);
        })
        .join()
        .unwrap();
    }
}
