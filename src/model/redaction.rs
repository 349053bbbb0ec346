//! What the trail hides.

/// How a member of an audit record is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shown {
    /// As it is.
    #[default]
    Clear,
    /// As a keyed hash: who knows the value finds it.
    Hmac,
    /// Not at all.
    Omit,
}

impl Shown {
    /// All, with their words.
    pub const ALL: [(Self, &str); 3] = [(Self::Clear, "clear"), (Self::Hmac, "hmac"), (Self::Omit, "omit")];
}
