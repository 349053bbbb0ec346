//! Random interleavings of equal calls with and without keys, under faults, leaving callers, stops and kills.
//!
//! A model says which answers a call may get and whether it may be sent. It restates the rules for equal calls and
//! knows nothing of the gateway's tables. Where the state of an earlier call is uncertain (its caller left, or the
//! process was killed), the model holds the set of possible states, and each answer narrows it.
//!
//! `CCSQM_GATEWAY_TEST_INTERLEAVINGS` says how many, `CCSQM_GATEWAY_SEED` which ones. Every eighth has a kill, every
//! eighth a stop.

mod model;

use std::{
    collections::HashMap,
    fmt::Debug,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::PathBuf,
    time::{Duration, Instant},
};

use ccsqm_gateway::sandbox::Framing;

use self::model::{Call, Ended, Mode, Model, Said};
use super::*;
use crate::audit::{segments, text, verify};

/// Interleavings that share a sandbox and a trail.
const BLOCK: u64 = 40;

/// Blocks at once.
const LANES: u64 = 3;

/// A pseudo-random sequence (SplitMix64), the same for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn is_one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    fn mode(&mut self) -> Mode {
        [Mode::Guard, Mode::Guard, Mode::Guard, Mode::Guard, Mode::Block, Mode::Warn][self.below(6) as usize]
    }

    /// What the upstream does with a call, and how the call ends by that.
    fn fault(&mut self) -> (Fault, Ended) {
        match self.below(12) {
            0 => (Fault::instead(Instead::Reset), Ended::Unknown),
            1 => (Fault::framing(Framing::HalfBody), Ended::Unknown),
            2 => (Fault::status(503).with_body("busy"), Ended::Unknown),
            3 => (Fault::status(429), Ended::Refused),
            4 => (Fault::status(500), Ended::Failed),
            5 => (Fault::status(500).with_body("<html>"), Ended::Unknown),
            6 => (Fault::failure("0409001"), Ended::Failed),
            7 | 8 => (Fault::delayed(10 + self.below(40)), Ended::Succeeded),
            _ => (Fault::default(), Ended::Succeeded),
        }
    }
}

/// What the trail says, read on from where it was read last.
#[derive(Default)]
struct Trail {
    read: HashMap<PathBuf, usize>,
    /// Intents by the caller's own id of the call.
    intents: HashMap<String, Value>,
    outcomes: HashMap<String, Value>,
    undelivered: BTreeSet<String>,
}

impl Trail {
    fn read_on(&mut self, directory: &std::path::Path) {
        for segment in segments(directory) {
            let bytes = std::fs::read(&segment).unwrap();
            let from = self.read.entry(segment).or_default();
            let Some(length) = bytes[*from..].iter().rposition(|byte| *byte == b'\n') else { continue };
            let lines = bytes[*from..*from + length].to_vec();
            *from += length + 1;
            for line in lines.split(|byte| *byte == b'\n') {
                self.take(serde_json::from_slice(line).unwrap());
            }
        }
    }

    fn take(&mut self, record: Value) {
        let id = text(&record["id"]);
        match (record["kind"].as_str().unwrap(), record["event"].as_str()) {
            ("intent", _) => {
                let before = self.intents.insert(text(&record["caller_id"]), record);
                assert!(before.is_none(), "two intents of one call: {before:?}");
            }
            ("outcome", _) => {
                let before = self.outcomes.insert(id, record);
                assert!(before.is_none(), "two outcomes of one call: {before:?}");
            }
            ("event", Some("undelivered")) => drop(self.undelivered.insert(id)),
            _ => {}
        }
    }

    fn intent(&self, number: u64) -> Option<&Value> {
        self.intents.get(&format!("c{number}"))
    }

    fn outcome(&self, number: u64) -> Option<&Value> {
        self.outcomes.get(&text(&self.intent(number)?["id"]))
    }
}

/// A body under test, and what the model knows of its calls.
struct Subject {
    task: u64,
    model: Model,
}

impl Subject {
    fn body(&self) -> String {
        BODY.replace("954645333549048833", &self.task.to_string())
    }

    fn head(&self, call: &Call) -> String {
        let mut headers = format!("x-request-id: c{}\r\n", call.number);
        if let Some(name) = call.key {
            headers += &key(&format!("task-{}-{name}", self.task));
        }
        if let Some(force) = &call.force {
            headers += &format!("idempotency-force: {force}\r\n");
        }
        head(self.body().len(), &headers)
    }
}

/// One sandbox and one trail, and the gateway that runs on them.
struct Block {
    random: Random,
    sandbox: Sandbox,
    gateway: Option<Gateway>,
    trail: Trail,
    mode: Mode,
    subjects: Vec<Subject>,
    calls: u64,
    steps: Vec<String>,
    kills: usize,
    stops: usize,
}

fn start_in(sandbox: &Sandbox, folder: Option<Arc<TempDir>>, mode: Mode) -> Gateway {
    let setup = Setup { folder, ..Setup::default() };
    let gateway = start_keyed(sandbox, setup.set("idempotency.without_key", mode.word()));
    gateway.post_with("x-request-id: token\r\nidempotency-key: token\r\n"); // there is a token
    gateway
}

fn send(address: std::net::SocketAddr, request: &str, half_closes: bool) -> Option<Reply> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.write_all(request.as_bytes()).ok()?;
    if half_closes {
        stream.shutdown(Shutdown::Write).ok()?;
    }
    let reply = read_reply(&mut stream);
    let length = reply.headers.get("content-length").and_then(|length| length.parse().ok());
    (length == Some(reply.body.len())).then_some(reply)
}

fn said(reply: &Reply) -> Said {
    let first = first_id(reply).to_owned();
    let is_success = first_outcome(reply) == "succeeded";
    match (reply.code(), reply.outcome()) {
        ("" | "upstream_broken" | "upstream_timeout", "succeeded" | "failed" | "refused" | "unknown") => {
            Said::Sent(Ended::of(reply.outcome()))
        }
        ("", "replayed") => Said::Replayed { first, is_success },
        ("request_in_progress", "unknown") => Said::InProgress(first),
        ("outcome_unknown", "unknown") => Said::OutcomeUnknown(first),
        ("duplicate_suspected", "unknown") => Said::Duplicate(first),
        ("duplicate_suspected", "succeeded") => Said::Done(first),
        ("draining" | "idempotency_unavailable" | "quota_exhausted" | "audit_unavailable", "not_sent") => {
            Said::NotSent
        }
        _ => panic!("an answer that no rule allows: {reply:?}"),
    }
}

impl Block {
    fn begin(seed: u64) -> Self {
        let mut random = Random(seed);
        let (sandbox, mode) = (sandbox(), random.mode());
        let gateway = Some(start_in(&sandbox, None, mode));
        let (trail, subjects, steps) = <_>::default();
        Self { random, sandbox, gateway, trail, mode, subjects, calls: 0, steps, kills: 0, stops: 0 }
    }

    fn note(&mut self, step: impl Debug) {
        self.steps.push(format!("{step:?}"));
    }

    fn gateway(&self) -> &Gateway {
        self.gateway.as_ref().unwrap()
    }

    fn read_trail(&mut self) {
        let directory = self.gateway().audit_directory();
        self.trail.read_on(&directory);
        for subject in &mut self.subjects {
            for past in subject.model.pasts() {
                if let Some(intent) = self.trail.intent(past.call.number) {
                    past.id = Some(text(&intent["id"]));
                }
            }
        }
    }

    fn received(&self, task: u64) -> usize {
        let is_it = |body: &[u8]| {
            let body: Value = serde_json::from_slice(body).unwrap_or_default();
            body["qualityTaskId"].to_string().trim_matches('"') == task.to_string()
        };
        self.sandbox.requests().iter().filter(|request| is_it(&request.body)).count()
    }

    fn new_call(&mut self, subject: usize) -> Call {
        self.calls += 1;
        let key = [None, None, Some('A'), Some('A'), Some('B')][self.random.below(5) as usize];
        let model = &self.subjects[subject].model;
        let (ids, forced_before) = (model.ids(), model.forced_ids());
        let is_forced = !ids.is_empty() && self.random.is_one_in(3);
        let ids = if !forced_before.is_empty() && self.random.is_one_in(3) { forced_before } else { ids };
        let force = is_forced.then(|| ids[self.random.below(ids.len() as u64) as usize].clone());
        Call { number: self.calls, key, force }
    }

    /// Sets what the next calls meet. Returns how they may end: in any way while an earlier call may still be on its
    /// way and take what is meant for another one.
    fn meet(&mut self, count: usize) -> Vec<Ended> {
        let faults_and_ends = (0..count).map(|_| self.random.fault());
        let (faults, ends): (Vec<_>, Vec<_>) =
            faults_and_ends.map(|(fault, end)| (fault.times(1), end)).unzip();
        self.note(format_args!("{}", shown(&faults)));
        script(&self.sandbox, Faults::business(faults));
        let is_quiet = self.subjects.iter().all(|subject| subject.model.is_quiet());
        if is_quiet { ends } else { Ended::ALL.to_vec() }
    }

    fn interleave(&mut self, number: u64) {
        self.steps.clear();
        self.subjects = (0..2)
            .map(|place| Subject { task: 1_000_000 + number * 2 + place, model: Model::default() })
            .collect();
        self.note((number, self.mode));
        let count = 5 + self.random.below(5);
        let special = self.random.below(count);
        for step in 0..count {
            let subject = usize::from(self.random.is_one_in(4));
            match number % 8 {
                3 if step == special => self.kill(subject),
                7 if step == special => self.stop(subject),
                _ => self.step(subject),
            }
        }
        self.finish();
    }

    fn step(&mut self, subject: usize) {
        match self.random.below(8) {
            0 | 1 => drop(self.together(subject, None)),
            2 => self.leave_at_some_time(subject),
            3 | 4 => self.leave_once_received(subject),
            _ => self.call(subject),
        }
    }

    fn call(&mut self, subject: usize) {
        let call = self.new_call(subject);
        let (ends, half_closes) = (self.meet(1), self.random.is_one_in(4));
        let request = self.subjects[subject].head(&call) + &self.subjects[subject].body();
        self.note((subject, &call, half_closes));
        let reply = send(self.gateway().address, &request, half_closes).unwrap();
        self.note(said(&reply));
        self.read_trail();
        let model = &mut self.subjects[subject].model;
        model.answered(call, id(&reply), &said(&reply), &ends, self.mode, half_closes);
    }

    /// Two or three calls at once. With `kill_after` the process is killed while they are at work.
    fn together(&mut self, subject: usize, kill_after: Option<Duration>) -> Option<Arc<TempDir>> {
        let count = 2 + self.random.below(2) as usize;
        let calls: Vec<_> = (0..count).map(|_| self.new_call(subject)).collect();
        let ends = self.meet(count);
        self.note(("together", subject, &calls, kill_after));
        let this = &self.subjects[subject];
        let address = self.gateway().address;
        let gateway = kill_after.map(|after| (after, self.gateway.take().unwrap()));
        let (replies, folder) = thread::scope(|scope| {
            let asked: Vec<_> = calls
                .iter()
                .map(|call| {
                    let request = this.head(call) + &this.body();
                    scope.spawn(move || send(address, &request, false))
                })
                .collect();
            let folder = gateway.map(|(after, gateway)| {
                thread::sleep(after);
                gateway.kill()
            });
            (asked.into_iter().map(|call| call.join().unwrap()).collect::<Vec<_>>(), folder)
        });
        let answers: Vec<_> = replies
            .iter()
            .map(|reply| reply.as_ref().map(|reply| (id(reply).to_owned(), said(reply))))
            .collect();
        self.note(&answers);
        if self.gateway.is_some() {
            self.read_trail();
            assert!(answers.iter().all(Option::is_some), "no answer");
        }
        let model = &mut self.subjects[subject].model;
        model.answered_together(calls.into_iter().zip(answers).collect(), &ends, self.mode);
        folder
    }

    /// The caller leaves at any moment, perhaps before the call was read.
    fn leave_at_some_time(&mut self, subject: usize) {
        let call = self.new_call(subject);
        self.meet(1);
        let (after, resets) = (Duration::from_millis(self.random.below(30)), self.random.is_one_in(2));
        self.note(("leaves", subject, &call, after, resets));
        let this = &self.subjects[subject];
        let mut stream = TcpStream::connect(self.gateway().address).unwrap();
        stream.write_all((this.head(&call) + &this.body()).as_bytes()).unwrap();
        thread::sleep(after);
        leave(stream, resets);
        // It may come to the upstream later, and meet what is meant for another call.
        self.subjects[subject].model.left(call, &Ended::ALL, self.mode);
    }

    /// The caller leaves while the upstream holds its answer back, so that it cannot have it.
    fn leave_once_received(&mut self, subject: usize) {
        let (mut call, mode) = (self.new_call(subject), self.mode);
        call.force = None;
        let all_quiet = self.subjects.iter().all(|subject| subject.model.is_quiet());
        if !all_quiet || !self.subjects[subject].model.is_surely_sent(&call, mode) {
            return self.call(subject);
        }
        let (delay, resets) = (100 + self.random.below(100), self.random.is_one_in(2));
        script(&self.sandbox, Faults::business(Fault::delayed(delay).times(1)));
        self.note(("leaves once received", subject, &call, delay, resets));
        let task = self.subjects[subject].task;
        let (begun, before) = (Instant::now(), self.received(task));
        let this = &self.subjects[subject];
        let mut stream = TcpStream::connect(self.gateway().address).unwrap();
        stream.write_all((this.head(&call) + &this.body()).as_bytes()).unwrap();
        let is_answered = wait_for("the upstream or an answer", || {
            let is_answered = is_readable(&stream);
            (is_answered || self.received(task) > before).then_some(is_answered)
        });
        if is_answered {
            let reply = read_reply(&mut stream);
            self.note(said(&reply));
            let (model, ends) = (&mut self.subjects[subject].model, [Ended::Succeeded]);
            return model.answered(call, id(&reply), &said(&reply), &ends, mode, false);
        }
        leave(stream, resets);
        let is_in_time = begun.elapsed() < Duration::from_millis(delay);
        let number = call.number;
        self.subjects[subject].model.left(call, &[Ended::Succeeded], mode);
        if is_in_time && !self.random.is_one_in(3) {
            let outcome = wait_for("its outcome", || {
                self.read_trail();
                self.trail.outcome(number).cloned()
            });
            self.note(outcome.to_string());
            wait_for("the record that a success is undelivered", || {
                self.read_trail();
                let id = text(&self.trail.intent(number)?["id"]);
                self.trail.undelivered.contains(&id).then_some(())
            });
            self.note("it is undelivered");
            self.subjects[subject].model.is_undelivered(number);
        }
    }

    fn kill(&mut self, subject: usize) {
        let after = Duration::from_millis(self.random.below(40));
        let folder = self.together(subject, Some(after));
        self.kills += 1;
        self.start(folder, true);
    }

    fn stop(&mut self, subject: usize) {
        if self.random.is_one_in(2) {
            self.leave_at_some_time(subject);
        }
        let mut gateway = self.gateway.take().unwrap();
        gateway.signal("-TERM");
        assert!(gateway.wait().success());
        self.stops += 1;
        self.start(Some(gateway.folder.clone()), false);
    }

    fn start(&mut self, folder: Option<Arc<TempDir>>, was_killed: bool) {
        self.mode = self.random.mode();
        self.note(("starts", self.mode, was_killed));
        script(&self.sandbox, Faults::default());
        self.gateway = Some(start_in(&self.sandbox, folder, self.mode));
        self.read_trail();
        for subject in &mut self.subjects {
            let found: HashMap<_, _> = subject
                .model
                .pasts()
                .filter_map(|past| {
                    let number = past.call.number;
                    let intent = self.trail.intent(number)?;
                    let outcome = self.trail.outcome(number).unwrap_or_else(|| panic!("open: {intent}"));
                    Some((number, Ended::of(outcome["outcome"].as_str().unwrap())))
                })
                .collect();
            subject.model.restarted(&found, was_killed);
        }
    }

    /// Each intent has its outcome, and the upstream has received what the trail says and the model allows.
    fn finish(&mut self) {
        // Behind this connection and with no other one open, no call of a caller that left is still to be read.
        drop(send(
            self.gateway().address,
            "GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
            false,
        ));
        wait_for("the end of the connections", || {
            let metrics = self.gateway().admin("/metrics").body;
            metrics.lines().any(|line| line == "ccsqm_gateway_connections 0").then_some(())
        });
        wait_for("the outcomes", || {
            self.read_trail();
            let Self { subjects, trail, .. } = self;
            let mut numbers = subjects.iter_mut().flat_map(|subject| subject.model.pasts());
            let is_open = |number| trail.intent(number).is_some() && trail.outcome(number).is_none();
            (!numbers.any(|past| is_open(past.call.number))).then_some(())
        });
        for place in 0..self.subjects.len() {
            let received = self.received(self.subjects[place].task);
            let (mut least, mut most) = (0, 0);
            let Self { subjects, trail, .. } = self;
            let mut spans = Vec::new();
            for past in subjects[place].model.pasts() {
                let number = past.call.number;
                let Some(intent) = trail.intent(number) else { continue };
                assert!(past.may_be_sent, "{number} was sent: {intent}");
                let outcome = trail.outcome(number).unwrap();
                let may_be_lost = outcome["outcome"] == "not_sent" || outcome["note"].is_string();
                least += usize::from(!may_be_lost);
                most += usize::from(outcome["outcome"] != "not_sent");
                let seq = |record: &Value| record["seq"].as_u64().unwrap();
                spans.push((seq(intent), seq(outcome), past.call.clone(), past.mode));
            }
            assert!((least..=most).contains(&received), "{place}: {least} to {most}, received: {received}");
            assert_none_overlap(&mut spans);
        }
    }

    fn end(mut self) -> (usize, usize) {
        let mut gateway = self.gateway.take().unwrap();
        gateway.signal("-TERM");
        assert!(gateway.wait().success());
        let (is_whole, said) = verify(&gateway.audit_directory());
        assert!(is_whole, "{said}");
        (self.kills, self.stops)
    }
}

fn leave(stream: TcpStream, resets: bool) {
    if resets {
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    }
    drop(stream);
}

/// No two calls that are compared were at work at once.
fn assert_none_overlap(spans: &mut [(u64, u64, Call, Mode)]) {
    spans.sort_by_key(|span| span.0);
    for (place, later) in spans.iter().enumerate() {
        for earlier in &spans[..place] {
            let is_same_key = earlier.2.key.is_some() && earlier.2.key == later.2.key;
            let is_one_without = earlier.2.key.is_none() || later.2.key.is_none();
            let is_compared = is_same_key || (is_one_without && later.3 != Mode::Warn);
            assert!(!is_compared || earlier.1 < later.0, "at work at once: {earlier:?}, {later:?}");
        }
    }
}

fn run_block(seed: u64, numbers: std::ops::Range<u64>) -> (usize, usize) {
    let mut block = Block::begin(seed.wrapping_add(numbers.start));
    for number in numbers {
        let ran = catch_unwind(AssertUnwindSafe(|| block.interleave(number)));
        if let Err(panic) = ran {
            #[expect(clippy::print_stdout, reason = "what to run again, where a test fails")]
            {
                println!("seed {seed}, interleaving {number}:\n{}", block.steps.join("\n"));
            }
            resume_unwind(panic);
        }
    }
    block.end()
}

#[test]
fn in_each_interleaving_of_duplicates_the_model_agrees() {
    let setting = |name| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    let count = setting("CCSQM_GATEWAY_TEST_INTERLEAVINGS").unwrap_or(BLOCK);
    let seed = setting("CCSQM_GATEWAY_SEED")
        .unwrap_or_else(|| std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), ()));
    println!("seed {seed}");
    let blocks: Vec<_> =
        (0..count).step_by(BLOCK as usize).map(|from| from..count.min(from + BLOCK)).collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let run = || {
        let (mut kills, mut stops) = (0, 0);
        while let Some(numbers) = blocks.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
            let done = run_block(seed, numbers.clone());
            (kills, stops) = (kills + done.0, stops + done.1);
        }
        (kills, stops)
    };
    let done: Vec<_> = thread::scope(|scope| {
        let lanes: Vec<_> = (0..LANES).map(|_| scope.spawn(run)).collect();
        lanes.into_iter().map(|lane| lane.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    let (kills, stops) = done.iter().fold((0, 0), |all, done| (all.0 + done.0, all.1 + done.1));
    println!("{count} interleavings, {kills} kills, {stops} restarts, seed {seed}");
    assert!(kills >= count as usize / 8 && stops >= count as usize / 8);
}
