//! What the trail hides.

words! {
    /// How a member of an audit record is written.
    #[derive(Default)]
    Shown {
        /// As it is.
        #[default]
        Clear = "clear",
        /// As a keyed hash: who knows the value finds it.
        Hmac = "hmac",
        /// Not at all.
        Omit = "omit",
    }
}
