"""Costs of all pairs, of given pairs, and composed ones."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from setpred.functional.pairwise import (
    channels_seen,
    cross_entropy_cost,
    on_channels,
    paired_cost,
    pairwise_cost,
    sum_costs,
)
from tests import oracles
from tests.devices import gradcheck, gradgradcheck

EXACT = {"rtol": 1e-9, "atol": 1e-9}
DOUBLE = {"dtype": torch.float64}
KINDS = pytest.mark.parametrize("kind", ["huber", "mse", "l1"])


@KINDS
@given(batch=st.integers(0, 2), n=st.integers(0, 4), m=st.integers(0, 4), channels=st.integers(1, 9))
def test_equals_the_formula(kind: str, batch: int, n: int, m: int, channels: int) -> None:
    x, y = 2 * torch.randn(batch, n, channels, **DOUBLE), 2 * torch.randn(batch, m, channels, **DOUBLE)
    expected = torch.zeros(batch, n, m, **DOUBLE)
    for b in range(batch):
        for i in range(n):
            for j in range(m):
                expected[b, i, j] = oracles.pair_cost(x[b, i], y[b, j], kind)
    torch.testing.assert_close(pairwise_cost(x, y, kind), expected, **EXACT)
    with_graph = pairwise_cost(x.requires_grad_(), y, kind)
    torch.testing.assert_close(with_graph.detach(), expected, **EXACT)
    k = min(n, m)
    diagonal = expected.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(paired_cost(x[:, :k], y[:, :k], kind).detach(), diagonal, **EXACT)


@KINDS
def test_large_sets_equal_the_formula(kind: str) -> None:
    x, y = 2 * torch.randn(2, 40, 3, **DOUBLE), 2 * torch.randn(2, 50, 3, **DOUBLE)
    part = pairwise_cost(x[:, :1], y, kind)
    torch.testing.assert_close(pairwise_cost(x, y, kind)[:, :1], part, **EXACT)
    torch.testing.assert_close(pairwise_cost(x.requires_grad_(), y, kind)[:, :1].detach(), part, **EXACT)


@KINDS
def test_gradients(kind: str) -> None:
    x, y = (2 * torch.randn(2, 3, 2, **DOUBLE)).requires_grad_(), torch.randn(2, 3, 2, **DOUBLE, requires_grad=True)
    for function in (pairwise_cost, paired_cost):
        assert gradcheck(lambda x, y, f=function: f(x, y, kind), (x, y))
        assert gradgradcheck(lambda x, y, f=function: f(x, y, kind), (x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, y = (300 * torch.randn(2, 4, 3)).to(dtype), (300 * torch.randn(2, 5, 3)).to(dtype)
    cost = pairwise_cost(x, y, "mse")
    assert cost.dtype == torch.float32
    torch.testing.assert_close(cost, pairwise_cost(x.float(), y.float(), "mse"))
    assert paired_cost(x, x, "mse").dtype == torch.float32


def test_callables() -> None:
    x, y = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    torch.testing.assert_close(pairwise_cost(x, y, torch.cdist), torch.cdist(x, y))
    torch.testing.assert_close(
        paired_cost(x, y[:, :3], torch.cdist), torch.cdist(x, y)[:, :, :3].diagonal(dim1=1, dim2=2)
    )


def test_composition() -> None:
    x, y = torch.randn(2, 3, 5, **DOUBLE), torch.randn(2, 4, 5, **DOUBLE).softmax(-1)
    cost = sum_costs(on_channels("huber", slice(0, 2), weight=5.0), on_channels(cross_entropy_cost, [2, 3, 4]), "l1")
    entropy = torch.zeros(2, 3, 4, **DOUBLE)
    for b in range(2):
        for i in range(3):
            entropy[b, i] = torch.nn.functional.cross_entropy(x[b, i, 2:].expand(4, -1), y[b, :, 2:], reduction="none")
    expected = 5 * pairwise_cost(x[..., :2], y[..., :2]) + entropy + pairwise_cost(x, y, "l1")
    torch.testing.assert_close(pairwise_cost(x, y, cost), expected, **EXACT)


@pytest.mark.parametrize(
    ("error", "message", "x", "y", "cost"),
    [
        (ValueError, r"`x` must have shape \(B, N, C\), got .*\(3, 2\)", torch.rand(3, 2), torch.rand(3, 2), "huber"),
        (ValueError, r"`y` must have shape \(2, M, 3\)", torch.rand(2, 4, 3), torch.rand(2, 4, 2), "huber"),
        (TypeError, "`y` must have a floating dtype", torch.rand(2, 4, 3), torch.ones(2, 4, 3).long(), "huber"),
        (ValueError, "`cost` must be one of 'huber'", torch.rand(2, 4, 3), torch.rand(2, 4, 3), "l2"),
        (
            ValueError,
            r"`cost` must return shape \(B, N, M\) = \(2, 4, 5\), got \(2, 4\)",
            torch.rand(2, 4, 3),
            torch.rand(2, 5, 3),
            lambda x, y: x.sum(-1),
        ),
    ],
)
def test_refuses(error: type[Exception], message: str, x: Tensor, y: Tensor, cost: object) -> None:
    with pytest.raises(error, match=message):
        pairwise_cost(x, y, cost)


def test_refuses_pairs_and_compositions() -> None:
    with pytest.raises(ValueError, match=r"`y` must have shape \(1, 2, 3\)"):
        paired_cost(torch.rand(1, 2, 3), torch.rand(1, 3, 3))
    with pytest.raises(ValueError, match=r"`cost` must return shape"):
        paired_cost(torch.rand(1, 2, 3), torch.rand(1, 2, 3), lambda x, y: x.sum())
    with pytest.raises(ValueError, match="`costs` must be at least one"):
        sum_costs()
    with pytest.raises(ValueError, match="`costs` must be one of"):
        sum_costs("huber", "l2")
    with pytest.raises(ValueError, match="`cost` must be one of"):
        on_channels("l2", [0])


COMPOSED = [
    on_channels("l1", slice(0, 2), weight=5.0),
    on_channels("l1", slice(0, 2)),
    on_channels("l1", [0, 1]),
    on_channels(cross_entropy_cost, [4, -2]),
    sum_costs("mse", on_channels("huber", range(1, 3), weight=-1.0)),
    on_channels(sum_costs("l1", on_channels("mse", slice(None, None, 2))), np.array([0, 2, 3])),
]


@pytest.mark.parametrize("cost", COMPOSED, ids=repr)
def test_composed_costs_are_values(cost: object) -> None:
    x, y = torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    for same in (copy.deepcopy(cost), copy.copy(cost), pickle.loads(pickle.dumps(cost)), eval(repr_of_names(cost))):
        assert same == cost
        assert hash(same) == hash(cost)
        assert torch.equal(same(x, y), cost(x, y))
    assert len(set(COMPOSED)) == len(COMPOSED)


def repr_of_names(cost: object) -> str:
    return repr(cost).replace(repr(cross_entropy_cost), "cross_entropy_cost")


@pytest.mark.parametrize(
    ("channels", "seen"),
    [
        (slice(None), {0, 1, 2, 3, 4, 5}),
        (slice(0, 4), {0, 1, 2, 3}),
        (slice(4, 6), {4, 5}),
        (slice(-2, None), {4, 5}),
        (slice(-6, -1, 2), {0, 2, 4}),
        ([0], {0}),
        ((5, -6, -1), {5, 0}),
        (torch.tensor([2, 2, 1]), {1, 2}),
        (np.array([3]), {3}),
        (range(2, 4), {2, 3}),
    ],
)
def test_only_the_channels_that_are_named_are_seen(channels: object, seen: set[int]) -> None:
    cost = on_channels("mse", channels)
    x = torch.rand(1, 2, 6, requires_grad=True)
    cost(x, torch.rand(1, 2, 6)).sum().backward()
    assert set(x.grad.abs().sum((0, 1)).nonzero().squeeze(1).tolist()) == seen
    assert channels_seen(cost, 6) == seen


def test_channels_seen_by_compositions() -> None:
    for everything in ("huber", cross_entropy_cost, lambda x, y: x):
        assert channels_seen(everything, 3) == {0, 1, 2}
        assert channels_seen(on_channels(everything, [1]), 3) == {1}
        assert channels_seen(sum_costs(everything, on_channels("l1", [1])), 3) == {0, 1, 2}
    assert channels_seen(sum_costs(on_channels("l1", [0]), on_channels("l1", slice(3, 5))), 6) == {0, 3, 4}
    assert channels_seen(on_channels(on_channels("l1", [-1, 0]), [5, 3, 1]), 6) == {1, 5}
    with pytest.raises(ValueError, match="`channels` must be some of the 3 channels"):
        channels_seen(sum_costs("l1", on_channels("l1", [3])), 3)


NO_CHANNELS = ([], (), torch.tensor([]), [True, False], torch.tensor([True, False]), [0.0], ["0"], "01", 3, None)
NO_SLICES = (slice(0.5, 2), slice(2, 0, -1), slice(0, 4, 0), slice(False, True), [[0, 1]], np.array([[0, 1]]))


@pytest.mark.parametrize("channels", [*NO_CHANNELS, *NO_SLICES], ids=repr)
def test_refuses_what_names_no_channels(channels: object) -> None:
    with pytest.raises(ValueError, match="`channels` must be one or more integers, or a slice of integers"):
        on_channels("l1", channels)


BEYOND = ([6], [-7], [0, 1, 9], slice(8, 12), slice(4, 8), slice(5, 7), slice(6, None), slice(-8, None), slice(-8, 2))
EMPTY = (slice(3, 3), slice(4, 2), slice(-1, 0))


@pytest.mark.parametrize("channels", [*BEYOND, *EMPTY], ids=repr)
def test_refuses_channels_that_do_not_exist(channels: object) -> None:
    cost = on_channels("l1", channels)  # how many there are is known once it is called
    x = torch.rand(1, 2, 6)
    for call in (lambda: cost(x, x), lambda: paired_cost(x, x, sum_costs("l1", cost)), lambda: channels_seen(cost, 6)):
        with pytest.raises(ValueError, match="`channels` must be some of the 6 channels that there are, got"):
            call()


@pytest.mark.parametrize(
    ("error", "weight"),
    [(ValueError, torch.nan), (ValueError, torch.inf), (TypeError, "1"), (TypeError, torch.ones(2))],
)
def test_refuses_weights(error: type[Exception], weight: object) -> None:
    with pytest.raises(error, match="`weight` must be"):
        on_channels("l1", [0], weight=weight)
