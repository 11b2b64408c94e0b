"""The tables of the pages for those who come from other code: what is named there gives what is named beside it."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from setpred import (
    HungarianLoss,
    chamfer_loss,
    linear_assignment,
    on_channels,
    pad_sets,
    sum_costs,
)
from setpred.functional import box_convert, box_cost, matched_indices, probability_cost
from setpred.metrics import AveragePrecision, CocoAveragePrecision, cardinality_error, matching_accuracy
from tests.metrics.test_coco import random_images

ROOT = Path(__file__).parents[2]
EXACT = {"rtol": 1e-9, "atol": 1e-9}
DOUBLE = {"dtype": torch.float64}
seeds = st.integers(0, 2**31)


def test_the_guide_shows_the_lines_that_are_compared_with_transformers() -> None:
    tested = (ROOT / "tests/living/test_detr.py").read_text().split("# [docs: detr\n")[1].split("# docs]")[0]
    shown = re.findall(r"^(?:>>>|\.\.\.) (.*)$", (ROOT / "docs/guides/detection.md").read_text(), re.MULTILINE)
    lines = [line for line in tested.splitlines() if line]
    start = shown.index(lines[0])
    assert shown[start : start + len(lines)] == lines


# DETR's code. Its matcher is in transformers as it was.


def detections(sizes: list[int], channels: int) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    logits = torch.randn(len(sizes), 8, channels, **DOUBLE)
    boxes = torch.rand(len(sizes), 8, 4, **DOUBLE).mul(0.9).add(0.05)
    targets = [
        {"boxes": torch.rand(n, 4, **DOUBLE).mul(0.9).add(0.05), "labels": torch.randint(channels - 1, (n,))}
        for n in sizes
    ]
    return logits, boxes, targets


def padded(targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    boxes, mask = pad_sets([t["boxes"] for t in targets])
    labels = torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, torch.cat([t["labels"] for t in targets]))
    return boxes, labels, mask


@given(
    sizes=st.lists(st.integers(0, 8), min_size=1, max_size=4),
    weights=st.tuples(*[st.floats(0.1, 5)] * 3),
    seed=seeds,
)
def test_hungarian_matcher(sizes: list[int], weights: tuple[float, float, float], seed: int) -> None:
    matcher = pytest.importorskip("transformers.loss.loss_for_object_detection").HungarianMatcher
    torch.manual_seed(seed)
    logits, boxes, targets = detections(sizes, 5)
    cost_class, cost_bbox, cost_giou = weights
    expected = matcher(cost_class, cost_bbox, cost_giou)(
        {"logits": logits, "pred_boxes": boxes}, [{"boxes": t["boxes"], "class_labels": t["labels"]} for t in targets]
    )
    box, classes = slice(0, 4), slice(4, None)
    matched_by = sum_costs(
        on_channels("l1", box, weight=cost_bbox * 4),
        on_channels(lambda x, y: box_cost(x, y, fmt="cxcywh"), box, weight=cost_giou),
        on_channels(probability_cost, classes, weight=cost_class),
    )
    target_boxes, labels, mask = padded(targets)
    pred, target = torch.cat([boxes, logits], -1), torch.cat([target_boxes, F.one_hot(labels, 5)], -1)
    loss = HungarianLoss(matched_by, presence="none")
    _, matching = loss(pred, target, target_mask=mask, return_matching=True)
    row, column = matched_indices(matching)
    for b, (i, j) in enumerate(expected):
        assert row[b].tolist() == i.tolist() + [-1] * (8 - len(i))
        assert column[b].tolist() == j.tolist() + [-1] * (8 - len(j))


def test_logged_figures_of_set_criterion() -> None:
    logits, _, targets = detections([3, 0, 2], 4)
    _, classes, mask = padded(targets)
    matching = torch.full((3, 8), -1)
    matching[0, [1, 4, 6]], matching[2, [0, 7]] = torch.tensor([2, 0, 1]), torch.tensor([1, 0])
    logits[0, 1] = 9 * F.one_hot(classes[0, 2], 4)  # some are right
    pairs = [(b, i, int(j)) for b in range(3) for i, j in enumerate(matching[b]) if j >= 0]
    right = sum(int(logits[b, i].argmax()) == int(classes[b, j]) for b, i, j in pairs)
    assert 0 < right < len(pairs)
    actual = 100 * (1 - matching_accuracy(logits, classes, matching))
    torch.testing.assert_close(actual.item(), 100 - 100 * right / len(pairs), rtol=1e-6, atol=1e-6)
    found = (logits.argmax(-1) != 3).sum(1).tolist()
    expected = sum(abs(n - len(t["labels"])) for n, t in zip(found, targets, strict=True)) / 3
    assert cardinality_error(logits.argmax(-1) != logits.shape[-1] - 1, mask).item() == pytest.approx(expected)


@pytest.mark.parametrize("sizes", [[[2, 0], [5, 1]], [[0, 0], [0, 3]], [[0, 0], [1, 0]], [[0], [0]]])
def test_the_number_of_boxes_of_all_processes(sizes: list[list[int]]) -> None:
    """DETR divides every process's sum by the mean number over processes."""
    loss = HungarianLoss("l1", presence="none", average_over="batch")
    processes = [detections(own, 4) for own in sizes]
    mean = max(sum(map(sum, sizes)) / len(sizes), 1)
    for _, boxes, targets in processes:
        target, _, mask = padded(targets)
        of_boxes, matching = loss(boxes, target, target_mask=mask, return_matching=True)
        total = sum(
            (boxes[b, i] - target[b, matching[b, i]]).abs().mean() for b, i in (matching >= 0).nonzero().tolist()
        )
        own = mask.sum().clamp(min=1)
        torch.testing.assert_close(of_boxes * own / mean, of_boxes.new_zeros(()) + total / mean, **EXACT)


# PyTorch3D's chamfer_distance, by its documentation.


def squared(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)


def clouds() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.randn(3, 9, 6, **DOUBLE),
        torch.randn(3, 7, 6, **DOUBLE),
        torch.tensor([9, 4, 1]),
        torch.tensor([2, 7, 5]),
    )


@pytest.mark.parametrize("point_reduction", ["mean", "sum", "max"])
@pytest.mark.parametrize("norm", [1, 2])
def test_pytorch3d(point_reduction: str, norm: int) -> None:
    """A literal loop over clouds without padding."""
    x, y, x_lengths, y_lengths = clouds()
    weights = torch.tensor([0.5, 2.0, 1.0], **DOUBLE)
    kind = "mse" if norm == 2 else "l1"
    one, other, normals, opposed = [], [], [], []
    for a, b, n, m in zip(x, y, x_lengths, y_lengths, strict=True):
        a, b = a[:n], b[:m]
        difference = a[:, None, :3] - b[None, :, :3]
        distance = difference.square().sum(-1) if norm == 2 else difference.abs().sum(-1)
        reduce = {"mean": Tensor.mean, "sum": Tensor.sum, "max": Tensor.amax}[point_reduction]
        one.append(reduce(distance.amin(1)))
        other.append(reduce(distance.amin(0)))
        cosine = F.cosine_similarity(a[:, None, 3:], b[None, :, 3:], dim=-1)
        for values, similar in ((normals, cosine.abs()), (opposed, cosine)):
            near = [similar.gather(d, distance.argmin(d, keepdim=True)) for d in (1, 0)]
            values.append(sum(reduce(1 - part) for part in near))
    one, other, normals, opposed = (torch.stack(values) for values in (one, other, normals, opposed))

    cost = on_channels(kind, slice(0, 3), weight=3.0)
    options = {"presence": "none", "point_reduction": point_reduction}
    masks = (torch.arange(9) < x_lengths.unsqueeze(1)).double(), torch.arange(7) < y_lengths.unsqueeze(1)
    ways = [
        chamfer_loss(x, y, *masks, cost=cost, **options, direction=way, reduction="none")
        for way in ("pred_to_target", "target_to_pred")
    ]
    torch.testing.assert_close(ways, [one, other], **EXACT)  # single_directional=True
    if point_reduction == "max":
        torch.testing.assert_close(torch.maximum(*ways), torch.maximum(one, other), **EXACT)
        return
    value = chamfer_loss(x, y, *masks, cost=cost, **options, reduction="none")
    torch.testing.assert_close(value, one + other, **EXACT)  # batch_reduction=None
    torch.testing.assert_close((weights * value).sum() / weights.sum(), (weights * (one + other)).sum() / 3.5, **EXACT)
    for reduction in ("mean", "sum"):
        actual = chamfer_loss(x, y, *masks, cost=cost, **options, reduction=reduction)
        torch.testing.assert_close(actual, getattr(one + other, reduction)(), **EXACT)

    def angle(a: Tensor, b: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(a.unsqueeze(2), b.unsqueeze(1), dim=-1).abs()

    def signed(a: Tensor, b: Tensor) -> Tensor:  # abs_cosine=False
        return 1 - F.cosine_similarity(a.unsqueeze(2), b.unsqueeze(1), dim=-1)

    for of_normals, expected in ((angle, normals), (signed, opposed)):
        charged = on_channels(of_normals, slice(3, 6))
        actual = chamfer_loss(x, y, *masks, cost=charged, matching_cost=cost, **options, reduction="none")
        torch.testing.assert_close(actual, expected, **EXACT)


def test_pytorch3d_without_point_reduction() -> None:
    x, y, x_lengths, y_lengths = clouds()
    x_mask, y_mask = torch.arange(9) < x_lengths.unsqueeze(1), torch.arange(7) < y_lengths.unsqueeze(1)
    cost = on_channels("mse", slice(0, 3), weight=3.0)
    _, of_x, of_y = chamfer_loss(x, y, x_mask.double(), y_mask, cost=cost, presence="none", return_points=True)
    distance = squared(x[..., :3], y[..., :3])
    distance = distance.masked_fill(~(x_mask.unsqueeze(2) & y_mask.unsqueeze(1)), torch.inf)
    torch.testing.assert_close(of_x, distance.amin(2).where(x_mask, 0), **EXACT)
    torch.testing.assert_close(of_y, distance.amin(1).where(y_mask, 0), **EXACT)


# torch-linear-assignment, by its documentation; the matcher is compared with SciPy in tests/functional.


@pytest.mark.parametrize(("workers", "tasks"), [(4, 3), (3, 4), (3, 3), (0, 2)])
def test_assignment_to_indices(workers: int, tasks: int) -> None:
    assignment = linear_assignment(torch.rand(5, workers, tasks))
    pairs = min(workers, tasks)
    row, column = (index[:, :pairs] for index in matched_indices(assignment))
    matched = assignment >= 0
    assert torch.equal(row, matched.nonzero()[:, 1].view(5, pairs))
    assert torch.equal(column, assignment[matched].view(5, pairs))


# torchmetrics. The twelve numbers of pycocotools are compared in tests/metrics/test_coco.py.


@pytest.fixture
def mean_ap(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """torchmetrics' module, which wants only a conversion of boxes from torchvision."""
    module = pytest.importorskip("torchmetrics.detection.mean_ap")
    pytest.importorskip("pycocotools")
    if not module._TORCHVISION_AVAILABLE:
        ops = ModuleType("torchvision.ops")
        ops.box_convert = lambda boxes, in_fmt, out_fmt: box_convert(boxes, in_fmt, out_fmt)
        monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
        monkeypatch.setitem(sys.modules, "torchvision.ops", ops)
        monkeypatch.setattr(module, "_TORCHVISION_AVAILABLE", True)
    return module


# Its own grids are rounded to float32, so that a recall of exactly 0.07 is no recall of 0.07.
GRIDS = {
    "iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(),
    "rec_thresholds": np.linspace(0, 1, 101).tolist(),
}


def theirs(mean_ap: ModuleType, images: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    metric = mean_ap.MeanAveragePrecision(**GRIDS | options)
    metric.warn_on_many_detections = False
    preds, targets = [], []
    fmt = options.get("box_format", "xyxy")
    for b, (found, there) in enumerate(zip(images["pred_mask"], images["target_mask"], strict=True)):
        of = SimpleNamespace(**{name: value[b] for name, value in images.items()})
        preds.append(
            {
                "boxes": box_convert(of.pred[found], "xyxy", fmt),
                "scores": of.score[found],
                "labels": of.pred_class[found],
            }
        )
        targets.append(
            {
                "boxes": box_convert(of.target[there], "xyxy", fmt),
                "labels": of.target_class[there],
                "area": of.target_size[there],
                "iscrowd": of.target_crowd[there].long(),
            }
        )
    metric.update(preds, targets)
    return metric.compute()


NAMES = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}
NAMES |= {f"{a}_{size}": f"m{a.lower()}_{size}" for a in ("AP", "AR") for size in ("small", "medium", "large")}


def test_torchmetrics(mean_ap: ModuleType) -> None:
    images = random_images(20, 15, 6, 3, ties=False)
    expected = theirs(mean_ap, images, class_metrics=True)
    metric = CocoAveragePrecision()
    metric.update(**images)
    numbers = metric.compute()
    names = NAMES | {f"AR{most}": f"mar_{most}" for most in (1, 10, 100)}
    assert set(names) == set(numbers)
    for name, other in names.items():
        assert 0 < numbers[name] == pytest.approx(expected[other].item(), abs=1e-6), name
    per_class = metric.compute_per_class()
    assert list(per_class) == expected["classes"].tolist()
    assert list(per_class.values()) == pytest.approx(expected["map_per_class"].tolist(), abs=1e-6)


def test_options_of_torchmetrics(mean_ap: ModuleType) -> None:
    images = random_images(20, 15, 6, 3, ties=False)
    images["target_crowd"].zero_()
    expected = theirs(mean_ap, images, max_detection_thresholds=[2, 5, 9], box_format="cxcywh")
    metric = CocoAveragePrecision(max_predictions=(2, 5, 9))
    metric.update(**images)
    numbers = metric.compute()
    assert expected["map"] == -1  # it looks for 100 predictions only
    for name, other in {
        "AP50": "map_50",
        "AP_small": "map_small",
        "AR2": "mar_2",
        "AR5": "mar_5",
        "AR9": "mar_9",
    }.items():
        assert numbers[name] == pytest.approx(expected[other].item(), abs=1e-6), name

    micro = theirs(mean_ap, images, average="micro")
    metric = CocoAveragePrecision()
    nothing = {name: torch.zeros_like(images[name]) for name in ("pred_class", "target_class")}
    metric.update(**images | nothing)
    assert metric.compute()["AP"] == pytest.approx(micro["map"].item(), abs=1e-6)

    expected = theirs(mean_ap, images, iou_thresholds=[0.3, 0.6], rec_thresholds=np.linspace(0, 1, 11).tolist())
    plain = AveragePrecision(
        thresholds=(0.3, 0.6), recall_points=11, max_predictions=100, matching="best free", ties="in order"
    )
    names = ("pred", "score", "target", "target_mask", "pred_mask", "pred_class", "target_class")
    plain.update(**{name: images[name] for name in names})
    assert plain.compute().mean().item() == pytest.approx(expected["map"].item(), abs=1e-6)


def test_minus_one_of_torchmetrics_is_nan(mean_ap: ModuleType) -> None:
    images = random_images(3, 4, 2, 1, ties=False)
    images["target_mask"] = torch.zeros(3, 2, dtype=torch.bool)
    metric = CocoAveragePrecision()
    metric.update(**images)
    assert theirs(mean_ap, images)["map"] == -1
    assert metric.compute()["AP"] != metric.compute()["AP"]
