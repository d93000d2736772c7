#!/usr/bin/env python3
"""Measures smalti and its peers side by side and writes one Markdown table. See README.md.

    python3 benches/against/run.py --torch-venv VENV --out report.md
"""

import argparse
import datetime
import fnmatch
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

from cases import CASES, MEMORY_CASES

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# name -> (package to build or None, program)
PEERS = {
    "smalti": ("smalti", "against-smalti"),
    "torch": (None, "torch_worker.py"),
    "candle": ("candle", "against-candle"),
    "burn": ("burn", "against-burn"),
    "gemm": ("smalti", "against-gemm"),
}
TITLE = {"smalti": "smalti", "torch": "PyTorch", "candle": "candle", "burn": "burn", "gemm": "gemm"}


class Worker:
    """A peer's process. If it dies, the request that killed it is answered with an error and it is started anew."""

    def __init__(self, peer, options):
        self.peer, self.options = peer, options
        self.start()

    def start(self):
        _, program = PEERS[self.peer]
        if self.peer == "torch":
            command = [str(pathlib.Path(self.options.torch_venv) / "bin" / "python"), str(HERE / program)]
        else:
            command = [str(target_dir() / "release" / program)]
        threads = str(self.options.threads)
        env = dict(os.environ, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, RAYON_NUM_THREADS=threads)
        log = None if self.options.verbose else subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env
        )
        self.hello = self.read()
        self.idle = self.memory("VmRSS")

    def read(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return {"error": f"the worker ended with status {self.process.wait()}"}

    def ask(self, **request):
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.read()
        except BrokenPipeError:
            answer = {"error": "the worker is gone"}
        if self.process.poll() is not None:
            self.start()
        return answer

    def memory(self, field):
        """MiB"""
        for line in pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
        return 0.0

    def reset_peak(self):
        pathlib.Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def target_dir():
    return pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "against"


def build(peers):
    for package in dict.fromkeys(PEERS[p][0] for p in peers if PEERS[p][0]):
        # smalti is one binary for all processors, which finds out at run time what this one can do
        flags = "" if package == "smalti" else os.environ.get("RUSTFLAGS", "-C target-cpu=native")
        env = dict(os.environ, CARGO_TARGET_DIR=str(target_dir()), RUSTFLAGS=flags)
        subprocess.run(["cargo", "build", "--release"], cwd=HERE / package, env=env, check=True)


def note(text):
    print(text, file=sys.stderr, flush=True)


def measure(name, workers, options):
    """One case: every peer prepares and warms up, then they take turns. Gives peer -> result."""
    results, turns = {}, []
    for peer, worker in workers.items():
        answer = worker.ask(case=name, like=options.variants)
        result = results[peer] = {key: answer[key] for key in ("unsupported", "error") if key in answer}
        result["variants"] = answer.get("variants", [])
        note(f"  {peer} ready" if result["variants"] else f"  {peer}: {next(iter(answer.values()))}")
        for index, variant in enumerate(result["variants"]):
            variant["times"] = []
            turns.append((peer, worker, index, variant))
    for _ in range(options.rounds):
        for peer, worker, index, variant in turns:
            time.sleep(options.settle)  # threads of the last one stop spinning
            seconds = variant["seconds"]
            n = max(1, min(100, int(options.seconds / seconds)))
            first = 1 if seconds < options.seconds else 0  # a cold first run is left out, where it is cheap
            answer = worker.ask(run=index, n=n + first)
            if "times" in answer:
                variant["times"] += answer["times"][first:]
                variant["seconds"] = statistics.median(variant["times"])
            else:
                results[peer]["error"] = answer.get("error", str(answer))
                note(f"  {peer}: {results[peer]['error']}")
    for worker in workers.values():
        worker.ask(case="none")  # lets go of the inputs
    for peer, result in results.items():
        result["variants"] = [v for v in result["variants"] if v["times"]]
        for v in result["variants"]:
            v["median"], v["best"] = statistics.median(v["times"]), min(v["times"])
            v["agrees"] = agrees(v["check"], results)
        if result["variants"]:
            note(f"  {peer}: " + ", ".join(f"{v['name']} {v['median'] * 1e3:.3f} ms" for v in result["variants"]))
    return results


def agrees(check, results):
    """Whether a variant computed what the others did: its mean squares against the medians of all variants'."""
    checks = [v["check"] for r in results.values() for v in r["variants"]]
    truth = [statistics.median(values) for values in zip(*checks)]
    same_number = all(len(c) == len(check) for c in checks)
    return same_number and all(abs(a - b) <= 2e-3 * abs(b) + 1e-12 for a, b in zip(check, truth))


def measure_memory(name, results, options):
    """Peak resident memory of steps after the warm-up, each variant in a process of its own."""
    for peer, result in results.items():
        for v in result["variants"]:
            worker = Worker(peer, options)
            if "variants" in worker.ask(case=name, variant=v["name"]):
                worker.reset_peak()
                worker.ask(run=0, n=2)
                v["peak_mib"], v["idle_mib"] = worker.memory("VmHWM"), worker.idle
                note(f"  {peer}, {v['name']}: {v['peak_mib']:.0f} MiB")
            worker.stop()


def machine():
    info = pathlib.Path("/proc/cpuinfo").read_text()
    field = lambda key: next((l.split(":", 1)[1].strip() for l in info.splitlines() if l.startswith(key)), "?")
    wanted = ["avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile"]
    flags = [f for f in wanted if f in field("flags").split()]
    model = f"{field('model name')} (family {field('cpu family')}, model {field('model	')})"
    return f"{model}, {os.cpu_count()} cores, {' '.join(flags)}"


# ---- the report


def best(result):
    return min(result["variants"], key=lambda v: v["median"], default=None)


def milliseconds(seconds):
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def peak(data):
    """GFLOP/s of multiply-adds in registers on all threads, if it was measured."""
    for c in data["cases"]:
        v = best(c["results"].get("smalti", {"variants": []}))
        if c["name"] == f"fma_peak/{data['threads']}" and v:
            return c["gflop"] / v["median"]
    return None


def cell(result, gflop, peak):
    v = best(result) if result else None
    if v is None:
        return "–"
    text = milliseconds(v["median"]) + ("" if v["agrees"] else " (!)")
    if gflop:
        rate = gflop / v["median"]
        text += f" ({rate:.0f}, {100 * rate / peak:.0f} %)" if peak else f" ({rate:.0f})"
    if len(result["variants"]) > 1:
        text += f" {v['name']}"
    return text


def ratio(result, base):
    mine, theirs = best(base) if base else None, best(result) if result else None
    return f"{theirs['median'] / mine['median']:.2f}" if mine and theirs else "–"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def report(data):
    peers = data["peers"]
    others = [p for p in peers if p not in ("smalti", "gemm")]
    base = "smalti" if any(r["results"].get("smalti", {}).get("variants") for r in data["cases"]) else "torch"
    others = [p for p in others if p != base]
    out = [
        "# smalti and its peers\n",
        f"- {data['date']}; {data['machine']}; {data['threads']} threads everywhere; f32",
        f"- load average {data['load'][0]:.2f} at the start, {data['load'][1]:.2f} at the end "
        f"(highest seen {data['load_highest']:.2f})",
        "- " + ", ".join(f"{TITLE[p]} {data['versions'][p]}" for p in peers),
        f"- medians of {data['rounds']} rounds, the peers taking turns; ms (GFLOP/s, share of the peak); of several ways to do the "
        "same, the fastest stands here, named",
        f"- {TITLE[base]} = 1 in the ratios: above 1, {TITLE[base]} is the faster one\n",
    ]
    rows = []
    for c in data["cases"]:
        results = c["results"]
        cells = [cell(results.get(p), c["gflop"], peak(data)) for p in peers]
        rows.append([c["title"], *cells, *(ratio(results.get(p), results.get(base)) for p in others)])
    ratios = [f"{TITLE[p]} / {TITLE[base]}" for p in others]
    out.append(table(["", *(TITLE[p] for p in peers), *ratios], rows))

    rows = []
    for c in data["cases"]:
        mine = best(c["results"][base]) if base in c["results"] else None
        for peer, result in c["results"].items():
            for v in result["variants"]:
                if "peak_mib" in v:
                    times = f"{v['median'] / mine['median']:.2f}" if mine else "–"
                    memory = f"{v['peak_mib']:.0f} ({v['idle_mib']:.0f})"
                    rows.append([c["title"], TITLE[peer], v["name"], milliseconds(v["median"]), times, memory])
    if rows:
        out.append("## Peak memory\n\nResident memory of the process at its highest during steps after the warm-up, ")
        out[-1] += "in a process of its own; in brackets what it holds before any work.\n"
        head = ["", "peer", "variant", "ms", f"/ {TITLE[base]}", "peak MiB (idle)"]
        out.append(table(head, rows))

    out.append("## Every variant\n")
    rows = []
    for c in data["cases"]:
        for peer, result in c["results"].items():
            for v in result["variants"]:
                spread = statistics.quantiles(v["times"], n=10) if len(v["times"]) > 1 else [v["median"]] * 9
                agrees = "yes" if v["agrees"] else "**no**"
                numbers = [milliseconds(t) for t in (v["median"], v["best"], spread[8])]
                rows.append([c["name"], TITLE[peer], v["name"], *numbers, str(len(v["times"])), agrees])
            why = result.get("error") or result.get("unsupported")
            if why and why != "not written":
                rows.append([c["name"], TITLE[peer], why.replace("|", "/"), *["–"] * 5])
    head = ["case", "peer", "variant", "median ms", "best", "90 %", "runs", "same result"]
    out.append(table(head, rows))
    return "\n".join(out)


def save(data, loads, out):
    """After every case, so that a run that is cut short leaves what it has."""
    data["load"], data["load_highest"] = [loads[0], loads[-1]], max(loads)
    out.with_suffix(".json").write_text(json.dumps(data, indent=1))
    out.write_text(report(data))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-venv", help="virtual environment that has torch")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated (default: all)")
    parser.add_argument("--only", default="*", help="case names, comma-separated, with * and ?")
    parser.add_argument("--variants", metavar="TEXT", help="only variants whose name contains TEXT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="of one peer's turn")
    parser.add_argument("--settle", type=float, default=0.3, help="seconds of rest before each turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="against.md", help="Markdown report; all numbers go to .json beside it")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory of the steps")
    parser.add_argument("--report", nargs="+", metavar="JSON", help="write --out from earlier runs, measure nothing")
    parser.add_argument("--verbose", action="store_true", help="show the workers' own output")
    options = parser.parse_args()
    out = pathlib.Path(options.out)

    if options.report:
        runs = [json.loads(pathlib.Path(p).read_text()) for p in options.report]
        data = runs[-1]
        data["versions"] = {p: v for run in runs for p, v in run["versions"].items()}
        data["peers"] = [p for p in PEERS if p in data["versions"]]
        cases = {c["name"]: c for run in runs for c in run["cases"]}
        data["cases"] = [cases[name] for name, _, _ in CASES if name in cases]
        out.write_text(report(data))
        return

    peers = options.peers.split(",")
    unknown = [p for p in peers if p not in PEERS]
    if unknown:
        parser.error(f"no such peer: {', '.join(unknown)}")
    if not options.no_build:
        build(peers)
    if options.build_only:
        return
    if "torch" in peers and not options.torch_venv:
        parser.error("--torch-venv is needed (or name the --peers without torch)")
    patterns = options.only.split(",")
    wanted = [c for c in CASES if any(fnmatch.fnmatch(c[0], p) for p in patterns)]
    if not wanted:
        parser.error(f"no case is called {options.only}")

    loads = [os.getloadavg()[0]]
    workers = {peer: Worker(peer, options) for peer in peers}
    data = {
        "date": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "machine": machine(),
        "threads": options.threads,
        "rounds": options.rounds,
        "peers": peers,
        "versions": {p: w.hello.get("version", "?") for p, w in workers.items()},
        "cases": [],
    }
    for name, title, gflop in wanted:
        note(name)
        results = measure(name, workers, options)
        loads.append(os.getloadavg()[0])
        data["cases"].append({"name": name, "title": title, "gflop": gflop, "results": results})
        save(data, loads, out)
    for worker in workers.values():
        worker.stop()
    for c in data["cases"]:
        if c["name"] in MEMORY_CASES and not options.no_memory:
            note(f"{c['name']}: memory")
            measure_memory(c["name"], c["results"], options)
    save(data, loads, out)
    note(f"wrote {out}")


if __name__ == "__main__":
    main()
