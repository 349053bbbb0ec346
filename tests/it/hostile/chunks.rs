//! Chunks: every part of their syntax. A request is behind each, so that a wrong end would show it.

use super::{BODY, Case, HEAD_CANARY, chunked, task, with_next};

const BROKEN: &[&str] = &["400 body_incomplete"];
const TRAILERS: &[&str] = &["400 trailers"];
const BOTH: &[&str] = &["200", "200"];

/// Spellings of the size.
pub(super) fn sizes() -> Vec<Case> {
    let (control, size) = (with_next(&chunked()), format!("{:x}", BODY.len()));
    let line = format!("\r\n{size}\r\n");
    let spelled = |text: &str, answers: &[&'static str]| {
        Case::swap(&control, &line, &format!("\r\n{}\r\n", text.replace('S', &size)), answers)
    };
    // Extensions are read over and thrown away; none may end a line where somebody else would.
    let good =
        ["0S", "S ", "S\t", "S;", "S;a", "S;a=b", "S ; a = \"b\"", "S;a=\"b;c\"", "S;;;", "S;\u{ff}", "S;\0"];
    let bad = [
        "",
        " S",
        "\tS",
        "0xS",
        "0XS",
        "+S",
        "-S",
        "-1",
        "-0",
        "S.0",
        "S,S",
        "S S",
        "S_",
        "\"S\"",
        "Sg",
        "gS",
        "Sh",
        "S\0",
        "S\x0b",
        "S\u{a0}",
        "S:",
        "S=a",
        "#S",
        "\u{ef}\u{bc}\u{97}",
        "\nS",
        "S\n",
        "S\r",
        "S\n;a",
        "S;a\nb",
        "S;a\rb",
        "S;a=\"\n\"",
        "S;\n",
        "S \nb",
    ];
    let mut cases: Vec<_> = good.iter().map(|text| spelled(text, BOTH)).collect();
    cases.extend(bad.iter().map(|text| spelled(text, BROKEN)));
    cases.extend([
        spelled(&format!("{}S", "0".repeat(5000)), BOTH),
        spelled(&format!("S;{}", "x".repeat(16_000)), BOTH),
        spelled(&format!("S;{}", "x".repeat(17_000)), BROKEN),
        spelled("10000000000000000", BROKEN), // 2^64
        spelled("10000000000000077", BROKEN), // 2^64 and the size
        spelled(&"f".repeat(100), BROKEN),
        spelled("ffffffffffffffff", BROKEN),
        spelled("7fffffffffffffff", BROKEN),
        spelled("80000000", BROKEN),
        Case::swap(&control, &line, &format!("\r\n{size}\n"), BROKEN),
        Case::swap(&control, &line, &format!("\r\n{size}\r"), BROKEN),
        Case::swap(&control, &line, &format!("\r\n{size}"), BROKEN),
        Case::swap(&control, &line, &format!("\r\n\r\n{size}\r\n"), BROKEN),
    ]);
    cases
}

/// What stands between the sizes.
pub(super) fn data() -> Vec<Case> {
    let (control, size) = (with_next(&chunked()), BODY.len());
    let chunk = |size: usize, data: &str| format!("{size:x}\r\n{data}");
    let one = chunk(size, &format!("{BODY}\r\n0\r\n\r\n"));
    let swapped = |to: String, answers: &[&'static str]| Case::swap(&control, &one, &to, answers);
    let (start, rest) = BODY.split_at(60);
    let (before, behind) = BODY.split_once(&task(0, 0)).unwrap();
    let bytewise = |text: &str| text.chars().map(|byte| format!("1\r\n{byte}\r\n")).collect::<String>();
    let each =
        format!("{}{}{}", bytewise(before), chunk(18, &format!("{}\r\n", task(0, 0))), bytewise(behind));
    let mut cases = vec![
        swapped(chunk(60, &format!("{start}\r\n{:x}\r\n{rest}\r\n0\r\n\r\n", rest.len())), BOTH),
        swapped(
            chunk(60, &format!("{start}\r\n0\r\n\r\n{:x}\r\n{rest}\r\n0\r\n\r\n", rest.len())),
            &["400 body_not_json", "400 bare"],
        ),
        swapped(chunk(size - 1, &format!("{BODY}\r\n0\r\n\r\n")), BROKEN),
        swapped(chunk(size + 1, &format!("{BODY}\r\n0\r\n\r\n")), BROKEN),
        swapped(chunk(size + 2, &format!("{BODY}\r\n0\r\n\r\n")), BROKEN),
        swapped(format!("0\r\n\r\n{one}"), &["400 body_not_json", "400 bare"]),
        swapped(String::new(), BROKEN),
    ];
    for end in ["", "\n", "\r", "\n\r", "\r\r\n", "\r\n\r\n", " \r\n", "\0\r\n", "\r \n"] {
        cases.push(swapped(chunk(size, &format!("{BODY}{end}0\r\n\r\n")), BROKEN));
    }
    cases.push(swapped(format!("{each}0\r\n\r\n"), BOTH));
    cases
}

/// The last chunk.
pub(super) fn ends() -> Vec<Case> {
    let control = with_next(&chunked());
    let end = "}\r\n0\r\n\r\n";
    let with =
        |to: &str, answers: &[&'static str]| Case::swap(&control, end, &format!("}}\r\n{to}"), answers);
    let good = ["000\r\n\r\n", "0;a=b\r\n\r\n", "0 \r\n\r\n", "0\t;a\r\n\r\n"];
    let bad = [
        "",
        "\r\n",
        "0",
        "0\r\n",
        "0\n\n",
        "0\n\r\n",
        "0\r\r\n\r\n",
        "0\r\n\r",
        "-0\r\n\r\n",
        "0x0\r\n\r\n",
        "+0\r\n\r\n",
        " 0\r\n\r\n",
        "0;a\nb\r\n\r\n",
        "0\0\r\n\r\n",
    ];
    let mut cases: Vec<_> = good.iter().map(|text| with(text, BOTH)).collect();
    cases.extend(bad.iter().map(|text| with(text, BROKEN)));
    // hyper takes the bare LF for the beginning of trailers.
    cases.push(with("0\r\n\n", TRAILERS));
    // What is behind the end is another request, and this is none.
    cases.push(with("0\r\n\r\n0\r\n\r\n", &["200", "400 bare"]));
    cases.push(with("0\r\n\r\n\0", &["200", "400 bare"]));
    // Empty lines before a request are to be read over (RFC 9112 §2.2).
    cases.push(with("0\r\n\r\n\r\n", BOTH));
    cases
}

/// What stands behind the last chunk is refused, whatever it is.
pub(super) fn trailers() -> Vec<Case> {
    let control = with_next(&chunked());
    let with = |lines: &str, answers: &[&'static str]| {
        Case::swap(&control, "\r\n0\r\n\r\n", &format!("\r\n0\r\n{lines}\r\n\r\n"), answers)
    };
    let mut cases: Vec<_> = [
        "x-mark",
        "authorization",
        "x-app-key",
        "x-userid",
        "host",
        "content-type",
        "content-encoding",
        "cookie",
        "idempotency-key",
        "x-request-id",
        "origin",
        "expect",
        "connection",
    ]
    .iter()
    .map(|name| with(&format!("{name}: {HEAD_CANARY}"), TRAILERS))
    .collect();
    cases.extend(
        [
            "content-length: 0",
            "content-length: 999",
            "transfer-encoding: chunked",
            "transfer-encoding: identity",
            "x-userid: 999\r\nx-userid: 999",
            "x-mark:",
        ]
        .map(|line| with(line, TRAILERS)),
    );
    cases.extend(
        [
            "x-mark",
            " x-mark: a",
            "x-mark : a",
            "x-mark\0: a",
            "x-mark: a\0",
            "x-mark: a\r\n b",
            "x-mark: a\nx-mark: b",
            "x-mark: a\rb",
            ": a",
            "POST / HTTP/1.1",
        ]
        .map(|line| with(line, BROKEN)),
    );
    let many = |count: usize| vec!["x-mark: a"; count].join("\r\n");
    cases.push(with(&many(100), TRAILERS));
    cases.push(with(&many(101), BROKEN));
    cases.push(with(&format!("x-mark: {}", "x".repeat(15_000)), TRAILERS));
    cases
}
