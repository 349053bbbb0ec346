//! Walks once over a body, by the rules of a contract.
//!
//! Checks what concerns several values: keys that stand twice, are missing or are unknown, the number of items, and items that
//! must differ. Single values are checked by [`super::rules`], the syntax by [`crate::json`].

use std::borrow::Cow;
use std::hash::{Hash, Hasher};

use super::captured::{AuditScalar, Captured};
use super::findings::{Findings, Step, shown};
use super::schema::{Member, Members, Node, UniqueBy};
use super::seen::Seen;
use super::{MAY_BE_ROUNDED, MUST_BE_STRING, rounded};
use crate::config::BareIds;
use crate::json::{Begins, Cursor, Halt, NotJson, Number, Token, check_encoding};

const TWICE: &str = "this key stands twice in the object";

/// One walk over a body. `F` decides what happens at a violation.
pub(super) struct Walk<'a, F> {
    cursor: Cursor<'a>,
    bare_ids: BareIds,
    captured: Captured,
    large_ids: usize,
    /// That of the present item, if items must differ.
    identity: Option<Identity<'a>>,
    findings: F,
}

/// What a walk noted that reached the end of the document.
pub(super) struct Walked<F> {
    pub(super) is_plain: bool,
    pub(super) captured: Captured,
    pub(super) large_ids: usize,
    pub(super) findings: F,
}

/// Why a walk ended early.
pub(super) enum Stop {
    NotJson(NotJson),
    Broken,
}

/// The value by which an item must differ from others (`x-uniqueBy`).
#[derive(PartialEq, Eq)]
enum Identity<'a> {
    Text(Cow<'a, [u8]>),
    Literal(&'a [u8]),
}

impl Hash for Identity<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(match self {
            Self::Text(text) => text,
            Self::Literal(literal) => literal,
        });
    }
}

/// What part of a value is noted as an identity.
#[derive(Clone, Copy)]
enum Noted<'a> {
    Nothing,
    /// One of its members, if it is an object.
    Member(&'a UniqueBy),
    /// The value itself.
    This,
}

/// The key of an object's member.
enum Key<'a> {
    /// Of the contract, with its index.
    Known(usize, &'a Member),
    Other(Cow<'a, [u8]>),
}

impl<'a, F: Findings<'a>> Walk<'a, F> {
    pub(super) fn over(
        document: &'a [u8],
        root: Option<&'a Node>,
        bare_ids: BareIds,
        findings: F,
    ) -> Result<Walked<F>, Stop> {
        let is_plain = check_encoding(document).map_err(Stop::NotJson)?;
        let cursor = Cursor::new(document);
        let captured = Captured::new();
        let mut walk = Walk { cursor, bare_ids, captured, large_ids: 0, identity: None, findings };
        walk.cursor.skip_space();
        match walk.value(root, Noted::Nothing).and_then(|()| walk.cursor.end()) {
            Ok(()) => {
                let Walk { captured, large_ids, findings, .. } = walk;
                Ok(Walked { is_plain, captured, large_ids, findings })
            }
            Err(Halt) => Err(walk.cursor.fault().map_or(Stop::Broken, Stop::NotJson)),
        }
    }

    /// Walks the value that begins here; without a rule only its syntax is checked.
    #[inline(always)]
    fn value(&mut self, rule: Option<&'a Node>, noted: Noted<'a>) -> Result<(), Halt> {
        let start = self.cursor.position();
        // A branch for each, so that the compiler checks the rule with the kind known.
        match self.cursor.begins()? {
            Begins::Text => {
                let text = self.cursor.string()?;
                self.scalar(rule, start, noted, Token::Text(text))
            }
            Begins::Number => {
                let number = self.cursor.number()?;
                self.scalar(rule, start, noted, Token::Number(number))
            }
            Begins::Word => {
                let token = self.cursor.word()?;
                self.scalar(rule, start, noted, token)
            }
            Begins::Object | Begins::Array => self.container(rule, start, noted),
        }
    }

    /// Walks an array or an object. Not inlined, so that scalars cost no call.
    #[inline(never)]
    fn container(&mut self, rule: Option<&'a Node>, start: usize, noted: Noted<'a>) -> Result<(), Halt> {
        if let Begins::Object = self.cursor.begins()? {
            let members = self.kept(rule, &Token::Object)?.and_then(|rule| rule.members.as_ref());
            self.object(members, if let Noted::Member(member) = noted { Some(member) } else { None })?;
        } else {
            let rule = self.kept(rule, &Token::Array)?;
            self.array(rule)?;
        }
        self.note_literal(start, noted);
        Ok(())
    }

    #[inline(always)]
    fn scalar(
        &mut self,
        rule: Option<&'a Node>,
        start: usize,
        noted: Noted<'a>,
        token: Token<'a>,
    ) -> Result<(), Halt> {
        if let Some(member) = self.kept(rule, &token)?.and_then(|rule| rule.audit) {
            self.captured.push(AuditScalar::new(member, start..self.cursor.position()));
        }
        match (noted, token) {
            (Noted::This, Token::Text(text)) => self.identity = Some(Identity::Text(text.decoded())),
            _ => self.note_literal(start, noted),
        }
        Ok(())
    }

    #[inline(always)]
    fn note_literal(&mut self, start: usize, noted: Noted<'a>) {
        if let Noted::This = noted {
            self.identity = Some(Identity::Literal(self.cursor.since(start)));
        }
    }

    fn object(&mut self, members: Option<&'a Members>, noted: Option<&'a UniqueBy>) -> Result<(), Halt> {
        let (mut seen, mut others, mut expected) = (0_u128, None, 0);
        let mut more = self.cursor.open(b'}')?;
        while more {
            let offset = self.cursor.skip_space();
            match self.key(members, expected)? {
                Key::Known(index, member) => {
                    if seen & member.bit != 0 {
                        return Err(self.cursor.halt_at(offset, TWICE));
                    }
                    (seen, expected) = (seen | member.bit, index + 1);
                    let is_noted = noted.is_some_and(|noted| noted.index == index);
                    self.cursor.skip_space();
                    self.findings.enter(Step::Key(&member.name));
                    self.value(member.node.as_deref(), if is_noted { Noted::This } else { Noted::Nothing })?;
                    self.findings.leave();
                }
                Key::Other(name) => {
                    if members.is_some_and(|members| !members.additional) {
                        self.unknown(&name)?;
                    }
                    let is_noted = noted.is_some_and(|noted| noted.name.as_bytes() == &*name);
                    if !others.get_or_insert_with(Seen::new).insert(name) {
                        return Err(self.cursor.halt_at(offset, TWICE));
                    }
                    self.cursor.skip_space();
                    self.value(None, if is_noted { Noted::This } else { Noted::Nothing })?;
                }
            }
            more = self.cursor.next(b'}')?;
        }
        match members {
            Some(members) if members.required & !seen != 0 => self.missing(members, seen),
            _ => Ok(()),
        }
    }

    #[cold]
    fn missing(&mut self, members: &Members, seen: u128) -> Result<(), Halt> {
        let missing = members.required & !seen;
        for Member { name, .. } in members.list.iter().filter(|member| missing & member.bit != 0) {
            self.findings.note("required", || (Some(name.clone()), format!("`{name}` is missing")))?;
        }
        Ok(())
    }

    /// Reads a key and its colon. Tries the next member of the contract first, since most callers write the members in its
    /// order.
    #[inline(always)]
    fn key(&mut self, members: Option<&'a Members>, expected: usize) -> Result<Key<'a>, Halt> {
        let next = members.and_then(|members| members.list.get(expected));
        if let Some(member) = next.filter(|member| self.cursor.skip_key(&member.literal)) {
            return Ok(Key::Known(expected, member));
        }
        let name = self.cursor.key()?.decoded();
        self.cursor.colon()?;
        let found = members.and_then(|members| members.find(&name));
        Ok(found.map_or(Key::Other(name), |(index, member)| Key::Known(index, member)))
    }

    #[cold]
    fn unknown(&mut self, name: &[u8]) -> Result<(), Halt> {
        self.findings.note("additionalProperties", || {
            let key = shown(name);
            let detail = format!("unknown key `{key}`");
            (Some(key), detail)
        })
    }

    fn array(&mut self, rule: Option<&'a Node>) -> Result<(), Halt> {
        let unique_by = rule.and_then(|rule| rule.unique_by.as_ref());
        let (items, mut identities, mut count) =
            (rule.and_then(|rule| rule.items.as_deref()), Seen::new(), 0);
        let outer = self.identity.take();
        let mut more = self.cursor.open(b']')?;
        while more {
            self.cursor.skip_space();
            self.findings.enter(Step::Index(count));
            let captured = self.captured.len();
            self.value(items, unique_by.map_or(Noted::Nothing, Noted::Member))?;
            if let Some(rule) = rule.filter(|rule| rule.max_items.is_none_or(|most| count < most)) {
                self.note_absent(rule, captured); // nothing of items beyond `maxItems`, so that they cost no memory
            }
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

    /// Notes which scalars for the audit trail an item lacks. `captured` is how many there were before the item.
    #[inline(always)]
    fn note_absent(&mut self, list: &Node, captured: usize) {
        let found = self.captured[captured..].iter().map(|scalar| scalar.member);
        if found.eq(list.audited.iter().copied()) {
            return; // the usual case: all, in the order of the contract
        }
        for member in &list.audited {
            if !self.captured[captured..].iter().any(|scalar| scalar.member == *member) {
                self.captured.push(AuditScalar::new(*member, 0..0));
            }
        }
    }

    /// Checks `token` against the rule's own keywords. Returns the rule if the value keeps it; otherwise `None`, so that the
    /// parts of the value are not checked.
    #[inline(always)]
    fn kept(&mut self, rule: Option<&'a Node>, token: &Token<'_>) -> Result<Option<&'a Node>, Halt> {
        let Some(rule) = rule else { return Ok(None) };
        let (findings, mut is_kept) = (&mut self.findings, true);
        rule.broken(token, &mut |code| {
            is_kept = false;
            findings.note(code, || (None, format!("must be {}", rule.wanted(code))))
        })?;
        if rule.has_ids
            && let Token::Number(number) = token
            && is_kept
        {
            is_kept = self.bare_id(rule, number)?;
        }
        Ok(is_kept.then_some(rule))
    }

    /// Whether a bare number is accepted where the contract takes ids.
    #[inline(never)]
    fn bare_id(&mut self, rule: &Node, number: &Number<'_>) -> Result<bool, Halt> {
        let is_large = rounded::is_large(number);
        if !(is_large || self.bare_ids == BareIds::Refuse) || !rule.is_id(number) {
            return Ok(true);
        }
        self.large_ids += usize::from(is_large);
        let (code, detail) = match self.bare_ids {
            BareIds::Detect if rounded::may_be_rounded(number) => (
                MAY_BE_ROUNDED,
                "an id above 2^53 may have lost digits in a client that holds numbers as doubles: send it as a string",
            ),
            BareIds::Refuse => {
                (MUST_BE_STRING, "must be a string: the gateway takes no id of this caller as a number")
            }
            BareIds::Detect | BareIds::Exact => return Ok(true),
        };
        self.findings.note(code, || (None, detail.to_owned()))?;
        Ok(false)
    }
}
