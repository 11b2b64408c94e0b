"""Nearest neighbours: tiles and trees against the whole cost matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from setpred.functional import nearest
from setpred.functional.nearest import nearest_neighbours
from setpred.functional.pairwise import on_channels, pairwise_cost

KINDS = pytest.mark.parametrize("kind", ["huber", "mse", "l1"])
TREES = pytest.mark.cpu_only("SciPy's trees")


def by_the_matrix(x: Tensor, y: Tensor, kind: str, x_mask: Tensor, y_mask: Tensor) -> tuple[Tensor, Tensor]:
    cost = pairwise_cost(x, y, kind).masked_fill(~(x_mask.unsqueeze(2) & y_mask.unsqueeze(1)), torch.inf)
    found = []
    for dim in (2, 1):
        least, index = cost.min(dim)
        found.append(index.masked_fill(least.isinf(), 0))
    return found[0], found[1]


@KINDS
@pytest.mark.parametrize("way", ["tiles", pytest.param("tree", marks=TREES)])
@settings(max_examples=20)
@given(batch=st.integers(1, 3), n=st.integers(1, 6), m=st.integers(1, 6), tile=st.integers(4, 60))
def test_equals_the_matrix(kind: str, way: str, batch: int, n: int, m: int, tile: int) -> None:
    x, y = torch.randn(batch, n, 3, dtype=torch.float64), torch.randn(batch, m, 3, dtype=torch.float64)
    x_mask, y_mask = torch.rand(batch, n) < 0.7, torch.rand(batch, m) < 0.7
    expected = by_the_matrix(x, y, kind, x_mask, y_mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "_tile", lambda device: tile)
        patch.setattr(nearest, "_tree_is_faster", lambda *_: way == "tree" and kind != "huber")
        found = nearest_neighbours(x, y, kind, x_mask=x_mask, y_mask=y_mask.float())
        by_callable = nearest_neighbours(x, y, lambda x, y: pairwise_cost(x, y, kind), x_mask=x_mask, y_mask=y_mask)
    for actual, other, wanted in zip(found, by_callable, expected, strict=True):
        assert torch.equal(actual, wanted)
        assert torch.equal(other, wanted)


@TREES
def test_tree_is_taken_where_it_may_be() -> None:
    x = torch.rand(1, 1000, 3)
    assert nearest._tree_is_faster(x, x, "mse")
    assert nearest._tree_is_faster(x, x, "l1")
    assert not nearest._tree_is_faster(x, x, "huber")
    assert not nearest._tree_is_faster(x[:, :50], x, "mse")
    assert not nearest._tree_is_faster(torch.rand(1, 1000, 20), torch.rand(1, 1000, 20), "mse")
    assert not nearest._tree_is_faster(x, x.clone().fill_(torch.nan), "mse")


@KINDS
def test_the_default_sizes_of_tiles(kind: str) -> None:
    x, y = torch.randn(3, 700, 2), torch.randn(3, 400, 2)
    ones = (torch.ones(x.shape[:2], dtype=torch.bool), torch.ones(y.shape[:2], dtype=torch.bool))
    for actual, wanted in zip(nearest_neighbours(x, y, kind), by_the_matrix(x, y, kind, *ones), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    batch, n, m = shape
    of_x, of_y = nearest_neighbours(torch.rand(batch, n, 2), torch.rand(batch, m, 2))
    assert torch.equal(of_x, torch.zeros(batch, n, dtype=torch.int64))
    assert torch.equal(of_y, torch.zeros(batch, m, dtype=torch.int64))


def test_is_an_operator() -> None:
    x, y, mask = torch.rand(2, 3, 2), torch.rand(2, 4, 2), torch.rand(2, 4) < 0.5
    for y_mask in (None, mask):
        torch.library.opcheck(torch.ops.setpred.nearest_neighbours.default, (x, y, "huber", None, y_mask))


@pytest.mark.parametrize(
    ("error", "message", "x", "y", "options"),
    [
        (ValueError, r"`x` must have shape \(B, N, C\)", torch.rand(3, 2), torch.rand(3, 2), {}),
        (ValueError, r"`y` must have shape \(1, M, 2\)", torch.rand(1, 3, 2), torch.rand(1, 3, 1), {}),
        (ValueError, "`cost` must be one of", torch.rand(1, 3, 2), torch.rand(1, 3, 2), {"cost": "l2"}),
        (TypeError, "`x_mask` must be", torch.rand(1, 3, 2), torch.rand(1, 3, 2), {"x_mask": torch.ones(1, 3).int()}),
        (ValueError, "`y_mask` must", torch.rand(1, 3, 2), torch.rand(1, 4, 2), {"y_mask": torch.ones(1, 3)}),
    ],
)
def test_refuses(error: type[Exception], message: str, x: Tensor, y: Tensor, options: dict[str, object]) -> None:
    with pytest.raises(error, match=message):
        nearest_neighbours(x, y, **options)


@pytest.mark.parametrize("size", [6, 700])
def test_a_named_cost_on_some_channels_is_searched_by_name(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.rand(2, size, 5, dtype=torch.float64), torch.rand(2, size + 1, 5, dtype=torch.float64)
    cost = on_channels(on_channels("mse", [0, 2], weight=2.0), slice(1, 4), weight=3.0)
    expected = nearest_neighbours(x, y, lambda a, b: cost(a, b))  # nothing is known of that
    for one, other in zip(nearest_neighbours(x, y, cost), expected, strict=True):
        assert torch.equal(one, other)
    farthest = on_channels("mse", [0], weight=-1.0)  # orders pairs the other way
    expected = nearest_neighbours(x, y, lambda a, b: farthest(a, b))
    for one, other in zip(nearest_neighbours(x, y, farthest), expected, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="`channels` must be some of the 5 channels"):
        nearest_neighbours(x, y, on_channels("mse", [5]))
    monkeypatch.setattr(nearest, "_by_tiles", None)
    if size == 700 and x.device.type == "cpu":
        nearest_neighbours(x, y, cost)  # by trees
