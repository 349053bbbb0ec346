//! Indices into lists of the configuration, as types of their own.

// Types and not `usize`: tables by caller lie beside tables by credential, and the compiler should notice a wrong index.
/// The index of a caller in the configuration's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallerIndex(pub usize);

/// The index of a credential in the configuration's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CredentialIndex(pub usize);
