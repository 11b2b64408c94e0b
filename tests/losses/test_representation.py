"""Representation loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from setpred import RepresentationLoss, representation_loss
from tests import devices, oracles

KINDS = pytest.mark.parametrize("kind", ["huber", "mse"])


@KINDS
@given(batch=st.integers(1, 4), features=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_equals_the_formula(kind: str, batch: int, features: int, seed: int) -> None:
    torch.manual_seed(seed)
    representation, target = 2 * torch.randn(2, batch, features, dtype=torch.float64)
    expected = oracles.representation_loss(representation, target, kind)
    for reduction, value in {"none": expected, "sum": expected.sum(), "mean": expected.mean()}.items():
        actual = representation_loss(representation, target, kind=kind, reduction=reduction)
        torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-9)
        module = RepresentationLoss(kind, reduction=reduction)
        assert torch.equal(module(representation, target), actual)


@KINDS
def test_gradients(kind: str) -> None:
    inputs = tuple((3 * torch.randn(2, 3, 4, dtype=torch.float64)).requires_grad_().unbind())
    loss = RepresentationLoss(kind, reduction="none")
    assert devices.gradcheck(loss, inputs)
    assert devices.gradgradcheck(loss, inputs)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    representation, target = (300 * torch.randn(2, 3, 4)).to(dtype)  # squares overflow float16
    actual = representation_loss(representation, target, kind=kind)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, representation_loss(representation.float(), target.float(), kind=kind))


def test_mixed_dtypes_take_the_wider() -> None:
    assert representation_loss(torch.rand(1, 2), torch.rand(1, 2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(("reduction", "shape"), [("mean", ()), ("sum", ()), ("none", (0,))])
def test_an_empty_batch_costs_nothing(reduction: str, shape: tuple[int, ...]) -> None:
    empty = torch.rand(0, 3, requires_grad=True)
    value = representation_loss(empty, torch.rand(0, 3), reduction=reduction)
    assert torch.equal(value, torch.zeros(shape))
    value.sum().backward()


@pytest.mark.parametrize(
    ("error", "message", "representation", "target"),
    [
        (ValueError, r"`representation` must have shape \(B, D\), got .*\(2,\)", torch.rand(2), torch.rand(2)),
        (ValueError, r"`target` must have shape \(2, 3\), got .*\(3, 3\)", torch.rand(2, 3), torch.rand(3, 3)),
        (ValueError, r"`target` must have shape \(2, 3\), got .*\(2, 1\)", torch.rand(2, 3), torch.rand(2, 1)),
        (TypeError, "`target` must have a floating dtype, got int64", torch.rand(2, 3), torch.ones(2, 3).long()),
        (TypeError, "`representation` must be a tensor", [0.0], torch.rand(2, 3)),
    ],
)
def test_refuses(error: type[Exception], message: str, representation: Tensor, target: Tensor) -> None:
    with pytest.raises(error, match=message):
        representation_loss(representation, target)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("`kind` must be one of 'huber', 'mse', got 'l2'", {"kind": "l2"}),
        ("`reduction` must be one of 'mean', 'sum', 'none', got 'max'", {"reduction": "max"}),
    ],
)
def test_refuses_choices(message: str, options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=message):
        RepresentationLoss(**options)
    with pytest.raises(ValueError, match=message):
        representation_loss(torch.rand(1, 2), torch.rand(1, 2), **options)


def test_repr_says_the_choices() -> None:
    assert repr(RepresentationLoss("mse", reduction="sum")) == "RepresentationLoss('mse', reduction='sum')"
