"""The training step of FLIP, and of CLIP, which leaves no patch out: open_clip's own model. See torch_cases.py."""

import torch
from torch import nn

from torch_cases import SIDE, Start, Step, Unsupported, case, fill, fill_network, weights

PAIRS, PATCHES = 16, 196


class GivenDropout(nn.Module):
    """open_clip's PatchDropout, but for the noise, which is given: so all peers keep the same patches."""

    def __init__(self, prob):
        super().__init__()
        self.kept, self.noise = int(PATCHES * (1 - prob)), fill((PAIRS, PATCHES), 8)
        self.rows = torch.arange(PAIRS).unsqueeze(1)

    def forward(self, x):
        ids = self.noise.topk(self.kept, dim=1).indices
        return torch.cat([x[:, :1], x[:, 1:][self.rows, ids]], dim=1)


def texts():
    """16 texts of 8 to 38 tokens: start, words, end (the largest id, which is pooled), padding. See steps.rs."""
    words = ((fill((PAIRS, 77), 5) + 1) * 20000).long() + 1
    place, last = torch.arange(77), torch.arange(7, 39, 2).unsqueeze(1)
    words[:, 0] = 49406
    return torch.where(place < last, words, torch.where(place == last, 49407, 0))


def step(prob):
    try:
        import open_clip
    except ImportError:
        raise Unsupported("needs open_clip: pip install open_clip_torch in the environment of --torch-venv") from None
    model = fill_network(open_clip.create_model("ViT-B-16", force_patch_dropout=prob), 500).train()
    if prob > 0:
        model.visual.patch_dropout = GivenDropout(prob)
    decays = lambda p: p.ndim > 1
    groups = [
        {"params": [p for p in model.parameters() if decays(p)], "weight_decay": 0.2},
        {"params": [p for p in model.parameters() if not decays(p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)
    images, tokens, criterion = fill((PAIRS, 3, SIDE, SIDE), 7, 1.7), texts(), open_clip.ClipLoss()

    @torch.no_grad()
    def clamp():
        model.logit_scale.clamp_(0, 4.605170185988092)  # ln 100

    start = Start(model)

    def variant(forward):
        def losses():
            loss = criterion(*forward(images, tokens))
            return loss, [loss]

        return Step(losses, optimizer, weights(model), start, clamp)

    return {"eager, fused AdamW": variant(model), "compile, fused AdamW": variant(torch.compile(model))}


@case("flip_step")
def _():
    return step(0.5)


@case("clip_step")
def _():
    return step(0.0)
