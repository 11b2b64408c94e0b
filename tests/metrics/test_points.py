"""F-score of point sets: against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from setpred.metrics import point_f_score


def literal(x: Tensor, y: Tensor, threshold: float) -> float:
    if len(x) == len(y) == 0:
        return 1
    if 0 in (len(x), len(y)):
        return 0
    distance = (x.unsqueeze(1) - y).square().sum(-1).sqrt()
    precision, recall = (distance.amin(dim).lt(threshold).double().mean().item() for dim in (1, 0))
    return 0 if precision == recall == 0 else 2 * precision * recall / (precision + recall)


@settings(max_examples=50)
@given(n=st.integers(0, 6), m=st.integers(0, 6), masked=st.booleans(), seed=st.integers(0, 2**31))
def test_equals_the_definition(n: int, m: int, masked: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, y = torch.rand(3, n, 2, dtype=torch.float64), torch.rand(3, m, 2, dtype=torch.float64)
    exists, present = ((torch.rand(3, size) < (0.6 if masked else 2)) for size in (n, m))
    masks = {"pred_mask": exists.double(), "target_mask": present} if masked else {}
    garbage = [z.masked_fill(~mask.unsqueeze(-1), torch.nan) for z, mask in ((x, exists), (y, present))]
    actual = point_f_score(*garbage, threshold=0.3, **masks)
    expected = [literal(a[e], b[p], 0.3) for a, b, e, p in zip(x, y, exists, present, strict=True)]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_large_sets_half_precision_and_no_graph() -> None:
    x, y = torch.rand(2, 900, 3, requires_grad=True), torch.rand(2, 800, 3)
    score = point_f_score(x, y, threshold=0.05)
    assert not score.requires_grad
    expected = [literal(a.double(), b.double(), 0.05) for a, b in zip(x.detach(), y, strict=True)]
    torch.testing.assert_close(score, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=2e-3)
    assert point_f_score(x.half(), y.half(), threshold=0.05).dtype == torch.float32


def test_the_threshold_is_not_near() -> None:
    x = torch.tensor([[[0.0]], [[torch.nan]]])
    assert point_f_score(x, torch.full((2, 1, 1), 0.5), threshold=0.5).tolist() == [0, 0]
    assert point_f_score(x, torch.full((2, 1, 1), 0.5), threshold=0.500001).tolist() == [1, 0]


def test_nan_hides_no_other_point() -> None:
    x, y = torch.tensor([[[0.0], [4.0]]]), torch.tensor([[[9.0], [0.0], [4.0], [torch.nan]]])
    for pair in ((x, y), (y, x)):  # of the two all are near, of the four half
        assert point_f_score(*pair, threshold=0.5).item() == pytest.approx(2 / 3)


def test_compiles() -> None:
    x, y, mask = torch.rand(2, 5, 3), torch.rand(2, 4, 3), torch.rand(2, 4) < 0.6
    compiled = torch.compile(point_f_score, fullgraph=True, backend="aot_eager")
    options = {"threshold": 0.3, "target_mask": mask}
    torch.testing.assert_close(compiled(x, y, **options), point_f_score(x, y, **options))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "`threshold` must be positive, got 0", {"threshold": 0}),
        (ValueError, "`threshold` must be finite, got inf", {"threshold": float("inf")}),
        (TypeError, "`threshold` must be a number", {"threshold": "small"}),
        (ValueError, "`pred_mask` must be bool or hold only 0 and 1", {"pred_mask": torch.full((2, 3), 0.5)}),
        (ValueError, r"`target` must have shape \(2, M, 2\)", {"target": torch.rand(2, 4, 3)}),
    ],
)
def test_refuses(error: type[Exception], message: str, change: dict[str, object]) -> None:
    call = {"pred": torch.rand(2, 3, 2), "target": torch.rand(2, 4, 2), "threshold": 0.1}
    with pytest.raises(error, match=message):
        point_f_score(**(call | change))
