//! When an audit record counts as committed: once it survives a crash of the process, or, to be durable, a crash of the machine.

words! {
    /// When a record counts as committed. A request is not sent before its intent is.
    #[derive(Default)]
    Durability {
        // The default, since fdatasync may take milliseconds, and each request waits for one.
        /// When write(2) has returned. A crash of the process loses nothing; a crash of the machine may lose the last seconds.
        #[default]
        Kernel = "kernel",
        /// When fdatasync(2) has returned as well. A crash of the machine loses nothing either.
        Disk = "disk",
    }
}
