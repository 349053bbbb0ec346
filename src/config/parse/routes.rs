//! Routes.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use super::{EXCHANGE, good_file, read_list, read_name};
use crate::config::named_files::FileKind;
use crate::config::table::{Context, Referent, Table};
use crate::config::values::{parse_code, parse_member, parse_route_path};
use crate::config::{BUILT_IN_ROUTE, ContractSource, Route};

const BUILT_IN_PATH: &str = "/apiaccess/CCSQM/rest/ccisqm/v1/qualitytask/appointQualityTask";

pub(super) fn read_routes(context: &mut Context<'_>, root: &mut Table) -> Vec<Route> {
    let mut names = HashSet::new();
    let mut paths = HashSet::from([BUILT_IN_PATH.to_owned()]);
    let mut built_in = None;
    let mut routes = Vec::new();
    for mut table in root.tables(context, "routes") {
        let name = read_name(context, &mut table, &mut names);
        // One whose name cannot be read may be either.
        let has_more = ["path", "contract_file"].iter().any(|key| table.members.contains_key(*key));
        if name == BUILT_IN_ROUTE || (name.is_empty() && !has_more) {
            let contract = table
                .path(context, "contract_file")
                .and_then(|found| good_file(context, found, FileKind::Contract));
            let terms = read_terms(context, &mut table);
            table.close(context);
            built_in = Some(built_in_route(contract, terms));
            continue;
        }
        let path = table.required(context, "path", String::new(), parse_route_path);
        if !path.is_empty() && !paths.insert(path.clone()) {
            context.problem_at(&table.key("path"), "another route has this path");
        }
        if !table.members.contains_key("contract_file") {
            table.lacks(context, "contract_file", "is missing");
        }
        let contract = table
            .path(context, "contract_file")
            .and_then(|found| good_file(context, found, FileKind::Contract));
        let result_field = table.parsed(context, "result_field", "resultCode".to_owned(), parse_member);
        let codes = read_list(context, &mut table, "success_codes", parse_code).unwrap_or_default();
        if codes.is_empty() && !context.is_doubtful(&table.key("success_codes")) {
            table.lacks(context, "success_codes", "at least one is needed, as in [\"0409000\"]");
        }
        let Terms { credential, timeout, frozen } = read_terms(context, &mut table);
        table.close(context);
        routes.push(Route {
            name,
            path,
            contract: ContractSource::File(contract.unwrap_or_default()),
            result_field,
            success_codes: codes,
            credential,
            timeout,
            frozen,
        });
    }
    routes.insert(0, built_in.unwrap_or_else(|| built_in_route(None, Terms::default())));
    routes
}

/// On which terms a route is used: all that can be said of the built-in one, beside another contract.
#[derive(Default)]
struct Terms {
    credential: Option<String>,
    timeout: Option<Duration>,
    frozen: bool,
}

fn read_terms(context: &mut Context<'_>, table: &mut Table) -> Terms {
    let credential =
        table.text(context, "credential").map(|found| context.refer(Referent::Credential, found));
    let has_timeout = table.members.contains_key("timeout");
    let timeout = table.duration(context, "timeout", "30s", EXCHANGE);
    Terms { credential, timeout: has_timeout.then_some(timeout), frozen: table.boolean(context, "frozen") }
}

fn built_in_route(contract: Option<PathBuf>, Terms { credential, timeout, frozen }: Terms) -> Route {
    Route {
        name: BUILT_IN_ROUTE.into(),
        path: BUILT_IN_PATH.into(),
        contract: contract.map_or(ContractSource::BuiltIn, ContractSource::File),
        result_field: "resultCode".into(),
        success_codes: vec!["0409000".into()],
        credential,
        timeout,
        frozen,
    }
}
