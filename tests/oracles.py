"""Slow, literal transcriptions of the formulas: loops over samples, features, ranks, pairs and steps."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from setpred import AttentionEncoder


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
    """Pool one set's rows."""
    if kind == "fspool":
        return sort_pool(torch.stack(list(rows)).unsqueeze(0), weight)[0]
    if kind == "max":
        return torch.stack([max(row[c] for row in rows) for c in range(len(rows[0]))])
    total = sum(rows, torch.zeros_like(rows[0]))
    return total / len(rows) if kind == "mean" else total


def divisor(scaling: str, kind: str, n: int, rows: int, inputs: int, features: int, pieces: int = 20) -> float:
    """What the pool of ``rows`` rows, made of n elements of ``inputs`` channels with the mask, is divided by."""
    if scaling == "conditioned":
        s, e = {
            "fspool": (1 + rows / pieces, (n + rows / pieces) / (1 + rows / pieces)),
            "sum": (rows, 1),
            "mean": (1 / rows, 1),
            "max": (n / (2 * rows), 1),
        }[kind]
        return math.sqrt(rows * s / (0.35 * inputs * n)) * (1 + math.sqrt(inputs * e / features))
    if kind == "fspool":
        return {"dspn": rows, "idspn": math.sqrt(rows)}[scaling]
    return 1


def set_encoder(
    elements: Tensor,
    mask: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    kind: str,
    weight: Tensor | None,
    *,
    pairs: bool,
    size_feature: bool,
    scaling: str,
) -> Tensor:
    """MLP over each [y_i; m_i], or each pair [y_i; m_i; y_j; m_j], then a scaled pool; perhaps the size."""
    vectors = []
    for b in range(len(elements)):
        members = [torch.cat([y, m.view(1)]) for y, m in zip(elements[b], mask[b], strict=True)]
        inputs = [torch.cat([left, right]) for left in members for right in members] if pairs else members
        vector = pool([mlp(x, layers) for x in inputs], kind, weight)
        vector = vector / divisor(scaling, kind, len(members), len(inputs), len(members[0]), len(vector))
        size = 2 * len(members) ** -0.5 if scaling == "conditioned" else 4 / len(members)
        vectors.append(torch.cat([vector, size * mask[b].sum().view(1)]) if size_feature else vector)
    return torch.stack(vectors)


def idspn_encoder(set_: Tensor, layers: Sequence[tuple[Tensor, Tensor]], weight: Tensor, *, pairs: bool) -> Tensor:
    """Encode sets (B, N, C) as iDSPN's code: a weight (rows, D) for each rank, ranks ascending, nothing divided."""
    vectors = []
    for members in set_:
        inputs = [torch.cat([left, right]) for left in members for right in members] if pairs else members
        rows = torch.stack([mlp(x, layers) for x in inputs])
        ranked = [sorted(feature) for feature in rows.T]
        sums = [sum(w * x for w, x in zip(*pair, strict=True)) for pair in zip(weight.T, ranked, strict=True)]
        vectors.append(torch.stack(sums))
    return torch.stack(vectors)


def attention_encoder(encoder: AttentionEncoder, elements: Tensor, mask: Tensor) -> Tensor:
    """Sums over elements, one by one, as the docstring of AttentionEncoder has them."""

    def attend(block: Any, query: Tensor, rows: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        def bounded(x: Tensor) -> Tensor:
            return x / torch.sqrt(1 + x.square().sum() / len(x))

        heads = []
        for h in range(block.heads):
            q = bounded(block.query(query).chunk(block.heads)[h])
            above, below = 0, 1
            for row, m in zip(rows, masks, strict=True):
                logit = q @ bounded(block.key(row).chunk(block.heads)[h]) / len(q) ** 0.5
                above = above + m * torch.exp(m * logit) * block.value(row).chunk(block.heads)[h]
                below = below + m * torch.exp(m * logit)
            heads.append(above / below)
        x = query + block.out(torch.cat(heads))
        return x + block.feed(x).relu()

    vectors = []
    for members, presence in zip(elements, mask, strict=True):
        rows = [encoder.embed(torch.cat([y, m.view(1)])) for y, m in zip(members, presence, strict=True)]
        for layer in encoder.layers:
            if layer.points is None:
                rows = [attend(layer.spread, row, rows, presence) for row in rows]
            else:
                points = [attend(layer.gather, point, rows, presence) for point in layer.points]
                rows = [attend(layer.spread, row, points, torch.ones(len(points))) for row in rows]
        rows = [encoder.feed(row).relu() for row in rows]
        if hasattr(encoder.pool, "seed"):
            pooled = attend(encoder.pool.attention, encoder.pool.seed[0], rows, presence)
            vectors.append(encoder.out(torch.sqrt(1 + presence.sum()) * pooled))
        else:
            vectors.append(encoder.pool(torch.stack([encoder.out(row) for row in rows]).unsqueeze(0))[0])
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
    polyak: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Descend one sample, a vector, every step with a graph; returns all points, objectives and gradient norms.

    With `polyak`, `lr` is the largest step, of which the velocity is a part.
    """
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
            if polyak:
                size = loss / norm**2 if norm > 0 and loss / norm**2 < lr else lr
                velocity = momentum * velocity + size * gradient
                y = y - (size * gradient + momentum * velocity)
            else:
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


def moments(elements: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over the present elements; none of channels that have no scale."""
    location, scale = [], []
    for c in range(elements.shape[2]):
        present = [elements[s, i, c].item() for s, i in mask.nonzero().tolist()]
        mean = math.fsum(present) / len(present)
        deviation = (math.fsum((x - mean) ** 2 for x in present) / len(present)) ** 0.5
        flag, constant = set(present) <= {0.0, 1.0}, len(set(present)) == 1
        location.append(0.0 if flag else mean)
        scale.append(1.0 if flag or constant else deviation)
    return elements.new_tensor(location), elements.new_tensor(scale)


def pair_cost(x: Tensor, y: Tensor, kind: str) -> Tensor:
    """Cost of one pair, a mean over channels."""
    total = x.new_zeros(())
    for difference in (x - y).unbind():
        size = difference.abs()
        if kind == "huber":
            total = total + (size**2 / 2 if size < 1 else size - 1 / 2)
        else:
            total = total + (size**2 if kind == "mse" else size)
    return total / len(x)


def least_assignment(cost: Tensor) -> Tensor:
    """Least total cost of matching all of the smaller side, over all ways to do it."""
    rows, cols = cost.shape
    if rows > cols:
        return least_assignment(cost.T)
    ways = itertools.permutations(range(cols), rows)
    return min(sum((cost[i, j] for i, j in enumerate(way)), cost.new_zeros(())) for way in ways)


def _cross_entropy(mask: Tensor, chosen: set[int]) -> Tensor:
    value = mask.new_zeros(())
    for i, m in enumerate(mask):
        value = value - (m.log() if i in chosen else (1 - m).log())
    return value / len(mask)


def hungarian_loss(
    pred: Tensor, target: Tensor, pred_mask: Tensor, target_mask: Tensor, kind: str, presence: str, weight: float = 1.0
) -> Tensor:
    """Hungarian loss of one set, by brute force; ``target`` has no more rows than ``pred``."""
    if presence == "logits":
        pred_mask, presence = pred_mask.sigmoid(), "bce"
    n = len(pred)
    if presence == "feature":
        left = [torch.cat([x, m.view(1)]) for x, m in zip(pred, pred_mask, strict=True)]
        right = [torch.cat([y * m, m.view(1)]) for y, m in zip(target, target_mask, strict=True)]
        right += [torch.zeros_like(left[0])] * (n - len(right))
    else:
        left, right = list(pred), [y for y, m in zip(target, target_mask, strict=True) if m == 1]
    costs = [[pair_cost(x, y, kind) for y in right] for x in left]
    numbers = [[cost.item() for cost in row] for row in costs]
    ways = itertools.permutations(range(n), len(right))
    best = min(ways, key=lambda way: sum(numbers[i][j] for j, i in enumerate(way)))
    value = sum((costs[i][j] for j, i in enumerate(best)), pred.new_zeros(())) / max(len(right), 1)
    return value + weight * _cross_entropy(pred_mask, set(best)) if presence == "bce" else value


def chamfer_loss(
    pred: Tensor, target: Tensor, pred_mask: Tensor, target_mask: Tensor, kind: str, presence: str, weight: float = 1.0
) -> Tensor:
    """Chamfer loss of one set."""
    if presence == "logits":
        pred_mask, presence = pred_mask.sigmoid(), "bce"
    if presence == "feature":
        left = {i: torch.cat([pred[i], pred_mask[i].view(1)]) for i in range(len(pred))}
        right = [torch.cat([y * m, m.view(1)]) for y, m in zip(target, target_mask, strict=True)]
        weights = dict.fromkeys(left, pred.new_ones(()))
    else:
        left = {i: pred[i] for i in range(len(pred)) if pred_mask[i] > 0}
        right = [y for y, m in zip(target, target_mask, strict=True) if m == 1]
        weights = {i: pred_mask[i] for i in left}
    value, matched = pred.new_zeros(()), set()
    if left and right:
        nearest = [min(pair_cost(x, y, kind) for y in right) for x in left.values()]
        total = sum(weights.values())
        value = value + sum(weights[i] * cost for i, cost in zip(left, nearest, strict=True)) / total
        for y in right:
            costs = {i: pair_cost(x, y, kind) for i, x in left.items()}
            chosen = min(costs, key=lambda i: costs[i])
            matched.add(chosen)
            value = value + costs[chosen] / len(right)
    return value + weight * _cross_entropy(pred_mask, matched) if presence == "bce" else value


def decode(
    encoder: Callable[[Tensor, Tensor | None], Tensor],
    z: Tensor,
    elements: Tensor,
    mask: Tensor | None,
    *,
    iters: int,
    lr: float,
    mask_clamp: tuple[float, float] | None = (0.0, 1.0),
    repr_loss: str = "huber",
    momentum: float = 0.0,
    nesterov: bool = False,
    anchor: float = 0.0,
    grad_clip: float | None = None,
    project: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    tol: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DSPN of each sample by itself, with a graph: elements, masks, losses and gradient norms, steps first."""
    ones = torch.ones_like(elements[..., 0])
    samples = []
    for b in range(len(z)):
        start = elements[b : b + 1]
        y, m = start, (ones if mask is None else mask)[b : b + 1]
        y_velocity, m_velocity = torch.zeros_like(y), torch.zeros_like(m)
        points, losses, norms = [(y, m)], [], []
        for _ in range(iters):
            y, m = y + torch.zeros_like(y, requires_grad=True), m + torch.zeros_like(m, requires_grad=True)
            loss = representation_loss(encoder(y, None if mask is None else m), z[b : b + 1], repr_loss).sum()
            loss = loss + anchor * 0.5 * ((y - start) ** 2).sum() / y.numel()
            y_gradient, m_gradient = torch.autograd.grad(loss, (y, m), create_graph=True, materialize_grads=True)
            norm = ((y_gradient**2).sum() + (m_gradient**2).sum()) ** 0.5
            losses.append(loss)
            norms.append(norm)
            if tol is None or loss > tol:
                scale = grad_clip / norm if grad_clip is not None and norm > grad_clip else 1.0
                y_gradient, m_gradient = scale * y_gradient, scale * m_gradient
                y_velocity, m_velocity = momentum * y_velocity + y_gradient, momentum * m_velocity + m_gradient
                if nesterov:
                    y = y - lr * (y_gradient + momentum * y_velocity)
                    m = m - lr * (m_gradient + momentum * m_velocity)
                else:
                    y, m = y - lr * y_velocity, m - lr * m_velocity
                m = m if mask_clamp is None else m.clamp(*mask_clamp)
                if project is not None:
                    y, m = project(y, m)
            points.append((y, m if mask is not None else ones[b : b + 1]))
        elements_of, masks_of = zip(*points, strict=True)
        samples.append([torch.cat(elements_of), torch.cat(masks_of), torch.stack(losses), torch.stack(norms)])
    trajectory, masks, losses, norms = (torch.stack(parts, 1) for parts in zip(*samples, strict=True))
    return trajectory, masks, losses, norms


def box_iou(a: Tensor, b: Tensor, pixel: float = 0.0) -> float:
    """Intersection over union of two boxes (left, top, right, bottom), each side ``pixel`` longer than it is."""
    left, top, right, bottom = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    if right < left or bottom < top:
        return 0.0
    shared = (right - left + pixel) * (bottom - top + pixel)
    areas = [(box[2] - box[0] + pixel) * (box[3] - box[1] + pixel) for box in (a, b)]
    return float(shared / (sum(areas) - shared))


def box_overlap(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """IoU, generalised, distance- or complete IoU of two boxes that have areas, with a graph."""
    shared = [max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), a.new_zeros(())) for i in (0, 1)]
    hull = [max(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1)]
    (width, height), (other_width, other_height) = ((box[2] - box[0], box[3] - box[1]) for box in (a, b))
    union = width * height + other_width * other_height - shared[0] * shared[1]
    iou = shared[0] * shared[1] / union
    if kind == "iou":
        return iou
    if kind == "giou":
        return iou - (hull[0] * hull[1] - union) / (hull[0] * hull[1])
    centres = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    diou = iou - (centres[0] ** 2 + centres[1] ** 2) / (hull[0] ** 2 + hull[1] ** 2)
    if kind == "diou":
        return diou
    v = 4 / math.pi**2 * ((width / height).arctan() - (other_width / other_height).arctan()) ** 2
    alpha = 0.0 if v == 0 else (v / (1 - iou + v)).item()  # a number: it has no gradient
    return diou - alpha * v


def focal(logit: Tensor, there: bool, alpha: float, gamma: float) -> Tensor:
    """Focal loss of one logit."""
    p = 1 / (1 + (-logit).exp())
    return -alpha * (1 - p) ** gamma * p.log() if there else -(1 - alpha) * p**gamma * (1 - p).log()


def right_predictions(
    closeness: Callable[[int, int], float], order: Sequence[int], targets: Sequence[int], least: float, matching: str
) -> dict[int, bool]:
    """Which predictions of one set are right, gone through in an order; large values of closeness are close."""
    taken, right = set(), {}
    for i in order:
        free = [j for j in targets if matching == "best" or j not in taken]
        best = max(free, key=lambda j: closeness(i, j), default=None)
        value = -float("inf") if best is None else closeness(i, best)
        near = value > least if matching == "best free, taken" else value >= least
        right[i] = value > -float("inf") and near and best not in taken
        if right[i] or (matching == "best free, taken" and value > -float("inf")):
            taken.add(best)
    return right


def interpolated_area(ranked: Sequence[bool], targets: int) -> float:
    """Sum over recalls of the step in recall times the best precision from there on."""
    precision = [sum(ranked[: k + 1]) / (k + 1) for k in range(len(ranked))]
    return sum(max(precision[k:]) / targets for k in range(len(ranked)) if ranked[k])


def kullback_leibler(p: Tensor, q: Tensor) -> Tensor:
    """Divergence between two lists of masses, which need not sum to 1."""
    return sum((x * (x / y).log() - x + y for x, y in zip(p, q, strict=True)), p.new_zeros(()))


def entropic_transport(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, rho: float | None) -> tuple[Tensor, Tensor]:
    """Value and plan of one sample whose weights are positive, by maximising its dual in turns, to convergence."""
    rows, cols = range(len(a)), range(len(b))
    f, g = [cost.new_zeros(()) for _ in rows], [cost.new_zeros(()) for _ in cols]
    factor = epsilon if rho is None else epsilon * rho / (epsilon + rho)
    change, turns = math.inf, 0
    while change > 1e-14 and turns < 3000:
        before = f
        f = [-factor * sum(b[j] * ((g[j] - cost[i, j]) / epsilon).exp() for j in cols).log() for i in rows]
        g = [-factor * sum(a[i] * ((f[i] - cost[i, j]) / epsilon).exp() for i in rows).log() for j in cols]
        moved = [float(x - y) for x, y in zip(f, before, strict=True)]
        change, turns = (max(moved) - min(moved) if rho is None else max(map(abs, moved))), turns + 1
    plan = torch.stack(
        [torch.stack([a[i] * b[j] * ((f[i] + g[j] - cost[i, j]) / epsilon).exp() for j in cols]) for i in rows]
    )
    value = (plan * cost).sum() + epsilon * kullback_leibler(plan.flatten(), torch.outer(a, b).flatten())
    if rho is not None:
        value = value + rho * (kullback_leibler(plan.sum(1), a) + kullback_leibler(plan.sum(0), b))
    return value, plan


def transport_on_a_line(x: Tensor, weight: Tensor, y: Tensor, power: float) -> Tensor:
    """Least mean cost of moving weighted numbers x onto equally heavy y: in sorted order, until all mass is moved."""
    order = x.argsort()
    x, left = x[order], list((weight / weight.sum())[order])
    y, room = y.sort().values, [torch.ones_like(x[0]) / len(y)] * len(y)
    i = j = 0
    cost = x.new_zeros(())
    while i < len(x) and j < len(y):
        moved = torch.minimum(left[i], room[j])
        cost = cost + moved * (x[i] - y[j]).abs() ** power
        of_x = bool(left[i] <= room[j])
        left[i], room[j] = left[i] - moved, room[j] - moved
        i, j = (i + 1, j) if of_x else (i, j + 1)
    return cost


def attend(x: Tensor, y: Tensor, weight: Tensor, p: Mapping[str, Tensor], heads: int) -> Tensor:
    """Attention of rows x (N, H) to rows y (S, H) of given weights, head by head."""
    query, key, value = (
        part @ w.T + b
        for part, w, b in zip((x, y, y), p["in_proj_weight"].chunk(3), p["in_proj_bias"].chunk(3), strict=True)
    )
    width = x.shape[1] // heads
    parts = []
    for h in range(heads):
        own = slice(h * width, (h + 1) * width)
        rows = []
        for q in query[:, own]:
            share = torch.stack(
                [m * (q @ k / math.sqrt(width)).exp() for m, k in zip(weight, key[:, own], strict=True)]
            )
            rows.append(share / share.sum() @ value[:, own])
        parts.append(torch.stack(rows))
    return torch.cat(parts, 1) @ p["out_proj.weight"].T + p["out_proj.bias"]


def normalise(x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """Layer normalisation of rows."""
    variance = x.var(1, keepdim=True, correction=0)
    return (x - x.mean(1, keepdim=True)) / (variance + 1e-5).sqrt() * p["weight"] + p["bias"]


def transformer(
    x: Tensor, z: Tensor, weight: Tensor, state: Mapping[str, Tensor], *, layers: int, heads: int, norm_first: bool
) -> list[Tensor]:
    """What a transformer's linear map makes of queries x (N, H) after each layer, for one sample's tokens z (S, D)."""

    def part(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(name + "."): value for key, value in state.items() if key.startswith(name + ".")}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def compute(x: Tensor, layer: str, k: int) -> Tensor:
        if k == 1:
            return attend(x, x, torch.ones(len(x)), part(f"{layer}.self_attn"), heads)
        if k == 2:
            return attend(x, tokens, weight, part(f"{layer}.multihead_attn"), heads)
        return linear(linear(x, f"{layer}.linear1").clamp(min=0), f"{layer}.linear2")

    tokens, outputs = linear(z, "input"), []
    for layer in (f"layers.{i}" for i in range(layers)):
        for k in (1, 2, 3):
            norm = part(f"{layer}.norm{k}")
            x = x + compute(normalise(x, norm), layer, k) if norm_first else normalise(x + compute(x, layer, k), norm)
        outputs.append(linear(normalise(x, part("norm")), "output"))
    return outputs


def top_n(vector: Tensor, n: int, state: Mapping[str, Tensor]) -> Tensor:
    """Queries of one vector (H,): the n reference points nearest to it in angle, scaled and shifted by the cosine."""
    angle = state["angle.weight"] @ vector + state["angle.bias"]
    cosines = [float(angle @ a / angle.norm() / a.norm()) for a in state["angles"]]
    chosen = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:n]
    rows = []
    for i in chosen:
        factor, summand = (state["modulation.weight"][:, 0] * cosines[i] + state["modulation.bias"]).chunk(2)
        rows.append(factor * state["points"][i] + summand)
    return torch.stack(rows)


def slot_attention(state: dict[str, Tensor], tokens: Tensor, slots: Tensor, iters: int, attention: str) -> Tensor:
    """Output (N, C + 1) of a SlotDecoder with these parameters, for one sample's tokens (S, D) and slots (N, H)."""

    def norm(x: Tensor, name: str) -> Tensor:
        scaled = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def mlp(x: Tensor, name: str) -> Tensor:
        hidden = (state[f"{name}.0.weight"] @ x + state[f"{name}.0.bias"]).clamp(min=0)
        return state[f"{name}.2.weight"] @ hidden + state[f"{name}.2.bias"]

    def gru(x: Tensor, slot: Tensor) -> Tensor:
        let_in = (state["gru.weight_ih"] @ x + state["gru.bias_ih"]).chunk(3)
        kept = (state["gru.weight_hh"] @ slot + state["gru.bias_hh"]).chunk(3)
        reset, update = (let_in[0] + kept[0]).sigmoid(), (let_in[1] + kept[1]).sigmoid()
        return (1 - update) * (let_in[2] + reset * kept[2]).tanh() + update * slot

    normed = [norm(x, "norm_tokens") for x in tokens]
    keys, values = ([state[f"{name}.weight"] @ x for x in normed] for name in ("key", "value"))
    s, n = range(len(tokens)), range(len(slots))
    slots = list(slots)
    for _ in range(iters):
        found = [norm(slot, "norm_slots") for slot in slots]
        queries = [state["query.weight"] @ x for x in found]
        logit = torch.stack([torch.stack([keys[i] @ queries[j] for j in n]) for i in s]) / math.sqrt(len(queries[0]))
        if attention == "softmax":
            won = torch.stack([logit[i].exp() / logit[i].exp().sum() for i in s]) + 1e-8
            share = torch.stack([won[:, j] / won[:, j].sum() for j in n], 1)
        else:
            a = torch.stack([(state["token_weight.weight"] @ x).squeeze() for x in normed]).softmax(0)
            b = torch.stack([(state["slot_weight.weight"] @ x).squeeze() for x in found]).softmax(0)
            share = len(slots) * entropic_transport(-logit, a, b, 1.0, None)[1]
        updates = [sum(share[i, j] * values[i] for i in s) for j in n]
        slots = [gru(updates[j], slots[j]) for j in n]
        slots = [slot + mlp(norm(slot, "norm_mlp"), "mlp") for slot in slots]
    return torch.stack([mlp(slot, "output") for slot in slots])
