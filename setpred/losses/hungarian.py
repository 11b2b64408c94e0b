"""Hungarian loss: match predictions and targets one to one at the least cost, and charge the matched pairs."""

from dataclasses import KW_ONLY, field
from typing import Literal, TypedDict, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from setpred._checks import check_choice, check_count
from setpred.functional.assignment import NonFinite, Solver, assign, check_solver
from setpred.functional.pairwise import Cost, cost_of_all_pairs
from setpred.losses._common import (
    SCORED,
    Presence,
    Reduction,
    SetLoss,
    Sets,
    charge,
    check_options,
    check_sees_mask,
    enter,
    fill_up,
    full_precision,
    gather_rows,
    keep_nan,
    mean_rows,
    open_pred,
    presence_loss,
    reduce,
    with_options,
)
from setpred.scaler import StandardScaler
from setpred.sets import SetPrediction


class _Options(TypedDict, total=False):
    """The options of :func:`hungarian_loss` for its overloads: what they have in common."""

    cost: Cost
    matching_cost: Cost | None
    presence: Presence
    presence_weight: float
    average_over: Literal["set", "batch"]
    matches_per_target: int
    surplus: Literal["raise", "drop"]
    nonfinite: NonFinite
    reduction: Reduction
    solver: Solver


@overload
def hungarian_loss(
    pred: Tensor | SetPrediction,
    target: Tensor,
    pred_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    return_matching: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def hungarian_loss(
    pred: Tensor | SetPrediction,
    target: Tensor,
    pred_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    return_matching: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...


def hungarian_loss(
    pred: Tensor | SetPrediction,
    target: Tensor,
    pred_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    cost: Cost = "huber",
    matching_cost: Cost | None = None,
    presence: Presence = "feature",
    presence_weight: float = 1.0,
    average_over: Literal["set", "batch"] = "set",
    matches_per_target: int = 1,
    surplus: Literal["raise", "drop"] = "raise",
    nonfinite: NonFinite = "raise",
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
      :math:`w \frac{1}{N} \sum_i \operatorname{BCE}(\hat m_i, [i \text{ matched}])` is added. For probabilities: of a
      mask that is clamped to the wrong one of 0 and 1, as decoders here clamp it, the derivative is about 1e12, and a
      RuntimeWarning says so.
    - ``"logits"``: the same, with :math:`\hat m_i` the sigmoid of the predicted mask.
    - ``"none"``: present targets are matched, ``pred_mask`` is not scored.

    In the last three, a set without targets has a matching cost of 0. Values of absent targets, NaN too, are never
    seen; NaN in what is predicted is an error or makes the set's loss NaN. Costs are computed in float32 at least,
    under autocast too; the matching has no gradient.

    Args:
        pred: Predicted elements, shape ``(B, N, C)``, or ``(K, B, N, C)`` for K predictions of the same targets.
            Or a :class:`setpred.SetPrediction`, whose mask then is the ``pred_mask``, ones where there is none.
        target: Target elements, shape ``(B, M, C)``.
        pred_mask: Predicted presence in [0, 1], with ``"logits"`` of any size; floating, shape ``(B, N)`` or
            ``(K, B, N)``. With ``"bce"`` its values are checked, which waits for the device.
        target_mask: Bool or float {0, 1}, shape ``(B, M)``; None means that all are present.
        cost: Cost d of a pair: ``"huber"``, ``"mse"``, ``"l1"``, or a callable ``(B, N, C), (B, M, C) -> (B, N, M)``,
            see :func:`~setpred.functional.pairwise.pairwise_cost` and, to compose one,
            :func:`~setpred.functional.pairwise.sum_costs`.
        matching_cost: Cost to match by, if another than the one that is charged. +inf forbids a pair.
        presence: ``"feature"``, ``"bce"``, ``"logits"`` or ``"none"``.
        presence_weight: Weight w of the binary cross-entropy.
        average_over: What the costs of matched pairs are averaged over: the pairs of each ``"set"``, so that all sets
            weigh the same; or the targets of the ``"batch"``, so that all targets do (DETR): the pairs' sum is divided
            by the mean number of targets per set, k times, and by no less than one target in the batch;
            targets that are dropped or skipped count. With ``"feature"`` every set has N pairs, and both are the same.
        matches_per_target: How many predictions are matched to each target, k; more than one not with ``"feature"``.
        surplus: What becomes of more targets (k times) than predictions: ``"raise"`` an error, or ``"drop"`` those that
            the least cost leaves out.
        nonfinite: What becomes of a set whose costs are NaN or -inf, or leave no assignment: ``"raise"`` an error, or
            ``"skip"`` it: it costs 0, nobody is matched, and a RuntimeWarning names it.
        reduction: ``"mean"`` or ``"sum"`` over sets, or ``"none"``: shape ``(B,)`` or ``(K, B)``.
        solver: See :func:`~setpred.functional.assignment.linear_assignment`.
        return_matching: Whether to return the matching too.

    Returns:
        The loss and, if asked for, the target of each prediction, int64 of shape ``(B, N)`` or ``(K, B, N)``, with -1
        where it has none that is present.

    Raises:
        ValueError: If a shape is wrong, a choice is unknown, there are more targets than predictions (in
            ``"feature"`` rows, else present ones), the costs of a sample are NaN or leave no assignment, ``pred_mask``
            is not in [0, 1] with ``"bce"``, ``cost`` is known to leave out the mask that ``"feature"`` made a channel,
            there is more than one match per target with ``"feature"``, or a prediction comes with another mask, or with
            a constant one that is to be scored.
        TypeError: If a dtype is wrong, as bool is for ``pred_mask``.

    Example:
        >>> pred, target = torch.tensor([[[0.0], [5.0]]]), torch.tensor([[[5.5], [0.0]]])
        >>> hungarian_loss(pred, target, presence="none", return_matching=True)
        (tensor(0.0625), tensor([[1, 0]]))
        >>> from setpred import MLPDecoder
        >>> decoder, z = MLPDecoder(in_channels=8, set_size=2, channels=1), torch.randn(1, 8)
        >>> hungarian_loss(decoder(z), target, target_mask=torch.tensor([[True, False]])).shape
        torch.Size([])

    Source: Zhang et al. (NeurIPS 2019), equation 2 and section 3.2; ``"bce"`` and ``average_over="batch"`` as in Carion
    et al., DETR (ECCV 2020); ``matches_per_target`` as in Jia et al., DETRs with hybrid matching (CVPR 2023).
    """
    _check_options(
        cost, matching_cost, presence, presence_weight, average_over, matches_per_target, surplus, nonfinite, reduction
    )
    pred, pred_mask = open_pred(pred, pred_mask, presence)
    sets = enter(pred, target, pred_mask, target_mask, presence)
    pred, target, who = sets.pred, sets.target, sets.present
    (rows, channels), cols = pred.shape[1:], target.shape[1]
    if presence == "feature":
        if pred_mask is not None:
            check_sees_mask(cost, channels)
        if cols > rows and surplus == "raise":
            raise ValueError(
                f"`target` must have at most as many rows as `pred` with presence='feature', got {cols} and {rows}"
            )
        # As many are matched as there are predictions, so that all of these are.
        target, who = fill_up(sets, sized=True)
    elif cols == 0:
        target = pred.new_zeros(len(pred), 1, channels)  # something to gather from, present to nobody
        who = target.new_zeros(target.shape[:2], dtype=torch.bool)
    with full_precision(pred.device):
        with torch.no_grad():
            costs = cost_of_all_pairs(pred, target, cost if matching_cost is None else matching_cost)
            # With the shape (K, B, N, M) an error can say which step of which sample.
            matching = assign(
                costs.view(sets.shape + costs.shape[1:]),
                col_mask=None if who is None else who.view(sets.shape + who.shape[1:]),
                solver=solver,
                every_column=presence != "feature" and surplus == "raise",
                rows_per_column=matches_per_target,
                nonfinite=nonfinite,
            ).reshape(len(pred), rows)
        if presence == "feature" and nonfinite == "raise":  # everyone is matched
            pairs = charge(pred, gather_rows(target, matching), cost, None)
            value = pairs if reduction == "mean" else mean_rows(pairs)  # the means are of equally many
        else:
            matched = matching >= 0
            pairs = charge(pred, gather_rows(target, matching.clamp(min=0)), cost, matched)
            over = "set" if presence == "feature" else average_over
            value = _average(pairs, matched, sets, matches_per_target, over)
            mask = sets.pred_mask
            if nonfinite == "skip":
                skipped = ~matched.any(1) if who is None else who.any(1) & ~matched.any(1)
                mask = None if mask is None else mask.masked_fill(skipped.unsqueeze(1), 0.5)
            unseen = [] if who is None else [pred]  # whose NaN need not have been an error of the costs
            if mask is not None and presence == "none":
                unseen.append(mask)
            if unseen:
                value = keep_nan(value, *unseen)
            if mask is not None and presence in SCORED:
                value = value + presence_weight * presence_loss(mask, matched, presence)
            if nonfinite == "skip":
                value = value.masked_fill(skipped, 0)
    loss = reduce(value, reduction, sets.shape)
    if not return_matching:
        return loss
    if presence == "feature":
        has_target = matching < cols
        if sets.present is not None:
            present = F.pad(sets.present, (0, max(rows - cols, 0)))
            has_target = has_target & present.gather(1, matching.clamp(min=0))
        matching = matching.where(has_target, -1)
    return loss, matching.view(*sets.shape, rows)


def _average(pairs: Tensor, matched: Tensor, sets: Sets, k: int, over: Literal["set", "batch"]) -> Tensor:
    """Sum of each set's costs (S, N), divided as ``average_over`` says."""
    total = pairs.sum(1)
    if over == "set":
        return total / matched.sum(1).clamp(min=1)
    if sets.present is None:
        return total / max(k * sets.target.shape[1], 1)
    targets = k * sets.present.sum().to(total.dtype) / max(len(total), 1)  # per set
    return total / targets.clamp(min=1 / max(sets.shape[-1], 1))


def _check_options(
    cost: object,
    matching_cost: object,
    presence: object,
    presence_weight: float,
    average_over: object,
    matches_per_target: int,
    surplus: object,
    nonfinite: object,
    reduction: object,
    solver: object = "auto",
) -> None:
    check_options(cost, matching_cost, presence, presence_weight, reduction)
    check_choice("average_over", average_over, ("set", "batch"))
    check_count("matches_per_target", matches_per_target)
    if matches_per_target > 1 and presence == "feature":
        raise ValueError(f"`matches_per_target` must be 1 with presence='feature', got {matches_per_target}")
    check_choice("surplus", surplus, ("raise", "drop"))
    check_choice("nonfinite", nonfinite, ("raise", "skip"))
    check_solver(solver)


@with_options
class HungarianLoss(SetLoss):
    """Least mean cost of matching predicted and target elements one to one, as a module.

    Its options are those of :func:`hungarian_loss`. A cost that is an ``nn.Module`` is registered,
    so that its parameters move and train with the loss.

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
    average_over: Literal["set", "batch"] = field(default="set", repr=False)
    matches_per_target: int = field(default=1, repr=False)
    surplus: Literal["raise", "drop"] = field(default="raise", repr=False)
    nonfinite: NonFinite = field(default="raise", repr=False)
    reduction: Reduction = "mean"
    solver: Solver = "auto"
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
        return_matching: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See :func:`hungarian_loss`."""
        pred, target, pred_mask = self._opened(pred, target, pred_mask)
        loss: Tensor | tuple[Tensor, Tensor] = hungarian_loss(  # type: ignore[call-overload]
            pred, target, pred_mask, target_mask, return_matching=return_matching, **self.options
        )
        return loss
