"""PyTorch's side of the comparison. Protocol: README.md. Run by run.py with the Python of `--torch-venv`."""

import json
import math
import os
import sys
import time

import torch
import torch.nn.functional as F

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
torch.set_num_threads(THREADS)
CASES = {}
VARIANT = None  # the only variant asked for, if one was


def case(name):
    """Registers `prepare() -> {variant: function}`; the function does the work once and returns its tensors."""
    return lambda prepare: CASES.setdefault(name, prepare)


def fill(shape, seed, scale=1.0, mean=0.0):
    """The same numbers in every worker: a hash of (index, seed), uniform in mean ± scale. See worker.rs."""
    out = torch.empty(math.prod(shape))
    for start in range(0, out.numel(), 1 << 22):
        x = torch.arange(start, min(start + (1 << 22), out.numel()))
        x = (x + seed * 0x9E3779B9) & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        x = x ^ (x >> 16)
        out[start : start + x.numel()] = ((x >> 8).double() / (1 << 23) - 1.0) * scale + mean
    return out.view(shape)


def no_grad(f, *inputs):
    def run():
        with torch.no_grad():
            return (f(*inputs),)

    return run


def with_grad(f, dy, *inputs):
    """Forward and backward; `dy` is the gradient of the result."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]

    def run():
        for x in leaves:
            x.grad = None
        y = f(*leaves)
        y.backward(dy)
        return (y.detach(), *(x.grad for x in leaves))

    return run


# ---- matrix products

for m, k, n in [(1024, 1024, 1024), (4096, 768, 3072)]:

    @case(f"matmul/{m}x{k}x{n}")
    def _(m=m, k=k, n=n):
        return {"a @ b": no_grad(torch.matmul, fill((m, k), 1), fill((k, n), 2))}


for b, h, t, d in [(8, 12, 197, 64), (128, 12, 50, 64)]:

    @case(f"qk/{b}x{h}x{t}x{d}")
    def _(b=b, h=h, t=t, d=d):
        q, k = fill((b, h, t, d), 1), fill((b, h, t, d), 2)
        return {"q @ k.mT": no_grad(lambda q, k: q @ k.mT, q, k)}

    @case(f"av/{b}x{h}x{t}x{d}")
    def _(b=b, h=h, t=t, d=d):
        a, v = fill((b, h, t, t), 1), fill((b, h, t, d), 2)
        return {"a @ v": no_grad(torch.matmul, a, v)}


# ---- layer_norm, softmax, gelu

X = (8, 197, 768)
ROWS = {
    "layer_norm": (
        lambda x, w, b: F.layer_norm(x, X[-1:], w, b, 1e-6),
        lambda: (fill(X, 1, 2.0), fill(X[-1:], 2, 0.1, 1.0), fill(X[-1:], 3, 0.1)),
    ),
    "softmax": (lambda x: x.softmax(-1), lambda: (fill(X, 1, 4.0),)),
    "gelu": (F.gelu, lambda: (fill(X, 1, 3.0),)),
}
for name, (f, inputs) in ROWS.items():

    @case(f"{name}/forward")
    def _(f=f, inputs=inputs):
        return {"F": no_grad(f, *inputs())}

    @case(f"{name}/forward+backward")
    def _(f=f, inputs=inputs):
        return {"F": with_grad(f, fill(X, 9), *inputs())}


# ---- attention


def composed(q, k, v):
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


ATTENTION = {"composed": composed, "sdpa": F.scaled_dot_product_attention}

for shape in [(8, 12, 197, 64), (128, 12, 50, 64)]:

    @case("attention/" + "x".join(map(str, shape)))
    def _(shape=shape):
        qkv = [fill(shape, i, 2.0) for i in (1, 2, 3)]
        return {name: with_grad(f, fill(shape, 9), *qkv) for name, f in ATTENTION.items()}


# ---- contrastive losses


def unit(shape, seed):
    return F.normalize(fill(shape, seed), dim=-1)


def clip_two_products(image, text, scale):
    """open_clip's ClipLoss on one device."""
    labels = torch.arange(len(image))
    return (F.cross_entropy(scale * image @ text.T, labels) + F.cross_entropy(scale * text @ image.T, labels)) / 2


def clip_one_product(image, text, scale):
    logits, labels = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


@case("contrastive/4096x512")
def _():
    inputs = unit((4096, 512), 1), unit((4096, 512), 2), torch.tensor(14.0)
    losses = {"two products": clip_two_products, "one product": clip_one_product}
    return {name: with_grad(f, torch.tensor(1.0), *inputs) for name, f in losses.items()}


@case("info_nce/256x65536x128")
def _():
    n, k, d = 256, 65536, 128
    key, queue = unit((n, d), 2), unit((k, d), 3).T.contiguous()

    def moco(q):
        """moco/builder.py"""
        positive = torch.einsum("nc,nc->n", [q, key]).unsqueeze(-1)
        logits = torch.cat([positive, torch.einsum("nc,ck->nk", [q, queue.clone()])], dim=1)
        return F.cross_entropy(logits / 0.07, torch.zeros(n, dtype=torch.long))

    return {"moco": with_grad(moco, torch.tensor(1.0), unit((n, d), 1))}


# ---- convolution

for groups in [1, 4]:

    @case(f"conv2d/groups{groups}")
    def _(groups=groups):
        x, w, dy = fill((8, 64, 56, 56), 1), fill((64, 64 // groups, 3, 3), 2, 0.1), fill((8, 64, 56, 56), 9)
        f = lambda x, w: F.conv2d(x, w, padding=1, groups=groups)
        last = [t.contiguous(memory_format=torch.channels_last) for t in (dy, x, w)]
        return {"nchw": with_grad(f, dy, x, w), "channels_last": with_grad(f, *last)}


# ---- ResNet-50: torchvision's module in training mode


def fill_network(module, seed):
    """Gives parameters their numbers: the same rule by name and shape as in the other workers."""
    with torch.no_grad():
        for i, (name, p) in enumerate(module.named_parameters()):
            gain = p.ndim == 1 and name.endswith("weight")
            fan = p[0].numel() / p.shape[1] * p.shape[0] if p.ndim == 4 else sum(p.shape)
            scale = 0.1 if p.ndim == 1 else math.sqrt(6 / fan)
            p.copy_(fill(p.shape, seed + i, scale, float(gain)))
    return module


@case("resnet50")
def _():
    import torchvision

    variants = {}
    for name, layout in [("nchw", torch.contiguous_format), ("channels_last", torch.channels_last)]:
        model = fill_network(torchvision.models.resnet50(), 200).train().to(memory_format=layout)
        images = fill((BATCH, 3, SIDE, SIDE), 7, 1.7).contiguous(memory_format=layout)
        dy = fill((BATCH, 1000), 9)

        def run(model=model, images=images, dy=dy):
            model.zero_grad(set_to_none=True)
            y = model(images)
            y.backward(dy)
            return (y.detach(), *(p.grad for p in model.parameters()))

        variants[name] = run
    return variants


# ---- ViT block


def block(x, p, heads, attention):
    """`p`: norm1, qkv, proj, norm2, fc1, fc2, each weight and bias."""
    n, t, c = x.shape
    h = F.layer_norm(x, (c,), p[0], p[1], 1e-6)
    q, k, v = F.linear(h, p[2], p[3]).reshape(n, t, 3, heads, c // heads).permute(2, 0, 3, 1, 4).unbind(0)
    x = x + F.linear(attention(q, k, v).transpose(1, 2).reshape(n, t, c), p[4], p[5])
    h = F.layer_norm(x, (c,), p[6], p[7], 1e-6)
    return x + F.linear(F.gelu(F.linear(h, p[8], p[9])), p[10], p[11])


def linear(out, inp):
    return [((out, inp), math.sqrt(6 / (out + inp)), 0.0), ((out,), 0.02, 0.0)]


def norm(width):
    return [((width,), 0.1, 1.0), ((width,), 0.1, 0.0)]


def block_shapes(c):
    """(shape, scale, mean) of a block's parameters."""
    return norm(c) + linear(3 * c, c) + linear(c, c) + norm(c) + linear(4 * c, c) + linear(c, 4 * c)


@case("vit_block")
def _():
    p = [fill(shape, 10 + i, scale, mean) for i, (shape, scale, mean) in enumerate(block_shapes(768))]
    inputs = [fill(X, 1), *p]
    return {
        name: with_grad(lambda x, *p, f=f: block(x, p, 12, f), fill(X, 9), *inputs)
        for name, f in ATTENTION.items()
    }


# ---- MAE ViT-B/16 pre-training step: the official architecture (models_mae.py on timm's Block), batch 8

BATCH, SIDE, PATCH, WIDTH, DEPTH, HEADS = 8, 224, 16, 768, 12, 12
D_WIDTH, D_DEPTH, D_HEADS, PATCHES, KEEP = 512, 8, 16, 196, 49


def mae_shapes():
    """All parameters in the order of the official checkpoint, without the fixed position tables."""
    return (
        [((1, 1, WIDTH), 0.03, 0.0), ((1, 1, D_WIDTH), 0.03, 0.0)]
        + linear(WIDTH, 3 * PATCH * PATCH)  # reshaped to the convolution's [768, 3, 16, 16]
        + [s for _ in range(DEPTH) for s in block_shapes(WIDTH)]
        + norm(WIDTH)
        + linear(D_WIDTH, WIDTH)
        + [s for _ in range(D_DEPTH) for s in block_shapes(D_WIDTH)]
        + norm(D_WIDTH)
        + linear(3 * PATCH * PATCH, D_WIDTH)
    )


class Mae(torch.nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        p = [fill(shape, 100 + i, scale, mean) for i, (shape, scale, mean) in enumerate(mae_shapes())]
        p[2] = p[2].view(WIDTH, 3, PATCH, PATCH)
        self.p = torch.nn.ParameterList(p)
        self.pos = torch.nn.Parameter(fill((1, 1 + PATCHES, WIDTH), 5), requires_grad=False)
        self.d_pos = torch.nn.Parameter(fill((1, 1 + PATCHES, D_WIDTH), 6), requires_grad=False)

    def forward(self, imgs, noise):
        p = list(self.p)
        cls, mask_token, patch_w, patch_b, *p = p
        x = F.conv2d(imgs, patch_w, patch_b, stride=PATCH).flatten(2).transpose(1, 2)
        x = x + self.pos[:, 1:]
        # random_masking
        shuffle = torch.argsort(noise, dim=1)
        restore = torch.argsort(shuffle, dim=1)
        x = torch.gather(x, 1, shuffle[:, :KEEP].unsqueeze(-1).repeat(1, 1, WIDTH))
        mask = torch.ones(BATCH, PATCHES)
        mask[:, :KEEP] = 0
        mask = torch.gather(mask, 1, restore)
        # encoder
        x = torch.cat((cls.expand(BATCH, -1, -1) + self.pos[:, :1], x), dim=1)
        for _ in range(DEPTH):
            x, p = block(x, p[:12], HEADS, self.attention), p[12:]
        x = F.layer_norm(x, (WIDTH,), p[0], p[1], 1e-6)
        # decoder
        x, p = F.linear(x, p[2], p[3]), p[4:]
        tokens = torch.cat((x[:, 1:], mask_token.repeat(BATCH, PATCHES - KEEP, 1)), dim=1)
        tokens = torch.gather(tokens, 1, restore.unsqueeze(-1).repeat(1, 1, D_WIDTH))
        x = torch.cat((x[:, :1], tokens), dim=1) + self.d_pos
        for _ in range(D_DEPTH):
            x, p = block(x, p[:12], D_HEADS, self.attention), p[12:]
        x = F.layer_norm(x, (D_WIDTH,), p[0], p[1], 1e-6)
        pred = F.linear(x, p[2], p[3])[:, 1:]
        # loss, norm_pix_loss
        g = SIDE // PATCH
        target = imgs.reshape(BATCH, 3, g, PATCH, g, PATCH)
        target = torch.einsum("nchpwq->nhwpqc", target).reshape(BATCH, PATCHES, 3 * PATCH * PATCH)
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (var + 1e-6) ** 0.5
        loss = ((pred - target) ** 2).mean(-1)
        return (loss * mask).sum() / mask.sum()


class Step:
    """One variant of the step. The variants share one model, and one optimizer for each kind of AdamW."""

    def __init__(self, attention, forward, model, optimizer, initial):
        self.attention, self.forward, self.model, self.optimizer = attention, forward, model, optimizer
        self.initial = initial
        self.imgs, self.noise = fill((BATCH, 3, SIDE, SIDE), 7, 1.7), fill((BATCH, PATCHES), 8)

    def reset(self):
        self.optimizer.state.clear()
        with torch.no_grad():
            for p, start in zip(self.model.p, self.initial or []):
                p.copy_(start)
        self.initial = None

    def __call__(self):
        self.model.attention = self.attention
        loss = self.forward(self.imgs, self.noise)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return (loss.detach(),)


@case("mae_step")
def _():
    model = Mae(composed)
    compiled = torch.compile(model)
    groups = [
        {"params": [p for p in model.p if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in model.p if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = lambda **kind: torch.optim.AdamW([dict(g) for g in groups], lr=1e-4, betas=(0.9, 0.95), **kind)
    plain, fused = adamw(), adamw(fused=True)
    # A single variant is a fresh process whose memory is looked at: nothing is kept beside the step's own.
    initial = None if VARIANT else [p.detach().clone() for p in model.p]
    return {
        name: Step(ATTENTION[attention], forward, model, optimizer, initial)
        for name, attention, forward, optimizer in [
            ("eager, composed (official)", "composed", model, plain),
            ("eager, sdpa", "sdpa", model, plain),
            ("eager, sdpa, fused AdamW", "sdpa", model, fused),
            ("compile, composed, fused AdamW", "composed", compiled, fused),
            ("compile, sdpa, fused AdamW", "sdpa", compiled, fused),
        ]
    }


# ---- protocol


def timed(run):
    start = time.perf_counter()
    out = run()
    del out
    return time.perf_counter() - start


def squares(tensors):
    return [t.double().square().mean().item() for t in tensors]


def prepare(name, like):
    """Builds and warms up a case. The check of a variant: what its first two runs returned, as mean squares."""
    if name not in CASES:
        return [], {"unsupported": "not written"}
    runs, info = [], []
    for variant, run in CASES[name]().items():
        if VARIANT not in (None, variant) or like not in variant:
            continue
        if hasattr(run, "reset"):
            run.reset()
        check = squares(run())
        start = time.perf_counter()
        second = run()
        seconds = time.perf_counter() - start
        check += squares(second)
        del second
        if seconds < 0.5:
            seconds = min(timed(run) for _ in range(3))
        runs.append(run)
        info.append({"name": variant, "seconds": seconds, "check": check})
    return runs, {"variants": info}


def main():
    global VARIANT
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    say = lambda answer: print(json.dumps(answer), file=out, flush=True)
    say({"peer": "PyTorch", "version": torch.__version__, "threads": torch.get_num_threads()})
    runs = []
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "case" in request:
                runs = []
                VARIANT = request.get("variant")
                runs, answer = prepare(request["case"], request.get("like") or "")
            else:
                run = runs[request["run"]]
                answer = {"times": [timed(run) for _ in range(request["n"])]}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        say(answer)


main()
