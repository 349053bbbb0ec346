//! The rules of the business calls, by the vendor's pages: authorization, what `appointQualityTask` accepts, what it answers.
//!
//! 400 is for a request of the wrong form, 500 with another result code for values that the business does not accept. Where the
//! pages are silent, everything is accepted: unknown members, the same inspector twice. So a test that expects such a call to be
//! refused passes only if the gateway refuses it.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::faults::Fault;
use super::http::{Head, Reply};
use super::{APPOINT_PATH, Cloud, lock};

/// The prefix of the paths of all business calls.
const PREFIX: &str = "/apiaccess/CCSQM/rest/ccisqm/v1/";

/// The result code of a business failure. The page documents only "others: failure".
const FAILED: &str = "0409001";

/// The business calls: path behind the prefix, success code, whether `x-UserId` is mandatory. Queries are not among them, since
/// their replies have other forms.
const CALLS: [(&str, &str, bool); 11] = [
    ("qualitytask/appointQualityTask", "0409000", true),
    ("qualitytask/createQualityTask", "0409000", true),
    ("qualitytask/updateQualityTask", "0409000", true),
    ("qualitytask/deleteQualityTask", "0409000", true),
    ("qualitytask/takeEffectQualityTask", "0409000", true),
    ("qualitytask/terminateQualityTask", "0409000", false),
    ("qualitytask/modifyResultQualityTask", "0409000", false),
    ("qualitytask/completeQualityTask", "0409000", false),
    ("regularqualitytask/beginQualityTask", "0408000", false),
    ("regularqualitytask/stopQualityTask", "0408000", false),
    ("regularqualitytask/deleteQualityTask", "0408000", false),
];

/// A task that `appointQualityTask` assigned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Task {
    /// The value of `qualityTaskId`, as text whether it was a string or a number.
    pub task: String,
    /// The operator: the value of `x-UserId`.
    pub operator: String,
    /// Whether `isTakeEffect` was 1.
    pub takes_effect: bool,
    /// The items of `setCounts`, in their order.
    pub inspectors: Vec<Inspector>,
}

/// One inspector of a task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inspector {
    /// The value of `personID`.
    pub person: String,
    /// The value of `count`, if it was given.
    pub count: Option<u64>,
}

/// Answers a business call.
pub(super) fn answer(cloud: &Cloud, head: &Head, body: &[u8], fault: &Fault) -> Reply {
    // A scripted status or body assigns nothing, so that a refusal such as 401 or 429 is a true one.
    if let Some(reply) = fault.replacement() {
        return reply;
    }
    match check(cloud, head, body) {
        Ok(accepted) => accepted.answer(cloud, fault),
        Err(reply) => reply,
    }
}

/// A call that meets the rules; with a task if it is `appointQualityTask`.
struct Accepted {
    success: &'static str,
    task: Option<Task>,
}

impl Accepted {
    fn answer(self, cloud: &Cloud, fault: &Fault) -> Reply {
        if let Some(task) = self.task
            && fault.code.as_ref().is_none_or(|code| code.succeeds())
        {
            cloud.assign(task);
        }
        match &fault.code {
            Some(code) => code.reply(self.success),
            None => result(200, self.success, "Operation successful."),
        }
    }
}

fn check(cloud: &Cloud, head: &Head, body: &[u8]) -> Result<Accepted, Reply> {
    let call = head.path.strip_prefix(PREFIX);
    let (_, success, operator_needed) = CALLS
        .into_iter()
        .find(|(path, ..)| call == Some(path))
        .ok_or_else(|| Reply::error(404, "the requested content is not found"))?;
    if head.method != "POST" {
        return Err(Reply::error(405, "business calls are POST"));
    }
    // Before the body is checked: a client without a token gets 401, whatever its body is.
    authorize(cloud, head)?;
    let operator = operator(head, operator_needed)?;
    if head.has("content-type") && !head.is_json() {
        return Err(incorrect("Content-Type must be application/json; charset=UTF-8"));
    }
    let body: Value = serde_json::from_slice(body).map_err(|_| incorrect("the body is not JSON"))?;
    let body = body.as_object().ok_or_else(|| incorrect("the body is not an object"))?;
    let task = (head.path == APPOINT_PATH).then(|| appointment(body, operator)).transpose()?;
    Ok(Accepted { success, task })
}

fn authorize(cloud: &Cloud, head: &Head) -> Result<(), Reply> {
    let unauthorized = |reason: &str| Reply::error(401, &format!("Unauthorized operation: {reason}"));
    let token = head
        .only("authorization")
        .and_then(|value| value.strip_prefix("Bearer "))
        .ok_or_else(|| unauthorized("no Authorization: Bearer"))?;
    let tokens = lock(&cloud.tokens);
    let holder = tokens.holder(token).ok_or_else(|| unauthorized("unknown or expired token"))?;
    // The page has the header as optional. If it is there, it must be the key that the token was issued to.
    if head.has("x-app-key") && head.only("x-app-key") != Some(holder) {
        return Err(unauthorized("x-app-key is not the token's"));
    }
    Ok(())
}

fn operator(head: &Head, needed: bool) -> Result<&str, Reply> {
    match head.only("x-userid") {
        Some(operator) if !operator.is_empty() => Ok(operator),
        None if !needed && !head.has("x-userid") => Ok(""),
        _ => Err(incorrect("x-UserId must be given once")),
    }
}

/// Checks the body by table 2 of the vendor's page: types first (400), then values (500).
fn appointment(body: &Map<String, Value>, operator: &str) -> Result<Task, Reply> {
    let id = body.get("qualityTaskId").ok_or_else(|| incorrect("qualityTaskId is missing"))?;
    let counts_type = number(body, "setCountsType")?;
    let takes_effect = number(body, "isTakeEffect")?;
    let list = body.get("setCounts").and_then(Value::as_array);
    let list = list.ok_or_else(|| incorrect("setCounts must be a list"))?;
    let task = task_id(id)?;
    let inspectors = list.iter().map(inspector).collect::<Result<Vec<_>, _>>()?;
    if counts_type.as_u64() != Some(1) {
        return Err(failure("setCountsType can only be 1"));
    }
    if !matches!(takes_effect.as_u64(), Some(0 | 1)) {
        return Err(failure("isTakeEffect can only be 0 or 1"));
    }
    if inspectors.is_empty() {
        return Err(failure("setCounts is empty"));
    }
    Ok(Task {
        task,
        operator: operator.to_owned(),
        takes_effect: takes_effect.as_u64() == Some(1),
        inspectors,
    })
}

/// Returns the id of the task as text.
// The page's table says number and its example has a string, so both are accepted.
fn task_id(value: &Value) -> Result<String, Reply> {
    match value {
        Value::Number(number) if number.is_u64() => Ok(number.to_string()),
        Value::String(text) if (1..=20).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit()) => {
            Ok(text.clone())
        }
        Value::Number(_) | Value::String(_) => Err(failure("qualityTaskId is no task's")),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => {
            Err(incorrect("qualityTaskId must be a number"))
        }
    }
}

fn inspector(value: &Value) -> Result<Inspector, Reply> {
    let members = value.as_object().ok_or_else(|| incorrect("setCounts must hold objects"))?;
    let person = members.get("personID").and_then(Value::as_str);
    let person = person.ok_or_else(|| incorrect("personID must be a string"))?;
    if person.is_empty() {
        return Err(failure("personID is empty"));
    }
    let count = members.contains_key("count").then(|| count(members)).transpose()?;
    Ok(Inspector { person: person.to_owned(), count })
}

/// Returns the count of an inspector. The vendor's page: "The value can contain a maximum of eight characters."
fn count(members: &Map<String, Value>) -> Result<u64, Reply> {
    number(members, "count")?
        .as_u64()
        .filter(|count| *count <= 99_999_999)
        .ok_or_else(|| failure("count has at most eight characters"))
}

fn number<'a>(members: &'a Map<String, Value>, name: &str) -> Result<&'a serde_json::Number, Reply> {
    members.get(name).and_then(Value::as_number).ok_or_else(|| incorrect(&format!("{name} must be a number")))
}

fn incorrect(reason: &str) -> Reply {
    Reply::error(400, &format!("Incorrect request: {reason}"))
}

fn failure(reason: &str) -> Reply {
    result(500, FAILED, &format!("Business failure: {reason}"))
}

fn result(status: u16, code: &str, description: &str) -> Reply {
    Reply::json(status, &json!({"resultCode": code, "resultDesc": description}))
}
