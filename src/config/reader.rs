//! Typed reading with error recovery: converts the tables of the merged layers to the serde types of `sections`.
//!
//! serde stops at the first mistake. So each mistake is noted, its value is left out, and the whole table is read
//! again, until it has no more mistakes. In this way all mistakes of a file are reported at once.
//!
//! The deserializer of the `config` crate is not used, since it accepts a text for a number and 1 for `true`. Here a
//! number or a boolean in quotes is accepted only from a variable or a flag, which have no other way to write one.

use std::collections::HashSet;
use std::fmt;
use std::net::Ipv6Addr;
use std::vec::IntoIter;

use ::config::{Map, Value, ValueKind};
use serde::de::value::StringDeserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error, IntoDeserializer, MapAccess, SeqAccess, Visitor,
};
use serde::forward_to_deserialize_any;

use super::context;
use super::context::Context;
use super::source::LIST_OF_TABLES;

/// The most mistakes that are reported of one table. Each costs one more reading of the table, so that a file with
/// thousands of mistakes would take quadratic time.
const MAX_MISTAKES: usize = 100;

/// The tables in which the user chooses the names of the keys, each with the example that the error text shows.
const EXAMPLES: [(&str, &str); 2] =
    [("upstream.headers", "{ x-tenantspaceid = \"…\" }"), ("audit.fields", "{ inspectors = \"hmac\" }")];

/// Reads the table at the key `of_table`. A value with a mistake gets its default, and the mistake is noted in
/// `context`.
pub(super) fn table<T: DeserializeOwned + Default>(
    context: &mut Context<'_>,
    of_table: &str,
    value: &Value,
) -> T {
    // A set of keys, not a value with holes: removing an item would shift the indices of those after it, and
    // later mistakes would be reported under the wrong key.
    let mut left_out = HashSet::new();
    for mistakes in 0.. {
        let (value, key) = (value.clone(), of_table.to_owned());
        match T::deserialize(Reader { context, left_out: &left_out, value, key, is_item: false }) {
            Ok(table) => return table,
            Err(_) if mistakes == MAX_MISTAKES => break,
            Err(Fault { at: Some(KeyPath { at, key }), reason }) => {
                context.problem_of(&at, &key, reason);
                left_out.insert(at);
            }
            // No place means that the value itself is no table. Nothing in it can be left out, so another reading
            // would fail the same way.
            Err(Fault { at: None, reason }) => {
                context.problem(of_table, reason);
                return T::default();
            }
        }
    }
    context.problem(of_table, format!("has more mistakes than the {MAX_MISTAKES} that are reported"));
    T::default()
}

/// Returns the section at `key`, with all defaults if it is missing.
pub(super) fn section<T: DeserializeOwned + Default>(
    context: &mut Context<'_>,
    root: &Value,
    key: &str,
) -> T {
    let empty = Map::<String, Value>::new().into();
    table(context, key, member(root, key).unwrap_or(&empty))
}

/// Returns the items of the list of tables at `key`, empty if it is missing.
pub(super) fn tables<T: DeserializeOwned + Default>(
    context: &mut Context<'_>,
    root: &Value,
    key: &str,
) -> Vec<T> {
    match member(root, key).map(|value| &value.kind) {
        None => Vec::new(),
        Some(ValueKind::Array(items)) => {
            let item = |(i, item)| table(context, &format!("{key}[{i}]"), item);
            items.iter().enumerate().map(item).collect()
        }
        Some(_) => {
            // `--set listeners=x` and `--set listeners.address=x` arrive here if the file has no such list. Advice
            // about double brackets would not help, since a flag has no such syntax.
            let written = || format!("must be written as [[{key}]]");
            let reason = if context.is_loose(key) { LIST_OF_TABLES.to_owned() } else { written() };
            context.problem(key, reason);
            Vec::new()
        }
    }
}

fn member<'a>(root: &'a Value, key: &str) -> Option<&'a Value> {
    match &root.kind {
        ValueKind::Table(members) => members.get(key),
        _ => None,
    }
}

/// A deserializer of one value, which knows the value's key.
struct Reader<'a, 'c> {
    context: &'a mut Context<'c>,
    /// Keys of values that earlier readings of this table could not read.
    left_out: &'a HashSet<String>,
    value: Value,
    key: String,
    /// Whether the value is an item of a list.
    is_item: bool,
}

/// Why a value cannot be read. `at` is `None` until [`Values::read`], which knows the key, fills it in.
#[derive(Debug)]
struct Fault {
    at: Option<KeyPath>,
    reason: String,
}

/// The place of a faulty value. `at` is its own key, and `key` is the key under which it is reported. They differ for
/// an item of a list, which is reported under the key of the list.
#[derive(Debug)]
struct KeyPath {
    at: String,
    key: String,
}

impl Error for Fault {
    fn custom<T: fmt::Display>(reason: T) -> Self {
        Self { at: None, reason: reason.to_string() }
    }
}

impl std::error::Error for Fault {}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl Reader<'_, '_> {
    /// Whether a text may also be read as a number, a boolean or a list, because the value comes from a variable or a
    /// flag.
    fn is_loose(&self) -> bool {
        self.context.is_loose(&self.key)
    }
}

impl<'de> Deserializer<'de> for Reader<'_, '_> {
    type Error = Fault;

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.value.kind {
            ValueKind::String(text) => visitor.visit_string(text),
            // In lists of ids and statuses a number stands for its digits: `operators = [1611917095665261978]`. A
            // single value is stricter, since `timeout = 10` lacks its unit.
            ValueKind::I64(number) if self.is_item => visitor.visit_string(number.to_string()),
            ValueKind::I64(_) => Err(Fault::custom(
                "must be a string in quotes; a quantity needs its unit, as in \"10s\" or \"64MiB\"",
            )),
            _ if self.is_item => Err(Fault::custom("must be a list of strings")),
            _ => Err(Fault::custom("must be a string in quotes")),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.value.kind {
            ValueKind::Boolean(boolean) => visitor.visit_bool(*boolean),
            ValueKind::String(text) if self.is_loose() && (text == "true" || text == "false") => {
                visitor.visit_bool(text == "true")
            }
            _ => Err(Fault::custom("must be true or false")),
        }
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        // Digits in quotes are refused in the file, which can hold integers: the schema for editors says the same.
        let number = match &self.value.kind {
            ValueKind::I64(number) => u64::try_from(*number).ok(),
            ValueKind::String(text) if self.is_loose() => text.parse().ok(),
            _ => None,
        };
        visitor.visit_u64(number.ok_or_else(|| Fault::custom("must be a whole number"))?)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let is_loose = self.is_loose();
        let items = match self.value.kind {
            ValueKind::Array(items) => items,
            ValueKind::String(text) if is_loose => {
                // Accepts what people write in a variable (`401, 403`) as well as what they copy from the file
                // (`["401", "403"]`).
                let parts = without_brackets(&text).split(',').map(|part| part.trim().trim_matches('"'));
                parts.filter(|part| !part.is_empty()).map(Value::from).collect()
            }
            _ => return Err(Fault::custom("must be a list of strings")),
        };
        let Self { context, left_out, key, .. } = self;
        // Items are numbered before faulty ones are left out, so that each one keeps the index that it has in the
        // file.
        let items = items.into_iter().enumerate().map(|(i, item)| (i.to_string(), item));
        visitor.visit_seq(Values::new(context, left_out, key, true, items))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let ValueKind::Table(members) = self.value.kind else {
            let example = EXAMPLES
                .iter()
                .find(|(key, _)| *key == self.key)
                .map_or("{ name = \"value\" }", |(_, example)| example);
            return Err(Fault::custom(format!("must be a table, as in {example}")));
        };
        let Self { context, left_out, key, .. } = self;
        visitor.visit_map(Values::new(context, left_out, key, false, members))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let ValueKind::Table(mut members) = self.value.kind else {
            return Err(Fault::custom("must be a table"));
        };
        let Self { context, left_out, key, .. } = self;
        // Unknown names are only noted here and reported when all tables have been read: the best suggestion
        // depends on which keys are missing. They are removed, since `deny_unknown_fields` would end the reading
        // at the first.
        context.expect(&key, fields, members.keys());
        members.retain(|name, _| fields.contains(&&**name));
        visitor.visit_map(Values::new(context, left_out, key, false, members))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        // Without null in TOML a key that is present always has a value; for one that is absent serde takes the
        // default.
        visitor.visit_some(self)
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.value.kind {
            // Reached by untagged enums only, such as that of `server.workers`, which takes a number or `auto`.
            ValueKind::I64(_) => self.deserialize_u64(visitor),
            ValueKind::String(ref text) if self.is_loose() && text.parse::<u64>().is_ok() => {
                self.deserialize_u64(visitor)
            }
            _ => self.deserialize_string(visitor),
        }
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 u8 u16 u32 f32 f64 char str bytes byte_buf unit unit_struct newtype_struct tuple tuple_struct enum
        identifier ignored_any
    }
}

/// The values of a table, by name, or of a list, by index, that are still to be read.
struct Values<'a, 'c> {
    context: &'a mut Context<'c>,
    left_out: &'a HashSet<String>,
    /// The key of the table or the list.
    key: String,
    is_list: bool,
    value: Option<(String, Value)>,
    rest: IntoIter<(String, Value)>,
}

impl<'a, 'c> Values<'a, 'c> {
    fn new(
        context: &'a mut Context<'c>,
        left_out: &'a HashSet<String>,
        key: String,
        is_list: bool,
        values: impl IntoIterator<Item = (String, Value)>,
    ) -> Self {
        let mut values: Vec<_> = values.into_iter().collect();
        values.retain(|(name, _)| !left_out.contains(&inner(&key, name, is_list)));
        Self { context, left_out, key, is_list, value: None, rest: values.into_iter() }
    }

    /// Reads one value. A fault that has no place yet gets the place of this value, so that the innermost value is
    /// reported.
    fn read<'de, S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
        name: &str,
        value: Value,
    ) -> Result<S::Value, Fault> {
        let at = inner(&self.key, name, self.is_list);
        let (context, left_out, is_item) = (&mut *self.context, self.left_out, self.is_list);
        let read = seed.deserialize(Reader { context, left_out, value, key: at.clone(), is_item });
        let key = if is_item { &self.key } else { &at };
        read.map_err(|Fault { at: known, reason }| {
            let here = || KeyPath { at: at.clone(), key: key.clone() };
            Fault { at: known.or_else(|| Some(here())), reason }
        })
    }
}

/// Returns the text of a list without the brackets around all its items, if it has them.
fn without_brackets(text: &str) -> &str {
    let text = text.trim();
    let Some(inner) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) else { return text };
    // `[::1]` is one address, and in `[::1],[::2]` the outer brackets belong to two.
    let closes_first = inner.find(['[', ']']).is_some_and(|at| inner[at..].starts_with(']'));
    if closes_first || inner.parse::<Ipv6Addr>().is_ok() { text } else { inner }
}

/// Returns the key of a member of a table or of an item of a list. `key` is that of the table or list, and `name` is the
/// name of the member or the index of the item.
fn inner(key: &str, name: &str, is_list: bool) -> String {
    if is_list { format!("{key}[{name}]") } else { context::member(key, name) }
}

impl<'de> SeqAccess<'de> for Values<'_, '_> {
    type Error = Fault;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Fault> {
        self.rest.next().map(|(number, value)| self.read(seed, &number, value)).transpose()
    }
}

impl<'de> MapAccess<'de> for Values<'_, '_> {
    type Error = Fault;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Fault> {
        self.value = self.rest.next();
        let name = self.value.as_ref().map(|(name, _)| name.clone().into_deserializer());
        name.map(|name: StringDeserializer<Fault>| seed.deserialize(name)).transpose()
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Fault> {
        let (name, value) = self.value.take().ok_or_else(|| Fault::custom("has no value"))?;
        self.read(seed, &name, value)
    }
}
