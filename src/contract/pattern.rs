//! The keyword `pattern`: an ECMA-262 regular expression, compiled at start into a DFA. A match takes one step for each byte.
//!
//! A pattern is accepted if it can be matched in linear time and means the same here as in ECMA-262 with the `u` flag. It works
//! on code points; `\d`, `\w`, `\s` and `.` are the sets that ECMA-262 names. Anything else (look-around, back-references, `\b`,
//! `\p`, flags, syntax of other dialects) stops the start. As in JSON Schema, a pattern is not anchored by itself.

use regex_automata::dfa::{Automaton as _, StartKind, dense};
use regex_automata::nfa::thompson;
use regex_automata::{Input, MatchKind};
use regex_syntax::ast::parse::Parser;
use regex_syntax::ast::{
    AssertionKind, Ast, ClassBracketed, ClassPerl, ClassPerlKind, ClassSet, ClassSetItem, GroupKind,
    HexLiteralKind, Literal, LiteralKind, Span, SpecialLiteralKind,
};
use regex_syntax::hir::translate::Translator;
use regex_syntax::hir::{Class, Hir, HirKind, Look};

// A DFA can be exponential in the size of its pattern. Without these bounds one line of a contract could use up the memory of the
// host at a start or a reload.

/// The largest DFA of one pattern, in bytes.
const TABLE_BYTES: usize = 1 << 20;

/// The most memory that building one DFA may take, in bytes.
const MAKING_BYTES: usize = 8 << 20;

/// A compiled pattern.
#[derive(Debug)]
pub(super) struct Pattern {
    source: String,
    shortcut: Option<Shortcut>,
    table: dense::DFA<Vec<u32>>,
}

/// A faster check for the patterns `^[…]*$` and `^[…]+$` over ASCII text.
// In a DFA each step waits for the one before. Here each byte is looked up by itself, so that the processor does many at once.
#[derive(Debug)]
struct Shortcut {
    /// The least length: 0 or 1.
    least: usize,
    /// 1 for each byte below 0x80 that is in the class, otherwise 0.
    class: Box<[u8; 256]>,
}

impl Pattern {
    /// Compiles a pattern.
    ///
    /// # Errors
    ///
    /// The reason, with the character at which the pattern is wrong; or that the DFA would be too large.
    pub(super) fn compile(source: &str) -> Result<Self, String> {
        // The syntax tree is checked before it is translated: afterwards \d is a set of Unicode, and no longer seen to be \d.
        let mut ast = Parser::new()
            .parse(source)
            .map_err(|error| misplaced(source, error.span(), &error.kind().to_string()))?;
        Ecma { source }.take(&mut ast)?;
        let hir = Translator::new()
            .translate(source, &ast)
            .map_err(|error| misplaced(source, error.span(), &error.kind().to_string()))?;
        let table = table(&hir).map_err(|error| format!("too large: {error}"))?;
        Ok(Self { source: source.to_owned(), shortcut: Shortcut::of(&hir), table })
    }

    /// Returns the pattern as it is written in the schema.
    pub(super) fn source(&self) -> &str {
        &self.source
    }

    /// Returns the pattern for a message to callers, cut after 60 characters.
    pub(super) fn shown(&self) -> String {
        let begin: String = self.source.chars().take(60).collect();
        if begin.len() < self.source.len() { format!("{begin}…") } else { begin }
    }

    /// Returns how many bytes of memory the DFA takes.
    pub(super) fn size(&self) -> usize {
        self.table.memory_usage()
    }

    /// Whether the pattern matches somewhere in a text, which must be UTF-8.
    pub(super) fn is_match(&self, text: &[u8]) -> bool {
        if self.shortcut.as_ref().is_some_and(|shortcut| shortcut.is_match(text)) {
            return true;
        }
        // A search fails only in a table that is built to quit at some byte, or for another kind of start; this one is not. If
        // it did fail, the text would be refused.
        self.table.try_search_fwd(&Input::new(text).earliest(true)).is_ok_and(|found| found.is_some())
    }
}

impl Shortcut {
    /// Returns the shortcut if the pattern has one of the two forms; otherwise `None`.
    fn of(hir: &Hir) -> Option<Self> {
        let HirKind::Concat(parts) = hir.kind() else { return None };
        let [begin, middle, end] = &parts[..] else { return None };
        let (HirKind::Look(Look::Start), HirKind::Repetition(repetition), HirKind::Look(Look::End)) =
            (begin.kind(), middle.kind(), end.kind())
        else {
            return None;
        };
        let (least @ (0 | 1), None, HirKind::Class(Class::Unicode(set))) =
            (repetition.min, repetition.max, repetition.sub.kind())
        else {
            return None;
        };
        let holds = |char| set.ranges().iter().any(|range| (range.start()..=range.end()).contains(&char));
        // No byte from 0x80 on: it is a part of a character, which only the DFA can put together.
        let class = std::array::from_fn(|byte| u8::from(byte < 0x80 && holds(char::from(byte as u8))));
        Some(Self { least: least as usize, class: Box::new(class) })
    }

    /// Returns true only if the pattern matches. If this returns false, the DFA must decide.
    fn is_match(&self, text: &[u8]) -> bool {
        // Eight bytes without a branch, then one: an early exit at each byte would be slower, and most texts match.
        let (words, rest) = text.as_chunks::<8>();
        let has = |all, byte: &u8| all & self.class[usize::from(*byte)];
        text.len() >= self.least
            && words.iter().all(|word| word.iter().fold(1, has) == 1)
            && rest.iter().fold(1, has) == 1
    }
}

/// Builds the DFA of a pattern.
fn table(hir: &Hir) -> Result<dense::DFA<Vec<u32>>, Box<dyn std::error::Error>> {
    let nfa = thompson::Compiler::new()
        .configure(
            thompson::Config::new()
                .nfa_size_limit(Some(MAKING_BYTES))
                .which_captures(thompson::WhichCaptures::None),
        )
        .build_from_hir(hir)?;
    let config = dense::Config::new()
        // Only whether there is a match counts, not where. So the table need not prefer one match to another, and is smaller.
        .match_kind(MatchKind::All)
        .start_kind(StartKind::Unanchored)
        .dfa_size_limit(Some(TABLE_BYTES))
        .determinize_size_limit(Some(MAKING_BYTES));
    Ok(dense::Builder::new().configure(config).build_from_nfa(&nfa)?)
}

/// Translates from the dialect of `regex-syntax` to ECMA-262: refuses what ECMA-262 does not have, and replaces what means
/// something else there. The sources of the rules are the grammar of ECMA-262 §22.2.1 and the documentation of `regex-syntax`.
struct Ecma<'a> {
    source: &'a str,
}

impl Ecma<'_> {
    /// Checks a part of the pattern. Replaces in it the parts that ECMA-262 defines otherwise.
    fn take(&self, ast: &mut Ast) -> Result<(), String> {
        match ast {
            Ast::Empty(_) => Ok(()),
            Ast::Literal(literal) => self.literal(literal),
            // The parser's dot excludes \n only; ECMA-262 names four line terminators (§12.3).
            Ast::Dot(span) => {
                *ast = Ast::class_bracketed(set(r"[^\n\r\u2028\u2029]", span)?);
                Ok(())
            }
            Ast::ClassPerl(class) => {
                *ast = Ast::class_bracketed(perl(class)?);
                Ok(())
            }
            Ast::ClassBracketed(class) => self.class(class),
            Ast::Assertion(assertion) => match assertion.kind {
                AssertionKind::StartLine | AssertionKind::EndLine => Ok(()),
                _ => self.refuse(&assertion.span, "^ and $ are the only assertions that are supported"),
            },
            Ast::Repetition(repetition) => {
                let span = &repetition.op.span;
                // The parser ignores blanks in `a{ 2 }`, which ECMA-262 with `u` refuses.
                if self.text(span).contains(char::is_whitespace) {
                    return self.refuse(span, "write {n}, {n,} or {n,m}");
                }
                self.take(&mut repetition.ast)
            }
            Ast::Group(group) => {
                // (?P<name>…) is syntax of Python, and (?i:…) has flags.
                let is_plain = match &group.kind {
                    GroupKind::CaptureIndex(_) => true,
                    GroupKind::CaptureName { starts_with_p, .. } => !starts_with_p,
                    GroupKind::NonCapturing(flags) => flags.items.is_empty(),
                };
                if !is_plain {
                    return self.refuse(
                        &group.span,
                        "(…), (?:…) and (?<name>…) are the only groups that are supported",
                    );
                }
                self.take(&mut group.ast)
            }
            Ast::Alternation(list) => list.asts.iter_mut().try_for_each(|ast| self.take(ast)),
            Ast::Concat(list) => list.asts.iter_mut().try_for_each(|ast| self.take(ast)),
            Ast::Flags(flags) => self.refuse(&flags.span, "flags such as (?i) are not supported"),
            Ast::ClassUnicode(class) => self.refuse(&class.span, "\\p{…} is not supported"),
        }
    }

    fn class(&self, class: &mut ClassBracketed) -> Result<(), String> {
        // To the parser a `]` in front is a member of the class; in ECMA-262 it ends the class.
        let inner = self.text(&class.span).trim_start_matches(['[', '^']);
        if inner.starts_with(']') {
            return self.refuse(&class.span, "write \\] for a bracket in a class");
        }
        match &mut class.kind {
            ClassSet::Item(item) => self.item(item),
            ClassSet::BinaryOp(op) => self.refuse(&op.span, "a class within a class is not supported"),
        }
    }

    fn item(&self, item: &mut ClassSetItem) -> Result<(), String> {
        match item {
            ClassSetItem::Empty(_) => Ok(()),
            ClassSetItem::Literal(literal) => self.literal(literal),
            ClassSetItem::Range(range) => self.literal(&range.start).and_then(|()| self.literal(&range.end)),
            ClassSetItem::Perl(class) => {
                *item = ClassSetItem::Bracketed(Box::new(perl(class)?));
                Ok(())
            }
            ClassSetItem::Union(union) => union.items.iter_mut().try_for_each(|item| self.item(item)),
            ClassSetItem::Ascii(_) | ClassSetItem::Unicode(_) | ClassSetItem::Bracketed(_) => {
                self.refuse(item.span(), "a class within a class is not supported")
            }
        }
    }

    fn literal(&self, literal: &Literal) -> Result<(), String> {
        match literal.kind {
            // With `u` these are errors in ECMA-262. Without it they mean something else: `\a` is an a, `\x{41}` is 41 x's.
            LiteralKind::Verbatim
            | LiteralKind::Meta
            | LiteralKind::Superfluous
            | LiteralKind::HexFixed(HexLiteralKind::X | HexLiteralKind::UnicodeShort)
            | LiteralKind::HexBrace(HexLiteralKind::UnicodeShort) => Ok(()),
            LiteralKind::Special(SpecialLiteralKind::Bell | SpecialLiteralKind::Space)
            | LiteralKind::Octal
            | LiteralKind::HexFixed(HexLiteralKind::UnicodeLong)
            | LiteralKind::HexBrace(HexLiteralKind::X | HexLiteralKind::UnicodeLong) => {
                self.refuse(&literal.span, "not an escape of ECMA-262")
            }
            LiteralKind::Special(_) => Ok(()),
        }
    }

    fn text(&self, span: &Span) -> &str {
        &self.source[span.start.offset..span.end.offset]
    }

    fn refuse<T>(&self, span: &Span, reason: &str) -> Result<T, String> {
        Err(misplaced(self.source, span, reason))
    }
}

/// Returns the text of an error with its place, counted in characters from 1.
fn misplaced(source: &str, span: &Span, reason: &str) -> String {
    let before = source.get(..span.start.offset).unwrap_or_default();
    format!("at character {}: {reason}", before.chars().count() + 1)
}

/// Returns the set of `\d`, `\w` or `\s` as ECMA-262 §22.2.2.9 defines it.
// The parser's own sets are those of Unicode: its `\d` has the digits of all scripts, which the upstream may not read as digits.
fn perl(class: &ClassPerl) -> Result<ClassBracketed, String> {
    let members = match class.kind {
        ClassPerlKind::Digit => "[0-9]",
        ClassPerlKind::Word => "[0-9A-Za-z_]",
        ClassPerlKind::Space => r"[\t\n\v\f\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff]",
    };
    let set = set(members, &class.span)?;
    Ok(ClassBracketed { negated: class.negated, ..set })
}

/// Parses a class such as `[0-9]`, and gives it the span `place`.
fn set(members: &str, place: &Span) -> Result<ClassBracketed, String> {
    match &Parser::new().parse(members) {
        Ok(Ast::ClassBracketed(class)) => Ok(ClassBracketed { span: *place, ..*class.clone() }),
        _ => Err(format!("{members} is no set")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, text: &str) -> bool {
        Pattern::compile(pattern)
            .unwrap_or_else(|error| panic!("{pattern}: {error}"))
            .is_match(text.as_bytes())
    }

    #[test]
    fn pattern_matches_as_ecma_262_specifies() {
        // Pattern, a text that it matches, a text that it does not match.
        let cases = [
            ("", "x", None),
            ("b", "abc", Some("ac")),
            ("^b", "bc", Some("abc")),
            ("b$", "ab", Some("b\n")),
            ("^[0-9]+$", "0123456789", Some("")),
            ("^[0-9]+$", "7", Some("1x1")),
            // U+0661, a digit of another script: it begins with a byte from 0x80 on, which the shortcut must leave to the DFA.
            ("^[0-9]+$", "7", Some("١")),
            ("^[0-9]*$", "", Some(" ")),
            (r"^\d{2,3}$", "123", Some("1")),
            (r"^\d$", "1", Some("١")),
            (r"^\w+$", "aZ_9", Some("é")),
            (r"^\W$", "é", Some("a")),
            (r"^\s$", "\u{feff}", Some("\u{85}")),
            (r"^[\s\d]$", "\u{a0}", Some("a")),
            (r"^[^\S]$", " ", Some("a")),
            ("^.$", "😀", Some("\u{2028}")),
            ("^[^a]$", "\n", Some("a")),
            (r"^[^\u0000-\u001f\u007f-\u009f]*$", "é 😀~", Some("a\u{85}")),
            (r"^[^\u0000-\u001f\u007f-\u009f]*$", "plain", Some("a\u{7f}")),
            (r"^(?:a|(b)|(?<c>cc))+?$", "abcc", Some("c")),
            (r"^\u{1f600}\x41\/\-\.$", "😀A/-.", Some("😀A/-x")),
            ("a.*z|^$", "xazx", Some("za")),
            // Exponential in an engine that backtracks.
            ("^(a|aa)+$", &"a".repeat(5000), Some("ab")),
        ];
        for (pattern, good, bad) in cases {
            assert!(matches(pattern, good), "{pattern} {good}");
            assert!(!bad.is_some_and(|bad| matches(pattern, bad)), "{pattern} {bad:?}");
        }
    }

    #[test]
    fn ambiguous_or_expensive_pattern_is_rejected_with_its_position() {
        for (pattern, place) in [
            ("a(", 2),
            ("é(?=a)", 2),
            (r"a\1", 2),
            (r"a\b", 2),
            (r"\Aa", 1),
            (r"\<a", 1),
            ("a(?i)", 2),
            ("(?i:a)", 1),
            ("(?P<n>a)", 1),
            (r"\pL", 1),
            (r"[\p{L}]", 2),
            ("[[:alpha:]]", 2),
            ("[a-z&&b]", 2),
            ("[]a]", 1),
            ("[^]a]", 1),
            (r"\a", 1),
            (r"\x{41}", 1),
            (r"\U00000041", 1),
            ("a{,2}", 3),
            ("a{ 2 }", 2),
            (r"\ud800", 3),
        ] {
            let error = Pattern::compile(pattern).expect_err(pattern);
            assert!(error.starts_with(&format!("at character {place}: ")), "{pattern}: {error}");
        }
        // The first is exponential as a DFA, the second is too large as an NFA.
        for huge in ["(a|b)*a(a|b){30}", "^((.{1,100}){1,100}){1,100}$"] {
            let error = Pattern::compile(huge).expect_err(huge);
            assert!(error.starts_with("too large: "), "{error}");
        }
    }
}
