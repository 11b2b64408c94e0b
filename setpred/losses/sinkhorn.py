"""Sinkhorn loss: optimal transport between two sets, smoothed so that no assignment is made."""

from __future__ import annotations  # torch.compile cannot evaluate the annotations of nested functions

from dataclasses import KW_ONLY
from typing import Literal, TypedDict, overload

from torch import Tensor
from typing_extensions import Unpack

from setpred._checks import check_choice
from setpred.functional.pairwise import Cost, check_cost, cost_of_all_pairs, is_symmetric
from setpred.functional.sinkhorn import Transport, check_transport, transport_of, without_absent
from setpred.losses._common import (
    REDUCTIONS,
    Reduction,
    SetLoss,
    as_weight,
    check_sees_mask,
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

PRESENCES = ("feature", "none")


class _Options(TypedDict, total=False):
    """The options of :func:`sinkhorn_loss` for its overloads: what they have in common."""

    cost: Cost
    epsilon: float
    iters: int
    tol: float | None
    rho: float | None
    debias: bool
    presence: Literal["feature", "none"]
    reduction: Reduction


@overload
def sinkhorn_loss(
    pred: Tensor | SetPrediction,
    target: Tensor,
    pred_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    return_transport: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def sinkhorn_loss(
    pred: Tensor | SetPrediction,
    target: Tensor,
    pred_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    return_transport: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Transport]: ...


def sinkhorn_loss(
    pred: Tensor | SetPrediction,
    target: Tensor,
    pred_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    cost: Cost = "mse",
    epsilon: float = 0.01,
    iters: int = 100,
    tol: float | None = None,
    rho: float | None = None,
    debias: bool = True,
    presence: Literal["feature", "none"] = "feature",
    reduction: Reduction = "mean",
    return_transport: bool = False,
) -> Tensor | tuple[Tensor, Transport]:
    r"""Sinkhorn divergence between two sets.

    .. math::
        \mathcal{L}(\hat Y, Y) = \operatorname{OT}_\epsilon(\hat Y, Y)
        - \tfrac12 \operatorname{OT}_\epsilon(\hat Y, \hat Y) - \tfrac12 \operatorname{OT}_\epsilon(Y, Y)

    with the entropic optimal transport :math:`\operatorname{OT}_\epsilon` of
    :func:`~setpred.functional.sinkhorn.entropic_transport`. It is 0 for equal sets and positive otherwise; between the
    Hungarian loss (epsilon towards 0, equal sizes) and a kernel distance (epsilon large). It differentiates once; a
    second derivative is an error, and NaN in what is compiled.

    - ``presence="feature"``: the mask is one more channel on both sides, ones where it is None, and all rows weigh
      the same. Absent targets are zeros, and M counts as N, or as the present targets if those are more: however a
      set was padded, its loss is the same. Where neither side has a mask, both are taken as they are;
      a prediction always has one.
    - ``presence="none"``: predictions weigh as their mask says, through which gradients flow, and all present targets
      the same; each side's weights sum to 1. A negative mask makes the loss NaN. Where one of the sets is empty, the
      value is 0.

    Values of what is absent, NaN too, are never seen; any other NaN makes the set's loss NaN.

    Args:
        pred: Predicted elements, shape ``(B, N, C)``, or ``(K, B, N, C)`` for K predictions of the same targets.
            Or a :class:`setpred.SetPrediction`, whose mask then is the ``pred_mask``, ones where there is none.
        target: Target elements, shape ``(B, M, C)``.
        pred_mask: Predicted presence in [0, 1], floating, shape ``(B, N)`` or ``(K, B, N)``.
        target_mask: Bool or float {0, 1}, shape ``(B, M)``; None means that all are present.
        cost: Cost of a pair: ``"huber"``, ``"mse"``, ``"l1"``, or a callable ``(B, N, C), (B, M, C) -> (B, N, M)``; for
            the divergence it must be symmetric. Where it is known to be, as those named are and what
            :func:`~setpred.functional.pairwise.on_channels` makes of them, the divergence takes less time.
        epsilon: Strength of the entropy, in units of the cost.
        iters: Number of Sinkhorn iterations, with ``tol`` the most there are; the defaults are right for elements of
            about unit size, see :func:`~setpred.functional.sinkhorn.entropic_transport`.
        tol: If given, iterations end once the plans are as near to converged as this; see
            :func:`~setpred.functional.sinkhorn.entropic_transport`.
        rho: If given, transport is unbalanced: an element may stay without a partner, in full or in part, at about this
            price, in units of the cost, so that outliers do not draw others to them.
        debias: Whether to subtract the sets' transport onto themselves, without which a set is not at distance 0
            from itself.
        presence: ``"feature"`` or ``"none"``.
        reduction: ``"mean"`` or ``"sum"`` over sets, or ``"none"``: shape ``(B,)`` or ``(K, B)``.
        return_transport: Whether to return the transport of the predictions onto the targets too.

    Returns:
        The loss and, if asked for, a :class:`~setpred.functional.sinkhorn.Transport` with shapes that begin with
        ``(B,)`` or ``(K, B)``: the plan, ``(B, N, M)``, says how much of each prediction goes to each target, and
        ``error`` whether the iterations were enough. With ``"feature"`` M is the number of rows that count, added ones
        being last. It is 0 where one of the sets is empty.

    Raises:
        ValueError: If a shape is wrong, a number out of its range, a choice unknown, ``cost`` is known to leave out the
            mask that ``"feature"`` made a channel, or a prediction comes with another mask.
        TypeError: If a dtype is wrong, as bool is for ``pred_mask``.
        RuntimeError: If a second derivative is taken.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[1.0], [0.0]]])
        >>> loss, transport = sinkhorn_loss(x, y, return_transport=True)
        >>> loss.abs() < 1e-6
        tensor(True)
        >>> transport.plan.round(decimals=3)
        tensor([[[0.0000, 0.5000],
                 [0.5000, 0.0000]]])

    Source: Feydy et al., Interpolating between optimal transport and MMD using Sinkhorn divergences (AISTATS 2019);
    with ``rho`` Sejourne et al., Sinkhorn divergences for unbalanced optimal transport (2019).
    """
    _check_options(cost, epsilon, iters, tol, rho, debias, presence, reduction)
    pred, pred_mask = open_pred(pred, pred_mask, presence)
    sets = enter(pred, target, pred_mask, target_mask, presence)
    pred, target, y_mask = sets.pred, sets.target, sets.present
    x_mask = None if sets.pred_mask is None else as_weight(sets.pred_mask)
    if presence == "feature":
        if pred_mask is not None:
            check_sees_mask(cost, pred.shape[-1])
        target, y_mask = fill_up(sets, sized=pred_mask is not None or target_mask is not None)
    if pred.shape[1] == 0 or target.shape[1] == 0:
        value = nothing(pred, target) if x_mask is None else nothing(pred, target, x_mask)
        loss = reduce(value, reduction, sets.shape)
        if not return_transport:
            return loss
        rows, cols = pred.new_zeros(pred.shape[:2]), pred.new_zeros(target.shape[:2])
        none = Transport(value.detach(), rows.unsqueeze(2) * cols.unsqueeze(1), rows, cols, value.detach())
        return loss, Transport(*(x.view(sets.shape + x.shape[1:]) for x in none))
    with full_precision(pred.device):
        if x_mask is not None:
            pred = pred.masked_fill((x_mask == 0).unsqueeze(-1), 0)
        x_weight, x_empty = distribution(pred, x_mask)
        y_weight, y_empty = distribution(target, y_mask)

        def transport(x: Tensor, y: Tensor, x_weight: Tensor, y_weight: Tensor | None) -> Transport:
            costs = cost_of_all_pairs(x, y, cost)
            if x_mask is not None or y_mask is not None:
                costs = without_absent(costs, x_weight, x_weight if y_weight is None else y_weight)
            return transport_of(costs, x_weight, y_weight, epsilon, iters, tol, rho)

        def onto_itself(x: Tensor, weight: Tensor) -> Tensor:
            return transport(x, x, weight, None if is_symmetric(cost) else weight).value

        found, empty = transport(pred, target, x_weight, y_weight), x_empty | y_empty
        value = found.value
        if debias:
            value = value - (onto_itself(pred, x_weight) + onto_itself(target, y_weight)) / 2
        value = keep_nan(value.masked_fill(empty, 0), pred, target, x_weight)
    loss = reduce(value, reduction, sets.shape)
    if not return_transport:
        return loss
    masked = (x.masked_fill(empty.view(-1, *[1] * (x.dim() - 1)), 0) for x in found)
    return loss, Transport(*(x.view(sets.shape + x.shape[1:]) for x in masked))


def _check_options(
    cost: object,
    epsilon: float,
    iters: int,
    tol: float | None,
    rho: float | None,
    debias: bool,
    presence: object,
    reduction: object,
) -> None:
    check_cost("cost", cost)
    check_transport(epsilon, iters, tol, rho)
    check_choice("debias", debias, (True, False))
    check_choice("presence", presence, PRESENCES)
    check_choice("reduction", reduction, REDUCTIONS)


@with_options
class SinkhornLoss(SetLoss):
    """Sinkhorn divergence between two sets, as a module.

    Its options are those of :func:`sinkhorn_loss`. A cost that is an ``nn.Module`` is registered,
    so that its parameters move and train with the loss.

    Args:
        scaler: Where given, elements of both sides are measured in its coordinates, by costs of your own too; see
            :class:`setpred.StandardScaler`. It is not registered: it moves and is saved with the decoder.

    Raises:
        ValueError: If a number is out of its range or a choice is unknown.

    Example:
        >>> import torch
        >>> loss = SinkhornLoss(epsilon=0.1, presence="none")
        >>> loss(torch.tensor([[[0.0], [4.0]]]), torch.tensor([[[2.0]]]))
        tensor(3.9653)

    Source: Feydy et al. (AISTATS 2019).
    """

    cost: Cost = "mse"
    _: KW_ONLY
    epsilon: float = 0.01
    iters: int = 100
    tol: float | None = None
    rho: float | None = None
    debias: bool = True
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
        *,
        return_transport: bool = False,
    ) -> Tensor | tuple[Tensor, Transport]:
        """See :func:`sinkhorn_loss`."""
        pred, target, pred_mask = self._opened(pred, target, pred_mask)
        loss: Tensor | tuple[Tensor, Transport] = sinkhorn_loss(  # type: ignore[call-overload]
            pred, target, pred_mask, target_mask, return_transport=return_transport, **self.options
        )
        return loss
