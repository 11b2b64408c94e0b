"""Cardinality error and matching accuracy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from setpred.metrics import cardinality_error, matching_accuracy


@given(
    batch=st.integers(0, 3),
    n=st.integers(0, 5),
    m=st.integers(0, 4),
    steps=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_equal_the_formulas(batch: int, n: int, m: int, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    pred_mask, target_mask = torch.rand(steps, batch, n), torch.rand(batch, m) < 0.5
    logits, classes = torch.randn(steps, batch, n, 3), torch.randint(3, (batch, m))
    matching = torch.randint(-1, m, (steps, batch, n)) if m else torch.full((steps, batch, n), -1)
    errors, accuracies = cardinality_error(pred_mask, target_mask), matching_accuracy(logits, classes, matching)
    assert errors.shape == accuracies.shape == (steps,)
    for k in range(steps):
        differences = [
            abs(sum(x > 0.5 for x in pred_mask[k, b].tolist()) - sum(target_mask[b].tolist())) for b in range(batch)
        ]
        assert errors[k].item() == pytest.approx(sum(differences) / max(batch, 1))
        right = [
            int(logits[k, b, i].argmax()) == int(classes[b, matching[k, b, i]])
            for b in range(batch)
            for i in range(n)
            if matching[k, b, i] >= 0
        ]
        if right:
            assert accuracies[k].item() == pytest.approx(sum(right) / len(right))
        else:
            assert accuracies[k].isnan()
        if n:
            assert cardinality_error(pred_mask[k] > 0.5, target_mask.float()) == errors[k]


def test_cardinality_error_equals_transformers() -> None:
    loss = pytest.importorskip("transformers.loss.loss_for_object_detection").ImageLoss
    logits = torch.randn(4, 7, 3)
    sizes = [0, 3, 7, 2]
    labels = [{"class_labels": torch.zeros(size, dtype=torch.long)} for size in sizes]
    expected = loss(None, 2, 0.1, []).loss_cardinality({"logits": logits}, labels, None, None)["cardinality_error"]
    actual = cardinality_error(logits.argmax(-1) != 2, torch.arange(7) < torch.tensor(sizes).unsqueeze(1))
    assert actual == expected > 0


def test_nan_is_seen() -> None:
    mask = torch.rand(2, 3)
    mask[1, 2] = torch.nan
    assert cardinality_error(mask, torch.ones(2, 3)).isnan()
    logits, classes = torch.randn(2, 1, 3, 4), torch.zeros(1, 2, dtype=torch.long)
    logits[1, 0, 1, 0] = torch.nan
    for matching, unseen in ([0, -1, 1], [True, True]), ([0, 1, -1], [True, False]):
        accuracy = matching_accuracy(logits, classes, torch.tensor(matching).expand(2, 1, 3))
        assert accuracy.isfinite().tolist() == unseen


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"`pred_mask` and `target_mask` must have shapes \(..., B, N\) and \(B, M\)"):
        cardinality_error(torch.rand(3, 4), torch.rand(2, 4))
    with pytest.raises(ValueError, match=r"got \(4,\) and \(4,\)"):
        cardinality_error(torch.rand(4), torch.rand(4))
    with pytest.raises(TypeError, match="`target_mask` must be bool or floating"):
        cardinality_error(torch.rand(2, 4), torch.ones(2, 4).long())
    with pytest.raises(TypeError, match="`pred_mask` must be a tensor, got None"):
        cardinality_error(None, torch.rand(2, 4))
    with pytest.raises(TypeError, match="`matching` must be a tensor of dtype int64"):
        matching_accuracy(torch.rand(2, 3, 4), torch.zeros(2, 2).long(), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"`classes` must have shape \(2, M\)"):
        matching_accuracy(torch.rand(2, 3, 4), torch.zeros(1, 2).long(), torch.zeros(2, 3).long())
    for missing in (2, 3):
        with pytest.raises(ValueError, match=rf"`matching` must lie in \[0, 2\) where .* got {missing}"):
            matching_accuracy(torch.rand(1, 1, 4), torch.zeros(1, 2).long(), torch.full((1, 1), missing))
