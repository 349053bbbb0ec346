//! Many calls with keys under faults and kills. Each is repeated until it is answered, or in doubt.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use ccsqm_gateway::sandbox::Then;

use super::*;

const CALLERS: usize = 16;

/// So many keys are settled between two kills, and more of many.
const KILL_EVERY: usize = 250;

/// What a caller was told of its key at last.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Told {
    Answer(u16, String),
    Doubt,
}

struct Load {
    /// The next key, which is the task's number, too.
    next: AtomicUsize,
    keys: usize,
    told: Mutex<HashMap<usize, Told>>,
    /// Where the gateway is, while it is there.
    gateway: Mutex<Option<SocketAddr>>,
}

/// Of 40 calls seven meet a fault of their own.
fn seven_of_40() -> Faults {
    let faults = [
        Fault::instead(Instead::Reset),
        Fault::status(503).with_body("busy"),
        Fault::status(500).with_body("{}"),
        Fault::then(Then::CloseIdle(0)),
        Fault::status(429),
        Fault::failure("0409001"),
        Fault::delayed(900),
    ];
    let round = |round: u64| {
        let places = (round * 40 + 3..).step_by(5);
        faults.clone().into_iter().zip(places).map(|(fault, place)| fault.after(place).times(1))
    };
    Faults::business((0..20).flat_map(round).collect::<Vec<_>>())
}

impl Load {
    /// One try; nothing if there is no whole answer. A caller that leaves waits for none.
    fn call(&self, number: usize, leaves: bool) -> Option<Reply> {
        let address = (*self.gateway.lock().unwrap())?;
        let body = BODY.replace("\"954645333549048833\"", &number.to_string());
        let mut stream = TcpStream::connect(address).ok()?;
        stream.write_all((head(body.len(), &key(&format!("key-{number}"))) + &body).as_bytes()).ok()?;
        if leaves {
            return None;
        }
        let reply = read_reply(&mut stream);
        let length = reply.headers.get("content-length").and_then(|length| length.parse().ok());
        (length == Some(reply.body.len())).then_some(reply)
    }

    fn settle(&self, number: usize) -> Told {
        let mut tries = 0;
        wait_for("an answer", || {
            tries += 1;
            let reply = self.call(number, tries == 1 && number.is_multiple_of(10))?;
            match reply.outcome() {
                "succeeded" | "failed" | "replayed" => Some(Told::Answer(reply.status, reply.body)),
                "unknown" if reply.code() != "request_in_progress" => Some(Told::Doubt),
                _ => None,
            }
        })
    }

    fn work(&self) {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number > self.keys {
                return;
            }
            let told = self.settle(number);
            self.told.lock().unwrap().insert(number, told);
        }
    }

    fn settled(&self) -> usize {
        self.told.lock().unwrap().len()
    }
}

/// Starts, serves and kills the gateway until all keys are settled; returns its folder and the number of kills.
fn kill_and_start(
    sandbox: &Sandbox,
    load: &Load,
    setup: impl Fn() -> Setup,
) -> (Option<Arc<TempDir>>, usize) {
    let (mut folder, mut kills) = (None, 0);
    while load.settled() < load.keys {
        script(sandbox, seven_of_40());
        let gateway = start_keyed(sandbox, Setup { folder: folder.take(), ..setup() });
        *load.gateway.lock().unwrap() = Some(gateway.address);
        let enough = (load.settled() + KILL_EVERY.max(load.keys / 200)).min(load.keys);
        wait_for("keys that are settled", || (load.settled() >= enough).then_some(()));
        *load.gateway.lock().unwrap() = None;
        folder = Some(gateway.kill());
        kills += 1;
    }
    (folder, kills)
}

/// `CCSQM_GATEWAY_TEST_KEYS` says how many keys; up to 100,000, for more the sandbox does not remember.
#[test]
fn through_faults_and_kills_no_key_is_sent_twice() {
    let keys = std::env::var("CCSQM_GATEWAY_TEST_KEYS").map_or(1_000, |keys| keys.parse().unwrap());
    let sandbox = sandbox();
    let load = Load { next: AtomicUsize::new(1), keys, told: Mutex::default(), gateway: Mutex::new(None) };
    let setup = || Setup::default().set("upstream.timeout", "700ms").set("upstream.connect_timeout", "500ms");
    let (folder, kills) = thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| load.work());
        }
        kill_and_start(&sandbox, &load, setup)
    });

    // What the upstream received of each task, but for what it refused: that was given back, and may come again.
    let mut received = HashMap::<u64, usize>::new();
    for request in sandbox.requests().iter().filter(|request| request.status != Some(429)) {
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        *received.entry(body["qualityTaskId"].as_u64().unwrap_or(0)).or_default() += 1;
    }
    received.remove(&0); // cut off before its task was said
    assert!(received.len() > keys / 2, "{} tasks", received.len());
    let twice: Vec<_> = received.iter().filter(|(_, count)| **count > 1).collect();
    assert!(twice.is_empty(), "sent twice: {twice:?}");

    let told = load.told.lock().unwrap();
    let answered = told.values().filter(|told| **told != Told::Doubt).count();
    println!("{keys} keys, {kills} kills, {answered} answered, {} in doubt", keys - answered);
    assert!(answered > keys / 2 && answered < keys, "{answered} of {keys}: the faults are alive");
    for (number, told) in &*told {
        assert!(
            *told == Told::Doubt || received.contains_key(&(*number as u64)),
            "{number}: {told:?}, but never sent"
        );
    }

    // With nobody behind it, the gateway tells each caller what it told it before.
    let urls = (Some(sandbox.url()), Some(sandbox.token_url()));
    drop(sandbox);
    let elsewhere = crate::support::sandbox();
    let gateway =
        start_keyed(&elsewhere, Setup { folder, base_url: urls.0, token_url: urls.1, ..Setup::default() });
    *load.gateway.lock().unwrap() = Some(gateway.address);
    for (number, before) in &*told {
        let reply = load.call(*number, false).unwrap();
        let now = match reply.code() {
            "outcome_unknown" => Told::Doubt,
            _ => Told::Answer(reply.status, reply.body),
        };
        assert_eq!(now, *before, "{number}");
    }
}
