//! The time as a worker sees it: read once a turn of its event loop, not at every look.
//!
//! A look costs some 25 ns and a request looks thirty times. On a thread that called [`turns`], the time stands
//! still until the thread has nothing left to do, or was looked at so often that the turn must be a long one;
//! on any other thread it is always read anew. Stages that take no wait so take no time.

use std::{
    cell::Cell,
    sync::LazyLock,
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

/// So many looks share a reading at most.
const SHARED: u32 = 256;

/// When this process first looked.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

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
}

/// From now on this thread reads the time once a turn: it calls [`next_turn`] before it sleeps.
pub fn turns() {
    CLOCK.with(|clock| clock.has_turns.set(true));
}

/// The next look reads the time anew.
pub fn next_turn() {
    CLOCK.with(|clock| {
        clock.left.set(0);
        clock.turn.set(clock.turn.get() + 1);
    });
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
    *EPOCH + Duration::from_nanos(nanos)
}

/// The number of nanoseconds of this process at an instant; 0 before its first look.
pub fn nanos_at(instant: Instant) -> u64 {
    nanos_of(instant.saturating_duration_since(*EPOCH))
}

/// The wall's time in nanoseconds since 1970; 0 for a clock that stands before it.
pub fn unix_nanos() -> u64 {
    CLOCK.with(|clock| {
        clock.look();
        clock.unix_nanos.get()
    })
}

/// The wall's time.
pub fn wall() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(unix_nanos())
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
        let epoch = *EPOCH; // before the reading, which would lie before it otherwise
        self.nanos.set(nanos_of(Instant::now().saturating_duration_since(epoch)));
        self.unix_nanos.set(unix_nanos_at(SystemTime::now()));
        self.left.set(if self.has_turns.get() { SHARED } else { 0 });
    }
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

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
            let (first, first_wall) = (now(), wall());
            next_turn();
            assert!(now() > first && wall() > first_wall, "the next turn");
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
}
