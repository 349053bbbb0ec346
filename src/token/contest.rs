//! Tokens that the upstream refuses soon after they worked, one after the other.
//!
//! Where the endpoint lets only the last token of an app key live, two gateways with the same app key end each other's tokens. If
//! each fetched another one as soon as its own is refused, both would fetch every second, and the one that is a moment earlier
//! would hardly ever hold a token that lives. So whoever notices it leaves the other's token alone for a while before it
//! fetches its own: both have their turns, and no call fails for it that may wait for so long.
//!
//! A refusal alone proves nothing: the upstream may refuse one caller's call with any token. A token counts only when the same
//! call succeeds with another one.

use std::time::Duration;

use tokio::time::Instant;

/// A token that is refused later than this was not ended by somebody who fetches in turn. Neither was one of this age that is
/// not refused, be it that no call used it.
const SOON: Duration = Duration::from_secs(60);

/// So many tokens in a row that end soon are no accident.
const TOKENS: u32 = 3;

/// What operators are told.
pub(super) const SAID: &str = "each new token is refused soon after it worked: somebody else fetches tokens with the same app key, \
    such as another gateway, and the token endpoint lets only the last one live. Fetches are slowed down, and calls wait for \
    them. Give each gateway an app key of its own, or let only one use this app key";

/// What operators are told in the end. Nobody may have used the token.
pub(super) const OVER: &str = "a token was not refused soon: fetches are no longer slowed down";

/// Whether somebody else ends this gateway's tokens.
#[derive(Debug, Default)]
pub(super) struct Contest {
    /// Tokens in a row that somebody else ended soon after they worked.
    ended: u32,
    /// The last token that was refused though it had worked.
    last: Option<Refused>,
}

#[derive(Debug)]
struct Refused {
    generation: u64,
    /// It was refused soon, and it is not known yet whether another one helps.
    is_open: bool,
    /// When another one may be fetched.
    until: Instant,
}

impl Contest {
    /// A token of this generation and age, due for a refresh at `refresh`, worked and is refused now. Returns whether a contest
    /// ends with it. In one, `pause` passes before the next fetch.
    pub(super) fn refused(
        &mut self,
        generation: u64,
        age: Duration,
        refresh: Duration,
        pause: Duration,
    ) -> bool {
        if self.last.as_ref().is_some_and(|last| last.generation == generation) {
            return false;
        }
        let has_lasted = has_lasted(age, refresh);
        let is_over = has_lasted && self.is_on();
        if has_lasted {
            self.ended = 0;
        }
        let now = Instant::now();
        let until = if self.is_on() { now + pause } else { now };
        self.last = Some(Refused { generation, is_open: !has_lasted, until });
        is_over
    }

    /// A call that was refused with a token of this generation succeeded with another one: it was the token. Returns whether a
    /// contest begins with it.
    pub(super) fn was_ended(&mut self, generation: u64) -> bool {
        let Some(last) = self.last.as_mut().filter(|last| last.is_open && last.generation == generation)
        else {
            return false;
        };
        last.is_open = false;
        self.ended = self.ended.saturating_add(1);
        self.ended == TOKENS
    }

    /// A token of this age is not refused. Returns whether a contest ends with it.
    pub(super) fn lives(&mut self, age: Duration, refresh: Duration) -> bool {
        if !has_lasted(age, refresh) {
            return false;
        }
        std::mem::take(self).is_on()
    }

    /// When another token may be fetched in the place of a refused one.
    pub(super) fn not_before(&self) -> Option<Instant> {
        self.last.as_ref().map(|last| last.until)
    }

    fn is_on(&self) -> bool {
        self.ended >= TOKENS
    }
}

fn has_lasted(age: Duration, refresh: Duration) -> bool {
    age >= SOON.min(refresh)
}

/// How long another's token is left alone: less than a call may wait for one of its own, where that can be. `jitter` from 0 to 1 lets
/// more than two take turns.
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

    fn in_contest() -> Contest {
        let mut contest = Contest::default();
        for generation in 1..=TOKENS {
            contest.refused(generation.into(), seconds(1), REFRESH, PAUSE);
            assert_eq!(contest.was_ended(generation.into()), generation == TOKENS);
        }
        contest
    }

    #[test]
    fn the_third_token_in_a_row_that_ends_soon_begins_a_contest_and_one_that_lasts_ends_it() {
        let mut contest = Contest::default();
        for (generation, age, begins, is_paused) in [
            (1, 1, false, false),
            (1, 2, false, false), // the same one
            (2, 59, false, false),
            (3, 60, false, false), // it lasted
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
    fn a_contest_ends_with_a_token_that_is_refused_late() {
        let mut contest = in_contest();
        assert!(!contest.refused(4, seconds(59), REFRESH, PAUSE) && is_held(&contest), "the control");
        assert!(contest.refused(5, seconds(60), REFRESH, PAUSE) && !is_held(&contest));
        assert!(!contest.was_ended(5), "it lasted");
        assert!(!contest.refused(6, seconds(60), REFRESH, PAUSE), "it ends once");
        assert!(!contest.lives(seconds(60), REFRESH), "it ends once");
    }

    #[test]
    fn a_refusal_that_no_other_token_helps_against_counts_for_nothing() {
        let mut contest = Contest::default();
        for generation in 1..9 {
            assert!(!contest.refused(generation, seconds(1), REFRESH, PAUSE) && !is_held(&contest));
            assert!(!contest.was_ended(generation - 1), "it is about the last one that was refused");
        }
    }

    #[test]
    fn a_short_life_lasts_until_its_refresh() {
        let mut contest = Contest::default();
        for generation in 1..9 {
            assert!(!contest.refused(generation, seconds(5), seconds(5), PAUSE), "{generation}");
            assert!(!contest.was_ended(generation), "{generation}");
        }
    }

    #[test]
    fn another_token_is_left_alone_for_less_than_a_call_waits() {
        for (wait, shortest, longest) in
            [(5, 2500, 3750), (10, 5000, 7500), (60, 20_000, 20_000), (0, 2000, 2000)]
        {
            let at = |jitter| pause(seconds(wait), jitter).as_millis();
            assert_eq!((at(0.0), at(1.0)), (shortest, longest), "{wait}");
        }
    }
}
