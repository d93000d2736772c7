"""The cases of single operations. See torch_cases.py."""

import torch
import torch.nn.functional as F

from torch_cases import ATTENTION, X, case, fill, no_grad, unit, with_grad

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

for shape in [(8, 12, 197, 64), (128, 12, 50, 64)]:

    @case("attention/" + "x".join(map(str, shape)))
    def _(shape=shape):
        qkv = [fill(shape, i, 2.0) for i in (1, 2, 3)]
        return {name: with_grad(f, fill(shape, 9), *qkv) for name, f in ATTENTION.items()}


# ---- contrastive losses


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
