#!/usr/bin/env python3
"""Estimates kernel times on one H200 from the compiled code, where no GPU is at hand.

    python3 scripts/gpu_estimate.py [--cubins FOLDER] [--out FILE] [--loops REGEX]

Needs nvcc and nvdisasm on the PATH. Compiles the files that gpu_estimate_shapes.py names for sm_90a, reads registers
and spills, follows the way of a warp through the machine code (that with the most work, else the shortest), weighs
each block of code by how often the shape takes it, and holds the sums against what the pipes can do. --cubins keeps
what was compiled; --loops prints the loops of matching kernels, in the order in which gpu_estimate_shapes.py numbers
them.
"""

import argparse
import collections
import math
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from gpu_estimate_shapes import COPY, SMS, WAIT, cases, usual_work, width

ROOT = pathlib.Path(__file__).resolve().parent.parent

# One H200, per multiprocessor quarter where not said otherwise. Clocks of a warp instruction on its pipe.
CLOCK, REGISTERS, SHARED, WARPS, BLOCKS = 1.755e9, 65536, 228 * 1024, 64, 32
WGMMA, MMA_SHARE = 790e12, 0.62  # measured; what mma.sync reaches of it: assumed
L2 = 5.5e12  # B/s, assumed
MMA_CLOCKS = 4096 / (WGMMA * MMA_SHARE / SMS / 4 / CLOCK)  # an HMMA.16816 is 4096 flop
L2_BYTES = L2 / SMS / 4 / CLOCK
LONE, LAUNCH = 2, 2e-6  # clocks of an instruction of a lone warp; s of a launch: assumed
SUBROUTINE = 150  # instructions that a call stands for
HALF_BUSY = 1.1  # warps a quarter: efficiency = warps / (warps + HALF_BUSY)

PIPES = ["issue", "tensor", "mufu", "shared", "fma", "alu", "l2"]
NO_PIPE = ("BRA", "BSSY", "BSYNC", "NOP", "LDC", "BAR", "EXIT", "WARPSYNC", "S2R", "S2UR", "LDGDEPBAR", "DEPBAR", "CALL", "RET", "CS2R")


def pipe_of(op):
    """[(pipe, clocks)] of an instruction besides its issue slot."""
    root = op.split(".")[0]
    if root == "HMMA":
        return [("tensor", MMA_CLOCKS)]
    if root == "HGMMA":  # 64 rows of a warpgroup, 16 of them on each quarter's tensor core
        return [("tensor", 64 * int(re.match(r"HGMMA\.64x(\d+)x16", op)[1]) * 32 / (WGMMA / SMS / CLOCK))]
    if root == "MUFU" or root in ("I2F", "F2I", "F2F"):
        return [("mufu", 8)]
    if root == "LDSM":
        return [("shared", 16)]
    if root in ("LDS", "STS"):
        return [("shared", width(op))]
    if root == "LDGSTS":
        return [("shared", 16), ("l2", 512 / L2_BYTES)]
    if root in ("LDG", "STG"):
        return [("l2", 32 * width(op) / L2_BYTES)]
    if root == "SHFL":
        return [("shared", 4)]
    if root in ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2"):
        return [("fma", 1)]
    if root == "IMAD":
        return [("fma", 2)]
    return [] if root in NO_PIPE or root.startswith(("U", "NOP")) else [("alu", 2)]


# ---- machine code -----------------------------------------------------------------------------------------------

LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:(@!?U?P[0-9T]+)\s+)?([A-Z][A-Z0-9_.x]*)\s*([^;]*);")


class Code:
    """A kernel as blocks of instructions, its loops, and the way a warp takes."""

    def __init__(self, lines, work):
        self.blocks, self.next, self.work = [[]], [], work
        self.split(lines)
        self.sort()
        self.find_loops()
        self.path = self.way(0, None)

    def split(self, lines):
        labels, ends = {}, False
        for line in lines:
            label, m = re.match(r"^(\.L_\w+):", line), LINE.match(line)
            if (label and self.blocks[-1]) or (m and ends):
                self.blocks.append([])
            if label:
                labels[label[1]], ends = len(self.blocks) - 1, False
            elif m:
                self.blocks[-1].append((m[2], m[3], m[1]))
                ends = m[2] in ("BRA", "BRA.U", "EXIT") or m[2].startswith(("RET", "BRX"))
        for i, block in enumerate(self.blocks):
            op, args, guard = block[-1] if block else ("", "", None)
            target, after = re.search(r"`\((\.L_\w+)\)", args), [i + 1] if i + 1 < len(self.blocks) else []
            if op in ("BRA", "BRA.U") and target and target[1] in labels:
                self.next.append([labels[target[1]]] + (after if guard or "," in args else []))
            else:
                self.next.append([] if op.startswith(("RET", "BRX")) or (op == "EXIT" and not guard) else after)

    def sort(self):
        """Blocks so that all but the ways back lead on."""
        seen, order, stack = {0}, [], [(0, iter(self.next[0]))]
        while stack:
            block, rest = stack[-1]
            fresh = next((n for n in rest if n not in seen), None)
            if fresh is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(fresh)
                stack.append((fresh, iter(self.next[fresh])))
        self.order = order[::-1]
        self.rank = {b: i for i, b in enumerate(self.order)}

    def dominators(self, before):
        idom, changed = {0: 0}, True
        while changed:
            changed = False
            for b in self.order[1:]:
                new = None
                for p in (p for p in before[b] if p in idom):
                    x, y = p, p if new is None else new
                    while x != y:
                        x, y = (idom[x], y) if self.rank[x] > self.rank[y] else (x, idom[y])
                    new = x
                changed |= idom.get(b) != new
                idom[b] = new
        return idom

    def find_loops(self):
        before = collections.defaultdict(list)
        for b in self.order:
            for n in self.next[b]:
                before[n].append(b)
        idom, self.loops, self.back = self.dominators(before), {}, set()
        for b in self.order:
            for n in (n for n in self.next[b] if self.rank[n] <= self.rank[b]):
                self.back.add((b, n))
                x = b
                while self.rank[x] > self.rank[n]:
                    x = idom[x]
                todo = [b] if x == n else []
                body = self.loops.setdefault(n, {n}) if x == n else set()
                while todo:
                    x = todo.pop()
                    if x not in body:
                        body.add(x)
                        todo += before[x]

    def way(self, start, inside):
        """The blocks from `start` on with the most work, among equals the fewest instructions."""
        value, step = {}, {}
        for b in reversed(self.order):
            if inside and b not in inside:
                continue
            nexts = [n for n in self.next[b] if (b, n) not in self.back and (not inside or n in inside)]
            step[b] = max(nexts, key=lambda n: value[n], default=None)
            value[b] = sum(self.work(i[0]) - (SUBROUTINE if i[0].startswith("CALL") else 1) for i in self.blocks[b]) + (value[step[b]] if nexts else 0)
        path, b = [], start
        while b is not None:
            path.append(b)
            b = step[b]
        return path

    def has(self, blocks, root):
        return sum(i[0].split(".")[0] == root for b in blocks if b in self.on for i in self.blocks[b])

    @property
    def on(self):
        return set(self.path)

    def on_path(self):
        """Headers of the loops that the way meets, in its order, outer ones first."""
        return sorted((h for h in self.loops if h in self.on), key=lambda h: (self.path.index(h), -len(self.loops[h])))

    def cost(self, weight):
        """Clocks of each pipe, with weight(block) -> (times, times of loads and stores)."""
        sums = collections.Counter()
        for b in self.path:
            times, memory = weight(b)
            for op, args, guard in self.blocks[b]:
                sums["issue"] += times * (SUBROUTINE if op.startswith("CALL") else 1)
                # never executed; executed for rows that are not there
                idle = guard == "@!PT" or (guard and op.startswith("STS") and args.rstrip().endswith("RZ"))
                for pipe, clocks in [] if idle else pipe_of(op):
                    sums[pipe] += clocks * (memory if op.startswith(("LDG.", "STG", "LDS", "STS")) else times)
        return sums


def product_cost(code, launch):
    """Clocks of a warp, start to end, and those of them outside its innermost loops of products."""
    headers = code.on_path()
    products = [h for h in headers if code.has(code.loops[h], "HMMA") or code.has(code.loops[h], "HGMMA")]
    if len(products) != len(launch.trips):
        sys.exit(f"{launch.name}: {len(products)} loops of products, the table has {len(launch.trips)}: see --loops {launch.name}")
    rest = [h for h in headers if h not in products]
    rest = [h for h in rest if not any(o != h and h in code.loops[o] for o in rest)]
    copies = [h for h in rest if code.has(code.loops[h], "LDGSTS")]
    others = [h for h in rest if h not in copies]
    within = lambda h: max((i for i, p in enumerate(products) if h in code.loops[p]), default=-1)  # noqa: E731
    found = collections.Counter()
    for h in copies:
        found[within(h)] += code.has(code.loops[h], "LDGSTS")

    def weight(b):
        times = math.prod(n for h, n in zip(products, launch.trips) if b in code.loops[h])
        for h in copies:
            if b in code.loops[h]:
                share = launch.copies.get(within(h), 0) / found[within(h)]
                return times * share, times * share
        for h, (n, memory) in zip(others, launch.others):
            if b in code.loops[h]:
                return times * n, times * memory
        return times, times

    innermost = [code.loops[h] for h in products if not any(o != h and o in code.loops[h] for o in products)]
    outside = lambda b: (0, 0) if any(b in loop for loop in innermost) else weight(b)  # noqa: E731
    return code.cost(weight), code.cost(outside)


def turn_cost(code, launch):
    """Clocks of a warp in a turn of the loop with the most work."""
    outer = [h for h in code.on_path() if not any(o != h and h in code.loops[o] for o in code.on_path())]
    value = lambda h: sum(launch.work(i[0]) for b in code.loops[h] if b in code.on for i in code.blocks[b])  # noqa: E731
    header = max(outer, key=value)
    inside = [h for h in code.on_path() if h != header and h in code.loops[header]]
    trips = list(launch.inner) + [1] * (len(inside) - len(launch.inner))
    code.path = [b for b in code.path if b in code.loops[header]]

    def weight(b):
        times = launch.share * math.prod(n for h, n in zip(inside, trips) if b in code.loops[h])
        return times, times

    return code.cost(weight)


def occupancy(launch, registers):
    warps = launch.threads // 32
    by_registers = 4 * (REGISTERS // 4 // (-(-registers // 8) * 8 * 32)) // warps
    return min(BLOCKS, WARPS // warps, SHARED // (launch.smem + 1024), by_registers)


def warpgroup_clocks(ideal, cost, outside, efficiency, resident):
    """wgmma runs in the background and needs no other warps to be busy. What stands outside its loops is added, unless
    other blocks multiply meanwhile."""
    rate = {p: 1 if p in ("l2", "tensor") else efficiency for p in PIPES}
    share = {p: outside[p] / cost[p] if cost[p] else 0 for p in PIPES}
    if resident > 1:
        return {p: ideal[p] / rate[p] for p in PIPES}
    after = max(ideal[p] * share[p] / rate[p] for p in PIPES)
    return {p: ideal[p] * (1 - share[p]) / rate[p] + after for p in PIPES}


def estimate(launch, code, registers):
    """Seconds, what bounds them, seconds at best, blocks a multiprocessor, clocks of the pipes of a warp or turn."""
    fit, warps = occupancy(launch, registers), launch.threads // 32
    busiest = -(-launch.blocks // SMS)
    resident = min(fit, busiest)
    if launch.trips:
        cost, outside = product_cost(code, launch)
        active = resident * warps * launch.active / 4
        efficiency = active / (active + HALF_BUSY)
        ideal = {p: busiest * warps * launch.active / 4 * cost[p] for p in PIPES}
        if launch.l2:
            ideal["l2"] = launch.l2 / L2 * CLOCK
        if code.has(code.on, "HGMMA"):
            clocks = warpgroup_clocks(ideal, cost, outside, efficiency, resident)
        else:
            clocks = {p: ideal[p] / (1 if p == "l2" else efficiency) for p in PIPES}
        first = busiest / resident * WAIT / resident
    else:
        cost = turn_cost(code, launch)
        active = max(resident * warps / 4, 1)
        quarters = min(SMS, launch.blocks) * min(4, resident * warps)
        ideal = {p: launch.turns * launch.active / quarters * cost[p] for p in PIPES if p != "l2"}
        clocks = {p: c * (active + HALF_BUSY) / active for p, c in ideal.items()}
        per_warp = math.ceil(launch.turns / (min(SMS, launch.blocks) * resident * warps))
        clocks["latency"] = per_warp * (launch.wait + LONE * cost["issue"])
        clocks["l2"] = max(launch.bytes, launch.l2) / L2 * CLOCK
        first = 0
    bound = max(clocks, key=clocks.get)
    times = {bound: (clocks[bound] + first) / CLOCK, "memory": launch.bytes / COPY, "launch": LAUNCH}
    what = max(times, key=times.get)
    best = max(max(ideal.values()) / CLOCK, times["memory"], LAUNCH)
    return times[what], what, best, fit, cost


# ---- compiling, reading, reporting ------------------------------------------------------------------------------


def tool(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout + done.stderr


def compiled(file, folder):
    """{kernel: (registers, spilled bytes, lines of machine code)} of a .cu file."""
    source, stem = ROOT / "cuda" / (file + ".cu"), folder / file.replace("/", "-")
    log, text = stem.with_suffix(".log"), stem.with_suffix(".sass")
    if not text.exists() or text.stat().st_mtime < max(p.stat().st_mtime for p in (ROOT / "cuda").rglob("*.cu*")):
        cubin = stem.with_suffix(".cubin")
        flags = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas", "-v"]
        log.write_text(tool("nvcc", *flags, "-o", cubin, source))
        text.write_text(tool("nvdisasm", "-c", cubin))
    lines, name = collections.defaultdict(list), None
    for line in text.read_text().splitlines():
        found = re.match(r"^\.text\.(\S+):", line)
        name = found[1] if found else None if line.startswith("//--") else name
        if name:
            lines[name].append(line)
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    found = re.findall(pattern, log.read_text(), re.S)
    return {name: (int(registers), int(spills), lines[name]) for name, spills, registers in found}


def print_loops(kernels, wanted):
    for name, (_, _, lines) in kernels.items():
        if re.search(wanted, name):
            code = Code(lines, usual_work)
            print(name)
            for h in code.on_path():
                depth = sum(h in code.loops[o] for o in code.on_path())
                counts = collections.Counter(i[0].split(".")[0] for b in code.path if b in code.loops[h] for i in code.blocks[b])
                shown = {k: counts[k] for k in ("HMMA", "HGMMA", "LDSM", "LDGSTS", "LDG", "STG", "FFMA", "MUFU", "BAR") if counts[k]}
                print("  " * depth, sum(counts.values()), shown)


def aim_of(aim, ratio, tflops, gbs):
    if not aim:
        return "–", "–"
    kind, limit = aim
    text = {"x": f"<= {limit} x floor", "T": f">= {limit} TFLOP/s", "G": f">= {limit:,.0f} GB/s"}[kind]
    reached = {"x": ratio <= limit, "T": tflops >= limit, "G": gbs >= limit}[kind]
    return text, "yes" if reached else "**no**"


def report(kernels):
    columns = ["kernel", "shape", "registers", "shared memory, KB", "blocks/SM", "bound by", "at best, us", "estimate, us", "floor, us", "ratio",
               "rate", "aim", "reached"]
    rows = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    detail = ["| launch | us | bound by | blocks x threads | warps/SM | " + " | ".join(PIPES) + " |", "|" + "---|" * (5 + len(PIPES))]
    for case in cases():
        parts = []
        for launch in case.launches:
            found = [k for name, k in kernels[launch.file].items() if re.search(launch.name, name)]
            if len(found) != 1:
                sys.exit(f"{len(found)} kernels of {launch.file} match {launch.name}")
            registers, spills, lines = found[0]
            seconds, bound, best, fit, cost = estimate(launch, Code(lines, launch.work), registers)
            parts.append((seconds * launch.times, bound, fit, registers, spills, launch, best * launch.times))
            if not case.name.endswith("both"):
                times = f"{launch.times} x " if launch.times > 1 else ""
                detail.append(f"| {case.name}: {launch.label} | {times}{seconds * 1e6:,.1f} | {bound} | {launch.blocks} x {launch.threads} | "
                              f"{fit * launch.threads // 32} | " + " | ".join(f"{cost[p]:,.0f}" for p in PIPES) + " |")
        total = sum(p[0] for p in parts)
        main = [p for p in parts if p[0] > 0.04 * total]
        each = lambda f: " / ".join(str(f(p)) for p in main)  # noqa: E731
        ratio, tflops, gbs = total * 1e6 / case.floor, case.flop / total / 1e12, case.bytes / total / 1e9
        aim, reached = aim_of(case.aim, ratio, tflops, gbs)
        bounds = each(lambda p: f"{p[5].label}: {p[1]}" if len(main) > 1 else p[1])
        rate = f"{tflops:,.0f} TFLOP/s" if case.flop / 790e12 > case.bytes / COPY or case.aim[:1] == ("T",) else f"{gbs:,.0f} GB/s"
        used = each(lambda p: str(p[3]) + ("*" if p[4] else ""))
        cells = [case.name, case.shape, used, each(lambda p: f"{p[5].smem / 1024:.0f}"), each(lambda p: p[2]), bounds]
        cells += [f"{t:,.0f}" for t in (sum(p[6] for p in parts) * 1e6, total * 1e6, case.floor)]
        rows.append("| " + " | ".join(cells + [f"{ratio:.2f}", rate, aim, reached]) + " |")
    return "\n".join(rows), "\n".join(detail)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cubins", type=pathlib.Path, help="keep compiled files here and use them again")
    parser.add_argument("--out", type=pathlib.Path, help="write the tables to this file")
    parser.add_argument("--loops", help="print the loops of kernels whose mangled names match, and stop")
    options = parser.parse_args()
    for name in ("nvcc", "nvdisasm"):
        if not shutil.which(name):
            sys.exit(f"{name} is not on the PATH: the CUDA toolkit has it, or the PyPI package nvidia-cuda-{name}.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.cubins or pathlib.Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        kernels = {file: compiled(file, folder) for file in sorted({x.file for c in cases() for x in c.launches})}
    if options.loops:
        for found in kernels.values():
            print_loops(found, options.loops)
        return
    text = "\n\n".join(report(kernels)) + "\n"
    options.out.write_text(text) if options.out else print(text)


if __name__ == "__main__":
    main()
