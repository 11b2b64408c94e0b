"""Metrics of point sets."""

import torch
from torch import Tensor

from setpred._checks import as_presence, check_finite, check_positive
from setpred.functional.nearest import nearest_neighbours
from setpred.functional.pairwise import as_sets, cost_of_pairs, euclidean_cost


def point_f_score(
    pred: Tensor,
    target: Tensor,
    *,
    threshold: float,
    pred_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
) -> Tensor:
    r"""F-score of each point set: how many of its points are nearer to the other set than a threshold.

    .. math::
        F = \frac{2 P R}{P + R}, \quad
        P = \frac{1}{N} \Bigl|\bigl\{i : \min_j \lVert \hat y_i - y_j \rVert < t\bigr\}\Bigr|, \quad
        R = \frac{1}{M} \Bigl|\bigl\{j : \min_i \lVert \hat y_i - y_j \rVert < t\bigr\}\Bigr|

    Args:
        pred: Predicted points, shape ``(B, N, C)``.
        target: Target points, shape ``(B, M, C)``.
        threshold: Distance t, in units of the points.
        pred_mask: Which predictions exist, bool or float {0, 1}, shape ``(B, N)``.
        target_mask: Which targets exist, shape ``(B, M)``.

    Returns:
        Shape ``(B,)``, without a graph. Between two empty sets it is 1, between an empty one and another 0; a NaN point
        is near to nothing.

    Raises:
        ValueError: If a shape is wrong, the threshold is not positive and finite, or a mask has values between 0 and 1.
        TypeError: If a dtype is wrong.

    Example:
        >>> pred, target = torch.tensor([[[0.0], [4.0]]]), torch.tensor([[[0.1]]])
        >>> point_f_score(pred, target, threshold=0.5)  # P = 1/2, R = 1
        tensor([0.6667])

    Source: Knapitsch et al., Tanks and temples (SIGGRAPH 2017), section 5.
    """
    pred, target = as_sets(pred, target, "pred", "target")
    check_positive("threshold", threshold)
    check_finite("threshold", threshold)
    exists, present = as_presence("pred_mask", pred_mask, pred), as_presence("target_mask", target_mask, target)
    with torch.no_grad():
        x = torch.where(exists.unsqueeze(-1), pred, 0)
        y = torch.where(present.unsqueeze(-1), target, 0)
        # A NaN would hide all other points from the search.
        x_mask, y_mask = (mask & ~side.isnan().any(-1) for side, mask in ((x, exists), (y, present)))
        of_x, of_y = nearest_neighbours(x, y, "mse", x_mask=x_mask, y_mask=y_mask)
        precision = _share_near(x, y, of_x, exists, threshold)
        recall = _share_near(y, x, of_y, present, threshold)
        score = 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(pred.dtype).tiny)
        return torch.where(exists.any(1) | present.any(1), score, 1)


def _share_near(x: Tensor, y: Tensor, nearest: Tensor, exists: Tensor, threshold: float) -> Tensor:
    """Share of what exists of x that is near to its nearest of y; of any value where y is empty."""
    if y.shape[1] == 0:
        return x.new_zeros(len(x))
    partner = y.gather(1, nearest.unsqueeze(-1).expand_as(x))
    near = (cost_of_pairs(x, partner, euclidean_cost) < threshold) & exists
    return near.sum(1).to(x.dtype) / exists.sum(1).clamp(min=1)
