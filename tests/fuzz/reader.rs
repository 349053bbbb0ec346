//! One reader of foreign bytes under libFuzzer: that of `ccsqm_gateway::fuzz` which `READER` names.

#![no_main]

use std::{env, sync::LazyLock};

use ccsqm_gateway::fuzz;
use libfuzzer_sys::fuzz_target;

static READER: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = env::var("READER").unwrap_or_default();
    fuzz::reader(&name).unwrap_or_else(|| panic!("READER={name}: there is no such reader in src/fuzz.rs"))
});

fuzz_target!(|bytes: &[u8]| READER(bytes));
