"""The numeric core of FSPool and FSUnpool."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from setpred.functional import piecewise_linear, sort_pool, sort_unpool
from tests import devices, oracles
from tests.devices import gradcheck, gradgradcheck

EXACT = {"rtol": 1e-9, "atol": 1e-9}
DOUBLE = {"dtype": torch.float64}

sizes = st.integers(0, 7)
channels = st.integers(1, 3)
pieces = st.integers(1, 6)
seeds = st.integers(0, 2**31)


def random_set(batch: int, size: int, channels: int, *, ties: bool) -> Tensor:
    elements = torch.randn(batch, size, channels, **DOUBLE)
    return elements.round() if ties else elements


@given(channels=channels, pieces=pieces, seed=seeds)
def test_piecewise_linear_equals_the_formula(channels: int, pieces: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(channels, pieces + 1, **DOUBLE)
    knots = torch.arange(pieces + 1, **DOUBLE) / pieces
    position = torch.cat([torch.rand(5, **DOUBLE), knots]).expand(channels, -1)
    expected = [[oracles.piecewise_linear(w, r) for r in row] for w, row in zip(weight, position, strict=True)]
    actual = piecewise_linear(weight, position)
    torch.testing.assert_close(actual, torch.tensor(expected, **DOUBLE), **EXACT)
    torch.testing.assert_close(actual[:, 5:], weight, **EXACT)
    torch.testing.assert_close(piecewise_linear(weight, position[:1]), actual, **EXACT)
    torch.testing.assert_close(piecewise_linear(weight, position[:, 0]), actual[:, 0], **EXACT)


def test_piecewise_linear_clamps_positions() -> None:
    weight = torch.tensor([[1.0, 5.0, 2.0]])
    assert piecewise_linear(weight, torch.tensor([[-0.3, 1.7]])).tolist() == [[1.0, 2.0]]


def test_piecewise_linear_gradients() -> None:
    weight = torch.randn(2, 4, **DOUBLE, requires_grad=True)
    position = torch.rand(2, 5, **DOUBLE, requires_grad=True)
    assert gradcheck(piecewise_linear, (weight, position))
    assert gradgradcheck(piecewise_linear, (weight, position))


@given(size=sizes, channels=channels, pieces=pieces, seed=seeds, ties=st.booleans())
def test_pool_equals_the_formula_for_every_size(size: int, channels: int, pieces: int, seed: int, ties: bool) -> None:
    torch.manual_seed(seed)
    elements, weight = random_set(3, size, channels, ties=ties), torch.randn(channels, pieces + 1, **DOUBLE)
    torch.testing.assert_close(sort_pool(elements, weight)[0], oracles.sort_pool(elements, weight), **EXACT)
    mask = torch.rand(3, size) < torch.tensor([[0.0], [0.5], [1.0]])  # the first set is empty
    expected = oracles.sort_pool(elements, weight, mask)
    assert not expected[0].any()
    for kind in (torch.bool, torch.float64, torch.float32):
        torch.testing.assert_close(sort_pool(elements, weight, mask.to(kind))[0], expected, **EXACT)


@given(size=sizes, channels=channels, pieces=pieces, seed=seeds)
def test_pool_of_soft_sizes_equals_the_formula(size: int, channels: int, pieces: int, seed: int) -> None:
    torch.manual_seed(seed)
    elements, weight = random_set(2, size, channels, ties=False), torch.randn(channels, pieces + 1, **DOUBLE)
    mask = torch.rand(2, size, **DOUBLE) * (torch.rand(2, size) < 0.8)
    expected = oracles.soft_sort_pool(elements, weight, mask)
    torch.testing.assert_close(sort_pool(elements, weight, mask)[0], expected, **EXACT)


@given(size=sizes, channels=channels, pieces=pieces, seed=seeds, temperature=st.floats(0.05, 10))
def test_relaxed_pool_equals_the_formula(size: int, channels: int, pieces: int, seed: int, temperature: float) -> None:
    torch.manual_seed(seed)
    elements, weight = random_set(3, size, channels, ties=False), torch.randn(channels, pieces + 1, **DOUBLE)
    mask = torch.rand(3, size) < torch.tensor([[0.0], [0.5], [1.0]])
    actual, _ = sort_pool(elements, weight, mask, relaxed=temperature)
    torch.testing.assert_close(actual, oracles.relaxed_sort_pool(elements, weight, mask, temperature), **EXACT)
    actual, _ = sort_pool(elements[2:], weight, relaxed=temperature)
    expected = oracles.relaxed_sort_pool(elements[2:], weight, mask[2:], temperature)
    torch.testing.assert_close(actual, expected, **EXACT)


def test_relaxed_permutation_is_neural_sort() -> None:
    elements = torch.randn(2, 5, 3, **DOUBLE)
    _, permutation = sort_pool(elements, torch.randn(3, 4, **DOUBLE), relaxed=0.7)
    expected = [[oracles.neural_sort(column, 0.7) for column in rows.t()] for rows in elements]
    torch.testing.assert_close(permutation, torch.stack([torch.stack(rows) for rows in expected]), **EXACT)


@pytest.mark.parametrize("masked", [False, True])
def test_relaxed_tends_to_the_exact_sort(masked: bool) -> None:
    elements, weight = torch.rand(3, 6, 2).argsort(1).to(torch.float64), torch.randn(2, 5, **DOUBLE)
    mask = torch.tensor([6, 4, 0]).unsqueeze(1) > torch.arange(6) if masked else None
    exact, order = sort_pool(elements, weight, mask)
    distances = [
        (sort_pool(elements, weight, mask, relaxed=temperature)[0] - exact).abs().max()
        for temperature in (1, 0.1, 0.01)
    ]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-9
    if not masked:
        _, relaxed = sort_pool(elements, weight, relaxed=0.01)
        torch.testing.assert_close(relaxed.argmax(-1), order.movedim(2, 1))


@given(size=sizes, channels=channels, pieces=pieces, seed=seeds, ties=st.booleans())
def test_unpool_equals_the_formula(size: int, channels: int, pieces: int, seed: int, ties: bool) -> None:
    torch.manual_seed(seed)
    elements, weight = random_set(3, size, channels, ties=ties), torch.randn(channels, pieces + 1, **DOUBLE)
    vector, mask = torch.randn(3, channels, **DOUBLE), torch.rand(3, size) < torch.tensor([[0.0], [0.5], [1.0]])
    _, order = sort_pool(elements, weight, mask)
    expected = oracles.sort_unpool(vector, elements.masked_fill(~mask.unsqueeze(-1), 0), weight, mask)
    torch.testing.assert_close(sort_unpool(vector, order, weight, mask), expected, **EXACT)
    _, order = sort_pool(elements, weight)
    expected = oracles.sort_unpool(vector, elements, weight, torch.ones_like(mask))
    torch.testing.assert_close(sort_unpool(vector, order, weight), expected, **EXACT)


def test_unpool_with_relaxed_permutation() -> None:
    elements, weight, vector = torch.randn(2, 5, 3, **DOUBLE), torch.randn(3, 4, **DOUBLE), torch.randn(2, 3, **DOUBLE)
    mask = torch.tensor([5, 3]).unsqueeze(1) > torch.arange(5)
    _, permutation = sort_pool(elements, weight, mask, relaxed=0.5)
    actual = sort_unpool(vector, permutation, weight, mask)
    assert not actual[~mask].any()
    for b, n in enumerate((5, 3)):
        for c in range(3):
            ranks = torch.stack([oracles.piecewise_linear(weight[c], k / (n - 1)) for k in range(n)])
            expected = vector[b, c] * ranks @ oracles.neural_sort(elements[b, :n, c], 0.5)
            torch.testing.assert_close(actual[b, :n, c], expected, **EXACT)


def test_unpool_restores_the_order_of_the_pool() -> None:
    elements = torch.randn(2, 6, 3, **DOUBLE)
    falling = torch.tensor([[1.0, 0.0]], **DOUBLE).expand(3, 2)
    _, permutation = sort_pool(elements, falling)
    unpooled = sort_unpool(torch.ones(2, 3, **DOUBLE), permutation, falling)
    assert torch.equal(unpooled.argsort(1), elements.argsort(1))


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("kind", ["bool", "zeros and ones", "soft", "relaxed"])
def test_absent_elements_are_not_seen(kind: str, garbage: float) -> None:
    present = torch.tensor([[True, False, True, True, False], [False] * 5])
    mask = {"soft": present * torch.rand(2, 5, **DOUBLE), "zeros and ones": present.double()}.get(kind, present)
    relaxed = 0.5 if kind == "relaxed" else None
    elements, weight = torch.randn(2, 5, 3, **DOUBLE), torch.randn(3, 4, **DOUBLE, requires_grad=True)
    results = []
    for fill in (0.0, garbage):
        filled = elements.masked_fill(~present.unsqueeze(-1), fill).requires_grad_()
        pooled, permutation = sort_pool(filled, weight, mask, relaxed=relaxed)
        unpooled = sort_unpool(pooled, permutation, weight, mask)
        gradient, of_weight = torch.autograd.grad(unpooled.square().sum(), (filled, weight))
        assert not gradient[~present].any()
        assert gradient[present].all()
        assert not unpooled[~present].any()
        results.append([pooled, unpooled, gradient, of_weight])
    assert all(devices.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("relaxed", [None, 0.5])
def test_padding_changes_nothing(relaxed: float | None) -> None:
    elements, weight = torch.randn(2, 4, 3, **DOUBLE), torch.randn(3, 6, **DOUBLE)
    padded = torch.cat([torch.randn(2, 3, 3, **DOUBLE), elements], 1)
    mask = (torch.arange(7) >= 3).expand(2, 7)
    torch.testing.assert_close(
        sort_pool(padded, weight, mask, relaxed=relaxed)[0], sort_pool(elements, weight, relaxed=relaxed)[0], **EXACT
    )


@pytest.mark.parametrize("kind", ["none", "bool", "soft", "relaxed"])
def test_gradients(kind: str) -> None:
    elements = torch.randn(2, 4, 2, **DOUBLE, requires_grad=True)
    vector = torch.randn(2, 2, **DOUBLE, requires_grad=True)
    weight = torch.randn(2, 4, **DOUBLE, requires_grad=True)
    mask = {
        "none": None,
        "soft": torch.rand(2, 4, **DOUBLE, requires_grad=True),
    }.get(kind, torch.tensor([[True] * 4, [True, False, True, False]]))
    relaxed = 1.0 if kind == "relaxed" else None
    permutation = sort_pool(elements.detach(), weight.detach(), mask, relaxed=relaxed)[1].detach()

    def pool(elements: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
        return sort_pool(elements, weight, mask, relaxed=relaxed)[0]

    def unpool(vector: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
        return sort_unpool(vector, permutation, weight, mask)

    for function, inputs in ((pool, (elements, weight, mask)), (unpool, (vector, weight, mask))):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equal_elements_share_their_ranks_weights_first_come_first(dtype: torch.dtype) -> None:
    elements = torch.tensor([[[1.0, 5.0], [1.0, 5.0], [0.0, 7.0]]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]], dtype=dtype)
    (gradient,) = torch.autograd.grad(sort_pool(elements, weight)[0].sum(), elements)
    assert gradient.tolist() == [[[1.0, 20.0], [2.0, 30.0], [3.0, 10.0]]]


@pytest.mark.parametrize("relaxed", [None, 0.5])
def test_empty_batches_and_sets(relaxed: float | None) -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    for batch, size in ((0, 4), (2, 0), (0, 0)):
        pooled, permutation = sort_pool(torch.rand(batch, size, 3), weight, relaxed=relaxed)
        assert torch.equal(pooled, torch.zeros(batch, 3))
        assert sort_unpool(pooled, permutation, weight).shape == (batch, size, 3)
        pooled.sum().backward()
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "bool", "soft", "relaxed"])
def test_low_precision_is_close(kind: str, dtype: torch.dtype) -> None:
    # 300 elements: bfloat16 cannot count so far. Squared distances and cumulative logits leave float16's range.
    elements, weight, mask = torch.randn(2, 300, 3).to(dtype), torch.rand(3, 21).to(dtype), torch.rand(2, 300).to(dtype)
    mask = {"none": None, "soft": mask}.get(kind, mask < 0.5)
    relaxed = 0.01 if kind == "relaxed" else None
    actual, _ = sort_pool(elements, weight, mask, relaxed=relaxed)
    wide = mask.double() if kind == "soft" else mask
    expected, _ = sort_pool(elements.double(), weight.double(), wide, relaxed=relaxed)
    assert actual.dtype == dtype
    scale = elements.double().abs().sum(1)
    assert ((actual.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * scale).all()


@pytest.mark.parametrize("relaxed", [None, 0.05])
def test_autocast_is_close(relaxed: float | None) -> None:
    elements, weight = torch.randn(2, 50, 3), torch.rand(3, 21)
    expected, _ = sort_pool(elements, weight, relaxed=relaxed)
    with devices.autocast(torch.bfloat16):
        actual, _ = sort_pool(elements, weight, relaxed=relaxed)
    assert ((actual - expected).abs() <= torch.finfo(torch.bfloat16).eps * elements.abs().sum(1)).all()


SET, WEIGHT = torch.rand(2, 4, 3), torch.rand(3, 5)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"`elements` must have shape \(B, N, C\), got float32 of shape \(4, 3\)", (SET[0], WEIGHT)),
        (TypeError, "`elements` must be a tensor, got", ([[0.0]], WEIGHT)),
        (TypeError, "`elements` must have a floating dtype, got int64", (SET.long(), WEIGHT)),
        (ValueError, r"`weight` must have shape \(3, P\+1\), got float32 of shape \(2, 5\)", (SET, WEIGHT[:2])),
        (ValueError, "pieces` must be positive, got 0", (SET, WEIGHT[:, :1])),
        (
            ValueError,
            r"`mask` must have shape \(2, 4\), got bool of shape \(2, 3\)",
            (SET, WEIGHT, torch.ones(2, 3) > 0),
        ),
        (TypeError, "`mask` must be bool or floating .* got int64", (SET, WEIGHT, torch.ones(2, 4).long())),
        (TypeError, "`mask` must be a tensor or None, got", (SET, WEIGHT, [1.0])),
    ],
)
def test_pool_refuses(error: type[Exception], message: str, arguments: tuple[Tensor, ...]) -> None:
    with pytest.raises(error, match=message):
        sort_pool(*arguments)


@pytest.mark.parametrize(
    ("message", "mask", "relaxed"),
    [
        ("`relaxed` must be positive, got 0", None, 0),
        ("`mask` must be bool when `relaxed` is given", torch.ones(2, 4), 1.0),
    ],
)
def test_relaxed_pool_refuses(message: str, mask: Tensor | None, relaxed: float) -> None:
    with pytest.raises(ValueError, match=message):
        sort_pool(SET, WEIGHT, mask, relaxed=relaxed)


VECTOR, ORDER = torch.rand(2, 3), torch.zeros(2, 4, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"`vector` must have shape \(B, C\), got float32 of shape \(3,\)", (VECTOR[0], ORDER, WEIGHT)),
        (ValueError, r"`weight` must have shape \(3, P\+1\), got", (VECTOR, ORDER, WEIGHT[:2])),
        (ValueError, r"`permutation` must have shape \(2, N, 3\), got \(2, 4, 2\)", (VECTOR, ORDER[..., :2], WEIGHT)),
        (ValueError, r"`permutation` must have shape \(2, N, 3\), got \(2, 4\)", (VECTOR, ORDER[..., 0], WEIGHT)),
        (ValueError, r"`permutation` must have shape \(2, 3, N, 4\)", (VECTOR, torch.rand(2, 2, 4, 4), WEIGHT)),
        (TypeError, "`permutation` must be int64, or floating if relaxed, got", (VECTOR, ORDER.int(), WEIGHT)),
        (TypeError, "`permutation` must be a tensor", (VECTOR, [0], WEIGHT)),
        (ValueError, r"`mask` must have shape \(2, 4\), got", (VECTOR, ORDER, WEIGHT, torch.ones(2, 3))),
    ],
)
def test_unpool_refuses(error: type[Exception], message: str, arguments: tuple[Tensor, ...]) -> None:
    with pytest.raises(error, match=message):
        sort_unpool(*arguments)


@pytest.mark.parametrize(
    ("error", "message", "weight", "position"),
    [
        (ValueError, r"`weight` must have shape \(C, P\+1\), got", torch.rand(3), torch.rand(3)),
        (ValueError, r"`position` must have shape \(3, ...\) or \(1, ...\), got \(2, 4\)", WEIGHT, torch.rand(2, 4)),
        (TypeError, "`position` must have a floating dtype, got int64", WEIGHT, torch.ones(3, 4).long()),
    ],
)
def test_piecewise_linear_refuses(error: type[Exception], message: str, weight: Tensor, position: Tensor) -> None:
    with pytest.raises(error, match=message):
        piecewise_linear(weight, position)
