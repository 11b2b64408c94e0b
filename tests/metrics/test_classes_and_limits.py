"""Average precision per class, of limited numbers, and with what is ignored; recall and precision."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from setpred.metrics import AveragePrecision, average_precision
from tests import oracles

DOUBLE = {"dtype": torch.float64}
MATCHINGS = pytest.mark.parametrize("matching", ["best", "best free"])


def random_sets(batch: int, n: int, m: int, classes: int) -> dict[str, Tensor]:
    return {
        "pred": torch.rand(batch, n, 1, **DOUBLE),
        "score": torch.rand(batch, n, **DOUBLE),
        "target": torch.rand(batch, m, 1, **DOUBLE),
        "target_mask": torch.rand(batch, m) < 0.8,
        "pred_mask": torch.rand(batch, n) < 0.8,
        "pred_class": torch.randint(classes, (batch, n)),
        "target_class": torch.randint(classes, (batch, m)),
    }


def judged(sets: dict[str, Tensor], **options: object) -> AveragePrecision:
    metric = AveragePrecision(torch.cdist, largest=False, **({"thresholds": (0.05, 0.2)} | options))
    metric.update(**sets)
    return metric


def of_class(sets: dict[str, Tensor], label: int) -> dict[str, Tensor]:
    return {
        **{name: sets[name] for name in ("pred", "score", "target")},
        "target_mask": sets["target_mask"] & (sets["target_class"] == label),
        "pred_mask": sets["pred_mask"] & (sets["pred_class"] == label),
    }


@pytest.mark.parametrize("average", ["pooled", "sets"])
@pytest.mark.parametrize("ties", ["together", "in order"])
@MATCHINGS
@given(
    batch=st.integers(0, 4),
    n=st.integers(0, 6),
    m=st.integers(0, 5),
    most=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_each_class_is_judged_by_itself(
    average: str, ties: str, matching: str, batch: int, n: int, m: int, most: int, seed: int
) -> None:
    torch.manual_seed(seed)
    sets = random_sets(batch, n, m, 3)
    sets["score"] = sets["score"].mul(3).round().div(3)  # equal ones
    options = {"average": average, "ties": ties, "matching": matching, "max_predictions": most}
    metric = judged(sets, **options)
    values, recalls, precisions = [], [], []
    for label in range(3):
        alone = judged(of_class(sets, label), **options)
        if not alone.compute().isnan().all():
            values.append(alone.compute())
            recalls.append(alone.recall())
            precisions.append(alone.precision())
            torch.testing.assert_close(metric.compute_per_class()[label], values[-1], rtol=1e-12, atol=1e-12)
    assert len(metric.compute_per_class()) == len(values)
    for actual, parts in (
        (metric.compute(), values),
        (metric.recall(), recalls),
        (metric.precision(), precisions),
    ):
        assert actual.shape == (2,)
        expected = torch.stack(parts).mean(0) if parts else torch.full((2,), torch.nan, **DOUBLE)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def right_by_hand(sets: dict[str, Tensor], b: int, threshold: float, matching: str, most: int) -> list[bool]:
    distance = (sets["pred"][b] - sets["target"][b].T).abs()
    order = sorted((i for i in range(len(distance)) if sets["pred_mask"][b, i]), key=lambda i: -sets["score"][b, i])
    targets = sets["target_mask"][b].nonzero().squeeze(1).tolist()
    right = oracles.right_predictions(lambda i, j: -distance[i, j].item(), order[:most], targets, -threshold, matching)
    return [right[i] for i in order[:most]]


@MATCHINGS
@given(batch=st.integers(1, 4), n=st.integers(0, 6), m=st.integers(0, 5), seed=st.integers(0, 2**31))
def test_limits_recall_and_precision_by_hand(matching: str, batch: int, n: int, m: int, seed: int) -> None:
    torch.manual_seed(seed)
    sets = of_class(random_sets(batch, n, m, 1), 0)
    for most in (1, 3, 100):
        metric = judged(sets, matching=matching, max_predictions=most)
        for t, threshold in enumerate((0.05, 0.2)):
            right = [x for b in range(batch) for x in right_by_hand(sets, b, threshold, matching, most)]
            targets = int(sets["target_mask"].sum())
            if targets:
                assert metric.recall()[t] == pytest.approx(sum(right) / targets, abs=1e-12)
                assert metric.precision()[t] == pytest.approx(sum(right) / max(len(right), 1), abs=1e-12)
            else:
                assert metric.recall()[t].isnan()
                assert metric.precision()[t].isnan()


def test_ignored_targets_and_predictions() -> None:
    """A target far right that need not be found, beside one that must be."""
    target = torch.tensor([[[0.0], [1.0]]])
    ignored = torch.tensor([[False, True]])
    options = {"rule": torch.cdist, "thresholds": 0.1, "largest": False}

    def value(*places: float, matching: str = "best free", passable: list[float] | None = None) -> tuple[float, ...]:
        metric = AveragePrecision(**options, matching=matching)
        pred = torch.tensor(places).view(1, -1, 1)
        score = 1 - torch.arange(len(places)).view(1, -1) / 10
        metric.update(
            pred,
            score,
            target,
            target_ignored=ignored,
            pred_ignored=None if passable is None else torch.tensor([passable]).float(),
        )
        return metric.compute().item(), metric.recall().item(), metric.precision().item()

    assert value(0.0) == (1, 1, 1)
    assert value(1.0, 0.0) == value(1.0, 0.0, matching="best") == (1, 1, 1)  # the first is neither right nor wrong
    assert value(1.0) == (0, 0, 0)
    assert value(1.0, 1.0, 0.0, matching="best") == (1, 1, 1)  # VOC: as often as it is found
    assert value(1.0, 1.0, 0.0) == (0.5, 1, 0.5)  # COCO: once
    assert value(1.0, 1.0, 0.0, passable=[0, 1, 0]) == (1, 1, 1)
    assert value(5.0, 0.0) == (0.5, 1, 0.5)
    assert value(5.0, 0.0, passable=[1, 1]) == (1, 1, 1)  # the second is right all the same


def test_what_must_be_found_comes_first() -> None:
    """COCO: a prediction looks for targets that count before it finds one that is ignored, though that is closer."""
    target, pred = torch.tensor([[[0.0], [0.1]]]), torch.tensor([[[0.1]]])
    for matching, expected in (("best free", 1.0), ("best", 0.0)):
        metric = AveragePrecision(torch.cdist, thresholds=0.2, largest=False, matching=matching)
        metric.update(pred, torch.ones(1, 1), target, target_ignored=torch.tensor([[0.0, 1.0]]))
        assert metric.recall() == expected


@MATCHINGS
@given(batch=st.integers(1, 3), n=st.integers(0, 6), m=st.integers(0, 5), seed=st.integers(0, 2**31))
def test_no_order_matters_with_classes_and_what_is_ignored(
    matching: str, batch: int, n: int, m: int, seed: int
) -> None:
    torch.manual_seed(seed)
    sets = random_sets(batch, n, m, 2) | {
        "pred_ignored": torch.rand(batch, n) < 0.3,
        "target_ignored": torch.rand(batch, m) < 0.3,
        "target_crowd": torch.rand(batch, m) < 0.2,
    }
    sets |= {name: sets[name].mul(3).round() for name in ("pred", "target", "score")}
    options = {"matching": matching, "max_predictions": 2, "thresholds": (0.0, 1.0)}
    metric = judged(sets, **options)
    for _ in range(3):
        orders = {"pred": torch.rand(batch, n).argsort(1), "target": torch.rand(batch, m).argsort(1)}
        shuffled = {}
        for name, x in sets.items():
            order = orders["target" if name.startswith("target") else "pred"]
            shuffled[name] = x.take_along_dim(order.unsqueeze(2), 1) if x.dim() == 3 else x.gather(1, order)
        other = judged(shuffled, **options)
        for measure in ("compute", "recall", "precision"):
            a, b = (getattr(one, measure)() for one in (metric, other))
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_function_has_classes_too() -> None:
    sets = random_sets(4, 6, 5, 2)
    positional = [sets.pop(name) for name in ("pred", "score", "target")]
    options = {"rule": torch.cdist, "thresholds": 0.1, "largest": False, "max_predictions": 2}
    value = average_precision(*positional, **sets, **options)
    metric = AveragePrecision(**options)
    metric.update(*positional, **sets)
    assert value == metric.compute()


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "`pred_class` must be given where the other side has classes", {"pred_class": None}),
        (ValueError, "`target_class` must be given where the other side has classes", {"target_class": None}),
        (TypeError, "`pred_class` must be a tensor of dtype int64", {"pred_class": torch.zeros(2, 3)}),
        (ValueError, r"`target_class` must have shape \(2, 4\)", {"target_class": torch.zeros(2, 3).long()}),
        (TypeError, "`pred_ignored` must be bool or floating", {"pred_ignored": torch.zeros(2, 3).long()}),
        (ValueError, "`target_ignored` must be bool or hold only 0 and 1", {"target_ignored": torch.full((2, 4), 0.5)}),
    ],
)
def test_refuses(error: type[Exception], message: str, change: dict[str, Tensor | None]) -> None:
    with pytest.raises(error, match=message):
        judged(random_sets(2, 3, 4, 2) | change)


def test_refuses_limits() -> None:
    with pytest.raises(ValueError, match="`max_predictions` must be at least 1, got 0"):
        AveragePrecision(max_predictions=0)
    with pytest.raises(TypeError, match="`max_predictions` must be an integer"):
        AveragePrecision(max_predictions=1.5)
