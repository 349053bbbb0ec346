//! The contract checker against `jsonschema`, on generated schemas and documents.
//!
//! Fractions are never whole (`1.5`, not `1.0`): integer literals are where the checker is stricter on purpose.

use ccsqm_gateway::contract::Contract;
use serde_json::{Map, Value, json};

const KEYWORDS: [&str; 16] = [
    "type",
    "const",
    "enum",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "minItems",
    "maxItems",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "pattern",
    "anyOf",
    "$ref",
];

/// A small generator of numbers, the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.roll(from.len() as u64)).unwrap()].clone()
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.roll(100) < percent
    }

    fn integer(&mut self) -> Value {
        let small = i64::try_from(self.roll(12)).unwrap() - 3;
        self.pick(&[json!(small), json!(small), json!(u64::MAX), json!(i64::MIN)])
    }

    fn text(&mut self) -> Value {
        let all = ["", "a", "ab", "abc", "b", "12", "7", "é", "😀😀", "a/b~c", "quote\"", "\u{1}"];
        json!(self.pick(&all))
    }

    fn scalar(&mut self) -> Value {
        match self.roll(5) {
            0 => Value::Null,
            1 => json!(self.chance(50)),
            2 => self.integer(),
            3 => json!(self.pick(&[0.5, -1.5, 3.25])),
            _ => self.text(),
        }
    }

    fn any(&mut self) -> Value {
        match self.roll(8) {
            0 => json!([]),
            1 => json!({}),
            2 => json!([self.scalar()]),
            3 => json!({ "a": self.scalar() }),
            _ => self.scalar(),
        }
    }

    fn limits(&mut self, schema: &mut Map<String, Value>, low: &str, high: &str, offset: i64) {
        let least = i64::try_from(self.roll(4)).unwrap() + offset;
        if self.chance(50) {
            schema.insert(low.into(), json!(least));
        }
        if self.chance(50) {
            schema.insert(high.into(), json!(least + i64::try_from(self.roll(4)).unwrap()));
        }
    }

    fn scalar_schema(&mut self) -> Value {
        let mut schema = Map::new();
        match self.roll(6) {
            0 => drop(schema.insert("const".into(), self.scalar())),
            1 => drop(schema.insert("enum".into(), json!([self.scalar(), self.scalar()]))),
            2 => drop(schema.insert(
                "type".into(),
                self.pick(&[json!(["null", "string"]), json!("boolean"), json!(["integer", "null"])]),
            )),
            3 => {
                schema.insert("type".into(), self.pick(&[json!("integer"), json!("number")]));
                self.limits(&mut schema, "minimum", "maximum", -2);
            }
            _ => {
                schema.insert("type".into(), json!("string"));
                self.limits(&mut schema, "minLength", "maxLength", 0);
                if self.chance(40) {
                    schema.insert(
                        "pattern".into(),
                        json!(self.pick(&["^[0-9]+$", "^a", "b", "^[^\\x00-\\x1f]*$"])),
                    );
                }
            }
        }
        Value::Object(schema)
    }

    fn schema(&mut self, depth: u64) -> Value {
        match self.roll(if depth == 0 { 4 } else { 10 }) {
            0..=2 => self.scalar_schema(),
            3 => {
                let alternative = |dice: &mut Self| loop {
                    let schema = dice.scalar_schema();
                    if schema.get("type").is_some() {
                        return schema;
                    }
                };
                json!({ "anyOf": [alternative(self), alternative(self)] })
            }
            4 => json!({ "$ref": "#/$defs/shared" }),
            5 | 6 => {
                let mut schema = Map::new();
                schema.insert("type".into(), json!("array"));
                schema.insert("items".into(), self.schema(depth - 1));
                self.limits(&mut schema, "minItems", "maxItems", 0);
                Value::Object(schema)
            }
            _ => {
                let names = ["a", "b", "a/b~c"];
                let count = usize::try_from(self.roll(3)).unwrap() + 1;
                let properties: Map<_, _> =
                    names[..count].iter().map(|name| ((*name).to_owned(), self.schema(depth - 1))).collect();
                let mut schema = json!({ "type": "object", "additionalProperties": self.chance(30), "properties": properties });
                if self.chance(60) {
                    schema["required"] = json!(names[..count]);
                }
                schema
            }
        }
    }

    /// A document that mostly keeps its schema.
    fn document(&mut self, schema: &Value, shared: &Value) -> Value {
        if schema.get("$ref").is_some() {
            return self.document(shared, shared);
        }
        if let Some(value) = schema.get("const") {
            return value.clone();
        }
        if let Some(values) = schema.get("enum").or(schema.get("anyOf")).and_then(Value::as_array) {
            let value = self.pick(values);
            return if schema.get("enum").is_some() { value } else { self.document(&value, shared) };
        }
        let limit = |key: &str, or: i64| schema.get(key).and_then(Value::as_i64).unwrap_or(or);
        let kind = schema["type"].as_str().map_or("null", |kind| kind);
        match kind {
            "boolean" => json!(true),
            "integer" | "number" => {
                let low = limit("minimum", limit("maximum", 3) - 1);
                json!(low)
            }
            "string" => {
                let length = usize::try_from(limit("minLength", limit("maxLength", 2).min(2))).unwrap();
                let letter = match schema.get("pattern").and_then(Value::as_str) {
                    Some("^[0-9]+$") => "7",
                    Some("b") => "b",
                    _ => "a",
                };
                json!(letter.repeat(length))
            }
            "array" => {
                let count = limit("minItems", limit("maxItems", 1).min(1));
                (0..count).map(|_| self.document(&schema["items"], shared)).collect()
            }
            "object" => {
                let properties = schema["properties"].as_object().unwrap();
                Value::Object(
                    properties
                        .iter()
                        .map(|(name, schema)| (name.clone(), self.document(schema, shared)))
                        .collect(),
                )
            }
            _ => Value::Null,
        }
    }

    /// Changes one place.
    fn edit(&mut self, document: &Value) -> Value {
        let mut edited = document.clone();
        match &mut edited {
            Value::Object(members) if !members.is_empty() && self.chance(75) => {
                let names: Vec<_> = members.keys().cloned().collect();
                let name = self.pick(&names);
                match self.roll(4) {
                    0 => drop(members.remove(&name)),
                    1 => drop(members.insert("more".into(), self.scalar())),
                    _ => {
                        let inner = self.edit(&members[&name]);
                        members.insert(name, inner);
                    }
                }
            }
            Value::Array(items) if self.chance(75) => match self.roll(3) {
                0 => drop(items.pop()),
                1 => items.push(items.first().cloned().unwrap_or(Value::Null)),
                _ if !items.is_empty() => items[0] = self.edit(&items[0].clone()),
                _ => {}
            },
            Value::String(text) if self.chance(60) => match self.roll(2) {
                0 => drop(text.pop()),
                _ => text.push_str("xyz"),
            },
            Value::Number(number) if self.chance(60) => {
                let near = number.as_i64().map_or(1, |n| n.wrapping_add(self.pick(&[-1, 1, 5, -5])));
                edited = json!(near);
            }
            _ => edited = self.any(),
        }
        edited
    }
}

/// The schema without a keyword, as a checker that ignores the keyword would see it.
fn without(schema: &Value, keyword: &str) -> Value {
    match schema {
        Value::Object(members) => {
            let kept =
                members.iter().filter(|(name, _)| *name != keyword || keyword == "additionalProperties");
            let kept = kept.map(|(name, value)| match name.as_str() {
                "additionalProperties" if keyword == "additionalProperties" => (name.clone(), json!(true)),
                "const" | "enum" | "required" => (name.clone(), value.clone()),
                "properties" | "$defs" => {
                    let inner =
                        value.as_object().unwrap().iter().map(|(n, v)| (n.clone(), without(v, keyword)));
                    (name.clone(), Value::Object(inner.collect()))
                }
                _ => (name.clone(), without(value, keyword)),
            });
            Value::Object(kept.collect())
        }
        Value::Array(items) => items.iter().map(|item| without(item, keyword)).collect(),
        _ => schema.clone(),
    }
}

#[derive(Default)]
struct Tally {
    documents: usize,
    valid: usize,
    one_edit_away: usize,
    disagreements: Vec<String>,
}

/// Compares the verdicts; the checker is given the schema without `disabled`.
fn compare(schemas: usize, disabled: &str) -> Tally {
    let mut dice = Dice(1);
    let mut tally = Tally::default();
    for _ in 0..schemas {
        let shared = dice.scalar_schema();
        let mut schema = dice.schema(3);
        let whole = schema.as_object_mut().unwrap();
        if whole.contains_key("$ref") {
            continue; // the checker wants a reference to stand alone
        }
        whole.insert("$defs".into(), json!({ "shared": shared.clone() }));
        let oracle = jsonschema::validator_for(&schema).unwrap();
        // Without `type` an alternative is no scalar schema: such a checker would not start at all.
        let Ok(contract) = Contract::compile(&without(&schema, disabled).to_string()) else {
            assert!(!disabled.is_empty(), "{schema}");
            continue;
        };
        for _ in 0..4 {
            let document = dice.document(&schema, &shared);
            let edited = dice.edit(&document);
            let is_valid = oracle.is_valid(&document);
            for (document, is_edit) in [(&document, false), (&edited, true)] {
                let expected = oracle.is_valid(document);
                tally.documents += 1;
                tally.valid += usize::from(expected);
                tally.one_edit_away += usize::from(is_edit && is_valid && !expected);
                if contract.check(document.to_string().into()).is_ok() != expected {
                    tally.disagreements.push(format!("{schema}\n{document}\nexpected {expected}"));
                }
            }
        }
    }
    tally
}

#[test]
fn verdicts_equal_those_of_jsonschema() {
    let tally = compare(3000, "");
    assert_eq!(tally.disagreements.len(), 0, "{}", tally.disagreements[0]);
    let share = |count: usize| count * 100 / tally.documents;
    assert!(share(tally.valid) >= 30, "{} % valid", share(tally.valid));
    assert!(share(tally.one_edit_away) >= 30, "{} % one edit away", share(tally.one_edit_away));
}

#[test]
fn without_any_one_keyword_the_comparison_fails() {
    for keyword in KEYWORDS {
        let found = compare(1000, keyword).disagreements.len();
        assert!(found > 0, "{keyword} is not tested");
        println!("{keyword}: {found} disagreements");
    }
}

#[test]
fn what_the_checker_does_not_know_stops_the_start_with_its_place() {
    for (schema, place) in [
        (
            json!({ "type": "object", "additionalProperties": false, "properties": { "a": { "format": "email" } } }),
            "#/properties/a/format",
        ),
        (json!({ "type": "object" }), "#"),
        (json!({ "type": "array", "items": { "$ref": "#/$defs/none" } }), "#/items"),
        (
            json!({ "$defs": { "a": { "type": "array", "items": { "$ref": "#/$defs/a" } } }, "type": "array", "items": { "$ref": "#/$defs/a" } }),
            "#/$defs/a/items",
        ),
        (json!({ "pattern": "(" }), "#/pattern"),
    ] {
        let error = Contract::compile(&schema.to_string()).unwrap_err();
        assert_eq!(error.pointer, place, "{error}");
    }
}
