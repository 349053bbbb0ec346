//! The clocks of the process. A worker reads the time once per turn of its event loop and not at every use.
//!
//! Reading a clock costs some 25 ns, and a request uses the time about thirty times. On a thread that called
//! [`turns`], the time does not advance until the thread has nothing left to do, or has used the time so often
//! that the turn must be a long one. On any other thread the clock is read at every use. A stage that does not
//! wait therefore takes no measured time.
//!
//! There are three times:
//!
//! * [`nanos`], monotonic, for deadlines, limits and durations. It stops while the machine sleeps.
//! * [`unix_nanos`], called *now*: the wall clock at the start of this process plus `CLOCK_BOOTTIME` since
//!   then. It never jumps, and it includes the time that the machine sleeps. Times of records, request ids and
//!   ages are based on it.
//! * [`wall`], the present wall clock. It may jump. A token ends when either this or *now* says so;
//!   certificates and revocation lists depend on it alone.

use std::cell::Cell;
use std::fs;
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use rustix::time::{ClockId, clock_gettime};
use tokio::time::Instant;
use uuid::Uuid;

/// How many uses share one reading at most.
// A turn with more uses serves many requests. Without a bound, deadlines within a long turn would not be
// noticed.
const SHARED: u32 = 256;

/// How long a reading of the wall clock is used on a thread with turns, in nanoseconds.
// Every request asks for it, and most turns are shorter than a millisecond. A jump of the clock need not be
// noticed any sooner.
const WALL_SERVES: u64 = 1_000_000;

/// The clock that includes the time that the machine sleeps. On macOS that is the monotonic one.
#[cfg(target_os = "linux")]
const BOOTTIME: ClockId = ClockId::Boottime;
#[cfg(not(target_os = "linux"))]
const BOOTTIME: ClockId = ClockId::Monotonic;

/// The file with the id of the present boot of the machine.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The file with the offsets of this process's time namespace (time_namespaces(7)).
const TIME_NAMESPACE: &str = "/proc/self/timens_offsets";

/// The first reading of this process.
static EPOCH: LazyLock<Epoch> = LazyLock::new(Epoch::begin);

/// One reading of all clocks at the same moment.
struct Epoch {
    monotonic: Instant,
    /// *Now* minus `CLOCK_BOOTTIME`, in nanoseconds.
    offset: i64,
}

thread_local! {
    static CLOCK: Clock = const { Clock::new() };
}

/// The clock of one thread.
struct Clock {
    has_turns: Cell<bool>,
    turn: Cell<u64>,
    /// How many more uses may share the reading.
    left: Cell<u32>,
    /// The reading of the monotonic clock, in nanoseconds since [`EPOCH`].
    nanos: Cell<u64>,
    /// The reading of *now*, in nanoseconds since 1970.
    unix_nanos: Cell<u64>,
    /// The wall clock minus *now*, in nanoseconds.
    wall_ahead: Cell<i64>,
    /// The value of *now* until which `wall_ahead` is used.
    wall_serves: Cell<u64>,
}

/// From now on this thread reads the time once per turn. It must call [`next_turn`] whenever its event loop
/// sleeps: otherwise its time advances only after 256 uses.
pub fn turns() {
    CLOCK.with(|clock| clock.has_turns.set(true));
}

/// Begins a turn: the next use reads the clocks. Call it before the event loop sleeps.
pub fn next_turn() {
    CLOCK.with(|clock| clock.turn.set(clock.turn.get() + 1));
    refresh();
}

/// Makes the next use read the clocks, without beginning a turn. For work that takes long within one turn, such
/// as passing on a long reply.
pub fn refresh() {
    CLOCK.with(|clock| clock.left.set(0));
}

/// Returns the number of turns of this thread so far. Between two turns the event loop has polled all sockets.
pub fn turn() -> u64 {
    CLOCK.with(|clock| clock.turn.get())
}

/// The monotonic time in nanoseconds since this process first asked. For comparing and subtracting only; do not
/// store or send it.
pub fn nanos() -> u64 {
    CLOCK.with(|clock| {
        clock.read_if_due();
        clock.nanos.get()
    })
}

/// The monotonic time.
pub fn now() -> Instant {
    instant(nanos())
}

/// Converts a value of [`nanos`] to an instant.
pub fn instant(nanos: u64) -> Instant {
    EPOCH.monotonic + Duration::from_nanos(nanos)
}

/// *Now*, in nanoseconds since 1970. It never goes back within a process, but may differ from the wall clock.
pub fn unix_nanos() -> u64 {
    CLOCK.with(|clock| {
        clock.read_if_due();
        clock.unix_nanos.get()
    })
}

/// The wall clock in nanoseconds since 1970; 0 if it shows an earlier time. It may jump. On a thread with turns
/// a jump shows within a millisecond.
pub fn wall_nanos() -> u64 {
    CLOCK.with(|clock| {
        clock.read_if_due();
        clock.look_at_wall();
        clock.unix_nanos.get().saturating_add_signed(clock.wall_ahead.get())
    })
}

/// The wall clock; see [`wall_nanos`].
pub fn wall() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(wall_nanos())
}

/// The wall clock minus *now*, in nanoseconds, read at every call. It is how far the wall clock was set since
/// this process first asked.
pub fn wall_ahead() -> i64 {
    signed(unix_nanos_at(SystemTime::now())) - signed(EPOCH.now(boottime()))
}

/// The time since the machine was booted, including the time that it slept (`CLOCK_BOOTTIME`), read at every
/// call.
pub fn boottime() -> Duration {
    Duration::try_from(clock_gettime(BOOTTIME)).unwrap_or_default()
}

/// The id of the present boot of the machine. [`boottime`] of two processes can be compared if it is the same.
/// `None` if it cannot be read (`ProcSubset=pid`), or if the time namespace of this process has an offset of
/// its own.
// A wrong id would make records of another boot look exactly dated. No id counts as a new boot, which only
// makes records look younger.
pub fn boot_id() -> Option<Uuid> {
    let offsets = fs::read_to_string(TIME_NAMESPACE).unwrap_or_default();
    let id = fs::read_to_string(BOOT_ID).ok().filter(|_| !has_own_boottime(&offsets));
    id?.trim().parse().ok()
}

/// Whether a time namespace with these offsets has a boot time of its own.
// `CLOCK_BOOTTIME` of such a process cannot be compared with that of another one, though both are of one boot.
fn has_own_boottime(offsets: &str) -> bool {
    let boottime = offsets.lines().find_map(|line| line.strip_prefix("boottime"));
    boottime.is_some_and(|offset| offset.split_whitespace().any(|part| part != "0"))
}

/// A time of the wall clock in nanoseconds since 1970; 0 before that.
pub fn unix_nanos_at(wall: SystemTime) -> u64 {
    nanos_of(wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

/// A duration in nanoseconds, capped at about 584 years.
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

    fn read_if_due(&self) {
        match self.left.get() {
            0 => self.read(),
            left => self.left.set(left - 1),
        }
    }

    #[cold]
    fn read(&self) {
        // Initialised before the clock is read below: on the first use the reading would otherwise lie before
        // the epoch.
        let epoch = &*EPOCH;
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

    /// *Now*, at a reading of `CLOCK_BOOTTIME`.
    fn now(&self, boottime: Duration) -> u64 {
        nanos_of(boottime).saturating_add_signed(self.offset)
    }
}

/// Converts nanoseconds since 1970; capped at the year 2262.
fn signed(nanos: u64) -> i64 {
    i64::try_from(nanos).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn time_is_frozen_within_a_turn_only_on_threads_with_turns() {
        let differs = || {
            let first = now();
            thread::sleep(Duration::from_millis(2));
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
    fn unix_time_advances_with_the_boot_clock_from_the_start() {
        let apart = |now: u64| wall_ahead().unsigned_abs() + now.abs_diff(unix_nanos_at(SystemTime::now()));
        assert!(apart(unix_nanos()) < 1_000_000_000, "nobody set the clock meanwhile");
        let booted = boottime();
        let first = unix_nanos();
        thread::sleep(Duration::from_millis(2));
        let went = Duration::from_nanos(unix_nanos() - first);
        assert!(went >= Duration::from_millis(2) && went <= boottime() - booted, "{went:?}");
    }

    #[test]
    fn time_namespace_with_its_own_boot_time_is_detected() {
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
    fn wall_clock_of_a_turn_follows_a_jump_within_a_millisecond() {
        thread::spawn(|| {
            turns();
            let first = wall_nanos();
            // As if the wall clock had been an hour behind at the last reading.
            CLOCK.with(|clock| clock.wall_ahead.set(-3_600_000_000_000));
            assert!(wall_nanos() < first, "the same millisecond");
            // Longer than the millisecond for which a reading is used.
            thread::sleep(Duration::from_millis(2));
            next_turn();
            assert!(wall_nanos() > first);
        })
        .join()
        .unwrap();
    }
}
