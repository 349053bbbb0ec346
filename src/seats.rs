//! A bounded number of connections at a listener that must always answer. At the bound the one that has been idle
//! longest makes room, so that whoever only holds connections keeps nobody out.
//!
//! A connection is idle since its last step: it came, its request was whole, its answer was ready. Bytes are no step:
//! who sends one now and then grows old all the same.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The seats of a listener.
#[derive(Debug)]
pub(crate) struct Seats {
    max: usize,
    taken: Mutex<Taken>,
    /// Somebody left, or is idle.
    has_room: Notify,
}

#[derive(Debug, Default)]
struct Taken {
    /// Counts steps, and tells seats apart.
    steps: u64,
    chairs: Vec<Chair>,
}

#[derive(Debug)]
struct Chair {
    number: u64,
    /// The step since which it is idle; `None`: it is at work, and stays.
    idle_since: Option<u64>,
    leave: Arc<Notify>,
}

/// A connection's seat. Free again on drop.
#[derive(Debug)]
pub(crate) struct Seat {
    seats: Arc<Seats>,
    number: u64,
    leave: Arc<Notify>,
}

impl Seats {
    pub(crate) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max, taken: Mutex::default(), has_room: Notify::new() })
    }

    /// Takes a seat, if need be that of the connection that has been idle longest. Waits while all are at work. For one
    /// accept loop.
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
    /// From now on it is at work, and nobody takes its seat.
    pub(crate) fn works(&self) {
        self.set(|_| None);
    }

    /// It made a step, and is idle from now on.
    pub(crate) fn steps(&self) {
        self.set(Some);
    }

    /// Returns when another connection has taken its seat.
    pub(crate) async fn is_taken(&self) {
        self.leave.notified().await;
    }

    fn set(&self, idle_since: impl FnOnce(u64) -> Option<u64>) {
        let mut taken = self.seats.lock();
        taken.steps += 1;
        let now = taken.steps;
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
    fn the_seat_that_is_idle_longest_goes_and_those_at_work_stay() {
        let seats = Seats::new(3);
        let [first, second, third] = [(); 3].map(|()| seats.try_take().unwrap());
        first.steps();
        second.works();
        let fourth = seats.try_take().unwrap();
        assert_eq!([&first, &second, &third, &fourth].map(is_told), [false, false, true, false]);
        drop(third); // its seat is another's already
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
