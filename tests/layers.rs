//! The layers of the crate: which room may name which, and how long files and functions may be.
//!
//! A room is a module of the crate's root with all its children. The sources are read as text, without what is compiled for tests
//! only; a name that one module passes on for another counts as the other's.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::{Path, PathBuf},
};

use proc_macro2::{Delimiter, Span, TokenStream, TokenTree};
use syn::{
    Attribute, Block, Expr, ExprMatch, File, ImplItemFn, Item, ItemFn, ItemMod, ItemUse, Macro, Meta, Stmt,
    UseTree, spanned::Spanned, visit::Visit,
};

/// The rooms, from the ground up. A room names those of its own layer, without a circle, and of lower ones.
const LAYERS: [(&str, &str); 9] = [
    (
        "tools, which know nothing of the gateway",
        "backoff base64 clock disconnect field_values file_watch files ids json keyed_hash pem plain registry seats supervisor",
    ),
    ("words", "model"),
    ("configuration", "config"),
    (
        "parts that stages are built from",
        "changes concurrency connect log rate_limit reason request_head secret trouble",
    ),
    ("stages", "admission audit contract idempotency result_rule route token upstream"),
    ("what lies behind the intent", "exchange"),
    ("the way of a request", "error gateway metrics state"),
    ("around it", "admin app control preflight reload server watchdog"),
    ("face", "cli main"),
];

/// The layer in which rooms do not name each other.
const STAGES: &str = "stages";

/// But these: who, whom, what, why.
const BETWEEN_STAGES: [(&str, &str, &[&str], &str); 3] = [
    ("route", "admission", &["Admitted", "Caller"], "proof that the request was admitted, and whose it is"),
    ("upstream", "token", &["Token"], "proof that there is a token, and its place in the head"),
    (
        "idempotency",
        "audit",
        &[],
        "the trail is its memory: a start reads the keys back, and resolutions are events",
    ),
];

/// It shares nothing with the gateway but tools, and only the command starts it.
const BESIDE: &str = "sandbox";

/// The longest file without its tests, and the longest function, in lines; the deepest nesting of a function.
const MAX_FILE: usize = 500;
const MAX_FUNCTION: usize = 60;
const MAX_NESTING: usize = 4;

/// A path of modules, from the crate's root.
type ModulePath = Vec<String>;

/// One module, as far as names go.
#[derive(Default)]
struct Module {
    children: BTreeSet<String>,
    /// What each name that it imports stands for, as it is written.
    imports: BTreeMap<String, Vec<String>>,
}

/// A path that stands somewhere.
struct Mention {
    module: ModulePath,
    path: Vec<String>,
    place: Place,
}

#[derive(Clone)]
struct Place {
    file: PathBuf,
    line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// A function that is written in the crate.
struct Function {
    name: String,
    place: Place,
    lines: usize,
    nesting: usize,
    is_table: bool,
}

/// All that is read of the crate.
#[derive(Default)]
struct Crate {
    modules: BTreeMap<ModulePath, Module>,
    mentions: Vec<Mention>,
    functions: Vec<Function>,
    /// Lines of each file, but for its tests.
    files: BTreeMap<PathBuf, usize>,
}

impl Crate {
    fn read() -> Self {
        let mut all = Self::default();
        for root in ["src/lib.rs", "src/main.rs"] {
            all.read_file(Path::new(root), Vec::new());
        }
        all
    }

    fn read_file(&mut self, file: &Path, module: ModulePath) {
        let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let File { items, .. } =
            syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let tests = items.iter().filter(|item| is_of_tests(attributes(item)));
        let tests = tests.map(|item| item.span().end().line - item.span().start().line + 1);
        self.files.insert(file.to_owned(), text.lines().count() - tests.sum::<usize>());
        self.read_items(file, module, &items);
    }

    fn read_items(&mut self, file: &Path, module: ModulePath, items: &[Item]) {
        self.modules.entry(module.clone()).or_default();
        let mut reader = Reader { all: self, file, module };
        for item in items.iter().filter(|item| !is_of_tests(attributes(item))) {
            match item {
                Item::Mod(child) => reader.read_child(child),
                item => reader.visit_item(item),
            }
        }
    }

    /// The module in which the thing is written that a path names; `None` if that is no part of the crate.
    fn home(&self, module: &[String], path: &[String], depth: usize) -> Option<ModulePath> {
        assert!(depth < 50, "{path:?} in {module:?} has no end");
        let (first, rest) = path.split_first()?;
        match first.as_str() {
            "crate" | "ccsqm_gateway" => self.descend(Vec::new(), rest, depth),
            "self" => self.descend(module.to_vec(), rest, depth),
            "super" => {
                let parent = &module[..module.len().checked_sub(1)?];
                if rest.first().is_some_and(|next| next == "super") {
                    return self.home(parent, rest, depth + 1);
                }
                self.descend(parent.to_vec(), rest, depth)
            }
            _ if self.modules[module].children.contains(first) => self.descend(module.to_vec(), path, depth),
            _ => {
                let import = self.modules[module].imports.get(first)?;
                if import.first() == Some(first) {
                    return None; // another crate, which has a name of its own name
                }
                self.home(module, &[import, rest].concat(), depth + 1)
            }
        }
    }

    fn descend(&self, mut module: ModulePath, path: &[String], depth: usize) -> Option<ModulePath> {
        for (index, name) in path.iter().enumerate() {
            let known = &self.modules[&module];
            if known.children.contains(name) {
                module.push(name.clone());
            } else if let Some(import) = known.imports.get(name) {
                let whole = [import, &path[index + 1..]].concat();
                return self.home(&module, &whole, depth + 1).or(Some(module));
            } else {
                break;
            }
        }
        Some(module)
    }

    /// Which room names which, with the names and a place.
    fn edges(&self) -> BTreeMap<(String, String), Vec<(String, Place)>> {
        let mut edges: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for Mention { module, path, place } in &self.mentions {
            let Some(home) = self.home(module, path, 0) else { continue };
            let room = |path: &[String]| path.first().map_or("main", String::as_str).to_owned();
            let (from, to) = (room(module), room(&home));
            if from != to && !home.is_empty() {
                let name = path.last().cloned().unwrap_or_default();
                edges.entry((from, to)).or_default().push((name, place.clone()));
            }
        }
        edges
    }
}

/// Reads the items of one module.
struct Reader<'a> {
    all: &'a mut Crate,
    file: &'a Path,
    module: ModulePath,
}

impl Reader<'_> {
    fn read_child(&mut self, child: &ItemMod) {
        let name = child.ident.to_string();
        self.module().children.insert(name.clone());
        let path = [&self.module[..], std::slice::from_ref(&name)].concat();
        match &child.content {
            Some((_, items)) => self.all.read_items(self.file, path, items),
            None => {
                let is_root = self.module.is_empty();
                let folder =
                    if is_root { self.file.with_file_name("") } else { self.file.with_extension("") };
                self.all.read_file(&folder.join(name).with_extension("rs"), path);
            }
        }
    }

    fn module(&mut self) -> &mut Module {
        self.all.modules.entry(self.module.clone()).or_default()
    }

    fn place(&self, span: Span) -> Place {
        Place { file: self.file.to_owned(), line: span.start().line }
    }

    fn mention(&mut self, path: Vec<String>, span: Span) {
        let place = self.place(span);
        self.all.mentions.push(Mention { module: self.module.clone(), path, place });
    }

    fn read_use(&mut self, before: &[String], tree: &UseTree) {
        let (mut path, span) = (before.to_vec(), tree.span());
        match tree {
            UseTree::Path(part) => {
                path.push(part.ident.to_string());
                self.read_use(&path, &part.tree);
            }
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.read_use(before, tree)),
            UseTree::Glob(_) => self.mention(path, span),
            UseTree::Name(name) => {
                let name = name.ident.to_string();
                if name != "self" {
                    path.push(name);
                }
                self.import(path.last().cloned().unwrap_or_default(), path, span);
            }
            UseTree::Rename(rename) => {
                if rename.ident != "self" {
                    path.push(rename.ident.to_string());
                }
                self.import(rename.rename.to_string(), path, span);
            }
        }
    }

    fn import(&mut self, name: String, path: Vec<String>, span: Span) {
        self.module().imports.insert(name, path.clone());
        self.mention(path, span);
    }

    /// The paths among the tokens of a macro or an attribute.
    fn read_tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let (mut begin, mut colons) = (Span::call_site(), 0);
        for token in tokens {
            match token {
                TokenTree::Ident(name) if colons == 2 && !path.is_empty() => path.push(name.to_string()),
                TokenTree::Ident(name) => {
                    self.end_path(&mut path, begin);
                    (path, begin) = (vec![name.to_string()], name.span());
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => {
                    colons += 1;
                    continue;
                }
                TokenTree::Group(group) => {
                    self.end_path(&mut path, begin);
                    self.read_tokens(group.stream());
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => self.end_path(&mut path, begin),
            }
            colons = 0;
        }
        self.end_path(&mut path, begin);
    }

    fn end_path(&mut self, path: &mut Vec<String>, begin: Span) {
        if path.len() > 1 {
            self.mention(std::mem::take(path), begin);
        }
        path.clear();
    }

    fn function(&mut self, name: String, begin: Span, block: &Block) {
        let place = self.place(begin);
        let lines = block.span().end().line - place.line + 1;
        let nesting = Nesting::of(block);
        self.all.functions.push(Function { name, place, lines, nesting, is_table: is_table(block) });
    }
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        self.read_use(&[], &item.tree);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<_> = path.segments.iter().map(|part| part.ident.to_string()).collect();
        self.mention(names, path.span());
        syn::visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, called: &'ast Macro) {
        self.visit_path(&called.path);
        self.read_tokens(called.tokens.clone());
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        if let Meta::List(list) = &attribute.meta {
            self.read_tokens(list.tokens.clone());
        }
    }

    fn visit_item_fn(&mut self, item: &'ast ItemFn) {
        if !is_of_tests(&item.attrs) {
            self.function(item.sig.ident.to_string(), item.sig.span(), &item.block);
            syn::visit::visit_item_fn(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, item: &'ast ImplItemFn) {
        if !is_of_tests(&item.attrs) {
            self.function(item.sig.ident.to_string(), item.sig.span(), &item.block);
            syn::visit::visit_impl_item_fn(self, item);
        }
    }
}

/// How deep the blocks of a function lie in one another, those of closures and the arms of a `match` included.
#[derive(Default)]
struct Nesting {
    present: usize,
    deepest: usize,
}

impl Nesting {
    fn of(block: &Block) -> usize {
        let mut nesting = Self::default();
        nesting.visit_block(block);
        nesting.deepest - 1
    }
}

impl<'ast> Visit<'ast> for Nesting {
    fn visit_item(&mut self, _: &'ast Item) {} // has a nesting of its own

    fn visit_block(&mut self, block: &'ast Block) {
        self.present += 1;
        self.deepest = self.deepest.max(self.present);
        syn::visit::visit_block(self, block);
        self.present -= 1;
    }

    fn visit_expr_match(&mut self, it: &'ast ExprMatch) {
        self.visit_expr(&it.expr);
        self.present += 1;
        self.deepest = self.deepest.max(self.present);
        for arm in &it.arms {
            match &*arm.body {
                Expr::Block(body) => body.block.stmts.iter().for_each(|stmt| self.visit_stmt(stmt)),
                body => self.visit_expr(body),
            }
        }
        self.present -= 1;
    }
}

/// Whether a function is one `match` that gives each word something plain: a table.
fn is_table(block: &Block) -> bool {
    fn is_plain(expression: &Expr) -> bool {
        match expression {
            Expr::Lit(_) | Expr::Path(_) => true,
            Expr::Block(block) => {
                matches!(&block.block.stmts[..], [Stmt::Expr(only, None)] if is_plain(only))
            }
            Expr::Call(call) => call.args.iter().all(is_plain),
            _ => false,
        }
    }
    matches!(&block.stmts[..], [Stmt::Expr(Expr::Match(it), None)] if it.arms.iter().all(|arm| is_plain(&arm.body)))
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(it) => &it.attrs,
        Item::Enum(it) => &it.attrs,
        Item::Fn(it) => &it.attrs,
        Item::Impl(it) => &it.attrs,
        Item::Mod(it) => &it.attrs,
        Item::Static(it) => &it.attrs,
        Item::Struct(it) => &it.attrs,
        Item::Trait(it) => &it.attrs,
        Item::Type(it) => &it.attrs,
        Item::Use(it) => &it.attrs,
        _ => &[],
    }
}

/// Whether something is compiled for tests only.
fn is_of_tests(attributes: &[Attribute]) -> bool {
    fn names_test(tokens: TokenStream) -> bool {
        tokens.into_iter().any(|token| match token {
            TokenTree::Ident(name) => name == "test",
            TokenTree::Group(group) if group.delimiter() == Delimiter::Parenthesis => {
                names_test(group.stream())
            }
            _ => false,
        })
    }
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) => list.path.is_ident("cfg") && names_test(list.tokens.clone()),
        Meta::Path(path) => path.is_ident("test"),
        Meta::NameValue(_) => false,
    })
}

fn layer(room: &str) -> Option<usize> {
    LAYERS.iter().position(|(_, rooms)| rooms.split(' ').any(|known| known == room))
}

/// Why a room must not name another, if it must not.
fn fault(from: &str, to: &str, names: &[(String, Place)]) -> Option<String> {
    let (Some(upper), Some(lower)) = (layer(from), layer(to)) else {
        let is_allowed =
            if to == BESIDE { layer(from) == Some(LAYERS.len() - 1) } else { layer(to) == Some(0) };
        return (!is_allowed).then(|| format!("{BESIDE} lies beside the layers"));
    };
    if lower > upper {
        return Some(format!("{to} lies higher ({} over {})", LAYERS[lower].0, LAYERS[upper].0));
    }
    if lower == upper && LAYERS[upper].0 == STAGES {
        let allowed = BETWEEN_STAGES.iter().find(|(one, other, ..)| (*one, *other) == (from, to));
        let Some((_, _, allowed, _)) = allowed else { return Some("stages do not name each other".into()) };
        let more = names.iter().find(|(name, _)| !allowed.is_empty() && !allowed.contains(&name.as_str()));
        return more.map(|(name, place)| format!("{name} is no proof of an earlier stage ({place})"));
    }
    None
}

#[test]
fn no_module_imports_a_higher_layer_and_no_stage_another_stage() {
    let all = Crate::read();
    let rooms = all.modules[&Vec::new()].children.iter();
    let homeless: Vec<_> = rooms.filter(|room| layer(room).is_none() && *room != BESIDE).collect();
    assert!(homeless.is_empty(), "no layer has {homeless:?}");
    let mut faults = Vec::new();
    for ((from, to), names) in all.edges() {
        if let Some(fault) = fault(&from, &to, &names) {
            let places: Vec<_> = names.iter().map(|(name, place)| format!("\n    {place}: {name}")).collect();
            faults.push(format!("{from} -> {to}: {fault}{}", places.concat()));
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
    assert!(all.mentions.len() > 10_000, "the control: paths are read ({})", all.mentions.len());
}

#[test]
fn modules_import_each_other_without_cycles() {
    let edges = Crate::read().edges();
    assert!(edges.len() > 100, "the control: edges are found ({})", edges.len());
    let mut left: BTreeSet<_> = edges.keys().cloned().collect();
    loop {
        // A room that names none of those that are left, or that none of them names, is on no circle.
        let before = left.len();
        let (names, named): (BTreeSet<_>, BTreeSet<_>) = left.iter().cloned().unzip();
        left.retain(|(from, to)| names.contains(to) && named.contains(from));
        if left.len() == before {
            break;
        }
    }
    let circle: Vec<_> =
        left.iter().map(|edge| format!("{} -> {}: {}", edge.0, edge.1, edges[edge][0].1)).collect();
    assert!(circle.is_empty(), "\n{}", circle.join("\n"));
}

#[test]
fn files_and_functions_stay_within_size_and_nesting_limits() {
    let all = Crate::read();
    let long_files = all.files.iter().filter(|(_, lines)| **lines > MAX_FILE);
    let mut long: BTreeMap<_, _> =
        long_files.map(|(file, lines)| (file.display().to_string(), format!("{lines} lines"))).collect();
    for Function { name, place, lines, nesting, is_table } in &all.functions {
        let key = format!("{}: {name}", place.file.display());
        if *lines > MAX_FUNCTION && !is_table {
            long.insert(key, format!("line {}: {lines} lines", place.line));
        } else if *nesting > MAX_NESTING {
            long.insert(key, format!("line {}: nested {nesting} deep", place.line));
        }
    }
    assert!(long.is_empty(), "too long or too deep: {long:#?}");
    assert!(all.functions.len() > 1000, "the control: functions are read ({})", all.functions.len());
}
