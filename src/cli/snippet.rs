//! Mistakes of a configuration for a terminal: each with its line of the file.

use std::collections::HashMap;
use std::env;
use std::fs;

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};
use ccsqm_gateway::config::{Problem, Problems};
use ccsqm_gateway::plain;

/// One report a mistake. What is in no file, or in one that is gone meanwhile, has no line.
pub(super) fn reports(problems: &Problems) -> String {
    let is_plain = env::var_os("NO_COLOR").is_some_and(|set| !set.is_empty())
        || env::var_os("TERM").is_none_or(|terminal| terminal == "dumb");
    let renderer = if is_plain { Renderer::plain() } else { Renderer::styled() };
    let mut files = HashMap::new();
    let reports: Vec<_> = problems.iter().map(|problem| report(&renderer, &mut files, problem)).collect();
    reports.join("\n\n")
}

fn report<'a>(renderer: &Renderer, files: &mut HashMap<&'a str, String>, problem: &'a Problem) -> String {
    let found = problem.line().and_then(|(path, number)| {
        let text = files.entry(path).or_insert_with(|| fs::read_to_string(path).unwrap_or_default());
        Some((path, number, shown(text.lines().nth(number - 1)?, problem.may_show_secret())))
    });
    let Some((path, number, line)) = found.filter(|(.., line)| !line.is_empty()) else {
        return renderer.render(&[Group::with_title(Level::ERROR.primary_title(problem.to_string()))]);
    };
    let length = line.len();
    let snippet = Snippet::source(line).line_start(number).path(plain::line(path));
    let snippet = snippet.annotation(AnnotationKind::Primary.span(0..length));
    renderer.render(&[Level::ERROR.primary_title(problem.title()).element(snippet)])
}

/// A line without its comment, and without its value if that may be a secret.
fn shown(line: &str, is_secret: bool) -> String {
    let code = line.split(" #").next().unwrap_or_default().trim();
    let value = code.find(['=', '"', '\'']).filter(|_| is_secret);
    let Some(value) = value else { return plain::line(code) };
    let name = code[..=value].trim_end_matches(['"', '\'']).trim_end();
    plain::line(&format!("{name} …"))
}
