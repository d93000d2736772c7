"""The ViT block, and the MAE pre-training step. See torch_cases.py."""

import math

import torch
import torch.nn.functional as F

from torch_cases import ATTENTION, BATCH, SIDE, Start, Step, X, case, fill, with_grad


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

PATCH, WIDTH, DEPTH, HEADS = 16, 768, 12, 12
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
    def __init__(self):
        super().__init__()
        p = [fill(shape, 100 + i, scale, mean) for i, (shape, scale, mean) in enumerate(mae_shapes())]
        p[2] = p[2].view(WIDTH, 3, PATCH, PATCH)
        self.p = torch.nn.ParameterList(p)
        self.pos = torch.nn.Parameter(fill((1, 1 + PATCHES, WIDTH), 5), requires_grad=False)
        self.d_pos = torch.nn.Parameter(fill((1, 1 + PATCHES, D_WIDTH), 6), requires_grad=False)

    def forward(self, imgs, noise, attention):
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
            x, p = block(x, p[:12], HEADS, attention), p[12:]
        x = F.layer_norm(x, (WIDTH,), p[0], p[1], 1e-6)
        # decoder
        x, p = F.linear(x, p[2], p[3]), p[4:]
        tokens = torch.cat((x[:, 1:], mask_token.repeat(BATCH, PATCHES - KEEP, 1)), dim=1)
        tokens = torch.gather(tokens, 1, restore.unsqueeze(-1).repeat(1, 1, D_WIDTH))
        x = torch.cat((x[:, :1], tokens), dim=1) + self.d_pos
        for _ in range(D_DEPTH):
            x, p = block(x, p[:12], D_HEADS, attention), p[12:]
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


@case("mae_step")
def _():
    model = Mae()
    compiled = torch.compile(model)
    groups = [
        {"params": [p for p in model.p if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in model.p if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = lambda **kind: torch.optim.AdamW([dict(g) for g in groups], lr=1e-4, betas=(0.9, 0.95), **kind)
    plain, fused, start = adamw(), adamw(fused=True), Start(model)
    imgs, noise = fill((BATCH, 3, SIDE, SIDE), 7, 1.7), fill((BATCH, PATCHES), 8)

    def step(attention, forward, optimizer):
        def losses():
            loss = forward(imgs, noise, ATTENTION[attention])
            return loss, [loss]

        return Step(losses, optimizer, start=start)

    return {
        "eager, composed (official)": step("composed", model, plain),
        "eager, sdpa": step("sdpa", model, plain),
        "eager, sdpa, fused AdamW": step("sdpa", model, fused),
        "compile, composed, fused AdamW": step("composed", compiled, fused),
        "compile, sdpa, fused AdamW": step("sdpa", compiled, fused),
    }
