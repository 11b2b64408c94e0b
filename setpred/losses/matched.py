"""Losses of class logits, given who was matched: whoever was not is charged as "no object"."""

from typing import Literal

import torch
from torch import Tensor

from setpred._checks import check_at_least, check_choice, check_finite, check_integers, check_range, check_tensor
from setpred.functional._precision import common_dtype
from setpred.functional.classes import check_focal, focal_term, matched_classes
from setpred.losses._common import REDUCTIONS, Reduction, full_precision


def matched_cross_entropy(
    logits: Tensor, classes: Tensor, matching: Tensor, *, no_object_weight: float = 0.1, reduction: Reduction = "mean"
) -> Tensor:
    r"""Cross-entropy of every prediction with its target's class, or with "no object", the last class.

    .. math:: -\frac{\sum_i w_{c_i} \log \operatorname{softmax}(x_i)_{c_i}}{\sum_i w_{c_i}}

    with :math:`w` the weight of "no object", and 1 of the other classes. Computed in float32 at least.

    Args:
        logits: Shape ``(B, N, C)``, or ``(K, B, N, C)`` for K predictions of the same targets, as of auxiliary layers.
        classes: Class of each target, int64 of shape ``(B, M)``, in [0, C - 1). Those of targets that nobody was
            matched to, such as padding, are not looked at.
        matching: The target of each prediction, int64 of shape ``(B, N)`` or ``(K, B, N)``, -1 where it has none: what
            :func:`setpred.hungarian_loss` returns with ``return_matching=True``.
        no_object_weight: Weight of "no object".
        reduction: ``"mean"``: weighted over all predictions of the batch, and a mean over steps K; ``"sum"`` or
            ``"none"``: sums over predictions, of all sets or of each, ``(B,)`` or ``(K, B)``.

    Returns:
        The loss; its mean is 0 where there is nothing to be charged.

    Raises:
        ValueError: If a shape is wrong, a class or a target's number does not exist (not looked at while compiling),
            the weight is negative or not finite, or the reduction is unknown.
        TypeError: If a dtype is wrong.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 2.0]]])
        >>> matched_cross_entropy(logits, torch.tensor([[0]]), torch.tensor([[0, -1]]))
        tensor(0.2395)

    Source: Carion et al., DETR (ECCV 2020), equation 2 and section 3.1; the mean is that of
    `torch.nn.functional.cross_entropy` with class weights.
    """
    _check(logits, classes, matching, reduction, 2)
    check_at_least("no_object_weight", no_object_weight, 0)
    check_finite("no_object_weight", no_object_weight)
    with full_precision(logits.device):
        logits = logits.to(common_dtype(logits))
        nobody = logits.shape[-1] - 1
        wanted = _wanted(classes, matching, nobody)
        weight = torch.where(wanted == nobody, no_object_weight, logits.new_ones(()))
        value = -weight * logits.log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
        return _reduce(value.sum(-1), weight.sum((-2, -1)), reduction)


def matched_focal_loss(
    logits: Tensor,
    classes: Tensor,
    matching: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Focal loss of every logit: of a prediction's target class as there, of all others as absent.

    .. math::
        \frac{1}{n} \sum_i \sum_c \begin{cases}
        -\alpha (1 - p_{ic})^\gamma \log p_{ic} & c \text{ is the class of the target of } i \\
        -(1 - \alpha) p_{ic}^\gamma \log (1 - p_{ic}) & \text{else} \end{cases}, \quad p = \operatorname{sigmoid}(x)

    with n the number of matched pairs, 1 at least. "No object" has no logit. Computed in float32 at least.

    Args:
        logits: Shape ``(B, N, C)``, or ``(K, B, N, C)`` for K predictions of the same targets, as of auxiliary layers.
        classes: Class of each target, int64 of shape ``(B, M)``, in [0, C). Those of targets that nobody was matched
            to, such as padding, are not looked at.
        matching: The target of each prediction, int64 of shape ``(B, N)`` or ``(K, B, N)``, -1 where it has none.
        alpha: Weight of a class that is there; the others have ``1 - alpha``.
        gamma: How much less is charged for what is nearly right; 0 is binary cross-entropy.
        reduction: ``"mean"``: the sum over the batch by its matched pairs, and a mean over steps K; ``"sum"`` or
            ``"none"``: sums over predictions, of all sets or of each, ``(B,)`` or ``(K, B)``.

    Returns:
        The loss.

    Raises:
        ValueError: If a shape is wrong, a class or a target's number does not exist (not looked at while compiling),
            an option is out of its range, or the reduction is unknown.
        TypeError: If a dtype is wrong.

    Example:
        >>> logits = torch.tensor([[[2.0, -2.0], [-2.0, -2.0]]])
        >>> matched_focal_loss(logits, torch.tensor([[0]]), torch.tensor([[0, -1]]))
        tensor(0.0045)

    Source: Lin et al., Focal loss (ICCV 2017), equation 5; normalised as there and in Zhu et al., Deformable DETR
    (ICLR 2021).
    """
    _check(logits, classes, matching, reduction, 1)
    check_focal(alpha, gamma)
    with full_precision(logits.device):
        logits = logits.to(common_dtype(logits))
        nobody = logits.shape[-1]
        there = _wanted(classes, matching, nobody).unsqueeze(-1) == torch.arange(nobody, device=logits.device)
        weight = torch.where(there, alpha, logits.new_ones(()) - alpha)
        value = weight * focal_term(torch.where(there, logits, -logits), gamma)
        pairs = (matching >= 0).sum((-2, -1)).clamp(min=1)
        return _reduce(value.sum((-2, -1)), pairs, reduction)


def _check(logits: Tensor, classes: Tensor, matching: Tensor, reduction: object, least: Literal[1, 2]) -> None:
    check_tensor("logits", logits)
    if logits.dim() not in (3, 4) or logits.shape[-1] < least:
        raise ValueError(
            f"`logits` must have shape (B, N, C) or (K, B, N, C), C at least {least}, got shape {tuple(logits.shape)}"
        )
    check_integers("classes", classes, logits.shape[-3], "M")
    check_integers("matching", matching, *logits.shape[:-1])
    check_choice("reduction", reduction, REDUCTIONS)


def _wanted(classes: Tensor, matching: Tensor, nobody: int) -> Tensor:
    """Class that each prediction should have, ``nobody`` where it has no target; others are checked."""
    wanted = matched_classes(classes, matching, nobody)
    check_range("classes", wanted, nobody, matching >= 0)
    return wanted


def _reduce(value: Tensor, total: Tensor, reduction: Reduction) -> Tensor:
    """Reduce sums over predictions, (B,) or (K, B), of which all of a batch are divided by a total, () or (K,)."""
    if reduction == "none":
        return value
    if reduction == "sum":
        return value.sum()
    batch = value.sum(-1) / total.where(total > 0, 1)
    return batch.mean() if batch.numel() > 0 else batch.sum()
