"""The numbers of COCO: against pycocotools on random data, and what is not there."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from setpred.metrics import AveragePrecision, CocoAveragePrecision, keypoint_similarity
from setpred.metrics.coco import COCO_SIZES

DOUBLE = {"dtype": torch.float64}
BOXES = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100"]
BOXES += ["AR_small", "AR_medium", "AR_large"]
KEYPOINTS = ["AP", "AP50", "AP75", "AP_medium", "AP_large", "AR20", "AR50", "AR75", "AR_medium", "AR_large"]


def random_images(batch: int, n: int, m: int, classes: int, *, ties: bool) -> dict[str, Tensor]:
    """Boxes of all sizes, many of them near to a target; few scores and whole numbers where there are ties."""
    size = torch.exp(torch.rand(batch, m, 2, **DOUBLE) * 4 + 1.5)
    corner = 300 * torch.rand(batch, m, 2, **DOUBLE)
    target = torch.cat([corner, corner + size], -1)
    which = torch.randint(max(m, 1), (n,))
    near = target[:, which] if m else torch.rand(batch, n, 4, **DOUBLE)
    width = (near[..., 2:] - near[..., :2]).repeat(1, 1, 2)
    pred = near + 0.1 * width * torch.randn(batch, n, 4, **DOUBLE)
    pred[..., 2:] = torch.maximum(pred[..., 2:], pred[..., :2] + 1)
    score = torch.rand(batch, n, **DOUBLE)
    if ties:
        target, pred, score = target.round(), pred.round(), score.mul(4).round().add(1).div(8)
    target_class = torch.randint(classes, (batch, m))
    pred_class = torch.randint(classes, (batch, n))
    if m:  # most predictions are of the class of the target near to them
        pred_class = torch.where(torch.rand(batch, n) < 0.8, target_class[:, which], pred_class)
    area = (target[..., 2:] - target[..., :2]).prod(-1) * (0.5 + torch.rand(batch, m, **DOUBLE))
    return {
        "pred": pred,
        "score": score,
        "pred_class": pred_class,
        "target": target,
        "target_class": target_class,
        "target_mask": torch.rand(batch, m) < 0.8,
        "pred_mask": torch.rand(batch, n) < 0.9,
        "target_size": area,
        "target_crowd": torch.rand(batch, m) < 0.15,
    }


def as_coco(images: dict[str, Tensor], kind: str = "bbox") -> tuple[object, object]:
    """The same images as the COCO tool wants them: truth and results."""
    coco = pytest.importorskip("pycocotools.coco")
    truth, found = coco.COCO(), []
    labels = {0, *images["target_class"].flatten().tolist(), *images["pred_class"].flatten().tolist()}
    truth.dataset = {
        "images": [{"id": b} for b in range(len(images["pred"]))],
        "categories": [{"id": c} for c in sorted(labels)],
        "annotations": [],
    }

    def described(elements: Tensor) -> dict[str, object]:
        if kind == "keypoints":
            points = elements[:-1].tolist()
            return {"keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3])}
        x, y, right, bottom = elements.tolist()
        return {"bbox": [x, y, right - x, bottom - y]}

    for b, j in images["target_mask"].nonzero().tolist():
        identity = {"id": len(truth.dataset["annotations"]) + 1, "image_id": b, "bbox": [0, 0, 0, 0]}
        identity["iscrowd"] = int(images["target_crowd"][b, j])
        label = {"category_id": images["target_class"][b, j].item(), "area": images["target_size"][b, j].item()}
        truth.dataset["annotations"].append(identity | label | described(images["target"][b, j]))
    for b, i in images["pred_mask"].nonzero().tolist():
        entry = {"image_id": b, "category_id": images["pred_class"][b, i].item(), "score": images["score"][b, i].item()}
        found.append(entry | described(images["pred"][b, i]))
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        return truth, truth.loadRes(found) if found else coco.COCO()


def pycocotools(images: dict[str, Tensor], kind: str = "bbox") -> list[float]:
    """What the COCO tool says: its own list of numbers, -1 where it has none."""
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):
        run = evaluation.COCOeval(*as_coco(images, kind), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats.tolist()


def assert_equal(actual: dict[str, float], expected: list[float], names: list[str]) -> None:
    assert set(names) >= set(actual)
    for name, value in zip(names, expected, strict=True):
        if name in actual:
            assert actual[name] == pytest.approx(math.nan if value == -1 else value, abs=1e-9, nan_ok=True), name


def evaluated(images: dict[str, Tensor], metric: CocoAveragePrecision | None = None) -> dict[str, float]:
    metric = CocoAveragePrecision() if metric is None else metric
    for part in torch.arange(len(images["pred"])).split(3):
        metric.update(**{name: value[part] for name, value in images.items()})
    return metric.compute()


@pytest.mark.parametrize("ties", [False, True])
def test_the_twelve_numbers(ties: bool) -> None:
    images = random_images(25, 30, 9, 3, ties=ties)
    actual = evaluated(images)
    assert list(actual) == BOXES
    assert all(0.05 < value < 0.95 for value in actual.values())
    assert_equal(actual, pycocotools(images), BOXES)


@pytest.mark.parametrize("ties", [False, True])
@settings(max_examples=25)
@given(
    batch=st.integers(1, 6),
    n=st.integers(1, 12),
    m=st.integers(0, 6),
    classes=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_the_twelve_numbers_of_few_images(ties: bool, batch: int, n: int, m: int, classes: int, seed: int) -> None:
    torch.manual_seed(seed)
    images = random_images(batch, n, m, classes, ties=ties)
    images["pred_mask"][0, 0] = True  # the tool wants a result
    assert_equal(evaluated(images), pycocotools(images), BOXES)


def test_more_predictions_than_are_judged() -> None:
    images = random_images(3, 130, 20, 1, ties=False)
    assert_equal(evaluated(images), pycocotools(images), BOXES)


def test_per_class() -> None:
    images = random_images(20, 20, 6, 4, ties=False)
    metric = CocoAveragePrecision()
    evaluated(images, metric)
    values = metric.compute_per_class()
    assert list(values) == [0, 1, 2, 3]
    assert sum(values.values()) / 4 == pytest.approx(metric.compute()["AP"], abs=1e-12)
    for label, value in values.items():
        mine = images | {
            "target_mask": images["target_mask"] & (images["target_class"] == label),
            "pred_mask": images["pred_mask"] & (images["pred_class"] == label),
        }
        assert value == pytest.approx(pycocotools(mine)[0], abs=1e-9)


def test_keypoints() -> None:
    """Its ten numbers for people, of which those at a single threshold are no mean over thresholds."""
    batch, n, m = 20, 12, 5
    images = random_images(batch, n, m, 1, ties=False)
    area = (torch.rand(batch, m, **DOUBLE) * 4 + 5.5).exp()
    points = 300 * torch.rand(batch, m, 17, 2, **DOUBLE)
    visible = torch.randint(3, (batch, m, 17, 1), **DOUBLE)
    visible[:, :, 0] = 2
    target = torch.cat([points, visible], -1)
    near = target[:, torch.randint(m, (n,))].clone()
    near[..., :2] += 3 * torch.rand(batch, n, 1, 1) * torch.randn(batch, n, 17, 2, **DOUBLE)
    pred = torch.cat([near.flatten(2), torch.zeros(batch, n, 1, **DOUBLE)], -1)
    spread = near[..., :2].amax(2) - near[..., :2].amin(2)
    images |= {
        "pred": pred,
        "target": torch.cat([target.flatten(2), area.unsqueeze(2)], -1),
        "target_size": area,
        "pred_size": spread.prod(-1),
    }
    images["target_class"].zero_()
    images["pred_class"].zero_()
    sizes = {name: COCO_SIZES[name] for name in ("medium", "large")}
    actual = evaluated(images, CocoAveragePrecision(keypoint_similarity, max_predictions=(20,), sizes=sizes))
    expected = pycocotools(images, "keypoints")
    assert 0.05 < actual["AP"] < 0.95
    assert_equal(actual, expected, KEYPOINTS)


def test_empty() -> None:
    metric = CocoAveragePrecision()
    assert all(math.isnan(value) for value in metric.compute().values())
    assert metric.compute_per_class() == {}
    images = random_images(2, 3, 2, 1, ties=False)
    metric.update(**{name: value[:0] for name, value in images.items()})
    metric.update(**images | {"target_mask": torch.zeros(2, 2)})
    assert all(math.isnan(value) for value in metric.compute().values())
    images["target_crowd"].zero_()
    metric.update(**images | {"pred_mask": torch.zeros(2, 3), "target_mask": torch.ones(2, 2)})
    assert metric.compute()["AP"] == metric.compute()["AR100"] == 0
    metric.reset()
    assert math.isnan(metric.compute()["AP"])


def test_sizes_are_those_of_the_boxes_by_default() -> None:
    images = random_images(6, 9, 5, 2, ties=False)
    box = images["target"]
    images["target_size"] = (box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1])
    given_sizes = evaluated(images)
    del images["target_size"]
    assert evaluated(images) == pytest.approx(given_sizes, nan_ok=True)


def test_merging() -> None:
    images = random_images(9, 6, 5, 2, ties=False)
    whole, parts = evaluated(images), [CocoAveragePrecision() for _ in range(3)]
    for k, part in enumerate(parts):
        evaluated({name: value[3 * k : 3 * k + 3] for name, value in images.items()}, part)
    parts[0].merge(*parts[1:])
    assert parts[0].compute() == pytest.approx(whole, nan_ok=True)
    assert parts[1].compute()["AP"] != whole["AP"]
    with pytest.raises(ValueError, match="`others` must have sizes"):
        parts[0].merge(CocoAveragePrecision(max_predictions=(100,)))
    with pytest.raises(ValueError, match="`others` must have sizes"):
        parts[0].merge(CocoAveragePrecision(sizes={}))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"`pred` must have shape \(B, N, C\)", {"pred": torch.rand(3, 4)}),
        (TypeError, "`pred` must have a floating dtype", {"pred": torch.ones(2, 3, 4).long()}),
        (TypeError, "`pred_class` must be a tensor of dtype int64", {"pred_class": torch.rand(2, 3)}),
        (ValueError, r"`target_class` must have shape \(2, 5\)", {"target_class": torch.zeros(2, 3).long()}),
        (ValueError, r"`target_size` must have shape \(2, 5\)", {"target_size": torch.rand(2, 3)}),
        (ValueError, "`target_crowd` must be bool or hold only 0", {"target_crowd": torch.full((2, 5), 0.5)}),
        (ValueError, "`score` must not be NaN", {"score": torch.full((2, 3), torch.nan)}),
        (ValueError, "`pred_size` must be given", {"pred": torch.rand(2, 3, 5), "target": torch.rand(2, 5, 5)}),
    ],
)
def test_refuses(error: type[Exception], message: str, change: dict[str, Tensor]) -> None:
    images = random_images(2, 3, 5, 2, ties=False)
    images |= {name: value.to(images["pred"].device) for name, value in change.items()}
    with pytest.raises(error, match=message):
        CocoAveragePrecision().update(**images)


def test_refuses_options() -> None:
    with pytest.raises(ValueError, match="`max_predictions` must be at least one number"):
        CocoAveragePrecision(max_predictions=())
    with pytest.raises(ValueError, match="`max_predictions` must be at least 1, got 0"):
        CocoAveragePrecision(max_predictions=(0, 10))
    with pytest.raises(ValueError, match="`max_predictions` must be at least one number, in a sequence, got 100"):
        CocoAveragePrecision(max_predictions=100)
    with pytest.raises(TypeError, match="`max_predictions` must be an integer, got '10'"):
        CocoAveragePrecision(max_predictions=(1, "10"))
    for bounds in (5.0, (5.0, 1.0), (torch.nan, 1.0), (1.0,)):
        with pytest.raises(ValueError, match=r"`sizes\['small'\]` must be an increasing pair"):
            CocoAveragePrecision(sizes={"small": bounds})
    with pytest.raises(TypeError, match="`sizes` must map names to ranges"):
        CocoAveragePrecision(sizes=[(0.0, 1.0)])
    with pytest.raises(TypeError, match="`rule` must be callable"):
        CocoAveragePrecision("iou")


def test_merge_refuses_another_metric() -> None:
    with pytest.raises(TypeError, match="`others` must be of class CocoAveragePrecision, got AveragePrecision"):
        CocoAveragePrecision().merge(AveragePrecision())
    with pytest.raises(TypeError, match="`others` must be of class AveragePrecision, got CocoAveragePrecision"):
        AveragePrecision().merge(CocoAveragePrecision())


def test_keypoint_similarity_refuses() -> None:
    with pytest.raises(ValueError, match=r"`pred` must have shape \(B, N, 7\)"):
        keypoint_similarity(torch.rand(1, 2, 8), torch.rand(1, 2, 7), sigmas=(0.1, 0.1))
    with pytest.raises(ValueError, match="`sigmas` must be positive"):
        keypoint_similarity(torch.rand(1, 2, 4), torch.rand(1, 2, 4), sigmas=(0.0,))
    with pytest.raises(ValueError, match="`sigmas` must be at least one number"):
        keypoint_similarity(torch.rand(1, 2, 1), torch.rand(1, 2, 1), sigmas=())
    with pytest.raises(TypeError, match="`sigmas` must be a sequence"):
        keypoint_similarity(torch.rand(1, 2, 4), torch.rand(1, 2, 4), sigmas=0.1)


def test_keypoint_similarity_equals_the_formula() -> None:
    pred, target = torch.rand(2, 3, 7, **DOUBLE), torch.rand(2, 4, 7, **DOUBLE)
    target[..., 2::3] = torch.randint(2, (2, 4, 2), **DOUBLE)
    actual = keypoint_similarity(pred, target, sigmas=(0.5, 0.2))
    for b, i, j in np.ndindex(2, 3, 4):
        x, y = pred[b, i].tolist(), target[b, j].tolist()
        seen = [k for k in range(2) if y[3 * k + 2] > 0]
        total = 0.0
        for k in seen:
            squares = (x[3 * k] - y[3 * k]) ** 2 + (x[3 * k + 1] - y[3 * k + 1]) ** 2
            total += math.exp(-squares / (2 * y[6] * (2 * (0.5, 0.2)[k]) ** 2))
        assert actual[b, i, j].item() == pytest.approx(total / max(len(seen), 1), abs=1e-9)
