"""RelationEncoder: its numbers; what every encoder must do is in test_protocol.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from setpred import RelationEncoder
from tests import oracles


@pytest.mark.parametrize("pool", ["fspool", "sum", "mean", "max"])
@pytest.mark.parametrize("scaling", ["conditioned", "dspn", "idspn"])
@given(size=st.integers(1, 4), size_feature=st.booleans(), masked=st.booleans(), seed=st.integers(0, 2**31))
def test_equals_the_formula(scaling: str, pool: str, size: int, size_feature: bool, masked: bool, seed: int) -> None:
    torch.manual_seed(seed)
    encoder = RelationEncoder(2, 4, 5, pool=pool, size_feature=size_feature, scaling=scaling, dtype=torch.float64)
    nn.init.normal_(encoder.pair.bias)
    nn.init.normal_(encoder.out.bias)
    elements, mask = torch.randn(2, size, 2, dtype=torch.float64), torch.rand(2, size, dtype=torch.float64)
    expected = oracles.set_encoder(
        elements,
        mask if masked else torch.ones_like(mask),
        [(encoder.pair.weight, encoder.pair.bias), (encoder.out.weight, encoder.out.bias)],
        pool,
        encoder.pool.fspool.weight if pool == "fspool" else None,
        pairs=True,
        size_feature=size_feature,
        scaling=scaling,
    )
    torch.testing.assert_close(encoder(elements, mask if masked else None), expected, rtol=1e-9, atol=1e-9)


def test_layers_have_the_published_shapes() -> None:
    encoder = RelationEncoder(18, 64, 512)
    assert encoder.pair.weight.shape == (512, 2 * 19)
    assert encoder.out.weight.shape == (64, 512)


def test_a_pool_of_ones_own_sees_all_ordered_pairs() -> None:
    class Rows(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            self.shape = rows.shape
            return rows.sum(1)

    encoder = RelationEncoder(2, 4, 8, pool=Rows(), size_feature=True)
    assert encoder(torch.rand(3, 5, 2)).shape == (3, 4)
    assert encoder.pool.shape == (3, 25, 3)
