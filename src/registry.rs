//! The registry of metrics, and the two text formats in which it is written. Every name begins with
//! `ccsqm_gateway_`.

use std::fmt;

use http::{HeaderMap, header};
use prometheus_client::encoding::{prometheus_text, text};
use prometheus_client::registry;
use prometheus_client::registry::Metric;

use crate::field_values::quality;

/// All metrics with their names and help texts.
#[derive(Debug)]
pub(crate) struct Registry(registry::Registry);

impl Registry {
    /// An empty registry.
    pub(crate) fn new() -> Self {
        Self(registry::Registry::with_prefix("ccsqm_gateway"))
    }

    /// Makes a metric and registers it. `name` is the name of its samples, without the prefix.
    pub(crate) fn metric<M: Metric + Clone + Default>(&mut self, name: &str, help: &str) -> M {
        self.register(name, help, M::default())
    }

    /// Makes a metric and registers it under its present and its former name. The former one stays for one
    /// version, so that dashboards and alerts can be changed in time.
    // Both names share one handle, so that nothing is counted twice on the way of a request.
    pub(crate) fn renamed<M: Metric + Clone + Default>(&mut self, old: &str, new: &str, help: &str) -> M {
        let metric = self.metric(new, help);
        self.register(old, &format!("Deprecated: use ccsqm_gateway_{new}."), metric)
    }

    /// Registers a metric and returns it.
    pub(crate) fn register<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        // The library appends `_total` to counters and a full stop to help texts itself.
        let name = name.trim_end_matches("_total");
        let help = help.trim_end_matches('.');
        self.0.register(name, help, metric.clone());
        metric
    }

    /// Returns all metrics as text. Fails only if a metric cannot be formatted.
    pub(crate) fn encode(&self, format: Format) -> Result<String, fmt::Error> {
        let mut to = String::new();
        match format {
            Format::Text => prometheus_text::encode(&mut to, &self.0)?,
            Format::OpenMetrics => text::encode(&mut to, &self.0)?,
        }
        Ok(to)
    }
}

/// A text format for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The text format of Prometheus, version 0.0.4, which has no exemplars.
    Text,
    /// The text format of OpenMetrics 1.0, with exemplars.
    OpenMetrics,
}

impl Format {
    /// Chooses the format for a request: OpenMetrics only if `Accept` names it and gives no other available
    /// format a higher `q` (RFC 9110, section 12.5.1).
    // A client that accepts everything gets the older format: not every tool can parse OpenMetrics.
    pub(crate) fn asked_by(headers: &HeaderMap) -> Self {
        let quality = |range, version| quality(headers, header::ACCEPT, range, version);
        let text =
            quality("text/plain", "0.0.4").or_else(|| quality("text/*", "")).or_else(|| quality("*/*", ""));
        match quality("application/openmetrics-text", "1.0.0") {
            Some(quality) if quality > 0.0 && quality >= text.unwrap_or_default() => Self::OpenMetrics,
            _ => Self::Text,
        }
    }

    /// The value of `Content-Type`.
    pub(crate) const fn content_type(self) -> &'static str {
        match self {
            Self::Text => prometheus_text::CONTENT_TYPE,
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use prometheus_client::metrics::counter::Counter;

    use super::*;

    #[test]
    fn openmetrics_requires_an_accept_header_that_prefers_it() {
        let asked = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::ACCEPT, HeaderValue::from_bytes(value.as_bytes()).unwrap());
            }
            Format::asked_by(&headers)
        };
        // The values that Prometheus 2 and 3 send.
        let prometheus_2 = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                            text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        let prometheus_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
                            application/openmetrics-text;version=0.0.1;q=0.4,\
                            text/plain;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        for values in [
            &[prometheus_2][..],
            &[prometheus_3],
            &["application/openmetrics-text"],
            &["Application/OpenMetrics-Text ; Version=\"1.0.0\" ; Q=0.001"],
            &["application/openmetrics-text, text/plain"],
            &["text/plain, application/openmetrics-text"],
            &["text/plain;q=0.9", "application/openmetrics-text"],
            &["*/*;q=0.5, application/openmetrics-text;q=0.5"],
            &["*/*, text/plain;q=0.1, application/openmetrics-text;q=0.5"],
        ] {
            assert_eq!(asked(values), Format::OpenMetrics, "{values:?}");
        }
        for values in [
            &[][..],
            &[""],
            &["*/*"],
            &["application/*"],
            &["text/html, */*;q=0.8"],
            &["text/plain"],
            &["application/openmetrics-text;q=0"],
            &["application/openmetrics-text;q=0.000, */*;q=0"],
            &["application/openmetrics-text;q=0.5, text/plain"],
            &["application/openmetrics-text;q=0.5, text/*;q=0.6"],
            &["application/openmetrics-text;q=0.5", "*/*;q=0.6"],
            &["application/openmetrics-text;version=0.0.1"],
            &["application/openmetrics-text;version=2.0.0"],
            // An invalid `q` counts as not listed.
            &["application/openmetrics-text;q=2"],
            &["application/openmetrics-text;q=nan"],
            &["application/openmetrics-text;q="],
            &["application/openmetrics-textual"],
            &["application/openmetrics-text\u{e9}"],
        ] {
            assert_eq!(asked(values), Format::Text, "{values:?}");
        }
    }

    #[test]
    fn renamed_metric_has_the_same_value_under_its_old_name() {
        let mut registry = Registry::new();
        let counter: Counter = registry.renamed("old_total", "new_total", "What it counts.");
        counter.inc_by(3);
        assert_eq!(
            registry.encode(Format::Text).unwrap(),
            "# HELP ccsqm_gateway_new_total What it counts.\n\
             # TYPE ccsqm_gateway_new_total counter\n\
             ccsqm_gateway_new_total 3\n\
             # HELP ccsqm_gateway_old_total Deprecated: use ccsqm_gateway_new_total.\n\
             # TYPE ccsqm_gateway_old_total counter\n\
             ccsqm_gateway_old_total 3\n"
        );
    }
}
