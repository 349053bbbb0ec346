//! The contract checker: appointQualityTask case by case, and random schemas against the oracle `jsonschema`.

use bytes::Bytes;
use ccsqm_gateway::{
    config::BareIds,
    contract::{BodyFault, CheckedBody, Contract, NotJson, Violations},
};
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value, json};
use std::{collections::HashSet, fmt};

use crate::support::*;

const GOOD: &str = r#"{"qualityTaskId":"954125366","setCountsType":1,"isTakeEffect":0,
    "setCounts":[{"personID":"160","count":2},{"personID":"161"}]}"#;

fn compile(schema: &str) -> Contract {
    Contract::compile(schema).unwrap_or_else(|error| panic!("{error}: {schema}"))
}

fn check(contract: &Contract, body: &str) -> Result<CheckedBody, BodyFault> {
    check_as(BareIds::Detect, contract, body)
}

fn check_as(bare_ids: BareIds, contract: &Contract, body: &str) -> Result<CheckedBody, BodyFault> {
    contract.check(Bytes::copy_from_slice(body.as_bytes()), bare_ids).result
}

fn appoint(body: &str) -> Result<CheckedBody, BodyFault> {
    check(&compile(Contract::APPOINT_QUALITY_TASK), body)
}

fn violations(checked: Result<CheckedBody, BodyFault>) -> Violations {
    match checked {
        Err(BodyFault::Violations(violations)) => violations,
        other => panic!("violations expected: {other:?}"),
    }
}

fn not_json(checked: Result<CheckedBody, BodyFault>) -> NotJson {
    match checked {
        Err(BodyFault::NotJson(fault)) => fault,
        other => panic!("not JSON expected: {other:?}"),
    }
}

fn found(checked: Result<CheckedBody, BodyFault>) -> Vec<(String, &'static str)> {
    violations(checked).list.into_iter().map(|violation| (violation.pointer, violation.code)).collect()
}

/// `GOOD` with one piece replaced.
fn with(piece: &str, by: &str) -> String {
    assert!(GOOD.contains(piece), "{piece}");
    GOOD.replacen(piece, by, 1)
}

#[test]
fn every_rule_of_appoint_quality_task_accepts_and_rejects() {
    let id = r#""954125366""#;
    let person = r#""160""#;
    let (longest, too_long) = (format!("\"{}\"", "é".repeat(64)), format!("\"{}\"", "é".repeat(65)));
    // What is replaced, by what it breaks (where, which keyword), by what it keeps.
    let cases = [
        (id, "18446744073709551616", "/qualityTaskId", "anyOf", "18446744073709551615"),
        (id, "-1", "/qualityTaskId", "anyOf", "0"),
        (id, "1.0", "/qualityTaskId", "anyOf", "1"),
        (id, "1e3", "/qualityTaskId", "anyOf", "1000"),
        (id, "-0", "/qualityTaskId", "anyOf", "0"),
        (id, r#""""#, "/qualityTaskId", "anyOf", r#""0""#),
        (id, r#""123456789012345678901""#, "/qualityTaskId", "anyOf", r#""12345678901234567890""#),
        (id, r#""12a""#, "/qualityTaskId", "anyOf", r#""\u0031""#),
        (id, r#""١""#, "/qualityTaskId", "anyOf", r#""1""#),
        (id, "null", "/qualityTaskId", "anyOf", "7"),
        (id, "[7]", "/qualityTaskId", "anyOf", "7"),
        (id, "{}", "/qualityTaskId", "anyOf", "7"),
        (r#""setCountsType":1"#, r#""setCountsType":2"#, "/setCountsType", "const", r#""setCountsType":1"#),
        (
            r#""setCountsType":1"#,
            r#""setCountsType":"1""#,
            "/setCountsType",
            "type",
            r#""setCountsType" : 1"#,
        ),
        (r#""setCountsType":1,"#, "", "/setCountsType", "required", r#""setCountsType":1,"#),
        (r#""isTakeEffect":0"#, r#""isTakeEffect":2"#, "/isTakeEffect", "enum", r#""isTakeEffect":1"#),
        (r#""isTakeEffect":0"#, r#""isTakeEffect":true"#, "/isTakeEffect", "type", r#""isTakeEffect":1"#),
        (r#""isTakeEffect":0"#, r#""isTakeEffect":null"#, "/isTakeEffect", "type", r#""isTakeEffect":0"#),
        (person, r#""""#, "/setCounts/0/personID", "minLength", r#""x""#),
        (person, &too_long, "/setCounts/0/personID", "maxLength", &longest),
        (person, r#""a\u0000""#, "/setCounts/0/personID", "pattern", r#""aé😀漢""#),
        (person, r#"" 16""#, "/setCounts/0/personID", "pattern", r#""16""#),
        (person, r#""1 6""#, "/setCounts/0/personID", "pattern", r#""1_6""#),
        (person, r#""16\u00a0""#, "/setCounts/0/personID", "pattern", r#""16\u00a1""#),
        (person, "\"16\u{200b}\"", "/setCounts/0/personID", "pattern", "\"16\u{2010}\""),
        (person, "\"16\u{2028}\"", "/setCounts/0/personID", "pattern", "\"16\u{2030}\""),
        (person, r#""16\u00ad""#, "/setCounts/0/personID", "pattern", r#""16-""#),
        (person, r#""16\udb40\udc20""#, "/setCounts/0/personID", "pattern", r#""16\ud83d\ude00""#),
        (person, r#""\u007f""#, "/setCounts/0/personID", "pattern", r#""~""#),
        (person, r#""\n""#, "/setCounts/0/personID", "pattern", r#""\\n""#),
        (person, "160", "/setCounts/0/personID", "type", r#""162""#),
        (person, r#""161""#, "/setCounts/1/personID", "x-uniqueBy", r#""1610""#),
        (person, r#""\u003161""#, "/setCounts/1/personID", "x-uniqueBy", r#""\u0031610""#),
        (r#""personID":"160","#, "", "/setCounts/0/personID", "required", r#""personID":"160","#),
        (r#""count":2"#, r#""count":100000000"#, "/setCounts/0/count", "maximum", r#""count":99999999"#),
        (r#""count":2"#, r#""count":-1"#, "/setCounts/0/count", "minimum", r#""count":0"#),
        (r#""count":2"#, r#""count":2.5"#, "/setCounts/0/count", "type", r#""count":2"#),
        (r#""count":2"#, r#""count":null"#, "/setCounts/0/count", "type", r#""count":2"#),
        (r#""count":2"#, r#""Count":2"#, "/setCounts/0/Count", "additionalProperties", r#""co\u0075nt":2"#),
        (r#""count":2"#, r#""a/b~":[{}]"#, "/setCounts/0/a~1b~0", "additionalProperties", r#""count":2"#),
    ];
    for (piece, bad, pointer, code, good) in cases {
        assert_eq!(found(appoint(&with(piece, bad))), [(pointer.to_owned(), code)], "{bad}");
        assert!(appoint(&with(piece, good)).is_ok(), "{good}");
    }
}

#[test]
fn inspector_id_with_invisible_characters_is_rejected() {
    let inspectors = |id: &str| with(r#"{"personID":"161"}"#, &format!(r#"{{"personID":"160{id}"}}"#));
    let unseen = [
        0x200B, 0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180F, 0x2065, 0x206F, 0x2800, 0x3164,
        0xFE00, 0xFE0F, 0xFFA0, 0xFFF0, 0xFFF8, 0xFFFC, 0x13439, 0x1343F, 0x1345F, 0x16FE4, 0x1D159, 0xE0000,
        0xE0002, 0xE0100, 0xE0FFF,
    ];
    for code in unseen {
        let unseen = char::from_u32(code).unwrap();
        let escaped: String =
            unseen.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect();
        for id in [unseen.to_string(), escaped] {
            let refused = [("/setCounts/1/personID".to_owned(), "pattern")];
            assert_eq!(found(appoint(&inspectors(&id))), refused, "U+{code:04X}");
        }
    }
    // Those that stand beside them and are seen.
    for seen in [
        "",
        "\u{350}",
        "\u{115E}",
        "\u{1161}",
        "\u{17B6}",
        "\u{180A}",
        "\u{2801}",
        "\u{3165}",
        "\u{FE10}",
        "\u{FFA1}",
        "\u{FFFD}",
        "\u{1342F}",
        "\u{13460}",
    ] {
        if seen.is_empty() {
            assert_eq!(
                found(appoint(&inspectors(seen))),
                [("/setCounts/1/personID".to_owned(), "x-uniqueBy")]
            );
        } else {
            assert!(appoint(&inspectors(seen)).is_ok(), "{seen:?}");
        }
    }
}

#[test]
fn inspector_list_has_one_to_a_thousand_objects() {
    let body = |items: &str| {
        format!(r#"{{"qualityTaskId":1,"setCountsType":1,"isTakeEffect":1,"setCounts":{items}}}"#)
    };
    let list = |count: usize| {
        let items: Vec<_> = (0..count).map(|i| format!(r#"{{"personID":"{i}"}}"#)).collect();
        body(&format!("[{}]", items.join(",")))
    };
    assert!(appoint(&list(1)).is_ok());
    assert!(appoint(&list(1000)).is_ok());
    assert_eq!(found(appoint(&list(0))), [("/setCounts".to_owned(), "minItems")]);
    assert_eq!(found(appoint(&list(1001))), [("/setCounts".to_owned(), "maxItems")]);
    assert_eq!(found(appoint(&body("{}"))), [("/setCounts".to_owned(), "type")]);
    assert_eq!(found(appoint(&body(r#"["160"]"#))), [("/setCounts/0".to_owned(), "type")]);
    assert_eq!(found(appoint("[]")), [(String::new(), "type")]);
    assert_eq!(found(appoint("null")), [(String::new(), "type")]);
    assert_eq!(found(appoint("{}")).len(), 4);
}

#[test]
fn all_violations_are_counted_and_a_hundred_are_listed() {
    let bad = with(r#"{"personID":"161"}"#, &vec![r#"{"personID":"\u0001","count":-1}"#; 200].join(","));
    let violations = violations(appoint(&bad));
    assert_eq!(violations.list.len(), 100);
    assert_eq!(violations.total, 200 * 2 + 199);
}

#[test]
fn violation_details_name_the_rule_and_never_a_value() {
    let long = "k".repeat(100);
    let bad = with(r#""954125366""#, r#""SECRET""#)
        .replace("count", &format!(r"\u001b{long}"))
        .replace("160", "\\nSECRET");
    let list = violations(appoint(&bad)).list;
    assert!(!format!("{list:?}").contains("SECRET"), "{list:?}");
    let id = "must be an integer in plain digits, at least 0, at most 18446744073709551615; or a string, \
              1 or more characters long, 20 or fewer characters long, text that matches `^[0-9]+$`";
    assert_eq!(list[0].detail, id);
    let key = format!(r"\u{{1b}}{}", "k".repeat(63));
    assert!(list.iter().any(|violation| violation.detail == format!("unknown key `{key}`")), "{list:?}");
}

/// An id as JavaScript writes it when it should write 954645333549048833, and one that it never writes.
const ROUNDED: &str = "954645333549048800";
const EXACT: &str = "954645333549048833";

#[test]
fn possibly_rounded_id_must_be_a_string() {
    let contracts = [
        (compile(Contract::APPOINT_QUALITY_TASK), with(r#""954125366""#, "<id>")),
        (
            compile(include_str!("../../config/contracts/deleteQualityTask.json")),
            r#"{"qualityTaskId":<id>}"#.to_owned(),
        ),
    ];
    for (contract, body) in &contracts {
        let refused = |bare_ids, id: &str| {
            let checked = check_as(bare_ids, contract, &body.replace("<id>", id));
            let violations = if checked.is_ok() { Violations::default() } else { violations(checked) };
            let list = violations
                .list
                .into_iter()
                .map(|violation| (violation.pointer, violation.code, violation.detail));
            list.collect::<Vec<_>>()
        };
        let id =
            |code: &'static str, detail: &str| vec![("/qualityTaskId".to_owned(), code, detail.to_owned())];
        let may_be_rounded = id(
            "number_may_be_rounded",
            "an id above 2^53 may have lost digits in a client that stores numbers as doubles: send it as a string",
        );
        let must_be_string = id(
            "number_must_be_string",
            "must be a string: the gateway accepts no numbers as ids from this caller",
        );
        for rounded in [ROUNDED, "9007199254740992", "1611917095665262000", "18446744073709550"] {
            assert_eq!(refused(BareIds::Detect, rounded), may_be_rounded, "{rounded}");
        }
        for id in [ROUNDED, EXACT, "9007199254740992", "9007199254740991", "954125366", "0"] {
            assert_eq!(refused(BareIds::Exact, id), [], "{id}");
            assert_eq!(refused(BareIds::Refuse, id), must_be_string, "{id}");
            for bare_ids in [BareIds::Detect, BareIds::Exact, BareIds::Refuse] {
                assert_eq!(refused(bare_ids, &format!("{id:?}")), [], "{id} as a string");
            }
        }
        for exact in [EXACT, "9007199254740991", "954125366", "0"] {
            assert_eq!(refused(BareIds::Detect, exact), [], "{exact}");
        }
        // What is no id is told as such.
        for bare_ids in [BareIds::Detect, BareIds::Refuse] {
            assert_eq!(refused(bare_ids, "18446744073709552000")[0].1, "anyOf");
            assert_eq!(refused(bare_ids, "9546453335490488e2")[0].1, "anyOf");
        }
    }
    // Nothing else in the body is an id.
    assert!(check_as(BareIds::Refuse, &contracts[0].0, GOOD).is_ok());
}

#[test]
fn refuse_rounded_applies_if_every_matching_alternative_sets_it() {
    let cases = [
        (json!({ "type": "integer", "x-refuseRounded": true }), true),
        (json!({ "type": "integer", "x-refuseRounded": false }), false),
        (json!({ "type": ["integer", "string"], "x-refuseRounded": true }), true),
        (json!({ "x-refuseRounded": true }), true),
        (json!({ "x-refuseRounded": true, "anyOf": [{ "type": "integer" }] }), true),
        (json!({ "anyOf": [{ "type": "integer", "x-refuseRounded": true }, { "type": "string" }] }), true),
        (json!({ "anyOf": [{ "type": "integer", "x-refuseRounded": true }, { "type": "number" }] }), false),
        (
            json!({ "anyOf": [
                { "type": "integer", "x-refuseRounded": true },
                { "type": "integer", "maximum": 9 },
            ] }),
            true,
        ),
        (json!({ "anyOf": [{ "anyOf": [{ "type": "integer", "x-refuseRounded": true }] }] }), true),
    ];
    for (schema, is_id) in cases {
        let contract = compile(&schema.to_string());
        let checked = contract.check(ROUNDED.into(), BareIds::Detect);
        assert_eq!(checked.result.is_err(), is_id, "{schema}");
        assert_eq!(checked.large_ids, usize::from(is_id), "{schema}");
    }
    let list =
        r#"{"type":"array","items":{"type":"integer","x-refuseRounded":true,"maximum":999999999999999999}}"#;
    let contract = compile(list);
    let body =
        format!("[1,{EXACT},{ROUNDED},-{ROUNDED},9007199254740991,9007199254740993,1000000000000000000]");
    for (bare_ids, broken) in [(BareIds::Detect, 3), (BareIds::Exact, 1), (BareIds::Refuse, 7)] {
        let checked = contract.check(body.clone().into(), bare_ids);
        assert_eq!(violations(checked.result).total, broken, "{bare_ids:?}");
        assert_eq!(checked.large_ids, 4, "{bare_ids:?}: what breaks another rule is no id");
    }
}

#[test]
fn invalid_json_is_reported_before_any_violation() {
    let fault = not_json(appoint(&(with(r#""setCountsType":1"#, r#""setCountsType":2"#) + "x")));
    assert_eq!(fault.reason, "expected the end of the text: a JSON text is one value");
    not_json(appoint(&with(r#""count":2"#, r#""unknown":{"a":1,"\u0061":2}"#)));
    for end in 0..GOOD.len() {
        not_json(appoint(&GOOD[..end]));
    }
}

#[test]
fn checked_body_keeps_its_bytes_and_lists_the_audited_values() {
    let audited = |body: &str| {
        let body = appoint(body).unwrap_or_else(|fault| panic!("{fault:?}"));
        let mut out = Vec::new();
        body.audit_members(&|_| [0; 16], &mut out);
        String::from_utf8(out).unwrap()
    };
    assert_eq!(appoint(GOOD).unwrap().bytes(), GOOD);
    let whole = r#","task":"954125366","take_effect":0,"inspectors":["160","161"],"counts":[2,null]"#;
    assert_eq!(audited(GOOD), whole);
    let verbatim = with(r#""954125366""#, "18446744073709551615").replace("160", r"\u0031\/");
    let whole =
        r#","task":18446744073709551615,"take_effect":0,"inspectors":["\u0031\/","161"],"counts":[2,null]"#;
    assert_eq!(audited(&verbatim), whole);
    let absent = compile(
        r#"{"type":"object","additionalProperties":true,"properties":{"a":{"type":"null","x-audit":"a"}}}"#,
    );
    let mut out = Vec::new();
    check(&absent, "{}").unwrap().audit_members(&|_| [0; 16], &mut out);
    assert_eq!(out, br#","a":null"#);
}

/// Many readers refuse a line with such a number, the list of unresolved calls among them.
#[test]
fn audited_number_beyond_a_double_is_recorded_as_a_string() {
    let contract = compile(r#"{"type":"array","items":{"type":"number","x-audit":"sizes"}}"#);
    let long = "9".repeat(400);
    let body = format!("[1e308,-1e308,1e309,-1E999,{long},0e999,1e-999,12345]");
    let mut line = b"{\"seq\":1".to_vec();
    check(&contract, &body).unwrap().audit_members(&|_| [0; 16], &mut line);
    line.push(b'}');
    let record: Value = serde_json::from_slice(&line).unwrap();
    assert_eq!(record["sizes"], json!([1e308, -1e308, "1e309", "-1E999", long, 0.0, 0.0, 12345]));
}

#[test]
fn audited_lists_match_item_by_item() {
    let item = |properties: Value| json!({ "type": "object", "additionalProperties": true, "properties": properties });
    let scalar = |name: &str| json!({ "type": ["string", "integer"], "x-audit": name });
    let inner =
        json!({ "type": "array", "items": item(json!({ "p": scalar("parts"), "q": scalar("sizes") })) });
    let nested = item(json!({ "deep": scalar("deep") }));
    let outer = item(json!({ "a": scalar("ids"), "parts": inner, "nested": nested, "b": scalar("names") }));
    let contract = compile(&json!({ "type": "array", "items": outer }).to_string());
    let audited = |body: &str| {
        let mut line = b"{\"seq\":1".to_vec();
        check(&contract, body).unwrap().audit_members(&|_| [0; 16], &mut line);
        line.push(b'}');
        let mut record: Value = serde_json::from_slice(&line).unwrap();
        json!([
            record["ids"].take(),
            record["names"].take(),
            record["deep"].take(),
            record["parts"].take(),
            record["sizes"].take(),
        ])
    };
    let cases = [
        ("[]", json!([[], [], [], [], []])),
        ("[{}]", json!([[null], [null], [null], [], []])),
        (
            r#"[{"a":1},{"b":2},{"b":3,"a":4}]"#,
            json!([[1, null, 4], [null, 2, 3], [null, null, null], [], []]),
        ),
        (
            r#"[{"nested":{"deep":1}},{"nested":{}},{"x":{"a":9}}]"#,
            json!([[null, null, null], [null, null, null], [1, null, null], [], []]),
        ),
        (
            r#"[{"parts":[{"q":1},{"p":2}],"a":3},{"parts":[],"b":4},{"parts":[{"p":"5","q":6}]}]"#,
            json!([[3, null, null], [null, 4, null], [null, null, null], [null, 2, "5"], [1, null, 6]]),
        ),
    ];
    for (body, wanted) in cases {
        assert_eq!(audited(body), wanted, "{body}");
    }
    for length in [65_532, 65_533, 65_534, 1_000_000] {
        let long = "x".repeat(length);
        let wanted = json!([[long, 1], [null, null], [null, null], [], []]);
        assert_eq!(audited(&format!(r#"[{{"a":"{long}"}},{{"a":1}}]"#)), wanted, "{length}");
    }
}

#[test]
fn schema_with_an_unchecked_keyword_is_rejected_with_its_place() {
    let cases = [
        (r#"{"multipleOf":2}"#, "#/multipleOf"),
        (r#"{"type":"object"}"#, "#"),
        (r#"{"properties":{}}"#, "#"),
        (r#"{"additionalProperties":{}}"#, "#"),
        (r#"{"additionalProperties":true,"properties":{"a/b":{"oneOf":[]}}}"#, "#/properties/a~1b/oneOf"),
        (r#"{"additionalProperties":false,"required":["a"]}"#, "#/required"),
        (r#"{"type":"text"}"#, "#/type"),
        (r#"{"type":[]}"#, "#/type"),
        (r#"{"enum":[]}"#, "#/enum"),
        (r#"{"enum":[[]]}"#, "#/enum"),
        (r#"{"const":{}}"#, "#/const"),
        (r#"{"maximum":18446744073709551616}"#, "#/maximum"),
        (r#"{"minLength":-1}"#, "#/minLength"),
        (r#"{"pattern":"("}"#, "#/pattern"),
        (r#"{"pattern":"(?=a)"}"#, "#/pattern"),
        (r#"{"items":true}"#, "#/items"),
        (r#"{"items":{"format":"date"}}"#, "#/items/format"),
        (r#"{"anyOf":[{"type":"array"}]}"#, "#/anyOf/0"),
        (r#"{"anyOf":[{"minimum":1}]}"#, "#/anyOf/0"),
        (r#"{"anyOf":[{"type":"null","x-audit":"a"}]}"#, "#/anyOf/0/x-audit"),
        (r##"{"$ref":"#/$defs/a"}"##, "#/$ref"),
        (r#"{"$ref":"https://example.org/a"}"#, "#/$ref"),
        (r##"{"$ref":"#/$defs/a","minimum":1,"$defs":{"a":{}}}"##, "#/minimum"),
        (r##"{"$ref":"#/$defs/a","$defs":{"a":{"items":{"$ref":"#/$defs/a"}}}}"##, "#/$defs/a/items/$ref"),
        (r#"{"$defs":{"unused":{"not":{}}}}"#, "#/$defs/unused/not"),
        (r#"{"items":{"$defs":{}}}"#, "#/items/$defs"),
        (r#"{"type":"string","x-audit":"Task"}"#, "#/x-audit"),
        (r#"{"type":"string","x-audit":"key"}"#, "#/x-audit"),
        (r#"{"type":"string","x-audit":"outcome"}"#, "#/x-audit"),
        (r#"{"type":"boolean","x-audit":"superseded"}"#, "#/x-audit"),
        (r#"{"x-audit":"task"}"#, "#/x-audit"),
        (r#"{"x-uniqueBy":"a"}"#, "#/x-uniqueBy"),
        (r#"{"type":"integer","x-refuseRounded":1}"#, "#/x-refuseRounded"),
        (r#"{"type":"integer","x-refuseRounded":"true"}"#, "#/x-refuseRounded"),
        (r#"{"anyOf":[{"type":"integer","x-refuseRounded":null}]}"#, "#/anyOf/0/x-refuseRounded"),
        (r#"{"type":"string","x-refuseRounded":true}"#, "#/x-refuseRounded"),
        (r##"{"$ref":"#/$defs/a","x-refuseRounded":true,"$defs":{"a":{}}}"##, "#/x-refuseRounded"),
        (r#"{"type":"null","type":"null"}"#, "#"),
        ("{", "#"),
        ("true", "#"),
    ];
    for (schema, pointer) in cases {
        let error = Contract::compile(schema).expect_err(schema);
        assert_eq!(error.pointer, pointer, "{schema}: {error}");
        assert!(error.to_string().starts_with(pointer), "{error}");
    }
    compile(
        r##"{"$ref":"#/$defs/a","title":"t","$defs":{"a":{"const":1,"description":"d","default":1,"examples":[1]}}}"##,
    );
}

#[test]
fn unique_by_compares_member_values_at_each_level() {
    let list = |items: Value| {
        json!({
            "type": "array", "x-uniqueBy": "id",
            "items": { "type": "object", "additionalProperties": true, "properties": items },
        })
    };
    let inner = list(json!({ "id": { "type": ["string", "integer"] } }));
    let schema = list(json!({ "id": { "type": ["string", "integer"] }, "parts": inner }));
    let contract = compile(&schema.to_string());
    let twice = |pointer: &str| vec![(pointer.to_owned(), "x-uniqueBy")];
    for (body, wanted) in [
        (r#"[{"id":"a","parts":[{"id":"a"}]},{"parts":[{"id":"b"},{"id":"a"}],"id":"b"}]"#, vec![]),
        (r#"[{"id":"a","parts":[{"id":"x"}]},{"id":"a","parts":[]}]"#, twice("/1/id")),
        (r#"[{"parts":[{"id":"x"}]},{"parts":[{"id":"x"}]}]"#, vec![]),
        (r#"[{"parts":[{"id":"x"},{},{"id":"\u0078"}],"id":1}]"#, twice("/0/parts/2/id")),
        (r#"[{"id":1},{"id":"1"},{"id":11},{"x":{"id":1}}]"#, vec![]),
        (r#"[{"id":1},{"id":"1"},{"x":0,"\u0069d":1}]"#, twice("/2/id")),
    ] {
        let checked = check(&contract, body);
        let found = if checked.is_ok() { Vec::new() } else { found(checked) };
        assert_eq!(found, wanted, "{body}");
    }
    let many: Vec<_> = (0..100).map(|i| format!(r#"{{"id":"\u006b{}"}}"#, i % 99)).collect();
    assert_eq!(found(check(&contract, &format!("[{}]", many.join(",")))), twice("/99/id"));
}

/// A generator of its own, so that every run checks the same cases.
struct Random(u64);

impl Random {
    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

const KEYS: [&str; 5] = ["a", "b", "c/d", "e~f", "é"];
const PATTERNS: [(&str, &str); 12] = [
    ("^[a-c]*$", "abcabc"),
    ("b", "xbxx"),
    ("^é", "é😀é"),
    ("^[0-9]+$", "12345"),
    (r"^\d{2,5}$", "123"),
    (r"\d$", "a9"),
    (r"^\w+$", "aZ_9"),
    (r"^\S*\s\S*$", "é\u{a0}é"),
    ("^.{1,3}$", "a😀"),
    ("^(a|bc)+9?$", "abca"),
    (r"^[^\u0000-\u001fa]*$", "bé 😀"),
    (r"^\D\W", "é-x"),
];

/// A schema, and a document that keeps it.
fn schema(random: &mut Random, depth: usize) -> (Value, Value) {
    match random.below(if depth == 0 { 6 } else { 12 }) {
        0 => integer(random),
        1 => string(random),
        2 => {
            let value = random.pick(&[json!(null), json!(true), json!(1.5), json!(7), json!("x")]).clone();
            (json!({ "const": value }), value)
        }
        3 => {
            let values = [json!(1), json!("1"), json!(false), json!(null), json!(2.5)];
            (json!({ "enum": values }), random.pick(&values).clone())
        }
        4 => {
            let alternatives = [integer(random), string(random), (json!({"type": "null"}), json!(null))];
            let (first, second) = (random.pick(&alternatives), random.pick(&alternatives));
            (json!({ "anyOf": [first.0, second.0] }), second.1.clone())
        }
        5 => {
            let (kinds, value) = random
                .pick(&[
                    (json!("number"), json!(0.5)),
                    (json!("boolean"), json!(false)),
                    (json!(["string", "null"]), json!("é")),
                    (json!(["boolean", "number"]), json!(-3)),
                    (json!("null"), json!(null)),
                ])
                .clone();
            (json!({ "type": kinds }), value)
        }
        6 | 7 => array(random, depth),
        8 => {
            let name = *random.pick(&["id", "name"]);
            let value = if name == "id" { json!(12) } else { json!("abc") };
            (json!({ "$ref": format!("#/$defs/{name}") }), value)
        }
        _ => object(random, depth),
    }
}

fn integer(random: &mut Random) -> (Value, Value) {
    let values =
        [json!(0), json!(5), json!(-17), json!(9_007_199_254_740_993_u64), json!(u64::MAX), json!(i64::MIN)];
    let value = random.pick(&values).clone();
    let mut schema = json!({ "type": "integer" });
    if random.one_in(2) {
        schema["x-refuseRounded"] = json!(random.one_in(2));
    }
    if random.one_in(2) {
        schema["minimum"] = value.clone();
    }
    if random.one_in(2) {
        schema["maximum"] = value.clone();
    }
    (schema, value)
}

fn string(random: &mut Random) -> (Value, Value) {
    let (pattern, text) = *random.pick(&PATTERNS);
    let mut schema = json!({ "type": "string" });
    if random.one_in(2) {
        schema["minLength"] = json!(text.chars().count() - random.below(2));
    }
    if random.one_in(2) {
        schema["maxLength"] = json!(text.chars().count() + random.below(2));
    }
    if random.one_in(2) {
        schema["pattern"] = json!(pattern);
    }
    (schema, json!(text))
}

fn array(random: &mut Random, depth: usize) -> (Value, Value) {
    let (items, item) = schema(random, depth - 1);
    let count = random.below(4);
    let mut schema = json!({ "type": "array", "items": items });
    if random.one_in(2) {
        schema["minItems"] = json!(count);
    }
    if random.one_in(2) {
        schema["maxItems"] = json!(count);
    }
    (schema, Value::Array(vec![item; count]))
}

fn object(random: &mut Random, depth: usize) -> (Value, Value) {
    let (mut properties, mut required, mut document) = (Map::new(), Vec::new(), Map::new());
    for key in KEYS.iter().take(1 + random.below(KEYS.len())) {
        let (property, value) = schema(random, depth - 1);
        properties.insert((*key).to_owned(), property);
        let is_required = random.one_in(2);
        if is_required {
            required.push(*key);
        }
        if is_required || random.one_in(2) {
            document.insert((*key).to_owned(), value);
        }
    }
    let schema = json!({
        "type": "object", "properties": properties, "required": required, "additionalProperties": random.one_in(2),
    });
    (schema, Value::Object(document))
}

/// A whole schema, and a document that keeps it.
fn case(random: &mut Random) -> (Value, Value) {
    let (mut schema, document) = schema(random, 3);
    schema["$defs"] = json!({
        "id": { "type": "integer", "minimum": 10, "maximum": 20 },
        "name": { "type": "string", "maxLength": 3 },
    });
    (schema, document)
}

/// One edit somewhere in the document.
fn edit(random: &mut Random, value: &mut Value) {
    let into = !random.one_in(4);
    match value {
        Value::Object(members) if into && !members.is_empty() => {
            let index = random.below(members.len());
            if let Some(member) = members.values_mut().nth(index) {
                edit(random, member);
            }
        }
        Value::Array(items) if into && !items.is_empty() => {
            let index = random.below(items.len());
            edit(random, &mut items[index]);
        }
        Value::Object(members) if random.one_in(2) => {
            members.insert((*random.pick(&["z", "é", "a"])).to_owned(), json!(1));
        }
        Value::Object(members) if !members.is_empty() => {
            let key = members.keys().nth(random.below(members.len())).cloned();
            members.retain(|name, _| Some(name) != key.as_ref());
        }
        Value::Array(items) if random.one_in(2) => {
            let item = items.first().cloned().unwrap_or(json!(1));
            items.push(item);
        }
        Value::Array(items) if !items.is_empty() => drop(items.pop()),
        Value::String(text) if random.one_in(2) => text.push(*random.pick(&['a', '😀', '9'])),
        Value::String(text) if !text.is_empty() => drop(text.pop()),
        Value::Number(number) if random.one_in(2) && (number.is_i64() || number.is_u64()) => {
            let number = number.as_i128().unwrap_or_default() + if random.one_in(2) { 1 } else { -1 };
            *value = u64::try_from(number)
                .map_or_else(|_| json!(i64::try_from(number).unwrap_or(3)), |n| json!(n));
        }
        _ => {
            *value = random
                .pick(&[json!(null), json!([]), json!({}), json!("1"), json!(1), json!(0.5), json!(true)])
                .clone();
        }
    }
}

/// Writes a document as no serialiser would: escapes and white space at random.
fn write(random: &mut Random, value: &Value, out: &mut String) {
    let space = *random.pick(&["", "", " ", "\r\n\t"]);
    out.push_str(space);
    match value {
        Value::Object(members) => {
            out.push('{');
            for (i, (key, member)) in members.iter().enumerate() {
                out.push_str(if i > 0 { "," } else { "" });
                write(random, &json!(key), out);
                out.push(':');
                write(random, member, out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { "," } else { "" });
                write(random, item, out);
            }
            out.push(']');
        }
        Value::String(text) => {
            out.push('"');
            for char in text.chars() {
                if random.one_in(3) {
                    char.encode_utf16(&mut [0; 2])
                        .iter()
                        .for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
                } else {
                    out.push(char);
                }
            }
            out.push('"');
        }
        scalar => out.push_str(&scalar.to_string()),
    }
    out.push_str(space);
}

/// Both verdicts on a document: ours and the oracle's.
fn verdicts(
    random: &mut Random,
    ours: &Contract,
    oracle: &jsonschema::Validator,
    document: &Value,
) -> (bool, bool) {
    let mut text = String::new();
    write(random, document, &mut text);
    let kept = |bare_ids| match check_as(bare_ids, ours, &text) {
        Err(BodyFault::NotJson(fault)) => panic!("{fault}: {text}"),
        checked => checked.is_ok(),
    };
    // The walk that tells of all violations says the same as the one that ends at the first.
    let all = |bare_ids| {
        ours.violations(text.as_bytes(), bare_ids).unwrap_or_else(|fault| panic!("{fault}: {text}"))
    };
    for bare_ids in BareIds::ALL {
        assert_eq!(all(bare_ids).total == 0, kept(bare_ids), "{text}: {:?}", all(bare_ids));
    }
    // Where a caller's ids are exact, the check is JSON Schema's. What is refused beyond it is told by codes of its own.
    for (bare_ids, code) in
        [(BareIds::Detect, "number_may_be_rounded"), (BareIds::Refuse, "number_must_be_string")]
    {
        let list = all(bare_ids).list;
        let beyond = list.iter().filter(|violation| violation.code == code).count();
        assert_eq!(list.len() - beyond, all(BareIds::Exact).list.len(), "{text}: {list:?}");
    }
    let kept = kept(BareIds::Exact);
    (kept, oracle.is_valid(document))
}

#[test]
fn contract_verdicts_agree_with_the_jsonschema_crate() {
    const SCHEMAS: usize = 400;
    const EDITS: usize = 8;
    let mut random = Random(1);
    let (mut valid, mut broken, mut total) = (0, 0, 0);
    for _ in 0..SCHEMAS {
        let (schema, document) = case(&mut random);
        let ours = compile(&schema.to_string());
        let oracle = jsonschema::validator_for(&schema).unwrap();
        for round in 0..=EDITS {
            let mut document = document.clone();
            if round > 0 {
                edit(&mut random, &mut document);
            }
            let (kept, wanted) = verdicts(&mut random, &ours, &oracle, &document);
            assert_eq!(kept, wanted, "schema {schema}\ndocument {document}");
            assert!(wanted || round > 0, "made to be valid: schema {schema}\ndocument {document}");
            total += 1;
            valid += usize::from(wanted);
            broken += usize::from(!wanted); // every one of them is one edit away from a valid document
        }
    }
    assert!(valid * 10 >= total * 3 && broken * 10 >= total * 3, "{valid} valid, {broken} broken of {total}");
}

/// Takes a keyword's effect away, at every place of a schema; false if it stands nowhere.
fn neutralise(schema: &mut Value, keyword: &str) -> bool {
    let mut found = false;
    match schema {
        Value::Object(members) => {
            let is_open = members.get("additionalProperties") == Some(&json!(true));
            found |= match keyword {
                "additionalProperties" => members
                    .get_mut(keyword)
                    .is_some_and(|v| std::mem::replace(v, json!(true)) == json!(false)),
                "properties" if !is_open => false, // all its keys would be unknown ones
                _ => members.shift_remove(keyword).is_some(),
            };
            for (name, member) in members {
                // An alternative must say its type.
                found |= !(keyword == "type" && name == "anyOf") && neutralise(member, keyword);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| found |= neutralise(item, keyword)),
        _ => {}
    }
    found
}

#[test]
fn oracle_detects_every_unchecked_keyword() {
    const KEYWORDS: [&str; 15] = [
        "type",
        "const",
        "enum",
        "anyOf",
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
    ];
    for keyword in KEYWORDS.into_iter().chain(["$ref"]) {
        let mut random = Random(2);
        let is_noticed = (0..400).any(|_| {
            let (schema, document) = case(&mut random);
            let mut weaker = schema.clone();
            if !neutralise(&mut weaker, keyword) {
                return false;
            }
            let ours = compile(&weaker.to_string());
            let oracle = jsonschema::validator_for(&schema).unwrap();
            (0..8).any(|_| {
                let mut document = document.clone();
                edit(&mut random, &mut document);
                let (kept, wanted) = verdicts(&mut random, &ours, &oracle, &document);
                kept != wanted
            })
        });
        assert!(is_noticed, "{keyword}");
    }
}

/// What strict JSON is beyond serde_json: no repeated key, no nesting beyond 32. The number is the depth.
#[derive(Clone, Copy)]
struct Strict(usize);

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("strict JSON")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let within = self.deeper()?;
        while items.next_element_seed(within)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<(), A::Error> {
        let (within, mut keys) = (self.deeper()?, HashSet::new());
        while let Some(key) = members.next_key::<String>()? {
            if !keys.insert(key) {
                return Err(A::Error::custom("repeated"));
            }
            members.next_value_seed(within)?;
        }
        Ok(())
    }
}

impl Strict {
    fn deeper<E: Error>(self) -> Result<Self, E> {
        if self.0 < 32 { Ok(Self(self.0 + 1)) } else { Err(E::custom("too deep")) }
    }
}

/// Whether a document is strict JSON; `None` if serde_json can't tell, since it has no number so large.
fn is_strict(document: &[u8]) -> Option<bool> {
    std::str::from_utf8(document).map_or(Some(false), |text| {
        let mut reader = serde_json::Deserializer::from_str(text);
        let read = Strict(0).deserialize(&mut reader).and_then(|()| reader.end());
        match read {
            Err(error) if error.to_string().starts_with("number out of range") => None,
            read => Some(read.is_ok()),
        }
    })
}

/// Breaks a document in one place, or mends it.
fn mutate(random: &mut Random, document: &mut Vec<u8>) {
    const PIECES: [&[u8]; 40] = [
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\"",
        b"\\",
        b"/",
        b"\\u0061",
        b"\\ud83d",
        b"\\ud83d\\ud83d",
        b"\\ud83d\\ude00",
        b"\\ud83d\\u0061",
        b"\\ud83dx",
        b"\\ude00",
        b"u12",
        b"a",
        b"0",
        b"-",
        b"1",
        b".",
        b"e",
        b"+",
        b" ",
        b"\t",
        b"\n",
        b"\0",
        b"\x1f",
        b"\x7f",
        b"\xc3\xa9",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xff",
        b"\xef\xbb\xbf",
        b"true",
        b"null",
        b"\"count\":0,",
        b"\"p\\u0065rsonID\":0,",
        b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    ];
    let at = random.below(document.len() + 1);
    let end = (at + random.below(4)).min(document.len());
    let piece = match random.below(4) {
        0 => Vec::new(),
        1 => {
            let from = random.below(document.len() + 1);
            document[from..(from + random.below(24)).min(document.len())].to_vec()
        }
        _ => random.pick(&PIECES).to_vec(),
    };
    document.splice(at..if random.one_in(2) { at } else { end }, piece);
}

#[test]
fn strict_json_matches_serde_json_minus_repeats_and_deep_nesting() {
    let (anything, appoint) = (compile("{}"), compile(Contract::APPOINT_QUALITY_TASK));
    let mut random = Random(3);
    let (mut taken, mut refused) = (0, 0);
    for _ in 0..3000 {
        let mut text = GOOD.to_owned();
        if random.one_in(2) {
            let document = case(&mut random).1;
            text.clear();
            write(&mut random, &document, &mut text);
        }
        let mut document = text.into_bytes();
        for _ in 0..6 {
            mutate(&mut random, &mut document);
            let Some(wanted) = is_strict(&document) else { continue };
            for contract in [&anything, &appoint] {
                let checked = contract.check(Bytes::copy_from_slice(&document), BareIds::Detect).result;
                let is_json = !matches!(checked, Err(BodyFault::NotJson(_)));
                assert_eq!(is_json, wanted, "{}", document.escape_ascii());
                let all = contract.violations(&document, BareIds::Detect);
                assert_eq!(
                    checked.is_ok(),
                    all.is_ok_and(|all| all.total == 0),
                    "{}",
                    document.escape_ascii()
                );
            }
            taken += usize::from(wanted);
            refused += usize::from(!wanted);
        }
    }
    assert!(taken > 1000 && refused > 1000, "{taken} taken, {refused} refused");
}

/// A gateway whose appointQualityTask has another contract.
pub(crate) fn start_with_contract(sandbox: &ccsqm_gateway::sandbox::Sandbox, contract: &Value) -> Gateway {
    let folder = std::sync::Arc::new(tempfile::TempDir::new().unwrap());
    std::fs::write(folder.path().join("other.json"), contract.to_string()).unwrap();
    let caller = "[[routes]]\nname = \"appointQualityTask\"\ncontract_file = \"other.json\"\n".to_owned();
    start_with(sandbox, Setup { folder: Some(folder), caller, ..Setup::default() })
}

#[test]
fn contract_file_replaces_the_built_in_one_and_check_reports_it() {
    let sandbox = sandbox();
    let built_in = include_str!("../../config/contracts/appointQualityTask.json");
    let mut contract: Value = serde_json::from_str(built_in).unwrap();
    contract["properties"]["note"] = json!({ "type": "string", "maxLength": 10 });
    let body = BODY.replacen('{', r#"{"note":"x","#, 1);
    assert_eq!(start(&sandbox).post(&body).code(), "contract_violation", "the control");
    let gateway = start_with_contract(&sandbox, &contract);
    assert_eq!(gateway.post(&body).outcome(), "succeeded");
    assert_eq!(gateway.call().outcome(), "succeeded");
    let config = gateway.folder.path().join("gateway.toml");
    let (code, said, error) = command(&["check", "--config", config.to_str().unwrap()]);
    assert!(code == 0 && said.contains("other.json\" # replaces the built-in contract"), "{said} {error}");
    // What `check` prints is a configuration itself.
    let again = gateway.folder.path().join("again.toml");
    std::fs::write(&again, said).unwrap();
    let (code, _, error) = command(&["check", "--config", again.to_str().unwrap()]);
    assert_eq!(code, 0, "{error}");
}

#[test]
fn confusable_characters_are_escaped_in_the_trail() {
    let sandbox = sandbox();
    let contract = json!({
        "type": "object",
        "additionalProperties": false,
        "required": ["task", "who"],
        "properties": {
            "task": { "type": "string", "x-audit": "task" },
            "who": { "type": "array", "maxItems": 9, "items": { "type": "string", "x-audit": "inspectors" } }
        }
    });
    let gateway = start_with_contract(&sandbox, &contract);
    let odd = "a\u{7f}\u{85}\u{9b}\u{a0}\u{ad}\u{34f}\u{115f}\u{200b}\u{2028}\u{202e}\u{2800}\u{3164}\u{feff}\u{e0020}\u{e0100}é";
    let body = json!({ "task": odd, "who": [odd, "plain"] }).to_string();
    assert!(body.contains('\u{2028}'), "it is sent raw");
    let _ = gateway.post(&body);
    let traces = [
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", true),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\u{85}", false),
        ("a\u{9b}31m", false),
        ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", false),
    ];
    for (trace, _) in traces {
        let head = head(body.len(), &format!("traceparent: {trace}\r\n"));
        let _ = gateway.send(&head, &body);
    }
    let intents = gateway.records("intent", 5);
    assert!(
        intents.iter().all(|intent| intent["task"] == odd && intent["inspectors"] == json!([odd, "plain"]))
    );
    for (intent, (trace, is_recorded)) in intents[1..].iter().zip(traces) {
        assert_eq!(
            intent.get("traceparent").is_some_and(|recorded| *recorded == trace),
            is_recorded,
            "{trace:?}"
        );
        assert_eq!(intent.get("traceparent").is_some(), is_recorded, "{trace:?}");
    }
    let trail: String = std::fs::read_dir(gateway.audit_directory())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    let raw: String =
        trail.chars().filter(|character| odd.contains(*character) && *character > '~').collect();
    assert!(raw.chars().all(|character| character == 'é') && !raw.is_empty(), "{raw:?}");
    assert!(crate::audit::verify(&gateway.audit_directory()).0);
}
