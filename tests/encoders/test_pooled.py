"""PooledEncoder: its numbers; what every encoder must do is in test_protocol.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from setpred import FSPool, PooledEncoder
from tests import oracles


@pytest.mark.parametrize("pool", ["fspool", "sum", "mean", "max"])
@pytest.mark.parametrize("scaling", ["conditioned", "dspn", "idspn"])
@given(
    size=st.integers(1, 5),
    layers=st.integers(1, 3),
    size_feature=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_formula(
    scaling: str, pool: str, size: int, layers: int, size_feature: bool, masked: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    options = {"pool": pool, "size_feature": size_feature, "scaling": scaling}
    encoder = PooledEncoder(2, 4, 5, layers=layers, **options, dtype=torch.float64)
    for layer in encoder.layers:
        nn.init.normal_(layer.bias)
    elements, mask = torch.randn(2, size, 2, dtype=torch.float64), torch.rand(2, size, dtype=torch.float64)
    expected = oracles.set_encoder(
        elements,
        mask if masked else torch.ones_like(mask),
        [(layer.weight, layer.bias) for layer in encoder.layers],
        pool,
        encoder.pool.fspool.weight if pool == "fspool" else None,
        pairs=False,
        size_feature=size_feature,
        scaling=scaling,
    )
    torch.testing.assert_close(encoder(elements, mask if masked else None), expected, rtol=1e-9, atol=1e-9)


def test_layers_have_the_published_shapes() -> None:
    encoder = PooledEncoder(2, 64, 256)
    shapes = [tuple(layer.weight.shape) for layer in encoder.layers]
    assert shapes == [(256, 3), (256, 256), (64, 256)]
    assert encoder.pool.fspool.weight.shape == (64, 21)


def test_takes_a_pool_of_ones_own() -> None:
    pool = FSPool(4, 7)
    encoder = PooledEncoder(2, 4, 8, pool=pool)
    named = PooledEncoder(2, 4, 8, scaling="dspn")
    named.load_state_dict(encoder.state_dict() | {"pool.fspool.weight": torch.rand(4, 21)}, strict=False)
    elements = torch.rand(3, 5, 2)
    with torch.no_grad():
        named.pool.fspool.weight.copy_(torch.ones(4, 21))
        pool.weight.copy_(torch.ones(4, 8))
    torch.testing.assert_close(encoder(elements), 5 * named(elements))  # the named one is a mean over rows
    before = pool.weight.clone()
    encoder.reset_parameters()
    assert torch.equal(pool.weight, before)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "`layers` must be at least 1, got 0", {"layers": 0}),
        (TypeError, "`layers` must be an integer, got 1.5", {"layers": 1.5}),
    ],
)
def test_refuses(error: type[Exception], message: str, options: dict[str, float]) -> None:
    with pytest.raises(error, match=message):
        PooledEncoder(2, 4, **options)
