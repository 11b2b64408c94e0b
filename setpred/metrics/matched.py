"""Figures of predictions that have been counted or matched, for a log during training."""

import torch
from torch import Tensor

from setpred._checks import check_integers, check_mask, check_tensor, described
from setpred.functional.classes import matched_classes


def cardinality_error(pred_mask: Tensor, target_mask: Tensor) -> Tensor:
    r"""How far the number of predictions is from that of the targets, a mean over sets.

    .. math:: \frac{1}{B} \sum_b \left| \sum_i [\hat m_{bi} > 1/2] - \sum_j m_{bj} \right|

    Args:
        pred_mask: Predicted presence in [0, 1], or bool, shape ``(..., B, N)``.
        target_mask: Bool or float {0, 1}, shape ``(B, M)``.

    Returns:
        Float32, without a gradient, shape ``(...)``: one value for each of several predictions of the same targets.
        0 for an empty batch.

    Raises:
        ValueError: If a shape is wrong.
        TypeError: If a dtype is wrong.

    Example:
        >>> cardinality_error(torch.tensor([[0.9, 0.8, 0.7], [0.1, 0.6, 0.2]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        tensor(1.5000)

    Source: Carion et al., DETR (ECCV 2020): `cardinality_error` in its code.
    """
    sizes = (_number("pred_mask", pred_mask), _number("target_mask", target_mask))
    if sizes[1].dim() != 1 or sizes[0].shape[-1:] != sizes[1].shape:
        raise ValueError(
            "`pred_mask` and `target_mask` must have shapes (..., B, N) and (B, M), got "
            f"{tuple(pred_mask.shape)} and {tuple(target_mask.shape)}"
        )
    return (sizes[0] - sizes[1]).abs().sum(-1) / max(len(target_mask), 1)


def _number(name: str, mask: Tensor) -> Tensor:
    """How many there are, NaN where the mask is."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {described(mask)}")
    check_mask(name, mask, mask.shape)
    return ((mask > 0.5).float() + 0 * mask.float()).sum(-1)


def matching_accuracy(logits: Tensor, classes: Tensor, matching: Tensor) -> Tensor:
    """How many of the matched predictions have the class of their target as the likeliest one.

    Args:
        logits: Shape ``(..., B, N, C)``; the likeliest class is that of the largest.
        classes: Class of each target, int64 of shape ``(B, M)``.
        matching: The target of each prediction, int64 of shape ``(..., B, N)``, -1 where it has none.

    Returns:
        Float32, shape ``(...)``, in [0, 1]; NaN where nobody is matched, or logits of who is are NaN.

    Raises:
        ValueError: If a shape is wrong, or a target's number does not exist (not looked at while compiling).
        TypeError: If a dtype is wrong.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 2.0]]])
        >>> matching_accuracy(logits, torch.tensor([[1, 0]]), torch.tensor([[1, -1]]))
        tensor(1.)

    Source: Carion et al., DETR (ECCV 2020): 1 less `class_error` in its code.
    """
    check_tensor("logits", logits)
    check_integers("matching", matching, *logits.shape[:-1])
    check_integers("classes", classes, *matching.shape[-2:-1], "M")
    matched = matching >= 0
    right = (logits.argmax(-1) == matched_classes(classes, matching, -1)) & matched
    accuracy = right.sum((-2, -1)).float() / matched.sum((-2, -1))
    return accuracy.masked_fill((logits.isnan().any(-1) & matched).any(-1).any(-1), torch.nan)
