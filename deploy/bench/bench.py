"""Measures the gateway beside its peers. Started by `run`, which builds and installs what this needs.

To extend it, add a proxy to `everything`, or a scenario to `SCENARIOS` or `SCALING`; `report` prints what it
returns. A scenario that finds that a proxy did not do all of its work raises Invalid, and the run ends with status 1
and no report.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time

import proxies
import report
from proxies import (
    ALL_CORES,
    LOAD_CORES,
    LOGS,
    PAIR_CORES,
    PROXY_CORES,
    WORK,
    Envoy,
    Gateway,
    Haproxy,
    Idle,
    Invalid,
    Nginx,
    Pump,
    body_of,
    load,
    place,
    spawn,
    stop,
    window,
)
from report import Ratio


class Plan:
    """How much is measured: the whole, or quickly."""

    def __init__(self, arguments):
        quick = arguments.quick
        self.rounds = arguments.rounds or (6 if quick else 10 if arguments.scaling else 32)
        self.slice = arguments.slice or (0.3 if quick else 0.6)
        self.is_part = arguments.only is not None
        self.starts = 6 if quick else 32
        self.counted_too = () if quick else ("nginx full (Lua)", "HAProxy bare")
        self.instructions = (500, 1500) if quick else (1000, 4000)
        self.syscalls = 5000 if quick else 20000
        self.peers = arguments.peers.split(",") if arguments.peers else None

    def keep(self, some):
        """The proxies that were asked for; the gateway and the yardstick always."""
        wanted = lambda proxy: self.peers is None or any(name in proxy.label.lower() for name in self.peers)
        return [
            proxy
            for proxy in some
            if wanted(proxy) or isinstance(proxy, Gateway) or proxy.label == "nginx bare"
        ]


def everything(upstreams):
    """All proxies, by transport, in the order of the tables."""
    fleet = {
        "plain": [
            Pump("blind pump", upstreams),
            Nginx("nginx bare", upstreams),
            Nginx("nginx full (Lua)", upstreams, tags=["full"]),
            Haproxy("HAProxy bare", upstreams),
            Envoy("Envoy credential injector", upstreams),
            Envoy("Envoy full", upstreams, tags=["full"]),
            Gateway("gateway", upstreams),
        ],
        "tls1": [
            Nginx("nginx bare", upstreams, "tls1"),
            Nginx("nginx full (Lua)", upstreams, "tls1", ["full"]),
            Haproxy("HAProxy bare", upstreams, "tls1"),
            Envoy("Envoy full", upstreams, "tls1", ["full"]),
            Gateway("gateway", upstreams, "tls1"),
        ],
        "h2": [
            Nginx("nginx bare", upstreams, "tls1"),  # it has no HTTP/2 to the upstream
            Envoy("Envoy full", upstreams, "h2", ["full"]),
            Gateway("gateway", upstreams, "h2"),
        ],
    }
    fleet["h2"][0].name += "-beside-h2"
    return fleet


# ---- scenarios


def rotate(rounds, some):
    """All of `some` in every round, each round beginning with another one."""
    for turn in range(rounds):
        first = turn % len(some)
        yield turn, some[first:] + some[:first]


def cost(transport, connections):
    """CPU per request of every proxy, all up at once, in short slices that rotate."""

    def run(bench):
        some = bench.plan.keep(bench.fleet[transport])
        with Up(some):
            samples = slices(bench, some, lambda proxy: window(proxy, connections, bench.plan.slice))
        return dict(rows=cost_rows(some, samples), verified=bench.accounts)

    return run


def slices(bench, some, measure):
    """The measure of every proxy in every round: {proxy: [seen, …]}."""
    samples = {proxy: [] for proxy in some}
    for turn, order in rotate(bench.plan.rounds, some):
        bench.progress(f"round {turn + 1} of {bench.plan.rounds}")
        for proxy in order:
            samples[proxy].append(measure(proxy))
    return samples


def cost_rows(some, samples):
    def per_request(proxy):
        return [seen["cpu_us"] / seen["window"] for seen in samples[proxy]]

    yardstick = next(proxy for proxy in some if proxy.label == "nginx bare")
    costs = {proxy: per_request(proxy) for proxy in some}
    gateway = next((costs[proxy] for proxy in some if isinstance(proxy, Gateway)), None)
    return [
        dict(
            label=proxy.label,
            cost=report.median(costs[proxy]),
            rate=report.median([seen["window"] / seen["seconds"] for seen in samples[proxy]]),
            ratio=Ratio(costs[proxy], costs[yardstick]),
            gateway=gateway and Ratio(gateway, costs[proxy]),
        )
        for proxy in some
    ]


def latency(bench):
    """p50 and p99 at 1,000 requests a second, pinned and not, and what p50 is over the pump's in the same round."""
    wanted = ("blind pump", "nginx bare", "Envoy credential injector", "gateway")
    some = bench.plan.keep([proxy for proxy in bench.fleet["plain"] if proxy.label in wanted])
    if not isinstance(some[0], Pump):
        some.insert(0, bench.fleet["plain"][0])
    rows = []
    with Up(some):
        for placed, cores, load_cores in (
            ("pinned", PROXY_CORES, LOAD_CORES),
            ("unpinned", ALL_CORES, ALL_CORES),
        ):
            for proxy in some:
                place(proxy.child.pid, cores)
            place(bench.upstreams["plain"].child.pid, load_cores)
            samples = slices(
                bench, some, lambda proxy: window(proxy, 32, bench.plan.slice, rate=1000, cores=load_cores)
            )
            pump = [seen["p50"] for seen in samples[some[0]]]
            for proxy in some:
                p50 = [seen["p50"] for seen in samples[proxy]]
                rows.append(
                    dict(
                        label=proxy.label,
                        placed=placed,
                        p50=report.median(p50),
                        p99=report.median([seen["p99"] for seen in samples[proxy]]),
                        over=report.interval([mine - floor for mine, floor in zip(p50, pump)]),
                    )
                )
        place(bench.upstreams["plain"].child.pid, LOAD_CORES)
    return dict(rows=rows, verified=bench.accounts)


def counted(bench):
    """Those whose system calls and instructions are counted."""
    wanted = ("nginx bare", "gateway", *bench.plan.counted_too)
    return bench.plan.keep([proxy for proxy in bench.fleet["plain"] if proxy.label in wanted])


def syscalls(bench):
    """System calls per request, 32 connections: counted by the kernel where perf may ask it, named by strace."""
    rows = []
    for proxy in counted(bench):
        bench.progress(proxy.label)
        with Up([proxy]):
            load(proxy, "--connections", 32, "--requests", 2000)  # upstream connections are open from here on
            kernel = traced(
                proxy,
                ["perf", "stat", "-x", ",", "-e", "raw_syscalls:sys_enter", "-p"],
                bench.plan.syscalls,
                lambda text: re.search(r"^(\d+),,raw_syscalls:sys_enter", text, re.M),
            )
            names = traced(
                proxy,
                ["strace", "-f", "-c", "-U", "calls,name", "-p"],
                bench.plan.syscalls // 4,
                lambda text: dict(
                    (name, int(calls)) for calls, name in re.findall(r"^\s*(\d+)\s+(\w+)$", text, re.M)
                ),
            )
        by_name = {
            name: calls / (bench.plan.syscalls // 4) for name, calls in names.items() if name != "total"
        }
        rows.append(
            dict(
                label=proxy.label,
                kernel=int(kernel[1]) / bench.plan.syscalls if kernel else None,
                strace=sum(by_name.values()),
                names={
                    name: calls
                    for name, calls in sorted(by_name.items(), key=lambda item: -item[1])
                    if calls >= 0.01
                },
            )
        )
    return dict(rows=rows, verified=bench.accounts)


def traced(proxy, tracer, requests, parse):
    """What a tracer says of so many requests."""
    path = f"{WORK}/tracer.txt"
    try:
        child = spawn(
            [*tracer, str(proxy.child.pid), "-o", path],
            LOAD_CORES,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        return None
    time.sleep(0.5)  # neither tracer says when it has attached
    if child.poll() is not None:
        proxies.children.remove(child)
        return None
    load(proxy, "--connections", 32, "--requests", requests)
    stop(child, signal.SIGINT)
    with open(path) as file:
        return parse(file.read())


KINDS = (
    # In this order: TLS has hashes of its own, and they are TLS.
    (
        "tls",
        re.compile(
            r"rustls|tokio_rustls|aes|gcm|ghash|chacha|poly1305|x25519|ecp_|p256|EVP_AEAD|libssl|SSL_"
        ),
    ),
    ("hashing", re.compile(r"sha\d|SHA\d|sha_|hmac|HMAC|digest|Digest")),
)


def instructions(bench):
    """User instructions per request, all threads, by callgrind: two runs' difference, so that starts cancel."""
    rows = []
    for proxy in counted(bench):
        few, many = (profile(bench, proxy, requests) for requests in bench.plan.instructions)
        per_request = {
            name: (many[name] - few.get(name, 0)) / (bench.plan.instructions[1] - bench.plan.instructions[0])
            for name in many
        }
        split = {"tls": 0.0, "hashing": 0.0, "rest": 0.0}
        for name, count in per_request.items():
            split[next((kind for kind, pattern in KINDS if pattern.search(name)), "rest")] += count
        top = sorted(per_request.items(), key=lambda item: -item[1])[:12]
        rows.append(dict(label=proxy.label, total=sum(per_request.values()), **split, top=top))
    return dict(rows=rows, verified=bench.accounts)


def profile(bench, proxy, requests):
    """Instructions by function over a whole life with so many requests."""
    bench.progress(f"{proxy.label}, {requests} requests")
    path = f"{WORK}/callgrind.{proxy.name}"
    prefix = [
        "valgrind",
        "--tool=callgrind",
        "--fair-sched=yes",
        "--compress-strings=no",
        "--compress-pos=no",
        f"--callgrind-out-file={path}",
    ]
    with Up([proxy], prefix):
        load(proxy, "--connections", 32, "--requests", requests)
    return by_function(path)


def by_function(path):
    """Own instructions of every function in a callgrind file."""
    counts, name, is_call = {}, "", False
    with open(path, errors="replace") as file:
        for line in file:
            if line.startswith("fn="):
                name = line[3:].strip()
            elif line.startswith("calls="):
                is_call = True
            elif line[:1].isdigit():
                if not is_call:
                    counts[name] = counts.get(name, 0) + int(line.split()[1])
                is_call = False
    return counts


def memory(bench):
    """Resident memory of a fresh process after one request, and with idle connections."""
    wanted = ("nginx bare", "HAProxy bare", "Envoy credential injector", "gateway")
    rows = []
    for proxy in bench.plan.keep([proxy for proxy in bench.fleet["plain"] if proxy.label in wanted]):
        bench.progress(proxy.label)
        with Up([proxy]):
            load(proxy, "--requests", 1)
            idle = proxy.rss_kib()
            held = {}
            for connections in (1000, 10000):
                with Idle(proxy, connections):
                    held[connections] = proxy.rss_kib()
        rows.append(dict(label=proxy.label, idle=idle, held=held, each=(held[10000] - idle) / 10000))
    return dict(rows=rows, verified=bench.accounts)


def start(bench):
    """From exec to the first proxied answer."""
    wanted = ("nginx bare", "HAProxy bare", "Envoy credential injector", "gateway")
    some = bench.plan.keep([proxy for proxy in bench.fleet["plain"] if proxy.label in wanted])
    times = {proxy: [] for proxy in some}
    for turn, order in rotate(bench.plan.starts, some):
        bench.progress(f"start {turn + 1} of {bench.plan.starts}")
        for proxy in order:
            with open(f"{LOGS}/{proxy.name}.out", "a") as out:
                command = proxy.command()
                seen = load(proxy, "--first", "--", *command, stderr=out)
                times[proxy].append(seen["ms"])
            if isinstance(proxy, Gateway) and proxy.trail() != (1, 1):
                raise Invalid(
                    f"{proxy.name}: one answer, but the trail has {proxy.trail()} intents and outcomes"
                )
    return dict(rows=[dict(label=proxy.label, ms=report.interval(times[proxy])) for proxy in some])


def disk(bench):
    """What it costs that records are on the disk: durability `disk` beside `kernel`, in the same rounds."""
    some = [Gateway("gateway", bench.upstreams), Gateway("gateway on disk", bench.upstreams)]
    some[1].durability = "disk"
    loads = [(32, 0), (256, 0), (32, 1000)]
    samples = {(gateway, *wanted): [] for gateway in some for wanted in loads}
    rounds = max(bench.plan.rounds // 3, 2)
    with Up(some):
        for turn, order in rotate(rounds, list(samples)):
            bench.progress(f"round {turn + 1} of {rounds}")
            for gateway, connections, rate in order:
                before = gateway.batches()
                seen = window(gateway, connections, bench.plan.slice, rate=rate)
                counts = [after - first for after, first in zip(gateway.batches(), before)]
                samples[gateway, connections, rate].append(dict(seen, counts=counts))
    return dict(
        rows=[disk_row(*what, seen) for what, seen in samples.items()],
        rounds=rounds,
        bare=proxies.fdatasync_ms(),
        verified=bench.accounts,
    )


def disk_row(gateway, connections, rate, samples):
    records, batches, syncs, seconds = (sum(seen["counts"][i] for seen in samples) for i in range(4))
    return dict(
        durability=gateway.durability,
        connections=connections,
        offered=rate,
        cost=report.median([seen["cpu_us"] / seen["window"] for seen in samples]),
        rate=report.median([seen["window"] / seen["seconds"] for seen in samples]),
        p50=report.median([seen["p50"] for seen in samples]),
        p99=report.median([seen["p99"] for seen in samples]),
        batch=records / batches,
        sync_ms=1000 * seconds / syncs if syncs else None,
    )


class Up:
    """Proxies that run until the end of the `with`, trails and logs empty; then their accounts must add up."""

    accounts = None  # where accounts are noted; set by Bench

    def __init__(self, some, prefix=()):
        self.some, self.prefix = some, prefix

    def __enter__(self):
        for proxy in self.some:
            proxy.start(self.prefix)

    def __exit__(self, kind, *_):
        if kind is None:
            for proxy in self.some:
                if account := proxy.account():
                    Up.accounts.append(account)
        for proxy in self.some:
            proxy.stop()
            proxy.forget_logs()


SCENARIOS = {
    "plain-32": cost("plain", 32),
    "plain-256": cost("plain", 256),
    "tls-32": cost("tls1", 32),
    "tls-256": cost("tls1", 256),
    "h2-256": cost("h2", 256),
    "latency": latency,
    "syscalls": syscalls,
    "instructions": instructions,
    "memory": memory,
    "start": start,
    "disk": disk,
}


# ---- scaling


def scale(dimension, variants):
    """The gateway's cost in several variants, beside nginx bare under the same load, all in the same rounds."""

    def run(bench):
        yardstick = Nginx("nginx bare", bench.upstreams)
        pairs = [(name, *variant(bench, name)) for name, variant in variants]
        gateways = list(dict.fromkeys(gateway for _, gateway, _ in pairs))
        samples = {name: ([], []) for name, _, _ in pairs}
        with Up([yardstick, *gateways]):
            for turn, order in rotate(bench.plan.rounds, pairs):
                bench.progress(f"round {turn + 1} of {bench.plan.rounds}")
                for name, gateway, options in order:
                    connections, body = options.get("connections", 32), options.get("body", proxies.BODY)
                    for proxy, into in zip((yardstick, gateway), samples[name]):
                        into.append(window(proxy, connections, bench.plan.slice, body=body))
        rows = []
        for name, _, _ in pairs:
            base, mine = ([seen["cpu_us"] / seen["window"] for seen in side] for side in samples[name])
            rows.append(
                dict(
                    variant=name,
                    cost=report.median(mine),
                    ratio=Ratio(mine, base),
                    rate=report.median([seen["window"] / seen["seconds"] for seen in samples[name][1]]),
                )
            )
        return dict(dimension=dimension, rows=rows, verified=bench.accounts)

    return run


def shared(options):
    """A variant of the load: one gateway for all of them."""

    def variant(bench, _):
        bench.shared = bench.shared or Gateway("gateway", bench.upstreams)
        return bench.shared, options(bench)

    return variant


def configured(name, **attributes):
    """A variant of the configuration: a gateway of its own."""

    def variant(bench, _):
        gateway = Gateway(f"gateway {name}", bench.upstreams)
        for key, value in attributes.items():
            setattr(gateway, key, value)
        return gateway, {}

    return variant


SCALING = {
    "concurrency": scale(
        "connections", [(str(n), shared(lambda _, n=n: dict(connections=n))) for n in (1, 32, 256, 1024)]
    ),
    "body": scale(
        "body",
        [
            ("222 B", shared(lambda _: {})),
            ("10 KB", shared(lambda _: dict(body=body_of(10_000)))),
            ("60 KB", shared(lambda _: dict(body=body_of(60_000)))),
        ],
    ),
    "callers": scale("callers", [(str(n), configured(f"{n} callers", callers=n)) for n in (1, 100, 10_000)]),
    "routes": scale(
        "routes (the last one is called)", [(str(n), configured(f"{n} routes", routes=n)) for n in (1, 50)]
    ),
    "workers": scale(
        "workers, on two cores each",
        [(str(n), configured(f"{n} workers", workers=n, cores=PAIR_CORES)) for n in (1, 2)],
    ),
}


# ---- the run


class Bench:
    def __init__(self, arguments):
        self.plan = Plan(arguments)
        self.upstreams = {}
        self.shared = None
        self.accounts = Up.accounts = []

    def start(self):
        self.upstreams = proxies.start_upstreams()
        self.fleet = everything(self.upstreams)

    def run(self, name, scenario):
        self.current = name
        self.shared = None
        self.accounts = Up.accounts = []
        began = time.monotonic()
        result = scenario(self)
        self.progress(f"{time.monotonic() - began:.0f} s\n")
        return result

    def progress(self, text):
        """One line that is written over and over; only its end where nobody watches."""
        is_watched = sys.stderr.isatty()
        if is_watched or text.endswith("\n"):
            clear = "\r\033[K" if is_watched else ""
            print(f"{clear}== {self.current}: {text}", end="", file=sys.stderr, flush=True)


def parse_arguments():
    parser = argparse.ArgumentParser(
        prog="deploy/bench/run", description="What the gateway costs beside its peers."
    )
    parser.add_argument(
        "--quick", action="store_true", help="under 3 minutes: few rounds, to see where one stands"
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="instead: cost against connections, body, callers, routes, workers",
    )
    parser.add_argument("--only", metavar="NAMES", help="scenarios, by name or its beginning, with commas")
    parser.add_argument(
        "--peers", metavar="NAMES", help="peers besides nginx bare, by part of a name, with commas"
    )
    parser.add_argument("--rounds", type=int, help="rounds of each scenario")
    parser.add_argument("--slice", type=float, metavar="SECONDS", help="length of a slice")
    parser.add_argument("--list", action="store_true", help="list the scenarios")
    return parser.parse_args()


def chosen(arguments):
    available = SCALING if arguments.scaling else SCENARIOS
    if not arguments.only:
        return dict(available)
    names = arguments.only.split(",")
    kept = {
        name: scenario
        for name, scenario in available.items()
        if any(name.startswith(wanted) for wanted in names)
    }
    if not kept:
        sys.exit(f"no scenario is named {arguments.only}; there are: {', '.join(available)}")
    return kept


def main():
    arguments = parse_arguments()
    if arguments.list:
        print(" ".join(SCENARIOS))
        print("with --scaling:", " ".join(SCALING))
        return 0
    if not {0, 1} <= ALL_CORES:
        sys.exit("cores 0 and 1 are needed: one for the proxy, one for load and upstream")
    os.sched_setaffinity(0, LOAD_CORES)
    proxies.raise_file_limit()
    proxies.leave_on_signals()
    machine = report.Machine(proxies.ROOT, WORK)
    if machine.file_system == "tmpfs":
        sys.exit(f"{WORK} is on a tmpfs; audit trail and logs belong on a disk")
    scenarios = chosen(arguments)
    bench = Bench(arguments)
    try:
        bench.start()
        if "h2-256" in scenarios and not proxies.gateway_speaks_h2(bench.upstreams):
            del scenarios["h2-256"]
        results = {name: bench.run(name, scenario) for name, scenario in scenarios.items()}
    except Invalid as error:
        print(f"\ninvalid: {error}", file=sys.stderr)
        return 1
    tell = report.scaling if arguments.scaling else report.costs
    text = tell(machine, results, bench.plan)
    print(text)
    is_whole = not (
        arguments.quick or arguments.only or arguments.peers or arguments.rounds or arguments.slice
    )
    folder = proxies.HERE if is_whole else WORK
    report.save(folder, text, results, is_scaling=arguments.scaling)
    return 0


if __name__ == "__main__":
    sys.exit(main())
