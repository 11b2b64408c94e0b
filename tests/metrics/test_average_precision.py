"""Average precision: against an oracle, pycocotools, and properties."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from setpred.metrics import AveragePrecision, attribute_distance, average_precision, box_iou
from tests import devices, oracles
from tests.processes import run_in_two_processes

DOUBLE = {"dtype": torch.float64}
MATCHINGS = ["best", "best free", "best free, taken"]


def precision_of(*sets: Tensor, matching: str, target_mask: Tensor, pred_mask: Tensor, **options: object) -> Tensor:
    """Average precision, with the matching of iDSPN's preset too."""
    metric = AveragePrecision(matching=matching.removesuffix(", taken"), **options)
    metric._takes_far = matching.endswith(", taken")
    metric.update(*sets, target_mask=target_mask, pred_mask=pred_mask)
    return metric.compute()


def random_boxes(batch: int, n: int) -> Tensor:
    corner = torch.rand(batch, n, 2, **DOUBLE)
    return torch.cat([corner, corner + 0.2 + torch.rand(batch, n, 2, **DOUBLE)], -1)


def random_detections(batch: int, n: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Predictions near targets and elsewhere, scores, targets and both masks."""
    target = random_boxes(batch, m)
    pred = random_boxes(batch, n)
    k = min(n, m)
    pred[:, :k] = torch.where(
        torch.rand(batch, k, 1) < 0.7, target[:, :k] + 0.1 * torch.randn(batch, k, 4), pred[:, :k]
    )
    pred[..., 2:] = torch.maximum(pred[..., 2:], pred[..., :2] + 0.01)
    return pred, torch.rand(batch, n, **DOUBLE), target, torch.rand(batch, m) < 0.7, torch.rand(batch, n) < 0.8


@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_box_iou(pixel: float) -> None:
    a, b = random_boxes(2, 6), 2 * random_boxes(2, 5)
    expected = [[[oracles.box_iou(x, y, pixel) for y in b[k]] for x in a[k]] for k in range(2)]
    torch.testing.assert_close(box_iou(a, b, pixel=pixel), torch.tensor(expected, **DOUBLE), rtol=1e-9, atol=1e-9)
    nothing = torch.zeros(1, 1, 4)
    assert box_iou(nothing, nothing) == 0


def test_attribute_distance() -> None:
    a, b = torch.randn(2, 6, 9, **DOUBLE), torch.randn(2, 5, 9, **DOUBLE)
    actual = attribute_distance(a, b, coordinates=3, groups=(2, 3), scale=3.0)
    for k in range(2):
        for i in range(6):
            for j in range(5):
                x, y = a[k, i], b[k, j]
                same = x[3:5].argmax() == y[3:5].argmax() and x[5:8].argmax() == y[5:8].argmax()
                expected = 3 * (x[:3] - y[:3]).norm() if same else torch.tensor(torch.inf, **DOUBLE)
                torch.testing.assert_close(actual[k, i, j], expected, rtol=1e-9, atol=1e-9)
    halves = attribute_distance(a.half(), b.double(), coordinates=3, groups=(2, 3), scale=3.0)
    torch.testing.assert_close(
        halves, attribute_distance(a.half().double(), b.double(), coordinates=3, groups=(2, 3), scale=3.0)
    )


@pytest.mark.parametrize("average", ["pooled", "sets"])
@pytest.mark.parametrize("matching", MATCHINGS)
@given(batch=st.integers(1, 4), n=st.integers(0, 5), m=st.integers(0, 4), seed=st.integers(0, 2**31))
def test_equals_the_formula(average: str, matching: str, batch: int, n: int, m: int, seed: int) -> None:
    torch.manual_seed(seed)
    pred, score, target, target_mask, pred_mask = random_detections(batch, n, m)
    thresholds = (0.3, 0.5, 0.8)
    garbage = target.masked_fill(~target_mask.unsqueeze(-1), torch.nan)
    actual = precision_of(
        pred,
        score,
        garbage,
        target_mask=target_mask,
        pred_mask=pred_mask,
        thresholds=thresholds,
        matching=matching,
        average=average,
    )
    for value, threshold in zip(actual, thresholds, strict=True):
        ranked, counts = [], []
        for b in range(batch):
            iou = [[oracles.box_iou(x, y) for y in target[b]] for x in pred[b]]
            order = sorted((i for i in range(n) if pred_mask[b, i]), key=lambda i, b=b: -score[b, i])
            # IoUs of 0 are equal, and "best free, taken" takes one of those targets.
            targets = sorted((j for j in range(m) if target_mask[b, j]), key=lambda j, b=b: target[b, j].tolist())
            right = oracles.right_predictions(
                lambda i, j, iou=iou: iou[i][j] or 0.0, order, targets, threshold, matching
            )
            ranked.append([(score[b, i].item(), right[i]) for i in order])
            counts.append(len(targets))
        if average == "pooled":
            ranked, counts = [sorted((pair for one in ranked for pair in one), reverse=True)], [sum(counts)]
        areas = [
            oracles.interpolated_area([right for _, right in one], count)
            for one, count in zip(ranked, counts, strict=True)
            if count > 0
        ]
        if areas:
            assert value.item() == pytest.approx(sum(areas) / len(areas), abs=1e-9)
        else:
            assert value.isnan()


def coco_precision(
    pred: Tensor, score: Tensor, target: Tensor, target_mask: Tensor, recall_points: int
) -> tuple[list[float], Tensor]:
    """What the COCO tool says: its thresholds, and its mean precision over the recalls at each.

    One class, no crowds, areas and numbers of detections unbounded.
    """
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    truth, found = coco.COCO(), []
    images = [{"id": b} for b in range(len(pred))]
    truth.dataset = {"images": images, "categories": [{"id": 1}], "annotations": []}
    for b in range(len(pred)):
        for box in target[b][target_mask[b]]:
            x, y, right, bottom = box.tolist()
            identity = len(truth.dataset["annotations"]) + 1
            entry = {"id": identity, "image_id": b, "category_id": 1, "iscrowd": 0, "area": 1.0}
            truth.dataset["annotations"].append(entry | {"bbox": [x, y, right - x, bottom - y]})
        for (x, y, right, bottom), confidence in zip(pred[b].tolist(), score[b].tolist(), strict=True):
            box = [x, y, right - x, bottom - y]
            found.append({"image_id": b, "category_id": 1, "bbox": box, "score": confidence})
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        run = evaluation.COCOeval(truth, truth.loadRes(found), "bbox")
        run.params.recThrs = np.linspace(0, 1, recall_points)
        run.evaluate()
        run.accumulate()
    return run.params.iouThrs.tolist(), torch.from_numpy(run.eval["precision"][:, :, 0, 0, 2]).mean(1)


def test_equals_coco() -> None:
    pred, score, target, target_mask, _ = random_detections(40, 12, 8)
    thresholds, expected = coco_precision(pred, score, target, target_mask, 101)
    actual = average_precision(
        pred,
        score,
        target,
        target_mask=target_mask,
        thresholds=thresholds,
        matching="best free",
        recall_points=101,
    )
    assert expected[0] > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("recall_points", [11, 101, 1001])
@settings(max_examples=20)
@given(batch=st.integers(1, 10), n=st.integers(1, 12), m=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_equals_coco_with_ties(recall_points: int, batch: int, n: int, m: int, seed: int) -> None:
    """Boxes of whole numbers, many of them alike or at the same distance from others, and few scores."""
    torch.manual_seed(seed)
    pred, target = (torch.randint(0, 4, (batch, k, 4), **DOUBLE) for k in (n, m))
    for boxes in (pred, target):
        boxes[..., 2:] = boxes[..., :2] + 4 + boxes[..., 2:]
    score = torch.randint(1, 4, (batch, n), **DOUBLE) / 4
    target_mask = torch.rand(batch, m) < 0.8
    target_mask[0, 0] = True  # without any, the tool says -1
    thresholds, expected = coco_precision(pred, score, target, target_mask, recall_points)
    actual = average_precision(
        pred,
        score,
        target,
        target_mask=target_mask,
        thresholds=thresholds,
        matching="best free",
        ties="in order",
        recall_points=recall_points,
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)  # one recall more or less is 1e-3


@pytest.mark.parametrize("recall_points", [2, 3, 7, 11, 21, 101, 1001])
def test_recalls_on_the_grid(recall_points: int) -> None:
    """k of m targets found, and nothing wrong: precision 1 at the recalls of NumPy's grid up to k / m."""
    grid = np.linspace(0, 1, recall_points)
    for m in [*range(1, 31), 100, 101]:
        targets = torch.arange(m, **DOUBLE).view(1, m, 1)
        for k in range(1, m + 1, max(m // 30, 1)):
            value = average_precision(
                targets[:, :k],
                torch.rand(1, k),
                targets,
                rule=torch.cdist,
                thresholds=0.5,
                largest=False,
                recall_points=recall_points,
            )
            assert value == pytest.approx((grid <= np.float64(k) / m).mean(), abs=1e-12)


def test_equally_close_targets_in_order() -> None:
    """COCO takes the last of them, Pascal VOC the first."""
    targets = torch.tensor([[[0.0, 0, 10, 10], [4.0, 0, 14, 10]]])
    between = torch.tensor([[[2.0, 0, 12, 10], [0.0, 0, 10, 10]]])
    score = torch.tensor([[0.9, 0.8]])
    for matching, expected in (("best free", [1.0, 0.5]), ("best", [0.5, 1.0])):
        for flipped, value in zip((targets, targets.flip(1)), expected, strict=True):
            assert average_precision(between, score, flipped, matching=matching, ties="in order") == value


def test_idspn_protocol() -> None:
    """Its code, in a few lines: the first image of each batch, each prediction takes the closest of its attributes."""
    metric = AveragePrecision.idspn_state()
    total, images = torch.zeros(6, **DOUBLE), 0
    for batch in (8, 8, 3):
        target, mask = torch.rand(batch, 10, 18, **DOUBLE), torch.rand(batch, 10) < 0.7
        mask[:, 0] = True
        attributes = torch.tensor([[1.0, 0.0, *[1.0] + [0.0] * 7, *[0.0, 1.0, 0.0], 0.0, 1.0]], **DOUBLE)
        target[..., 3:] = torch.where(torch.rand(batch, 10, 1) < 0.5, attributes, target[..., 3:])
        pred = target[:, torch.randperm(10)] + 0.05 * torch.randn(batch, 10, 18, **DOUBLE)
        score = torch.rand(batch, 10, **DOUBLE).mul(1.5).clamp(max=1)  # with ties
        metric.update(pred, score, target, target_mask=mask)
        distance = attribute_distance(pred, target, coordinates=3, groups=(2, 8, 3, 2), scale=3.0)[0]
        order = sorted(range(10), key=lambda i, score=score: -score[0, i])
        targets = mask[0].nonzero().squeeze(1).tolist()
        for t, threshold in enumerate((torch.inf, 1, 0.5, 0.25, 0.125, 0.0625)):
            right = oracles.right_predictions(
                lambda i, j, d=distance: -d[i, j].item(), order, targets, -threshold, "best free, taken"
            )
            total[t] += batch * oracles.interpolated_area([right[i] for i in order], len(targets))
        images += batch
    torch.testing.assert_close(metric.compute(), (total / images).cpu(), rtol=1e-9, atol=1e-9)


def test_dspn_protocols() -> None:
    boxes = torch.tensor([[[0.1, 0.1, 0.3, 0.3]]])
    other = torch.tensor([[[0.3, 0.3, 0.5, 0.5]]])  # touches it in one corner
    metric = AveragePrecision.dspn_boxes(thresholds=(0.5, 0.54))
    metric.update(other, torch.ones(1, 1), boxes)
    assert metric.compute().tolist() == [1.0, 0.0]  # (0 + 1)^2 / (2 * 1.2^2 - 1) = 0.53
    assert average_precision(other, torch.ones(1, 1), boxes, thresholds=0.01) == 0

    objects = torch.zeros(1, 2, 18)
    objects[..., 3::3] = 1
    objects[:, 1, 0] = 0.2
    pred = objects.clone()
    pred[:, 1, 0] = 0.05  # closest to the first object, which is taken
    metric = AveragePrecision.dspn_state(thresholds=(torch.inf, 0.25))
    metric.update(pred, torch.tensor([[0.9, 0.8]]), objects)
    assert metric.compute().tolist() == [0.5, 0.5]


def few_boxes(*shape: int) -> Tensor:
    """Boxes of whole numbers: many alike, and many at the same distance from others."""
    corner = torch.randint(0, 3, (*shape, 2), **DOUBLE)
    return torch.cat([corner, corner + torch.randint(2, 4, (*shape, 2), **DOUBLE)], -1)


def same_attribute(x: Tensor, y: Tensor) -> Tensor:
    """All or nothing, so that nearly all is equal."""
    return (x[..., None, 0] == y[:, None, :, 0]).to(x.dtype)


@pytest.mark.parametrize("average", ["pooled", "sets"])
@pytest.mark.parametrize("rule", [box_iou, same_attribute])
@pytest.mark.parametrize("matching", MATCHINGS)
@given(batch=st.integers(1, 4), n=st.integers(0, 7), m=st.integers(0, 6), seed=st.integers(0, 2**31))
def test_no_order_matters_with_ties_together(
    matching: str, rule: object, average: str, batch: int, n: int, m: int, seed: int
) -> None:
    torch.manual_seed(seed)
    pred, target = few_boxes(batch, n), few_boxes(batch, m)
    score = torch.randint(0, 3, (batch, n)) / 2
    masks = {"target_mask": torch.rand(batch, m) < 0.8, "pred_mask": torch.rand(batch, n) < 0.8}
    options = {"thresholds": (0.3, 0.5, 0.7, 1.0), "matching": matching, "rule": rule, "average": average}
    value = precision_of(pred, score, target, **masks, **options)
    for _ in range(3):
        b = torch.randperm(batch)
        i, j = (torch.rand(batch, size).argsort(1) for size in (n, m))  # another order in each set
        actual = precision_of(
            pred[b].take_along_dim(i.unsqueeze(2), 1),
            score[b].gather(1, i),
            target[b].take_along_dim(j.unsqueeze(2), 1),
            target_mask=masks["target_mask"][b].gather(1, j),
            pred_mask=masks["pred_mask"][b].gather(1, i),
            **options,
        )
        # A mean over sets is a sum, which is rounded.
        torch.testing.assert_close(actual, value, rtol=0 if average == "pooled" else 1e-12, atol=0, equal_nan=True)


def test_equal_values_are_decided_by_values() -> None:
    """Equal scores, and a prediction between two targets: it takes the first in dictionary order, in every order."""
    low, high, between = torch.tensor([[0.0, 0, 10, 10], [4.0, 0, 14, 10], [2.0, 0, 12, 10]]).unsqueeze(1)
    targets = torch.stack([low, high], 1)
    for matching in ("best", "best free"):
        for near, value in ((low, 0.5), (high, 1.0)):
            pred, score = torch.stack([between, near], 1), torch.tensor([[0.9, 0.8]])
            for flipped in (targets, targets.flip(1)):
                assert average_precision(pred, score, flipped, matching=matching) == value


def test_ties() -> None:
    """One right and one wrong prediction of the same score."""
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 6.0, 6.0]]])
    score = torch.ones(1, 2)
    for pred in (boxes, boxes.flip(1)):
        assert average_precision(pred, score, boxes[:, :1]) == 0.5
    assert average_precision(boxes, score, boxes[:, :1], ties="in order") == 1
    assert average_precision(boxes.flip(1), score, boxes[:, :1], ties="in order") == 0.5


def test_rules_that_are_not_numbers_or_never() -> None:
    pred, target = torch.tensor([[[0.0]]]), torch.tensor([[[0.0]]])
    for value in (torch.nan, torch.inf):
        rule = lambda x, y, value=value: torch.full((1, 1, 1), value)  # noqa: E731
        assert average_precision(pred, torch.ones(1, 1), target, rule=rule, thresholds=torch.inf, largest=False) == 0
    assert average_precision(pred, torch.ones(1, 1), target, rule=torch.cdist, thresholds=0.1, largest=False) == 1


def test_empty() -> None:
    metric = AveragePrecision(thresholds=(0.5, 0.9))
    assert metric.compute().isnan().all()
    metric.update(torch.zeros(0, 3, 4), torch.zeros(0, 3), torch.zeros(0, 2, 4))
    metric.update(torch.rand(2, 3, 4), torch.rand(2, 3), torch.rand(2, 2, 4), target_mask=torch.zeros(2, 2))
    assert metric.compute().isnan().all()
    metric.update(torch.zeros(1, 0, 4), torch.zeros(1, 0), torch.rand(1, 2, 4))
    assert metric.compute().tolist() == [0.0, 0.0]
    metric.reset()
    metric.update(torch.zeros(1, 0, 4), torch.zeros(1, 0), torch.rand(1, 2, 4))
    assert metric.compute().tolist() == [0.0, 0.0]


def update(metric: AveragePrecision, inputs: tuple[Tensor, ...], part: slice = slice(None)) -> AveragePrecision:
    pred, score, target, target_mask, pred_mask = (x[part] for x in inputs)
    metric.update(pred, score, target, target_mask=target_mask, pred_mask=pred_mask)
    return metric


def test_batches_and_merging() -> None:
    inputs = random_detections(9, 6, 5)
    for average in ("pooled", "sets"):
        whole = update(AveragePrecision(average=average), inputs).compute()
        assert whole.shape == ()
        parts = [AveragePrecision(average=average) for _ in range(3)]
        for k, part in enumerate(parts):
            update(part, inputs, slice(3 * k, 3 * k + 2))
            update(part, inputs, slice(3 * k + 2, 3 * k + 3))
        parts[0].merge(*parts[1:])
        torch.testing.assert_close(parts[0].compute(), whole)
        assert parts[1].compute() != whole


def _in_a_process(rank: int, folder: Path) -> None:
    inputs = torch.load(folder / "inputs.pt")
    metric = update(AveragePrecision(), inputs, slice(rank, None, 2))
    metric.sync()
    torch.save(metric.compute(), folder / f"{rank}.pt")


def test_processes(tmp_path: Path) -> None:
    inputs = random_detections(9, 6, 5)
    torch.save(inputs, tmp_path / "inputs.pt")
    run_in_two_processes(_in_a_process, tmp_path)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), update(AveragePrecision(), inputs).compute())


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"`pred` must have shape \(B, N, C\)", {"pred": torch.rand(3, 4)}),
        (ValueError, r"`score` must have shape \(2, 3\)", {"score": torch.rand(2, 4)}),
        (ValueError, r"`target` must have shape \(2, M, 4\)", {"target": torch.rand(2, 4, 5)}),
        (TypeError, "`target_mask` must be bool or floating", {"target_mask": torch.ones(2, 5).long()}),
        (ValueError, r"`pred_mask` must have shape \(2, 3\)", {"pred_mask": torch.ones(2, 5)}),
        (ValueError, "`score` must not be NaN", {"score": torch.full((2, 3), torch.nan)}),
        (ValueError, "`pred_mask` must be bool or hold only 0 and 1", {"pred_mask": torch.full((2, 3), 0.5)}),
        (ValueError, "`target_mask` must be bool or hold only 0 and 1", {"target_mask": torch.full((2, 5), torch.nan)}),
        (ValueError, "`matching` must be one of", {"matching": "all"}),
        (ValueError, "`ties` must be one of", {"ties": "random"}),
        (ValueError, "`average` must be one of", {"average": "micro"}),
        (ValueError, "`thresholds` must be a number or several", {"thresholds": ()}),
        (ValueError, "`thresholds` must be a number or several", {"thresholds": "half"}),
        (ValueError, "`thresholds` must be a number or several", {"thresholds": [[0.5]]}),
        (ValueError, "`thresholds` must not be NaN, got nan", {"thresholds": torch.nan}),
        (ValueError, "`thresholds` must not be NaN", {"thresholds": (0.5, torch.nan)}),
        (ValueError, "`recall_points` must be at least 2", {"recall_points": 1}),
        (TypeError, "`recall_points` must be an integer", {"recall_points": 101.0}),
        (TypeError, "`rule` must be callable", {"rule": "box_iou"}),
        (TypeError, r"`rule\(pred, target\)` must have a floating", {"rule": lambda x, y: torch.ones(2, 3, 5) > 0}),
        (ValueError, r"`rule` must return shape \(B, N, M\) = \(2, 3, 5\)", {"rule": lambda x, y: x.sum(-1)}),
    ],
)
def test_refuses(error: type[Exception], message: str, change: dict[str, object]) -> None:
    change = {name: x.to(devices.here()) if isinstance(x, Tensor) else x for name, x in change.items()}
    with pytest.raises(error, match=message):
        average_precision(
            **({"pred": torch.rand(2, 3, 4), "score": torch.rand(2, 3), "target": torch.rand(2, 5, 4)} | change)
        )


def test_masks_have_names() -> None:
    with pytest.raises(TypeError, match="positional"):
        average_precision(torch.rand(2, 3, 4), torch.rand(2, 3), torch.rand(2, 5, 4), torch.ones(2, 5))
    with pytest.raises(TypeError, match="positional"):
        AveragePrecision().update(torch.rand(2, 3, 4), torch.rand(2, 3), torch.rand(2, 5, 4), torch.ones(2, 5))


def test_scores_that_do_not_count_may_be_nan() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 6.0, 6.0]]])
    score, mask = torch.tensor([[torch.nan, 0.5]]), torch.tensor([[False, True]])
    for ties in ("together", "in order"):
        assert average_precision(boxes, score, boxes[:, 1:], pred_mask=mask, ties=ties) == 1


@pytest.mark.parametrize(
    "option",
    [
        {"thresholds": (0.5,)},
        {"largest": False},
        {"matching": "best free"},
        {"ties": "in order"},
        {"average": "sets"},
        {"recall_points": 11},
        {"max_predictions": 100},
    ],
    ids=str,
)
def test_merges_only_what_is_configured_alike(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"`others` must have the options .*{next(iter(option))}"):
        AveragePrecision().merge(AveragePrecision(), AveragePrecision(**option))


def test_presets_merge_with_their_own_kind_only() -> None:
    alike = AveragePrecision.idspn_state()
    options = {name: getattr(alike, name) for name in ("thresholds", "largest", "matching", "ties", "average")}
    with pytest.raises(ValueError, match=r"`others` must have the options .*_first_only"):
        AveragePrecision(alike.rule, **options).merge(alike)
    alike.merge(AveragePrecision.idspn_state())


def test_a_later_change_of_the_thresholds_given_changes_nothing() -> None:
    thresholds = torch.tensor([0.5, 0.9], **DOUBLE)
    metric = AveragePrecision(thresholds=thresholds)
    thresholds.fill_(torch.nan)
    assert metric.thresholds.tolist() == [0.5, 0.9]


def test_box_iou_refuses() -> None:
    for pixel in (-1.0, torch.nan):
        with pytest.raises(ValueError, match="`pixel` must be at least 0"):
            box_iou(torch.rand(1, 2, 4), torch.rand(1, 2, 4), pixel=pixel)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "`coordinates` must be at least 0", {"coordinates": -1}),
        (TypeError, "`coordinates` must be an integer", {"coordinates": 3.0}),
        (ValueError, "`groups` must be at least 1", {"groups": (2, 0)}),
        (TypeError, "`groups` must be an integer", {"groups": (2.0,)}),
        (TypeError, "`groups` must be a sequence", {"groups": 2}),
        (ValueError, "`scale` must be positive", {"scale": -1.0}),
        (ValueError, "`scale` must be positive", {"scale": torch.nan}),
    ],
)
def test_attribute_distance_refuses_numbers(error: type[Exception], message: str, change: dict[str, object]) -> None:
    with pytest.raises(error, match=message):
        attribute_distance(torch.rand(1, 2, 7), torch.rand(1, 2, 7), **({"coordinates": 3, "groups": (2, 2)} | change))


def test_attribute_distance_refuses() -> None:
    with pytest.raises(ValueError, match="`pred` must have 3 coordinates and 5 channels of attributes, got 7"):
        attribute_distance(torch.rand(1, 2, 7), torch.rand(1, 2, 7), coordinates=3, groups=(2, 3))
