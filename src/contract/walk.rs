//! Streaming validation: one walk over the bytes of a body by the rules of a contract, without a tree of the body.
//!
//! This module checks what concerns several values: keys that are repeated, missing or unknown, the number of items, and items
//! that must differ. Single values are checked by [`super::rules`], the syntax by [`crate::json`]. The walk recurses once a level
//! of the body; [`crate::json`] allows 32.

use std::borrow::Cow;
use std::hash::{Hash, Hasher};

use super::captured::{AuditScalar, Captured};
use super::findings::{Findings, PathStep, shown};
use super::schema::{Member, Members, Node, UniqueBy};
use super::seen::UniqueSet;
use super::{MAY_BE_ROUNDED, MUST_BE_STRING, rounded};
use crate::config::BareIds;
use crate::json::{Abort, Cursor, Lexeme, NotJson, Number, ValueStart, check_encoding};

const TWICE: &str = "this key occurs twice in the object";

/// One walk over a body. `F` decides what happens at a violation.
pub(super) struct Walk<'a, F> {
    cursor: Cursor<'a>,
    bare_ids: BareIds,
    captured: Captured,
    large_ids: usize,
    /// The identity of the current item of the innermost array. `None` if its items need not differ, if the item has no
    /// identity, or as long as the identity is not read.
    identity: Option<Identity<'a>>,
    findings: F,
}

/// The result of a walk that reached the end of the document.
pub(super) struct Walked<F> {
    /// Whether every byte is below DEL.
    pub(super) is_plain: bool,
    pub(super) captured: Captured,
    /// How many ids are bare numbers of 2^53 and more.
    pub(super) large_ids: usize,
    pub(super) findings: F,
}

/// Why a walk ended early.
pub(super) enum Interrupted {
    /// The document is not strict JSON.
    NotJson(NotJson),
    /// The [`Findings`] of the walk ended it at a violation.
    Broken,
}

/// The value by which an item must differ from others (`x-uniqueBy`).
// A string is compared decoded, so that escapes cannot make one inspector look like two. Other values are compared as they are
// written. So 1 and "1" are two identities: a contract that wants them to be one must allow only one of the types.
#[derive(PartialEq, Eq)]
enum Identity<'a> {
    Text(Cow<'a, [u8]>),
    Literal(&'a [u8]),
}

// By hand, since a derived hash would add the variant and the length. `Eq` compares both, which is enough.
impl Hash for Identity<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(match self {
            Self::Text(text) => text,
            Self::Literal(literal) => literal,
        });
    }
}

/// What a walk over a value notes as the identity of an item.
#[derive(Clone, Copy)]
enum Capture<'a> {
    Nothing,
    /// The value is an item of an array with `x-uniqueBy`: notes this member of it, or nothing if it is not an object.
    Member(&'a UniqueBy),
    /// The value itself: it is the member by which the items must differ.
    This,
}

/// The key of one member in a body.
enum Key<'a> {
    /// A member of the contract, with its index.
    Known(usize, &'a Member),
    /// A key that the contract does not name.
    Other(Cow<'a, [u8]>),
}

impl<'a, F: Findings<'a>> Walk<'a, F> {
    /// Walks over a document. Without a `root` only its syntax and repeated keys are checked.
    ///
    /// # Errors
    ///
    /// [`Interrupted::NotJson`] at the first fault of the syntax, [`Interrupted::Broken`] where `findings` ends the walk.
    pub(super) fn over(
        document: &'a [u8],
        root: Option<&'a Node>,
        bare_ids: BareIds,
        findings: F,
    ) -> Result<Walked<F>, Interrupted> {
        // Before the walk, so that the checks of lengths and patterns may rely on UTF-8.
        let is_plain = check_encoding(document).map_err(Interrupted::NotJson)?;
        let cursor = Cursor::new(document);
        let captured = Captured::new();
        let mut walk = Walk { cursor, bare_ids, captured, large_ids: 0, identity: None, findings };
        walk.cursor.skip_space();
        match walk.value(root, Capture::Nothing).and_then(|()| walk.cursor.end()) {
            Ok(()) => {
                let Walk { captured, large_ids, findings, .. } = walk;
                Ok(Walked { is_plain, captured, large_ids, findings })
            }
            // `Abort` carries no reason: without a fault of the document it was `findings` that ended the walk.
            Err(Abort) => Err(walk.cursor.fault().map_or(Interrupted::Broken, Interrupted::NotJson)),
        }
    }

    /// Walks over the value that begins here; without a rule only its syntax is checked.
    #[inline(always)]
    fn value(&mut self, rule: Option<&'a Node>, capture: Capture<'a>) -> Result<(), Abort> {
        let start = self.cursor.position();
        // Each branch calls `scalar` with a token of a kind that is known, so that the compiler can inline and simplify it.
        match self.cursor.begins()? {
            ValueStart::Text => {
                let text = self.cursor.string()?;
                self.scalar(rule, start, capture, Lexeme::Text(text))
            }
            ValueStart::Number => {
                let number = self.cursor.number()?;
                self.scalar(rule, start, capture, Lexeme::Number(number))
            }
            ValueStart::Word => {
                let token = self.cursor.word()?;
                self.scalar(rule, start, capture, token)
            }
            ValueStart::Object | ValueStart::Array => self.container(rule, start, capture),
        }
    }

    /// Walks over an array or an object.
    // Not inlined, so that the recursion has one real call, here, and scalars cost none.
    #[inline(never)]
    fn container(&mut self, rule: Option<&'a Node>, start: usize, capture: Capture<'a>) -> Result<(), Abort> {
        if let ValueStart::Object = self.cursor.begins()? {
            let members = self.validate_scalar(rule, &Lexeme::Object)?.and_then(|rule| rule.members.as_ref());
            self.object(members, if let Capture::Member(member) = capture { Some(member) } else { None })?;
        } else {
            let rule = self.validate_scalar(rule, &Lexeme::Array)?;
            self.array(rule)?;
        }
        // A container in the place of an identity breaks its `type`, but two equal ones break `x-uniqueBy`, too.
        self.capture_literal(start, capture);
        Ok(())
    }

    /// Checks a scalar, which the cursor has already read. Notes it for the audit record and as an identity.
    #[inline(always)]
    fn scalar(
        &mut self,
        rule: Option<&'a Node>,
        start: usize,
        capture: Capture<'a>,
        token: Lexeme<'a>,
    ) -> Result<(), Abort> {
        // Only a value that satisfies its rule. The body of any other is refused, and its record has no such members.
        if let Some(member) = self.validate_scalar(rule, &token)?.and_then(|rule| rule.audit) {
            self.captured.push(AuditScalar::new(member, start..self.cursor.position()));
        }
        match (capture, token) {
            (Capture::This, Lexeme::Text(text)) => self.identity = Some(Identity::Text(text.decoded())),
            _ => self.capture_literal(start, capture),
        }
        Ok(())
    }

    /// Notes the bytes from `start` to the cursor as the identity, if `capture` says that the value is one.
    #[inline(always)]
    fn capture_literal(&mut self, start: usize, capture: Capture<'a>) {
        if let Capture::This = capture {
            self.identity = Some(Identity::Literal(self.cursor.since(start)));
        }
    }

    /// Walks over an object. Repeated keys are a fault of the syntax, with or without a contract: parsers differ on which of the
    /// two counts (RFC 8259 §4), so the upstream could read another value than was checked.
    // `seen` has a bit for each member of the contract, `others` the keys that it does not name. `expected` is the index of the
    // member that probably comes next.
    fn object(&mut self, members: Option<&'a Members>, capture: Option<&'a UniqueBy>) -> Result<(), Abort> {
        let (mut seen, mut others, mut expected) = (0_u128, None, 0);
        let mut more = self.cursor.open(b'}')?;
        while more {
            let offset = self.cursor.skip_space();
            match self.key(members, expected)? {
                Key::Known(index, member) => {
                    if seen & member.bit != 0 {
                        return Err(self.cursor.abort_at(offset, TWICE));
                    }
                    (seen, expected) = (seen | member.bit, index + 1);
                    let is_captured = capture.is_some_and(|capture| capture.index == index);
                    self.cursor.skip_space();
                    self.findings.enter(PathStep::Key(&member.name));
                    self.value(
                        member.node.as_deref(),
                        if is_captured { Capture::This } else { Capture::Nothing },
                    )?;
                    self.findings.leave();
                }
                Key::Other(name) => {
                    if members.is_some_and(|members| !members.additional) {
                        self.unknown(&name)?;
                    }
                    // An item that breaks its own rule is walked without members. Its identity counts nevertheless.
                    let is_captured = capture.is_some_and(|capture| capture.name.as_bytes() == &*name);
                    if !others.get_or_insert_with(UniqueSet::new).insert(name) {
                        return Err(self.cursor.abort_at(offset, TWICE));
                    }
                    self.cursor.skip_space();
                    self.value(None, if is_captured { Capture::This } else { Capture::Nothing })?;
                }
            }
            more = self.cursor.next(b'}')?;
        }
        match members {
            Some(members) if members.required & !seen != 0 => self.missing(members, seen),
            _ => Ok(()),
        }
    }

    /// Reports each required member that is not in `seen`.
    #[cold]
    fn missing(&mut self, members: &Members, seen: u128) -> Result<(), Abort> {
        let missing = members.required & !seen;
        for Member { name, .. } in members.list.iter().filter(|member| missing & member.bit != 0) {
            self.findings.note("required", || (Some(name.clone()), format!("`{name}` is missing")))?;
        }
        Ok(())
    }

    /// Reads a key and its colon.
    // Tries the next member of the contract first, since most callers write the members in its order. Then one comparison of
    // bytes reads key and colon, without a search.
    #[inline(always)]
    fn key(&mut self, members: Option<&'a Members>, expected: usize) -> Result<Key<'a>, Abort> {
        let next = members.and_then(|members| members.list.get(expected));
        if let Some(member) = next.filter(|member| self.cursor.skip_key(&member.literal)) {
            return Ok(Key::Known(expected, member));
        }
        // Decoded, so that "\u0061" is the key `a`, as the upstream will read it.
        let name = self.cursor.key()?.decoded();
        self.cursor.colon()?;
        let found = members.and_then(|members| members.find(&name));
        Ok(found.map_or(Key::Other(name), |(index, member)| Key::Known(index, member)))
    }

    /// Reports a key that the contract does not allow.
    #[cold]
    fn unknown(&mut self, name: &[u8]) -> Result<(), Abort> {
        self.findings.note("additionalProperties", || {
            let key = shown(name);
            let detail = format!("unknown key `{key}`");
            (Some(key), detail)
        })
    }

    /// Walks over an array and its items.
    fn array(&mut self, rule: Option<&'a Node>) -> Result<(), Abort> {
        let unique_by = rule.and_then(|rule| rule.unique_by.as_ref());
        let (items, mut identities, mut count) =
            (rule.and_then(|rule| rule.items.as_deref()), UniqueSet::new(), 0);
        // This array may be inside an item of an outer one, whose identity must not get lost.
        let outer = self.identity.take();
        let mut more = self.cursor.open(b']')?;
        while more {
            self.cursor.skip_space();
            self.findings.enter(PathStep::Index(count));
            let captured = self.captured.len();
            self.value(items, unique_by.map_or(Capture::Nothing, Capture::Member))?;
            // Beyond `maxItems` nothing is noted, so that a list of many empty items costs no memory. Its body is refused.
            if let Some(rule) = rule.filter(|rule| rule.max_items.is_none_or(|most| count < most)) {
                self.note_absent(rule, captured);
            }
            // An item without that member has no identity, and differs from all others.
            if let (Some(UniqueBy { name, .. }), Some(identity)) = (unique_by, self.identity.take())
                && !identities.insert(identity)
            {
                let detail = || format!("an earlier item has the same `{name}`; each must have its own");
                self.findings.note("x-uniqueBy", || (Some(name.clone()), detail()))?;
            }
            self.findings.leave();
            count += 1;
            more = self.cursor.next(b']')?;
        }
        self.identity = outer;
        let Some(rule) = rule else { return Ok(()) };
        if let Some(least) = rule.min_items.filter(|least| count < *least) {
            self.findings.note("minItems", || (None, format!("must have {least} or more items")))?;
        }
        if let Some(most) = rule.max_items.filter(|most| count > *most) {
            self.findings.note("maxItems", || (None, format!("must have {most} or fewer items")))?;
        }
        Ok(())
    }

    /// Notes which audit members an item lacks. `captured` is the number of captured scalars before the item.
    // Without these notes a list would be shorter than its array, and `counts` would not match `inspectors` by position.
    #[inline(always)]
    fn note_absent(&mut self, list: &Node, captured: usize) {
        let found = self.captured[captured..].iter().map(|scalar| scalar.member);
        // In most items all are there, in the order of the contract.
        if found.eq(list.audited.iter().copied()) {
            return;
        }
        for member in &list.audited {
            if !self.captured[captured..].iter().any(|scalar| scalar.member == *member) {
                self.captured.push(AuditScalar::new(*member, 0..0));
            }
        }
    }

    /// Checks `token` against the rule's own keywords. Returns the rule if the value satisfies it; otherwise `None`, and the
    /// parts of the value are checked for their syntax only.
    // An array in the place of an object would otherwise be followed by a violation for each of its parts.
    #[inline(always)]
    fn validate_scalar(
        &mut self,
        rule: Option<&'a Node>,
        token: &Lexeme<'_>,
    ) -> Result<Option<&'a Node>, Abort> {
        let Some(rule) = rule else { return Ok(None) };
        let (findings, mut is_kept) = (&mut self.findings, true);
        rule.violations_of(token, &mut |code| {
            is_kept = false;
            findings.note(code, || (None, format!("must be {}", rule.wanted(code))))
        })?;
        // An id is judged only if the contract accepts it. One that is too large anyway needs no second violation.
        if rule.has_ids
            && let Lexeme::Number(number) = token
            && is_kept
        {
            is_kept = self.bare_id(rule, number)?;
        }
        Ok(is_kept.then_some(rule))
    }

    /// Checks a bare number where the contract has ids, and returns whether it is accepted. Counts an id of 2^53 or more, and
    /// reports an id that is refused.
    // Not inlined: most ids are strings, and this code would make the loop over the members larger.
    #[inline(never)]
    fn bare_id(&mut self, rule: &Node, number: &Number<'_>) -> Result<bool, Abort> {
        let is_large = rounded::is_large(number);
        // Below 2^53 a double is exact. `refuse` refuses small ids, too, so that a client is found before its ids grow.
        if !(is_large || self.bare_ids == BareIds::Refuse) || !rule.is_id(number) {
            return Ok(true);
        }
        self.large_ids += usize::from(is_large);
        let (code, detail) = match self.bare_ids {
            BareIds::Detect if rounded::may_be_rounded(number) => (
                MAY_BE_ROUNDED,
                "an id above 2^53 may have lost digits in a client that stores numbers as doubles: send it as a string",
            ),
            BareIds::Refuse => {
                (MUST_BE_STRING, "must be a string: the gateway accepts no numbers as ids from this caller")
            }
            BareIds::Detect | BareIds::Exact => return Ok(true),
        };
        self.findings.note(code, || (None, detail.to_owned()))?;
        Ok(false)
    }
}
