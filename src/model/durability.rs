//! When a record of the trail is safe.

/// When a record is safe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// When its write returned: a crash of the process loses nothing, one of the machine the last seconds.
    #[default]
    Kernel,
    /// When fdatasync returned after it: a crash of the machine loses nothing either.
    Disk,
}

impl Durability {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Kernel, Self::Disk];

    /// As it is configured.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Disk => "disk",
        }
    }
}
