//! When a record of the trail is safe.

words! {
    /// When a record is safe.
    #[derive(Default)]
    Durability {
        /// When its write returned: a crash of the process loses nothing, one of the machine the last seconds.
        #[default]
        Kernel = "kernel",
        /// When fdatasync returned after it: a crash of the machine loses nothing either.
        Disk = "disk",
    }
}
