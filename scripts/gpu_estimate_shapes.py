"""What gpu_estimate.py estimates: shapes, and how the launch code chooses instances, blocks and shared memory for
them. To be kept in step with the .cu files that it names; gpu_estimate.py --loops shows the loops."""

import dataclasses
import re

SMS, COPY, WAIT = 132, 4.3e12, 800  # multiprocessors; B/s, measured on one H200; clocks of a load under load, assumed


def width(op):
    """Bytes a lane of a load or store."""
    found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", op)
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[found[1]] if found else 4


def usual_work(op):
    """How much the way through a kernel wants to pass an instruction; one point is one instruction less."""
    root = op.split(".")[0]
    if root in ("LDG", "STG"):
        return 20 if width(op) < 4 else 25 * width(op)
    if op.startswith("IMAD.WIDE"):
        return 40  # the address of what is there, not the zeros of what is not
    return {"HMMA": 4000, "HGMMA": 4000, "LDGSTS": 1500}.get(root, 0)


def wide_work(op):
    """Tiles by warpgroups: those without edges and positives, whose logits lie near one another."""
    return {"HGMMA": 4000, "LDGSTS": 1500, "STG": 100, "MUFU": -50, "SHFL": -20, "LDG": -50}.get(op.split(".")[0], 0)


def tile_work(op):
    """The contrastive tiles: past the loads of the few elements that are a positive."""
    return {"HMMA": 4000, "LDGSTS": 1500, "STG": 100, "MUFU": 8, "FFMA": 3}.get(op.split(".")[0], 0)


def soft_work(op):
    """Attention by warpgroups: the way of warps that have queries, with the exponentials of a step."""
    return 300 if op.startswith("MUFU") else usual_work(op)


def norm_work(op):
    """Layer norm without its optional inputs, which only load and store."""
    return {"FFMA": 100, "FADD": 12, "LDG": -50, "STG": -50}.get(op.split(".")[0], 0)


def sum_work(op):
    """Sums of parts, past what positives that stand apart add."""
    return 100 if op.startswith("FADD") else 0


def table_work(op):
    """Gradients of tables: past the loads of single elements, for rows that are not aligned."""
    return -60 if op.startswith("LDG") and width(op) == 2 else usual_work(op)


@dataclasses.dataclass
class Launch:
    """A kernel as a shape launches it. A product kernel has `trips` of its loops with HMMA, `copies`: LDGSTS of a warp
    in a turn of loop i (-1: outside), `others`: (times, times for memory) of each other loop; `l2`: bytes through L2,
    where they are known better than from the copies. Any other kernel has `turns`: turns of its outermost loop, summed
    over all warps, and `inner`: trips of the loops inside it; `wait`: clocks of a turn that a warp waits; `share`: of the
    turn's code that runs. `active`: share of the warps with work."""

    label: str
    file: str
    name: str
    threads: int
    smem: int
    blocks: int
    bytes: float
    trips: list = None
    copies: dict = dataclasses.field(default_factory=dict)
    others: list = dataclasses.field(default_factory=list)
    active: float = 1.0
    turns: float = 0
    share: float = 1.0
    inner: list = dataclasses.field(default_factory=list)
    wait: float = WAIT
    l2: float = 0
    work: object = usual_work
    times: int = 1


@dataclasses.dataclass
class Case:
    name: str
    shape: str
    floor: float  # us; kernels.md, part B, or the bytes at COPY
    flop: float
    bytes: float
    aim: tuple  # ("x", most times the floor), ("T", least TFLOP/s), ("G", least GB/s), or ()
    launches: list


# Shared memory by the layouts in cuda/attention/*_mma.cuh for d = 64: rows of 72 elements. `win`: side of the window.
ROW = 144


def room(nt, win, borrow):
    stages, tables = 4 * nt * 8 * ROW, 2 * (2 * win - 1) * ROW if win else 0
    return max(stages, tables) if borrow else stages + tables


def forward_bytes(mt, nt, warps, win=0, borrow=False):
    return warps * mt * 16 * (ROW + (4 * (win | 1) if win else 0)) + room(nt, win, borrow)


def dq_bytes(nt, warps, win=0, borrow=False):
    return warps * 16 * (2 * ROW + (8 * (win | 1) if win else 0)) + room(nt, win, borrow)


def dkv_bytes(warps, win=0):
    return 2 * warps * 16 * ROW + 128 * ROW + 512 + 64 * 4 * term_stride(warps * 16, win)


def term_stride(keys, win):
    """Relative terms of a query that a block of keys reads: all columns, its own rows, in chunks of four."""
    most = min((keys - 2) // (-(-win // 8) * 8) + 2, win) if win else 0
    chunks = (2 * win - win // 4 * 4 + 3) // 4 + (most - 1) // 4 + 2
    return (4 * chunks + 11) // 16 * 16 + 4 if win else 0


def delta(rows, row_bytes):
    """cuda/attention/delta.cuh: a lane for each 16 bytes of a row."""
    together = 32 * 16 // row_bytes
    return Launch("delta", "attention/backward", "delta_rowsI.*bf16", 256, 0, min(-(-rows // (8 * together)), SMS * 16), 2 * rows * row_bytes,
                  turns=rows / together, inner=[0.5])


def tables(win, units, share, size):
    """cuda/attention/table_mma.cuh: two blocks a multiprocessor; a warp's turn is 16 tokens and two tiles of 16 table rows."""
    owners = min((2 * win + 14) // 16, 8)
    smem = 8192 * owners if owners <= 4 else 0  # sums of several teams
    return Launch("tables", "attention/window_backward", "table_productsI.*bf16ELi8E", 256, smem, 2 * SMS, size, turns=units * owners, share=share,
                  work=table_work)


def vitdet(win, heads=12, batch=8, side=64):
    """window_forward.cu and window_backward.cu: pitch 16 for windows of 14, 64 for the whole image; d = 64."""
    whole = win == side
    tensor, across = batch * side * side * heads * 64 * 2, -(-side // win)
    groups, queries = batch * heads * across**2, batch * heads * side * side
    tiles = win if not whole else 256  # of 16 rows
    rows = side / (across * win)  # share of window rows inside the image
    terms, w = queries * 2 * win * 4, "attention/window_"
    if whole:
        fwd = Launch("forward", w + "forward", "forward_mmaI.*bf16ELi64ELi2ELi8ELi4ELi8E", 128, forward_bytes(2, 8, 4, 64, True), groups * 32,
                     4 * tensor, [5, 4, 5, 4, 64], {-1: 8 + 16 + 8, 4: 8})
        dq = Launch("dq", w + "backward", "dq_mmaI.*bf16ELi64ELi8ELi8E", 128, dq_bytes(8, 4, 64, True), groups * 64, 5 * tensor + 2 * terms,
                    [5, 4, 64, 4, 5], {-1: 8 + 32 + 8, 2: 8}, [(8, 1.03)] * 4)
        dkv = Launch("dk, dv", w + "backward", "dkv_mmaI.*bf16ELi64ELb1E", 128, dkv_bytes(4, 64), groups * 64, 6 * tensor + terms, [128],
                     {-1: 12 + 5, 0: 4 + 5})
    else:
        fwd = Launch("forward", w + "forward", "forward_mmaI.*bf16ELi64ELi1ELi4ELi4ELi2E", 224, forward_bytes(1, 4, 7, 14), groups * 2,
                     4 * tensor, [2, 1, 7], {-1: 4 + 2 + 2.3, 2: 2.3}, active=rows)
        dq = Launch("dq", w + "backward", "dq_mmaI.*bf16ELi64ELi4ELi2E", 128, dq_bytes(4, 4, 14), groups * 4, 5 * tensor + 2 * terms,
                    [2, 1, 7, 1, 2], {-1: 8 + 3.4 + 4, 2: 4}, [(8, 0.52)] * 4, active=rows * 14 / 16)
        dkv = Launch("dk, dv", w + "backward", "dkv_mmaI.*bf16ELi64ELb1E", 128, dkv_bytes(4, 14), groups * 4, 6 * tensor + terms, [7 * rows],
                     {-1: 12 + 2, 0: 4 + 2}, active=14 / 16)
    # in the whole image 46 % of the turns meet both tiles, 31 % one, which leaves out a quarter of the code, 23 % none
    parts = tables(win, groups * tiles * rows, 0.46 + 0.31 * 0.75 + 0.23 * 0.2 if whole else 1, tensor + terms)
    gflop = (425, 1069) if whole else (22.4, 57.5)
    name, shape = "global attention + rel. pos." if whole else "window attention + rel. pos.", f"B{batch}, {side}x{side}, {win}x{win}, {heads}h, d64"
    aims = (("T", 400), ("T", 300)) if whole else (("x", 2.0), ("x", 2.5))
    floors = (538, 1353) if whole else (47, 94)
    return [Case(name + ", forward", shape, floors[0], gflop[0] * 1e9, 4 * tensor, aims[0], [fwd]),
            Case(name + ", backward", shape, floors[1], gflop[1] * 1e9, 8 * tensor, aims[1],
                 [delta(queries, 128), dq, dkv, parts])]


def plain(name, length, floors, gflop, batch=256, heads=16):
    """forward.cu and backward.cu, run_mma: 32 queries a warp forward, 16 backward, at most 4 warps; d = 64."""
    rows, groups, tensor = -(-length // 8) * 8, batch * heads, batch * heads * length * 128
    wf, wb, keys = min(4, -(-rows // 32)), min(4, -(-rows // 16)), -(-rows // 64)
    tf, tb = -(-rows // (wf * 32)), -(-rows // (wb * 16))
    busy_f, busy_b = -(-rows // 32) / (tf * wf), -(-rows // 16) / (tb * wb)
    shape, f, b = f"B{batch}, S{length}, {heads}h, d64", "attention/forward", "attention/backward"
    fwd = Launch("forward", f, "forward_mmaI.*bf16ELi64ELi2ELi8ELi8ELin1E", wf * 32, forward_bytes(2, 8, wf), groups * tf, 4 * tensor, [keys],
                 {-1: 8 + 32 / wf, 0: 32 / wf * (keys - 1) / keys}, active=busy_f)
    dq = Launch("dq", b, "dq_mmaI.*bf16ELi64ELi8ELin1E", wb * 32, dq_bytes(8, wb), groups * tb, 5 * tensor, [keys],
                {-1: 8 + 32 / wb, 0: 32 / wb * (keys - 1) / keys}, active=busy_b)
    dkv = Launch("dk, dv", b, "dkv_mmaI.*bf16ELi64ELb0E", wb * 32, dkv_bytes(wb), groups * tb, 6 * tensor, [-(-rows // 32)],
                 {-1: 8 + 16 / wb, 0: 16 / wb}, active=busy_b)
    return [Case(f"attention {name}, forward", shape, floors[0], gflop[0] * 1e9, 4 * tensor, (), [fwd]),
            Case(f"attention {name}, backward", shape, floors[1], gflop[1] * 1e9, 8 * tensor, (), [delta(groups * length, 128), dq, dkv])]


def merge(results, parts, size):
    """cuda/contrastive_forward.cu: 32 results a block, their parts in 16 runs, which the compiler takes four at a time."""
    turns = parts / 16 / 4
    return Launch("merge", "contrastive_forward", "mergeIf", 512, 32 * 16 * 12, results // 32, results * parts * size, turns=results / 32 * 16,
                  inner=[turns], wait=(turns + 1) * WAIT)


def attention_warpgroups(batch=8, heads=12, side=64):
    """sm90/forward.cu for d = 64. Loops: tables; tiles of queries, tables, steps of keys; four steps of a ring."""
    f, tensor, groups = "attention/sm90/forward", batch * side * side * heads * 128, batch * heads
    name, shape = " by warpgroups + rel. pos., forward", f"B{batch}, {side}x{side}, %dx%d, {heads}h, d64"
    rows = side / 70  # share of window rows inside the image; of 16 warps with 16 queries each, 14 have a window row
    window = Launch("forward", f, "forward_wholeI.*bf16ELi64ELi112ELi2E", 256, 107008, groups * 25, 4 * tensor,
                    [2 * rows * 14 / 16, 1, 1, 2], {-1: 1.7}, work=soft_work)
    whole = Launch("forward", f, "forward_ringI.*bf16ELi64ELi64ELi8E", 384, 140032, groups * 22, 4 * tensor, [2, 2, 63 / 4], {-1: 5.3},
                   l2=2 * tensor + groups * 22 * (2 * 4096 + 254) * 128, work=soft_work)
    cases = [Case("window attention" + name, shape % (14, 14), 47, 22.4e9, 4 * tensor, ("x", 2.0), [window]),
             Case("global attention" + name, shape % (64, 64), 538, 425e9, 4 * tensor, ("T", 400), [whole])]
    batch, heads = 256, 16
    for name, length, floor, gflop, kernel, threads, smem, tiles, trips in [
            ("MAE-L encoder", 50, 24, 2.6, "wholeI.*bf16ELi64ELi64ELin1E", 128, 24576, 1, [1]),
            ("ViT-L", 197, 96, 41, "wholeI.*bf16ELi64ELi112ELin1ELi2ELi2ELi4ELi2E", 256, 90112, 1, [2 * 13 / 16, 2]),
            ("L/14@336", 577, 442, 349, "ringI.*bf16ELi64ELi80ELin1E", 256, 98304, 5, [7 / 4])]:
        tensor = batch * heads * length * 128
        launch = Launch("forward", f, "forward_" + kernel, threads, smem, batch * heads * tiles, 4 * tensor, trips, l2=(2 + 2 * tiles) * tensor, work=soft_work)
        cases.append(Case(f"attention {name} by warpgroups, forward", f"B{batch}, S{length}, {heads}h, d64", floor, gflop * 1e9, 4 * tensor, (), [launch]))
    return cases


def gradient_work(op):
    """Gradients of attention by warpgroups: the way of warps with work, which write relative terms."""
    return 200 if op.startswith(("MUFU", "STG")) else usual_work(op)


def attention_warpgroups_backward(batch=8, heads=12, side=64):
    """sm90/backward.cu for d = 64: 128 queries or keys a block, 64 of the other side a step, the first step outside the loop.
    Copies of a thread: its own two tiles, tables, two steps; others: pairs of terms of a warp, one by one and four at a time."""
    b, tensor, groups, queries = "attention/sm90/backward", batch * side * side * heads * 128, batch * heads, batch * heads * side * side
    cases, own, step = [], 8, 4
    for win in (14, 64):
        whole, across = win == side, -(-side // win)
        rows, blocks, terms = side / (across * win), groups * across**2, queries * 2 * win * 4
        steps, table, pairs, rel = (64, 8, 32, "8") if whole else (4, 2, 6.1, "2")
        tiles = 32 if whole else 2
        # of the second block of a window that the image cuts nothing is left
        busy = blocks * 32 if whole else int(blocks * (2 - 1 / across))
        stage = 128 * 256 + 3 * 16384
        dq = Launch("dq", b, f"dq_wgmmaI.*bf16ELi64ELi{rel}E", 256, stage + (4 * win - 2) * 144 + 128 * (win | 1) * 8, busy, 4 * tensor + tensor + 2 * terms,
                    [5, 4, 63, 4, 5] if whole else [2, 1, 3, 1, 2], {-1: own + table + 2 * step, 2: step},
                    [(pairs % 4 if not whole else 0,) * 2, (pairs // 4,) * 2] * 2, work=gradient_work)
        stride = 68 if whole else 36
        dkv = Launch("dk, dv", b, f"dkv_wgmmaI.*bf16ELi64ELi{rel}E", 256, stage + 3 * 64 * (16 if whole else 8) + 3 * 64 * stride * 4, blocks * tiles,
                     6 * tensor + terms, [(steps if whole else steps * rows) - 1], {-1: own + 2 * (step + (4 if whole else 2)), 0: step + (4 if whole else 2)},
                     work=gradient_work)
        parts = tables(win, blocks * (256 if whole else win) * rows, 0.46 + 0.31 * 0.75 + 0.23 * 0.2 if whole else 1, tensor + terms)
        name = ("global" if whole else "window") + " attention by warpgroups + rel. pos., backward"
        cases.append(Case(name, f"B{batch}, {side}x{side}, {win}x{win}, {heads}h, d64", 1353 if whole else 94, (1069 if whole else 57.5) * 1e9, 8 * tensor,
                          ("T", 300) if whole else ("x", 2.5), [dq, dkv, parts]))
    for name, length, floor, gflop in [("MAE-L encoder", 50, 49, 6.6), ("ViT-L", 197, 192, 102), ("L/14@336", 577, 1105, 873)]:
        tiles = -(-length // 64)
        groups_of, tensor = min(2, tiles), 256 * 16 * length * 128
        blocks, per = 4096 * -(-tiles // groups_of), 2 * 4 // groups_of
        smem = groups_of * 64 * 256 + 3 * 16384
        copies = {-1: own + min(2, tiles) * per, 0: per if tiles > 2 else 0}
        dq = Launch("dq", b, "dq_wgmmaI.*bf16ELi64ELin1E", groups_of * 128, smem, blocks, 5 * tensor, [tiles - 1], copies, work=gradient_work)
        dkv = Launch("dk, dv", b, "dkv_wgmmaI.*bf16ELi64ELin1E", groups_of * 128, smem + 1536, blocks, 6 * tensor, [tiles - 1], copies, work=gradient_work)
        cases.append(Case(f"attention {name} by warpgroups, backward", f"B256, S{length}, 16h, d64", floor, gflop * 1e9, 8 * tensor, (), [dq, dkv]))
    return cases


def contrastive():
    """BackwardPlan, ForwardPlan and query_splits of cuda/contrastive_*.cu for a budget of 256 MiB; 128x128 tiles, 4 stages."""
    n, d, smem, tile = 32768, 512, 81920, {-1: 12, 0: 3.25}
    flop, f, b = 2.0 * n * n * d, "contrastive_forward", "contrastive_backward"
    lse = Launch("tiles", f, "lse_tilesI.*bf16ELb0", 256, smem, 1024, 2 * n * d * 2 + n * 256 * 8, [64, 16], {0: 12, 1: 3.25}, work=tile_work)
    columns = merge(n, 256, 8)
    g = 4096 * n * 2
    parts = [Launch("slopes", b, "slopesI.*bf16ELb0", 256, smem, 8192, g + 2 * n * d, [16], tile, [(0, 0), (2, 2)], work=tile_work, times=8),
             Launch("dQ product", b, "multiplyI.*bf16ELb0ELb1", 256, smem, 512, g + n * d * 2, [256], {-1: 12, 0: 4}, work=tile_work, times=8),
             Launch("dK product", b, "multiplyI.*bf16ELb1ELb1", 256, smem, 1024, 4 * g + n * d * 8, [128], {-1: 12, 0: 4}, work=tile_work, times=8)]
    q, m, k = 256, 65536, 128
    moco = [Launch("tiles", f, "lse_tilesI.*bf16ELb1", 256, smem, 1024, m * k * 2, [1, 4], {0: 12, 1: 1}, work=tile_work),
            merge(q, 512, 12)]
    walk = [Launch("keys", "contrastive_queries", "walk_keysI.*bf16ELb1", 256, smem + 128 * 136 * 2, 128, m * k * 2 + 64 * q * k * 4, [8, 4, 4],
                   {0: 18, 1: 1, 2: 0.5}, work=tile_work),
            Launch("sum", b, "combineI.*bf16", 256, 0, 128, 64 * q * k * 4, turns=q * k / 32, inner=[4, 0], wait=4 * WAIT)]
    cases = [Case("contrastive, forward", f"N{n}, d{d}", 1390, flop, 2 * n * d * 2, (), [lse, columns]),
             Case("contrastive, backward", f"N{n}, d{d}", 4180, 3 * flop, 4 * n * d * 2, (), parts),
             Case("contrastive, both", f"N{n}, d{d}", 5570, 4 * flop, 4 * n * d * 2, ("T", 500), [lse, columns] + parts)]
    shape = f"{q}x{m}x{k}"
    return cases + [Case("MoCo, forward", shape, 5.4, 2.0 * q * m * k, m * k * 2, (), moco),
                    Case("MoCo, backward", shape, 10.9, 4.0 * q * m * k, m * k * 2, (), walk)]


def contrastive_warpgroups():
    """The same by cuda/contrastive/sm90: tiles of 128 x 192, products of 192 x 256, one block a multiprocessor."""
    n, d, f, b = 32768, 512, "contrastive/sm90/forward", "contrastive/sm90/backward"
    flop, tiles, smem, product = 2.0 * n * n * d, -(-n // 192), 8 * 16384 + 4 * 24576, 4 * 448 * 128
    lse = Launch("tiles", f, "sweep_tilesI.*bf16ELb1", 256, smem, 1024, 2 * n * d * 2 + n * 256 * 8, [tiles / 4, 8], {-1: 32}, work=wide_work)
    g, sums = 4096 * n * 2, 4096 * d
    parts = [Launch("slopes", b, "slopes_tilesI.*bf16ELb1", 256, smem + 2328, 128, g + 2 * n * d, [tiles / 4, 8], {-1: 32}, work=wide_work, times=8),
             Launch("dQ product", b, "product_tilesI.*bf16ELb0", 384, product, 132, g + n * d * 2, [171], work=wide_work, times=8),
             Launch("dQ sum", "contrastive_backward", "combineI.*bf16", 256, 0, 2112, 4 * sums * 4, turns=sums / 32, inner=[0, 1], wait=3 * WAIT, work=sum_work, times=8),
             Launch("dK product", b, "product_tilesI.*bf16ELb1", 384, product, 342, 4 * g + n * d * 8, [64], work=wide_work, times=8)]
    columns, name = merge(n, 256, 8), "contrastive by warpgroups, "
    return [Case(name + "forward", f"N{n}, d{d}", 1390, flop, 2 * n * d * 2, (), [lse, columns]),
            Case(name + "backward", f"N{n}, d{d}", 4180, 3 * flop, 4 * n * d * 2, (), parts),
            Case(name + "both", f"N{n}, d{d}", 5570, 4 * flop, 4 * n * d * 2, ("T", 500), [lse, columns] + parts)]


def memory():
    """Grids of masking_tokens.cu, masking_patches.cu, gather.cu, norm/layer_norm.cu, optim/step.cu."""
    grid, kept, tokens = SMS * 16, 4096 * 49, 4096 * 197
    t, p, ln, o = "masking_tokens", "masking_patches", "norm/layer_norm", "optim/step"
    wide = kept * 768 * 2
    rows, row = 32768, 768 * 2
    copy = lambda name, out, aim, launch: Case(name, launch[0], out / COPY * 1e6, 0, out, aim, launch[1])  # noqa: E731
    adam = 300e6
    fold = Launch("fold", ln, "fold_by_columns.*SharesIfEELi4E", 256, 4096, 12, 528 * 1536 * 4, turns=96, inner=[33], wait=33 * WAIT)
    return [
        copy("gather of tokens", 2 * wide, ("G", 0.85 * COPY / 1e9), ("4096x196x768 -> 49", [
            Launch("gather", t, "gather_rowsI.*bf16ELi8ELb0E", 256, 0, grid, 2 * wide, turns=kept, inner=[0], wait=2 * WAIT)])),
        copy("gather of tokens + pos.", 2 * wide, ("G", 0.85 * COPY / 1e9), ("4096x196x768 -> 49", [
            Launch("gather", t, "gather_rowsI.*bf16ELi8ELb1E", 256, 0, grid, 2 * wide, turns=kept, share=0.8, wait=2 * WAIT)])),
        copy("generic gather", 2 * wide, ("G", 0.85 * COPY / 1e9), ("the same, index expanded", [
            Launch("gather", "gather", "gather_anyI5uint4j", 256, 0, grid, 2 * wide, turns=kept * 3, inner=[2], wait=2 * WAIT)])),
        copy("decoder un-shuffle", 1036e6, (), ("4096x197x512", [
            Launch("unshuffle", t, "unshuffle_rowsI.*bf16ELi8E", 256, 0, grid, 1036e6, turns=tokens, share=0.55, wait=2 * WAIT)])),
        copy("patchify kept, u8 planes -> bf16", 462e6, (), ("4096x3x224x224, p16 -> 49", [
            # a sector of 32 bytes has a run of 16 and the neighbour's, which is kept too in one of four cases
            Launch("patches", p, "patch_runsIhNS.*bf16ELi8ELb0E", 256, 0, grid, wide + 1.75 * wide / 2, turns=kept, inner=[1.5], wait=4 * WAIT)])),
        copy("layer norm, forward", 2 * rows * row, (), ("32768x768", [
            Launch("rows", ln, "layer_norm_rowsI.*bf16ELi8ELi128E", 128, 128, grid, 2 * rows * row, turns=rows * 4, active=0.75, share=0.6, wait=WAIT + 400, work=norm_work)])),
        copy("layer norm, backward", 3 * rows * row, (), ("32768x768", [
            Launch("rows", ln, "layer_norm_rows_backwardI.*bf16ELi8ELi128E", 128, 128, 528, 3 * rows * row, turns=rows * 4,
                   active=0.75, share=0.6, wait=WAIT + 400, work=norm_work), fold])),
        copy("AdamW, f32", 28 * adam, (), ("300 M", [
            Launch("step", o, "optim_stepIf.*AdamRule", 256, 0, int(adam / 16384), 28 * adam, turns=adam / 128)])),
        copy("AdamW, bf16 with f32 copy", 28 * adam, (), ("300 M", [
            Launch("step", o, "optim_stepI.*bf16.*AdamRule", 256, 0, int(adam / 16384), 28 * adam, turns=adam / 256)])),
    ]


def cases():
    attention = plain("MAE-L encoder", 50, (24, 49), (2.6, 6.6)) + plain("ViT-L", 197, (96, 192), (41, 102))
    attention += plain("L/14@336", 577, (442, 1105), (349, 873))
    return vitdet(14) + vitdet(64) + attention + attention_warpgroups() + attention_warpgroups_backward() + contrastive() + contrastive_warpgroups() + memory()
