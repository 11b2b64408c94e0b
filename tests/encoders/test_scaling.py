"""Scalings: how curved the inner loss of a fresh encoder is, and the published ones to the letter."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from setpred import FSPool, GradientDescent, PooledEncoder, RelationEncoder
from setpred.encoders.base import EncoderBase
from setpred.encoders.scaling import SCALINGS
from tests import oracles
from tests.encoders.curvature import POOLS, curvature, make, starts
from tests.rules import paper_decoder

EVERY_CLASS = pytest.mark.parametrize("cls", [PooledEncoder, RelationEncoder])
EVERY_POOL = pytest.mark.parametrize("pool", POOLS)
EVERY_SCALING = pytest.mark.parametrize("scaling", SCALINGS)
DOUBLE = {"dtype": torch.float64}


def layers(encoder: EncoderBase) -> list[nn.Linear]:
    return [module for module in encoder.modules() if isinstance(module, nn.Linear)]


def weights(encoder: EncoderBase) -> list[tuple[Tensor, Tensor]]:
    return [(layer.weight, layer.bias) for layer in layers(encoder)]


# Curvature


@EVERY_POOL
@pytest.mark.parametrize("layers", [0, 1, 2, 4])  # 0: pairs
@pytest.mark.parametrize("features", [16, 1024])
@pytest.mark.parametrize("channels", [1, 18])
@pytest.mark.parametrize("size", [4, 512])
def test_curvature_does_not_depend_on_sizes(size: int, channels: int, features: int, layers: int, pool: str) -> None:
    if layers == 0 and size == 512:
        size, features = 48, min(features, 512)  # of pairs
    values = []
    for seed in range(3):
        torch.manual_seed(seed)
        encoder = make(channels, features, 64, layers, pool=pool, size_feature=seed == 0)
        values.append(curvature(encoder, *starts(size, channels)[seed], iterations=10))
    # In a maximum over many elements of many channels more of them take part than its formula knows of.
    least = 0.05 if pool == "max" and size == 512 else 0.2
    assert least < torch.tensor(values).median() < 2
    assert min(values) > least / 2
    assert max(values) < 4


def test_curvature_is_the_largest_eigenvalue_of_the_hessian() -> None:
    encoder = PooledEncoder(2, 6, 8, **DOUBLE)
    elements, mask = torch.randn(1, 4, 2, **DOUBLE), torch.rand(1, 4, **DOUBLE)
    z = encoder(elements, mask).detach()

    def loss(y: Tensor) -> Tensor:
        return 0.5 * (encoder(y[..., :-1], y[..., -1]) - z).square().mean()

    y = torch.cat([elements, mask.unsqueeze(-1)], -1)
    hessian = torch.autograd.functional.hessian(loss, y).view(12, 12)
    largest = torch.linalg.eigvalsh(hessian)[-1].item()
    assert curvature(encoder, elements, mask, iterations=200) == pytest.approx(largest, rel=1e-6)


# Parameters


@EVERY_CLASS
@EVERY_SCALING
def test_reset_draws_what_the_scaling_says(cls: type[EncoderBase], scaling: str) -> None:
    encoder = cls(2, 5, 6, scaling=scaling)
    torch.manual_seed(0)
    encoder.reset_parameters()
    torch.manual_seed(0)
    for layer in layers(encoder):
        weight, bias = torch.empty_like(layer.weight), torch.zeros_like(layer.bias)
        if scaling == "conditioned":
            weight.normal_(std=math.sqrt(2 / layer.in_features))
        elif scaling == "dspn":
            nn.init.xavier_uniform_(weight)
        else:
            default = nn.Linear(layer.in_features, layer.out_features)
            weight, bias = default.weight, default.bias
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.bias, bias)
    assert torch.equal(encoder.pool.fspool.weight, torch.randn(5, 21))


@EVERY_CLASS
@EVERY_POOL
def test_states_go_from_scaling_to_scaling(cls: type[EncoderBase], pool: str) -> None:
    elements, mask = torch.randn(2, 4, 3), torch.rand(2, 4)
    encoders = {scaling: cls(3, 5, 6, pool=pool, scaling=scaling) for scaling in SCALINGS}
    for encoder in encoders.values():
        encoder.load_state_dict(encoders["dspn"].state_dict())
        ratio = encoder(elements, mask) / encoders["dspn"](elements, mask)
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))  # they differ by a factor


@EVERY_CLASS
@EVERY_SCALING
def test_a_pool_of_ones_own_is_not_scaled(cls: type[EncoderBase], scaling: str) -> None:
    encoder, named = cls(3, 5, 6, pool=FSPool(5)), cls(3, 5, 6, pool="sum", scaling="dspn")
    named.load_state_dict(encoder.state_dict(), strict=False)
    nn.init.ones_(encoder.pool.weight)
    elements, mask = torch.randn(2, 4, 3), torch.rand(2, 4)
    torch.testing.assert_close(encoder(elements, mask), named(elements, mask))


@EVERY_CLASS
@EVERY_POOL
@pytest.mark.parametrize("size", [1, 2])
def test_sets_of_one(cls: type[EncoderBase], pool: str, size: int) -> None:
    assert cls(3, 5, 6, pool=pool)(torch.randn(2, size, 3)).isfinite().all()


@pytest.mark.parametrize("pool", ["sum", "mean", "max"])  # before PyTorch 2.13, FSPool is not exported for every size
@EVERY_SCALING
def test_sizes_may_be_symbols(scaling: str, pool: str) -> None:
    encoder = RelationEncoder(3, 5, 6, pool=pool, size_feature=True, scaling=scaling)
    sizes = {1: torch.export.Dim("n", min=2, max=64)}
    example = torch.randn(2, 6, 3), torch.rand(2, 6)
    exported = torch.export.export(encoder, example, dynamic_shapes={"elements": sizes, "mask": sizes}).module()
    for size in (4, 9):
        elements, mask = torch.randn(2, size, 3), torch.rand(2, size)
        torch.testing.assert_close(exported(elements, mask), encoder(elements, mask))


@EVERY_POOL
def test_compiles_once_for_all_sizes(pool: str) -> None:
    torch._dynamo.reset()
    encoder, counter = RelationEncoder(3, 5, 6, pool=pool, size_feature=True), CompileCounter()
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True, backend=counter)
    for size in (5, 8, 11):
        elements, mask = torch.randn(2, size, 3), torch.rand(2, size)
        torch.testing.assert_close(compiled(elements, mask), encoder(elements, mask))
    assert counter.frame_count == 1


# The published scalings


@EVERY_CLASS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dspn_divides_by_the_rows_and_does_no_more(cls: type[EncoderBase], dtype: torch.dtype) -> None:
    encoder = cls(3, 5, 6, size_feature=True, scaling="dspn", dtype=dtype)
    elements, mask = torch.randn(2, 7, 3, dtype=dtype), torch.rand(2, 7, dtype=dtype)
    rows = encoder._rows(torch.cat([elements, mask.unsqueeze(-1)], -1)).movedim(0, -1)
    expected = torch.cat([encoder.pool.fspool(rows) / rows.shape[1], 4 * mask.mean(1, keepdim=True)], 1)
    assert torch.equal(encoder(elements, mask), expected)


@pytest.mark.parametrize("pairs", [False, True])
def test_idspn_is_the_published_encoder(pairs: bool) -> None:
    """Of as many elements, or pairs, as FSPool has knots, a published weight for each rank is one of ours."""
    size, options = (3, {}) if pairs else (9, {"layers": 2})
    cls, rows = RelationEncoder if pairs else PooledEncoder, size**2 if pairs else size
    encoder = cls(2, 5, 6, scaling="idspn", **options, **DOUBLE)
    encoder.pool.fspool = FSPool(5, rows - 1, **DOUBLE)
    elements, mask = torch.randn(3, size, 2, **DOUBLE), torch.rand(3, size, **DOUBLE)
    published = encoder.pool.fspool.weight.T.flip(0) / math.sqrt(rows)  # of deviation 1/sqrt(rows), ranks ascending
    set_ = torch.cat([elements, mask.unsqueeze(-1)], -1)
    expected = oracles.idspn_encoder(set_, weights(encoder), published, pairs=pairs)
    torch.testing.assert_close(encoder(elements, mask), expected, rtol=1e-9, atol=1e-9)


def test_idspn_to_the_letter_with_a_pool_of_ones_own() -> None:
    """As the docstring of `PooledEncoder` has it: the published parameters too, for one size of sets."""
    size, pool = 9, FSPool(500, pieces=8, **DOUBLE)
    nn.init.normal_(pool.weight, std=size**-0.5)
    encoder = PooledEncoder(2, 500, 6, layers=2, pool=pool, scaling="idspn", **DOUBLE)
    assert pool.weight.std().item() == pytest.approx(1 / 3, rel=0.1)
    elements, mask = torch.randn(1, size, 2, **DOUBLE), torch.rand(1, size, **DOUBLE)
    set_ = torch.cat([elements, mask.unsqueeze(-1)], -1)
    expected = oracles.idspn_encoder(set_, weights(encoder), pool.weight.T.flip(0), pairs=False)
    torch.testing.assert_close(encoder(elements, mask), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_idspn_scales_no_other_pool(pool: str) -> None:
    encoder = PooledEncoder(2, 5, 6, layers=2, pool=pool, scaling="idspn", **DOUBLE)
    elements, mask = torch.randn(3, 4, 2, **DOUBLE), torch.rand(3, 4, **DOUBLE)
    set_ = torch.cat([elements, mask.unsqueeze(-1)], -1)
    expected = [oracles.pool([oracles.mlp(x, weights(encoder)) for x in members], pool, None) for members in set_]
    torch.testing.assert_close(encoder(elements, mask), torch.stack(expected), rtol=1e-9, atol=1e-9)


# One learning rate for all sizes


@EVERY_POOL
@pytest.mark.parametrize(("size", "features"), [(4, 256), (32, 64), (256, 32)])
def test_one_learning_rate_fits_all_sizes(size: int, features: int, pool: str) -> None:
    torch.manual_seed(0)
    decoder = paper_decoder(
        PooledEncoder(2, features, 128, pool=pool),
        *(20, GradientDescent(1.0, momentum=0.8, nesterov=True), None),
        set_size=size,
        channels=2,
        repr_loss="mse",
    )
    z = decoder.encoder(torch.rand(4, size, 2)).detach()
    loss = decoder(z).trajectory.repr_loss
    assert (loss[-1] < 0.3 * loss[0]).all()
