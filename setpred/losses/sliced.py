"""Sliced Wasserstein loss: transport between two sets along random lines, where a sort solves it."""

from dataclasses import KW_ONLY
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from setpred._checks import check_at_least, check_choice, check_count, check_finite, check_shape
from setpred.losses._common import (
    REDUCTIONS,
    Reduction,
    SetLoss,
    as_weight,
    distribution,
    enter,
    fill_up,
    full_precision,
    keep_nan,
    nothing,
    open_pred,
    reduce,
    with_options,
)
from setpred.scaler import StandardScaler
from setpred.sets import SetPrediction


def sliced_wasserstein_loss(
    pred: Tensor | SetPrediction,
    target: Tensor,
    pred_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    directions: int | Tensor = 64,
    power: float = 2.0,
    presence: Literal["feature", "none"] = "feature",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Mean over directions of the transport between two sets' projections, each exact.

    .. math::
        \mathcal{L}(\hat Y, Y) = \frac{1}{L} \sum_{l=1}^{L} \int_0^1
        \left| F^{-1}_{\theta_l}(u) - G^{-1}_{\theta_l}(u) \right|^p du

    with :math:`F_\theta^{-1}` and :math:`G_\theta^{-1}` the quantile functions of the projections of both sets on a
    direction :math:`\theta` of length 1: between sets of one size, the mean cost of matching them in sorted order. Time
    and memory grow with L N instead of N M; a distance as transport is, but weaker the more channels there are.

    ``presence`` is as in :func:`setpred.sinkhorn_loss`: with ``"feature"`` the mask is one more channel; with
    ``"none"`` predictions weigh as their mask says, through which gradients flow. Values of what is absent, NaN too,
    are never seen; any other NaN makes the set's loss NaN.

    Args:
        pred: Predicted elements, shape ``(B, N, C)``, or ``(K, B, N, C)`` for K predictions of the same targets.
            Or a :class:`setpred.SetPrediction`, whose mask then is the ``pred_mask``, ones where there is none.
        target: Target elements, shape ``(B, M, C)``.
        pred_mask: Predicted presence in [0, 1], floating, shape ``(B, N)`` or ``(K, B, N)``.
        target_mask: Bool or float {0, 1}, shape ``(B, M)``; None means that all are present.
        directions: How many are drawn anew at each call, L, or the directions themselves, shape ``(L, C)``, with
            ``"feature"`` ``(L, C + 1)``; their length is made 1; one of length 0 makes the loss NaN.
        power: Exponent p, at least 1.
        presence: ``"feature"`` or ``"none"``.
        reduction: ``"mean"`` or ``"sum"`` over sets, or ``"none"``: shape ``(B,)`` or ``(K, B)``.

    Returns:
        The loss; 0 where one of the sets is empty.

    Raises:
        ValueError: If a shape is wrong, a number is out of its range, a choice is unknown, or a prediction comes with
            another mask.
        TypeError: If a dtype is wrong, as bool is for ``pred_mask``.

    Example:
        >>> x, y = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[0.0], [1.0], [5.0]]])
        >>> sliced_wasserstein_loss(x, y, power=1.0, presence="none")  # one channel: the earth mover's distance
        tensor(1.5000)

    Source: Bonneel et al., Sliced and Radon Wasserstein barycenters of measures (2015), equation 8.
    """
    _check_options(directions, power, presence, reduction)
    pred, pred_mask = open_pred(pred, pred_mask, presence)
    sets = enter(pred, target, pred_mask, target_mask, presence)
    pred, target, y_mask = sets.pred, sets.target, sets.present
    x_mask = None if sets.pred_mask is None else as_weight(sets.pred_mask)
    if presence == "feature":
        target, y_mask = fill_up(sets, sized=pred_mask is not None or target_mask is not None)
    channels = pred.shape[2]
    if isinstance(directions, Tensor):
        check_shape("directions", directions, "L", channels)
        check_at_least("directions", len(directions), 1)
        lines = directions.to(pred)
    else:
        lines = torch.randn(directions, channels, device=pred.device, dtype=pred.dtype)
    if pred.shape[1] == 0 or target.shape[1] == 0:
        value = nothing(pred, target) if x_mask is None else nothing(pred, target, x_mask)
        return reduce(value, reduction, sets.shape)
    with full_precision(pred.device):
        if x_mask is not None:
            pred = pred.masked_fill((x_mask == 0).unsqueeze(-1), 0)
        x_weight, x_empty = distribution(pred, x_mask)
        y_weight, y_empty = distribution(target, y_mask)
        lines = lines / lines.norm(dim=1, keepdim=True)  # NaN for what is no direction
        value = _transport(lines @ pred.mT, x_weight, lines @ target.mT, y_weight, power).mean(1)
        value = keep_nan(value.masked_fill(x_empty | y_empty, 0), pred, target, x_weight)
    return reduce(value, reduction, sets.shape)


def _transport(x: Tensor, x_weight: Tensor, y: Tensor, y_weight: Tensor, power: float) -> Tensor:
    """Least mean cost (S, L) of moving numbers x (S, L, N) of weights (S, N) onto y (S, L, M)."""
    (x, x_level), (y, y_level) = _quantiles(x, x_weight), _quantiles(y, y_weight)
    level, order = torch.cat([x_level, y_level], -1).sort(stable=True, dim=-1)
    of_x = order < x.shape[-1]
    below = of_x.cumsum(-1) - of_x.long()  # how many elements of x end below a level: the number of the next one
    place = torch.arange(level.shape[-1], device=x.device)
    x = x.gather(-1, below.clamp(max=x.shape[-1] - 1))
    y = y.gather(-1, (place - below).clamp(max=y.shape[-1] - 1))
    mass = level - F.pad(level, (1, 0))[..., :-1]
    cost: Tensor = mass * (x - y).abs().pow(power)
    return cost.sum(-1)


def _quantiles(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sort, and say up to which level each number is the quantile."""
    x, order = x.sort(-1)
    return x, weight.unsqueeze(1).expand_as(x).gather(-1, order).cumsum(-1)


def _check_options(directions: int | Tensor, power: float, presence: object, reduction: object) -> None:
    if not isinstance(directions, Tensor):
        check_count("directions", directions)
    check_at_least("power", power, 1)
    check_finite("power", power)
    check_choice("presence", presence, ("feature", "none"))
    check_choice("reduction", reduction, REDUCTIONS)


@with_options
class SlicedWassersteinLoss(SetLoss):
    """Mean over directions of the transport between two sets' projections, as a module.

    Its options are those of :func:`sliced_wasserstein_loss`.

    Args:
        scaler: Where given, elements of both sides are measured in its coordinates; see
            :class:`setpred.StandardScaler`. It is not registered: it moves and is saved with the decoder.

    Raises:
        ValueError: If a number is out of its range or a choice is unknown.

    Example:
        >>> loss = SlicedWassersteinLoss(power=1.0, presence="none")
        >>> loss(torch.tensor([[[0.0], [4.0]]]), torch.tensor([[[2.0]]]))
        tensor(2.)

    Source: Bonneel et al. (2015), equation 8.
    """

    _: KW_ONLY
    directions: int | Tensor = 64
    power: float = 2.0
    presence: Literal["feature", "none"] = "feature"
    reduction: Reduction = "mean"
    scaler: StandardScaler | None = None

    def __post_init__(self) -> None:
        _check_options(**self.options)

    def forward(
        self,
        pred: Tensor | SetPrediction,
        target: Tensor,
        pred_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """See :func:`sliced_wasserstein_loss`."""
        pred, target, pred_mask = self._opened(pred, target, pred_mask)
        return sliced_wasserstein_loss(pred, target, pred_mask, target_mask, **self.options)
