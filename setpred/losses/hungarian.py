"""Hungarian loss: match predictions and targets one to one at the least cost, and charge the matched pairs."""

from dataclasses import KW_ONLY
from typing import Literal, TypedDict, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from setpred.functional.assignment import Solver, assign, check_solver
from setpred.functional.pairwise import Cost, cost_of_all_pairs
from setpred.losses._common import (
    Presence,
    Reduction,
    SetLoss,
    charge,
    check_options,
    check_sees_mask,
    enter,
    full_precision,
    gather_rows,
    keep_nan,
    mean_rows,
    presence_loss,
    reduce,
    with_options,
)
from setpred.scaler import StandardScaler


class _Options(TypedDict, total=False):
    """The options of :func:`hungarian_loss` for its overloads: what they have in common."""

    cost: Cost
    matching_cost: Cost | None
    presence: Presence
    presence_weight: float
    reduction: Reduction
    solver: Solver


@overload
def hungarian_loss(
    pred: Tensor,
    target: Tensor,
    pred_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    return_matching: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def hungarian_loss(
    pred: Tensor,
    target: Tensor,
    pred_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    return_matching: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...


def hungarian_loss(
    pred: Tensor,
    target: Tensor,
    pred_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    cost: Cost = "huber",
    matching_cost: Cost | None = None,
    presence: Presence = "feature",
    presence_weight: float = 1.0,
    reduction: Reduction = "mean",
    solver: Solver = "auto",
    return_matching: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Least mean cost of matching predicted and target elements one to one.

    .. math::
        \mathcal{L}_\text{hun}(\hat Y, Y) = \min_{p} \frac{1}{n} \sum_{i} d(\hat y_i, y_{p(i)})

    over the n matched pairs. ``presence`` says how a set's size enters:

    - ``"feature"`` (the paper): the mask is one more channel on both sides, ones where it is None, and all N
      predictions are matched. Absent targets are zeros; with fewer target rows than predictions, absent ones are added.
    - ``"bce"``: present targets are matched to any predictions; the predicted mask is scored against who was matched:
      :math:`w \frac{1}{N} \sum_i \operatorname{BCE}(\hat m_i, [i \text{ matched}])` is added.
    - ``"none"``: present targets are matched, ``pred_mask`` is not scored.

    In the last two, a set without targets has a matching cost of 0. Values of absent targets, NaN too, are never seen;
    NaN in what is predicted is an error or makes the set's loss NaN. Costs are computed in float32 at least, under
    autocast too; the matching has no gradient.

    Args:
        pred: Predicted elements, shape ``(B, N, C)``, or ``(K, B, N, C)`` for K predictions of the same targets.
        target: Target elements, shape ``(B, M, C)``.
        pred_mask: Predicted presence in [0, 1], floating, shape ``(B, N)`` or ``(K, B, N)``. With ``"bce"`` its values
            are checked, which waits for the device.
        target_mask: Bool or float {0, 1}, shape ``(B, M)``; None means that all are present.
        cost: Cost d of a pair: ``"huber"``, ``"mse"``, ``"l1"``, or a callable ``(B, N, C), (B, M, C) -> (B, N, M)``,
            see :func:`~setpred.functional.pairwise.pairwise_cost` and, to compose one,
            :func:`~setpred.functional.pairwise.sum_costs`.
        matching_cost: Cost to match by, if another than the one that is charged. +inf forbids a pair.
        presence: ``"feature"``, ``"bce"`` or ``"none"``.
        presence_weight: Weight w of the binary cross-entropy.
        reduction: ``"mean"`` or ``"sum"`` over sets, or ``"none"``: shape ``(B,)`` or ``(K, B)``.
        solver: See :func:`~setpred.functional.assignment.linear_assignment`.
        return_matching: Whether to return the matching too.

    Returns:
        The loss and, if asked for, the target of each prediction, int64 of shape ``(B, N)`` or ``(K, B, N)``, with -1
        where it has none that is present.

    Raises:
        ValueError: If a shape is wrong, a choice is unknown, there are more targets than predictions (in
            ``"feature"`` rows, else present ones), the costs of a sample are NaN or leave no assignment, ``pred_mask``
            is not in [0, 1] with ``"bce"``, or ``cost`` is known to leave out the mask that ``"feature"`` made a
            channel.
        TypeError: If a dtype is wrong, as bool is for ``pred_mask``.

    Example:
        >>> pred, target = torch.tensor([[[0.0], [5.0]]]), torch.tensor([[[5.5], [0.0]]])
        >>> hungarian_loss(pred, target, presence="none", return_matching=True)
        (tensor(0.0625), tensor([[1, 0]]))

    Source: Zhang et al. (NeurIPS 2019), equation 2 and section 3.2; ``"bce"`` as in Carion et al., DETR (ECCV 2020).
    """
    check_options(cost, matching_cost, presence, presence_weight, reduction)
    sets = enter(pred, target, pred_mask, target_mask, presence)
    pred, target, present = sets.pred, sets.target, sets.present
    if presence == "feature" and pred_mask is not None:
        check_sees_mask(cost, pred.shape[-1])
    with full_precision(pred.device):
        (rows, channels), cols = pred.shape[1:], target.shape[1]
        if presence == "feature":
            if cols > rows:
                raise ValueError(
                    f"`target` must have at most as many rows as `pred` with presence='feature', got {cols} and {rows}"
                )
            target = F.pad(target, (0, 0, 0, rows - cols)) if cols < rows else target
        elif cols == 0:
            target = pred.new_zeros(len(pred), 1, channels)  # something to gather from, present to nobody
            present = target.new_zeros(target.shape[:2], dtype=torch.bool)

        who = None if presence == "feature" else present
        with torch.no_grad():
            costs = cost_of_all_pairs(pred, target, cost if matching_cost is None else matching_cost)
            # With the shape (K, B, N, M) an error can say which step of which sample.
            matching = assign(
                costs.view(sets.shape + costs.shape[1:]),
                col_mask=None if who is None else who.reshape(sets.shape + who.shape[1:]),
                solver=solver,
                every_column=presence != "feature",
            ).flatten(0, -2)
        partner = gather_rows(target, matching if presence == "feature" else matching.clamp(min=0))
        if presence == "feature":  # everyone is matched
            value = mean_rows(charge(pred, partner, cost, None))
        else:
            matched = matching >= 0
            value = charge(pred, partner, cost, matched).sum(1) / matched.sum(1).clamp(min=1)
            if sets.pred_mask is not None and presence == "bce":
                value = keep_nan(value, pred) + presence_weight * presence_loss(sets.pred_mask, matched)
            elif sets.pred_mask is not None:
                value = keep_nan(value, pred, sets.pred_mask)
            elif present is not None:  # else NaN has been an error of the costs
                value = keep_nan(value, pred)
    loss = reduce(value, reduction, sets.shape)
    if not return_matching:
        return loss
    if presence == "feature":
        has_target = matching < cols
        if present is not None:
            has_target = has_target & F.pad(present, (0, rows - cols)).gather(1, matching)
        matching = matching.where(has_target, -1)
    return loss, matching.view(*sets.shape, rows)


@with_options
class HungarianLoss(SetLoss):
    """Module form of :func:`hungarian_loss`, whose options it takes.

    A cost that is an ``nn.Module`` is registered, so that its parameters move and train with the loss.

    Args:
        scaler: Where given, elements of both sides are measured in its coordinates, by costs of your own too; see
            :class:`setpred.StandardScaler`. It is not registered: it moves and is saved with the decoder.

    Raises:
        ValueError: If a choice is unknown or the weight is negative or not finite.

    Example:
        >>> loss = HungarianLoss("mse", presence="none")
        >>> loss(torch.tensor([[[0.0], [5.0]]]), torch.tensor([[[6.0], [0.0]]]))
        tensor(0.5000)

    Source: Zhang et al. (NeurIPS 2019), equation 2.
    """

    cost: Cost = "huber"
    _: KW_ONLY
    matching_cost: Cost | None = None
    presence: Presence = "feature"
    presence_weight: float = 1.0
    reduction: Reduction = "mean"
    solver: Solver = "auto"
    scaler: StandardScaler | None = None

    def __post_init__(self) -> None:
        check_options(self.cost, self.matching_cost, self.presence, self.presence_weight, self.reduction)
        check_solver(self.solver)

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        pred_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        *,
        return_matching: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See :func:`hungarian_loss`."""
        pred, target = self._scaled(pred, target)
        loss: Tensor | tuple[Tensor, Tensor] = hungarian_loss(  # type: ignore[call-overload]
            pred, target, pred_mask, target_mask, return_matching=return_matching, **self.options
        )
        return loss
