//! The slot against the sandbox's token endpoint, over real sockets: what requests get, and which calls the endpoint received.

use std::fs;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::{Instant as StdInstant, SystemTime};

use http::StatusCode;
use serde_json::json;
use tempfile::TempDir;
use tokio::time::sleep;

use super::*;
use crate::changes::Changes;
use crate::config::{Credential, SecretSource, Url};
use crate::registry::{Format, Registry};
use crate::sandbox::{Options, Sandbox, TOKEN_PATH};
use endpoint::FetchError;
use metrics::CredentialLabel;

/// Returns the cause of the present failure of fetches.
fn failing(slot: &Slot) -> Option<Cause> {
    slot.status().last_error.filter(|last| last.over.is_none()).and_then(|last| last.cause)
}

/// The factor by which a promised deadline may be missed.
// Tests run beside each other on machines with few cores. The promises are seconds; the faults that these tests would find take
// far longer.
const MARGIN: u32 = 4;

/// The configuration of a token endpoint at this address.
pub(super) fn configured(address: SocketAddr) -> config::Token {
    config::Token {
        url: Url {
            tls: false,
            host: address.ip().to_string(),
            port: address.port(),
            path: TOKEN_PATH.into(),
        },
        lifetime: Some(Duration::from_secs(600)),
        timeout: Duration::from_secs(5),
        // Longer than the pauses of a fetch that is repeated (3 s at most), so that no test on a busy machine runs out of it.
        wait: Duration::from_secs(20),
        refused_statuses: vec![StatusCode::UNAUTHORIZED],
    }
}

/// A slot against a sandbox, with its secrets in files that a test can change.
struct Rig {
    sandbox: Sandbox,
    slot: Arc<Slot>,
    folder: TempDir,
    told: Arc<Mutex<Vec<Value>>>,
    registry: Registry,
    metrics: TokenMetrics,
}

impl Rig {
    /// A slot whose fetching task does not run.
    fn idle(faults: Value, set: impl FnOnce(&mut config::Token)) -> Self {
        let sandbox = Sandbox::start(Options::default()).unwrap();
        let options = Options::default();
        let folder = TempDir::new().unwrap();
        let place = |name: &str| folder.path().join(name);
        fs::write(place("app_key"), options.app_key).unwrap();
        // As an editor writes it: the newline is no part of the secret.
        fs::write(place("app_secret"), options.app_secret + "\n").unwrap();
        let credential = Credential {
            name: "default".into(),
            app_key_file: Some(place("app_key")),
            app_secret_file: Some(place("app_secret")),
            ..Credential::default()
        };
        let mut token = configured(sandbox.address());
        set(&mut token);
        let (mut registry, told) = (Registry::new(), Arc::new(Mutex::new(Vec::new())));
        let changes = Changes::new(&mut registry);
        let metrics = TokenMetrics::new(&mut registry, changes);
        let tell = told.clone();
        let events =
            Box::new(move |_: &'static str, details| tell.lock().unwrap().push(Value::Object(details)));
        let slot = Slot::new(&credential, &token, &Egress::plain(), metrics.clone(), events).unwrap();
        let rig = Self { sandbox, slot, folder, told, registry, metrics };
        rig.script(faults);
        rig
    }

    fn start(faults: Value) -> Self {
        Self::start_with(faults, |_| {})
    }

    fn start_with(faults: Value, set: impl FnOnce(&mut config::Token)) -> Self {
        let rig = Self::idle(faults, set);
        tokio::spawn(rig.slot.clone().run());
        rig
    }

    fn script(&self, faults: Value) {
        self.sandbox.faults(serde_json::from_value(faults).unwrap()).unwrap();
    }

    fn calls(&self) -> usize {
        self.sandbox.token_calls().len()
    }

    async fn generation(&self) -> u64 {
        self.slot.token().await.unwrap().generation()
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.folder.path().join(name), content).unwrap();
    }

    /// The results of changed secrets that the audit trail received.
    fn told(&self) -> Vec<String> {
        self.told.lock().unwrap().iter().map(|event| event["result"].as_str().unwrap().to_owned()).collect()
    }

    /// Waits until the secrets were checked `count` times.
    async fn looks(&self, count: usize) {
        // Each check sets the gauge, so a value that it never sets shows that one has ended.
        let usable = self.metrics.usable.get_or_create_owned(&CredentialLabel::of(&self.slot));
        for _ in 0..count {
            usable.set(7);
            until("a look at the secrets", || usable.get() != 7).await;
        }
    }

    /// The state of the fetching task, which the test then drives itself.
    fn fetcher(&self) -> Fetcher {
        self.slot.fetcher.lock().unwrap().take().unwrap()
    }

    fn metric(&self, line: &str) -> bool {
        let text = self.registry.encode(Format::Text).unwrap();
        text.lines().any(|found| found == format!("ccsqm_gateway_token_{line}"))
    }
}

/// Waits until `ready` returns true, and fails after 20 s.
async fn until(what: &str, mut ready: impl FnMut() -> bool) {
    let deadline = StdInstant::now() + Duration::from_secs(20);
    while !ready() {
        assert!(StdInstant::now() < deadline, "{what} did not come");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Spawns a future.
fn beside<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> tokio::task::JoinHandle<T> {
    tokio::spawn(future)
}

#[tokio::test]
async fn token_fetch_is_single_flight_for_all_waiters() {
    // The delay lets all 100 begin to wait before the fetch ends.
    let rig = Rig::start(json!({ "token": [{ "delay_ms": 300 }] }));
    let waiters: Vec<_> = (0..100)
        .map(|_| {
            let slot = rig.slot.clone();
            beside(async move { slot.token().await.unwrap().generation() })
        })
        .collect();
    for waiter in waiters {
        assert_eq!(waiter.await.unwrap(), 1);
    }
    assert_eq!(rig.calls(), 1);
    assert!(rig.metric(r#"fetches_total{credential="default",result="ok"} 1"#));
}

#[tokio::test]
async fn caller_disconnect_does_not_cancel_the_token_fetch() {
    let rig = Rig::start(json!({ "token": [{ "delay_ms": 300 }] }));
    let slot = rig.slot.clone();
    let leaver = beside(async move { slot.token().await.map(|_| ()) });
    // Aborted while the fetch is under way: one that ran within the caller's future would end here.
    until("the fetch", || rig.calls() == 1).await;
    leaver.abort();
    assert!(leaver.await.unwrap_err().is_cancelled());
    assert_eq!((rig.generation().await, rig.calls()), (1, 1));
}

#[tokio::test]
async fn many_refusals_of_one_token_cause_one_fetch() {
    let rig = Rig::start(json!({}));
    assert_eq!(rig.generation().await, 1);
    let replacements: Vec<_> = (0..1000)
        .map(|_| {
            let slot = rig.slot.clone();
            beside(async move { slot.replace(1, false).await.unwrap().generation() })
        })
        .collect();
    for replacement in replacements {
        assert_eq!(replacement.await.unwrap(), 2);
    }
    assert_eq!(rig.slot.replace(1, false).await.unwrap().generation(), 2, "who comes late needs no fetch");
    assert_eq!(
        rig.slot.replace(0, false).await.unwrap().generation(),
        2,
        "nor who comes from before the first"
    );
    assert_eq!(rig.calls(), 2);
}

/// There is no contest where no token ever worked, as for an account without the service, nor where another token does not help.
#[tokio::test]
async fn working_but_short_lived_tokens_start_a_contest() {
    for (had_worked, other_works) in [(false, true), (true, false), (true, true)] {
        let is_contested = had_worked && other_works;
        let rig = Rig::start_with(json!({}), |token| token.wait = Duration::from_secs(8));
        assert_eq!(rig.generation().await, 1);
        for refused in 1..=4 {
            let begin = Instant::now();
            assert_eq!(rig.slot.replace(refused, had_worked).await.unwrap().generation(), refused + 1);
            if other_works {
                rig.slot.was_ended(refused);
            }
            // The third token begins the contest, so the fourth replacement is the first one with a pause: half of `token.wait`.
            let is_slowed = is_contested && refused > 3;
            assert!(
                !is_slowed || begin.elapsed() >= Duration::from_secs(4),
                "{refused}: {:?}",
                begin.elapsed()
            );
        }
        assert_eq!(rig.slot.status().contested.is_some(), is_contested);
        let gauge = u8::from(is_contested);
        assert!(rig.metric(&format!(r#"contested{{credential="default"}} {gauge}"#)));
    }
}

/// Without the task, since a contest ends with a token that is a minute old.
#[tokio::test]
async fn contest_ended_by_a_late_refusal_is_reported() {
    let rig = Rig::idle(json!({}), |_| {});
    let mut fetcher = rig.fetcher();
    let gauge = |value: u8| rig.metric(&format!(r#"contested{{credential="default"}} {value}"#));
    let retire = |generation| rig.slot.invalidate(generation, true, Instant::now() + Duration::from_secs(9));
    fetcher.fetch(&rig.slot, false).await;
    for generation in 1..=3 {
        assert!(rig.slot.status().contested.is_none(), "the control");
        retire(generation);
        fetcher.check_contest(&rig.slot);
        fetcher.fetch(&rig.slot, false).await;
        rig.slot.was_ended(generation);
        fetcher.check_contest(&rig.slot);
    }
    assert!(gauge(1) && rig.slot.status().contested.unwrap().over.is_none());
    // The age by the wall clock is enough, since the clock that says more counts.
    let active = rig.slot.active.load_full().unwrap();
    let sent = Moment { wall: active.sent.wall - Duration::from_secs(60), ..active.sent };
    let late = ActiveToken::new(active.token.clone(), active.lifetime, active.plan, sent);
    rig.slot.active.store(Some(Arc::new(late)));
    retire(4);
    fetcher.check_contest(&rig.slot);
    assert!(gauge(0) && rig.slot.status().contested.unwrap().over.is_some());
    assert!(fetcher.next(&rig.slot).at <= Instant::now() + schedule::MIN_GAP, "and nothing is slowed down");
}

#[tokio::test]
async fn token_fetch_in_progress_also_serves_a_refusal() {
    let rig = Rig::start(json!({ "token": [{ "after": 1, "delay_ms": 500 }] }));
    assert_eq!(rig.generation().await, 1);
    let slot = rig.slot.clone();
    let first = beside(async move { slot.replace(1, false).await.unwrap().generation() });
    until("the second fetch", || rig.calls() == 2).await;
    // A fetch of its own would be call 3, a second later.
    assert_eq!(rig.slot.replace(1, false).await.unwrap().generation(), 2);
    assert_eq!((first.await.unwrap(), rig.calls()), (2, 2));
}

#[tokio::test]
async fn failed_token_fetch_answers_all_its_waiters() {
    let rig = Rig::start(json!({ "token": [{ "after": 1, "delay_ms": 500, "status": 500 }] }));
    assert_eq!(rig.generation().await, 1);
    let slot = rig.slot.clone();
    let first = beside(async move { slot.replace(1, false).await.map(|token| token.generation()) });
    until("the second fetch", || rig.calls() == 2).await;
    let begin = Instant::now();
    assert_eq!(rig.slot.replace(1, false).await.unwrap_err(), ReplaceError::Failed(Cause::TokenStatus));
    // Half of `token.wait`: a request that waited on after the failure would need all of it.
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    assert_eq!((first.await.unwrap(), rig.calls()), (Err(ReplaceError::Failed(Cause::TokenStatus)), 2));
}

#[tokio::test]
async fn invalidated_token_is_not_used_while_another_is_fetched() {
    let rig = Rig::start(json!({ "token": [{ "after": 1, "delay_ms": 300 }] }));
    assert_eq!(rig.generation().await, 1);
    let slot = rig.slot.clone();
    let replacement = beside(async move { slot.replace(1, false).await.unwrap().generation() });
    until("the second fetch", || rig.calls() == 2).await;
    assert_eq!(rig.generation().await, 2);
    assert_eq!(replacement.await.unwrap(), 2);
}

#[tokio::test]
async fn failed_refresh_reinstates_the_invalidated_token() {
    let rig = Rig::start(json!({ "token": [{ "after": 1, "status": 500 }] }));
    assert_eq!(rig.generation().await, 1);
    assert_eq!(rig.slot.replace(1, false).await.unwrap_err(), ReplaceError::Failed(Cause::TokenStatus));
    assert_eq!((rig.generation().await, rig.calls()), (1, 2));
}

/// The upstream refuses the token while failed refreshes back off. A request that waits must shorten the back-off of up to a
/// minute.
#[tokio::test]
async fn refused_token_shortens_a_long_back_off() {
    let rig = Rig::idle(json!({}), |_| {});
    let mut fetcher = rig.fetcher();
    fetcher.fetch(&rig.slot, false).await;
    for _ in 0..10 {
        fetcher.active.retry.failed(schedule::FetchFailure::Passing, false, Instant::now(), 1.0);
    }
    let begun = fetcher.last_begun.unwrap();
    assert!(fetcher.next(&rig.slot).at > begun + Duration::from_secs(50), "the control");
    let slot = rig.slot.clone();
    let replacement = beside(async move { slot.replace(1, false).await.map(|token| token.generation()) });
    until("the wait", || rig.slot.is_awaited()).await;
    assert!(rig.slot.current().is_none());
    let at = fetcher.next(&rig.slot).at;
    assert!((begun + schedule::MIN_GAP..=begun + Duration::from_secs(3)).contains(&at), "{:?}", at - begun);
    fetcher.fetch(&rig.slot, false).await;
    assert_eq!(replacement.await.unwrap(), Ok(2));
}

#[tokio::test]
async fn refused_token_stays_in_use_while_the_endpoint_refuses_the_pair() {
    let rig = Rig::start(json!({ "token": [{ "after": 1, "status": 403 }] }));
    assert_eq!(rig.generation().await, 1);
    assert_eq!(rig.slot.replace(1, false).await.unwrap_err(), ReplaceError::Failed(Cause::TokenRefused));
    assert_eq!(rig.calls(), 2);
    let begin = Instant::now();
    assert_eq!(rig.slot.replace(1, false).await.unwrap_err(), ReplaceError::Failed(Cause::TokenRefused));
    assert!(begin.elapsed() < Duration::from_secs(10), "no wait for a fetch that cannot come");
    assert_eq!((rig.generation().await, rig.calls()), (1, 2));
}

#[tokio::test]
async fn same_token_again_is_not_a_replacement() {
    let rig = Rig::start(json!({ "habit": "same_until_expiry" }));
    assert_eq!(rig.generation().await, 1);
    assert_eq!(rig.slot.replace(1, false).await.unwrap_err(), ReplaceError::Same);
    assert_eq!((rig.generation().await, rig.calls()), (1, 2));
}

#[tokio::test]
async fn token_fetches_are_at_least_a_second_apart() {
    let rig = Rig::start(json!({ "token": [{ "times": 2, "status": 500 }] }));
    assert_eq!(rig.generation().await, 1);
    assert_eq!(rig.slot.replace(1, false).await.unwrap().generation(), 2);
    let at: Vec<_> = rig.sandbox.token_calls().iter().map(|call| call.request.at).collect();
    assert_eq!(at.len(), 4);
    for pair in at.windows(2) {
        // Less than a second: the sandbox notes when a call arrives, which on a busy machine is later for the first of two.
        assert!(pair[1] - pair[0] >= Duration::from_millis(600), "{at:?}");
    }
}

#[tokio::test]
async fn transient_token_failures_are_retried_while_requests_wait() {
    let faults = [
        json!({ "status": 408 }),
        json!({ "status": 429 }),
        json!({ "status": 503 }),
        json!({ "without": ["AccessToken"] }),
        json!({ "body": "<html>" }),
        json!({ "instead": "reset" }),
        json!({ "framing": "half_body" }),
    ];
    let tries = faults.map(|fault| {
        beside(async move {
            let mut once = fault.clone();
            once["times"] = json!(1);
            let rig = Rig::start(json!({ "token": [once] }));
            let begin = Instant::now();
            assert_eq!((rig.generation().await, rig.calls()), (1, 2), "{fault}");
            // While a request waits, the next try comes after 3 s at most: `MIN_GAP` and `URGENT`.
            assert!(begin.elapsed() < Duration::from_secs(3) * MARGIN, "{fault}: {:?}", begin.elapsed());
        })
    });
    for tried in tries {
        tried.await.unwrap();
    }
}

#[tokio::test]
async fn timed_out_token_fetch_is_retried() {
    let rig = Rig::start_with(json!({ "token": [{ "times": 1, "instead": "hang" }] }), |token| {
        token.timeout = Duration::from_millis(200);
    });
    assert_eq!((rig.generation().await, rig.calls()), (1, 2));
    assert!(rig.metric(r#"fetches_total{credential="default",result="timeout"} 1"#));
}

#[tokio::test]
async fn missing_token_error_has_a_retry_after() {
    let rig = Rig::start_with(json!({ "token": [{ "instead": "hang" }] }), |token| {
        token.wait = Duration::from_millis(100);
    });
    let error = rig.slot.token().await.unwrap_err();
    assert_eq!(
        error,
        NoUsableToken::Unavailable { cause: Cause::Timeout, retry_after: Duration::from_secs(1) }
    );
}

#[tokio::test]
async fn retry_after_of_the_endpoint_is_honoured_up_to_a_minute() {
    let rig = Rig::start_with(
        json!({ "token": [{ "status": 503, "headers": [["Retry-After", "3600"]] }] }),
        |token| token.wait = Duration::from_secs(10),
    );
    // The second request must not cause a call, though there is no token.
    for _ in 0..2 {
        match rig.slot.token().await.unwrap_err() {
            NoUsableToken::Unavailable { cause: Cause::TokenStatus, retry_after } => {
                assert!((30..=60).contains(&retry_after.as_secs()), "{retry_after:?}");
            }
            error => panic!("{error}"),
        }
    }
    assert_eq!(rig.calls(), 1);
}

#[tokio::test]
async fn requests_wait_out_a_short_retry_after() {
    let rig =
        Rig::start(json!({ "token": [{ "times": 1, "status": 429, "headers": [["Retry-After", "3"]] }] }));
    assert_eq!(rig.generation().await, 1);
    let at: Vec<_> = rig.sandbox.token_calls().iter().map(|call| call.request.at).collect();
    assert!(at.len() == 2 && at[1] - at[0] >= Duration::from_millis(2500), "{at:?}");
}

#[tokio::test]
async fn refused_pair_is_remembered_until_it_changes() {
    // The secret changes for one status only: that part takes seconds and does not depend on the status.
    for status in [400, 401, 403, 418] {
        let rig = Rig::start(json!({ "token": [{ "times": 1, "status": status }] }));
        for _ in 0..2 {
            match rig.slot.token().await.unwrap_err() {
                NoUsableToken::CredentialRefused { retry_after } => {
                    // The first pause is 30 s; the test may have spent a part of it.
                    assert!((15..=30).contains(&retry_after.as_secs()), "{status}: {retry_after:?}");
                }
                error @ NoUsableToken::Unavailable { .. } => panic!("{status}: {error}"),
            }
        }
        assert_eq!(rig.calls(), 1, "{status}");
        if status == 403 {
            rig.sandbox.secret("sandbox-app-key", "changed");
            rig.write("app_secret", "changed");
            until("the new pair's token", || rig.slot.current().is_some()).await;
            assert_eq!((rig.calls(), rig.told()), (2, vec!["accepted".to_owned()]));
        }
    }
}

#[tokio::test]
async fn active_token_serves_until_expiry_while_the_pair_is_refused() {
    let rig = Rig::start(json!({ "lifetime_ms": 6000, "token": [{ "after": 1, "status": 403 }] }));
    assert_eq!(rig.generation().await, 1);
    until("the refused refresh", || rig.calls() == 2).await;
    until("the end of the fetch", || failing(&rig.slot) == Some(Cause::TokenRefused)).await;
    assert_eq!(rig.generation().await, 1);
    until("the end of the token", || rig.slot.current().is_none()).await;
    assert!(matches!(rig.slot.token().await, Err(NoUsableToken::CredentialRefused { .. })));
    // The request without a token must not shorten the pause: each call with a refused pair may lock the account.
    assert_eq!(rig.calls(), 2);
}

#[tokio::test]
async fn configured_token_lifetime_is_requested() {
    for (lifetime, asked) in [(Some(3600), Some("3600")), (Some(600), Some("600")), (None, None)] {
        let rig = Rig::start_with(json!({}), |token| token.lifetime = lifetime.map(Duration::from_secs));
        assert_eq!(rig.generation().await, 1);
        assert_eq!(rig.sandbox.token_calls()[0].asked.as_deref(), asked);
    }
}

#[tokio::test]
async fn token_lifetime_starts_when_its_request_is_sent() {
    let rig = Rig::start(json!({ "lifetime_ms": 60_000, "token": [{ "delay_ms": 1500 }] }));
    let begin = Instant::now();
    assert_eq!(rig.generation().await, 1);
    let active = rig.slot.active.load_full().unwrap();
    // Counted from the reply, the token would live 1.5 s longer here than at the endpoint.
    assert!(
        active.sent.monotonic >= begin && active.age() >= Duration::from_millis(1500),
        "{:?}",
        active.age()
    );
    assert_eq!(active.lifetime, Duration::from_secs(60));
}

#[tokio::test]
async fn jump_of_either_clock_ends_a_token_early_and_never_late() {
    let rig = Rig::start(json!({ "lifetime_ms": 60_000 }));
    assert_eq!(rig.generation().await, 1);
    // The clocks of the machine cannot be set here, so the token's begin is moved the other way.
    let hour = Duration::from_secs(3600);
    let jumped = |wall: SystemTime, slept: u64| {
        let active = rig.slot.active.load_full().unwrap();
        let ActiveToken { token, lifetime, plan, sent, .. } = &*active;
        ActiveToken::new(token.clone(), *lifetime, *plan, Moment { wall, now: sent.now - slept, ..*sent })
    };
    let now = SystemTime::now();
    assert!(jumped(now, 0).is_usable(), "the control");
    assert!(jumped(now + hour, 0).is_usable(), "the wall clock was set back: the other one counts");
    assert!(!jumped(now - hour, 0).is_usable(), "the wall clock was set forward");
    assert!(
        !jumped(now + hour, 3600 * 1_000_000_000).is_usable(),
        "the machine slept, and the wall clock was set back"
    );
    rig.slot.active.store(Some(Arc::new(jumped(now - hour, 0))));
    rig.slot.wake.notify_one();
    assert_eq!(rig.generation().await, 2);
}

#[tokio::test]
async fn clock_skew_is_reported_and_changes_no_token_lifetime() {
    let rig = Rig::start(json!({ "lifetime_ms": 60_000, "token": [{ "skew_s": -86400 }] }));
    assert_eq!(rig.generation().await, 1);
    assert_eq!(rig.slot.active.load_full().unwrap().lifetime, Duration::from_secs(60));
    // The endpoint's clock is a day behind; a few seconds may pass between its reply and the reading of our clock.
    let told =
        (-86405..=-86395).any(|skew| rig.metric(&format!(r#"skew_seconds{{credential="default"}} {skew}"#)));
    assert!(told);
}

#[tokio::test]
async fn same_token_keeps_its_first_expiry_and_is_used_until_then() {
    let rig = Rig::start(json!({ "lifetime_ms": 4000, "habit": "same_until_expiry" }));
    assert_eq!(rig.generation().await, 1);
    let first = rig.slot.active.load_full().unwrap();
    until("the refresh", || rig.calls() == 2).await;
    // The plan changes once the second call has brought the same token.
    until("its end", || {
        rig.slot.active.load().as_ref().is_some_and(|active| active.plan.stop == active.lifetime)
    })
    .await;
    let again = rig.slot.active.load_full().unwrap();
    assert_eq!((again.lifetime, again.sent.monotonic), (first.lifetime, first.sent.monotonic));
    assert!(again.plan.stop > first.plan.stop);
    until("the token's end", || !again.is_usable()).await;
    assert_eq!(rig.generation().await, 2, "then there is another");
}

#[test]
fn restated_shorter_lifetime_ends_earlier_except_for_rounding() {
    let source = || SecretSource::Env("CARGO_PKG_NAME".into());
    let pair = AppKeyPair::load(&(source(), source())).unwrap();
    let token = Token::new(HeaderValue::from_static("Bearer t"), &pair, 1);
    let lifetime = Duration::from_secs(600);
    let active = ActiveToken::new(token, lifetime, Plan::new(lifetime, 0.0), Moment::now());
    let minutes_later = Moment {
        now: active.sent.now + 120_000_000_000,
        wall: active.sent.wall + Duration::from_secs(120),
        ..active.sent
    };
    // After 120 s of 600: all of it again, the exact rest, the rest rounded down, a second less, and far less.
    for (stated, end) in [(600, 600), (480, 600), (479, 600), (478, 598), (60, 180)] {
        let again = active.to_the_end(Duration::from_secs(stated), minutes_later);
        assert_eq!((again.lifetime.as_secs(), again.plan.stop.as_secs()), (end, end), "{stated}");
    }
}

#[tokio::test]
async fn changed_pair_is_tried_and_its_token_becomes_active() {
    let rig = Rig::start(json!({}));
    assert_eq!(rig.generation().await, 1);
    rig.sandbox.secret("key-2", "secret-2");
    rig.write("app_key", "key-2\n");
    rig.write("app_secret", "secret-2\n");
    until("the trial", || rig.told() == ["accepted"]).await;
    let token = rig.slot.token().await.unwrap();
    assert_eq!((token.generation(), token.app_key().as_bytes()), (2, b"key-2".as_slice()));
    // The token of the candidate itself, and no third call: one that is thrown away would cost a token.
    let issued = rig.sandbox.token_calls()[1].issued.clone().unwrap();
    assert_eq!(token.authorization().as_bytes(), format!("Bearer {issued}").as_bytes());
    assert_eq!(rig.calls(), 2);
    assert!(rig.metric(r#"secret_reloads_total{credential="default",result="accepted"} 1"#));
}

#[tokio::test]
async fn mixed_pair_is_refused_and_the_complete_pair_is_tried_at_once() {
    let rig = Rig::start(json!({}));
    assert_eq!(rig.generation().await, 1);
    rig.sandbox.secret("key-2", "secret-2");
    // Written apart by more than two checks, so that the pair in between is read twice and counts as a change.
    rig.write("app_key", "key-2");
    until("the mixed pair's refusal", || rig.told() == ["refused"]).await;
    assert_eq!(rig.generation().await, 1, "the old token stays in use");
    let whole = Instant::now();
    rig.write("app_secret", "secret-2");
    until("the whole pair's trial", || rig.told() == ["refused", "accepted"]).await;
    assert!(whole.elapsed() < Duration::from_secs(3) * MARGIN, "{:?}", whole.elapsed());
    assert_eq!((rig.generation().await, rig.calls()), (2, 3));
}

#[tokio::test]
async fn candidate_with_a_transient_failure_is_retried() {
    let rig = Rig::start(json!({ "token": [{ "after": 1, "times": 2, "status": 500 }] }));
    assert_eq!(rig.generation().await, 1);
    rig.sandbox.secret("sandbox-app-key", "secret-2");
    rig.write("app_secret", "secret-2");
    until("the failed trial", || rig.told() == ["postponed"]).await;
    assert_eq!(rig.generation().await, 1, "the old token stays in use");
    until("the next trial", || rig.told() == ["postponed", "accepted"]).await;
    assert_eq!((rig.generation().await, rig.calls()), (2, 4));
}

#[tokio::test]
async fn empty_secret_file_creates_no_candidate() {
    let rig = Rig::start(json!({}));
    assert_eq!(rig.generation().await, 1);
    rig.write("app_secret", "");
    rig.looks(2).await;
    rig.write("app_secret", "sandbox-app-secret");
    rig.looks(2).await;
    assert_eq!((rig.calls(), rig.told().len()), (1, 0));
    // The control: a change of this file is noticed.
    rig.write("app_secret", "wrong");
    until("the control", || rig.told() == ["refused"]).await;
}

/// Without the task, since a refusal is remembered for longer than a test may take.
#[tokio::test]
async fn refused_candidate_keeps_the_active_schedule_and_is_retried_later() {
    let rig = Rig::idle(json!({}), |_| {});
    let mut fetcher = rig.fetcher();
    fetcher.fetch(&rig.slot, false).await;
    rig.write("app_secret", "of-tomorrow");
    // A change counts once two checks agree.
    for _ in 0..2 {
        fetcher.check_secrets(&rig.slot).await;
    }
    assert!(fetcher.next(&rig.slot).is_candidate);
    fetcher.fetch(&rig.slot, true).await;
    assert_eq!(rig.told(), ["refused"]);
    let next = fetcher.next(&rig.slot);
    let pause = next.at - Instant::now();
    assert!(next.is_candidate && (20..=30).contains(&pause.as_secs()), "{pause:?}");
    assert!(fetcher.active.retry.at(false, None) <= Instant::now(), "the old pair may be used at any time");
    assert!(rig.slot.token().await.is_ok() && failing(&rig.slot).is_none());

    // The cloud now accepts the new secret only. The old pair fails at its next refresh, and the candidate is accepted.
    rig.sandbox.secret("sandbox-app-key", "of-tomorrow");
    fetcher.fetch(&rig.slot, false).await;
    assert_eq!(failing(&rig.slot), Some(Cause::TokenRefused));
    fetcher.fetch(&rig.slot, true).await;
    assert_eq!((rig.told(), rig.generation().await), (vec!["refused".to_owned(), "accepted".to_owned()], 2));
    assert!(fetcher.candidate.is_none() && fetcher.next(&rig.slot).at > next.at);
}

/// The error of a request while a changed pair is the candidate.
#[tokio::test]
async fn refusal_of_the_active_pair_is_final_only_without_a_candidate() {
    let rig = Rig::idle(json!({}), |token| token.wait = Duration::from_millis(50));
    rig.sandbox.secret("sandbox-app-key", "of-tomorrow");
    let mut fetcher = rig.fetcher();
    fetcher.fetch(&rig.slot, false).await;
    assert!(matches!(rig.slot.token().await, Err(NoUsableToken::CredentialRefused { .. })), "the control");
    rig.write("app_secret", "wrong");
    for _ in 0..2 {
        fetcher.check_secrets(&rig.slot).await;
    }
    assert!(matches!(rig.slot.token().await, Err(NoUsableToken::Unavailable { .. })), "a trial is to come");
    // Both pairs are refused now, so that nothing is left to wait for.
    fetcher.fetch(&rig.slot, true).await;
    fetcher.fetch(&rig.slot, false).await;
    assert!(matches!(rig.slot.token().await, Err(NoUsableToken::CredentialRefused { .. })));
}

#[tokio::test]
async fn failed_candidate_does_not_answer_a_refusal_of_the_active_token() {
    let rig = Rig::idle(json!({ "token": [{ "after": 1, "times": 1, "status": 500 }] }), |_| {});
    let mut fetcher = rig.fetcher();
    fetcher.fetch(&rig.slot, false).await;
    rig.write("app_secret", "wrong");
    for _ in 0..2 {
        fetcher.check_secrets(&rig.slot).await;
    }
    let slot = rig.slot.clone();
    let replacement = beside(async move { slot.replace(1, false).await.map(|token| token.generation()) });
    until("the wait", || rig.slot.is_awaited()).await;
    // The candidate says nothing of the refused token: it stays invalidated, and the request waits for the pair in use.
    fetcher.fetch(&rig.slot, true).await;
    assert!(rig.slot.current().is_none() && !replacement.is_finished());
    fetcher.fetch(&rig.slot, false).await;
    assert_eq!(replacement.await.unwrap(), Ok(2));
}

#[tokio::test]
async fn debug_error_and_status_output_contain_no_credential() {
    let rig = Rig::start(json!({}));
    let token = rig.slot.token().await.unwrap();
    let issued = rig.sandbox.token_calls()[0].issued.clone().unwrap();
    let status = serde_json::to_string(&rig.slot.status()).unwrap();
    let error = FetchError::Invalid("x");
    let printed = format!("{token:?} {:?} {error} {status} {:?}", rig.slot, token.authorization());
    assert!(printed.contains("generation 1"), "{printed}");
    for secret in [issued.as_str(), "sandbox-app-secret", "sandbox-app-key"] {
        assert!(!printed.contains(secret), "{printed}");
    }
}
