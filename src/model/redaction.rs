//! The redaction of members of audit records.

words! {
    /// How a member of an audit record is written.
    #[derive(Default)]
    Redaction {
        /// In clear text.
        #[default]
        Clear = "clear",
        // Keyed, since a plain hash of a short id can be found by trying all ids.
        /// As a keyed hash (HMAC): whoever has the key and the value can find its records.
        Hmac = "hmac",
        /// Left out.
        Omit = "omit",
    }
}
