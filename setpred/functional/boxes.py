"""Boxes: their forms, how much two of them overlap, and what that costs.

Names are those of `torchvision.ops`. Here boxes come in sets, ``(B, N, 4)``, and what has no area gives finite values
and gradients: an overlap, a hull or a diagonal of 0 divides nothing.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from setpred._checks import check_at_least, check_choice, check_shape, check_tensor
from setpred.functional._precision import common_dtype

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
BoxCost = Literal["iou", "giou", "diou", "ciou"]
FORMATS = ("xyxy", "xywh", "cxcywh")

Edges = tuple[Tensor, ...]  # left, top, right, bottom


def box_convert(boxes: Tensor, in_fmt: BoxFormat, out_fmt: BoxFormat) -> Tensor:
    """Bring boxes from one form into another.

    Args:
        boxes: Shape ``(..., 4)``.
        in_fmt: ``"xyxy"`` (left, top, right, bottom), ``"xywh"`` (left, top, width, height) or ``"cxcywh"`` (centre,
            width, height).
        out_fmt: The same choice.

    Returns:
        The shape and dtype of ``boxes``.

    Raises:
        ValueError: If the last dimension is not 4, or a form is unknown.
        TypeError: If the dtype is not floating.

    Example:
        >>> box_convert(torch.tensor([1.0, 2.0, 5.0, 4.0]), "xyxy", "cxcywh")
        tensor([3., 3., 4., 2.])

    Source: the conversions of `torchvision.ops.box_convert`.
    """
    check_tensor("boxes", boxes)
    if boxes.shape[-1:] != (4,):
        raise ValueError(f"`boxes` must have shape (..., 4), got shape {tuple(boxes.shape)}")
    check_choice("in_fmt", in_fmt, FORMATS)
    check_choice("out_fmt", out_fmt, FORMATS)
    if in_fmt == out_fmt:
        return boxes
    low, high = boxes[..., :2], boxes[..., 2:]
    if in_fmt == "cxcywh":
        low, high = low - 0.5 * high, low + 0.5 * high
    elif in_fmt == "xywh":
        high = low + high
    if out_fmt == "cxcywh":
        low, high = 0.5 * (low + high), high - low
    elif out_fmt == "xywh":
        high = high - low
    return torch.cat([low, high], -1)


def _edges(x: Tensor, y: Tensor) -> tuple[Edges, Edges]:
    """Edges of both sides, which broadcast to all pairs."""
    check_shape("x", x, "B", "N", 4)
    check_shape("y", y, x.shape[0], "M", 4)
    dtype = common_dtype(x, y)
    return x.to(dtype).unsqueeze(2).unbind(-1), y.to(dtype).unsqueeze(1).unbind(-1)


def _sides(box: Edges) -> tuple[Tensor, Tensor]:
    left, top, right, bottom = box
    return (right - left).clamp(min=0), (bottom - top).clamp(min=0)


def _hull(a: Edges, b: Edges) -> tuple[Tensor, Tensor]:
    """Width and height of the smallest box around both."""
    low = [torch.minimum(s, t) for s, t in zip(a[:2], b[:2], strict=True)]
    high = [torch.maximum(s, t) for s, t in zip(a[2:], b[2:], strict=True)]
    return _sides((low[0], low[1], high[0], high[1]))


def _divided(x: Tensor, y: Tensor) -> Tensor:
    """Divide x by y, and by 1 where y is 0, or so small that 1 / y would not be finite; NaN stays."""
    return x / y.masked_fill(y < torch.finfo(y.dtype).tiny, 1)


def _overlap(a: Edges, b: Edges, pixel: float = 0.0) -> Tensor:
    width = torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])
    height = torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])
    return ((width + pixel) * (height + pixel)).where((width >= 0) & (height >= 0), 0)


def _iou_and_union(a: Edges, b: Edges, pixel: float = 0.0) -> tuple[Tensor, Tensor]:
    overlap = _overlap(a, b, pixel)
    areas = [(w + pixel) * (h + pixel) for w, h in (_sides(a), _sides(b))]
    union = areas[0] + areas[1] - overlap
    return _divided(overlap, union), union


def box_iou(x: Tensor, y: Tensor, *, pixel: float = 0.0) -> Tensor:
    r"""Intersection over union of all pairs of boxes.

    .. math:: \text{IoU}(x, y) = \frac{|x \cap y|}{|x \cup y|}

    Also a rule for :class:`setpred.metrics.AveragePrecision`. Computed in float32 at least.

    Args:
        x: Boxes as left, top, right, bottom, shape ``(B, N, 4)``; see
            :func:`~setpred.functional.box_convert`.
        y: Boxes, shape ``(B, M, 4)``.
        pixel: Added to every width and height, of intersections too; 1 for boxes in whole pixels.

    Returns:
        Shape ``(B, N, M)``, in [0, 1]; 0 where boxes do not touch, or neither has an area.

    Raises:
        ValueError: If a shape is wrong, or ``pixel`` is negative.
        TypeError: If a dtype is not floating.

    Example:
        >>> a, b = torch.tensor([[[0.0, 0.0, 2.0, 2.0]]]), torch.tensor([[[1.0, 0.0, 3.0, 2.0]]])
        >>> box_iou(a, b), box_iou(a, b, pixel=1.0)
        (tensor([[[0.3333]]]), tensor([[[0.5000]]]))

    Source: Everingham et al., The Pascal visual object classes challenge (IJCV 2010), section 4.2.
    """
    check_at_least("pixel", pixel, 0)
    return _iou_and_union(*_edges(x, y), pixel)[0]


def box_coverage(x: Tensor, y: Tensor) -> Tensor:
    """Which part of each x lies in each y, (B, N, M): COCO's measure for regions of crowds."""
    a, b = _edges(x, y)
    width, height = _sides(a)
    return _divided(_overlap(a, b), width * height)


def generalized_box_iou(x: Tensor, y: Tensor) -> Tensor:
    r"""Generalised IoU of all pairs of boxes: less the part of their hull that neither covers.

    .. math:: \text{GIoU} = \text{IoU} - \frac{|h| - |x \cup y|}{|h|}, \quad h \text{ the smallest box around both}

    Args:
        x: Boxes as left, top, right, bottom, shape ``(B, N, 4)``.
        y: Boxes, shape ``(B, M, 4)``.

    Returns:
        Shape ``(B, N, M)``, in [-1, 1]; 0 where the hull has no area.

    Raises:
        ValueError: If a shape is wrong.
        TypeError: If a dtype is not floating.

    Example:
        >>> a, b = torch.tensor([[[0.0, 0.0, 2.0, 2.0]]]), torch.tensor([[[3.0, 0.0, 4.0, 2.0]]])
        >>> generalized_box_iou(a, b)
        tensor([[[-0.2500]]])

    Source: Rezatofighi et al., Generalized intersection over union (CVPR 2019).
    """
    a, b = _edges(x, y)
    iou, union = _iou_and_union(a, b)
    width, height = _hull(a, b)
    return iou - _divided(width * height - union, width * height)


def distance_box_iou(x: Tensor, y: Tensor) -> Tensor:
    r"""Distance-IoU of all pairs of boxes: less the squared distance of the centres, by that of the hull's corners.

    .. math:: \text{DIoU} = \text{IoU} - \frac{\rho^2}{c^2}

    Args:
        x: Boxes as left, top, right, bottom, shape ``(B, N, 4)``.
        y: Boxes, shape ``(B, M, 4)``.

    Returns:
        Shape ``(B, N, M)``, in [-1, 1].

    Raises:
        ValueError: If a shape is wrong.
        TypeError: If a dtype is not floating.

    Example:
        >>> a, b = torch.tensor([[[0.0, 0.0, 2.0, 2.0]]]), torch.tensor([[[2.0, 2.0, 4.0, 4.0]]])
        >>> distance_box_iou(a, b)
        tensor([[[-0.2500]]])

    Source: Zheng et al., Distance-IoU loss (AAAI 2020), equation 6.
    """
    a, b = _edges(x, y)
    return _distance_iou(a, b, _iou_and_union(a, b)[0])


def _distance_iou(a: Edges, b: Edges, iou: Tensor) -> Tensor:
    width, height = _hull(a, b)
    across, down = (0.5 * (a[i] + a[i + 2] - b[i] - b[i + 2]) for i in (0, 1))
    return iou - _divided(across.square() + down.square(), width.square() + height.square())


def complete_box_iou(x: Tensor, y: Tensor) -> Tensor:
    r"""Complete IoU of all pairs of boxes: distance-IoU, less a difference of their shapes.

    .. math::
        \text{CIoU} = \text{DIoU} - \alpha v, \quad
        v = \frac{4}{\pi^2} \left(\arctan \frac{w_x}{h_x} - \arctan \frac{w_y}{h_y}\right)^2, \quad
        \alpha = \frac{v}{1 - \text{IoU} + v}

    As published, :math:`\alpha` has no gradient.

    Args:
        x: Boxes as left, top, right, bottom, shape ``(B, N, 4)``.
        y: Boxes, shape ``(B, M, 4)``.

    Returns:
        Shape ``(B, N, M)``.

    Raises:
        ValueError: If a shape is wrong.
        TypeError: If a dtype is not floating.

    Example:
        >>> a, b = torch.tensor([[[0.0, 0.0, 2.0, 2.0]]]), torch.tensor([[[0.0, 0.0, 2.0, 1.0]]])
        >>> distance_box_iou(a, b), complete_box_iou(a, b)
        (tensor([[[0.4688]]]), tensor([[[0.4655]]]))

    Source: Zheng et al., Distance-IoU loss (AAAI 2020), equations 8 to 11.
    """
    a, b = _edges(x, y)
    iou = _iou_and_union(a, b)[0]
    v = 4 / math.pi**2 * (_angle(*_sides(a)) - _angle(*_sides(b))).square()
    alpha = _divided(v, 1 - iou + v).detach()
    return _distance_iou(a, b, iou) - alpha * v


def _angle(width: Tensor, height: Tensor) -> Tensor:
    """Arctangent of width / height, of a point that of 0 / 1."""
    size = width.square() + height.square()
    return torch.atan2(width, height.masked_fill(size < torch.finfo(size.dtype).tiny, 1))


KINDS = {
    "iou": box_iou,
    "giou": generalized_box_iou,
    "diou": distance_box_iou,
    "ciou": complete_box_iou,
}


def box_cost(x: Tensor, y: Tensor, *, kind: BoxCost = "giou", fmt: BoxFormat = "xyxy") -> Tensor:
    r"""Cost of all pairs of boxes: 1 less an overlap. To give it options, use :func:`functools.partial`.

    .. math:: d(x, y) = 1 - \text{GIoU}(x, y)

    Args:
        x: Boxes, shape ``(B, N, 4)``.
        y: Boxes, shape ``(B, M, 4)``.
        kind: ``"iou"``, ``"giou"``, ``"diou"`` or ``"ciou"``: see :func:`box_iou`, :func:`generalized_box_iou`,
            :func:`distance_box_iou`, :func:`complete_box_iou`. Boxes that do not touch have no gradient with
            ``"iou"``.
        fmt: The form of both, as in :func:`box_convert`.

    Returns:
        Shape ``(B, N, M)``, not negative.

    Raises:
        ValueError: If a shape is wrong or a choice is unknown.
        TypeError: If a dtype is not floating.

    Example:
        >>> from functools import partial
        >>> from setpred import HungarianLoss, on_channels, sum_costs
        >>> centred = partial(box_cost, fmt="cxcywh")
        >>> cost = sum_costs(on_channels("l1", slice(0, 4), weight=20.0), on_channels(centred, slice(0, 4), weight=2.0))
        >>> loss = HungarianLoss(cost, presence="none")
        >>> loss(torch.tensor([[[0.5, 0.5, 0.25, 0.25]]]), torch.tensor([[[0.5, 0.5, 0.25, 0.5]]]))
        tensor(2.2500)

    Source: Carion et al., DETR (ECCV 2020), section 3.1 (``"giou"``).
    """
    check_choice("kind", kind, tuple(KINDS))
    check_shape("x", x, "B", "N", 4)
    check_shape("y", y, x.shape[0], "M", 4)
    dtype = common_dtype(x, y)
    return 1 - KINDS[kind](*(box_convert(side.to(dtype), fmt, "xyxy") for side in (x, y)))
