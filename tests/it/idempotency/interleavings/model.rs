//! The rules for equal calls, restated: which answers a call may get, by what may have become of earlier ones.

use std::collections::HashMap;

/// How calls without a key are treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Guard,
    Block,
    Warn,
}

impl Mode {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Guard => "guard",
            Self::Block => "block",
            Self::Warn => "warn",
        }
    }
}

/// How a call that went out ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Succeeded,
    Failed,
    /// Refused by the upstream, or never sent.
    Refused,
    Unknown,
}

impl Ended {
    pub(super) const ALL: [Self; 4] = [Self::Succeeded, Self::Failed, Self::Refused, Self::Unknown];

    pub(super) fn of(outcome: &str) -> Self {
        match outcome {
            "succeeded" => Self::Succeeded,
            "failed" => Self::Failed,
            "refused" | "not_sent" => Self::Refused,
            "unknown" => Self::Unknown,
            _ => panic!("{outcome}"),
        }
    }
}

/// What a caller is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Said {
    Sent(Ended),
    Replayed { first: String, is_success: bool },
    InProgress(String),
    OutcomeUnknown(String),
    Duplicate(String),
    Done(String),
    NotSent,
}

#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) number: u64,
    pub(super) key: Option<char>,
    pub(super) force: Option<String>,
}

/// A set of states that a call may be in.
type States = u8;
const AT_WORK: States = 1;
/// It stands in nobody's way: it was not done, or another call stands for it.
const GONE: States = 2;
/// It failed, and its key replays that.
const FAILED: States = 4;
const UNKNOWN: States = 8;
/// It succeeded, and its caller does not know.
const UNDELIVERED: States = 16;
const SUCCEEDED: States = 32;
/// It succeeded and was answered; whether its caller, who had closed its side, took the answer is to be seen.
const TAKING: States = 64;
/// Unknown to its key only: a call without that key was forced, and stands for it towards all others.
const KEY_UNKNOWN: States = 128;

#[derive(Clone, Debug)]
pub(super) struct Past {
    pub(super) call: Call,
    pub(super) mode: Mode,
    /// Its request id, once it is known.
    pub(super) id: Option<String>,
    pub(super) may_be_sent: bool,
    may: States,
    /// What may become of it while it is at work.
    ends: States,
    /// What its caller was told that it came to.
    told: Option<Ended>,
    /// Whether it repeats by force a doubt without a key, so that it guards against other keys, too.
    stands: Stands,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stands {
    No,
    Maybe,
    Surely,
}

/// What is known of the calls with one body.
#[derive(Clone, Debug, Default)]
pub(super) struct Model(Vec<Past>);

impl Past {
    fn state(&self, ended: Ended) -> States {
        match ended {
            Ended::Succeeded => SUCCEEDED,
            Ended::Failed if self.call.key.is_some() => FAILED,
            Ended::Failed | Ended::Refused => GONE,
            Ended::Unknown => UNKNOWN,
        }
    }

    fn is_forced_by(&self, call: &Call) -> bool {
        self.id.is_some() && self.id == call.force
    }

    fn has_key_of(&self, call: &Call) -> bool {
        self.call.key.is_some() && self.call.key == call.key
    }

    /// Whether bodies are compared: not if both have keys, unless one stands for a call without.
    fn is_compared_with(&self, call: &Call) -> bool {
        self.call.key.is_none() || call.key.is_none() || self.stands == Stands::Surely
    }

    fn may_be_compared_with(&self, call: &Call) -> bool {
        self.is_compared_with(call) || self.stands == Stands::Maybe
    }

    /// What a call with a key that repeats this one by force stands for.
    fn stood_for(&self) -> Stands {
        let is_doubt = self.may & (UNKNOWN | UNDELIVERED) > 0;
        let is_sure = self.may & !(UNKNOWN | UNDELIVERED) == 0;
        match (self.call.key, self.stands) {
            _ if !is_doubt => Stands::No,
            (None, _) | (_, Stands::Surely) if is_sure => Stands::Surely,
            (Some(_), Stands::No) => Stands::No,
            _ => Stands::Maybe,
        }
    }

    /// In which states it lets a call be sent. `is_youngest`: no later success is sure.
    fn passing(&self, call: &Call, mode: Mode, is_youngest: bool) -> States {
        let forced = self.is_forced_by(call);
        if self.has_key_of(call) {
            return GONE | if forced { UNKNOWN } else { 0 };
        }
        if !self.is_compared_with(call) || mode == Mode::Warn {
            return u8::MAX;
        }
        let blocks_success = mode == Mode::Block && self.call.key.is_none() && call.key.is_none();
        let success = if blocks_success && is_youngest { 0 } else { SUCCEEDED };
        let by_force = if forced { UNKNOWN | UNDELIVERED | SUCCEEDED } else { 0 };
        GONE | FAILED | KEY_UNKNOWN | success | by_force
    }

    /// In which states it explains an answer.
    fn explains(&self, call: &Call, said: &Said, mode: Mode) -> States {
        let compared = self.may_be_compared_with(call) && mode != Mode::Warn;
        let keyed = self.has_key_of(call);
        let both_without = self.call.key.is_none() && call.key.is_none();
        match said {
            Said::Replayed { is_success: true, .. } if keyed => UNDELIVERED | SUCCEEDED | TAKING,
            Said::Replayed { is_success: false, .. } if keyed => FAILED,
            Said::InProgress(_) if keyed => AT_WORK,
            Said::OutcomeUnknown(_) if keyed => UNKNOWN | KEY_UNKNOWN,
            Said::Duplicate(_) if compared && self.is_forced_by(call) => AT_WORK | TAKING,
            Said::Duplicate(_) if compared => AT_WORK | UNKNOWN | TAKING,
            Said::Done(_) if compared && !self.is_forced_by(call) => {
                UNDELIVERED | if mode == Mode::Block && both_without { SUCCEEDED } else { 0 }
            }
            _ => 0,
        }
    }

    /// What its doubts become once a forced call stands for it. Its own key still knows of it, unless that was forced.
    fn without_doubt(&self, has_its_key: bool) -> States {
        if self.may & (UNKNOWN | UNDELIVERED | KEY_UNKNOWN) == 0 {
            return 0;
        }
        // A success that was forced may flag or, under `block`, refuse as any other success.
        let success = if self.may & UNDELIVERED > 0 { SUCCEEDED } else { 0 };
        if self.call.key.is_none() || has_its_key {
            return GONE | success;
        }
        let unknown = if self.may & (UNKNOWN | KEY_UNKNOWN) > 0 { KEY_UNKNOWN } else { 0 };
        unknown | success
    }

    /// The states that it may be in from these on.
    fn set(&mut self, may: States) {
        self.may = may | if may & AT_WORK > 0 { self.ends } else { 0 };
        self.may |= if may & TAKING > 0 { SUCCEEDED } else { 0 };
    }
}

/// A call that was not sent, and held its key for the moment in which equal calls were looked for.
struct Holder {
    id: String,
    key: char,
}

impl Holder {
    fn new((call, id, said): &(Call, String, Said)) -> Option<Self> {
        let has_held = matches!(said, Said::Duplicate(_) | Said::Done(_) | Said::NotSent);
        Some(Self { id: id.clone(), key: call.key.filter(|_| has_held)? })
    }

    fn is_named_by(&self, call: &Call, id: &str, said: &Said) -> bool {
        matches!(said, Said::InProgress(first) if *first == self.id)
            && call.key == Some(self.key)
            && id != self.id
    }
}

fn first(said: &Said) -> Option<&str> {
    match said {
        Said::Replayed { first, .. }
        | Said::InProgress(first)
        | Said::OutcomeUnknown(first)
        | Said::Duplicate(first)
        | Said::Done(first) => Some(first),
        Said::Sent(_) | Said::NotSent => None,
    }
}

impl Model {
    pub(super) fn pasts(&mut self) -> impl Iterator<Item = &mut Past> {
        self.0.iter_mut()
    }

    pub(super) fn ids(&self) -> Vec<String> {
        self.0.iter().filter_map(|past| past.id.clone()).collect()
    }

    /// What calls meant to repeat.
    pub(super) fn forced_ids(&self) -> Vec<String> {
        self.0.iter().filter_map(|past| past.call.force.clone()).collect()
    }

    /// Whether no call can be at work.
    pub(super) fn is_quiet(&self) -> bool {
        self.0.iter().all(|past| past.may & AT_WORK == 0)
    }

    /// In which states each earlier call lets this one be sent.
    fn passing(&self, call: &Call, mode: Mode) -> Vec<States> {
        let youngest = self.0.iter().rposition(|past| past.call.key.is_none() && past.may == SUCCEEDED);
        let is_youngest = |place| youngest.is_none_or(|youngest| youngest == place);
        (0..).zip(&self.0).map(|(place, past)| past.passing(call, mode, is_youngest(place))).collect()
    }

    pub(super) fn is_surely_sent(&self, call: &Call, mode: Mode) -> bool {
        self.0.iter().zip(self.passing(call, mode)).all(|(past, passing)| past.may & !passing == 0)
    }

    fn may_be_sent(&self, call: &Call, mode: Mode) -> bool {
        self.0.iter().zip(self.passing(call, mode)).all(|(past, passing)| past.may & passing > 0)
    }

    fn place(&self, id: &str) -> Option<usize> {
        self.0.iter().position(|past| past.id.as_deref() == Some(id))
    }

    fn add(&mut self, call: Call, mode: Mode, ends: &[Ended]) -> &mut Past {
        let stands = call.force.as_deref().and_then(|force| self.place(force));
        let stands = stands.map_or(Stands::No, |first| self.0[first].stood_for());
        let (id, told) = (None, None);
        let mut past = Past { call, mode, id, may_be_sent: false, may: GONE, ends: 0, told, stands };
        past.ends = ends.iter().map(|end| past.state(*end)).fold(0, |all, state| all | state);
        self.0.push(past);
        self.0.last_mut().unwrap()
    }

    /// One call, with nothing else at once but what left.
    pub(super) fn answered(
        &mut self,
        call: Call,
        id: &str,
        said: &Said,
        ends: &[Ended],
        mode: Mode,
        half_closes: bool,
    ) {
        if let Said::Sent(ended) = said {
            assert!(self.may_be_sent(&call, mode), "{call:?} was sent: {self:#?}");
            assert!(ends.contains(ended), "{call:?}: {said:?}, not of {ends:?}");
            for (place, passing) in self.passing(&call, mode).into_iter().enumerate() {
                let may = self.0[place].may & passing;
                self.0[place].set(may);
            }
            self.sent(call, id, *ended, mode, ends);
            let past = self.0.last_mut().unwrap();
            past.may |= if half_closes && *ended == Ended::Succeeded { TAKING } else { 0 };
            return;
        }
        if *said == Said::NotSent {
            return self.not_sent(call, id, mode);
        }
        if let Some(place) = self.explain(&call, said, mode) {
            let may = self.0[place].may & self.0[place].explains(&call, said, mode);
            self.0[place].set(may);
        }
        self.tell(said, half_closes);
        self.add(call, mode, &[]).id = Some(id.to_owned());
    }

    /// The call that explains a refusal or a replay; `None` if it is one of which the id is not known yet.
    fn explain(&self, call: &Call, said: &Said, mode: Mode) -> Option<usize> {
        let first = first(said).unwrap_or_else(|| panic!("{call:?} was not sent: {said:?}"));
        let explains = |past: &Past| past.may & past.explains(call, said, mode) > 0;
        let place = self.place(first);
        match place {
            Some(place) => {
                assert!(explains(&self.0[place]), "{call:?}: {said:?} is not explained: {self:#?}");
            }
            None => {
                let mut unnamed = self.0.iter().filter(|past| past.id.is_none());
                // One that left may not have been sent, and have held its key for a moment all the same.
                let is_held = |past: &Past| matches!(said, Said::InProgress(_)) && past.has_key_of(call);
                assert!(
                    unnamed.any(|past| explains(past) || is_held(past)),
                    "{call:?}: {said:?} names nobody: {self:#?}"
                );
            }
        }
        place
    }

    /// A whole answer that tells of a success ends the doubt.
    fn tell(&mut self, said: &Said, half_closes: bool) {
        if let Said::Done(first) | Said::Replayed { first, is_success: true } = said
            && let Some(place) = self.place(first)
        {
            let past = &mut self.0[place];
            // A caller that has closed its side takes its answer later, as the first one may.
            past.set(SUCCEEDED | past.may & TAKING | if half_closes { past.may & UNDELIVERED } else { 0 });
        }
    }

    fn sent(&mut self, call: Call, id: &str, ended: Ended, mode: Mode, ends: &[Ended]) {
        let force = call.force.clone();
        let past = self.add(call, mode, ends);
        past.id = Some(id.to_owned());
        (past.may_be_sent, past.told) = (true, Some(ended));
        past.may = past.state(ended);
        if matches!(ended, Ended::Succeeded | Ended::Unknown) {
            self.supersede(force.as_deref(), true);
        }
    }

    /// It was at work for a moment, and may have its intent on record.
    fn not_sent(&mut self, call: Call, id: &str, mode: Mode) {
        let past = self.add(call, mode, &[]);
        (past.id, past.may_be_sent) = (Some(id.to_owned()), true);
    }

    /// A call that was forced stands for the one that it repeats.
    fn supersede(&mut self, force: Option<&str>, is_sure: bool) {
        let own = self.0.last().map(|past| past.call.clone());
        let Some(place) = force.and_then(|force| self.place(force)) else { return };
        let past = &mut self.0[place];
        let has_its_key = own.as_ref().is_some_and(|own| past.has_key_of(own));
        let is_compared = own.as_ref().is_some_and(|own| past.is_compared_with(own));
        let may_be_forced = has_its_key || own.is_some_and(|own| past.may_be_compared_with(&own));
        // What does not stand in the way of a call is not repeated by it.
        if !may_be_forced {
            return;
        }
        let doubts = past.may & (UNKNOWN | UNDELIVERED | KEY_UNKNOWN);
        let stands = past.without_doubt(has_its_key);
        past.may =
            if is_sure && (is_compared || has_its_key) { past.may & !doubts } else { past.may } | stands;
    }

    /// Calls at once. What each was told is checked against what the others may have been at that moment.
    pub(super) fn answered_together(
        &mut self,
        calls: Vec<(Call, Option<(String, Said)>)>,
        ends: &[Ended],
        mode: Mode,
    ) {
        let earlier = self.0.len();
        // Who is told of a success ends the doubt of the others, of those without an answer, too.
        for (_, answer) in &calls {
            if let Some((_, Said::Done(first) | Said::Replayed { first, .. })) = answer
                && let Some(place) = self.place(first)
            {
                let past = &mut self.0[place];
                past.may |= if past.may & UNDELIVERED > 0 { SUCCEEDED } else { 0 };
            }
        }
        for (call, _) in calls.iter().filter(|(_, answer)| answer.is_none()) {
            self.left(call.clone(), &[ends, &[Ended::Refused]].concat(), mode);
        }
        // Forced calls first: what they repeat no longer stands in the way of the others.
        let is_sent = |said: &Said| matches!(said, Said::Sent(_));
        let (mut sent, told): (Vec<_>, Vec<_>) = calls
            .into_iter()
            .filter_map(|(call, answer)| answer.map(|(id, said)| (call, id, said)))
            .partition(|(_, _, said)| is_sent(said));
        sent.sort_by_key(|(call, ..)| call.force.is_none());
        let before: Vec<_> = self.0[..earlier].iter().map(|past| past.may).collect();
        // A late call may follow a forced one that cleared its way, so any order counts in which each could be sent.
        let ordered = self.in_some_order(&sent, &before, ends, mode);
        let ordered = ordered.unwrap_or_else(|| panic!("{sent:?} were sent: {self:#?}"));
        let origin = std::mem::replace(self, ordered);
        // What one stands for depends on the order, which may have been another one.
        for past in &mut self.0[earlier..] {
            let first = past.call.force.as_deref().and_then(|force| origin.place(force));
            if past.stands != first.map_or(Stands::No, |first| origin.0[first].stood_for()) {
                past.stands = Stands::Maybe;
            }
        }
        let (not_sent, told): (Vec<_>, Vec<_>) =
            told.into_iter().partition(|(.., said)| *said == Said::NotSent);
        let holders: Vec<_> = told.iter().chain(&not_sent).filter_map(Holder::new).collect();
        for (call, id, _) in not_sent {
            self.not_sent(call, &id, mode);
        }
        let after: Vec<_> = self.0.iter().map(|past| past.may).collect();
        for (place, past) in self.0.iter_mut().enumerate() {
            past.may |= before.get(place).copied().unwrap_or(AT_WORK);
        }
        for (call, id, said) in &told {
            if !holders.iter().any(|holder| holder.is_named_by(call, id, said)) {
                self.explain(call, said, mode);
            }
        }
        for (past, may) in self.0.iter_mut().zip(after) {
            past.may = may;
        }
        for (call, id, said) in told {
            if matches!(&said, Said::Done(first) | Said::Replayed { first, .. }
                if self.place(first).is_some_and(|place| self.0[place].may & UNDELIVERED > 0))
            {
                // Told while a forced call stands for it, it may be told once more if that one fails.
                let was_forced = self.0[earlier..].iter().any(|past| past.call.force.is_some());
                self.tell(&said, was_forced);
            }
            self.add(call, mode, &[]).id = Some(id);
        }
    }

    /// The model behind calls that were sent at once, in the first order in which each could be sent; `before` is what earlier
    /// calls may have been when the first of them came.
    fn in_some_order(
        &self,
        sent: &[(Call, String, Said)],
        before: &[States],
        ends: &[Ended],
        mode: Mode,
    ) -> Option<Self> {
        if sent.is_empty() {
            return Some(self.clone());
        }
        (0..sent.len()).filter(|next| self.may_be_next(&sent[*next].0, before, mode)).find_map(|next| {
            let (mut model, mut rest) = (self.clone(), sent.to_vec());
            let (call, id, said) = rest.remove(next);
            model.sent_next(call, &id, &said, before.len(), (ends, mode));
            model.in_some_order(&rest, before, ends, mode)
        })
    }

    fn may_be_next(&self, call: &Call, before: &[States], mode: Mode) -> bool {
        self.0.iter().zip(self.passing(call, mode)).enumerate().all(|(place, (past, passing))| {
            // Under `warn` nothing is refused for another call at work: two may repeat one doubt at once.
            let before = if mode == Mode::Warn { before.get(place).copied() } else { None };
            (past.may | before.unwrap_or(0)) & passing > 0
        })
    }

    fn sent_next(
        &mut self,
        call: Call,
        id: &str,
        said: &Said,
        earlier: usize,
        (ends, mode): (&[Ended], Mode),
    ) {
        let Said::Sent(ended) = *said else { return };
        let passing = self.passing(&call, mode);
        // What it repeats by force was over, and is at work no more, though its caller had left. Of a call that it is not
        // compared with it tells nothing.
        for (past, passing) in self.0[..earlier].iter_mut().zip(passing) {
            if past.is_forced_by(&call) && passing & AT_WORK == 0 && past.may & !AT_WORK > 0 {
                past.may &= !AT_WORK;
            }
        }
        assert!(ends.contains(&ended), "{call:?}: {said:?}, not of {ends:?}");
        self.sent(call, id, ended, mode, ends);
    }

    /// A call whose caller left: it may be at work, or be over, or never have been read.
    pub(super) fn left(&mut self, call: Call, ends: &[Ended], mode: Mode) {
        let may_be_sent = self.may_be_sent(&call, mode);
        let force = call.force.clone();
        // What it was told may have counted as told.
        for past in &mut self.0 {
            if past.is_compared_with(&call) || past.has_key_of(&call) {
                past.may |= if past.may & UNDELIVERED > 0 { SUCCEEDED } else { 0 };
            }
        }
        let past = self.add(call, mode, ends);
        past.may_be_sent = may_be_sent;
        if !may_be_sent {
            return;
        }
        past.ends |= if past.ends & SUCCEEDED > 0 { UNDELIVERED } else { 0 };
        past.set(AT_WORK);
        self.supersede(force.as_deref(), false);
    }

    /// It is on record that a success did not reach its caller.
    pub(super) fn is_undelivered(&mut self, number: u64) {
        let past = self.0.iter_mut().find(|past| past.call.number == number).unwrap();
        assert!(past.may & UNDELIVERED > 0, "{past:?}");
        past.may = UNDELIVERED;
    }

    /// A new process: no call is at work, and what was without an outcome is unknown. Behind a kill, successes may
    /// count as undelivered, and a call without a key may be in doubt though it was answered.
    pub(super) fn restarted(&mut self, found: &HashMap<u64, Ended>, was_killed: bool) {
        for past in &mut self.0 {
            let Some(ended) = found.get(&past.call.number) else {
                assert!(past.told.is_none(), "sent, and no intent: {past:?}");
                past.may = GONE;
                continue;
            };
            assert!(past.may_be_sent, "{past:?} was sent");
            let is_lost = was_killed && *ended == Ended::Unknown && past.call.key.is_none();
            assert!(is_lost || past.told.is_none_or(|told| told == *ended), "{past:?}: {ended:?}");
            let state = past.state(*ended);
            let is_success = *ended == Ended::Succeeded;
            let state = if is_success { SUCCEEDED | UNDELIVERED } else { state };
            let is_doubted = was_killed || past.may & TAKING > 0;
            let extra = if is_doubted && is_success { UNDELIVERED } else { 0 };
            let kept = past.may & (state | GONE | KEY_UNKNOWN);
            past.may = if is_lost && past.told.is_some() {
                // Told before its outcome was on record; it may have been repeated by force since.
                state | past.may & (GONE | KEY_UNKNOWN)
            } else if past.told.is_some() || kept > 0 && past.may & AT_WORK == 0 {
                past.may & !(AT_WORK | TAKING) | extra
            } else {
                state
            };
        }
        self.settle_forced(found);
    }

    /// What became of calls that were repeated by force, now that the ends of the later ones are known.
    fn settle_forced(&mut self, found: &HashMap<u64, Ended>) {
        for place in 0..self.0.len() {
            let call = self.0[place].call.clone();
            let ended = found.get(&call.number).copied();
            let is_open = self.0[place].told.is_none() || self.0[place].told != ended;
            if let Some(force) = &call.force
                && is_open
                && matches!(ended, Some(Ended::Succeeded | Ended::Unknown))
                && let Some(first) =
                    self.place(force).filter(|first| self.0[*first].may & (UNKNOWN | UNDELIVERED) > 0)
            {
                let has_its_key = self.0[first].has_key_of(&call);
                if !has_its_key && !self.0[first].may_be_compared_with(&call) {
                    continue;
                }
                self.0[first].may |= self.0[first].without_doubt(has_its_key);
            }
        }
    }
}

/// A model that knows of one call without a key, of unknown outcome.
fn with_doubt() -> Model {
    let mut model = Model::default();
    let call = Call { number: 1, key: None, force: None };
    model.answered(call, "first", &Said::Sent(Ended::Unknown), &[Ended::Unknown], Mode::Block, false);
    model
}

#[test]
fn unanswered_call_may_be_sent_after_the_success_was_reported() {
    let mut model = Model::default();
    model.left(Call { number: 1, key: None, force: None }, &[Ended::Succeeded], Mode::Guard);
    model.pasts().next().unwrap().id = Some("first".into());
    model.is_undelivered(1);
    let keyed = Call { number: 2, key: Some('A'), force: None };
    let told =
        (Call { number: 3, key: None, force: None }, Some(("third".to_owned(), Said::Done("first".into()))));
    model.answered_together(vec![(keyed, None), told], &[Ended::Unknown], Mode::Guard);
    assert!(model.pasts().find(|past| past.call.number == 2).unwrap().may_be_sent);
}

#[test]
fn rejected_call_holds_its_key_briefly() {
    let call = |number| Call { number, key: Some('A'), force: None };
    let told = |id: &str, said| Some((id.to_owned(), said));
    let duplicate = || Said::Duplicate("first".into());
    let in_progress = |id: &str| Said::InProgress(id.into());
    let calls = |named: &str| {
        vec![
            (call(2), told("second", duplicate())),
            (call(3), told("third", duplicate())),
            (call(4), told("fourth", in_progress(named))),
        ]
    };
    with_doubt().answered_together(calls("third"), &[Ended::Succeeded], Mode::Block);
    for nobody in ["first", "fourth", "fifth"] {
        let explained = std::panic::catch_unwind(|| {
            with_doubt().answered_together(calls(nobody), &[Ended::Succeeded], Mode::Block);
        });
        assert!(explained.is_err(), "{nobody}");
    }
}

#[test]
fn kill_before_the_outcome_commit_may_make_an_answered_call_unknown() {
    let mut model = Model::default();
    let call = |number| Call { number, key: None, force: None };
    model.answered(call(1), "first", &Said::Sent(Ended::Failed), &[Ended::Failed], Mode::Guard, false);
    model.restarted(&HashMap::from([(1, Ended::Unknown)]), true);
    model.answered(call(2), "second", &Said::Duplicate("first".into()), &[], Mode::Guard, false);
}

#[test]
fn one_of_two_concurrent_calls_may_be_sent_after_the_other() {
    use Ended::{Failed, Succeeded, Unknown};
    for (forced, late, is_late_forced, mode, is_explained) in [
        (Succeeded, Succeeded, false, Mode::Guard, true),
        (Succeeded, Succeeded, false, Mode::Block, false),
        (Failed, Succeeded, false, Mode::Guard, false),
        (Unknown, Succeeded, false, Mode::Guard, false),
        (Succeeded, Succeeded, true, Mode::Guard, true),
        (Succeeded, Succeeded, true, Mode::Block, false),
        (Unknown, Failed, true, Mode::Block, true),
        (Unknown, Unknown, true, Mode::Block, false),
    ] {
        let call = |number, is_forced: bool, ended| {
            let force = is_forced.then(|| "first".to_owned());
            (Call { number, key: None, force }, Some((number.to_string(), Said::Sent(ended))))
        };
        let calls = vec![call(2, is_late_forced, late), call(3, true, forced)];
        let explained = std::panic::catch_unwind(|| {
            with_doubt().answered_together(calls, &[Succeeded, Failed, Unknown], mode);
        });
        assert_eq!(explained.is_ok(), is_explained, "{forced:?} {late:?} {is_late_forced} {mode:?}");
    }
}
