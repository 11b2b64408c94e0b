"""The paper's algorithm in plain PyTorch, equation by equation, as one writes it without a library: to time beside.

Everything is as published, and nothing is fused, cached or left out: all pairs are formed, `torch.sort` sorts, the loss
of the inner loop is a mean over the batch (hence lr 800 for a batch of 32), and SciPy gets one sample after the other.
"""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from setpred import PooledEncoder, RelationEncoder
from tests.benchmarks.work import Clevr, Function, Mnist, huber_by_broadcasting


class PlainEncoder(nn.Module):
    """A set encoder with the parameters of one of ours: an MLP on each element or each pair, then FSPool."""

    def __init__(self, encoder: PooledEncoder | RelationEncoder) -> None:
        super().__init__()
        self.pairs = isinstance(encoder, RelationEncoder)
        self.layers = nn.ModuleList([encoder.pair, encoder.out] if self.pairs else encoder.layers)
        self.weight = encoder.pool.fspool.weight

    def forward(self, elements: Tensor, mask: Tensor) -> Tensor:
        """Encode."""
        x = torch.cat([elements, mask.unsqueeze(-1)], -1)
        if self.pairs:
            n = x.shape[1]
            left, right = x.unsqueeze(2).expand(-1, -1, n, -1), x.unsqueeze(1).expand(-1, n, -1, -1)
            x = torch.cat([left, right], -1).flatten(1, 2)
        for i, layer in enumerate(self.layers):
            x = layer(x) if i == 0 else layer(x.relu())
        return self.pool(x) / x.shape[1]

    def pool(self, x: Tensor) -> Tensor:
        """Sort each feature, weight each rank by a piecewise-linear function, sum."""
        n, pieces = x.shape[1], self.weight.shape[1] - 1
        position = torch.linspace(0, 1, n, device=x.device, dtype=x.dtype) * pieces
        left = position.floor().clamp(max=pieces - 1).long()
        right_part = position - left
        weights = self.weight[:, left] * (1 - right_part) + self.weight[:, left + 1] * right_part
        return (x.sort(dim=1, descending=True).values * weights.t()).sum(1)


def decode(
    encoder: nn.Module, z: Tensor, elements: Tensor, mask: Tensor, *, steps: int, lr: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Algorithm 1: gradient descent on the set, every step kept; with a graph where grad mode is on."""
    graph = torch.is_grad_enabled()
    sets, masks = [elements], [mask]
    with torch.enable_grad():
        for _ in range(steps):
            if not graph:
                elements, mask = elements.detach(), mask.detach()
            elements, mask = (x if x.requires_grad else x.requires_grad_() for x in (elements, mask))
            loss = F.smooth_l1_loss(encoder(elements, mask), z)
            of_elements, of_mask = torch.autograd.grad(loss, (elements, mask), create_graph=graph)
            elements, mask = elements - lr * of_elements, (mask - lr * of_mask).clamp(0, 1)
            sets.append(elements)
            masks.append(mask)
    return sets, masks


def hungarian(pred: Tensor, target: Tensor) -> Tensor:
    """Equation 2, a mean over elements and channels, one sample after the other."""
    costs = huber_by_broadcasting(pred, target)
    matched = []
    for sample, matrix in enumerate(costs.detach().cpu().numpy()):
        rows, cols = linear_sum_assignment(matrix)
        matched.append(costs[sample, rows, cols].mean())
    return torch.stack(matched).mean()


def chamfer(pred: Tensor, target: Tensor) -> Tensor:
    """Equation 1 from all pairs, means over each side's elements."""
    costs = huber_by_broadcasting(pred, target)
    return (costs.amin(-1).mean(-1) + costs.amin(-2).mean(-1)).mean()


class Plain:
    """The training step and the inference of a work, with its own parameters."""

    def __init__(self, work: Clevr | Mnist) -> None:
        self.work, self.encoder = work, PlainEncoder(work.decoder.encoder)

    def decode(self, z: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Decode from the learned initial set."""
        decoder = self.work.decoder
        start = decoder.initial_elements.expand(len(z), -1, -1)
        mask = start.new_full(start.shape[:2], 0.5)
        return decode(self.encoder, z, start, mask, steps=decoder.iters, lr=decoder.lr * len(z))

    def train(self) -> None:
        """Run forward and backward, with the work's own loss."""
        work = self.work
        work.decoder.zero_grad()
        present = work.mask.float()
        target = work.target * present.unsqueeze(-1)
        represented = self.encoder(target, present)
        wanted = torch.cat([target, present.unsqueeze(-1)], -1)
        sets, masks = self.decode(work.z if isinstance(work, Clevr) else represented)
        found = [torch.cat([x, m.unsqueeze(-1)], -1) for x, m in zip(sets, masks, strict=True)]
        if isinstance(work, Clevr):
            work.z.grad = None
            loss = hungarian(found[-1], wanted) + 0.1 * F.smooth_l1_loss(represented, work.z)
        else:
            loss = torch.stack([chamfer(one, wanted) for one in found]).mean()
        loss.backward()

    def infer(self) -> Function:
        """Make an inference."""

        def run() -> None:
            with torch.no_grad():
                self.decode(self.work.z.detach())

        return run
