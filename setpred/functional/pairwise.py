"""Costs between the elements of two sets: of all pairs, or of given pairs; and how costs are composed.

A cost is a name or any callable ``(B, N, C), (B, M, C) -> (B, N, M)``. What a loss charges for pairs that it has
found is the same callable on sets of one element each, so that no graph over all pairs is ever built.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from setpred._checks import check_choice, check_finite, check_shape, in_transform
from setpred.functional._precision import common_dtype

PairwiseCost = Callable[[Tensor, Tensor], Tensor]
Cost = Literal["huber", "mse", "l1"] | PairwiseCost
COSTS = ("huber", "mse", "l1")


def check_cost(name: str, cost: object) -> None:
    """Raise unless ``cost`` is callable or the name of a built-in cost."""
    if not callable(cost):
        check_choice(name, cost, COSTS)


def huber(x: Tensor, y: Tensor) -> Tensor:
    """Smooth L1 with beta 1, elementwise, with broadcasting."""
    if in_transform():  # the operator's batching rule takes other shapes for equal ones, silently too
        difference = x - y
        size = difference.abs()
        return torch.where(size < 1, 0.5 * difference.square(), size - 0.5)
    if torch.is_grad_enabled() and x.shape != y.shape:  # its gradient knows no broadcasting
        x, y = torch.broadcast_tensors(x, y)  # type: ignore[no-untyped-call]
    loss: Tensor = torch.ops.aten.smooth_l1_loss.default(x, y, 0, 1.0)  # F's function warns of broadcasting
    return loss


def _elementwise(x: Tensor, y: Tensor, cost: str) -> Tensor:
    if cost == "huber":
        return huber(x, y)
    return (x - y).square() if cost == "mse" else (x - y).abs()


def _of_all_pairs(x: Tensor, y: Tensor, cost: str) -> Tensor:
    (*batch, n, channels), m = x.shape, y.shape[-2]
    if channels == 0:
        return x.new_zeros(*batch, n, m)
    # Inside of vmap, a tensor does not say whether it requires a gradient.
    graph = in_transform() or (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
    if cost != "huber" and not graph:  # cdist never stores the differences; before 2.14 it has no second derivative
        if cost == "l1":
            return torch.cdist(x, y, p=1.0) / channels
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square() / channels
    if channels < 8 and n * m >= 1024:  # short rows reduce slowly
        total = x.new_zeros(())
        for c in range(channels):
            value = _elementwise(x[..., c].unsqueeze(-1), y[..., c].unsqueeze(-2), cost)
            total = value + total if graph else value.add_(total)
        return total / channels if graph else total.div_(channels)
    return _elementwise(x.unsqueeze(-2), y.unsqueeze(-3), cost).mean(-1)


def as_sets(x: Tensor, y: Tensor, name: str = "x", other: str = "y") -> tuple[Tensor, Tensor]:
    """Check the arguments of a cost, and bring them to one dtype, float32 at least."""
    check_shape(name, x, "B", "N", "C")
    check_shape(other, y, x.shape[0], "M", x.shape[2])
    dtype = common_dtype(x, y)
    return x.to(dtype), y.to(dtype)


def pairwise_cost(x: Tensor, y: Tensor, cost: Cost = "huber") -> Tensor:
    r"""Cost between all elements of two sets, a mean over channels.

    .. math::
        d(x, y) = \frac{1}{C} \sum_{c=1}^{C} \ell(x_c - y_c), \qquad
        \ell(t) = \begin{cases} t^2/2 & |t| < 1 \\ |t| - 1/2 & \text{else} \end{cases} \;\text{(huber)}, \quad
        t^2 \;\text{(mse)}, \quad |t| \;\text{(l1)}

    Computed in float32 at least.

    Args:
        x: Shape ``(B, N, C)``.
        y: Shape ``(B, M, C)``.
        cost: ``"huber"`` (smooth L1 with beta 1), ``"mse"``, ``"l1"``, or a callable
            ``(B, N, C), (B, M, C) -> (B, N, M)``.

    Returns:
        Shape ``(B, N, M)``.

    Raises:
        ValueError: If a shape is wrong, the callable's result too, or the name is unknown.
        TypeError: If a dtype is not floating.

    Example:
        >>> pairwise_cost(torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[3.0], [1.5], [1.0]]]))
        tensor([[[2.5000, 1.0000, 0.5000],
                 [1.5000, 0.1250, 0.0000]]])

    Source: Zhang et al. (NeurIPS 2019), section 3.2 (Huber).
    """
    check_cost("cost", cost)
    return cost_of_all_pairs(*as_sets(x, y), cost)


def paired_cost(x: Tensor, y: Tensor, cost: Cost = "huber") -> Tensor:
    r"""Cost between elements that belong together: :math:`d(x_i, y_i)` with d as in :func:`pairwise_cost`.

    Args:
        x: Shape ``(B, N, C)``.
        y: Shape ``(B, N, C)``.
        cost: As in :func:`pairwise_cost`. A callable is given each pair as two sets of one element, ``(B*N, 1, C)``.

    Returns:
        Shape ``(B, N)``.

    Raises:
        ValueError: If a shape is wrong, the callable's result too, or the name is unknown.
        TypeError: If a dtype is not floating.

    Example:
        >>> paired_cost(torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[3.0], [1.5]]]))
        tensor([[2.5000, 0.1250]])
    """
    check_shape("x", x, "B", "N", "C")
    check_shape("y", y, *x.shape)
    check_cost("cost", cost)
    return cost_of_pairs(*as_sets(x, y), cost)


def cost_of_all_pairs(x: Tensor, y: Tensor, cost: Cost) -> Tensor:
    """:func:`pairwise_cost` of what has been checked."""
    if not callable(cost):
        return _of_all_pairs(x, y, cost)
    return _checked(cost(x, y), (len(x), x.shape[1], y.shape[1]))


def cost_of_pairs(x: Tensor, y: Tensor, cost: Cost) -> Tensor:
    """:func:`paired_cost` of what has been checked."""
    batch, n, channels = x.shape
    if not callable(cost):
        value = _elementwise(x, y, cost)
        return value.mean(-1) if channels > 0 else value.sum(-1)
    left, right = x.reshape(batch * n, 1, channels), y.reshape(batch * n, 1, channels)
    return _checked(cost(left, right), (batch * n, 1, 1)).view(batch, n)


def _checked(value: Tensor, shape: tuple[int, int, int]) -> Tensor:
    if value.shape != shape:
        raise ValueError(f"`cost` must return shape (B, N, M) = {shape}, got {tuple(value.shape)}")
    return value


def cross_entropy_cost(logits: Tensor, target: Tensor) -> Tensor:
    r"""Cross-entropy between unnormalised log-probabilities and class probabilities, such as one-hot vectors.

    .. math:: d(x, y) = -\sum_{c=1}^{C} y_c \log \operatorname{softmax}(x)_c

    Args:
        logits: Shape ``(B, N, C)``.
        target: Shape ``(B, M, C)``.

    Returns:
        Shape ``(B, N, M)``.

    Raises:
        ValueError: If a shape is wrong.
        TypeError: If a dtype is not floating.

    Example:
        >>> cross_entropy_cost(torch.zeros(1, 1, 2), torch.eye(2).unsqueeze(0))
        tensor([[[0.6931, 0.6931]]])

    Source: the cost of `torch.nn.functional.cross_entropy` with class probabilities, between all pairs.
    """
    logits, target = as_sets(logits, target, "logits", "target")
    return -logits.log_softmax(-1) @ target.transpose(-1, -2)


def euclidean_cost(x: Tensor, y: Tensor) -> Tensor:
    r"""Euclidean distance, of which the gradient is 0 between equal elements.

    .. math:: d(x, y) = \lVert x - y \rVert_2

    Args:
        x: Shape ``(B, N, C)``.
        y: Shape ``(B, M, C)``.

    Returns:
        Shape ``(B, N, M)``.

    Raises:
        ValueError: If a shape is wrong.
        TypeError: If a dtype is not floating.

    Example:
        >>> euclidean_cost(torch.zeros(1, 1, 2), torch.tensor([[[3.0, 4.0]]]))
        tensor([[[5.]]])

    Source: the distance of `torch.cdist`, without its rounding of matrix products.
    """
    x, y = as_sets(x, y)
    distance: Tensor = torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), dim=-1)
    return distance


@dataclass(frozen=True)
class _OnChannels:
    """What :func:`on_channels` returns: a class, so that it can be pickled and compared."""

    cost: Cost
    channels: slice | tuple[int, ...] = field(hash=False)  # slices have a hash only since Python 3.12
    weight: float

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        check_shape("x", x, "B", "N", "C")
        check_shape("y", y, x.shape[0], "M", x.shape[2])
        return self.weight * pairwise_cost(self.seen_of(x), self.seen_of(y), self.cost)

    def seen_of(self, x: Tensor) -> Tensor:
        _seen(self.channels, x.shape[-1])
        return x[..., self.channels if isinstance(self.channels, slice) else list(self.channels)]

    def __repr__(self) -> str:
        return f"on_channels({self.cost!r}, {self.channels!r}, weight={self.weight!r})"


@dataclass(frozen=True)
class _Sum:
    """What :func:`sum_costs` returns."""

    costs: tuple[Cost, ...]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        first, *others = (pairwise_cost(x, y, cost) for cost in self.costs)
        return sum(others, first)

    def __repr__(self) -> str:
        return f"sum_costs({', '.join(map(repr, self.costs))})"


def _as_channels(channels: object) -> slice | tuple[int, ...]:
    """Check what needs no tensor to be checked."""

    def whole(value: object) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool)

    if isinstance(channels, slice):
        parts = (channels.start, channels.stop, channels.step)
        if all(part is None or whole(part) for part in parts) and (channels.step is None or channels.step > 0):
            return slice(*(None if part is None else int(part) for part in parts))
    elif isinstance(channels, Iterable):
        listed = channels.tolist() if isinstance(channels, (Tensor, np.ndarray)) else list(channels)
        if listed and all(map(whole, listed)):
            return tuple(map(int, listed))
    raise ValueError(
        f"`channels` must be one or more integers, or a slice of integers with a positive step, got {channels!r}"
    )


def _seen(channels: slice | tuple[int, ...], size: int) -> list[int]:
    """Which of ``size`` channels those are; an error if some do not exist."""
    if isinstance(channels, slice):
        seen = list(range(size)[channels])
        ends = [end for end in (channels.start, channels.stop) if end is not None]
        exist = bool(seen) and all(-size <= end <= size for end in ends)
    else:
        seen = [c + size if c < 0 else c for c in channels]
        exist = all(0 <= c < size for c in seen)
    if not exist:
        raise ValueError(f"`channels` must be some of the {size} channels that there are, got {channels!r}")
    return seen


def channels_seen(cost: Cost, channels: int) -> frozenset[int]:
    """Say which of so many channels a cost may depend on: all, but for those that composition keeps from it."""
    if isinstance(cost, _Sum):
        return frozenset().union(*(channels_seen(part, channels) for part in cost.costs))
    if isinstance(cost, _OnChannels):
        given = _seen(cost.channels, channels)
        return frozenset(given[c] for c in channels_seen(cost.cost, len(given)))
    return frozenset(range(channels))


def is_symmetric(cost: Cost) -> bool:
    """Say whether a cost is known not to depend on which set is which."""
    if isinstance(cost, _Sum):
        return all([is_symmetric(part) for part in cost.costs])  # noqa: C419 (Dynamo knows no generators here)
    if isinstance(cost, _OnChannels):
        return is_symmetric(cost.cost)
    return not callable(cost) or cost is euclidean_cost


def by_name(x: Tensor, y: Tensor, cost: Cost) -> tuple[Tensor, Tensor, Cost]:
    """Sets and a cost that order pairs alike, by a name, of which more is known, where ``cost`` is one on channels."""
    if isinstance(cost, _OnChannels) and cost.weight > 0:
        return by_name(cost.seen_of(x), cost.seen_of(y), cost.cost)
    return x, y, cost


def on_channels(cost: Cost, channels: slice | Sequence[int], *, weight: float = 1.0) -> PairwiseCost:
    """Make a cost that sees only some of the channels, times a weight.

    The costs that this and :func:`sum_costs` make can be pickled, and are equal if they are made of equal parts. A loss
    does not register modules among those parts: keep such a module beside the loss, so that its parameters move and
    train.

    Args:
        cost: As in :func:`~setpred.functional.pairwise.pairwise_cost`.
        channels: Which channels, a slice or indices. With ``presence="feature"`` the mask is the last one, -1.
        weight: Factor on the cost.

    Returns:
        A callable ``(B, N, C), (B, M, C) -> (B, N, M)``. It raises ValueError if some of the channels do not exist;
        slices may not reach beyond them either, as ``slice(4, 8)`` of 6 channels.

    Raises:
        ValueError: If the name of the cost is unknown, ``channels`` names none, or ``weight`` is not finite.
        TypeError: If ``weight`` is no number.

    Example:
        >>> cost = on_channels("l1", slice(0, 2), weight=5.0)
        >>> cost(torch.zeros(1, 1, 3), torch.ones(1, 1, 3))
        tensor([[[5.]]])
    """
    check_cost("cost", cost)
    check_finite("weight", weight)
    return _OnChannels(cost, _as_channels(channels), weight)


def sum_costs(*costs: Cost) -> PairwiseCost:
    """Make a cost that is the sum of several.

    Args:
        costs: Each as in :func:`~setpred.functional.pairwise.pairwise_cost`.

    Returns:
        A callable ``(B, N, C), (B, M, C) -> (B, N, M)``.

    Raises:
        ValueError: If there is none, or the name of one is unknown.

    Example:
        >>> coordinates = on_channels("huber", slice(0, 3), weight=5.0)
        >>> colour = on_channels(cross_entropy_cost, slice(3, 11))
        >>> sum_costs(coordinates, colour)(torch.randn(2, 10, 11), torch.randn(2, 6, 11)).shape
        torch.Size([2, 10, 6])
    """
    if not costs:
        raise ValueError("`costs` must be at least one, got none")
    for cost in costs:
        check_cost("costs", cost)
    return _Sum(costs)
