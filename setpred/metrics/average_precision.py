"""Average precision of predicted sets: a scored prediction is right if a rule accepts it for a target."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from setpred._checks import (
    as_presence,
    check_choice,
    check_count,
    check_positive,
    check_shape,
    check_tensor,
    in_transform,
)
from setpred.functional._precision import common_dtype
from setpred.functional.boxes import box_iou

Rule = Callable[[Tensor, Tensor], Tensor]
Matching = Literal["best", "best free", "best free, taken"]
MATCHINGS = ("best", "best free", "best free, taken")
TIES = ("together", "in order")
AVERAGES = ("pooled", "sets")


def _in_float32(x: Tensor) -> Tensor:
    return x.to(common_dtype(x))


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
    check_shape("pred", pred, "B", "N", "C")
    check_shape("target", target, pred.shape[0], "M", pred.shape[2])
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
    pred, target = _in_float32(pred), _in_float32(target)
    distance = torch.cdist(
        pred[..., :coordinates], target[..., :coordinates], compute_mode="donot_use_mm_for_euclid_dist"
    )
    end = coordinates
    for size in groups:
        part, end = slice(end, end + size), end + size
        a, b = (side[..., part].argmax(-1) for side in (pred, target))
        distance = distance.masked_fill(a.unsqueeze(2) != b.unsqueeze(1), torch.inf)
    return scale * distance


def _clevr_state(pred: Tensor, target: Tensor) -> Tensor:
    """Compare 3 coordinates, divided by 3, and material, colour, shape and size."""
    return attribute_distance(pred, target, coordinates=3, groups=(2, 8, 3, 2), scale=3.0)


class _Judged(NamedTuple):
    """Predictions of some sets, by set and then by rank, on the CPU."""

    score: Tensor  # (n,) float64
    right: Tensor  # (T, n) bool
    predictions: Tensor  # (S,) number of each set's predictions
    targets: Tensor  # (S,) number of each set's targets
    weight: Tensor  # (S,) how much each set counts in a mean over sets


def _in_order_of_values(x: Tensor, *others: Tensor) -> list[Tensor]:
    """Bring the rows of each set (B, N, C), and what belongs to them (B, N), into dictionary order."""
    order = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    for channel in reversed(x.unbind(-1)):
        order = order.gather(1, channel.gather(1, order).argsort(dim=1, stable=True))
    return [x.take_along_dim(order.unsqueeze(2), 1), *(other.gather(1, order) for other in others)]


def _rank(score: Tensor, exists: Tensor, closest: Tensor, ties: str) -> Tensor:
    """Order (B, N) in which each set's predictions are gone through; what does not exist comes last."""
    order = torch.arange(score.shape[1], device=score.device).expand_as(score)
    if ties == "together":  # of equal scores the closest first
        order = closest.argsort(dim=1, descending=True, stable=True)
    score = score.masked_fill(~exists, -torch.inf).gather(1, order)
    order = order.gather(1, score.argsort(dim=1, descending=True, stable=True))
    return order.gather(1, exists.gather(1, order).byte().argsort(dim=1, descending=True, stable=True))


def _match(closeness: Tensor, exists: Tensor, thresholds: Tensor, matching: str) -> Tensor:
    """Say which predictions are right, (T, B, N), for a closeness (B, N, M) whose rows stand in their order.

    Large values are close, and -inf is never right. The loop is over ranks; sets and thresholds go side by side.
    """
    batch, n, m = closeness.shape
    right = closeness.new_zeros(len(thresholds), batch, n, dtype=torch.bool)
    if m == 0:
        return right
    taken = closeness.new_zeros(len(thresholds), batch, m, dtype=torch.bool)
    least = thresholds.to(closeness).view(-1, 1)
    for k in range(n):
        here = closeness[:, k].expand_as(taken)
        if matching != "best":
            here = here.masked_fill(taken, -torch.inf)
        value, best = here.max(2)
        candidate = (value > -torch.inf) & exists[:, k]
        free = ~taken.gather(2, best.unsqueeze(2)).squeeze(2)
        near = value > least if matching == "best free, taken" else value >= least
        right[:, :, k] = candidate & free & near
        takes = candidate if matching == "best free, taken" else right[:, :, k]
        taken = taken | (F.one_hot(best, m).bool() & takes.unsqueeze(2))
    return right


def _area(score: Tensor, right: Tensor, targets: int, together: bool, recall_points: int | None) -> Tensor:
    """Area under the interpolated precision-recall curve, (T,)."""
    if targets == 0:
        return torch.full(right.shape[:1], torch.nan, dtype=torch.float64, device=right.device)
    if len(score) == 0:
        return torch.zeros(right.shape[:1], dtype=torch.float64, device=right.device)
    score, order = score.sort(descending=True, stable=True)
    hits = right[:, order].cumsum(1).double()
    rank = torch.arange(1, len(score) + 1, device=score.device, dtype=torch.float64)
    if together:  # equal scores are one point of the curve
        last = torch.cat([score[1:] != score[:-1], score.new_ones(1, dtype=torch.bool)])
        hits, rank = hits[:, last], rank[last]
    recall, precision = hits / targets, hits / rank
    # The best precision at this recall or a higher one.
    precision = precision.flip(1).cummax(1).values.flip(1)
    if recall_points is None:
        return (recall.diff(dim=1, prepend=recall.new_zeros(len(recall), 1)) * precision).sum(1)
    # NumPy's, as in pycocotools: where a recall lies on the grid, the last digit decides, and torch's has others.
    wanted = torch.from_numpy(np.linspace(0, 1, recall_points)).to(score.device)
    place = torch.searchsorted(recall, wanted.expand(len(recall), -1).contiguous())
    return F.pad(precision, (0, 1)).gather(1, place).mean(1)


def _as_thresholds(value: float | Sequence[float]) -> Tensor:
    try:
        thresholds = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError):
        thresholds = torch.zeros(0)
    if thresholds.dim() > 1 or thresholds.numel() == 0:
        raise ValueError(f"`thresholds` must be a number or several, got {value!r}")
    if bool(thresholds.isnan().any()):
        raise ValueError(f"`thresholds` must not be NaN, got {value!r}")
    return thresholds


class AveragePrecision:
    r"""Average precision over a data set, collected batch by batch.

    Every set's predictions are gone through from the highest score to the lowest. A prediction is right if the rule
    accepts it for a target that no earlier one has taken. Then the predictions of all sets are ranked together: with
    :math:`P_k` and :math:`R_k` the precision and recall of the k highest scores,

    .. math:: \text{AP} = \sum_k (R_k - R_{k-1}) \max_{l \ge k} P_l .

    The methods are those of torchmetrics: ``update``, ``compute``, ``reset``. Nothing is sent between processes unless
    :meth:`sync` is called.

    Args:
        rule: Closeness of all pairs, ``(B, N, C), (B, M, C) -> (B, N, M)``, like :func:`box_iou`; NaN is never close.
        thresholds: One or several: a pair is accepted from this closeness on.
        largest: Whether large values are close (an IoU), or small ones (a distance; +inf accepts nothing, even at a
            threshold of +inf).
        matching: What a prediction may be right about:

            - ``"best"``: its closest target; if an earlier prediction has taken that, it is wrong (Pascal VOC).
            - ``"best free"``: its closest among those that are not taken (COCO; of equally close targets the last, with
              ``ties="in order"``).
            - ``"best free, taken"``: the same, but it takes that target even where it is too far to be right, and has
              to be strictly closer than the threshold (the iDSPN code).
        ties: How equal scores are ranked. ``"together"``: they are one point of the curve, and inside a set the closest
            goes first. What is equal in that too, and which of equally close targets is taken, is decided by the
            elements' values, in dictionary order. So no order of predictions, targets or sets matters. ``"in order"``:
            by their place in the set and the data set, as the published evaluations do; with masks clamped to [0, 1]
            that is many.
        average: ``"pooled"``: one ranking for the data set; ``"sets"``: the mean over sets of each one's own average
            precision, sets without targets left out.
        recall_points: None sums over all recalls; a number averages the precision at as many evenly spaced recalls,
            101 as COCO, 11 as Pascal VOC 2007. They are those of ``numpy.linspace``, as in pycocotools, whose rounding
            decides about a recall that lies on one: 7 of 10 found do not reach its 0.7.
        first_only: Whether only the first set of each batch is judged, and counts as much as all of it (iDSPN).

    Raises:
        ValueError: If a choice is unknown, there is no threshold, or one is NaN.
        TypeError: If ``rule`` is not callable, or a number of another type.

    Example:
        >>> metric = AveragePrecision(box_iou, thresholds=(0.5, 0.9))
        >>> boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0], [2.0, 2.0, 3.0, 3.0]]])
        >>> metric.update(boxes, torch.tensor([[0.9, 0.8, 0.7]]), boxes[:, ::2])
        >>> metric.compute()
        tensor([0.8333, 0.8333], dtype=torch.float64)

    Source: Everingham et al., The Pascal visual object classes challenge (IJCV 2010), section 4.2.
    """

    def __init__(
        self,
        rule: Rule = box_iou,
        *,
        thresholds: float | Sequence[float] = 0.5,
        largest: bool = True,
        matching: Matching = "best",
        ties: Literal["together", "in order"] = "together",
        average: Literal["pooled", "sets"] = "pooled",
        recall_points: int | None = None,
        first_only: bool = False,
    ) -> None:
        if not callable(rule):
            raise TypeError(f"`rule` must be callable, got {rule!r}")
        check_choice("matching", matching, MATCHINGS)
        check_choice("ties", ties, TIES)
        check_choice("average", average, AVERAGES)
        if recall_points is not None:
            check_count("recall_points", recall_points, 2)
        self.thresholds = _as_thresholds(thresholds)
        self.rule, self.largest, self.matching, self.ties = rule, largest, matching, ties
        self.average, self.recall_points, self.first_only = average, recall_points, first_only
        self.reset()

    @classmethod
    def dspn_boxes(cls, thresholds: Sequence[float] = (0.5, 0.9, 0.95, 0.98, 0.99)) -> Self:
        """Evaluate CLEVR boxes in [0, 1] as the DSPN paper does (Table 2).

        Odd about it: one pixel is added to the widths and heights of boxes in an image that is itself 1 wide, so that
        boxes which touch have an IoU near 1 and even the strict thresholds are loose. (The published repository has
        since taken the pixel out: that is ``AveragePrecision(box_iou, ties="in order")``.) Equal scores, of which a
        clamped mask makes many, are ranked by their order in the data. All N predictions count, however low their mask.
        """
        return cls(partial(box_iou, pixel=1.0), thresholds=thresholds, ties="in order")

    @classmethod
    def dspn_state(cls, thresholds: Sequence[float] = (torch.inf, 1.0, 0.5, 0.25, 0.125)) -> Self:
        """Evaluate CLEVR objects as the DSPN paper does (Table 3): 3 coordinates divided by 3, then 4 attributes.

        What counts is the closest target of the same attributes, within a Euclidean distance in the scene's own units.
        Odd about it: a prediction whose closest target is taken is wrong even if another of the same attributes is
        near; equal scores are ranked by their order in the data.
        """
        return cls(_clevr_state, thresholds=thresholds, largest=False, ties="in order")

    @classmethod
    def idspn_state(cls, thresholds: Sequence[float] = (torch.inf, 1.0, 0.5, 0.25, 0.125, 0.0625)) -> Self:
        """Evaluate CLEVR objects as the code of iDSPN does (Zhang et al., ICLR 2022).

        Odd about it: only the first image of each batch is evaluated, so that the figure depends on the batch size and
        the order of the data; that image's own average precision is averaged over batches, by their sizes, instead of
        ranking the data set once; and a prediction takes the closest free target of the same attributes even where it
        is too far from it to be right.
        """
        return cls(
            _clevr_state,
            thresholds=thresholds,
            largest=False,
            matching="best free, taken",
            ties="in order",
            average="sets",
            first_only=True,
        )

    def reset(self) -> None:
        """Forget all sets."""
        self._judged: list[_Judged] = []

    @torch.no_grad()
    def update(
        self,
        pred: Tensor,
        score: Tensor,
        target: Tensor,
        *,
        target_mask: Tensor | None = None,
        pred_mask: Tensor | None = None,
    ) -> None:
        """Judge a batch of sets.

        What is always given comes first, the prediction with its score before the target; masks have names, since the
        losses take them in another order.

        Args:
            pred: Predicted elements, shape ``(B, N, C)``.
            score: Their scores, such as the predicted mask, shape ``(B, N)``.
            target: Target elements, shape ``(B, M, C)``.
            target_mask: Bool or float {0, 1}, shape ``(B, M)``; None means that all are present.
            pred_mask: Which predictions count, bool or float {0, 1}, shape ``(B, N)``; None means all.

        Raises:
            ValueError: If a shape is wrong, a score that counts is NaN, or a mask holds others than 0 and 1.
            TypeError: If a dtype is wrong.
            RuntimeError: Inside of a transform of ``torch.func``, such as ``vmap``.
        """
        if in_transform():
            raise RuntimeError("`AveragePrecision` cannot run inside of torch.func's transforms: it keeps values")
        check_shape("pred", pred, "B", "N", "C")
        check_shape("score", score, *pred.shape[:2])
        check_shape("target", target, pred.shape[0], "M", pred.shape[2])
        exists = as_presence("pred_mask", pred_mask, pred)
        present = as_presence("target_mask", target_mask, target)
        if bool((score.isnan() & exists).any()):
            raise ValueError("`score` must not be NaN")
        batch = len(pred)
        if self.first_only:
            pred, score, target, exists, present = (x[:1] for x in (pred, score, target, exists, present))
        target = target.masked_fill(~present.unsqueeze(-1), 0)
        if self.ties == "together":
            pred, score, exists = _in_order_of_values(pred, score, exists)
            target, present = _in_order_of_values(target, present)
        elif self.matching == "best free":  # of equally close targets, COCO takes the last
            target, present = target.flip(1), present.flip(1)
        closeness = self.rule(pred, target)
        expected = (*pred.shape[:2], target.shape[1])
        check_tensor("rule(pred, target)", closeness)
        if closeness.shape != expected:
            raise ValueError(f"`rule` must return shape (B, N, M) = {expected}, got {tuple(closeness.shape)}")
        sign = 1 if self.largest else -1
        never = closeness.isnan() | ~present.unsqueeze(1)
        closeness = (sign * closeness).masked_fill(never, -torch.inf)
        closest = closeness.amax(2) if closeness.shape[2] > 0 else torch.zeros_like(score)
        order = _rank(score, exists, closest, self.ties)
        closeness = closeness.take_along_dim(order.unsqueeze(2), 1)
        exists = exists.gather(1, order)
        right = _match(closeness, exists, sign * self.thresholds.view(-1).to(pred.device), self.matching)
        judged = _Judged(
            score.double().gather(1, order)[exists],
            right[:, exists],
            exists.sum(1),
            present.sum(1),
            self.thresholds.new_full((len(pred),), batch if self.first_only else 1),
        )
        self._judged.append(_Judged(*(part.cpu() for part in judged)))

    def compute(self) -> Tensor:
        """Compute the average precision of all sets since the last reset.

        Returns:
            One value per threshold, float64 on the CPU: a scalar, or shape ``(T,)``. NaN where there is no target.
        """
        zeros = self.thresholds.new_zeros  # whatever the default device and dtype
        nothing = _Judged(
            zeros(0),
            zeros(self.thresholds.numel(), 0, dtype=torch.bool),
            zeros(0, dtype=torch.int64),
            zeros(0, dtype=torch.int64),
            zeros(0),
        )
        parts = zip(*(nothing, *self._judged), strict=True)
        judged = _Judged(*(torch.cat(part, -1) for part in parts))
        if self.average == "pooled":
            return self._area(judged.score, judged.right, int(judged.targets.sum()))
        total, weight = zeros(self.thresholds.shape), 0.0
        sizes = judged.predictions.tolist()
        sets = zip(
            torch.split(judged.score, sizes),
            torch.split(judged.right, sizes, 1),
            judged.targets.tolist(),
            judged.weight.tolist(),
            strict=True,
        )
        for score, right, targets, counts in sets:
            if targets > 0:
                total += counts * self._area(score, right, targets)
                weight += counts
        return total / weight if weight > 0 else total * torch.nan

    def _area(self, score: Tensor, right: Tensor, targets: int) -> Tensor:
        area = _area(score, right, targets, self.ties == "together", self.recall_points)
        return area.view(self.thresholds.shape)

    def merge(self, *others: Self) -> None:
        """Add what other metrics have judged.

        Args:
            others: Metrics that are configured like this one.

        Raises:
            ValueError: If one is configured otherwise; rules are not compared.
        """
        for other in others:
            if other._options() != self._options():
                raise ValueError(f"`others` must have the options {self._options()}, got {other._options()}")
            self._judged.extend(other._judged)

    def _options(self) -> dict[str, object]:
        names = ("thresholds", "largest", "matching", "ties", "average", "recall_points", "first_only")
        return {name: getattr(self, name) for name in names} | {"thresholds": self.thresholds.tolist()}

    def sync(self, group: Any = None) -> None:
        """Gather what all processes of a group have judged, so that each computes the whole; call it once, on all."""
        gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(gathered, self._judged, group=group)
        self._judged = [judged for process in gathered for judged in process]


def average_precision(
    pred: Tensor,
    score: Tensor,
    target: Tensor,
    *,
    target_mask: Tensor | None = None,
    pred_mask: Tensor | None = None,
    rule: Rule = box_iou,
    thresholds: float | Sequence[float] = 0.5,
    largest: bool = True,
    matching: Matching = "best",
    ties: Literal["together", "in order"] = "together",
    average: Literal["pooled", "sets"] = "pooled",
    recall_points: int | None = None,
) -> Tensor:
    """Compute the average precision of one batch, or of a data set in one piece.

    Args:
        pred: Predicted elements, shape ``(B, N, C)``.
        score: Their scores, such as the predicted mask, shape ``(B, N)``.
        target: Target elements, shape ``(B, M, C)``.
        target_mask: Bool or float {0, 1}, shape ``(B, M)``; None means that all are present.
        pred_mask: Which predictions count, bool or float {0, 1}, shape ``(B, N)``; None means all.
        rule: Closeness of all pairs; for this and the other options see :class:`AveragePrecision`.
        thresholds: One or several: a pair is accepted from this closeness on.
        largest: Whether large values are close, or small ones.
        matching: ``"best"``, ``"best free"`` or ``"best free, taken"``.
        ties: ``"together"`` or ``"in order"``.
        average: ``"pooled"`` or ``"sets"``.
        recall_points: None sums over all recalls.

    Returns:
        One value per threshold, float64 on the CPU: a scalar, or shape ``(T,)``. NaN where there is no target.

    Raises:
        ValueError: If a shape is wrong, a choice is unknown, a score or threshold is NaN, or a mask holds others than 0
            and 1.
        TypeError: If a dtype is wrong.

    Example:
        >>> boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [2.0, 2.0, 3.0, 3.0]]])
        >>> average_precision(boxes.flip(1), torch.tensor([[0.9, 0.8]]), boxes)
        tensor(1., dtype=torch.float64)

    Source: as of :class:`AveragePrecision`.
    """
    metric = AveragePrecision(
        rule,
        thresholds=thresholds,
        largest=largest,
        matching=matching,
        ties=ties,
        average=average,
        recall_points=recall_points,
    )
    metric.update(pred, score, target, target_mask=target_mask, pred_mask=pred_mask)
    return metric.compute()
