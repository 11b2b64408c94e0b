"""Chamfer loss: every element is charged its nearest neighbour in the other set."""

from dataclasses import KW_ONLY, field
from typing import Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from setpred._checks import check_choice
from setpred.functional.nearest import nearest_neighbours
from setpred.functional.pairwise import Cost
from setpred.losses._common import (
    SCORED,
    Presence,
    Reduction,
    SetLoss,
    as_weight,
    charge,
    check_options,
    check_sees_mask,
    enter,
    fill_up,
    full_precision,
    gather_rows,
    keep_nan,
    mean_rows,
    nothing,
    open_pred,
    presence_loss,
    reduce,
    with_options,
)
from setpred.scaler import StandardScaler
from setpred.sets import SetPrediction

Direction = Literal["both", "pred_to_target", "target_to_pred"]
DIRECTIONS = ("both", "pred_to_target", "target_to_pred")
PointReduction = Literal["mean", "sum", "max"]


class _Options(TypedDict, total=False):
    """The options of :func:`chamfer_loss` for its overloads: what they have in common."""

    cost: Cost
    matching_cost: Cost | None
    presence: Presence
    presence_weight: float
    direction: Direction
    point_reduction: PointReduction
    reduction: Reduction


@overload
def chamfer_loss(
    pred: Tensor | SetPrediction,
    target: Tensor,
    pred_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    return_points: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def chamfer_loss(
    pred: Tensor | SetPrediction,
    target: Tensor,
    pred_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    return_points: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor, Tensor]: ...


def chamfer_loss(
    pred: Tensor | SetPrediction,
    target: Tensor,
    pred_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    cost: Cost = "huber",
    matching_cost: Cost | None = None,
    presence: Presence = "feature",
    presence_weight: float = 1.0,
    direction: Direction = "both",
    point_reduction: PointReduction = "mean",
    reduction: Reduction = "mean",
    return_points: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""Mean cost to the nearest neighbour in the other set, from both sides.

    .. math::
        \mathcal{L}_\text{cha}(\hat Y, Y) = \frac{1}{N} \sum_{i=1}^{N} \min_j d(\hat y_i, y_j)
        + \frac{1}{M} \sum_{j=1}^{M} \min_i d(\hat y_i, y_j)

    Costs are not rooted, and the two means are added, not averaged; :doc:`/guides/point_clouds` says how to get other
    published forms. ``presence`` says how a set's size enters:

    - ``"feature"`` (the paper): the mask is one more channel on both sides, ones where it is None, and all rows count.
      Absent targets are zeros, and M counts as N, or as the present targets if those are more: however a set was
      padded, its loss is the same. Where neither side has a mask, both are taken as they are;
      a prediction always has one.
    - ``"none"``: only what is present counts. The first mean is weighted by ``pred_mask``, through which gradients
      flow; predictions whose mask is 0 do not exist, and a negative mask makes the loss NaN. Where one of the sets is
      empty, the value is 0.
    - ``"bce"``: the same, and the predicted mask is scored against who is the nearest of some target:
      :math:`w \frac{1}{N} \sum_i \operatorname{BCE}(\hat m_i, a_i)` is added, with :math:`a_i` 1 where i is nearest to
      some j, else 0.
    - ``"logits"``: as ``"bce"`` of the mask's sigmoid.

    Values of what is absent, NaN too, are never seen; any other NaN makes the set's loss NaN. Costs are computed in
    float32 at least, under autocast too. Neighbours are found without a graph, in memory that grows with N + M: see
    :func:`~setpred.functional.nearest.nearest_neighbours`.

    Args:
        pred: Predicted elements, shape ``(B, N, C)``, or ``(K, B, N, C)`` for K predictions of the same targets.
            Or a :class:`setpred.SetPrediction`, whose mask then is the ``pred_mask``, ones where there is none.
        target: Target elements, shape ``(B, M, C)``.
        pred_mask: Predicted presence in [0, 1], with ``"logits"`` of any size; floating, shape ``(B, N)`` or
            ``(K, B, N)``. With ``"bce"`` its values are checked, which waits for the device.
        target_mask: Bool or float {0, 1}, shape ``(B, M)``; None means that all are present.
        cost: Cost d of a pair: ``"huber"``, ``"mse"``, ``"l1"``, or a callable ``(B, N, C), (B, M, C) -> (B, N, M)``,
            see :func:`~setpred.functional.pairwise.pairwise_cost`.
        matching_cost: Cost by which neighbours are nearest, if another than the one that is charged.
        presence: ``"feature"``, ``"bce"``, ``"logits"`` or ``"none"``.
        presence_weight: Weight w of the binary cross-entropy.
        direction: ``"both"`` sums, or only one of them: ``"pred_to_target"`` charges each prediction its nearest
            target (the first), ``"target_to_pred"`` each target its nearest prediction.
        point_reduction: ``"mean"``, ``"sum"`` (weighted by ``pred_mask`` as well) or ``"max"`` over a set's points.
        reduction: ``"mean"`` or ``"sum"`` over sets, or ``"none"``: shape ``(B,)`` or ``(K, B)``.
        return_points: Whether to return what each point is charged too.

    Returns:
        The loss and, if asked for, the cost of each prediction, shape ``(B, N)`` or ``(K, B, N)``, and of each target,
        ``(B, M)`` or ``(K, B, M)``, whatever the direction; 0 for those that are not charged.

    Raises:
        ValueError: If a shape is wrong, a choice is unknown, ``pred_mask`` is not in [0, 1] with ``"bce"``, ``cost``
            is known to leave out the mask that ``"feature"`` made a channel, or a prediction comes with another mask,
            or with a constant one that is to be scored.
        TypeError: If a dtype is wrong, as bool is for ``pred_mask``.

    Example:
        >>> pred, target = torch.tensor([[[0.0], [4.0]]]), torch.tensor([[[1.0]]])
        >>> chamfer_loss(pred, target, cost="mse", presence="none")  # (1 + 9) / 2 + 1
        tensor(6.)

    Source: Zhang et al. (NeurIPS 2019), equation 1; Fan et al. (CVPR 2017), section 4.1, for points.
    """
    _check_options(cost, matching_cost, presence, presence_weight, direction, point_reduction, reduction)
    pred, pred_mask = open_pred(pred, pred_mask, presence)
    sets = enter(pred, target, pred_mask, target_mask, presence)
    pred, target, present = sets.pred, sets.target, sets.present
    weight = exists = None
    if presence == "feature":
        if pred_mask is not None:
            check_sees_mask(cost, pred.shape[-1])
        target, present = fill_up(sets, sized=pred_mask is not None or target_mask is not None)
    elif sets.pred_mask is not None:
        if presence == "logits":
            weight = sets.pred_mask.sigmoid()
        else:
            weight = as_weight(sets.pred_mask) if presence == "none" else sets.pred_mask.relu()
        exists = weight.detach() != 0
        pred = pred.masked_fill(~exists.unsqueeze(-1), 0)
    with full_precision(pred.device):
        of_pred, of_target = nearest_neighbours(
            pred, target, cost if matching_cost is None else matching_cost, x_mask=exists, y_mask=present
        )
        # Only who has a neighbour is charged.
        charged_pred, charged_target = _both(exists, present), _both(present, exists)
        if pred.shape[1] == 0 or target.shape[1] == 0:
            from_pred, from_target = pred.new_zeros(pred.shape[:2]), target.new_zeros(target.shape[:2])
            value = nothing(pred, target) if weight is None else nothing(pred, target, weight)
        else:
            from_pred = charge(pred, gather_rows(target, of_pred), cost, charged_pred)
            from_target = charge(gather_rows(pred, of_target), target, cost, charged_target)
            sides = []
            if direction != "target_to_pred":
                sides.append(_over_points(from_pred, charged_pred, point_reduction, weight))
            if direction != "pred_to_target":
                sides.append(_over_points(from_target, charged_target, point_reduction))
            value = sum(sides[1:], sides[0])
            if charged_target is not None or direction != "both":
                value = keep_nan(value, pred, target)
            if weight is not None and (point_reduction == "max" or direction == "target_to_pred"):  # not looked at
                value = keep_nan(value, weight)
        if sets.pred_mask is not None and presence in SCORED:
            matched = _chosen(of_target, charged_target, pred.shape[1])
            value = value + presence_weight * presence_loss(sets.pred_mask, matched, presence)
    loss = reduce(value, reduction, sets.shape)
    if not return_points:
        return loss
    cols = sets.target.shape[1]
    return loss, from_pred.view(*sets.shape, pred.shape[1]), from_target[:, :cols].reshape(*sets.shape, cols)


def _check_options(
    cost: object,
    matching_cost: object,
    presence: object,
    presence_weight: float,
    direction: object,
    point_reduction: object,
    reduction: object,
) -> None:
    check_options(cost, matching_cost, presence, presence_weight, reduction)
    check_choice("direction", direction, DIRECTIONS)
    check_choice("point_reduction", point_reduction, ("mean", "sum", "max"))


def _both(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Restrict a set's mask (S, N) to the sets whose other side is not empty."""
    if other is None:
        return mask
    possible = other.any(1, keepdim=True)
    return possible if mask is None else mask & possible


def _over_points(
    value: Tensor, charged: Tensor | None, reduction: PointReduction, weight: Tensor | None = None
) -> Tensor:
    """Mean, sum or greatest of the rows that are charged; the value of others is 0."""
    if reduction == "max":
        if charged is None:
            return value.amax(1)
        charged = charged.expand_as(value)
        return value.masked_fill(~charged, -torch.inf).amax(1).masked_fill(~charged.any(1), 0)
    total = value.sum(1) if weight is None else (value * weight).sum(1)
    if reduction == "sum":
        return total
    if weight is not None:
        count = weight.sum(1)
        return total / torch.where(count > 0, count, 1)
    return mean_rows(value) if charged is None else total / charged.expand_as(value).sum(1).clamp(min=1)


def _chosen(of_target: Tensor, charged: Tensor | None, rows: int) -> Tensor:
    """Say which of the rows are the nearest of some target, (S, rows)."""
    if charged is not None:
        of_target = of_target.masked_fill(~charged, rows)
    chosen = of_target.new_zeros(len(of_target), rows + 1, dtype=torch.bool)
    return chosen.scatter(1, of_target, True)[:, :rows]


@with_options
class ChamferLoss(SetLoss):
    """Mean cost to the nearest neighbour in the other set, from both sides, as a module.

    Its options are those of :func:`chamfer_loss`. A cost that is an ``nn.Module`` is registered,
    so that its parameters move and train with the loss.

    Args:
        scaler: Where given, elements of both sides are measured in its coordinates, by costs of your own too; see
            :class:`setpred.StandardScaler`. It is not registered: it moves and is saved with the decoder.

    Raises:
        ValueError: If a choice is unknown or the weight is negative or not finite.

    Example:
        >>> loss = ChamferLoss("mse", presence="none")
        >>> loss(torch.tensor([[[0.0], [4.0]]]), torch.tensor([[[1.0]]]))
        tensor(6.)

    Source: Zhang et al. (NeurIPS 2019), equation 1.
    """

    cost: Cost = "huber"
    _: KW_ONLY
    matching_cost: Cost | None = None
    presence: Presence = "feature"
    presence_weight: float = 1.0
    direction: Direction = field(default="both", repr=False)
    point_reduction: PointReduction = field(default="mean", repr=False)
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
        *,
        return_points: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """See :func:`chamfer_loss`."""
        pred, target, pred_mask = self._opened(pred, target, pred_mask)
        loss: Tensor | tuple[Tensor, Tensor, Tensor] = chamfer_loss(  # type: ignore[call-overload]
            pred, target, pred_mask, target_mask, return_points=return_points, **self.options
        )
        return loss
