"""Exact optimal transport between the elements of two sets of any sizes: costs in, plan out, no gradient."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from setpred._checks import check_mask, check_tensor
from setpred.functional._batching import in_front
from setpred.functional._precision import common_dtype
from setpred.functional.assignment import sample_name


def exact_transport(cost: Tensor, *, row_mask: Tensor | None = None, col_mask: Tensor | None = None) -> Tensor:
    r"""Transport mass 1, spread evenly over the rows, to the columns at the least cost, each sample for itself.

    .. math:: \min_{\pi \ge 0} \sum_{ij} \pi_{ij} \text{cost}_{ij}, \quad
              \pi 1 = \tfrac{1}{n} 1, \quad \pi^\top 1 = \tfrac{1}{m} 1

    With as many rows as columns, it is the assignment, each pair of mass 1/n. Else elements are split: where it is
    small, the assignment between copies of them is solved; otherwise the linear program, by SciPy's HiGHS. On the CPU,
    after a copy from the device.

    Args:
        cost: Shape ``(B, N, M)``, finite between what exists; more leading dimensions are more samples.
        row_mask: Which rows exist, bool or float {0, 1}, shape ``(B, N)``. Costs of others are never looked at.
        col_mask: Which columns exist, shape ``(B, M)``.

    Returns:
        The plan, shape ``(B, N, M)``, in the cost's dtype, float32 at least; all 0 where one of the sets is empty. At
        most ``4 max(N, M)`` entries of a sample are positive.

    Raises:
        ValueError: If a shape is wrong, or a cost is not finite (the sample is named).
        TypeError: If a dtype is wrong.

    Example:
        >>> exact_transport(torch.tensor([[[0.0, 1.0, 4.0], [4.0, 1.0, 0.0]]]))
        tensor([[[0.3333, 0.1667, 0.0000],
                 [0.0000, 0.1667, 0.3333]]])

    Source: Kantorovich, On the translocation of masses (1942); Huangfu and Hall, Parallelizing the dual revised simplex
    method (2018), for HiGHS.
    """
    check_tensor("cost", cost)
    if cost.dim() < 3:
        raise ValueError(f"`cost` must have shape (B, N, M), got shape {tuple(cost.shape)}")
    check_mask("row_mask", row_mask, cost.shape[:-1])
    check_mask("col_mask", col_mask, (*cost.shape[:-2], cost.shape[-1]))
    row_mask, col_mask = (None if mask is None else mask.bool() for mask in (row_mask, col_mask))
    plan: Tensor = torch.ops.setpred.exact_transport.default(cost.detach().to(common_dtype(cost)), row_mask, col_mask)
    return plan


def _transport(cost: Tensor, row_mask: Tensor | None, col_mask: Tensor | None) -> Tensor:
    *batch, n, m = cost.shape
    costs = cost.cpu().numpy().astype(np.float64, copy=False).reshape(math.prod(batch), n, m)
    plans = np.zeros_like(costs)
    present = [
        np.ones((len(costs), size), bool) if mask is None else mask.cpu().numpy().reshape(len(costs), size)
        for mask, size in ((row_mask, n), (col_mask, m))
    ]
    for s, (rows, cols) in enumerate(zip(*present, strict=True)):
        exists = np.ix_(rows, cols)
        problem = costs[s][exists]
        if not np.isfinite(problem).all():
            rows_columns = f"{problem.shape[0]} rows, {problem.shape[1]} columns"
            raise ValueError(f"`cost` must be finite: {sample_name(s, torch.Size(batch))}, {rows_columns}")
        if problem.size > 0:
            plans[s][exists] = _plan(problem)
    return torch.from_numpy(plans).to(cost).view(cost.shape)


# An operator, so that torch.compile need not look inside.
torch.library.define(
    "setpred::exact_transport",
    "(Tensor cost, Tensor? row_mask, Tensor? col_mask) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("setpred::exact_transport", "CompositeExplicitAutograd")(_transport)


@torch.library.register_fake("setpred::exact_transport")  # type: ignore[untyped-decorator]
def _plan_shape(cost: Tensor, row_mask: Tensor | None, col_mask: Tensor | None) -> Tensor:
    return torch.empty_like(cost, memory_format=torch.contiguous_format)


@torch.library.register_vmap("setpred::exact_transport")  # type: ignore[untyped-decorator]
def _transport_all(info: Any, in_dims: tuple[int | None, ...], *args: Tensor | None) -> tuple[Tensor, int]:
    return torch.ops.setpred.exact_transport.default(*in_front(info, in_dims, *args)), 0


def _plan(cost: NDArray[np.float64]) -> NDArray[np.float64]:
    """Plan of one sample, (n, m): the transport of n m units, of which each row has m and each column wants n."""
    from scipy.optimize import linear_sum_assignment, linprog
    from scipy.sparse import csc_array

    n, m = cost.shape
    plan: NDArray[np.float64]
    size = math.lcm(n, m)
    if size <= 4 * max(n, m):
        of_row, of_col = size // n, size // m
        row, col = linear_sum_assignment(cost.repeat(of_row, 0).repeat(of_col, 1))
        plan = np.zeros((n, m))
        np.add.at(plan, (row // of_row, col // of_col), 1)
        return plan / size
    places = np.arange(n * m)
    index = np.concatenate([places // m, n + places % m]), np.tile(places, 2)
    sums = csc_array((np.ones(2 * n * m), index), shape=(n + m, n * m))
    wanted = np.repeat([float(m), float(n)], [n, m])
    # HiGHS is exact to 1e-7, whatever the costs: they are brought to the scale of 1, and those that it takes for equal
    # are told apart by solving again for what the potentials leave of them, at its own scale.
    left = cost - cost.min()
    scale = left.max()
    for _ in range(4):
        unit = (left / (scale or 1)).ravel()
        found = linprog(unit, A_eq=sums[:-1], b_eq=wanted[:-1], method="highs-ds")  # the last sum follows
        if not found.success:
            raise RuntimeError(f"HiGHS found no transport of {n} to {m} elements: {found.message}")
        potential = np.append(found.eqlin.marginals, 0) * scale
        left = left - potential[:n, None] - potential[n:]
        scale = -left.min()
        if scale <= 4 * np.finfo(np.float64).eps * left.max():  # an optimal plan leaves nothing negative
            break
    # A vertex of the polytope is a matrix of integers.
    plan = found.x.round().reshape(n, m)
    plan /= n * m
    return plan
