"""Slow, literal transcriptions of the formulas: loops over samples, features, ranks, pairs and steps."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def piecewise_linear(knots: Tensor, r: float | Tensor) -> Tensor:
    """Evaluate f(r) = sum over p of max(0, 1 - |P r - p|) w_p."""
    pieces = len(knots) - 1
    return sum((max(0, 1 - abs(pieces * r - p)) * knots[p] for p in range(pieces + 1)), knots.new_zeros(()))


def sort_pool(elements: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """FSPool of sets that have only the elements whose mask is 1: sort, f at k/(n-1), sum."""
    batch, size, channels = elements.shape
    pooled = elements.new_zeros(batch, channels)
    for b in range(batch):
        present = [i for i in range(size) if mask is None or mask[b, i] == 1]
        for c in range(channels):
            ranked = sorted((elements[b, i, c] for i in present), reverse=True)
            for k, x in enumerate(ranked):
                r = k / (len(ranked) - 1) if len(ranked) > 1 else 0.0
                pooled[b, c] += piecewise_linear(weight[c], r) * x
    return pooled


def soft_sort_pool(elements: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """FSPool of sets of soft sizes: weight m_k f(r_k) at r_k = sum_{j<k} m_j / (n-1), n = sum of m."""
    batch, size, channels = elements.shape
    pooled = elements.new_zeros(batch, channels)
    for b in range(batch):
        n = mask[b].sum()
        for c in range(channels):
            order = sorted((i for i in range(size) if mask[b, i] > 0), key=lambda i: -elements[b, i, c])
            for k, i in enumerate(order):
                ahead = sum((mask[b, j] for j in order[:k]), mask.new_zeros(()))
                r = min(ahead / max(n - 1, 1), 1)
                pooled[b, c] += mask[b, i] * piecewise_linear(weight[c], r) * elements[b, i, c]
    return pooled


def neural_sort(s: Tensor, temperature: float) -> Tensor:
    """Relax the descending sort of a vector: row i is softmax(((n + 1 - 2i) s - A 1) / temperature), i from 1."""
    n = len(s)
    distance = torch.stack([sum((abs(s[j] - s[k]) for k in range(n)), s.new_zeros(())) for j in range(n)])
    return torch.stack([(((n + 1 - 2 * i) * s - distance) / temperature).softmax(0) for i in range(1, n + 1)])


def relaxed_sort_pool(elements: Tensor, weight: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """FSPool of the present elements, sorted by NeuralSort."""
    batch, _, channels = elements.shape
    pooled = elements.new_zeros(batch, channels)
    for b in range(batch):
        present = elements[b][mask[b]]
        n = len(present)
        for c in range(channels) if n else ():
            ranked = neural_sort(present[:, c], temperature) @ present[:, c]
            for k in range(n):
                pooled[b, c] += piecewise_linear(weight[c], k / max(n - 1, 1)) * ranked[k]
    return pooled


def sort_unpool(vector: Tensor, elements: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """FSUnpool in the order of ``elements``: the element of rank k gets f(k/(n-1)) y."""
    unpooled = torch.zeros_like(elements)
    for b in range(len(vector)):
        present = [i for i in range(elements.shape[1]) if mask[b, i] == 1]
        for c in range(vector.shape[1]):
            for k, i in enumerate(sorted(present, key=lambda i: -elements[b, i, c])):
                unpooled[b, i, c] = piecewise_linear(weight[c], k / max(len(present) - 1, 1)) * vector[b, c]
    return unpooled


def mlp(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Apply linear layers, given as (weight, bias), with ReLU between them, to one vector."""
    for i, (weight, bias) in enumerate(layers):
        x = weight @ x + bias
        if i < len(layers) - 1:
            x = torch.stack([max(value, value.new_zeros(())) for value in x])
    return x


def pool(rows: Sequence[Tensor], kind: str, weight: Tensor | None) -> Tensor:
    """Pool one set's rows; FSPool is divided by their number."""
    if kind == "fspool":
        return sort_pool(torch.stack(list(rows)).unsqueeze(0), weight)[0] / len(rows)
    if kind == "max":
        return torch.stack([max(row[c] for row in rows) for c in range(len(rows[0]))])
    total = sum(rows, torch.zeros_like(rows[0]))
    return total / len(rows) if kind == "mean" else total


def set_encoder(
    elements: Tensor,
    mask: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    kind: str,
    weight: Tensor | None,
    *,
    pairs: bool,
    size_feature: bool,
) -> Tensor:
    """MLP over each [y_i; m_i], or each pair [y_i; m_i; y_j; m_j], then a pool; perhaps 4 * mean of the mask."""
    vectors = []
    for b in range(len(elements)):
        members = [torch.cat([y, m.view(1)]) for y, m in zip(elements[b], mask[b], strict=True)]
        inputs = [torch.cat([left, right]) for left in members for right in members] if pairs else members
        vector = pool([mlp(x, layers) for x in inputs], kind, weight)
        vectors.append(torch.cat([vector, 4 * mask[b].sum().view(1) / len(members)]) if size_feature else vector)
    return torch.stack(vectors)


def descend(
    objective: Callable[[Tensor], Tensor],
    y: Tensor,
    *,
    steps: int,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    grad_clip: float | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
    tol: float | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Descend one sample, a vector, every step with a graph; returns all points, objectives and gradient norms."""
    if not y.requires_grad:
        y = y.clone().requires_grad_()
    velocity = torch.zeros_like(y)
    points, losses, norms = [y], [], []
    for _ in range(steps):
        loss = objective(y)
        (gradient,) = torch.autograd.grad(loss, y, create_graph=True)
        norm = sum(g**2 for g in gradient) ** 0.5
        losses.append(loss)
        norms.append(norm)
        if tol is None or loss > tol:
            if grad_clip is not None and norm > grad_clip:
                gradient = gradient * grad_clip / norm
            velocity = momentum * velocity + gradient
            direction = gradient + momentum * velocity if nesterov else velocity
            y = y - lr * direction
            if project is not None:
                y = project(y)
        points.append(y)
    return points, losses, norms


def representation_loss(representation: Tensor, target: Tensor, kind: str) -> Tensor:
    """Mean over features of the Huber or half squared difference, per sample."""

    def of_difference(x: Tensor) -> Tensor:
        return 0.5 * x**2 if kind == "mse" or abs(x) < 1 else abs(x) - 0.5

    batch, features = target.shape
    per_sample = [
        sum((of_difference(representation[b, d] - target[b, d]) for d in range(features)), target.new_zeros(()))
        for b in range(batch)
    ]
    return torch.stack(per_sample) / features
