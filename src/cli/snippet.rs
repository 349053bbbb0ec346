//! Formats the mistakes of a configuration for a terminal: each with its place, and with the value if it may be shown.

use std::env;

use annotate_snippets::{AnnotationKind, Group, Level, Origin, Renderer, Snippet};
use ccsqm_gateway::config::{Problem, Problems};
use ccsqm_gateway::plain;

/// Returns one report for each mistake, with colours unless the environment says otherwise.
pub(super) fn reports(problems: &Problems) -> String {
    // https://no-color.org: any value that is not empty.
    let is_plain = env::var_os("NO_COLOR").is_some_and(|set| !set.is_empty())
        || env::var_os("TERM").is_none_or(|terminal| terminal == "dumb");
    let renderer = if is_plain { Renderer::plain() } else { Renderer::styled() };
    let reports: Vec<_> = problems.iter().map(|problem| renderer.render(&[report(problem)])).collect();
    reports.join("\n\n")
}

fn report(problem: &Problem) -> Group<'static> {
    let Some((path, line)) = problem.line() else {
        return Group::with_title(Level::ERROR.primary_title(problem.to_string()));
    };
    let (title, path) = (Level::ERROR.primary_title(problem.title()), plain::line(path));
    // Without the text of the line where it may hold a secret, or where it is not TOML: a secret may have been pasted there.
    let Some(shown) = problem.shown() else {
        return title.element(Origin::path(path).line(line));
    };
    let value = shown.find(" = ").map_or(0, |at| at + 3)..shown.len();
    title.element(
        Snippet::source(shown).path(path).line_start(line).annotation(AnnotationKind::Primary.span(value)),
    )
}
