//! Variables that were meant as settings, and are none since their underscores are not doubled.
//!
//! Those without the prefix cannot be refused: Kubernetes sets `CCSQM_GATEWAY_PORT` and others for a service of this name. So
//! only what becomes a setting with other underscores is told.

use std::ffi::OsString;

use serde_json::Value;

use super::Config;
use super::source::PREFIX;

impl Config {
    /// A line for each variable that is not read, though with other underscores or capitals it would be.
    pub fn misnamed_variables(
        &self,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Vec<String> {
        let names = environment.into_iter().filter_map(|(name, _)| name.into_string().ok());
        let ours = single(PREFIX);
        let misnamed: Vec<_> = names
            .filter(|name| !name.starts_with(PREFIX))
            .map(|name| (single(&name.to_ascii_uppercase()), name))
            .filter(|(plain, _)| plain.starts_with(&ours))
            .collect();
        if misnamed.is_empty() {
            return Vec::new(); // as a rule
        }
        let settings = self.settings();
        let mut told: Vec<_> = misnamed
            .iter()
            .filter_map(|(plain, name)| {
                let meant = settings.iter().find_map(|setting| setting.meant_by(plain))?;
                Some(format!("the variable {name} is not read: the setting is named {meant}"))
            })
            .collect();
        told.sort();
        told
    }

    /// The setting that a variable with an unknown key would be with other underscores: its key, and the variable's right name.
    pub(super) fn setting_meant_by(&self, name: &str) -> Option<(String, String)> {
        let plain = single(name);
        let meant = self.settings().iter().find_map(|setting| setting.meant_by(&plain))?;
        Some((meant.strip_prefix(PREFIX)?.to_ascii_lowercase().replace("__", "."), meant))
    }

    /// All that a variable can set.
    fn settings(&self) -> Vec<Setting> {
        let effective = self.effective();
        let sections = effective.as_object().into_iter().flatten();
        let members = sections.filter_map(|(name, section)| Some((name, section.as_object()?)));
        members
            .flat_map(|(name, members)| members.iter().map(|(key, value)| Setting::new(name, key, value)))
            .collect()
    }
}

/// A setting by the name of its variable.
struct Setting {
    name: String,
    /// It is a table: what follows is a name that nobody here knows.
    is_table: bool,
}

impl Setting {
    fn new(section: &str, key: &str, value: &Value) -> Self {
        let name = format!("{PREFIX}{section}__{key}").to_ascii_uppercase();
        Self { name, is_table: value.is_object() }
    }

    /// The right name of a variable that is this one but for its underscores and capitals. `plain` is its name in capitals, with
    /// no two underscores in a row.
    fn meant_by(&self, plain: &str) -> Option<String> {
        let rest = plain.strip_prefix(&single(&self.name))?;
        match rest.strip_prefix('_') {
            Some(rest) if self.is_table && !rest.is_empty() => Some(format!("{}__{rest}", self.name)),
            _ => (rest.is_empty() && !self.is_table).then(|| self.name.clone()),
        }
    }
}

/// A name with no two underscores in a row.
fn single(name: &str) -> String {
    let mut single = String::with_capacity(name.len());
    for character in name.chars() {
        if character != '_' || !single.ends_with('_') {
            single.push(character);
        }
    }
    single
}
