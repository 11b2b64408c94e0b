"""How strongly the inner loss of fresh encoders is curved: python -m tests.encoders.curvature writes the docs' tables.

The curvature is the largest eigenvalue of the Hessian of a sample's inner loss, half squared errors averaged over the
features, with respect to its elements and mask, where the loss is 0: there the Hessian is J^T J / D, J the encoder's
Jacobian. The step of gradient descent is stable below 2 / curvature.
"""

import argparse
import os
import platform
from collections.abc import Iterator
from itertools import product
from random import Random
from typing import Any

import torch
from torch import Tensor

from setpred import PooledEncoder, RelationEncoder
from setpred.encoders.base import EncoderBase
from setpred.encoders.scaling import SCALINGS

POOLS = ("fspool", "sum", "mean", "max")
# (N, C, D, width, layers), pairs where layers is 0.
SIZES = [
    (10, 18, 512, 512, 2),
    (10, 18, 512, 512, 3),
    (5, 4, 256, 128, 2),
    (5, 4, 256, 128, 4),
    (342, 2, 64, 256, 3),
    (32, 2, 128, 128, 3),
    (10, 18, 512, 512, 0),
    (5, 4, 64, 128, 0),
]


def make(channels: int, features: int, width: int, layers: int, **options: Any) -> EncoderBase:
    """Make an encoder; of pairs where ``layers`` is 0."""
    if layers == 0:
        return RelationEncoder(channels, features, width, **options)
    return PooledEncoder(channels, features, width, layers=layers, **options)


def starts(size: int, channels: int) -> list[tuple[Tensor, Tensor]]:
    """Sets of one sample as the decoder starts from: standardised, learned, random."""
    shape, mask = (1, size, channels), torch.full((1, size), 0.5)
    return [(torch.randn(shape), mask), (torch.rand(shape), mask), (0.1 * torch.randn(shape), mask)]


def curvature(encoder: EncoderBase, elements: Tensor, mask: Tensor, iterations: int = 20) -> float:
    """Largest eigenvalue of J^T J / D by power iteration, which comes from below."""
    elements, mask = elements.requires_grad_(), mask.clone().requires_grad_()
    vector = encoder(elements, mask)
    back = torch.zeros_like(vector, requires_grad=True)
    transposed = torch.autograd.grad(vector, (elements, mask), back, create_graph=True)  # J^T back
    found = [torch.randn_like(elements), torch.randn_like(mask)]
    for _ in range(iterations):
        norm = torch.stack([part.norm() for part in found]).norm()
        inner = sum((a * b).sum() for a, b in zip(transposed, found, strict=True)) / norm
        (forth,) = torch.autograd.grad(inner, back, retain_graph=True)  # J found
        features = forth / vector.shape[1]
        found = list(torch.autograd.grad(vector, (elements, mask), features, retain_graph=True))
    return torch.stack([part.norm() for part in found]).norm().item()


def drawn(count: int, seed: int, pairs: bool) -> Iterator[tuple[int, int, int, int, int]]:
    """Draw sizes of the whole range, its ends more often; pairs are kept to what fits in memory."""
    random = Random(seed)

    def between(least: int, most: int) -> int:
        exponent = min(max(random.uniform(-0.2, 1.2), 0), 1)
        return round(least * (most / least) ** exponent)

    while count:
        sizes = between(4, 512), between(1, 18), between(16, 1024), between(32, 512), random.randint(1, 4)
        size, _, features, width, _ = sizes
        if pairs and size**2 * (features + width) > 2**23:
            continue
        count -= 1
        yield (*sizes[:4], 0) if pairs else sizes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.encoders.curvature")
    parser.add_argument("--draws", type=int, default=200, help="of sizes for each row (default: %(default)s)")
    draws = parser.parse_args().draws
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, PyTorch {torch.__version__}\n")
    print("| N, C, D, width, layers |", *(f'`"{scaling}"` |' for scaling in SCALINGS))
    print("|---" * (1 + len(SCALINGS)) + "|")
    for size, *rest in SIZES:
        cells = []
        for scaling in SCALINGS:
            torch.manual_seed(0)
            values = [curvature(make(*rest, scaling=scaling), *starts(size, rest[0])[0]) for _ in range(8)]
            cells.append(f"{torch.tensor(values).median():.1g}")
        kind = "pairs" if rest[-1] == 0 else rest[-1]
        print(f"| {size}, {rest[0]}, {rest[1]}, {rest[2]}, {kind} |", *(f"{cell} |" for cell in cells), flush=True)
    print("\n| encoder | pool | 1 % | 50 % | 99 % | in 0.2 to 2 |\n|---|---|---|---|---|---|")
    for pairs, pool in product((False, True), POOLS):
        torch.manual_seed(0)
        values = [
            curvature(make(*rest, pool=pool, size_feature=bool(i % 2)), *starts(size, rest[0])[i % 3])
            for i, (size, *rest) in enumerate(drawn(draws, 0, pairs))
        ]
        every = torch.tensor(values)
        quantiles = " | ".join(f"{q:.2f}" for q in every.quantile(torch.tensor([0.01, 0.5, 0.99])))
        inside = ((every >= 0.2) & (every <= 2)).float().mean()
        name = "RelationEncoder" if pairs else "PooledEncoder"
        print(f'| `{name}` | `"{pool}"` | {quantiles} | {inside:.1%} |', flush=True)


if __name__ == "__main__":
    main()
