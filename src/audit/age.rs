//! Ages of records, measured without a wall clock. A wall clock that is wrong therefore cannot make the gateway
//! forget an idempotency key or remove a segment.
//!
//! The trail has a time of its own, the *trail time*: the time that has certainly passed since its first
//! anchor.
//!
//! * Within a run of the gateway it advances as `CLOCK_BOOTTIME` does. The times of records of one run differ
//!   by exactly that (see [`crate::clock`]).
//! * From one run to the next it also advances as `CLOCK_BOOTTIME` does, if both runs belong to one boot of the
//!   machine.
//! * From one boot to the next it does not advance: only a wall clock could tell how long the machine was off.
//!   A boot id that cannot be read counts as a new boot.
//!
//! A record's *age* is the trail time that has passed since it was written. It is exact for records of the
//! present boot. For older ones it is at most the true age, unless an operator accepted a wrong wall clock.
//!
//! An *anchor* is a record that ties the times of the records after it to the trail time. Anchors are the
//! events `start`, `clock` (once an hour, and in each segment) and `clock_accepted`. The last one says that an
//! operator accepts the wall clock: records of earlier boots are at least as old as it says.
//!
//! A reader that goes through the trail in order begins with [`Ages::since`], which also returns the segment to
//! begin with. It passes each line that the chain proves to [`Ages::anchor`], and the times of the lines that
//! follow to [`Ages::age`].

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use thiserror::Error;
use uuid::Uuid;

use super::chain::{Lines, first_seq, number_of};
use super::retention;

use crate::keyed_hash::Keys;

/// The format of the trail that this version writes, and the newest one that it reads.
pub const FORMAT: u64 = 1;

/// The name of the event that each start writes.
pub(super) const START: &str = "start";

/// The name of the event that is written every hour, and in each segment.
pub(super) const CLOCK: &str = "clock";

/// The name of the event that records that an operator accepts the wall clock.
pub(super) const ACCEPTED: &str = "clock_accepted";

/// The interval between two anchors, in milliseconds.
pub(super) const EVERY: i64 = 60 * 60 * 1000;

/// The shortest interval between two anchors, in milliseconds.
// Each new segment asks for an anchor. With small segments that would be one every few records.
pub(super) const AT_MOST_EVERY: i64 = 60 * 1000;

/// A day, in milliseconds.
const DAY: i64 = 24 * EVERY;

/// A newer version of the gateway wrote the trail. The field is its format.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "written by a newer version of the gateway: its format is {0}, and this version reads formats up to {FORMAT}"
)]
pub struct Newer(pub u64);

/// An anchor, as read from the trail. All numbers are milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Anchor {
    seq: u64,
    /// The time of the record, since 1970.
    time: i64,
    /// The boot id of the machine; `None` if it could not be read.
    boot: Option<Uuid>,
    /// `CLOCK_BOOTTIME` when the record was written.
    boottime: i64,
    /// The trail time when the record was written.
    elapsed: i64,
    /// The trail time of the first start of this boot: ages are exact from there on.
    exact_from: i64,
    accepted: Option<AcceptedClock>,
    /// For a start: the time of the newest record before it.
    newest: Option<i64>,
}

/// A wall clock that an operator accepted. All numbers are milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AcceptedClock {
    /// The wall clock at that moment, since 1970.
    wall: i64,
    /// The trail time at that moment.
    elapsed: i64,
    /// Records up to this trail time get their age from the wall clock. Later ones belong to the same boot, so
    /// that their age is exact without it.
    until: i64,
}

/// The trail time of a running process, in milliseconds. The caller reads `CLOCK_BOOTTIME` and passes it in.
#[derive(Clone, Debug)]
pub(super) struct TrailTime {
    boot: Option<Uuid>,
    /// The trail time minus `CLOCK_BOOTTIME`.
    offset: i64,
    exact_from: i64,
    accepted: Option<AcceptedClock>,
    /// The base for records for which no anchor is known.
    unanchored: Base,
}

/// Computes ages of records, as of one moment.
#[derive(Clone, Debug)]
pub struct Ages {
    /// The trail time of that moment, in milliseconds.
    now: i64,
    accepted: Option<AcceptedClock>,
    /// The base for the line that is read.
    base: Base,
}

/// What the first records of a segment say about its age.
struct Begin {
    /// The time of its first record; `None` if that was changed.
    time: Option<i64>,
    /// The first anchor.
    anchor: Option<Anchor>,
    /// Whether that anchor is the first record.
    is_anchor: bool,
}

/// Pairs a record time with a trail time. Other times are converted by their difference.
#[derive(Clone, Copy, Debug)]
struct Base {
    time: i64,
    elapsed: i64,
    /// The smallest trail time that any record of this base can have.
    floor: i64,
}

impl Anchor {
    /// Parses a line as an anchor; `None` if it is none.
    pub(super) fn read(line: &[u8]) -> Option<Self> {
        if !is_event(line) {
            return None;
        }
        let event: Value = serde_json::from_slice(line).ok()?;
        if ![START, CLOCK, ACCEPTED].contains(&event["event"].as_str()?) {
            return None;
        }
        Some(Self {
            seq: event["seq"].as_u64()?,
            time: millis(event["time"].as_str()?)?,
            boot: event["boot_id"].as_str().and_then(|id| id.parse().ok()),
            boottime: event["boottime"].as_i64()?,
            elapsed: event["elapsed"].as_i64()?,
            exact_from: event["exact_from"].as_i64()?,
            accepted: AcceptedClock::read(&event["accepted"]),
            newest: event["newest"].as_str().and_then(millis),
        })
    }

    /// Whether a process with this boot id and `CLOCK_BOOTTIME` belongs to the same boot as the anchor.
    // A restored snapshot of a virtual machine has the boot id of the original but an earlier boot time. The
    // two must not share a trail time.
    pub(super) fn is_of_boot(&self, boot: Option<Uuid>, boottime: i64) -> bool {
        boot.is_some() && self.boot == boot && boottime >= self.boottime
    }

    /// The base for records after this anchor, up to the next one.
    fn behind(&self) -> Base {
        Base { time: self.time, elapsed: self.elapsed, floor: self.elapsed }
    }

    /// The base for records before this anchor that have no anchor of their own. They belong to the same run,
    /// unless the anchor is a start. Then the last of them counts as written at the start, since the time in
    /// between is unknown.
    fn before(&self) -> Base {
        let time = self.newest.unwrap_or(self.time);
        Base { time, elapsed: self.elapsed, floor: i64::MIN }
    }
}

impl AcceptedClock {
    fn read(value: &Value) -> Option<Self> {
        let wall = millis(value["wall"].as_str()?)?;
        Some(Self { wall, elapsed: value["elapsed"].as_i64()?, until: value["until"].as_i64()? })
    }

    fn to_json(self) -> Value {
        json!({ "wall": text(self.wall), "elapsed": self.elapsed, "until": self.until })
    }
}

/// The format that a line states, if it is an anchor of this or a newer version.
// Only the name and `format` are read: other members of an anchor may change with the format.
pub(super) fn format(line: &[u8]) -> Option<u64> {
    let event: Value = is_event(line).then(|| serde_json::from_slice(line).ok()).flatten()?;
    let is_anchor = [START, CLOCK, ACCEPTED].contains(&event["event"].as_str()?);
    if is_anchor { event["format"].as_u64() } else { None }
}

impl TrailTime {
    /// The trail time of a process that continues after `last`, the newest anchor, and after a newest record of
    /// the time `newest`.
    pub(super) fn go_on(
        last: Option<&Anchor>,
        newest: Option<i64>,
        boot: Option<Uuid>,
        boottime: i64,
    ) -> Self {
        let recorded = last.map_or(0, |last| last.behind().elapsed_at(newest.unwrap_or(last.time)));
        let same_boot = last.filter(|last| last.is_of_boot(boot, boottime));
        // The larger of both: the newest record is evidence that at least `recorded` has passed, even if
        // `CLOCK_BOOTTIME` says less.
        let passed = same_boot.map_or(recorded, |last| {
            recorded.max(last.elapsed.saturating_add(boottime.saturating_sub(last.boottime)))
        });
        // In an empty trail nothing was written before this process, so no record may count as older than it.
        let floor = if newest.is_some() { i64::MIN } else { passed };
        Self {
            boot,
            offset: passed.saturating_sub(boottime),
            exact_from: same_boot.map_or(passed, |last| last.exact_from),
            accepted: last.and_then(|last| last.accepted),
            unanchored: Base { time: newest.unwrap_or_default(), elapsed: passed, floor },
        }
    }

    fn elapsed(&self, boottime: i64) -> i64 {
        self.offset.saturating_add(boottime)
    }

    /// Accepts this wall clock, in milliseconds since 1970, for records of earlier boots.
    pub(super) fn accept(&mut self, wall: i64, boottime: i64) {
        self.accepted = Some(AcceptedClock { wall, elapsed: self.elapsed(boottime), until: self.exact_from });
    }

    /// The members of an anchor that is written now.
    pub(super) fn members(&self, boottime: i64) -> Map<String, Value> {
        let mut members = Map::new();
        members.insert("format".into(), FORMAT.into());
        if let Some(boot) = self.boot {
            members.insert("boot_id".into(), boot.to_string().into());
        }
        members.insert("boottime".into(), boottime.into());
        members.insert("elapsed".into(), self.elapsed(boottime).into());
        members.insert("exact_from".into(), self.exact_from.into());
        if let Some(accepted) = self.accepted {
            members.insert("accepted".into(), accepted.to_json());
        }
        members
    }

    /// The ages of records for which no anchor is known, as of `boottime`. They count as records of one run
    /// that ended at the start of this process.
    pub(super) fn ages(&self, boottime: i64) -> Ages {
        Ages { now: self.elapsed(boottime), accepted: self.accepted, base: self.unanchored }
    }
}

impl Ages {
    /// Finds the segment at which reading must begin to meet all records that are no older than `within`.
    /// Returns its index in `segments` and the ages for its first line. `segments` are those of a trail, oldest
    /// first.
    ///
    /// Fails if a segment cannot be read.
    pub(super) fn since(
        mut self,
        segments: &[PathBuf],
        within: Duration,
        keys: &Keys,
    ) -> io::Result<(usize, Self)> {
        for (index, path) in segments.iter().enumerate().rev() {
            let begin = Begin::read(path, keys)?;
            if let Some(anchor) = &begin.anchor {
                self.base = if begin.is_anchor { anchor.behind() } else { anchor.before() };
            }
            // A segment whose first record is too old ends the search: everything before it is older. That
            // holds only if the record and the anchor that dates it are proven. A changed time could otherwise
            // hide the segments before it, and with them keys of the window.
            let is_old = begin.time.is_some_and(|time| self.age(time) > within);
            if is_old && is_proven_up_to_anchor(path, keys)? {
                return Ok((index, self));
            }
            if let Some(anchor) = begin.anchor {
                self.base = anchor.before();
            }
        }
        Ok((0, self))
    }

    /// Takes note of a line if it is an anchor; it counts for all lines after it. Pass proven lines only.
    pub fn anchor(&mut self, line: &[u8]) {
        if let Some(anchor) = Anchor::read(line) {
            self.base = anchor.behind();
        }
    }

    /// The ages for the record with the number `seq`, given all anchors of a trail in order.
    pub(super) fn at(mut self, seq: u64, anchors: &[Anchor]) -> Self {
        let behind = anchors.partition_point(|anchor| anchor.seq <= seq);
        match (anchors[..behind].last(), anchors.first()) {
            (Some(last), _) => self.base = last.behind(),
            (None, Some(first)) => self.base = first.before(),
            (None, None) => {}
        }
        self
    }

    /// The age of a record of this time, in milliseconds since 1970. Exact for the present boot, a lower bound
    /// otherwise. A time in the future gives zero.
    pub fn age(&self, time: i64) -> Duration {
        let recorded = self.base.elapsed_at(time);
        let mut age = self.now.saturating_sub(recorded);
        if let Some(accepted) = self.accepted.filter(|accepted| recorded <= accepted.until) {
            age = age.max(
                accepted.wall.saturating_sub(time).saturating_add(self.now.saturating_sub(accepted.elapsed)),
            );
        }
        Duration::from_millis(u64::try_from(age).unwrap_or(0))
    }
}

impl Begin {
    /// Reads a segment up to its first anchor. Fails if it cannot be read.
    // A record is trusted only if the key proves that the gateway wrote it: a forged time or anchor would
    // decide which segments are read.
    fn read(segment: &Path, keys: &Keys) -> io::Result<Self> {
        let (time, mut lines) = (first_time(segment, keys)?, Lines::open(segment)?);
        while let Some(line) = lines.read()? {
            if let Some(anchor) = Anchor::read(line.bytes) {
                let anchor = Some(anchor).filter(|_| keys.has_written(line.bytes));
                return Ok(Self { time, anchor, is_anchor: line.number == 1 });
            }
        }
        Ok(Self { time, anchor: None, is_anchor: false })
    }
}

impl Base {
    fn elapsed_at(&self, time: i64) -> i64 {
        self.elapsed.saturating_add(time.saturating_sub(self.time)).max(self.floor)
    }
}

/// Finds the newest anchor in some segments, oldest first, of a trail whose newest record has the time `newest`
/// in milliseconds. `None` if there is none within a day before that. Skips changed lines.
///
/// Fails if a segment cannot be read, and with an error that wraps [`Newer`] at an anchor of a newer version.
// Why a day: each run writes an anchor at its start and one every hour. If a day has none, a version without
// anchors wrote it, and reading on would only delay the start.
pub(super) fn last_anchor(segments: &[PathBuf], newest: i64, keys: &Keys) -> io::Result<Option<Anchor>> {
    for path in segments.iter().rev() {
        let (mut lines, mut last) = (Lines::open(path)?, None);
        while let Some(line) = lines.read()? {
            let Some(format) = format(line.bytes).filter(|_| keys.has_written(line.bytes)) else { continue };
            if format > FORMAT {
                return Err(io::Error::other(Newer(format)));
            }
            last = Anchor::read(line.bytes).or(last);
        }
        let is_far =
            || first_time(path, keys).map(|time| time.is_some_and(|time| (newest - time).abs() > DAY));
        if last.is_some() || is_far()? {
            return Ok(last);
        }
    }
    Ok(None)
}

/// Whether all records of a segment up to its first anchor are proven and have the numbers that the segment's
/// name promises.
// A changed record may have been an anchor. A record copied from another segment is proven but has a time that
// says nothing about this one, hence the check of numbers.
fn is_proven_up_to_anchor(segment: &Path, keys: &Keys) -> io::Result<bool> {
    let (mut lines, mut seq) = (Lines::open(segment)?, first_seq(segment));
    let mut previous = retention::before(segment)?.map(|before| before.hash);
    while let Some(line) = lines.read()? {
        previous = previous.and_then(|previous| keys.check(line.bytes, &previous).ok());
        if previous.is_none() || number_of(line.bytes) != Some(seq) {
            return Ok(false);
        }
        if Anchor::read(line.bytes).is_some() {
            break;
        }
        seq += 1;
    }
    Ok(true)
}

/// The time of a segment's first record in milliseconds, unless it was changed.
fn first_time(segment: &Path, keys: &Keys) -> io::Result<Option<i64>> {
    let mut lines = Lines::open(segment)?;
    let first = lines.read()?.filter(|line| keys.has_written(line.bytes));
    Ok(first.and_then(|line| time(line.bytes)))
}

/// The time of a record, in milliseconds since 1970.
fn time(line: &[u8]) -> Option<i64> {
    millis(serde_json::from_slice::<Value>(line).ok()?["time"].as_str()?)
}

/// Whether a line is an event, judged by its first bytes.
// This is asked for every line of the window. Parsing them all as JSON would dominate the time of a rebuild; the
// writer has one fixed form for the beginning of a line.
fn is_event(line: &[u8]) -> bool {
    const SEQ: usize = "{\"seq\":".len();
    const TIME: usize = ",\"time\":\"2026-01-01T00:00:00.000000Z\"".len();
    let digits = line.get(SEQ..).unwrap_or_default().iter().take_while(|byte| byte.is_ascii_digit()).count();
    line.get(SEQ + digits + TIME..).is_some_and(|rest| rest.starts_with(b",\"kind\":\"event\""))
}

/// Parses a record's time into milliseconds since 1970.
pub(super) fn millis(time: &str) -> Option<i64> {
    Some(time.parse::<Timestamp>().ok()?.as_millisecond())
}

/// Formats milliseconds since 1970 as records have them. A time out of range becomes 1970.
pub(super) fn text(millis: i64) -> String {
    Timestamp::from_millisecond(millis).unwrap_or(Timestamp::UNIX_EPOCH).to_string()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::super::chain::{Link, OPEN_LINKS, segment_path};
    use super::*;

    const HOUR: i64 = EVERY;

    /// 2026-11-28. Any date of the present will do.
    const DATE: i64 = 1_795_824_000_000;

    fn line(seq: u64, time: i64, event: &str, members: Map<String, Value>) -> String {
        let time = Timestamp::from_millisecond(time).unwrap();
        let head = format!(r#"{{"seq":{seq},"time":"{time:.6}","kind":"event","event":"{event}""#);
        let members = Value::Object(members).to_string();
        format!("{head},{}", &members[1..])
    }

    fn keys(folder: &TempDir) -> Keys {
        let path = folder.path().join("key");
        fs::write(&path, [7; 32]).unwrap();
        Keys::load(&path).unwrap()
    }

    /// Writes lines as a segment, each linked to the one before.
    fn write(path: &Path, lines: &[String], keys: &Keys) {
        let (mut text, mut link) = (Vec::new(), Link::new([0; 32]));
        for line in lines {
            let mut line = [&line.as_bytes()[..line.len() - 1], OPEN_LINKS].concat();
            link = keys.seal(&mut line, &link);
            text.extend(line);
        }
        fs::write(path, text).unwrap();
    }

    /// Changes a text in the first line that has it.
    fn change(path: &Path, from: &str, to: &str) {
        let text = fs::read_to_string(path).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(path, text.replacen(from, to, 1)).unwrap();
    }

    /// A simulated machine with its gateway: the true time, and what the clocks show.
    struct World {
        /// The true time since the beginning.
        truth: i64,
        booted: i64,
        boot: Option<Uuid>,
        /// The wall clock minus the truth.
        wall: i64,
        seq: u64,
        /// The running gateway: its trail time, and *now* minus `CLOCK_BOOTTIME`.
        gateway: Option<(TrailTime, i64)>,
        newest: Option<i64>,
        trail: Vec<String>,
        /// The records: their places in the trail, their times, their true times, and their boots.
        records: Vec<(usize, i64, i64, Option<Uuid>)>,
    }

    impl World {
        fn new() -> Self {
            Self {
                truth: 0,
                booted: -HOUR,
                boot: Some(Uuid::from_u128(1)),
                wall: DATE,
                seq: 0,
                gateway: None,
                newest: None,
                trail: Vec::new(),
                records: Vec::new(),
            }
        }

        fn boottime(&self) -> i64 {
            self.truth - self.booted
        }

        fn now(&self) -> i64 {
            self.gateway.as_ref().map_or(self.truth + self.wall, |(_, offset)| offset + self.boottime())
        }

        fn anchors(&self) -> Vec<Anchor> {
            self.trail.iter().filter_map(|line| Anchor::read(line.as_bytes())).collect()
        }

        fn write(&mut self, event: &str, members: Map<String, Value>) {
            self.seq += 1;
            self.trail.push(line(self.seq, self.now(), event, members));
            self.newest = Some(self.now());
        }

        fn start(&mut self) {
            self.gateway = None;
            let trail = TrailTime::go_on(self.anchors().last(), self.newest, self.boot, self.boottime());
            let mut members = trail.members(self.boottime());
            if let Some(newest) = self.newest {
                members.insert("newest".into(), text(newest).into());
            }
            self.gateway = Some((trail, self.truth + self.wall - self.boottime()));
            self.write(START, members);
        }

        fn run(&mut self, time: i64) {
            self.truth += time;
            let members = self.gateway.as_ref().unwrap().0.members(self.boottime());
            self.write(CLOCK, members);
        }

        fn record(&mut self) {
            self.write("anything", Map::from_iter([("member".to_owned(), 1.into())]));
            self.records.push((self.trail.len(), self.now(), self.truth, self.boot));
        }

        fn accept(&mut self) {
            let (wall, boottime) = (self.truth + self.wall, self.boottime());
            let trail = &mut self.gateway.as_mut().unwrap().0;
            trail.accept(wall, boottime);
            let members = trail.members(boottime);
            self.write(ACCEPTED, members);
        }

        /// Turns the machine off for a while. Its boot id may be hidden afterwards.
        fn reboot(&mut self, off: i64, is_hidden: bool) {
            self.truth += off;
            self.booted = self.truth;
            self.boot = (!is_hidden).then(|| Uuid::from_u128(2 + u128::from(self.seq)));
        }

        fn ages(&self) -> Ages {
            self.gateway.as_ref().unwrap().0.ages(self.boottime())
        }

        /// The age of a record, as computed by a reader that begins at the first line.
        fn age(&self, record: usize) -> i64 {
            let (place, time, ..) = self.records[record];
            let mut ages = self.ages();
            self.trail[..place].iter().for_each(|line| ages.anchor(line.as_bytes()));
            let age = ages.age(time);
            let number = u64::try_from(place).unwrap();
            assert_eq!(age, self.ages().at(number, &self.anchors()).age(time), "by its number, too");
            i64::try_from(age.as_millis()).unwrap()
        }
    }

    #[test]
    fn record_ages_within_one_boot_ignore_the_wall_clock() {
        let mut world = World::new();
        for jump in [0, 25 * HOUR, -2 * DAY, 31 * DAY] {
            world.wall = DATE + jump;
            world.start();
            world.record();
            world.run(HOUR);
            world.record();
            // A gap between two runs of one boot: no process writes anchors, and yet the age must include it.
            world.truth += 3 * HOUR;
        }
        world.start();
        for (record, (_, _, truth, _)) in world.records.clone().into_iter().enumerate() {
            assert_eq!(world.age(record), world.truth - truth);
        }
    }

    #[test]
    fn time_between_boots_counts_only_after_the_clock_is_accepted() {
        let mut world = World::new();
        world.start();
        world.record();
        world.run(HOUR);
        world.reboot(3 * DAY, false);
        world.start();
        world.record();
        world.run(5 * HOUR);
        assert_eq!((world.age(0), world.age(1)), (6 * HOUR, 5 * HOUR));
        world.accept();
        world.run(HOUR);
        assert_eq!((world.age(0), world.age(1)), (3 * DAY + 7 * HOUR, 6 * HOUR));
        // An accepted clock must stay accepted after the next reboot, too.
        world.reboot(DAY, true);
        world.start();
        assert_eq!((world.age(0), world.age(1)), (3 * DAY + 7 * HOUR, 6 * HOUR));
    }

    #[test]
    fn unreadable_boot_id_or_earlier_boot_time_means_a_new_boot() {
        for (boot, boottime, age) in [
            // The first row is the control; the others are a new boot, a boot time that went back, and a hidden
            // id.
            (Some(Uuid::from_u128(1)), 3 * HOUR, 2 * HOUR),
            (Some(Uuid::from_u128(2)), 3 * HOUR, 0),
            (Some(Uuid::from_u128(1)), HOUR / 2, 0),
            (None, 3 * HOUR, 0),
        ] {
            let mut world = World::new();
            world.start();
            world.record();
            let trail = TrailTime::go_on(world.anchors().last(), world.newest, boot, boottime);
            let mut ages = trail.ages(boottime);
            ages.anchor(world.trail[0].as_bytes());
            assert_eq!(
                ages.age(world.records[0].1),
                Duration::from_millis(age.try_into().unwrap()),
                "{boot:?}"
            );
        }
        let mut world = World::new();
        world.boot = None;
        world.start();
        world.record();
        let hidden = TrailTime::go_on(world.anchors().last(), world.newest, None, world.boottime() + HOUR);
        assert_eq!(hidden.offset + world.boottime() + HOUR, 0, "two that cannot be read are not the same");
    }

    #[test]
    fn records_without_anchors_are_aged_relative_to_the_newest_one() {
        let mut world = World::new();
        world.truth = -5 * HOUR;
        world.record();
        world.truth = -HOUR;
        world.record();
        world.reboot(31 * DAY, false);
        world.start();
        world.run(HOUR);
        assert_eq!((world.age(0), world.age(1)), (5 * HOUR, HOUR));
    }

    #[test]
    fn reading_starts_at_the_first_segment_within_the_window() {
        let mut world = World::new();
        // The wall clock is far behind at first and jumps later: no result may depend on it.
        world.wall = DATE - 9 * DAY;
        world.start();
        let mut segments = Vec::new();
        let folder = TempDir::new().unwrap();
        let keys = keys(&folder);
        for number in 0..10 {
            let begin = if number == 0 { 0 } else { world.trail.len() };
            world.record();
            world.truth += HOUR / 2;
            world.record();
            if number == 7 {
                world.wall = DATE;
                world.reboot(100 * DAY, true);
                world.start();
            }
            world.record();
            world.run(HOUR / 2);
            let path = segment_path(folder.path(), begin as u64 + 1);
            write(&path, &world.trail[begin..], &keys);
            segments.push(path);
        }
        for (hours, first) in [(0, 9), (1, 8), (2, 7), (3, 6), (5, 4), (9, 0), (100, 0)] {
            let within = Duration::from_secs(3600 * hours + 1);
            let (index, mut ages) = world.ages().since(&segments, within, &keys).unwrap();
            assert_eq!(index, first, "{hours} h");
            let text = fs::read_to_string(&segments[index]).unwrap();
            let mut oldest = Duration::ZERO;
            for line in text.lines() {
                oldest = oldest.max(ages.age(time(line.as_bytes()).unwrap()));
                ages.anchor(line.as_bytes());
            }
            assert!(oldest > within || index == 0, "{hours} h: {oldest:?}");
        }
    }

    #[test]
    fn changed_or_copied_record_never_delays_the_start_of_reading() {
        let folder = TempDir::new().unwrap();
        let keys = keys(&folder);
        let mut world = World::new();
        world.start();
        let mut segments = Vec::new();
        for number in 0..5 {
            let begin = if number == 0 { 0 } else { world.trail.len() };
            world.record();
            world.run(HOUR);
            segments.push(segment_path(folder.path(), begin as u64 + 1));
            write(&segments[number], &world.trail[begin..], &keys);
        }
        let within = Duration::from_secs(3600 * 2 + 1);
        let since = || world.ages().since(&segments, within, &keys).unwrap().0;
        assert_eq!(since(), 2, "the control");
        let untouched = fs::read(&segments[3]).unwrap();
        for (from, to) in [("\"time\":\"20", "\"time\":\"19"), ("\"elapsed\":1", "\"elapsed\":-9")] {
            change(&segments[3], from, to);
            assert!(since() <= 2, "{from} by {to}: {}", since());
            fs::write(&segments[3], &untouched).unwrap();
        }
        // A proven record of another segment in front, and an anchor that is none any more: each hides the true
        // age of the segment.
        let first = fs::read_to_string(&segments[0]).unwrap();
        let copied = [first.lines().next().unwrap().as_bytes(), b"\n", &untouched].concat();
        fs::write(&segments[3], copied).unwrap();
        assert!(since() <= 2, "{}", since());
        fs::write(&segments[3], &untouched).unwrap();
        change(&segments[2], "\"event\":\"clock\"", "\"event\":\"clocl\"");
        assert!(since() < 2, "{}", since());
    }

    #[test]
    fn clock_set_back_does_not_age_the_first_event_of_a_segment() {
        let folder = TempDir::new().unwrap();
        let keys = keys(&folder);
        let segments = [1, 3].map(|first| segment_path(folder.path(), first));
        let mut world = World::new();
        world.start();
        world.record();
        write(&segments[0], &world.trail, &keys);
        let begin = world.trail.len();
        world.wall = DATE - 9 * DAY;
        world.start();
        write(&segments[1], &world.trail[begin..], &keys);
        let since = |world: &World, hours: u64| {
            world.ages().since(&segments, Duration::from_secs(3600 * hours), &keys).unwrap().0
        };
        assert_eq!(since(&world, 1), 0);
        world.truth += 2 * HOUR;
        assert_eq!((since(&world, 1), since(&world, 3)), (1, 0));
    }

    #[test]
    fn last_anchor_must_be_unchanged_and_of_a_known_format() {
        let folder = TempDir::new().unwrap();
        let keys = keys(&folder);
        let path = folder.path().join("0");
        let mut world = World::new();
        world.start();
        world.run(HOUR);
        let (anchors, newest) = (world.anchors(), world.newest.unwrap());
        let last = || last_anchor(std::slice::from_ref(&path), newest, &keys);
        write(&path, &world.trail, &keys);
        assert_eq!(last().unwrap().as_ref(), anchors.last(), "the control");
        change(&path, "\"elapsed\":3600000", "\"elapsed\":9600000");
        assert_eq!(last().unwrap().as_ref(), anchors.first());
        let newer = world.trail[1].replace("\"format\":1", "\"format\":2");
        write(&path, &[world.trail[0].clone(), newer], &keys);
        let said = "written by a newer version of the gateway: its format is 2, and this version reads formats up to 1";
        assert_eq!(last().unwrap_err().to_string(), said);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Run(i64),
        Set(i64),
        Start,
        Reboot { off: i64, is_hidden: bool },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..3 * HOUR).prop_map(Step::Run),
            2 => (-40 * DAY..40 * DAY).prop_map(Step::Set),
            2 => Just(Step::Start),
            1 => (0..10 * DAY, any::<bool>()).prop_map(|(off, is_hidden)| Step::Reboot { off, is_hidden }),
        ]
    }

    proptest! {
        /// Whatever happens to clocks, machine and gateway, no record counts as older than it is. Records of
        /// the present boot, if its id can be read, count as exactly as old as they are.
        // Older than the truth would forget a key of the window, and so send a task twice.
        #[test]
        fn record_age_never_exceeds_the_real_age(steps in prop::collection::vec(step(), 1..16)) {
            let mut world = World::new();
            world.start();
            for step in steps {
                match step {
                    Step::Run(time) => world.run(time),
                    Step::Set(wall) => world.wall = DATE + wall,
                    Step::Start => world.start(),
                    Step::Reboot { off, is_hidden } => {
                        world.reboot(off, is_hidden);
                        world.start();
                    }
                }
                world.record();
            }
            for (record, (_, _, truth, boot)) in world.records.clone().into_iter().enumerate() {
                let (age, real) = (world.age(record), world.truth - truth);
                prop_assert!(age <= real, "{age} {real}");
                prop_assert!(age == real || boot.is_none() || boot != world.boot, "{age} {real}");
            }
        }
    }

    #[test]
    fn only_complete_events_are_anchors() {
        let mut world = World::new();
        world.start();
        let good = world.trail[0].clone();
        assert!(Anchor::read(good.as_bytes()).is_some(), "the control");
        assert_eq!(format(good.as_bytes()), Some(FORMAT));
        for bad in [
            good.replace("\"start\"", "\"stop\""),
            good.replace("\"event\",", "\"intent\","),
            good.replace("boottime", "boottim"),
            good.replace("elapsed", "elapse"),
            good[..good.len() - 1].to_owned(),
            String::new(),
        ] {
            assert_ne!(bad, good);
            assert!(Anchor::read(bad.as_bytes()).is_none(), "{bad}");
        }
        let newer = good.replace("\"format\":1", "\"format\":2").replace("elapsed", "something_else");
        assert_eq!(format(newer.as_bytes()), Some(2));
    }
}
