//! What the contract check costs, beside the usual ways to do the same: `cargo bench --bench contract`.
//!
//! Each way answers whether a body keeps the contract of appointQualityTask, from the bytes, every time anew:
//! ours (strict JSON and the compiled contract), serde into types (streaming: borrowed, the inspectors are
//! looked at and dropped; owned: the plain derive with an untagged enum), `jsonschema` over a tree. Ours also notes
//! what is audited; `jsonschema` does not know `x-uniqueBy`, and a tree hides repeated keys.

#![allow(clippy::expect_used, reason = "a bench may end early")]

use std::{borrow::Cow, collections::HashSet, fmt, hint::black_box, sync::LazyLock};

use bytes::Bytes;
use ccsqm_gateway::{config::BareIds, contract::Contract};
use divan::{Bencher, counter::BytesCount};
use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Visitor},
};

fn main() {
    divan::main();
}

static CONTRACT: LazyLock<Contract> = LazyLock::new(|| {
    Contract::compile(Contract::APPOINT_QUALITY_TASK).expect("it is compiled at each start")
});

static ORACLE: LazyLock<jsonschema::Validator> = LazyLock::new(|| {
    let schema = serde_json::from_str(Contract::APPOINT_QUALITY_TASK).expect("JSON");
    jsonschema::validator_for(&schema).expect("a schema")
});

/// The everyday body, and the largest that the contract allows.
const BODIES: [&str; 2] = ["small", "large"];

/// Leaked, so that a clone counts no references: the gateway moves its bytes.
fn body(name: &str) -> Bytes {
    let small = include_str!("body.json").trim_end();
    let body = match name {
        "small" => small.to_owned(),
        _ => format!("{}[{}]}}", small.split('[').next().expect("a list"), inspectors().join(",")),
    };
    Bytes::from_static(body.leak().as_bytes())
}

/// A thousand, in no order: a list that is sorted already would flatter some ways to find a repeated one.
fn inspectors() -> Vec<String> {
    let id = |i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..1000)
        .map(|i| format!(r#"{{"personID":"16002264{:020}","count":{}}}"#, id(i), 10_000_000 + i))
        .collect()
}

fn measure(bencher: Bencher<'_, '_>, name: &str, keeps: impl Fn(&Bytes) -> bool + Sync) {
    let body = body(name);
    assert!(keeps(&body), "{name}");
    bencher.counter(BytesCount::new(body.len())).bench(|| assert!(keeps(black_box(&body))));
}

#[divan::bench(args = BODIES, sample_size = 50, min_time = 1)]
fn contract(bencher: Bencher<'_, '_>, name: &str) {
    LazyLock::force(&CONTRACT);
    measure(bencher, name, |body| black_box(CONTRACT.check(body.clone(), BareIds::Detect)).result.is_ok());
}

/// With the members of the audit record.
#[divan::bench(args = BODIES, sample_size = 50, min_time = 1)]
fn contract_and_audit_members(bencher: Bencher<'_, '_>, name: &str) {
    LazyLock::force(&CONTRACT);
    measure(bencher, name, |body| {
        let Ok(checked) = CONTRACT.check(body.clone(), BareIds::Detect).result else { return false };
        let mut members = Vec::new();
        checked.audit_members(&|_| [0; 16], &mut members);
        !black_box(members).is_empty()
    });
}

#[divan::bench(args = BODIES, sample_size = 50, min_time = 1)]
fn serde_streaming(bencher: Bencher<'_, '_>, name: &str) {
    measure(bencher, name, |body| {
        serde_json::from_slice::<Streamed<'_>>(body).is_ok_and(|task| task.keeps())
    });
}

#[divan::bench(args = BODIES, sample_size = 50, min_time = 1)]
fn serde_owned(bencher: Bencher<'_, '_>, name: &str) {
    measure(bencher, name, |body| serde_json::from_slice::<Owned>(body).is_ok_and(|task| task.keeps()));
}

#[divan::bench(args = BODIES, sample_size = 50, min_time = 1)]
fn jsonschema_over_a_tree(bencher: Bencher<'_, '_>, name: &str) {
    LazyLock::force(&ORACLE);
    measure(bencher, name, |body| serde_json::from_slice(body).is_ok_and(|tree| ORACLE.is_valid(&tree)));
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Streamed<'a> {
    #[serde(borrow)]
    quality_task_id: TaskId<'a>,
    set_counts_type: u8,
    is_take_effect: u8,
    #[serde(borrow)]
    set_counts: Inspectors<'a>,
}

enum TaskId<'a> {
    Number,
    Text(Cow<'a, str>),
}

/// How many there are; whether all are different.
struct Inspectors<'a> {
    count: usize,
    are_kept: bool,
    _seen: HashSet<Cow<'a, str>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Inspector<'a> {
    #[serde(rename = "personID", borrow)]
    person_id: Cow<'a, str>,
    #[serde(default)]
    count: u32,
}

impl Streamed<'_> {
    fn keeps(&self) -> bool {
        let id = match &self.quality_task_id {
            TaskId::Number => true,
            TaskId::Text(text) => is_id(text),
        };
        let counts = self.set_counts.are_kept && (1..=1000).contains(&self.set_counts.count);
        id && self.set_counts_type == 1 && self.is_take_effect <= 1 && counts
    }
}

fn is_id(text: &str) -> bool {
    (1..=20).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_person(text: &str) -> bool {
    (1..=64).contains(&text.chars().count()) && !text.chars().any(char::is_control)
}

impl<'de: 'a, 'a> Deserialize<'de> for TaskId<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = TaskId<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number or a string")
            }

            fn visit_u64<E: Error>(self, _: u64) -> Result<Self::Value, E> {
                Ok(TaskId::Number)
            }

            fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(TaskId::Text(text.into()))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(TaskId::Text(text.to_owned().into()))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Inspectors<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Items;
        impl<'de> Visitor<'de> for Items {
            type Value = Inspectors<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
                let (mut count, mut are_kept, mut seen) = (0, true, HashSet::new());
                while let Some(item) = items.next_element::<Inspector<'de>>()? {
                    count += 1;
                    are_kept &= is_person(&item.person_id) && item.count <= 99_999_999;
                    are_kept &= seen.insert(item.person_id);
                }
                Ok(Inspectors { count, are_kept, _seen: seen })
            }
        }
        deserializer.deserialize_seq(Items)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Owned {
    quality_task_id: OwnedId,
    set_counts_type: u8,
    is_take_effect: u8,
    set_counts: Vec<OwnedInspector>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OwnedId {
    Number(#[expect(dead_code, reason = "its type is its rule")] u64),
    Text(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OwnedInspector {
    #[serde(rename = "personID")]
    person_id: String,
    #[serde(default)]
    count: u32,
}

impl Owned {
    fn keeps(&self) -> bool {
        let id = match &self.quality_task_id {
            OwnedId::Number(_) => true,
            OwnedId::Text(text) => is_id(text),
        };
        let mut seen = HashSet::new();
        let counts = self.set_counts.iter().all(|item| {
            is_person(&item.person_id) && item.count <= 99_999_999 && seen.insert(&item.person_id)
        });
        let length = (1..=1000).contains(&self.set_counts.len());
        id && self.set_counts_type == 1 && self.is_take_effect <= 1 && length && counts
    }
}
