"""AttentionEncoder: its numbers, masks, equal elements; what every encoder must do is in test_protocol.py."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize

from setpred import AttentionEncoder, DSPNDecoder, FSPool, HungarianLoss, PooledEncoder
from setpred.encoders.attention import _Attention, _bounded
from tests import oracles
from tests.encoders.curvature import curvature, starts

DOUBLE = {"dtype": torch.float64}
POINTS = pytest.mark.parametrize("points", [None, 3])
POOLS = pytest.mark.parametrize("pool", ["fspool", "attention"])


def drawn(encoder: AttentionEncoder) -> AttentionEncoder:
    """Parameters of which none is 0, as after training."""
    for parameter in encoder.parameters():
        nn.init.normal_(parameter)
    return encoder


@POINTS
@POOLS
@settings(max_examples=15)
@given(
    size=st.integers(1, 4),
    layers=st.integers(1, 2),
    heads=st.sampled_from([1, 2, 3]),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_formula(
    pool: str, points: int | None, size: int, layers: int, heads: int, masked: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    own = FSPool(4, **DOUBLE) if pool == "fspool" else "attention"  # one of one's own is not scaled
    encoder = drawn(AttentionEncoder(2, 4, 6, layers=layers, heads=heads, inducing_points=points, pool=own, **DOUBLE))
    elements, mask = torch.randn(2, size, 2, **DOUBLE), torch.rand(2, size, **DOUBLE).round(decimals=1)
    expected = oracles.attention_encoder(encoder, elements, mask if masked else torch.ones_like(mask))
    torch.testing.assert_close(encoder(elements, mask if masked else None), expected, rtol=1e-9, atol=1e-9)


def test_attention_is_that_of_pytorch() -> None:
    """Of present elements and one of zeros more, with what goes into a product bounded before."""
    block, x, y = (
        _Attention(6, 2, 1.0, device=None, **DOUBLE),
        torch.randn(3, 4, 6, **DOUBLE),
        torch.randn(3, 5, 6, **DOUBLE),
    )
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    present = torch.tensor([[True] * 5, [True, False, True, False, False], [False] * 5])

    def bounded(rows: Tensor) -> Tensor:
        return _bounded(rows.unflatten(-1, (2, 3))).flatten(-2)

    attention = nn.MultiheadAttention(6, 2, add_zero_attn=True, batch_first=True, **DOUBLE)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.eye(6, **DOUBLE).repeat(3, 1))
        attention.in_proj_bias.zero_()
        attention.out_proj.load_state_dict(block.out.state_dict())
    attended, _ = attention(bounded(block.query(x)), bounded(block.key(y)), block.value(y), key_padding_mask=~present)
    expected = x + attended
    expected = expected + block.feed(expected).relu()
    torch.testing.assert_close(block(x, y, present.double()), expected)


def test_bounded_vectors() -> None:
    x = torch.randn(5, 16, **DOUBLE)
    torch.testing.assert_close(_bounded(1e-6 * x), 1e-6 * x)
    torch.testing.assert_close(_bounded(1e6 * x).norm(dim=-1), torch.full((5,), 4.0, **DOUBLE))
    torch.testing.assert_close(_bounded(x) / _bounded(x).norm(dim=-1, keepdim=True), x / x.norm(dim=-1, keepdim=True))


# Masks


@POINTS
def test_absent_elements_do_not_matter(points: int | None) -> None:
    encoder = drawn(AttentionEncoder(2, 4, 6, heads=2, inducing_points=points, pool="attention", **DOUBLE))
    elements, rest = torch.randn(3, 4, 2, **DOUBLE), 100 * torch.randn(3, 5, 2, **DOUBLE)
    mask = torch.rand(3, 4, **DOUBLE)
    padded = torch.cat([elements, rest], 1), torch.cat([mask, torch.zeros(3, 5, **DOUBLE)], 1)
    torch.testing.assert_close(encoder(*padded), encoder(elements, mask), rtol=1e-12, atol=1e-12)
    elements = padded[0].requires_grad_()
    (gradient,) = torch.autograd.grad(encoder(elements, padded[1]).square().sum(), elements)
    assert gradient[:, :4].all()
    assert not gradient[:, 4:].any()


@POINTS
@POOLS
def test_a_bool_mask_cuts(pool: str, points: int | None) -> None:
    encoder = drawn(AttentionEncoder(2, 4, 6, heads=2, inducing_points=points, pool=pool))
    elements, mask = torch.randn(2, 4, 2), torch.tensor([[True, True, False, True], [False] * 4])
    expected = encoder(elements * mask.unsqueeze(-1), mask.float())
    broken = elements.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    vector = encoder(broken, mask)
    torch.testing.assert_close(vector, expected)
    vector.sum().backward()
    assert broken.grad.isfinite().all()
    assert not torch.allclose(expected[0], encoder(elements)[0])


@POINTS
def test_an_empty_set_has_a_vector_and_a_way_out(points: int | None) -> None:
    encoder = AttentionEncoder(2, 4, 8, inducing_points=points, pool="attention", **DOUBLE)
    mask = torch.zeros(2, 3, **DOUBLE, requires_grad=True)
    vector = encoder(torch.randn(2, 3, 2, **DOUBLE), mask)
    torch.testing.assert_close(vector[0], vector[1])
    of_mask, _ = torch.autograd.grad(vector.square().sum() + vector.sum(), [mask, encoder.pool.seed])
    assert of_mask.isfinite().all()
    assert of_mask.all()


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_mask_comes_in_gradually(scale: float) -> None:
    """Its slope is bounded, however strongly an element is attended to."""
    encoder = AttentionEncoder(2, 4, 64, pool="attention", **DOUBLE)
    with torch.no_grad():
        for block in (encoder.layers[0].spread, encoder.pool.attention):
            block.query.weight.mul_(scale)
            block.key.weight.mul_(scale)
    elements = torch.randn(1, 5, 2, **DOUBLE)
    share = torch.linspace(0, 1, 201, **DOUBLE)
    mask = torch.ones(201, 5, **DOUBLE).index_fill(1, torch.tensor([2]), 0) + share.unsqueeze(1) * torch.eye(5)[2]
    vectors = encoder(elements.expand(201, -1, -1), mask).detach()
    slopes = (vectors[1:] - vectors[:-1]).norm(dim=1) / (share[1] - share[0])
    assert slopes.max() < 10 * (vectors[0].norm() + vectors[-1].norm())


# Equal elements


@POINTS
@POOLS
def test_multiplicities_are_seen(pool: str, points: int | None) -> None:
    encoder = AttentionEncoder(2, 16, 32, inducing_points=points, pool=pool, **DOUBLE)
    one, other = torch.randn(2, 1, 1, 2, **DOUBLE)
    sets = [one, one.repeat(1, 2, 1), one.repeat(1, 3, 1), torch.cat([one, other], 1), torch.cat([one, one, other], 1)]
    vectors = torch.cat([encoder(elements) for elements in sets])
    distances = torch.cdist(vectors, vectors) + torch.eye(5)
    assert distances.min() > 0.05 * vectors.norm(dim=1).max()
    halves = encoder(one.repeat(1, 2, 1), torch.full((1, 2), 0.5, **DOUBLE))
    assert not torch.allclose(halves, vectors[:1], rtol=1e-3)


# Curvature


@pytest.mark.parametrize("pool", ["fspool", "sum", "mean", "max"])
def test_a_pool_by_name_is_divided_as_in_other_encoders(pool: str) -> None:
    """One of one's own is not."""
    elements = torch.randn(3, 7, 2, **DOUBLE)
    ratios = []
    for cls in (AttentionEncoder, PooledEncoder):
        encoder, own = (cls(2, 6, 8, pool=pool, **DOUBLE) for _ in range(2))
        own.load_state_dict(encoder.state_dict())
        own.pool = nn.Sequential(own.pool)
        ratios.append((own(elements) / encoder(elements)).flatten())
    torch.testing.assert_close(torch.cat(ratios), ratios[0][:1].expand(36))
    assert ratios[0][0] > 0


@POINTS
@pytest.mark.parametrize("pool", ["fspool", "sum", "attention"])
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("features", [16, 1024])
@pytest.mark.parametrize("channels", [1, 18])
@pytest.mark.parametrize("size", [4, 128])
def test_curvature_does_not_depend_on_sizes(
    size: int, channels: int, features: int, layers: int, pool: str, points: int | None
) -> None:
    values = []
    for seed in range(3):
        torch.manual_seed(seed)
        encoder = AttentionEncoder(channels, features, 64, layers=layers, inducing_points=points, pool=pool)
        values.append(curvature(encoder, *starts(size, channels)[seed], iterations=10))
    assert 0.15 < torch.tensor(values).median() < 2.5  # a few corners of the grid are outside of 0.2 to 2
    assert min(values) > 0.1
    assert max(values) < 6


# What lives in layers, and decoding


def test_what_lives_in_a_layer_is_called() -> None:
    encoder, seen = AttentionEncoder(2, 4, 8, layers=2, inducing_points=3, pool="attention"), set()
    elements = torch.randn(2, 5, 2)
    expected = encoder(elements)
    layers = [module for module in encoder.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.add(module))
        parametrize.register_parametrization(layer, "weight", nn.Identity())
    torch.testing.assert_close(encoder(elements), expected)
    assert seen == set(layers)


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"differentiate": "implicit"}])
@pytest.mark.parametrize("clamp", [(0.0, 1.0), None])
@POINTS
@POOLS
def test_decodes_in_every_mode(pool: str, points: int | None, clamp: Any, options: dict[str, Any]) -> None:
    encoder = AttentionEncoder(2, 6, 8, heads=2, inducing_points=points, pool=pool, **DOUBLE)
    decoder = DSPNDecoder(
        encoder, 3, mask_clamp=clamp, set_size=4, channels=2, anchor=0.1, repr_loss="mse", **options, **DOUBLE
    )
    target = torch.randn(3, 4, 2, **DOUBLE)
    z = encoder(target)
    elements, mask, _ = decoder(z)
    HungarianLoss()(elements, target, mask).backward()
    for name, parameter in decoder.named_parameters():
        if name != "encoder.out.bias":  # no inner gradient depends on it where the encoding does not
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            again = decoder(z.detach())
        torch.testing.assert_close(again.elements, elements.detach())
    alone = decoder(z[1:2].detach())
    torch.testing.assert_close(alone.elements, elements[1:2].detach())


@POOLS
def test_decodes_what_it_encodes(pool: str) -> None:
    encoder = AttentionEncoder(2, 64, 128, pool=pool, **DOUBLE)
    decoder = DSPNDecoder.recommended(encoder, set_size=4, channels=2)
    z = encoder(torch.randn(8, 4, 2, **DOUBLE)).detach()
    loss = decoder(z, iters=60, record=True).trajectory.repr_loss
    assert loss[-1].median() < 0.05 * loss[0].median()


@POOLS
def test_compiles_once_for_all_sizes(pool: str) -> None:
    torch._dynamo.reset()
    encoder, counter = AttentionEncoder(2, 4, 8, pool=pool), CompileCounter()
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True, backend=counter)
    for size in (5, 8, 11):
        elements, mask = torch.randn(2, size, 2), torch.rand(2, size)
        torch.testing.assert_close(compiled(elements, mask), encoder(elements, mask))
    assert counter.frame_count == 1


def test_large_logits_do_not_overflow() -> None:
    half = {"dtype": torch.float16}  # which holds no exp(16)
    block, x = _Attention(2**8, 1, 1.0, device=None, **half), torch.full((1, 1, 2**8), 30.0, **half)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        for layer in (block.query, block.key, block.value, block.out):
            layer.weight.fill_diagonal_(1)
    both = torch.cat([x, -x], 1)  # of norm 16, and logits of 16 and -16
    for present, weight in ((1.0, 1.0), (0.0, 0.0)):
        mask = torch.tensor([[present, 1.0]], **half)
        torch.testing.assert_close(block(x, both, mask), (1 + weight) * x, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (ValueError, "`in_channels` must be at least 1, got 0", (0, 5), {}),
        (ValueError, "`out_channels` must be at least 1, got 0", (2, 0), {}),
        (ValueError, "`hidden_channels` must be at least 1, got 0", (2, 5, 0), {}),
        (ValueError, "`hidden_channels` must be a multiple of `heads`, got 6 and 4", (2, 5, 6), {}),
        (ValueError, "`layers` must be at least 1, got 0", (2, 5), {"layers": 0}),
        (TypeError, "`heads` must be an integer, got 2.5", (2, 5), {"heads": 2.5}),
        (ValueError, "`inducing_points` must be at least 1, got 0", (2, 5), {"inducing_points": 0}),
        (ValueError, "`pool` must be one of 'fspool', 'sum', .*, 'attention', got 'pma'", (2, 5), {"pool": "pma"}),
    ],
)
def test_refuses_numbers(
    error: type[Exception], message: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        AttentionEncoder(*arguments, **options)


def test_repr() -> None:
    text = repr(AttentionEncoder(2, 4, 8, inducing_points=3))
    assert text.startswith("AttentionEncoder(\n  2, 4, inducing_points=3\n")
    assert "(pool): Pool(\n    'fspool'" in text
    assert "(pool): _AttentionPool(" in repr(AttentionEncoder(2, 4, 8, pool="attention"))
