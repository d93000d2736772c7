"""ResNet-50, and the training steps of MoCo v2 and SimSiam with it: torchvision's module. See torch_cases.py."""

import torch
import torch.nn.functional as F
from torch import nn

from torch_cases import BATCH, SIDE, Step, Unsupported, case, fill, fill_network, unit, weights

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def resnet50(layout, classes, **options):
    try:
        import torchvision
    except ImportError:
        raise Unsupported("needs torchvision: pip install torchvision in the environment of --torch-venv") from None
    return torchvision.models.resnet50(num_classes=classes, **options).train().to(memory_format=layout)


def images(layout, seed=7):
    return fill((BATCH, 3, SIDE, SIDE), seed, 1.7).contiguous(memory_format=layout)


@case("resnet50")
def _():
    variants = {}
    for name, layout in LAYOUTS.items():
        model, x, dy = fill_network(resnet50(layout, 1000), 200), images(layout), fill((BATCH, 1000), 9)

        def run(model=model, x=x, dy=dy):
            model.zero_grad(set_to_none=True)
            y = model(x)
            y.backward(dy)
            return (y.detach(), *(p.grad for p in weights(model)))

        variants[name] = run
    return variants


def sgd(module, lr):
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr, momentum=0.9, weight_decay=1e-4, fused=True)


# ---- MoCo v2 (arXiv 2003.04297): two layers in the head, K 65536, m 0.999, T 0.2

KEYS, WIDTH = 65536, 128


class Moco:
    """Two encoders and a queue in one process: the keys' order is drawn among the images that there are."""

    def __init__(self, layout):
        self.query, self.key = self.encoder(layout), self.encoder(layout).requires_grad_(False)
        self.queue, self.at = unit((KEYS, WIDTH), 3).T.contiguous(), 0
        self.views = images(layout, 7), images(layout, 8)

    @staticmethod
    def encoder(layout):
        net = resnet50(layout, WIDTH)
        net.fc = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), net.fc)
        return fill_network(net, 300)

    @torch.no_grad()
    def keys(self, x):
        for mine, theirs in zip(self.key.parameters(), self.query.parameters()):
            mine.mul_(0.999).add_(theirs, alpha=0.001)
        order = torch.randperm(len(x))
        return F.normalize(self.key(x[order]), dim=1)[order.argsort()]

    @torch.no_grad()
    def enqueue(self, keys):
        self.queue[:, self.at : self.at + len(keys)] = keys.T
        self.at = (self.at + len(keys)) % KEYS

    def forward(self):
        q = F.normalize(self.query(self.views[0]), dim=1)
        k = self.keys(self.views[1])
        # a copy, because the queue changes before the backward pass
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone()], dim=1) / 0.2
        self.enqueue(k)
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
        return loss, [loss]


@case("moco_v2_step")
def _():
    variants = {}
    for name, layout in LAYOUTS.items():
        moco = Moco(layout)
        variants[name] = Step(moco.forward, sgd(moco.query, 0.001), weights(moco.query))
    return variants


# ---- SimSiam (arXiv 2011.10566): d 2048, predictor 512


class SimSiam(nn.Module):
    def __init__(self, layout):
        super().__init__()
        net, d = resnet50(layout, 2048, zero_init_residual=True), 2048
        net.fc.bias.requires_grad_(False)  # the norm behind it would cancel it
        hidden = lambda: [nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU()]
        net.fc = nn.Sequential(*hidden(), *hidden(), net.fc, nn.BatchNorm1d(d, affine=False))
        self.encoder = net
        narrow = [nn.Linear(d, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU()]
        self.predictor = nn.Sequential(*narrow, nn.Linear(512, d))

    def forward(self, x1, x2):
        z1, z2 = self.encoder(x1), self.encoder(x2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        both = F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()
        # the loss of an untrained network is nearly 0, so that it cannot be compared
        return -both / 2, [p1, p2]


@case("simsiam_step")
def _():
    variants = {}
    for name, layout in LAYOUTS.items():
        model, x1, x2 = fill_network(SimSiam(layout), 400), images(layout, 7), images(layout, 8)
        forward = lambda model=model, x1=x1, x2=x2: model(x1, x2)
        variants[name] = Step(forward, sgd(model, 0.0016), weights(model))
    return variants
