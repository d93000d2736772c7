"""What the modules of PyTorch's side share: the register of cases, and the numbers all workers compute on."""

import math

import torch
import torch.nn.functional as F

CASES = {}
X = (8, 197, 768)
BATCH, SIDE = 8, 224


class Unsupported(Exception):
    """Raised by a case that cannot be done here; its text says why."""


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


def unit(shape, seed):
    return F.normalize(fill(shape, seed), dim=-1)


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


def composed(q, k, v):
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


ATTENTION = {"composed": composed, "sdpa": F.scaled_dot_product_attention}


# ---- whole models


def by_name(module):
    """Its parameters, in the order of their names: an order that all workers have."""
    return sorted(module.named_parameters())


def weights(module):
    """The trained parameters whose gradients are compared: not gains and shifts, in which few numbers sum up many, so
    that a single activation whose sign rounding changes shows in them."""
    return [p for _, p in by_name(module) if p.requires_grad and p.ndim > 1]


def scale_and_mean(name, shape):
    """The last gain of a bottleneck (bn3) is small: with 1 rounding changes the signs of so many activations that two
    formats of the same network differ by some per cent in their gradients."""
    if len(shape) == 4:
        return math.sqrt(6 / (shape[0] * shape[2] * shape[3])), 0.0
    if len(shape) > 1:
        return math.sqrt(6 / sum(shape)), 0.0
    if name.endswith("bn3.weight"):
        return 0.01, 0.1
    return 0.1, 1.0 if name.endswith("weight") else 0.0


def fill_network(module, seed):
    """Gives parameters their numbers, by a rule on names and shapes that all workers have. A scalar keeps its own."""
    with torch.no_grad():
        for i, (name, p) in enumerate(by_name(module)):
            if p.ndim > 0:
                p.copy_(fill(p.shape, seed + i, *scale_and_mean(name, p.shape)))
    return module


class Start:
    """A module's first numbers: what variants that share the module begin with."""

    def __init__(self, module):
        self.module, self.values = module, None

    def restore(self):
        with torch.no_grad():
            if self.values is None:
                self.values = [p.detach().clone() for p in self.module.parameters()]
            for p, value in zip(self.module.parameters(), self.values):
                p.copy_(value)


class Step:
    """A training step. Returns the results to compare, which `forward` gives beside the loss, and the gradients of
    `parameters`."""

    def __init__(self, forward, optimizer, parameters=(), start=None, after=None):
        self.forward, self.optimizer, self.parameters = forward, optimizer, parameters
        self.start, self.after = start, after

    def reset(self):
        """Called before its first run, unless no other variant runs: then nothing is kept that is not its own."""
        self.optimizer.state.clear()
        if self.start:
            self.start.restore()

    def __call__(self):
        loss, results = self.forward()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.after:
            self.after()
        return (*(result.detach() for result in results), *(p.grad for p in self.parameters))
