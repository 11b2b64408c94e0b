"""Earth mover's distance: the least cost of moving one set's mass onto the other's, exact, for sets of any sizes."""

import torch
from torch import Tensor

from setpred._checks import as_presence, check_choice
from setpred.functional.pairwise import Cost, check_cost, cost_of_all_pairs, euclidean_cost
from setpred.functional.transport import exact_transport
from setpred.losses._common import REDUCTIONS, Reduction, charge, enter, full_precision, gather_rows, keep_nan, reduce


def earth_mover_distance(
    pred: Tensor,
    target: Tensor,
    pred_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    cost: Cost = euclidean_cost,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Least mean cost of moving the predicted elements onto the target elements, as a loss or as a metric.

    .. math::
        \operatorname{EMD}(\hat Y, Y) = \min_{\pi \ge 0} \sum_{ij} \pi_{ij} d(\hat y_i, y_j), \quad
        \pi 1 = \tfrac{1}{n} 1, \quad \pi^\top 1 = \tfrac{1}{m} 1

    Both sets have mass 1, spread evenly over what exists; between as many elements it is the Hungarian loss of
    ``presence="none"``. With a metric as cost it is a metric: the Wasserstein distance. Exact, see
    :func:`~setpred.functional.transport.exact_transport`; it differentiates, the plan held fixed. A set that is empty
    costs 0.

    Args:
        pred: Predicted elements, shape ``(B, N, C)``, or ``(K, B, N, C)`` for K predictions of the same targets.
        target: Target elements, shape ``(B, M, C)``.
        pred_mask: Which predictions exist, bool or float {0, 1}, shape ``(B, N)`` or ``(K, B, N)``; compare a predicted
            presence with a threshold. Values are checked, which waits for the device.
        target_mask: Bool or float {0, 1}, shape ``(B, M)``; None means that all are present.
        cost: Cost d of a pair, the Euclidean distance if none is given; see
            :func:`~setpred.functional.pairwise.pairwise_cost`.
        reduction: ``"mean"`` or ``"sum"`` over sets, or ``"none"``: shape ``(B,)`` or ``(K, B)``.

    Returns:
        The distance.

    Raises:
        ValueError: If a shape is wrong, a choice is unknown, a cost is not finite (the sample is named), or
            ``pred_mask`` has values between 0 and 1.
        TypeError: If a dtype is wrong.

    Example:
        >>> x, y = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[0.0], [1.0], [5.0]]])
        >>> earth_mover_distance(x, y)  # 1/6 goes from 0 to 1, and 1/3 from 1 to 5
        tensor(1.5000)

    Source: Rubner, Tomasi and Guibas, The earth mover's distance as a metric for image retrieval (IJCV 2000).
    """
    check_cost("cost", cost)
    check_choice("reduction", reduction, REDUCTIONS)
    sets = enter(pred, target, None, target_mask, "none")
    exists = None if pred_mask is None else as_presence("pred_mask", pred_mask, pred).reshape(sets.pred.shape[:2])
    pred, target = sets.pred, sets.target
    if exists is not None:
        pred = torch.where(exists.unsqueeze(-1), pred, 0)
    rows, cols = pred.shape[1], target.shape[1]
    with full_precision(pred.device):
        with torch.no_grad():
            costs = cost_of_all_pairs(pred, target, cost)
            row_mask, col_mask = (
                None if mask is None else mask.view(*sets.shape, mask.shape[1]) for mask in (exists, sets.present)
            )
            # With the shape (K, B, N, M) an error can say which step of which sample.
            plan = exact_transport(costs.view(*sets.shape, rows, cols), row_mask=row_mask, col_mask=col_mask)
        # The pairs between which mass moves, of which there are few.
        mass, place = plan.view(len(pred), rows * cols).topk(min(rows * cols, 4 * max(rows, cols)))
        partners = gather_rows(pred, place // max(cols, 1)), gather_rows(target, place % max(cols, 1))
        value = keep_nan((mass * charge(*partners, cost, mass > 0)).sum(1), pred)
    return reduce(value, reduction, sets.shape)
