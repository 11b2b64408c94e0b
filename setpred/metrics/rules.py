"""Rules that say how close all pairs of predictions and targets are, as `box_iou` and `torch.cdist` do."""

from collections.abc import Sequence

import torch
from torch import Tensor

from setpred._checks import check_count, check_positive, check_shape
from setpred.functional._precision import common_dtype
from setpred.functional.pairwise import as_sets


def attribute_distance(
    pred: Tensor, target: Tensor, *, coordinates: int, groups: Sequence[int], scale: float = 1.0
) -> Tensor:
    r"""Euclidean distance between all pairs of objects of the same attributes, a rule for :func:`average_precision`.

    Channels are coordinates, then one group per attribute, whose largest channel is the attribute's value.

    Args:
        pred: Shape ``(B, N, C)``.
        target: Shape ``(B, M, C)``.
        coordinates: Number of coordinates.
        groups: Number of channels of each attribute; channels beyond them are not looked at.
        scale: Factor on the distance.

    Returns:
        Shape ``(B, N, M)``, +inf where some attribute differs.

    Raises:
        ValueError: If a shape is wrong, a number out of its range, or there are fewer channels than coordinates and
            groups.
        TypeError: If a dtype is not floating, or a number of another type.

    Example:
        >>> pred = torch.tensor([[[0.0, 0.9, 0.1], [1.0, 0.2, 0.8]]])
        >>> attribute_distance(pred, torch.tensor([[[0.5, 1.0, 0.0]]]), coordinates=1, groups=(2,))
        tensor([[[0.5000],
                 [   inf]]])
    """
    pred, target = as_sets(pred, target, "pred", "target")
    check_count("coordinates", coordinates, 0)
    if not isinstance(groups, Sequence):
        raise TypeError(f"`groups` must be a sequence of integers, got {groups!r}")
    for size in groups:
        check_count("groups", size)
    check_positive("scale", scale)
    if pred.shape[2] < coordinates + sum(groups):
        raise ValueError(
            f"`pred` must have {coordinates} coordinates and {sum(groups)} channels of attributes, got {pred.shape[2]}"
        )
    distance = torch.cdist(
        pred[..., :coordinates], target[..., :coordinates], compute_mode="donot_use_mm_for_euclid_dist"
    )
    end = coordinates
    for size in groups:
        part, end = slice(end, end + size), end + size
        a, b = (side[..., part].argmax(-1) for side in (pred, target))
        distance = distance.masked_fill(a.unsqueeze(2) != b.unsqueeze(1), torch.inf)
    return scale * distance


def clevr_state(pred: Tensor, target: Tensor) -> Tensor:
    """Compare 3 coordinates, divided by 3, and material, colour, shape and size."""
    return attribute_distance(pred, target, coordinates=3, groups=(2, 8, 3, 2), scale=3.0)


# Of nose, eyes, ears, shoulders, elbows, wrists, hips, knees and ankles, left and right.
COCO_SIGMAS = tuple(k / 1000 for k in (26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89))


def keypoint_similarity(pred: Tensor, target: Tensor, *, sigmas: Sequence[float] = COCO_SIGMAS) -> Tensor:
    r"""Object keypoint similarity (OKS) of all pairs, a rule for :class:`AveragePrecision`.

    .. math::
        \text{OKS} = \frac{1}{n} \sum_{k \text{ visible}} \exp\left(-\frac{d_k^2}{2 s^2 (2 \sigma_k)^2}\right)

    with :math:`d_k` the distance of a keypoint, :math:`s^2` the area of the target, and n its visible keypoints.

    Args:
        pred: Shape ``(B, N, 3 K + 1)``: x, y and visibility of K keypoints in turn, as COCO stores them, then the area.
            Visibilities and areas of predictions are not looked at.
        target: Shape ``(B, M, 3 K + 1)``; a keypoint is visible where its visibility is positive.
        sigmas: How far apart people place each keypoint, relative to the object's size: those of COCO's 17.

    Returns:
        Shape ``(B, N, M)``, in [0, 1]; 0 for targets without visible keypoints.

    Raises:
        ValueError: If a shape is wrong, ``sigmas`` is empty, or one of them is not positive.
        TypeError: If a dtype is not floating, or ``sigmas`` holds no numbers.

    Example:
        >>> target = torch.tensor([[[0.0, 0.0, 2.0, 9.0, 9.0, 0.0, 16.0]]])
        >>> pred = torch.tensor([[[0.0, 1.0, 0.0, 5.0, 5.0, 0.0, 0.0]]])
        >>> keypoint_similarity(pred, target, sigmas=(0.25, 0.25))
        tensor([[[0.8825]]])

    Source: the COCO keypoint evaluation, https://cocodataset.org/#keypoints-eval.
    """
    if not isinstance(sigmas, Sequence):
        raise TypeError(f"`sigmas` must be a sequence of numbers, got {sigmas!r}")
    if len(sigmas) == 0:
        raise ValueError("`sigmas` must be at least one number, got none")
    for sigma in sigmas:
        check_positive("sigmas", sigma)
    check_shape("pred", pred, "B", "N", 3 * len(sigmas) + 1)
    check_shape("target", target, pred.shape[0], "M", pred.shape[2])
    dtype = common_dtype(pred, target)
    pred, target = pred.to(dtype).unsqueeze(2), target.to(dtype).unsqueeze(1)
    squares = [(pred[..., axis:-1:3] - target[..., axis:-1:3]).square() for axis in (0, 1)]
    area = target[..., -1] + torch.finfo(dtype).eps
    spread = torch.stack([2 * area * (2 * sigma) ** 2 for sigma in sigmas], -1)
    visible = target[..., 2::3] > 0
    similar = (-(squares[0] + squares[1]) / spread).exp().where(visible, 0).sum(-1)
    return similar / visible.sum(-1).clamp(min=1)
