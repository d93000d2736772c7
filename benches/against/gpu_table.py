#!/usr/bin/env python3
"""One table of the GPU benchmarks, smalti beside PyTorch, from the folder that scripts/gpu.sh filled.

    python3 benches/against/gpu_table.py FOLDER --out results.md --json results.json

FOLDER holds smalti.jsonl (benches/gpu) and torch.jsonl (gpu_torch.py), whose lines have one form, and maybe checks.jsonl, and
wgmma.jsonl: smalti again with the kernels for Hopper's warpgroup instructions.
Useful operations and least traffic of a work stand in PyTorch's lines; both sides are rated by them, as shares of the copy
bandwidth and the bf16 product rate that PyTorch reached in the same run.
"""

import argparse
import json
import pathlib


def lines(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def timed(rows):
    return [r for r in rows if "ms_median" in r and not str(r["work"]).startswith("ceiling/")]


def ceilings(rows):
    """TFLOP/s of the large product, GB/s of the large copy."""
    found = {r["work"]: r for r in rows if str(r.get("work", "")).startswith("ceiling/")}
    rate = lambda work, key: (found.get(work) or {}).get(key)  # noqa: E731
    return rate("ceiling/matmul", "tflops"), rate("ceiling/copy", "gbs")


def number(x):
    return "–" if x is None else f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


def share(work, ms, ceiling):
    """What the work reaches: of the product rate where it has operations enough, else of the bandwidth."""
    flop, size = work.get("flop"), work.get("bytes_min")
    rate, bandwidth = ceiling
    found = []
    if flop and rate:
        found.append((flop / ms * 1e-9 / rate, f"{flop / ms * 1e-9:.3g} TFLOP/s"))
    if size and bandwidth:
        found.append((size / ms * 1e-6 / bandwidth, f"{size / ms * 1e-6:.3g} GB/s"))
    if not found:
        return "–"
    part, text = max(found)
    return f"{text}, {100 * part:.0f} %"


def rows_of(smalti, wgmma, torch, ceiling):
    """One row for each work and direction that smalti measured, in its order."""
    body = []
    name = lambda r: (r["work"], r["direction"], json.dumps(r.get("shape")), r.get("dtype"))  # noqa: E731
    warpgroups = {name(r): r["ms_median"] for r in timed(wgmma)}
    for mine in timed(smalti):
        key = mine["work"], mine["direction"]
        peers = [r for r in timed(torch) if (r["work"], r["direction"]) == key and r.get("shape") == mine.get("shape")]
        same = [r for r in peers if "no bias" not in str(r.get("note"))]
        best = min(same, key=lambda r: r["ms_median"], default=None)
        work = peers[0] if peers else {}
        ms = mine["ms_median"]
        memory = (mine.get("extra_mib"), best and best.get("extra_mib"))
        body.append([
            mine["work"], mine["direction"], mine.get("dtype", ""), number(ms), share(work, ms, ceiling), number(warpgroups.get(name(mine))),
            number(best and best["ms_median"]), best["impl"] if best else "–",
            f"{best['ms_median'] / ms:.2f}" if best else "–", number(memory[0]), number(memory[1]),
        ])
    return body


def markdown(head, body):
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(out + ["| " + " | ".join(map(str, row)) + " |" for row in body]) + "\n"


def report(folder):
    smalti, wgmma, torch, checks = (lines(folder / f"{name}.jsonl") for name in ("smalti", "wgmma", "torch", "checks"))
    ceiling = ceilings(torch)
    meta = next((r for r in torch if r.get("work") == "meta"), {})
    end = next((r for r in reversed(smalti) if r.get("work") == "meta"), {})
    rehearsal = any(r.get("emulated") for r in smalti)
    text = ["# smalti and PyTorch on one GPU\n"]
    if rehearsal:
        text.append("**A rehearsal without a GPU: the figures say nothing about speed.**\n")
    text.append(f"- {meta.get('device', 'no GPU')}; PyTorch {meta.get('torch')}, CUDA {meta.get('cuda')}, "
                f"cuDNN {meta.get('cudnn')}; clocks: {meta.get('clocks')}")
    text.append(f"- ceilings in this run: {number(ceiling[0])} TFLOP/s (bf16 product), {number(ceiling[1])} GB/s (copy)")
    text.append("- medians, ms; ratio = PyTorch's best way / smalti; MiB = added by the call")
    if end.get("host_operations"):
        text.append(f"- operations of smalti that went through the host: {end['host_operations']}")
    head = ["work", "", "dtype", "smalti", "reaches", "by wgmma", "PyTorch", "its best way", "ratio", "MiB", "MiB PyTorch"]
    text.append("\n" + markdown(head, rows_of(smalti, wgmma, torch, ceiling)))
    missing = [r for r in smalti + wgmma + torch if "error" in r or "skipped" in r]
    if missing:
        body = [[r["work"], r.get("impl", ""), r.get("direction", ""), r.get("error") or r["skipped"]] for r in missing]
        text.append("## Not measured\n\n" + markdown(["work", "by", "", "why"], body))
    if checks:
        text.append("## Checks\n\n" + markdown(["", "status", "s"], [[c["check"], c["rc"], c["seconds"]] for c in checks]))
    return "\n".join(text), {"smalti": smalti, "wgmma": wgmma, "torch": torch, "checks": checks}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--json", type=pathlib.Path, required=True)
    options = parser.parse_args()
    text, data = report(options.folder)
    options.out.write_text(text)
    options.json.write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
