//! Places in the lists of the configuration.

/// The place of a caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallerIndex(pub usize);

/// The place of a credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CredentialIndex(pub usize);
