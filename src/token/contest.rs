//! Contest detection: notices that another client invalidates this gateway's tokens, and slows the fetches down.
//!
//! Some token endpoints let only the last token of an app key live. Two gateways with the same app key then end each other's
//! tokens. If each fetched a new token as soon as its own is refused, both would fetch every second, and one of them would
//! hardly ever hold a valid token. In a contest a refused token is therefore replaced only after a pause, so that each gateway
//! has its turn. The pause is shorter than `token.wait` (unless that is under 3 s), so that waiting requests still get a token
//! in time.
//!
//! A refusal alone proves nothing, since the upstream may refuse one caller's call with any token. A token counts as ended by
//! another client only if the same call succeeds with another token.

use std::time::Duration;

use tokio::time::Instant;

/// The age from which on a token *has lasted*. A token that is due for a refresh earlier has lasted from then on. A token that
/// has lasted ends a contest, whether it is refused then or not, and even if no call used it.
// Clients that fetch in turn end a token within seconds; `pause` is 20 s at most. Whether a call used the token is not counted,
// since that would cost each call something.
const SOON: Duration = Duration::from_secs(60);

/// A contest begins with this many tokens in a row that another client ended soon.
// Fewer may be an accident, such as a token that somebody fetched by hand with the same app key.
const TOKENS: u32 = 3;

/// The text at the beginning of a contest, in log and `/status`.
pub(super) const SAID: &str = "each new token is refused soon after it worked: another client, such as a second gateway, \
     fetches tokens with the same app key, and only the last token of the token endpoint is valid. Fetches are slowed \
     down, and calls wait for them. Give each gateway an app key of its own, or let only one use this app key";

/// The text at the end of a contest, in the log.
// It does not claim that the token worked: perhaps no call used it.
pub(super) const OVER: &str =
    "a token was not refused soon after its fetch: fetches are no longer slowed down";

/// Whether another client ends this gateway's tokens.
#[derive(Debug, Default)]
pub(super) struct Contest {
    /// The number of tokens in a row that another client ended soon after they had worked.
    ended: u32,
    /// The last token that was refused although it had worked.
    last: Option<Refused>,
}

#[derive(Debug)]
struct Refused {
    generation: u64,
    /// Whether it was refused before it had lasted ([`SOON`]), and no call that was refused with it has succeeded with another
    /// token yet.
    is_open: bool,
    /// When another token may be fetched.
    until: Instant,
}

impl Contest {
    /// Takes note that a token that had worked is refused at this `age`. Returns whether this ends a contest. During a contest,
    /// [`Self::not_before`] is `pause` from now. `refresh` is the age at which the token is due for a refresh.
    pub(super) fn refused(
        &mut self,
        generation: u64,
        age: Duration,
        refresh: Duration,
        pause: Duration,
    ) -> bool {
        // Asked again at each wake-up of the fetcher while the token is invalidated: the pause must not begin anew each time.
        if self.last.as_ref().is_some_and(|last| last.generation == generation) {
            return false;
        }
        let has_lasted = has_lasted(age, refresh);
        // Read before the count is reset, which ends the contest.
        let is_over = has_lasted && self.is_on();
        if has_lasted {
            self.ended = 0;
        }
        let now = Instant::now();
        let until = if self.is_on() { now + pause } else { now };
        self.last = Some(Refused { generation, is_open: !has_lasted, until });
        is_over
    }

    /// Takes note that a call which was refused with this generation succeeded with another token. Returns whether this begins a
    /// contest. Each token counts once.
    pub(super) fn was_ended(&mut self, generation: u64) -> bool {
        let Some(last) = self.last.as_mut().filter(|last| last.is_open && last.generation == generation)
        else {
            return false;
        };
        last.is_open = false;
        self.ended = self.ended.saturating_add(1);
        // Equal, not at least: a contest that goes on is reported once.
        self.ended == TOKENS
    }

    /// Takes note that the present token, of this age, is not refused. Returns whether this ends a contest.
    pub(super) fn lives(&mut self, age: Duration, refresh: Duration) -> bool {
        if !has_lasted(age, refresh) {
            return false;
        }
        std::mem::take(self).is_on()
    }

    /// Returns when the replacement of the last refused token may be fetched.
    pub(super) fn not_before(&self) -> Option<Instant> {
        self.last.as_ref().map(|last| last.until)
    }

    fn is_on(&self) -> bool {
        self.ended >= TOKENS
    }
}

fn has_lasted(age: Duration, refresh: Duration) -> bool {
    // From `refresh` on this gateway replaces the token by itself, so a token with a short life may never reach `SOON`.
    age >= SOON.min(refresh)
}

/// Returns the pause before a refused token is replaced during a contest: half to three quarters of `wait`, the time that a
/// request waits for a token, within 2 s and 20 s. `jitter` is from 0 to 1.
// The jitter is for more than two gateways, which with equal pauses would fetch at the same moment.
pub(super) fn pause(wait: Duration, jitter: f64) -> Duration {
    wait.mul_f64(0.5 + 0.25 * jitter.clamp(0.0, 1.0)).clamp(Duration::from_secs(2), Duration::from_secs(20))
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFRESH: Duration = Duration::from_secs(300);
    const PAUSE: Duration = Duration::from_secs(3);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn is_held(contest: &Contest) -> bool {
        contest.not_before().is_some_and(|until| until > Instant::now())
    }

    // The order of a real contest: the refusal, then the success of the replay with another token.
    fn in_contest() -> Contest {
        let mut contest = Contest::default();
        for generation in 1..=TOKENS {
            contest.refused(generation.into(), seconds(1), REFRESH, PAUSE);
            assert_eq!(contest.was_ended(generation.into()), generation == TOKENS);
        }
        contest
    }

    #[test]
    fn third_short_lived_token_starts_a_contest_that_a_lasting_one_ends() {
        let mut contest = Contest::default();
        for (generation, age, begins, is_paused) in [
            (1, 1, false, false),
            // The same token again does not count.
            (1, 2, false, false),
            (2, 59, false, false),
            // It lasted for a minute, so the count begins anew.
            (3, 60, false, false),
            (4, 1, false, false),
            (5, 1, false, false),
            (6, 59, true, false),
            (7, 1, false, true),
        ] {
            assert!(!contest.refused(generation, seconds(age), REFRESH, PAUSE), "{generation}");
            assert_eq!(contest.was_ended(generation), begins, "{generation}");
            assert!(!contest.was_ended(generation), "it counts once");
            assert_eq!(is_held(&contest), is_paused, "{generation}");
        }
        assert!(!contest.lives(seconds(59), REFRESH) && is_held(&contest));
        assert!(contest.lives(seconds(60), REFRESH) && !is_held(&contest));
        assert!(!contest.lives(seconds(60), REFRESH), "it ends once");
        assert!(!contest.refused(8, seconds(1), REFRESH, PAUSE), "it is counted anew");
        assert!(!contest.was_ended(8));
    }

    #[test]
    fn contest_ends_when_a_token_is_refused_late() {
        let mut contest = in_contest();
        assert!(!contest.refused(4, seconds(59), REFRESH, PAUSE) && is_held(&contest), "the control");
        assert!(contest.refused(5, seconds(60), REFRESH, PAUSE) && !is_held(&contest));
        assert!(!contest.was_ended(5), "it lasted");
        assert!(!contest.refused(6, seconds(60), REFRESH, PAUSE), "it ends once");
        assert!(!contest.lives(seconds(60), REFRESH), "it ends once");
    }

    // Before this rule, one caller whose calls are refused with any token slowed the fetches down for all callers.
    #[test]
    fn refusal_without_a_working_successor_does_not_count() {
        let mut contest = Contest::default();
        for generation in 1..9 {
            assert!(!contest.refused(generation, seconds(1), REFRESH, PAUSE) && !is_held(&contest));
            assert!(!contest.was_ended(generation - 1), "it is about the last one that was refused");
        }
    }

    // The gateway's own refreshes of short tokens must not look like a contest.
    #[test]
    fn token_used_until_its_refresh_is_not_short_lived() {
        let mut contest = Contest::default();
        for generation in 1..9 {
            assert!(!contest.refused(generation, seconds(5), seconds(5), PAUSE), "{generation}");
            assert!(!contest.was_ended(generation), "{generation}");
        }
    }

    #[test]
    fn contest_pause_is_shorter_than_the_wait_of_a_call() {
        for (wait, shortest, longest) in
            [(5, 2500, 3750), (10, 5000, 7500), (60, 20_000, 20_000), (0, 2000, 2000)]
        {
            let at = |jitter| pause(seconds(wait), jitter).as_millis();
            assert_eq!((at(0.0), at(1.0)), (shortest, longest), "{wait}");
        }
    }
}
