"""The numbers of the COCO evaluation, of boxes or of other elements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from setpred._checks import as_presence, check_count, check_interval, check_shape, check_tensor
from setpred.functional.boxes import box_convert, box_coverage, box_iou
from setpred.metrics.average_precision import AveragePrecision, Rule, check_metric

COCO_SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, torch.inf)}


@dataclass(frozen=True)
class _WithCrowds:
    """A rule for elements whose last channel says what is a crowd: of boxes there, the part inside of it counts."""

    rule: Rule

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        pred, elements, crowd = pred[..., :-1], target[..., :-1], target[..., -1].unsqueeze(1) > 0
        closeness = self.rule(pred, elements)
        return torch.where(crowd, box_coverage(pred, elements), closeness) if self.rule is box_iou else closeness


class CocoAveragePrecision:
    r"""Average precision and recall as COCO evaluates boxes: its twelve numbers.

    Means over the thresholds 0.5, 0.55 to 0.95 and over classes, of the precision at 101 recalls; for elements of each
    range of sizes (:class:`AveragePrecision` ignores those outside of it), and for the highest scores of each image and
    class. The numbers are those of pycocotools, but NaN instead of -1 where there is no target.

    Args:
        rule: Closeness of all pairs, as for :class:`AveragePrecision`; :func:`keypoint_similarity` for keypoints.
        max_predictions: How many predictions of an image and class are judged; the last number holds where none is
            named.
        sizes: Ranges of sizes by name, both ends included.

    Raises:
        ValueError: If a number is out of its range, there is none, or a range is no increasing pair.
        TypeError: If ``rule`` is not callable, or a number or ``sizes`` of another type.

    Example:
        >>> metric = CocoAveragePrecision()
        >>> boxes, classes = torch.tensor([[[0.0, 0.0, 20.0, 20.0], [30.0, 0.0, 90.0, 40.0]]]), torch.tensor([[3, 7]])
        >>> metric.update(boxes, torch.tensor([[0.9, 0.8]]), classes, boxes + 1, classes)
        >>> {name: round(value, 3) for name, value in metric.compute().items() if name.startswith("AP")}
        {'AP': 0.8, 'AP50': 1.0, 'AP75': 1.0, 'AP_small': 0.7, 'AP_medium': 0.9, 'AP_large': nan}

    Source: Lin et al., Microsoft COCO (ECCV 2014); https://cocodataset.org/#detection-eval.
    """

    def __init__(
        self,
        rule: Rule = box_iou,
        *,
        max_predictions: Sequence[int] = (1, 10, 100),
        sizes: Mapping[str, tuple[float, float]] = COCO_SIZES,
    ) -> None:
        if not callable(rule):
            raise TypeError(f"`rule` must be callable, got {rule!r}")
        if not isinstance(max_predictions, Sequence) or len(max_predictions) == 0:
            raise ValueError(f"`max_predictions` must be at least one number, in a sequence, got {max_predictions!r}")
        for most in max_predictions:
            check_count("max_predictions", most)
        if not isinstance(sizes, Mapping):
            raise TypeError(f"`sizes` must map names to ranges, got {sizes!r}")
        for name, bounds in sizes.items():
            check_interval(f"sizes[{name!r}]", bounds)
        self.sizes = dict(sizes)

        def judge(most: int) -> AveragePrecision:
            return AveragePrecision(
                _WithCrowds(rule),
                thresholds=np.linspace(0.5, 0.95, 10).tolist(),
                matching="best free",
                ties="in order",
                recall_points=101,
                max_predictions=most,
            )

        self._limited = {most: judge(most) for most in sorted(max_predictions)}
        self._all = self._limited[max(max_predictions)]
        self._sized = {name: judge(max(max_predictions)) for name in self.sizes}

    def _parts(self) -> list[AveragePrecision]:
        return [*self._limited.values(), *self._sized.values()]

    def reset(self) -> None:
        """Forget all images."""
        for part in self._parts():
            part.reset()

    @torch.no_grad()
    def update(
        self,
        pred: Tensor,
        score: Tensor,
        pred_class: Tensor,
        target: Tensor,
        target_class: Tensor,
        *,
        target_mask: Tensor | None = None,
        pred_mask: Tensor | None = None,
        pred_size: Tensor | None = None,
        target_size: Tensor | None = None,
        target_crowd: Tensor | None = None,
    ) -> None:
        """Judge a batch of images, in float64.

        Args:
            pred: Boxes as left, top, right, bottom in pixels, or what the rule compares, shape ``(B, N, C)``.
            score: Their scores, shape ``(B, N)``.
            pred_class: Their classes, int64 of shape ``(B, N)``.
            target: Shape ``(B, M, C)``.
            target_class: Int64 of shape ``(B, M)``.
            target_mask: Bool or float {0, 1}, shape ``(B, M)``; None means that all are present.
            pred_mask: Which predictions there are, bool or float {0, 1}, shape ``(B, N)``; None means all.
            pred_size: Area of each prediction, shape ``(B, N)``; None: that of the box.
            target_size: Area of each target, shape ``(B, M)``, such as that of its segment, as in COCO's annotations;
                None: that of the box.
            target_crowd: Which targets are regions of many objects (``iscrowd``), bool or float {0, 1}, shape
                ``(B, M)``: a box inside of one is neither right nor wrong.

        Raises:
            ValueError: If a shape is wrong, a score that counts is NaN, or a mask holds others than 0 and 1.
            TypeError: If a dtype is wrong.
            RuntimeError: Inside of a transform of ``torch.func``, such as ``vmap``.
        """
        pred, score, target = _in_double("pred", pred), _in_double("score", score), _in_double("target", target)
        check_shape("pred", pred, "B", "N", "C")
        check_shape("target", target, pred.shape[0], "M", pred.shape[2])
        sides = [_sizes("pred", pred, pred_size), _sizes("target", target, target_size)] if self.sizes else []
        crowd = torch.zeros_like(target[..., 0]) if target_crowd is None else target_crowd
        crowd = as_presence("target_crowd", crowd, target)
        pred = torch.cat([pred, torch.zeros_like(pred[..., :1])], -1)
        target = torch.cat([target, crowd.unsqueeze(-1)], -1)
        for part, bounds in [
            *((part, None) for part in self._limited.values()),
            *((part, self.sizes[name]) for name, part in self._sized.items()),
        ]:
            outside = (None, None) if bounds is None else ((x < bounds[0]) | (x > bounds[1]) for x in sides)
            pred_ignored, target_ignored = outside
            part.update(
                pred,
                score,
                target,
                target_mask=target_mask,
                pred_mask=pred_mask,
                pred_class=pred_class,
                target_class=target_class,
                pred_ignored=pred_ignored,
                target_ignored=target_ignored,
                target_crowd=crowd,
            )

    def compute(self) -> dict[str, float]:
        """Compute all numbers of the images since the last reset.

        Returns:
            ``"AP"``, ``"AP50"``, ``"AP75"``, ``"AP_small"`` and so on, ``"AR1"``, ``"AR10"``, ``"AR100"``,
            ``"AR_small"`` and so on. NaN where there is no target.
        """
        precision = self._all.compute()
        return {
            "AP": precision.mean().item(),
            "AP50": precision[0].item(),
            "AP75": precision[5].item(),
            **{f"AP_{name}": part.compute().mean().item() for name, part in self._sized.items()},
            **{f"AR{most}": part.recall().mean().item() for most, part in self._limited.items()},
            **{f"AR_{name}": part.recall().mean().item() for name, part in self._sized.items()},
        }

    def compute_per_class(self) -> dict[int, float]:
        """Compute what ``"AP"`` is the mean of: the average precision of each class that has targets."""
        return {label: value.mean().item() for label, value in self._all.compute_per_class().items()}

    def merge(self, *others: Self) -> None:
        """Add what other metrics of the same options have judged; see :meth:`AveragePrecision.merge`."""
        for other in others:
            check_metric("others", other, CocoAveragePrecision)
            if other.sizes != self.sizes or list(other._limited) != list(self._limited):
                raise ValueError(
                    f"`others` must have sizes {self.sizes} and max_predictions {list(self._limited)}, got "
                    f"{other.sizes} and {list(other._limited)}"
                )
            for part, more in zip(self._parts(), other._parts(), strict=True):
                part.merge(more)

    def sync(self, group: Any = None) -> None:
        """Gather what all processes of a group have judged, so that each computes the whole; call it once, on all."""
        for part in self._parts():
            part.sync(group)


def _in_double(name: str, x: Tensor) -> Tensor:
    check_tensor(name, x)
    return x.double()


def _sizes(name: str, elements: Tensor, size: Tensor | None) -> Tensor:
    if size is not None:
        check_shape(f"{name}_size", size, *elements.shape[:2])
        return size
    if elements.shape[-1] != 4:
        raise ValueError(f"`{name}_size` must be given for elements that are not boxes of 4 channels, got None")
    return box_convert(elements, "xyxy", "xywh")[..., 2:].prod(-1)
