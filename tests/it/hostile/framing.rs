//! Where a body ends: Content-Length and Transfer-Encoding, in every odd spelling, alone and beside each other.

use super::{BODY, Case, chunked, plain, with_next};

const BARE: &[&str] = &["400 bare"];

/// Each spelling as the only one, and on either side of a good one; with a request behind it that must not be
/// read out of what is refused.
pub(super) fn content_lengths() -> Vec<Case> {
    let good = format!("content-length: {}", BODY.len());
    let control = with_next(&plain());
    let mut cases = Vec::new();
    for (spelling, is_good) in spellings_of_length() {
        let odd = format!("content-length: {spelling}");
        let answers = if is_good { &["200", "200"][..] } else { BARE };
        cases.extend([
            Case::swap(&control, &good, &odd, answers),
            Case::swap(&control, &good, &format!("{odd}\r\n{good}"), answers),
            Case::swap(&control, &good, &format!("{good}\r\n{odd}"), answers),
        ]);
    }
    cases.extend(other_lengths(&control, &good));
    cases
}

/// Spellings of a length, and whether they are good: white space around it and zeros before it mean nothing.
fn spellings_of_length() -> Vec<(String, bool)> {
    let length = BODY.len();
    let good =
        [format!(" \t{length}"), format!("{length} \t"), format!("0{length}"), format!("{length:0>40}")];
    let bad = [
        "".into(),
        " ".into(),
        format!("+{length}"),
        format!("-{length}"),
        "-0".into(),
        "-1".into(),
        format!("0x{length:x}"),
        format!("{length:x}h"),
        format!("{length}.0"),
        format!("{length}e0"),
        format!("{length};"),
        format!("{length},"),
        format!(",{length}"),
        format!("{length},{length}"),
        format!("{length}, {length}"),
        format!("{length}, {}", length + 1),
        format!("{length} {length}"),
        format!("\"{length}\""),
        format!("{length}_0"),
        format!("{length}\x0b"),
        format!("\x0c{length}"),
        format!("{length}\0"),
        format!("\u{a0}{length}"),
        format!("\u{c2}\u{b2}{length}"),       // superscript two
        format!("\u{ef}\u{bc}\u{91}{length}"), // fullwidth one
        format!("{length}\r\n "),
        format!("{length}\r\n\t0"),
        format!("{length}\r"),
        "18446744073709551616".into(), // 2^64, and it would wrap to 0
        "18446744073709551735".into(), // 2^64 + 119
        "9".repeat(400),
        "NaN".into(),
    ];
    good.into_iter().map(|text| (text, true)).chain(bad.into_iter().map(|text| (text, false))).collect()
}

/// Lengths that are well spelled and not the body's.
fn other_lengths(control: &str, good: &str) -> Vec<Case> {
    let length = BODY.len();
    let other = |text: String, answers: &[&'static str]| {
        Case::swap(control, good, &format!("content-length: {text}"), answers)
    };
    let two = |text: String| Case::swap(control, good, &format!("{good}\r\ncontent-length: {text}"), BARE);
    vec![
        // What the caller says is its word: what is behind the announced end is the next request.
        other((length + 1).to_string(), &["400 body_not_json", "405 method_not_allowed"]),
        other((length - 1).to_string(), &["400 body_not_json", "400 bare"]),
        other("0".into(), &["400 body_not_json", "400 bare"]),
        other("4096".into(), &["400 body_incomplete"]),
        other("4097".into(), &["413 body_too_large"]),
        other("9223372036854775808".into(), &["413 body_too_large"]),
        other("18446744073709551615".into(), &["431 bare"]),
        Case::swap(control, &format!("{good}\r\n"), "", &["400 body_not_json", "400 bare"]),
        two((length + 1).to_string()),
        two("0".into()),
        Case::swap(control, good, &format!("{good}\r\n{good}"), &["200", "200"]),
        Case::swap(control, good, &format!("{good}\r\n{good}\r\ncontent-length: 0"), BARE),
    ]
}

/// Each spelling for the good one of a chunked request, with another request behind it; and on either side of the
/// length of a request that is not chunked.
pub(super) fn transfer_encodings() -> Vec<Case> {
    let (length, good) = (format!("content-length: {}", BODY.len()), "transfer-encoding: chunked");
    let (framed, chunks) = (with_next(&plain()), with_next(&chunked()));
    let mut cases = Vec::new();
    for (spelling, answer) in spellings_of_chunked() {
        let odd = format!("transfer-encoding: {spelling}");
        let alone = if answer == "200" { &["200", "200"][..] } else { &[answer][..] };
        // It is taken at its word: a body without a chunk in it.
        let beside = if answer == "200" { "400 body_incomplete" } else { answer };
        if odd != good {
            cases.push(Case::swap(&chunks, good, &odd, alone));
        }
        cases.push(Case::swap(&framed, &length, &format!("{odd}\r\n{length}"), &[beside]));
        cases.push(Case::swap(&framed, &length, &format!("{length}\r\n{odd}"), &[beside]));
    }
    for name in ["transfer-encoding ", "transfer-encoding\t", "transfer-encoding\x0b", " transfer-encoding"] {
        cases.push(Case::swap(&chunks, "transfer-encoding", name, BARE));
        cases.push(Case::swap(&framed, &length, &format!("{length}\r\n{name}: chunked"), BARE));
    }
    cases.push(Case::swap(&chunks, "HTTP/1.1", "HTTP/1.0", BARE));
    cases
}

/// Spellings of `chunked`, and what the request is answered. Who ends in something else is refused by hyper; who
/// ends in `chunked` and says more, by us.
fn spellings_of_chunked() -> Vec<(&'static str, &'static str)> {
    let good = ["chunked", "Chunked", "CHUNKED", "chunked \t", "\t chunked"];
    let more = [
        "gzip, chunked",
        "chunked, chunked",
        "identity, chunked",
        "chunked,gzip,chunked",
        ",chunked",
        " , chunked",
        "xchunked, chunked",
        "chunked;q=1, chunked",
        "\"chunked, chunked",
        "chunked\r\ntransfer-encoding: chunked",
        "identity\r\ntransfer-encoding: chunked",
        "chunked\r\nTransfer-Encoding: CHUNKED",
        "\r\ntransfer-encoding: chunked",
    ];
    let other = [
        "",
        "xchunked",
        "chunkedx",
        "chunk",
        "chunked,",
        "chunked, ",
        "chunked;q=1",
        "chunked ; q=1",
        "\"chunked\"",
        "'chunked'",
        "(chunked)",
        "chunked chunked",
        "ch unked",
        "identity",
        "gzip",
        "chunked, gzip",
        "chunked, identity",
        "chunked\r\ntransfer-encoding: identity",
        "chunked\r\ntransfer-encoding: ",
        "chunked\x0b",
        "\x0bchunked",
        "chunked\0",
        "chunked\u{a0}",
        "\u{85}chunked",
        "chun\u{e2}\u{84}\u{aa}ed", // the Kelvin sign, a K in lower case
        "chunked\r\n ",
        "chunked\r\n\tgzip",
        "\r\n chunked",
        "chunked\r",
        "\rchunked",
    ];
    let with = |answer| move |spelling| (spelling, answer);
    let good = good.into_iter().map(with("200"));
    good.chain(more.into_iter().map(with("400 head_invalid")))
        .chain(other.into_iter().map(with("400 bare")))
        .collect()
}

/// A length beside chunks: the chunks count, as RFC 9112 §6.1 has it, and the connection is closed behind them.
/// Whatever the length would make of the rest, the request in it is never read.
pub(super) fn both() -> Vec<Case> {
    let control = with_next(&chunked());
    let coding = "transfer-encoding: chunked\r\n";
    let body = control.split_once("\r\n\r\n").unwrap().1.len();
    let own = chunked().split_once("\r\n\r\n").unwrap().1.len();
    let mut cases = Vec::new();
    for length in [0, 4, BODY.len(), own, own + 1, body, 4097] {
        let more = format!("content-length: {length}\r\n");
        cases.push(Case::insert(&control, coding, &more, &["200"]));
        cases.push(Case::insert(&control, "\r\n\r\n", &format!("\r\n{}", more.trim_end()), &["200"]));
    }
    for odd in ["+5", "5,5", "", "99999999999999999999"] {
        let more = format!("content-length: {odd}\r\n");
        cases.push(Case::insert(&control, coding, &more, BARE));
        // Behind the coding it means nothing, whatever it says.
        cases.push(Case::insert(&control, "\r\n\r\n", &format!("\r\n{}", more.trim_end()), &["200"]));
    }
    cases
}
