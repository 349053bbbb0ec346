//! Plain data that all layers above share: outcomes, codes, stages, causes, ids. It does no I/O and imports tools only.
//!
//! Most enums here are tables of variants and their words on the wire. A word is a promise: callers and alerts match on it.

/// An enum whose variants have words on the wire.
pub trait Words: Copy + 'static {
    /// The variants with their words, in the order of the documentation.
    const TABLE: &[(Self, &str)];
}

/// Returns the variant with this word, or an error that lists all words.
// The list is in the error, so that an operator who misspells a word need not look it up.
pub(crate) fn word<T: Words, E: serde::de::Error>(text: &str) -> Result<T, E> {
    let named = T::TABLE.iter().find(|(_, word)| *word == text);
    named.map(|(value, _)| *value).ok_or_else(|| {
        let words: Vec<_> = T::TABLE.iter().map(|(_, word)| format!("\"{word}\"")).collect();
        E::custom(match &words[..] {
            [words @ .., last] if words.len() < 3 => format!("must be {} or {last}", words.join(", ")),
            words => format!("must be one of {}", words.join(", ")),
        })
    })
}

/// Defines an enum by a table of its variants and words, with `ALL`, `COUNT`, `as_str` and `Display`. serde, the schema of the
/// configuration and metrics' labels use the words.
// One table: lists of variants and words that are kept apart come to differ.
macro_rules! words {
    ($(#[$of_all:meta])* $name:ident { $($(#[$of_one:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$of_all])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$of_one])* $variant,)+ }

        impl $name {
            /// All variants, in the order of the documentation.
            pub const ALL: [Self; Self::COUNT] = [$(Self::$variant),+];

            /// The number of variants.
            pub const COUNT: usize = [$($word),+].len();

            /// The word on the wire.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl $crate::model::Words for $name {
            const TABLE: &[(Self, &str)] = &[$((Self::$variant, $word)),+];
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(self.as_str())
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                // A number or a list gets the same error as a wrong word: it names the words that are possible.
                let text = <String as serde::Deserialize>::deserialize(from);
                $crate::model::word(&text.unwrap_or_default())
            }
        }

        impl schemars::JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "enum": [$($word),+] })
            }
        }

        impl prometheus_client::encoding::EncodeLabelValue for $name {
            fn encode(
                &self,
                to: &mut prometheus_client::encoding::LabelValueEncoder<'_>,
            ) -> Result<(), std::fmt::Error> {
                self.as_str().encode(to)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

pub(crate) use words;

pub mod audit_fields; // the members of audit records
pub mod cause; // why a connection, an exchange or a fetch failed
pub mod code; // why the gateway itself answered
pub mod durability; // when an audit record counts as committed
pub mod header_names; // header fields with a meaning
pub mod index; // indices into lists of the configuration
pub mod outcome; // the outcome of a request, and what a client may do about it
pub mod peer; // the other end of a connection
pub mod redaction; // how members of audit records are hidden
pub mod reply; // the bounds of a reply's head
pub mod request_id; // request ids
pub mod stage; // the stages of a request
pub mod trace_id; // W3C trace ids
