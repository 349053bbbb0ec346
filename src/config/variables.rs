//! Detection of misnamed environment variables, such as `CCSQM_GATEWAY_SERVER_WORKERS` for
//! `CCSQM_GATEWAY__SERVER__WORKERS`.
//!
//! A variable without the prefix `CCSQM_GATEWAY__` cannot be refused: Kubernetes sets `CCSQM_GATEWAY_PORT` and others
//! for a service named `ccsqm-gateway`. So a variable is reported only if another number of underscores, or capitals,
//! would make it the name of a setting.

use std::ffi::OsString;

use serde_json::Value;

use super::Config;
use super::source::PREFIX;

impl Config {
    /// Returns a warning for each variable that is not read, but would be with other underscores or capitals. The
    /// warnings are sorted.
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
        // The usual case. Without this, comparing each variable with each setting took 3.3 million instructions at
        // each start.
        if misnamed.is_empty() {
            return Vec::new();
        }
        let settings = self.settings();
        let mut warnings: Vec<_> = misnamed
            .iter()
            .filter_map(|(plain, name)| {
                let meant = settings.iter().find_map(|setting| setting.meant_by(plain))?;
                Some(format!("the variable {name} is not read: the setting is named {meant}"))
            })
            .collect();
        // The environment has no fixed order, and the same warnings should read the same at each start.
        warnings.sort();
        warnings
    }

    /// Finds the setting whose variable differs from `name` in underscores only. Returns the key of the setting, and
    /// the right name of its variable.
    pub(super) fn setting_meant_by(&self, name: &str) -> Option<(String, String)> {
        let plain = single(name);
        let meant = self.settings().iter().find_map(|setting| setting.meant_by(&plain))?;
        Some((meant.strip_prefix(PREFIX)?.to_ascii_lowercase().replace("__", "."), meant))
    }

    /// Returns all settings that a variable can set.
    fn settings(&self) -> Vec<Setting> {
        let effective = self.effective();
        // Taken from the effective configuration, which has every key with its default: no second list of keys to
        // keep up to date. Lists of tables are left out, since variables cannot set them.
        let sections = effective.as_object().into_iter().flatten();
        let members = sections.filter_map(|(name, section)| Some((name, section.as_object()?)));
        members
            .flat_map(|(name, members)| members.iter().map(|(key, value)| Setting::new(name, key, value)))
            .collect()
    }
}

/// A setting, by the name of its variable.
struct Setting {
    name: String,
    /// Whether the setting is a table whose keys the user chooses, such as `upstream.headers`. The name of its variable
    /// has one more part, for the key.
    is_table: bool,
}

impl Setting {
    fn new(section: &str, key: &str, value: &Value) -> Self {
        let name = format!("{PREFIX}{section}__{key}").to_ascii_uppercase();
        Self { name, is_table: value.is_object() }
    }

    /// Returns the right name of a misspelt variable if it differs from the variable of this setting only in
    /// underscores and capitals; otherwise `None`. `plain` is the misspelt name in capitals, with each run of
    /// underscores replaced by one.
    fn meant_by(&self, plain: &str) -> Option<String> {
        let rest = plain.strip_prefix(&single(&self.name))?;
        match rest.strip_prefix('_') {
            Some(rest) if self.is_table && !rest.is_empty() => Some(format!("{}__{rest}", self.name)),
            _ => (rest.is_empty() && !self.is_table).then(|| self.name.clone()),
        }
    }
}

/// Returns a name with runs of underscores replaced by one.
fn single(name: &str) -> String {
    let mut single = String::with_capacity(name.len());
    for character in name.chars() {
        if character != '_' || !single.ends_with('_') {
            single.push(character);
        }
    }
    single
}
