//! The words of the crate: what its names mean, where the field's terms are found, and how many of its lines say why.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use proc_macro2::{Ident, TokenStream, TokenTree};
use syn::{Attribute, Item, ItemFn, Meta, Visibility, visit::Visit};

/// Where each idea is implemented, by the word that its module's head must have.
const TERMS: [(&str, &str); 7] = [
    ("circuit breaker", "src/upstream/breaker.rs"),
    ("half-open", "src/upstream/breaker.rs"),
    ("load shedding", "src/upstream/wait_queue.rs"),
    ("single flight", "src/token/fetcher.rs"),
    ("group commit", "src/audit/commit_waiters.rs"),
    ("write-ahead", "src/audit.rs"),
    ("deduplicat", "src/idempotency.rs"),
];

/// The least share of the lines of `src` that are comments behind `//`, in percent. Documentation does not count.
const MIN_COMMENTS: usize = 3;

/// The longest name of a test, in characters.
const MAX_TEST_NAME: usize = 80;

/// The modules whose names nobody else uses.
const APART: [&str; 2] = ["src/sandbox", "src/fuzz"];

/// The derives that make a type part of the command line.
const OF_COMMAND_LINE: [&str; 4] = ["Parser", "Args", "Subcommand", "ValueEnum"];

/// An item that other modules can name.
struct Shared {
    name: String,
    is_type: bool,
    file: PathBuf,
    /// The name of its module.
    module: String,
}

impl Shared {
    /// In lower case, with an underscore between its words.
    fn snake_case(&self) -> String {
        let mut snake = String::new();
        for letter in self.name.chars() {
            if self.is_type && letter.is_uppercase() && !snake.is_empty() {
                snake.push('_');
            }
            snake.extend(letter.to_lowercase());
        }
        snake
    }
}

fn files(folder: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(self::files(path.to_str().unwrap()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

fn parse(file: &Path) -> Vec<Item> {
    let text = fs::read_to_string(file).unwrap();
    syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display())).items
}

/// What the crate's modules can name of each other, without what is compiled for tests only.
fn shared() -> Vec<Shared> {
    let mut shared = Vec::new();
    for file in files("src") {
        let is_apart =
            APART.iter().any(|apart| file.starts_with(apart) || file.with_extension("") == Path::new(apart));
        let is_tests =
            file.components().any(|part| part.as_os_str() == "tests" || part.as_os_str() == "tests.rs");
        if !is_apart && !is_tests {
            parse(&file).iter().for_each(|item| collect(item, &file, &mut shared));
        }
    }
    shared
}

fn collect(item: &Item, file: &Path, shared: &mut Vec<Shared>) {
    let mut add = |name: &Ident, is_type| {
        let module = file.file_stem().unwrap().to_str().unwrap().to_owned();
        shared.push(Shared { name: name.to_string(), is_type, file: file.to_owned(), module });
    };
    let (name, visibility, attributes, is_type) = match item {
        Item::Const(it) => (&it.ident, &it.vis, &it.attrs, false),
        Item::Enum(it) => (&it.ident, &it.vis, &it.attrs, true),
        Item::Fn(it) => (&it.sig.ident, &it.vis, &it.attrs, false),
        Item::Static(it) => (&it.ident, &it.vis, &it.attrs, false),
        Item::Struct(it) => (&it.ident, &it.vis, &it.attrs, true),
        Item::Trait(it) => (&it.ident, &it.vis, &it.attrs, true),
        Item::Type(it) => (&it.ident, &it.vis, &it.attrs, true),
        Item::Macro(it) => return made_by(it.mac.tokens.clone()).iter().for_each(|name| add(name, true)),
        _ => return,
    };
    let is_of_command_line = derives(attributes).iter().any(|name| OF_COMMAND_LINE.contains(&name.as_str()));
    let is_of_tests = attributes.iter().any(|attribute| {
        matches!(&attribute.meta, Meta::List(list) if list.path.is_ident("cfg") && list.tokens.to_string() == "test")
    });
    if !matches!(visibility, Visibility::Inherited) && !is_of_command_line && !is_of_tests {
        add(name, is_type);
    }
}

/// The types that a macro makes of `pub struct Name` or `pub enum Name`.
fn made_by(tokens: TokenStream) -> Vec<Ident> {
    let tokens: Vec<_> = tokens.into_iter().collect();
    let is = |token: &TokenTree, words: &[&str]| matches!(token, TokenTree::Ident(name) if words.iter().any(|word| name == word));
    tokens
        .windows(3)
        .filter(|three| is(&three[0], &["pub"]) && is(&three[1], &["struct", "enum"]))
        .filter_map(|three| if let TokenTree::Ident(name) = &three[2] { Some(name.clone()) } else { None })
        .collect()
}

fn derives(attributes: &[Attribute]) -> Vec<String> {
    let lists = attributes.iter().filter_map(|attribute| match &attribute.meta {
        Meta::List(list) if list.path.is_ident("derive") => Some(list.tokens.clone()),
        _ => None,
    });
    lists
        .flatten()
        .filter_map(|token| if let TokenTree::Ident(name) = token { Some(name.to_string()) } else { None })
        .collect()
}

#[test]
fn no_name_that_modules_share_has_two_meanings() {
    let shared = shared();
    let mut meanings: BTreeMap<&str, Vec<&Path>> = BTreeMap::new();
    // Each module may have an `Error`; it is named with its module's name.
    for it in shared.iter().filter(|it| it.is_type && it.name != "Error") {
        meanings.entry(&it.name).or_default().push(&it.file);
    }
    assert!(meanings.len() > 200, "the control: types are found ({})", meanings.len());
    meanings.retain(|_, files| files.len() > 1);
    assert!(meanings.is_empty(), "{meanings:#?}");
}

#[test]
fn no_name_begins_with_that_of_its_module() {
    let shared = shared();
    let repeats = |it: &&Shared| it.snake_case().starts_with(&format!("{}_", it.module));
    let repeats: Vec<_> =
        shared.iter().filter(repeats).map(|it| format!("{}: {}", it.file.display(), it.name)).collect();
    assert!(repeats.is_empty(), "{repeats:#?}");
    assert!(shared.len() > 500, "the control: items are found ({})", shared.len());
}

#[test]
fn terms_of_the_field_are_in_the_heads_of_their_modules() {
    for (term, file) in TERMS {
        let text = fs::read_to_string(file).unwrap();
        let head: Vec<_> =
            text.lines().take_while(|line| line.starts_with("//!")).map(|line| line[3..].trim()).collect();
        assert!(head.join(" ").to_lowercase().contains(term), "{file}: the head does not say `{term}`");
    }
}

#[test]
fn three_lines_in_a_hundred_say_why() {
    let (mut lines, mut comments) = (0, 0);
    for file in files("src") {
        let text = fs::read_to_string(&file).unwrap();
        lines += text.lines().count();
        let is_comment =
            |line: &&str| line.starts_with("//") && !line.starts_with("///") && !line.starts_with("//!");
        comments += text.lines().map(str::trim_start).filter(is_comment).count();
    }
    assert!(comments * 100 >= lines * MIN_COMMENTS, "{comments} of {lines} lines");
}

#[test]
fn no_test_has_a_name_of_more_than_80_characters() {
    #[derive(Default)]
    struct Tests(Vec<String>);
    impl<'ast> Visit<'ast> for Tests {
        fn visit_item_fn(&mut self, item: &'ast ItemFn) {
            let is_test = |attribute: &Attribute| {
                attribute.path().segments.last().is_some_and(|last| last.ident == "test")
            };
            if item.attrs.iter().any(is_test) {
                self.0.push(item.sig.ident.to_string());
            }
        }
    }
    let mut tests = Tests::default();
    for file in [files("src"), files("tests")].concat() {
        parse(&file).iter().for_each(|item| tests.visit_item(item));
    }
    assert!(tests.0.len() > 700, "the control: tests are found ({})", tests.0.len());
    tests.0.retain(|name| name.len() > MAX_TEST_NAME);
    assert!(tests.0.is_empty(), "{:#?}", tests.0);
}
