//! A bounded number of connections for a listener that must always answer. At the bound a new connection
//! replaces the one that has been idle longest, so that a client that only holds connections cannot keep others
//! out.
//!
//! A connection is idle since its last *step*: it was accepted, its request was complete, or its answer was
//! ready. Received bytes are not a step, so that a client that sends one now and then is replaced like a silent
//! one (slowloris).
//!
//! Used by the admin listener and the control socket. Not meant for callers' connections: see
//! [`crate::concurrency`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The places of one listener.
#[derive(Debug)]
pub(crate) struct Seats {
    max: usize,
    taken: Mutex<Taken>,
    /// Signalled when a connection ends or becomes idle.
    has_room: Notify,
}

#[derive(Debug, Default)]
struct Taken {
    /// The number of steps so far. It orders connections by age and numbers them.
    steps: u64,
    chairs: Vec<Chair>,
}

/// One connection at the listener.
#[derive(Debug)]
struct Chair {
    number: u64,
    /// The step since which it is idle; `None` while it is at work and must not be replaced.
    idle_since: Option<u64>,
    leave: Arc<Notify>,
}

/// The place of one connection, freed on drop.
#[derive(Debug)]
pub(crate) struct Seat {
    seats: Arc<Seats>,
    number: u64,
    leave: Arc<Notify>,
}

impl Seats {
    /// A listener with at most `max` connections.
    pub(crate) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max, taken: Mutex::default(), has_room: Notify::new() })
    }

    /// Takes a place, if necessary that of the connection that has been idle longest. Waits while all are at
    /// work. Call it from one accept loop only: a wake-up is for one waiter.
    pub(crate) async fn take(self: &Arc<Self>) -> Seat {
        loop {
            if let Some(seat) = self.try_take() {
                return seat;
            }
            self.has_room.notified().await;
        }
    }

    fn try_take(self: &Arc<Self>) -> Option<Seat> {
        let mut taken = self.lock();
        if taken.chairs.len() >= self.max {
            let idle = taken.chairs.iter().enumerate().filter_map(|(i, chair)| Some((chair.idle_since?, i)));
            let (_, idlest) = idle.min()?;
            // The place is free at once, though its connection ends a little later. For that moment there is
            // one connection more than `max`.
            taken.chairs.swap_remove(idlest).leave.notify_one();
        }
        taken.steps += 1;
        let (number, leave) = (taken.steps, Arc::new(Notify::new()));
        taken.chairs.push(Chair { number, idle_since: Some(number), leave: leave.clone() });
        Some(Seat { seats: self.clone(), number, leave })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// Marks the connection as at work: it cannot be replaced from now on.
    pub(crate) fn works(&self) {
        self.set(|_| None);
    }

    /// Notes a step: the connection is idle from now on.
    pub(crate) fn steps(&self) {
        self.set(Some);
    }

    /// Returns once another connection has taken the place. Cancellation safe.
    pub(crate) async fn is_taken(&self) {
        self.leave.notified().await;
    }

    fn set(&self, idle_since: impl FnOnce(u64) -> Option<u64>) {
        let mut taken = self.seats.lock();
        taken.steps += 1;
        let now = taken.steps;
        // Not found: the place was taken a moment ago, and the connection ends.
        if let Some(chair) = taken.chairs.iter_mut().find(|chair| chair.number == self.number) {
            chair.idle_since = idle_since(now);
        }
        drop(taken);
        self.seats.has_room.notify_one();
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.lock().chairs.retain(|chair| chair.number != self.number);
        self.seats.has_room.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_told(seat: &Seat) -> bool {
        use std::pin::pin;
        use std::task::{Context, Waker};
        pin!(seat.is_taken()).poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn longest_idle_connection_slot_is_evicted_and_busy_ones_stay() {
        let seats = Seats::new(3);
        let [first, second, third] = [(); 3].map(|()| seats.try_take().unwrap());
        first.steps();
        second.works();
        let fourth = seats.try_take().unwrap();
        assert_eq!([&first, &second, &third, &fourth].map(is_told), [false, false, true, false]);
        // The drop of a replaced connection must not free the place of the one that replaced it.
        drop(third);
        fourth.works();
        let fifth = seats.try_take().unwrap();
        assert_eq!([&first, &second, &fourth, &fifth].map(is_told), [true, false, false, false]);
        fifth.works();
        assert!(seats.try_take().is_none(), "all are at work");
        second.steps();
        let sixth = seats.try_take().unwrap();
        assert!(is_told(&second) && !is_told(&sixth));
        drop(fifth);
        let seventh = seats.try_take().unwrap();
        assert_eq!([&fourth, &sixth, &seventh].map(is_told), [false; 3], "one was free");
    }
}
