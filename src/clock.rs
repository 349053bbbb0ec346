//! The time as a worker sees it: read once a turn of its event loop, not at every look.
//!
//! A look costs some 25 ns and a request looks thirty times. On a thread that called [`turns`], the time stands
//! still until the thread has nothing left to do, or was looked at so often that the turn must be a long one;
//! on any other thread it is always read anew. Stages that take no wait so take no time.

use std::{cell::Cell, time::SystemTime};

use tokio::time::Instant;

/// So many looks share a reading at most.
const SHARED: u32 = 256;

#[derive(Clone, Copy)]
struct Reading {
    monotonic: Instant,
    wall: SystemTime,
}

thread_local! {
    static READING: Cell<Option<Reading>> = const { Cell::new(None) };
    /// Looks that may still share the reading.
    static LEFT: Cell<u32> = const { Cell::new(0) };
    static TURNS: Cell<bool> = const { Cell::new(false) };
    static TURN: Cell<u64> = const { Cell::new(0) };
}

/// From now on this thread reads the time once a turn: it calls [`next_turn`] before it sleeps.
pub fn turns() {
    TURNS.set(true);
}

/// The next look reads the time anew.
pub fn next_turn() {
    LEFT.set(0);
    TURN.set(TURN.get() + 1);
}

/// Counts the turns. Between two of them the event loop has looked at all sockets.
pub fn turn() -> u64 {
    TURN.get()
}

/// The monotonic time.
pub fn now() -> Instant {
    reading().monotonic
}

/// The wall's time.
pub fn wall() -> SystemTime {
    reading().wall
}

fn reading() -> Reading {
    let left = LEFT.get();
    if left > 0
        && let Some(reading) = READING.get()
    {
        LEFT.set(left - 1);
        return reading;
    }
    let reading = Reading { monotonic: Instant::now(), wall: SystemTime::now() };
    if TURNS.get() {
        READING.set(Some(reading));
        LEFT.set(SHARED);
    }
    reading
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
