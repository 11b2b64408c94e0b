"""FSPool and FSUnpool as modules; their numbers are tested in functional/test_sort_pool.py."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setpred import FSPool, FSUnpool
from setpred.functional import sort_pool, sort_unpool
from tests import devices

RELAXED = pytest.mark.parametrize("relaxed", [None, 0.5])


@RELAXED
def test_modules_apply_the_functions_with_their_weights(relaxed: float | None) -> None:
    pool, unpool = FSPool(3, 5, relaxed=relaxed), FSUnpool(3, 7)
    elements, mask = torch.randn(2, 4, 3), torch.tensor([[True] * 4, [True, False, True, False]])
    vector, permutation = pool(elements, mask, return_permutation=True)
    expected = sort_pool(elements, pool.weight, mask, relaxed=relaxed)
    assert torch.equal(vector, expected[0])
    assert torch.equal(permutation, expected[1])
    assert torch.equal(pool(elements, mask), vector)
    assert torch.equal(unpool(vector, permutation, mask), sort_unpool(vector, permutation, unpool.weight, mask))


def test_unpool_undoes_pool() -> None:
    # All weights one: the vector is each feature's sum, and every element gets it.
    pool, unpool = FSPool(3, dtype=torch.float64), FSUnpool(3, dtype=torch.float64)
    nn.init.ones_(pool.weight)
    nn.init.ones_(unpool.weight)
    elements = torch.randn(2, 5, 3, dtype=torch.float64)
    vector, permutation = pool(elements, return_permutation=True)
    torch.testing.assert_close(vector, elements.sum(1))
    torch.testing.assert_close(unpool(vector, permutation), vector.unsqueeze(1).expand(2, 5, 3))
    # Weights that are the set's own ranked values: the set comes back.
    with torch.no_grad():
        unpool = FSUnpool(3, pieces=4, dtype=torch.float64)
        unpool.weight.copy_(elements[0].sort(0, descending=True).values.t())
    torch.testing.assert_close(unpool(torch.ones(1, 3, dtype=torch.float64), permutation[:1])[0], elements[0])


@RELAXED
def test_order_of_the_elements_does_not_matter_and_unpool_follows_it(relaxed: float | None) -> None:
    pool, unpool = FSPool(3, relaxed=relaxed, dtype=torch.float64), FSUnpool(3, dtype=torch.float64)
    elements, mask = torch.randn(2, 6, 3, dtype=torch.float64), torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    order = torch.randperm(6)
    vector, permutation = pool(elements, mask, return_permutation=True)
    reordered, of_reordered = pool(elements[:, order], mask[:, order], return_permutation=True)
    torch.testing.assert_close(reordered, vector)
    torch.testing.assert_close(
        unpool(reordered, of_reordered, mask[:, order]), unpool(vector, permutation, mask)[:, order]
    )


@RELAXED
def test_elements_in_any_memory_layout(relaxed: float | None) -> None:
    pool = FSPool(3, relaxed=relaxed)
    elements = torch.randn(2, 4, 3)
    expected = pool(elements)
    assert devices.equal(pool(elements.mT.contiguous().mT), expected)
    assert devices.equal(pool(elements[:1].expand(5, -1, -1))[4], expected[0])


@RELAXED
def test_compiles_in_first_and_second_order(relaxed: float | None) -> None:
    pool, mask = FSPool(3, relaxed=relaxed), torch.tensor([[True] * 4, [True, False, True, False]])

    def inner_gradient(elements: Tensor) -> Tensor:
        return torch.func.grad(lambda x: pool(x, mask).square().sum())(elements)

    elements = torch.randn(2, 4, 3)
    for function in (lambda x: pool(x, mask), inner_gradient):
        eager, compiled = function(elements), torch.compile(function, fullgraph=True, backend="aot_eager")(elements)
        torch.testing.assert_close(compiled, eager)
        gradients = [torch.autograd.grad(value.square().sum(), pool.weight)[0] for value in (compiled, eager)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("cls", [FSPool, FSUnpool])
def test_parameters(cls: type[FSPool | FSUnpool]) -> None:
    layer = cls(3, 5, dtype=torch.float64)
    assert [(name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters()] == [
        ("weight", (3, 6), torch.float64)
    ]
    assert cls(2, device="meta").weight.device.type == "meta"
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    other = cls(3, 5, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same.weight, layer.weight)


def test_new_weights_are_standard_normal() -> None:
    weight = FSPool(100, 99).weight
    assert abs(weight.mean()) < 0.05
    assert abs(weight.std() - 1) < 0.05


def test_meta_device() -> None:
    pool, unpool = FSPool(3, device="meta"), FSUnpool(3, device="meta")
    vector, permutation = pool(torch.rand(2, 4, 3, device="meta"), return_permutation=True)
    assert vector.device.type == permutation.device.type == unpool(vector, permutation).device.type == "meta"


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (FSPool(3), "FSPool(3, pieces=20)"),
        (FSPool(3, 5, relaxed=0.1), "FSPool(3, pieces=5, relaxed=0.1)"),
        (FSUnpool(2), "FSUnpool(2, pieces=20)"),
    ],
)
def test_repr(layer: nn.Module, text: str) -> None:
    assert repr(layer) == text


@pytest.mark.parametrize("cls", [FSPool, FSUnpool])
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "`in_channels` must be at least 1, got 0", (0,)),
        (TypeError, r"`in_channels` must be an integer, got 2.5 \(float\)", (2.5,)),
        (ValueError, "`pieces` must be at least 1, got 0", (3, 0)),
        (TypeError, r"`pieces` must be an integer, got '5' \(str\)", (3, "5")),
    ],
)
def test_refuses_numbers(
    cls: type[nn.Module], error: type[Exception], message: str, arguments: tuple[Any, ...]
) -> None:
    with pytest.raises(error, match=message):
        cls(*arguments)


@pytest.mark.parametrize("relaxed", [0, -1.0, float("nan")])
def test_refuses_temperatures(relaxed: float) -> None:
    with pytest.raises(ValueError, match=f"`relaxed` must be positive, got {relaxed}"):
        FSPool(3, relaxed=relaxed)


def test_refuses_sets_of_other_channels() -> None:
    with pytest.raises(ValueError, match=r"`elements` must have shape \(B, N, 3\), got float32 of shape \(2, 5, 4\)"):
        FSPool(3)(torch.rand(2, 5, 4))
    with pytest.raises(ValueError, match=r"`vector` must have shape \(B, 3\), got float32 of shape \(2, 4\)"):
        FSUnpool(3)(torch.rand(2, 4), torch.zeros(2, 5, 4, dtype=torch.long))
