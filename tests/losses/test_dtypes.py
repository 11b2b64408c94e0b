"""One rule of dtypes (docs/guides/amp.md), over all pairs of them, under autocast too.

What is compared is computed in the dtype that both sides promote to, float32 at least; what an encoder is given is cast
to the dtype of its parameters.
"""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from setpred import (
    ChamferLoss,
    DSPNLoss,
    HungarianLoss,
    PooledEncoder,
    RelationEncoder,
    SinkhornLoss,
    SlicedWassersteinLoss,
    representation_loss,
)
from setpred.functional import entropic_transport, nearest_neighbours, paired_cost, pairwise_cost
from tests import devices
from tests.rules import paper_decoder

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
B, N, M, C, D = 3, 5, 4, 2, 8
pairs = pytest.mark.parametrize(
    ("left", "right"), list(product(FLOATS, FLOATS)), ids=lambda dtype: str(dtype).removeprefix("torch.")
)
autocast = pytest.mark.parametrize("reduced", [None, torch.bfloat16])
every_loss = pytest.mark.parametrize(
    "loss",
    [
        *(kind(presence=presence) for kind in (HungarianLoss, ChamferLoss) for presence in ("feature", "bce", "none")),
        *(SinkhornLoss(iters=2, presence=presence) for presence in ("feature", "none")),
        SlicedWassersteinLoss(directions=torch.eye(C + 1)),
        SlicedWassersteinLoss(directions=torch.eye(C), presence="none"),
    ],
    ids=str,
)


def promoted(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def cast(reduced: torch.dtype | None) -> torch.autocast:
    return devices.autocast(reduced or torch.bfloat16, enabled=reduced is not None)


@every_loss
@pairs
@autocast
def test_set_losses(loss: nn.Module, left: torch.dtype, right: torch.dtype, reduced: torch.dtype | None) -> None:
    wide = promoted(left, right)
    pred, target = torch.rand(B, N, C).to(left), torch.rand(B, M, C).to(right)
    pred_mask, target_mask = torch.rand(B, N), torch.rand(B, M) < 0.6
    for of_pred, of_target in zip((torch.float32, *FLOATS), (torch.bool, *FLOATS), strict=True):
        inputs = pred.clone().requires_grad_(), pred_mask.to(of_pred).requires_grad_()
        exact = [x.detach().to(wide).requires_grad_() for x in inputs]
        with cast(reduced):
            value = loss(inputs[0], target, inputs[1], target_mask.to(of_target))
        expected = loss(exact[0], target.to(wide), exact[1], target_mask)
        assert value.dtype == wide
        assert torch.equal(value, expected)
        found, wanted = (
            torch.autograd.grad(v, x, materialize_grads=True) for v, x in ((value, inputs), (expected, exact))
        )
        for one, other, x in zip(found, wanted, inputs, strict=True):
            assert one.dtype == x.dtype
            assert torch.equal(one, other.to(x.dtype))


@pairs
@autocast
@pytest.mark.parametrize("kind", ["huber", "mse"])
def test_representation_loss(left: torch.dtype, right: torch.dtype, reduced: torch.dtype | None, kind: str) -> None:
    encoded, z, wide = torch.rand(B, D).to(left), torch.rand(B, D).to(right), promoted(left, right)
    with cast(reduced):
        value = representation_loss(encoded, z, kind=kind)
    assert value.dtype == wide
    assert torch.equal(value, representation_loss(encoded.to(wide), z.to(wide), kind=kind))


@pairs
@pytest.mark.parametrize("cost", ["huber", "mse", "l1", torch.cdist])
def test_costs_and_neighbours(left: torch.dtype, right: torch.dtype, cost: object) -> None:
    x, y, wide = torch.rand(B, N, C).to(left), torch.rand(B, N, C).to(right), promoted(left, right)
    for function in (pairwise_cost, paired_cost):
        value = function(x, y, cost)
        assert value.dtype == wide
        assert torch.equal(value, function(x.to(wide), y.to(wide), cost))
    found, expected = nearest_neighbours(x, y, cost), nearest_neighbours(x.to(wide), y.to(wide), cost)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pairs
def test_transport(left: torch.dtype, right: torch.dtype) -> None:
    cost, wide = torch.rand(B, N, M).to(left), promoted(left, right)
    rows, cols = torch.full((B, N), 1 / N).to(right), torch.full((B, M), 1 / M, dtype=torch.float16)
    found = entropic_transport(cost, rows, cols, epsilon=0.1, iters=5)
    expected = entropic_transport(cost.to(wide), rows.to(wide), cols.to(wide), epsilon=0.1, iters=5)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == wide
        assert torch.equal(one, other)


HALF = {torch.bfloat16, torch.float16}  # autocast to one cannot concatenate tensors of the other


@pytest.mark.parametrize(
    ("left", "right", "reduced"),
    [case for case in product(FLOATS, FLOATS, (None, torch.bfloat16, torch.float16)) if {case[0], case[2]} != HALF],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
@pytest.mark.parametrize(("encoder", "rows"), [(PooledEncoder, N), (PooledEncoder, M), (RelationEncoder, M)])
def test_dspn_loss(
    encoder: type, rows: int, left: torch.dtype, right: torch.dtype, reduced: torch.dtype | None
) -> None:
    """Of a model in one dtype, and targets in another: the encoder is given targets in its own."""
    decoder = paper_decoder(encoder(C, D, 8), iters=2, set_size=N, channels=C).to(left)
    outer = DSPNLoss(decoder.encoder, ChamferLoss())
    z, target, mask = torch.randn(B, D), torch.rand(B, rows, C).to(right), torch.rand(B, rows) < 0.6
    for given in (None, mask, mask.to(right)):
        with cast(reduced):
            prediction = decoder(z)
            value = outer(prediction, target, given, z=z)
            own = outer(prediction, target.to(left), None if given is None else mask.to(left), z=z)
        assert value.dtype == promoted(left, right)
        torch.testing.assert_close(value, own.to(value.dtype), rtol=0.02, atol=0.01)
        value.backward()
    assert all(p.grad is not None and p.grad.dtype == left and p.grad.isfinite().all() for p in decoder.parameters())


@pairs
def test_dspn_loss_of_an_encoder_without_parameters(left: torch.dtype, right: torch.dtype) -> None:
    """It is given the target as it is."""

    def encoder(elements: Tensor, mask: Tensor | None) -> Tensor:
        assert elements.dtype == right
        assert mask is not None
        assert mask.dtype == right
        return (elements * mask.unsqueeze(-1)).sum(1)

    decoder = paper_decoder(PooledEncoder(C, C, 8), iters=2, set_size=N, channels=C).to(left)
    z, target, mask = torch.randn(B, C), torch.rand(B, N, C).to(right), torch.rand(B, N) < 0.6
    assert DSPNLoss(encoder, HungarianLoss())(decoder(z), target, mask, z=z).dtype == promoted(left, right)
