"""Entropic optimal transport between weighted point sets, in the log domain and in batches, without a graph."""

from typing import NamedTuple

import torch
from torch import Tensor

from setpred._checks import check_count, check_finite, check_positive, check_shape
from setpred.functional._precision import common_dtype


class Transport(NamedTuple):
    """What :func:`entropic_transport` returns.

    Attributes:
        value: The transport cost with its entropy, shape ``(B,)``.
        plan: Mass that goes from each row to each column, shape ``(B, N, M)``.
        row_potential: Derivative of the value by the rows' weights, up to a constant, shape ``(B, N)``.
        col_potential: Derivative by the columns' weights, up to a constant, shape ``(B, M)``.

    Example:
        >>> transport = entropic_transport(torch.zeros(1, 2, 3), torch.full((1, 2), 1 / 2), torch.full((1, 3), 1 / 3))
        >>> transport.plan.shape
        torch.Size([1, 2, 3])
    """

    value: Tensor
    plan: Tensor
    row_potential: Tensor
    col_potential: Tensor


def entropic_transport(
    cost: Tensor, row_weight: Tensor, col_weight: Tensor, *, epsilon: float = 0.01, iters: int = 100
) -> Transport:
    r"""Transport the rows' weights onto the columns' at the least cost, smoothed by entropy.

    .. math::
        \operatorname{OT}_\epsilon(a, b) = \min_{\pi 1 = a,\ \pi^\top 1 = b}
        \sum_{ij} \pi_{ij} \text{cost}_{ij} + \epsilon \sum_{ij} \pi_{ij} \log \frac{\pi_{ij}}{a_i b_j}

    by Sinkhorn's iterations on the potentials. Over the first half of them, epsilon falls geometrically from the
    largest cost of the sample. Without a graph: the derivative by the cost is the plan. Computed in float32 at least.

    Args:
        cost: Shape ``(B, N, M)``; finite where both weights are positive.
        row_weight: Weights a, at least 0 and of sum 1, shape ``(B, N)``. What has weight 0 does not exist.
        col_weight: Weights b, shape ``(B, M)``.
        epsilon: Strength of the entropy, in units of the cost.
        iters: Number of iterations. The smaller epsilon, the more are needed.

    Returns:
        Value, plan and potentials.

    Raises:
        ValueError: If a shape is wrong or a number is out of its range.
        TypeError: If a dtype is not floating, or ``iters`` no integer.

    Example:
        >>> cost, half = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.full((1, 2), 0.5)
        >>> entropic_transport(cost, half, half, epsilon=0.05).plan
        tensor([[[5.0000e-01, 1.0306e-09],
                 [1.0306e-09, 5.0000e-01]]])

    Source: Cuturi, Sinkhorn distances (NeurIPS 2013); Schmitzer, Stabilized sparse scaling algorithms for entropy
    regularized transport problems (SIAM J. Sci. Comput. 2019), section 3.
    """
    check_shape("cost", cost, "B", "N", "M")
    check_shape("row_weight", row_weight, *cost.shape[:2])
    check_shape("col_weight", col_weight, *cost.shape[::2])
    check_positive("epsilon", epsilon)
    check_finite("epsilon", epsilon)
    check_count("iters", iters)
    dtype = common_dtype(cost, row_weight, col_weight)
    # Detached, because forward-mode differentiation sees through no_grad.
    cost, row_weight, col_weight = (x.detach().to(dtype) for x in (cost, row_weight, col_weight))
    with torch.no_grad():
        exists = (row_weight > 0).unsqueeze(2) & (col_weight > 0).unsqueeze(1)
        cost = cost.masked_fill(~exists, 0)
        log_rows, log_cols = row_weight.log(), col_weight.log()
        # amax of an empty dimension is an error
        largest = cost.abs().flatten(1).amax(1) if cost[0:1].numel() > 0 else cost.new_zeros(len(cost))
        start = (largest / epsilon).clamp(min=1).log()
        g = torch.zeros_like(col_weight)
        f = torch.zeros_like(row_weight)
        for step in range(iters):
            remaining = max(1 - 2 * (step + 1) / iters, 0)
            eps = (epsilon * (remaining * start).exp()).view(-1, 1)
            f = _softmin(cost, g / eps + log_cols, eps, 2)
            g = _softmin(cost, f / eps + log_rows, eps, 1)
        value = (row_weight * f).sum(1) + (col_weight * g).sum(1)
        log_plan = (f.unsqueeze(2) + g.unsqueeze(1) - cost) / epsilon + log_rows.unsqueeze(2) + log_cols.unsqueeze(1)
        return Transport(value, log_plan.exp(), f, g)


def _softmin(cost: Tensor, weight: Tensor, eps: Tensor, dim: int) -> Tensor:
    """Soft minimum over the rows (dim 1) or columns (dim 2) of the cost, with their log-weights."""
    return -eps * torch.logsumexp(weight.unsqueeze(3 - dim) - cost / eps.unsqueeze(2), dim)
