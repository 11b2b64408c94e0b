"""Costs of class logits, beside :func:`~setpred.functional.pairwise.cross_entropy_cost`; who should have which."""

import torch
import torch.nn.functional as F
from torch import Tensor

from setpred._checks import check_at_least, check_finite, check_number, check_range
from setpred.functional.pairwise import as_sets


def probability_cost(logits: Tensor, target: Tensor) -> Tensor:
    r"""1 less the probability of the target's class: what DETR matches by, and does not charge.

    .. math:: d(x, y) = 1 - \sum_{c=1}^{C} y_c \operatorname{softmax}(x)_c

    Args:
        logits: Shape ``(B, N, C)``.
        target: Class probabilities, such as one-hot vectors, shape ``(B, M, C)``.

    Returns:
        Shape ``(B, N, M)``.

    Raises:
        ValueError: If a shape is wrong.
        TypeError: If a dtype is not floating.

    Example:
        >>> probability_cost(torch.zeros(1, 1, 4), torch.eye(4)[:2].unsqueeze(0))
        tensor([[[0.7500, 0.7500]]])

    Source: Carion et al., DETR (ECCV 2020), section 3.1.
    """
    logits, target = as_sets(logits, target, "logits", "target")
    return 1 - logits.softmax(-1) @ target.transpose(-1, -2)


def focal_term(logits: Tensor, gamma: float) -> Tensor:
    """Focal loss of each logit where its class is there; of the opposite logits, where it is not."""
    # Powers by logarithms: finite gradients of probabilities that are rounded to 0 or 1, whatever gamma.
    value = -F.logsigmoid(logits)
    return value * (gamma * F.logsigmoid(-logits)).exp() if gamma > 0 else value


def check_focal(alpha: float, gamma: float) -> None:
    """Raise unless ``alpha`` lies in [0, 1] and ``gamma`` is finite and not negative."""
    check_number("alpha", alpha)
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must lie in [0, 1], got {alpha!r}")
    check_at_least("gamma", gamma, 0)
    check_finite("gamma", gamma)


def focal_cost(logits: Tensor, target: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    r"""What matching a prediction adds to :func:`setpred.matched_focal_loss`: found, less missed.

    .. math::
        d(x, y) = \sum_{c=1}^{C} y_c \left(-\alpha (1 - p_c)^\gamma \log p_c
        + (1 - \alpha) p_c^\gamma \log(1 - p_c)\right), \quad p = \operatorname{sigmoid}(x)

    It may be negative.

    Args:
        logits: Shape ``(B, N, C)``, one per class and none for "no object".
        target: Class probabilities, such as one-hot vectors, shape ``(B, M, C)``.
        alpha: Weight of a class that is there; the others have ``1 - alpha``.
        gamma: How much less is charged for what is nearly right.

    Returns:
        Shape ``(B, N, M)``.

    Raises:
        ValueError: If a shape is wrong, ``alpha`` is not in [0, 1], or ``gamma`` is negative or not finite.
        TypeError: If a dtype is not floating, or an option is no number.

    Example:
        >>> focal_cost(torch.tensor([[[0.0, 4.0]]]), torch.eye(2).unsqueeze(0))
        tensor([[[-0.0866, -2.9062]]])

    Source: Lin et al., Focal loss (ICCV 2017), equation 5; as a cost Zhu et al., Deformable DETR (ICLR 2021).
    """
    check_focal(alpha, gamma)
    logits, target = as_sets(logits, target, "logits", "target")
    there, absent = alpha * focal_term(logits, gamma), (1 - alpha) * focal_term(-logits, gamma)
    return (there - absent) @ target.transpose(-1, -2)


def matched_classes(classes: Tensor, matching: Tensor, nobody: int) -> Tensor:
    """Class (..., B, N) that each prediction should have, of the targets' (B, M); ``nobody`` where it has no target."""
    matched, targets = matching >= 0, classes.shape[1]
    check_range("matching", matching, targets, matched)
    padded = torch.cat([classes, classes.new_full((len(classes), 1), nobody)], 1)
    return padded.expand(*matching.shape[:-1], -1).gather(-1, matching.where(matched, targets))
