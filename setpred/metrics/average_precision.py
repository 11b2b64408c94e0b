"""Average precision of predicted sets: a scored prediction is right if a rule accepts it for a target."""

from collections.abc import Callable, Iterator, Sequence
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
    check_integers,
    check_shape,
    check_tensor,
    in_transform,
)
from setpred.functional.boxes import box_iou
from setpred.metrics.rules import clevr_state

Rule = Callable[[Tensor, Tensor], Tensor]
Matching = Literal["best", "best free"]
MATCHINGS = ("best", "best free")
TIES = ("together", "in order")
AVERAGES = ("pooled", "sets")
# Of one class: (scores (n,), right (T, n), counted (T, n), number of targets) -> (T,).
Measure = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class _Judged(NamedTuple):
    """Predictions of some sets, by set and then by rank, on the CPU."""

    score: Tensor  # (n,) float64
    label: Tensor  # (n,) class
    right: Tensor  # (T, n) bool
    counted: Tensor  # (T, n) bool, False for what is neither right nor wrong
    predictions: Tensor  # (S,) number of each set's predictions
    wanted: Tensor  # (m,) classes of the targets that count, by set
    targets: Tensor  # (S,) number of each set's targets that count
    weight: Tensor  # (S,) how much each set counts in a mean over sets


def _in_order_of_values(x: Tensor, *others: Tensor) -> list[Tensor]:
    """Bring the rows of each set (B, N, C), and what belongs to them (B, N), into dictionary order."""
    order = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    for channel in reversed((*x.unbind(-1), *others)):
        channel = channel.byte() if channel.dtype == torch.bool else channel
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


def _rank_in_class(label: Tensor) -> Tensor:
    """How many of the same class stand before each one, (B, N)."""
    order = label.argsort(dim=1, stable=True)
    place = torch.arange(label.shape[1], device=label.device).expand_as(label)
    label = label.gather(1, order)
    first = F.pad(label[:, 1:] != label[:, :-1], (1, 0), value=True)[:, : label.shape[1]]
    return torch.empty_like(order).scatter_(1, order, place - place.where(first, 0).cummax(1).values)


def _match(
    closeness: Tensor, exists: Tensor, ignored: Tensor, crowd: Tensor, thresholds: Tensor, *, free: bool, far: bool
) -> tuple[Tensor, Tensor]:
    """Say which predictions are right, and which found a target that is ignored, both (T, B, N).

    The rows of the closeness (B, N, M) stand in their order; large values are close, and -inf is never right. The loop
    is over ranks, of those alone that may be right; sets and thresholds go side by side.

    Args:
        closeness: Shape ``(B, N, M)``.
        exists: Shape ``(B, N)``.
        ignored: Shape ``(B, M)``.
        crowd: Which of those can be found again and again, shape ``(B, M)``.
        thresholds: Shape ``(T,)``.
        free: Whether a prediction looks only for targets that are not taken.
        far: Whether it takes its target even where that is too far to be right, which is closer than the threshold.
    """
    (batch, n, m), count = closeness.shape, len(thresholds)
    right = closeness.new_zeros(count, batch, n, dtype=torch.bool)
    if right.numel() == 0 or m == 0:
        return right, right
    least = thresholds.to(closeness).view(-1, 1)
    closest = closeness.amax(2)
    able = exists & (closest > -torch.inf) & (far | (closest >= least.min()))
    rows = able.byte().argsort(dim=1, descending=True, stable=True)[:, : int(able.sum(1).max())]
    able, closeness = able.gather(1, rows), closeness.take_along_dim(rows.unsqueeze(2), 1)
    taken = right.new_zeros(count, batch, m)
    some_ignored, some_crowd = bool(ignored.any()), bool(crowd.any())
    found, passed = (right.new_zeros(count, batch, rows.shape[1]) for _ in range(2))
    for k in range(rows.shape[1]):
        here = closeness[:, k].expand_as(taken)
        if free:
            here = here.masked_fill(taken, -torch.inf)
        value, best = (here.masked_fill(ignored, -torch.inf) if free and some_ignored else here).max(2)
        near = value > least if far else value >= least
        if some_ignored:
            if free:  # what is ignored comes after all others
                other, place = here.masked_fill(~ignored, -torch.inf).max(2)
                value, best = torch.where(near, value, other), torch.where(near, best, place)
                near = value >= least
            passed[:, :, k] = (
                able[:, k]
                & near
                & (value > -torch.inf)
                & ignored.expand_as(taken).gather(2, best.unsqueeze(2)).squeeze(2)
            )
        was_taken = taken.gather(2, best.unsqueeze(2)).squeeze(2)
        could = able[:, k] & (value > -torch.inf) & ~was_taken
        found[:, :, k] = could & near & ~passed[:, :, k]
        takes = could if far else could & near
        taken.scatter_(2, best.unsqueeze(2), (was_taken | takes).unsqueeze(2))
        if some_crowd:
            taken &= ~crowd
    rows = rows.expand(count, -1, -1)
    return right.scatter(2, rows, found), right.scatter(2, rows, passed)


def _area(
    score: Tensor, right: Tensor, counted: Tensor, targets: int, *, together: bool, recall_points: int | None
) -> Tensor:
    """Area under the interpolated precision-recall curve, (T,)."""
    if len(score) == 0:
        return torch.zeros(right.shape[:1], dtype=torch.float64, device=right.device)
    score, order = score.sort(descending=True, stable=True)
    hits, rank = (x[:, order].cumsum(1).double() for x in (right, counted))
    if together:  # equal scores are one point of the curve
        last = torch.cat([score[1:] != score[:-1], score.new_ones(1, dtype=torch.bool)])
        hits, rank = hits[:, last], rank[:, last]
    recall, precision = hits / targets, hits / rank.clamp(min=1)
    # The best precision at this recall or a higher one.
    precision = precision.flip(1).cummax(1).values.flip(1)
    if recall_points is None:
        return (recall.diff(dim=1, prepend=recall.new_zeros(len(recall), 1)) * precision).sum(1)
    # NumPy's, as in pycocotools: where a recall lies on the grid, the last digit decides, and torch's has others.
    wanted = torch.from_numpy(np.linspace(0, 1, recall_points)).to(score.device)
    place = torch.searchsorted(recall, wanted.expand(len(recall), -1).contiguous())
    return F.pad(precision, (0, 1)).gather(1, place).mean(1)


def _found(score: Tensor, right: Tensor, counted: Tensor, targets: int) -> Tensor:
    return right.sum(1).double() / targets


def _correct(score: Tensor, right: Tensor, counted: Tensor, targets: int) -> Tensor:
    return right.sum(1).double() / counted.sum(1).clamp(min=1)


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


def _as_classes(
    pred: Tensor, target: Tensor, pred_class: Tensor | None, target_class: Tensor | None
) -> tuple[Tensor, Tensor]:
    if pred_class is None and target_class is None:
        pred_class, target_class = (x.new_zeros(x.shape[:2], dtype=torch.int64) for x in (pred, target))
    if pred_class is None or target_class is None:
        name = "pred_class" if pred_class is None else "target_class"
        raise ValueError(f"`{name}` must be given where the other side has classes, got None")
    check_integers("pred_class", pred_class, *pred.shape[:2])
    check_integers("target_class", target_class, *target.shape[:2])
    return pred_class, target_class


def check_metric(name: str, value: object, metric: type) -> None:
    """Raise unless ``value`` is a metric of this kind."""
    if not isinstance(value, metric):
        raise TypeError(f"`{name}` must be of class {metric.__name__}, got {type(value).__name__}")


class AveragePrecision:
    r"""Average precision over a data set, collected batch by batch.

    Every set's predictions are gone through from the highest score to the lowest. A prediction is right if the rule
    accepts it for a target that no earlier one has taken. Then the predictions of all sets are ranked together: with
    :math:`P_k` and :math:`R_k` the precision and recall of the k highest scores,

    .. math:: \text{AP} = \sum_k (R_k - R_{k-1}) \max_{l \ge k} P_l .

    Where elements have classes, predictions find targets of their own class only, and the result is the mean over the
    classes that have targets.

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
        max_predictions: How many of a set's predictions of each class are judged, those of the highest scores; None
            judges all.

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

    # Oddities of a published protocol, which only its preset sets.
    _takes_far = False  # a prediction takes its closest free target even where it is too far, or no closer than allowed
    _first_only = False  # only the first set of each batch is judged, and counts as much as all of it

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
        max_predictions: int | None = None,
    ) -> None:
        if not callable(rule):
            raise TypeError(f"`rule` must be callable, got {rule!r}")
        check_choice("matching", matching, MATCHINGS)
        check_choice("ties", ties, TIES)
        check_choice("average", average, AVERAGES)
        if recall_points is not None:
            check_count("recall_points", recall_points, 2)
        if max_predictions is not None:
            check_count("max_predictions", max_predictions)
        self.thresholds = _as_thresholds(thresholds)
        self.rule, self.largest, self.matching, self.ties = rule, largest, matching, ties
        self.average, self.recall_points, self.max_predictions = average, recall_points, max_predictions
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
        return cls(clevr_state, thresholds=thresholds, largest=False, ties="in order")

    @classmethod
    def idspn_state(cls, thresholds: Sequence[float] = (torch.inf, 1.0, 0.5, 0.25, 0.125, 0.0625)) -> Self:
        """Evaluate CLEVR objects as the code of iDSPN does (Zhang et al., ICLR 2022).

        Odd about it: only the first image of each batch is evaluated, so that the figure depends on the batch size and
        the order of the data; that image's own average precision is averaged over batches, by their sizes, instead of
        ranking the data set once; and a prediction takes the closest free target of the same attributes even where it
        is too far from it to be right.
        """
        metric = cls(
            clevr_state,
            thresholds=thresholds,
            largest=False,
            matching="best free",
            ties="in order",
            average="sets",
        )
        metric._takes_far = metric._first_only = True
        return metric

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
        pred_class: Tensor | None = None,
        target_class: Tensor | None = None,
        pred_ignored: Tensor | None = None,
        target_ignored: Tensor | None = None,
        target_crowd: Tensor | None = None,
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
            pred_class: Class of each prediction, int64 of shape ``(B, N)``; None: there is one class.
            target_class: Class of each target, int64 of shape ``(B, M)``.
            pred_ignored: Which predictions are not wrong where they find nothing, bool or float {0, 1}, shape
                ``(B, N)``; None means none.
            target_ignored: Which targets need not be found: whoever finds one is neither right nor wrong (but looks
                for another first, with ``matching="best free"``). Shape ``(B, M)``.
            target_crowd: Which targets stand for many: they are ignored, and found by any number of predictions. Shape
                ``(B, M)``.

        Raises:
            ValueError: If a shape is wrong, a score that counts is NaN, a mask holds others than 0 and 1, or only one
                side has classes.
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
        label, wanted = _as_classes(pred, target, pred_class, target_class)
        passable, ignored, crowd = (
            torch.zeros_like(mask) if given is None else as_presence(name, given, elements)
            for name, given, elements, mask in (
                ("pred_ignored", pred_ignored, pred, exists),
                ("target_ignored", target_ignored, target, present),
                ("target_crowd", target_crowd, target, present),
            )
        )
        ignored = ignored | crowd
        if bool((score.isnan() & exists).any()):
            raise ValueError("`score` must not be NaN")
        batch = len(pred)
        if self._first_only:
            pred, score, exists, label, passable = (x[:1] for x in (pred, score, exists, label, passable))
            target, present, wanted, ignored, crowd = (x[:1] for x in (target, present, wanted, ignored, crowd))
        target = target.masked_fill(~present.unsqueeze(-1), 0)
        if self.ties == "together":
            pred, score, exists, label, passable = _in_order_of_values(pred, score, exists, label, passable)
            target, present, wanted, ignored, crowd = _in_order_of_values(target, present, wanted, ignored, crowd)
        elif self.matching == "best free" and not self._takes_far:  # of equally close targets, COCO takes the last
            target, present, wanted, ignored, crowd = (x.flip(1) for x in (target, present, wanted, ignored, crowd))
        closeness = self.rule(pred, target)
        expected = (*pred.shape[:2], target.shape[1])
        check_tensor("rule(pred, target)", closeness)
        if closeness.shape != expected:
            raise ValueError(f"`rule` must return shape (B, N, M) = {expected}, got {tuple(closeness.shape)}")
        sign = 1 if self.largest else -1
        never = closeness.isnan() | ~present.unsqueeze(1) | (label.unsqueeze(2) != wanted.unsqueeze(1))
        closeness = (sign * closeness).masked_fill(never, -torch.inf)
        closest = closeness.amax(2) if closeness.shape[2] > 0 else torch.zeros_like(score)
        order = _rank(score, exists, closest, self.ties)
        closeness = closeness.take_along_dim(order.unsqueeze(2), 1)
        score, exists, label, passable = (x.gather(1, order) for x in (score, exists, label, passable))
        if self.max_predictions is not None:
            exists = exists & (_rank_in_class(label) < self.max_predictions)
        right, passed = _match(
            closeness,
            exists,
            ignored,
            crowd,
            sign * self.thresholds.view(-1).to(pred.device),
            free=self.matching == "best free",
            far=self._takes_far,
        )
        present = present & ~ignored
        judged = _Judged(
            score.double()[exists],
            label[exists],
            right[:, exists],
            (~passed & (right | ~passable))[:, exists],
            exists.sum(1),
            wanted[present],
            present.sum(1),
            self.thresholds.new_full((len(pred),), batch if self._first_only else 1),
        )
        self._judged.append(_Judged(*(part.cpu() for part in judged)))

    def compute(self) -> Tensor:
        """Compute the average precision of all sets since the last reset, a mean over classes.

        Returns:
            One value per threshold, float64 on the CPU: a scalar, or shape ``(T,)``. NaN where there is no target.
        """
        return self._over_classes(self._area)

    def compute_per_class(self) -> dict[int, Tensor]:
        """Compute the average precision of each class that has targets.

        Returns:
            What :meth:`compute` is the mean of, by class.
        """
        return dict(self._of_classes(self._area))

    def recall(self) -> Tensor:
        """Compute which part of the targets is found, whatever the score, a mean over classes.

        Returns:
            As :meth:`compute`.
        """
        return self._over_classes(_found)

    def precision(self) -> Tensor:
        """Compute which part of the predictions is right, whatever the score, a mean over classes that have targets.

        Which predictions there are is said by ``pred_mask``, such as ``score > 0.5``.

        Returns:
            As :meth:`compute`; where nothing is predicted, 0.
        """
        return self._over_classes(_correct)

    def _area(self, score: Tensor, right: Tensor, counted: Tensor, targets: int) -> Tensor:
        together = self.ties == "together"
        return _area(score, right, counted, targets, together=together, recall_points=self.recall_points)

    def _over_classes(self, measure: Measure) -> Tensor:
        values = [value for _, value in self._of_classes(measure)]
        return torch.stack(values).mean(0) if values else self.thresholds * torch.nan

    def _of_classes(self, measure: Measure) -> Iterator[tuple[int, Tensor]]:
        if not self._judged:
            return
        judged = _Judged(*(torch.cat(part, -1) for part in zip(*self._judged, strict=True)))
        sets = torch.arange(len(judged.weight), device=judged.weight.device)
        set_of, wanted_set = sets.repeat_interleave(judged.predictions), sets.repeat_interleave(judged.targets)
        label, order = judged.label.sort(stable=True)
        for which in torch.unique(judged.wanted):
            start, end = torch.searchsorted(label, which), torch.searchsorted(label, which, right=True)
            mine = order[start:end]
            score, right, counted = judged.score[mine], judged.right[:, mine], judged.counted[:, mine]
            targets = wanted_set[judged.wanted == which].bincount(minlength=len(sets))
            if self.average == "pooled":
                value = measure(score, right, counted, int(targets.sum()))
            else:
                sizes = set_of[mine].bincount(minlength=len(sets)).tolist()
                columns = (torch.split(x, sizes, -1) for x in (score, right, counted))
                parts = zip(*columns, targets.tolist(), strict=True)
                values = [measure(s, r, c, count) for s, r, c, count in parts if count > 0]
                weight = judged.weight[targets > 0].unsqueeze(1)
                value = (torch.stack(values) * weight).sum(0) / weight.sum()
            yield int(which), value.view(self.thresholds.shape)

    def merge(self, *others: Self) -> None:
        """Add what other metrics have judged.

        Args:
            others: Metrics that are configured like this one.

        Raises:
            ValueError: If one is configured otherwise; rules are not compared.
            TypeError: If one is another metric.
        """
        for other in others:
            check_metric("others", other, AveragePrecision)
            if other._options() != self._options():
                raise ValueError(f"`others` must have the options {self._options()}, got {other._options()}")
            self._judged.extend(other._judged)

    def _options(self) -> dict[str, object]:
        names = ["thresholds", "largest", "matching", "ties", "average", "recall_points", "max_predictions"]
        names += ["_takes_far", "_first_only"]
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
    pred_class: Tensor | None = None,
    target_class: Tensor | None = None,
    rule: Rule = box_iou,
    thresholds: float | Sequence[float] = 0.5,
    largest: bool = True,
    matching: Matching = "best",
    ties: Literal["together", "in order"] = "together",
    average: Literal["pooled", "sets"] = "pooled",
    recall_points: int | None = None,
    max_predictions: int | None = None,
) -> Tensor:
    """Compute the average precision of one batch, or of a data set in one piece.

    Args:
        pred: Predicted elements, shape ``(B, N, C)``.
        score: Their scores, such as the predicted mask, shape ``(B, N)``.
        target: Target elements, shape ``(B, M, C)``.
        target_mask: Bool or float {0, 1}, shape ``(B, M)``; None means that all are present.
        pred_mask: Which predictions count, bool or float {0, 1}, shape ``(B, N)``; None means all.
        pred_class: Class of each prediction, int64 of shape ``(B, N)``; None: there is one class.
        target_class: Class of each target, int64 of shape ``(B, M)``.
        rule: Closeness of all pairs; for this and the other options see :class:`AveragePrecision`.
        thresholds: One or several: a pair is accepted from this closeness on.
        largest: Whether large values are close, or small ones.
        matching: ``"best"`` or ``"best free"``.
        ties: ``"together"`` or ``"in order"``.
        average: ``"pooled"`` or ``"sets"``.
        recall_points: None sums over all recalls.
        max_predictions: How many of a set's predictions of each class are judged; None judges all.

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
        max_predictions=max_predictions,
    )
    metric.update(
        pred,
        score,
        target,
        target_mask=target_mask,
        pred_mask=pred_mask,
        pred_class=pred_class,
        target_class=target_class,
    )
    return metric.compute()
