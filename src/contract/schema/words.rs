//! Describes a rule in words, for the detail of a violation.
//!
//! The words quote values of the schema only, and none of the caller's.

use super::{ANY, FRACTION, INTEGER, Node, Scalar, TYPES};

impl Node {
    /// Returns what `keyword` requires, as the words after "must be".
    pub(in crate::contract) fn wanted(&self, keyword: &str) -> String {
        let wants = self.wants().into_iter();
        wants.filter(|(known, _)| *known == keyword).map(|(_, words)| words).collect()
    }

    /// Returns each keyword of the rule with what it requires.
    // All of them for one: this runs only for a body that is refused, and `anyOf` needs all.
    fn wants(&self) -> Vec<(&'static str, String)> {
        let shown = |list: &[Scalar]| list.iter().map(Scalar::shown).collect::<Vec<_>>().join(", ");
        let wants = [
            (self.types != ANY).then(|| ("type", kind_words(self.types))),
            self.any_of.as_ref().map(|list| ("anyOf", alternatives(list))),
            self.constant.as_ref().map(|value| ("const", value.shown())),
            self.enumeration.as_ref().map(|list| ("enum", format!("one of {}", shown(list)))),
            self.minimum.as_ref().map(|limit| ("minimum", format!("at least {}", limit.literal))),
            self.maximum.as_ref().map(|limit| ("maximum", format!("at most {}", limit.literal))),
            self.min_length.map(|length| ("minLength", format!("{length} or more characters long"))),
            self.max_length.map(|length| ("maxLength", format!("{length} or fewer characters long"))),
            self.pattern
                .as_ref()
                .map(|pattern| ("pattern", format!("text that matches `{}`", pattern.shown()))),
        ];
        wants.into_iter().flatten().collect()
    }
}

impl Scalar {
    fn shown(&self) -> String {
        match self {
            Self::Null => "null".into(),
            Self::Boolean(value) => value.to_string(),
            Self::Number(number) => number.literal.clone(),
            Self::Text(text) => format!("{text:?}"),
        }
    }
}

fn alternatives(list: &[Node]) -> String {
    let words = |node: &Node| node.wants().into_iter().map(|(_, words)| words).collect::<Vec<_>>();
    list.iter().map(|node| words(node).join(", ")).collect::<Vec<_>>().join("; or ")
}

fn kind_words(types: u8) -> String {
    // `number` has the bit of `integer`. It is "a number" alone, not "an integer in plain digits or a number".
    let is_meant = |kind: u8| types & kind == kind && (kind != INTEGER || types & FRACTION == 0);
    let words: Vec<_> =
        TYPES.iter().filter(|(_, kind, _)| is_meant(*kind)).map(|(_, _, words)| *words).collect();
    words.join(" or ")
}
