"""Statistics, bars, and how results are told: the text, and the plot."""

import datetime
import glob
import math
import os
import re
import statistics
import subprocess

median = statistics.median

# An interval from fewer rounds proves nothing.
ROUNDS_NEEDED = 30


class Interval:
    """A median, and the order statistics that hold it with at least 95 %: binomial, whatever the shape."""

    def __init__(self, values):
        ordered = sorted(values)
        n = len(ordered)
        self.rounds = n
        self.middle = median(ordered)
        below, cumulated = 0, 0.0
        while below < n // 2:
            cumulated += math.comb(n, below) / 2**n
            if cumulated > 0.025:
                break
            below += 1
        rank = max(below - 1, 0)
        self.low, self.high = ordered[rank], ordered[n - 1 - rank]

    def text(self, digits=2):
        return f"{self.middle:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def interval(values):
    return Interval(values)


class Ratio(Interval):
    """The ratio of two costs within each round."""

    def __init__(self, mine, others):
        super().__init__([a / b for a, b in zip(mine, others)])


class Machine:
    """Where and what was measured."""

    def __init__(self, root, work):
        self.root = root
        self.load = os.getloadavg()[0]
        self.file_system = output("stat", "-f", "-c", "%T", work)
        self.mount = output("findmnt", "-n", "-o", "FSTYPE,SOURCE", "-T", work).split()
        if self.mount:
            self.file_system = self.mount[0]

    def lines(self):
        cpu = next(iter(re.findall(r"model name\s*:\s*(.+)", read("/proc/cpuinfo"))), "unknown")
        memory = int(re.search(r"MemTotal:\s+(\d+)", read("/proc/meminfo"))[1]) / 2**20
        virtual = "virtual machine" if "hypervisor" in read("/proc/cpuinfo") else "no hypervisor seen"
        is_changed = output("git", "-C", self.root, "status", "--porcelain", "-uno")
        changed = ", with changes not committed" if is_changed else ""
        commit = output("git", "-C", self.root, "rev-parse", "--short", "HEAD")
        now = datetime.datetime.now(datetime.timezone.utc)
        yield f"{now:%Y-%m-%d %H:%M} UTC, commit {commit}{changed}"
        yield f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, {virtual}, Linux {os.uname().release}"
        yield f"load average before the run {self.load:.2f}"
        yield f"audit trail and logs on {self.file_system}"
        yield ", ".join(
            filter(
                None,
                [
                    output("rustc", "--version"),
                    first(r"nginx/\S+", output("nginx", "-v")),
                    "HAProxy " + first(r"\d\S+", output("haproxy", "-v")),
                    "Envoy " + read(glob.glob(f"{self.root}/target/bench/envoy.version")[0]).strip(),
                    output("valgrind", "--version"),
                ],
            )
        )


def output(*command):
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def first(pattern, text):
    found = re.search(pattern, text)
    return found[0] if found else ""


def read(path):
    with open(path) as file:
        return file.read()


def table(head, rows):
    """A table in Markdown, its columns aligned for a terminal."""
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    line = lambda row: "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, rows)])


# ---- bars


def find(results, scenario, **wanted):
    rows = results.get(scenario, {}).get("rows", [])
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def bars(results):
    """Each bar: number, what, limit, unit, what was found (an Interval, a number, or nothing)."""

    def against(scenario, label):
        row = find(results, scenario, label=label)
        return row and row["gateway"]

    def value(scenario, key, **wanted):
        row = find(results, scenario, label="gateway", **wanted)
        return row and row[key]

    yield 1, "÷ nginx bare, 32 connections", 1.10, "", against("plain-32", "nginx bare")
    yield 1, "÷ nginx bare, 256 connections", 1.15, "", against("plain-256", "nginx bare")
    yield 2, "÷ nginx full (Lua), 32 connections", 0.85, "", against("plain-32", "nginx full (Lua)")
    yield 2, "÷ nginx full (Lua), 256 connections", 0.95, "", against("plain-256", "nginx full (Lua)")
    yield 3, "TLS, ÷ nginx bare, 32 connections", 0.95, "", against("tls-32", "nginx bare")
    yield 3, "TLS, ÷ nginx bare, 256 connections", 1.05, "", against("tls-256", "nginx bare")
    yield 3, "TLS, HTTP/2, ÷ nginx bare, 256 connections", 0.75, "", against("h2-256", "nginx bare")
    yield (
        4,
        "÷ Envoy credential injector, 32 connections",
        0.32,
        "",
        against("plain-32", "Envoy credential injector"),
    )
    yield 4, "÷ Envoy full, 32 connections", 0.25, "", against("plain-32", "Envoy full")
    row = find(results, "syscalls", label="gateway")
    yield 5, "system calls per request", 4.6, "", row and (row["kernel"] or row["strace"])
    yield (
        6,
        "user instructions per request, but for hashing and TLS",
        38.0,
        "k",
        row_thousands(value("instructions", "rest")),
    )
    row = find(results, "memory", label="gateway")
    yield 7, "resident when idle", 10.0, " MiB", row and row["idle"] / 1024
    yield 7, "resident per idle connection, of 10,000", 20.0, " KiB", row and row["each"]
    yield 8, "exec to first proxied answer", 15.0, " ms", value("start", "ms")
    yield (
        9,
        "p50 over the pump at 1,000/s, unpinned",
        150.0,
        " µs",
        value("latency", "over", placed="unpinned"),
    )


def row_thousands(count):
    return count / 1000 if count is not None else None


def judge(found, limit):
    if found is None:
        return "not measured", ""
    if isinstance(found, Interval):
        verdict = "met" if found.high <= limit else "open" if found.low <= limit else "MISSED"
        if found.rounds < ROUNDS_NEEDED:
            verdict += f" ({found.rounds} rounds: no proof)"
        return found.text(), verdict
    return f"{found:.2f}", "met" if found <= limit else "MISSED"


# ---- text


def costs(machine, results, plan):
    parts = [heading("What the gateway costs beside its peers", machine)]
    rows = []
    for number, what, limit, unit, found in bars(results):
        if found is None and plan.is_part:
            continue
        figure, verdict = judge(found, limit)
        rows.append([str(number), what, f"≤ {limit:g}{unit}", figure, verdict])
    if rows:
        parts.append(
            "## Bars\n\nMet: the whole 95 % interval of the median lies under the bar. Open: the bar lies within it.\n\n"
            + table(["#", "figure", "bar", "found", ""], rows)
        )
    if not plan.is_part:
        parts.append(read(os.path.join(os.path.dirname(os.path.abspath(__file__)), "machines.md")))
    titles = {
        "plain-32": "Plain upstream, 32 connections",
        "plain-256": "Plain upstream, 256 connections",
        "tls-32": "TLS upstream (HTTP/1.1), 32 connections",
        "tls-256": "TLS upstream (HTTP/1.1), 256 connections",
        "h2-256": "TLS upstream (HTTP/2; nginx: HTTP/1.1), 256 connections",
    }
    for name, title in titles.items():
        if name in results:
            parts.append(
                f"## {title}\n\n{plan.rounds} rounds of {plan.slice} s.\n\n"
                + table(
                    ["proxy", "CPU µs/request", "÷ nginx bare", "gateway ÷ it", "requests/s"],
                    [
                        [
                            row["label"],
                            f"{row['cost']:.1f}",
                            row["ratio"].text(),
                            row["gateway"].text(),
                            f"{row['rate']:,.0f}",
                        ]
                        for row in results[name]["rows"]
                    ],
                )
            )
    if "latency" in results:
        parts.append(
            "## Latency at 1,000 requests/s\n\n"
            + table(
                ["proxy", "cores", "p50 µs", "over the pump, p50 µs", "p99 µs (noisy)"],
                [
                    [
                        row["label"],
                        row["placed"],
                        f"{row['p50']:.0f}",
                        row["over"].text(0),
                        f"{row['p99']:.0f}",
                    ]
                    for row in results["latency"]["rows"]
                ],
            )
        )
    if "syscalls" in results:
        parts.append(
            "## System calls per request, 32 connections\n\n"
            + table(
                ["proxy", "kernel's count", "under strace", "which (strace)"],
                [
                    [
                        row["label"],
                        "–" if row["kernel"] is None else f"{row['kernel']:.2f}",
                        f"{row['strace']:.2f}",
                        ", ".join(f"{name} {calls:.2f}" for name, calls in row["names"].items()),
                    ]
                    for row in results["syscalls"]["rows"]
                ],
            )
        )
    if "instructions" in results:
        parts.append(
            "## User instructions per request, all threads\n\n"
            + table(
                ["proxy", "all", "hashing", "TLS", "rest"],
                [
                    [
                        row["label"],
                        *(f"{row[key] / 1000:.1f}k" for key in ("total", "hashing", "tls", "rest")),
                    ]
                    for row in results["instructions"]["rows"]
                ],
            )
        )
        gateway = find(results, "instructions", label="gateway")
        parts.append(
            "Most of the gateway's:\n\n"
            + table(
                ["instructions", "function"],
                [[f"{count:,.0f}", short(name)] for name, count in gateway["top"]],
            )
        )
    if "memory" in results:
        parts.append(
            "## Resident memory\n\n"
            + table(
                ["proxy", "idle MiB", "1,000 idle connections MiB", "10,000 MiB", "KiB a connection"],
                [
                    [
                        row["label"],
                        *(
                            f"{kib / 1024:.1f}"
                            for kib in (row["idle"], row["held"][1000], row["held"][10000])
                        ),
                        f"{row['each']:.2f}",
                    ]
                    for row in results["memory"]["rows"]
                ],
            )
        )
    if "start" in results:
        parts.append(
            "## From exec to the first proxied answer\n\n"
            + table(["proxy", "ms"], [[row["label"], row["ms"].text(1)] for row in results["start"]["rows"]])
        )
    if "disk" in results:
        parts.append(on_disk(results["disk"], plan))
    parts.append(verified(results))
    return "\n\n".join(parts) + "\n"


def on_disk(result, plan):
    head = [
        "durability",
        "connections",
        "offered/s",
        "requests/s",
        "CPU µs/request",
        "p50 µs",
        "p99 µs (noisy)",
        "records a batch",
        "fdatasync ms",
    ]
    rows = [
        [
            row["durability"],
            str(row["connections"]),
            f"{row['offered']:,}" if row["offered"] else "all it takes",
            f"{row['rate']:,.0f}",
            f"{row['cost']:.1f}",
            f"{row['p50']:,.0f}",
            f"{row['p99']:,.0f}",
            f"{row['batch']:.1f}",
            "–" if row["sync_ms"] is None else f"{row['sync_ms']:.2f}",
        ]
        for row in result["rows"]
    ]
    return (
        "## Audit records on the disk\n\n"
        f"The gateway alone, {result['rounds']} rounds of {plan.slice} s. With `disk` a request waits until an fdatasync "
        "that covers its intent has returned; all that wait share it. A bare fdatasync after an append of 4 KiB takes "
        f"{result['bare']:.2f} ms here.\n\n" + table(head, rows)
    )


def short(name):
    """A function's name without its hash."""
    name = re.sub(r"::h[0-9a-f]{16}$", "", name)
    return (name if len(name) <= 100 else name[:99] + "…").replace("|", "\\|")


def scaling(machine, results, plan):
    parts = [heading("What the gateway's cost depends on", machine)]
    parts.append(f"{plan.rounds} rounds of {plan.slice} s; nginx bare under the same load in the same round.")
    for result in results.values():
        reference = result["rows"][0]["cost"]
        parts.append(
            f"## {result['dimension'].capitalize()}\n\n"
            + table(
                [result["dimension"], "CPU µs/request", "÷ the first", "÷ nginx bare", "requests/s"],
                [
                    [
                        row["variant"],
                        f"{row['cost']:.1f}",
                        f"{row['cost'] / reference:.2f}",
                        row["ratio"].text(),
                        f"{row['rate']:,.0f}",
                    ]
                    for row in result["rows"]
                ],
            )
        )
    parts.append(verified(results))
    return "\n\n".join(parts) + "\n"


def heading(title, machine):
    return f"# {title}\n\nMade by `deploy/bench/run`; `README.md` beside it says how.\n\n" + "\n".join(
        f"* {line}" for line in machine.lines()
    )


def verified(results):
    accounts = [account for result in results.values() for account in result.get("verified") or []]
    total = lambda key: sum(account[key] for account in accounts)
    return (
        f"Held to account: {total('requests'):,} requests through the gateway, {total('audit records'):,} audit records in chains "
        f"that verify, as many limit and quota checks as requests, {total('token fetches')} token fetches by {len(accounts)} gateways, "
        "no request at the upstream without its three headers."
    )


def save(folder, text, results, is_scaling):
    name = "SCALING.md" if is_scaling else "RESULTS.md"
    drawn = not is_scaling and {"plain-32", "tls-32"} & results.keys()
    if drawn:
        with open(os.path.join(folder, "cost.svg"), "w") as file:
            file.write(plot(results))
        head, rest = text.split("\n\n## ", 1)
        text = f"{head}\n\n![CPU per request beside nginx bare](cost.svg)\n\n## {rest}"
    path = os.path.join(folder, name)
    with open(path, "w") as file:
        file.write(text)
    print(f"written: {os.path.relpath(path)}")


# ---- plot

STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f }
  .note { font-size: 11px; fill: #57606a }
  .title { font-weight: 600 }
  .peer { fill: #8c959f } .gateway { fill: #1a7f37 }
  .many { opacity: .55 }
  .whisker, .axis { stroke: #24292f; stroke-width: 1 }
  .one { stroke: #24292f; stroke-dasharray: 3 3; opacity: .6 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .note { fill: #9198a1 } .peer { fill: #7d8590 } .gateway { fill: #3fb950 }
    .whisker, .axis, .one { stroke: #e6edf3 }
  }
"""


def plot(results):
    """CPU per request ÷ nginx bare, a panel for each kind of upstream; solid 32 connections, pale 256."""
    panels = [
        (title, [(find_all(results, few), ""), (find_all(results, many), "many")])
        for title, few, many in (
            ("plain upstream", "plain-32", "plain-256"),
            ("TLS upstream", "tls-32", "tls-256"),
        )
        if few in results
    ]
    left, width, right = 190, 760, 70
    longest = max(row["ratio"].high for _, series in panels for rows, _ in series for row in rows.values())
    x = lambda ratio: left + ratio * (width - left - right) / longest
    shapes, y = [], 56
    for title, series in panels:
        shapes.append(f'<text class="title" x="{left}" y="{y}">{title}</text>')
        y += 12
        top = y
        for label in series[0][0]:
            shapes.append(f'<text x="{left - 10}" y="{y + 16}" text-anchor="end">{label}</text>')
            for rows, shade in series:
                if label in rows:
                    shapes += bar(rows[label], x, y, left, shade)
                    y += 11
            y += 8
        shapes.append(f'<line class="one" x1="{x(1):.1f}" x2="{x(1):.1f}" y1="{top - 2}" y2="{y - 4}"/>')
        y += 26
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y - 10}" width="{width}" height="{y - 10}" role="img">'
        f"<title>CPU per request, as a multiple of nginx bare</title><style>{STYLE}</style>"
        f'<text class="title" x="10" y="20">CPU per request ÷ nginx bare proxying (less is better)</text>'
        f'<text class="note" x="10" y="36">full colour: 32 connections, pale: 256; whisker: 95 % interval of the median; dashed: nginx bare</text>'
        + "".join(shapes)
        + "</svg>\n"
    )


def find_all(results, scenario):
    return {row["label"]: row for row in results.get(scenario, {}).get("rows", [])}


def bar(row, x, y, left, shade):
    ratio = row["ratio"]
    kind = "gateway" if row["label"] == "gateway" else "peer"
    middle = y + 5
    yield f'<rect class="{kind} {shade}" x="{left}" y="{y}" width="{x(ratio.middle) - left:.1f}" height="10"/>'
    yield f'<line class="whisker" x1="{x(ratio.low):.1f}" x2="{x(ratio.high):.1f}" y1="{middle}" y2="{middle}"/>'
    yield f'<text class="note" x="{x(ratio.high) + 6:.1f}" y="{middle + 4}">{ratio.middle:.2f}</text>'
