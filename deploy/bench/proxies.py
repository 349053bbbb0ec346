"""The processes of the bench: the upstreams, the proxies, and the load; and what must add up between them.

Every child dies with this process. A proxy runs on PROXY_CORES, load and upstreams on LOAD_CORES.
"""

import atexit
import ctypes
import glob
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
WORK = os.path.join(ROOT, "target", "bench")
LOGS = os.path.join(WORK, "logs")
PEERS = os.path.join(HERE, "peers")
BODY = os.path.join(HERE, "body.json")
GATEWAY = os.path.join(ROOT, "target", "dist", "ccsqm-gateway")
APPOINT = "/apiaccess/CCSQM/rest/ccisqm/v1/qualitytask/appointQualityTask"

ALL_CORES = os.sched_getaffinity(0)
PROXY_CORES, LOAD_CORES = ({0}, {1}) if {0, 1} <= ALL_CORES else (ALL_CORES, ALL_CORES)
# Two workers need two cores; a machine with four can keep the load off them.
PAIR_CORES = {0, 2} if {0, 1, 2, 3} <= ALL_CORES else {0, 1}

# 10,000 idle connections and what they bring; a container may not let even root go beyond its limit.
FILES = 20000
PR_SET_PDEATHSIG = 1


class Invalid(Exception):
    """The measurement can't be believed: something did not do all of its work."""


# ---- processes

children = []


def raise_file_limit():
    """For this process and its children."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, max(FILES, hard)))
    except (ValueError, OSError):
        sys.exit(f"{FILES} open files are needed, and the limit here is {hard}")


def spawn(command, cores, **options):
    """Starts a child on these cores that can't outlive this process."""

    def prepare():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.sched_setaffinity(0, cores)

    child = subprocess.Popen(command, preexec_fn=prepare, **options)
    children.append(child)
    return child


def stop(child, how=signal.SIGTERM, patience=15):
    """Ends a child; one that does not want to is killed."""
    if child.poll() is None:
        child.send_signal(how)
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child in children:
        children.remove(child)


def place(pid, cores):
    """Moves a running process, all its threads, to these cores."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), cores)


@atexit.register
def stop_all():
    for child in list(children):
        stop(child, signal.SIGKILL)


def leave_on_signals():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def wait_for(what, condition, patience=20.0):
    deadline = time.monotonic() + patience
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise Invalid(f"waited {patience:.0f} s in vain for {what}")
        time.sleep(0.01)
    return result


next_port = 21100


def port():
    """A free port below those that the kernel hands out."""
    global next_port
    while True:
        next_port += 1
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", next_port))
                return next_port
            except OSError:
                continue


def listens(number):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", number)) == 0


def fetch(number, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{number}{path}", timeout=10) as reply:
        return reply.read().decode()


def fill(template, tags, values):
    """A template with its places filled. A line "@tag text" stays, as text, only for proxies with that tag."""
    with open(os.path.join(PEERS, template)) as file:
        lines = file.read().splitlines()
    kept = []
    for line in lines:
        if match := re.match(r"@(\w+) (.*)", line):
            if match[1] not in tags:
                continue
            line = match[2]
        kept.append(line)
    text = "\n".join(kept) + "\n"
    for key, value in values.items():
        text = text.replace("{" + key + "}", str(value))
    return text


def write(name, text):
    path = os.path.join(WORK, name)
    with open(path, "w") as file:
        file.write(text)
    return path


# ---- upstreams


class PlainUpstream:
    """Answers business calls, counts them, and those that lack one of the three headers."""

    def __init__(self):
        self.ports = {"plain": port()}

    def start(self):
        self.child = spawn([f"{WORK}/ups", str(self.ports["plain"])], LOAD_CORES)
        wait_for("the plain upstream", lambda: listens(self.ports["plain"]))

    def counts(self):
        """Requests so far, and how many of them lacked a header."""
        counts = json.loads(fetch(self.ports["plain"], "/_counts"))
        return counts["requests"], counts["missing"]


class TlsUpstream:
    """nginx. A request that lacks a header gets 400 there, so that no load run can end well."""

    def __init__(self):
        self.ports = {"tls1": port(), "h2": port()}
        self.counts_port = port()
        self.asked = 0

    def start(self):
        values = dict(
            work=WORK, logs=LOGS, h1=self.ports["tls1"], h2=self.ports["h2"], counts=self.counts_port
        )
        path = write("upstream.conf", fill("upstream.conf", [], values))
        self.child = spawn(["nginx", "-c", path, "-e", f"{LOGS}/upstream.err"], LOAD_CORES)
        wait_for("the TLS upstream", lambda: listens(self.counts_port))

    def counts(self):
        self.asked += 1
        requests = int(fetch(self.counts_port, "/_counts").split()[9])
        return requests - self.asked, 0


# ---- proxies


class Proxy:
    """One proxy with one configuration. `tags` choose lines of its template."""

    injects = True

    def __init__(self, label, upstreams, transport="plain", tags=()):
        self.label = label
        self.transport = transport
        self.upstream = upstreams[transport]
        self.name = re.sub(r"\W+", "-", f"{label}-{transport}").strip("-").lower()
        self.tags = {transport, *(["tls"] if transport != "plain" else []), *tags}
        self.cores = PROXY_CORES
        self.answered = 0  # what load saw answered since the start
        self.child = None
        self.upstreams = upstreams

    def configure(self):
        self.port = port()
        return dict(
            name=self.name,
            port=self.port,
            upstream=self.upstream.ports[self.transport],
            work=WORK,
            logs=LOGS,
            peers=PEERS,
            root=ROOT,
            lua=lua_modules(),
        )

    def command(self):
        raise NotImplementedError

    def start(self, prefix=()):
        command = [*prefix, *self.command()]
        self.answered = 0
        with open(f"{LOGS}/{self.name}.out", "a") as out:
            self.child = spawn(command, self.cores, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        wait_for(f"{self.name} (see {LOGS}/{self.name}.out)", self.is_up, 60)
        return self

    def is_up(self):
        if self.child.poll() is not None:
            raise Invalid(
                f"{self.name} ended with status {self.child.returncode}; see {LOGS}/{self.name}.out"
            )
        return listens(self.port)

    def rss_kib(self):
        with open(f"/proc/{self.child.pid}/status") as file:
            return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1])

    def account(self):
        """Raises Invalid unless all the work of all requests was done."""

    def stop(self):
        if self.child:
            stop(self.child)
            self.child = None

    def forget_logs(self):
        for path in glob.glob(f"{LOGS}/{self.name}.*"):
            os.truncate(path, 0)  # all of them are open for appending


class Pump(Proxy):
    injects = False

    def command(self):
        values = self.configure()
        return [f"{WORK}/pump", str(self.port), str(values["upstream"])]


class Nginx(Proxy):
    def command(self):
        path = write(f"{self.name}.conf", fill("nginx.conf", self.tags, self.configure()))
        return ["nginx", "-c", path, "-e", f"{LOGS}/{self.name}.err"]


class Haproxy(Proxy):
    def command(self):
        path = write(f"{self.name}.cfg", fill("haproxy.cfg", self.tags, self.configure()))
        return ["haproxy", "-f", path]


class Envoy(Proxy):
    def command(self):
        path = write(f"{self.name}.json", fill("envoy.json", self.tags, self.configure()))
        options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
        return [f"{WORK}/envoy", "-c", path, *options]


class Gateway(Proxy):
    """The gateway as users run it. Its own counts, its trail and what load saw must agree."""

    workers = 1
    callers = 1
    routes = 1
    durability = "kernel"

    def configure(self):
        values = super().configure()
        self.admin = port()
        self.audit = f"{WORK}/audit-{self.name}"
        shutil.rmtree(self.audit, ignore_errors=True)
        names = ["appointQualityTask", *(f"route{i}" for i in range(1, self.routes))]
        routes = ", ".join(f'"{name}"' for name in names)
        return dict(
            values,
            admin=self.admin,
            workers=self.workers,
            audit=self.audit,
            durability=self.durability,
            sandbox=self.upstreams["sandbox"],
            routes=routes,
        )

    def write_configuration(self):
        tags = self.tags | ({"callers"} if self.callers > 1 else set())
        return write(
            f"{self.name}.toml", fill("gateway.toml", tags, self.configure()) + self.more_configuration()
        )

    def command(self):
        return [GATEWAY, "serve", "--config", self.write_configuration()]

    @property
    def path(self):
        """What load calls: the route that was configured last."""
        return APPOINT if self.routes == 1 else f"/apiaccess/bench/route{self.routes - 1}"

    def more_configuration(self):
        callers = [
            f'\n[[callers]]\nname = "caller{i}"\npeer = "uid:{100000 + i}"\noperator_id = "{i}"\n'
            'credential = "default"\nroutes = ["appointQualityTask"]\n'
            for i in range(1, self.callers)
        ]
        routes = [
            f'\n[[routes]]\nname = "route{i}"\npath = "/apiaccess/bench/route{i}"\nsuccess_codes = ["0409000"]\n'
            f'contract_file = "{ROOT}/config/contracts/appointQualityTask.json"\n'
            for i in range(1, self.routes)
        ]
        return "".join(callers + routes)

    def is_up(self):
        if not super().is_up():
            return False
        try:
            return "true" in fetch(self.admin, "/readyz")
        except OSError:
            return False

    def metrics(self):
        samples = {}
        for line in fetch(self.admin, "/metrics").splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                samples[name.removeprefix("ccsqm_gateway_")] = float(value)
        return samples

    def totals(self):
        """Its own counts of what must have happened once, or twice, for each request."""
        samples = self.metrics()

        def total(name, *labels):
            return int(
                sum(
                    value
                    for key, value in samples.items()
                    if key.split("{")[0] == name and all(label in key for label in labels)
                )
            )

        return {
            "requests": total("requests_total"),
            "succeeded": total("requests_total", 'outcome="succeeded"'),
            "rate limit checks": total("limit_checks_total", 'limit="rate_limit"'),
            "quota checks": total("limit_checks_total", 'limit="quota"'),
            "intents": total("audit_records_total", 'kind="intent"'),
            "outcomes": total("audit_records_total", 'kind="outcome"'),
        }, total("token_fetches_total", 'result="ok"')

    def batches(self):
        """Audit records and batches written, fdatasyncs, and the seconds that these took."""
        samples = self.metrics()
        records = sum(value for key, value in samples.items() if key.startswith("audit_records_total{"))
        names = ("audit_batches_total", "audit_syncs_total", "audit_sync_seconds_total")
        return [records, *(samples[name] for name in names)]

    def account(self):
        expected = self.answered

        def agree():
            counts, _ = self.totals()
            return all(count == expected for count in counts.values())

        try:
            wait_for("the audit writer", agree, 5)
        except Invalid:
            counts = self.totals()[0]
            raise Invalid(f"{self.name}: load saw {expected} answers, the gateway counts {counts}") from None
        fetches = self.totals()[1]
        if fetches < 1:
            raise Invalid(f"{self.name}: no token was fetched")
        self.stop()
        intents, outcomes = self.trail()
        if (intents, outcomes) != (expected, expected):
            raise Invalid(
                f"{self.name}: {expected} answers, but {intents} intents and {outcomes} outcomes in {self.audit}"
            )
        verified = subprocess.run([GATEWAY, "audit", "verify", self.audit], capture_output=True, text=True)
        if verified.returncode != 0:
            raise Invalid(f"{self.name}: the trail does not verify: {verified.stdout}{verified.stderr}")
        shutil.rmtree(self.audit)
        return {"requests": expected, "audit records": intents + outcomes, "token fetches": fetches}

    def trail(self):
        """Intents and outcomes in the files."""
        intents = outcomes = 0
        for path in glob.glob(f"{self.audit}/audit-*.jsonl"):
            with open(path, "rb") as file:
                for line in file:
                    intents += b',"kind":"intent",' in line
                    outcomes += b',"kind":"outcome",' in line
        return intents, outcomes


def lua_modules():
    found = glob.glob("/usr/lib/*/lua/5.1/cjson.so")
    return os.path.dirname(found[0]) if found else "/usr/lib/lua/5.1"


def start_upstreams():
    """Upstreams by transport, and the port of the token endpoint."""
    os.makedirs(LOGS, exist_ok=True)
    plain, tls = PlainUpstream(), TlsUpstream()
    for upstream in (plain, tls):
        upstream.start()
    return {"plain": plain, "tls1": tls, "h2": tls, "sandbox": start_sandbox()}


def start_sandbox():
    """The token endpoint; business calls go to the fast upstream."""
    number = port()
    with open(f"{LOGS}/sandbox.out", "a") as out:
        spawn([GATEWAY, "sandbox", "--listen", f"127.0.0.1:{number}"], LOAD_CORES, stdout=out, stderr=out)
    wait_for("the sandbox", lambda: listens(number))
    return number


def gateway_speaks_h2(upstreams):
    """Whether this build knows `http2`; one that does not gets no HTTP/2 figures."""
    probe = Gateway("probe", upstreams, "h2")
    command = [GATEWAY, "check", "--config", probe.write_configuration()]
    return subprocess.run(command, capture_output=True).returncode == 0


def fdatasync_ms(count=200):
    """Milliseconds of a bare fdatasync after an append of 4 KiB, where the audit trail is: the median."""
    path, took = f"{WORK}/fdatasync", []
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for _ in range(count):
        os.write(file, bytes(4096))
        began = time.perf_counter()
        os.fdatasync(file)
        took.append(1000 * (time.perf_counter() - began))
    os.close(file)
    os.unlink(path)
    return sorted(took)[count // 2]


# ---- load


def body_of(size):
    """A body that the contract accepts, of about this size."""
    path = f"{WORK}/body-{size}.json"
    digits = random.Random(size)
    items, length = [], 90
    while length < size:
        person = "".join(digits.choices(string.digits, k=44)) + f"{len(items):06}"
        items.append(f'{{"personID":"{person}","count":2}}')
        length += len(items[-1]) + 1
    head = '{"qualityTaskId":"954645333549048833","setCountsType":1,"isTakeEffect":0,"setCounts":['
    with open(path, "w") as file:
        file.write(head + ",".join(items) + "]}")
    return path


def load(proxy, *arguments, cores=LOAD_CORES, body=BODY, **options):
    """Runs load against a proxy, and holds what it saw against what the upstream saw."""
    path = getattr(proxy, "path", APPOINT)
    command = [
        f"{WORK}/load",
        "--port",
        str(proxy.port),
        "--body",
        body,
        "--path",
        path,
        *map(str, arguments),
    ]
    before = proxy.upstream.counts()
    child = spawn(command, cores, stdout=subprocess.PIPE, text=True, **options)
    try:
        out, _ = child.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        raise Invalid(f"{proxy.name} does not answer all that load sends") from None
    children.remove(child)
    if child.returncode != 0:
        raise Invalid(f"load failed on {proxy.name}")
    seen = json.loads(out)
    proxy.answered += seen["answered"]
    check(proxy, seen, before)
    return seen


def check(proxy, seen, before):
    after = proxy.upstream.counts()
    requests, missing = after[0] - before[0], after[1] - before[1]
    if seen["bad"]:
        raise Invalid(f"{proxy.name}: {seen['bad']} of {seen['answered']} answers were not 200")
    if requests != seen["answered"]:
        raise Invalid(f"{proxy.name}: {seen['answered']} answers, but the upstream received {requests}")
    if proxy.injects and missing:
        raise Invalid(
            f"{proxy.name}: {missing} requests reached the upstream without one of the three headers"
        )


def window(proxy, connections, seconds, rate=0, warm=0.1, **options):
    """One slice: CPU and latency of a proxy that is busy with so many connections."""
    seen = load(
        proxy,
        "--connections",
        connections,
        "--seconds",
        seconds,
        "--rate",
        rate,
        "--warm",
        warm,
        "--watch",
        proxy.child.pid,
        **options,
    )
    if not seen["window"]:
        raise Invalid(f"{proxy.name}: no answer within the window")
    return seen


class Idle:
    """Connections that have had one answer each and idle until the end of the `with`."""

    def __init__(self, proxy, connections):
        self.proxy, self.connections = proxy, connections

    def __enter__(self):
        before = self.proxy.upstream.counts()
        command = [
            f"{WORK}/load",
            "--port",
            str(self.proxy.port),
            "--body",
            BODY,
            "--connections",
            str(self.connections),
            "--hold",
        ]
        self.child = spawn(command, LOAD_CORES, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        line = self.child.stdout.readline()
        if not line:
            raise Invalid(f"{self.proxy.name} does not hold {self.connections} connections")
        seen = json.loads(line)
        self.proxy.answered += seen["answered"]
        check(self.proxy, seen, before)

    def __exit__(self, *_):
        self.child.stdin.close()
        self.child.wait(10)
        children.remove(self.child)
