//! Plain data that all layers above share. It does no I/O and imports tools only.
//!
//! An enum here is a table of its variants and of their words on the wire.

/// An enum whose variants have words.
pub trait Words: Copy + 'static {
    /// The variants with their words.
    const TABLE: &[(Self, &str)];
}

/// The variant with a word, or which words there are.
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

/// Makes an enum of a table of its variants and their words: with `ALL`, `COUNT`, `as_str`, `Display`,
/// as a text of serde's, and as the value of a metric's label.
macro_rules! words {
    ($(#[$of_all:meta])* $name:ident { $($(#[$of_one:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$of_all])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$of_one])* $variant,)+ }

        impl $name {
            /// All of them, in the order of the documentation.
            pub const ALL: [Self; Self::COUNT] = [$(Self::$variant),+];

            /// How many there are.
            pub const COUNT: usize = [$($word),+].len();

            /// The word.
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
                // What is no text is none of the words.
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

pub mod audit_fields; // the members of the trail's records
pub mod cause; // why a step on the way to the cloud failed
pub mod code; // why the gateway itself answered
pub mod durability; // when a record is safe
pub mod header_names; // which header fields mean something
pub mod index; // places in the lists of the configuration
pub mod outcome; // what became of the task, and what a client may do about it
pub mod peer; // the other end of a connection
pub mod redaction; // what the trail hides
pub mod reply; // what a reply may be
pub mod request_id; // the ids of requests
pub mod stage; // the steps of a request
pub mod trace_id; // the trace that a request belongs to
