"""What every encoder must do to be decoded with, and to be a good layer."""

import copy
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from setpred import AttentionEncoder, FSPool, PooledEncoder, RelationEncoder, SetEncoder
from tests import devices
from tests.devices import gradcheck, gradgradcheck

Encoder = PooledEncoder | RelationEncoder | AttentionEncoder
POOLED = [PooledEncoder, RelationEncoder]
POOLS = ["fspool", "sum", "mean", "max"]
EVERY_CLASS = pytest.mark.parametrize("cls", [*POOLED, AttentionEncoder])
EVERY_POOLED = pytest.mark.parametrize("cls", POOLED)
# "points" and "seed" are "fspool" and "attention" with inducing points.
EVERY_KIND = pytest.mark.parametrize(
    ("cls", "pool"), [*product(POOLED, POOLS), *product([AttentionEncoder], [*POOLS, "attention", "points", "seed"])]
)
DOUBLE = {"dtype": torch.float64}


def build(cls: type[Encoder], pool: str = "fspool", *, out: int = 5, hidden: int = 6, **options: Any) -> Encoder:
    if cls is AttentionEncoder:
        if pool in ("points", "seed"):
            pool, options = "fspool" if pool == "points" else "attention", options | {"inducing_points": 3}
        return cls(2, out, hidden, heads=2 if hidden % 2 == 0 else 1, pool=pool, **options)
    return cls(2, out, hidden, pool=pool, size_feature=True, **options)


def gradients(encoder: Encoder, elements: Tensor, mask: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Of the representation loss, with respect to the set."""
    elements, mask = elements.clone().requires_grad_(), mask.clone().requires_grad_()
    of_elements, of_mask = torch.autograd.grad((encoder(elements, mask) - z).square().sum(), (elements, mask))
    return of_elements, of_mask


def as_multiset(rows: Tensor) -> Tensor:
    """Rows of one set in an order of their own."""
    return torch.stack(sorted(rows, key=lambda row: row.tolist()))


@EVERY_CLASS
def test_fits_the_protocol(cls: type[Encoder]) -> None:
    encoder = build(cls)
    assert isinstance(encoder, SetEncoder)
    assert encoder(torch.rand(3, 4, 2), None).shape == (3, 5)
    assert torch.equal(encoder(torch.ones(1, 4, 2)), encoder(torch.ones(1, 4, 2), torch.ones(1, 4)))


# Permutations (the paper, Appendix A)


@EVERY_KIND
@pytest.mark.parametrize("duplicates", [False, True])
def test_order_does_not_matter(cls: type[Encoder], pool: str, duplicates: bool) -> None:
    encoder = build(cls, pool, **DOUBLE)
    elements, mask = torch.randn(3, 6, 2, **DOUBLE), torch.rand(3, 6, **DOUBLE)
    if duplicates:
        elements[:, 3:5], mask[:, 3:5] = elements[:, :1], mask[:, :1]
    for _ in range(5):
        order = torch.randperm(6)
        torch.testing.assert_close(encoder(elements[:, order], mask[:, order]), encoder(elements, mask))


@EVERY_KIND
def test_permuting_the_set_permutes_the_gradient(cls: type[Encoder], pool: str) -> None:
    encoder = build(cls, pool, **DOUBLE)
    elements, mask, z = torch.randn(3, 6, 2, **DOUBLE), torch.rand(3, 6, **DOUBLE), torch.randn(3, 5, **DOUBLE)
    of_elements, of_mask = gradients(encoder, elements, mask, z)
    assert of_elements.any()
    assert of_mask.any()
    for _ in range(5):
        order = torch.randperm(6)
        actual = gradients(encoder, elements[:, order], mask[:, order], z)
        torch.testing.assert_close(actual, (of_elements[:, order], of_mask[:, order]))


@EVERY_KIND
def test_fspool_parts_equal_elements_and_other_pools_do_not(cls: type[Encoder], pool: str) -> None:
    def with_few_bits(x: Tensor) -> Tensor:
        return (x * 256).round() / 256

    # With few bits every row is exact: in a matrix product, rounding may differ from column to column, and so make
    # equal elements unequal.
    encoder = build(cls, pool, hidden=64, **DOUBLE)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(with_few_bits(torch.randn_like(parameter)))
        for layer in encoder.layers if cls is AttentionEncoder and pool in ("fspool", "max", "points") else ():
            layer.spread.out.weight.zero_()  # what is attended to has many bits, by which these would part equal rows
    elements, mask = with_few_bits(torch.randn(1, 6, 2, **DOUBLE)), with_few_bits(torch.rand(1, 6, **DOUBLE))
    elements[:, 3:5], mask[:, 3:5] = elements[:, :1], mask[:, :1]
    elements[:, 5], mask[:, 5] = elements[:, 1], mask[:, 1]
    z = torch.randn(1, 5, **DOUBLE)
    (of_elements,) = gradients(encoder, elements, mask, z)[0]
    assert not torch.allclose(of_elements, of_elements[:1])
    for i, j in ((0, 3), (0, 4), (3, 4), (1, 5)):
        assert torch.allclose(of_elements[i], of_elements[j]) is (pool not in ("fspool", "points"))
    # Which of the equal ones gets which gradient is a matter of order; which gradients there are is not.
    for _ in range(5):
        order = torch.randperm(6)
        (reordered,) = gradients(encoder, elements[:, order], mask[:, order], z)[0]
        torch.testing.assert_close(as_multiset(reordered), as_multiset(of_elements))


# Batches


@EVERY_KIND
@pytest.mark.parametrize("size", [1, 3, 10])
def test_a_sample_alone_is_encoded_as_in_a_batch(cls: type[Encoder], pool: str, size: int) -> None:
    encoder = build(cls, pool, hidden=64)
    elements, mask, z = torch.rand(20, size, 2), torch.rand(20, size), torch.randn(20, 5)
    together = encoder(elements, mask), *gradients(encoder, elements, mask, z)
    for b in (0, 7, 19):
        sample = elements[b : b + 1], mask[b : b + 1]
        alone = encoder(*sample), *gradients(encoder, *sample, z[b : b + 1])
        torch.testing.assert_close(alone, tuple(part[b : b + 1] for part in together), rtol=1e-5, atol=1e-5)


@EVERY_KIND
def test_an_empty_batch_gives_no_vectors(cls: type[Encoder], pool: str) -> None:
    encoder = build(cls, pool)
    elements = torch.rand(0, 3, 2, requires_grad=True)
    vector = encoder(elements, torch.rand(0, 3))
    assert vector.shape == (0, 5)
    vector.sum().backward()
    assert elements.grad.shape == (0, 3, 2)


# Derivatives


@EVERY_KIND
def test_first_and_second_derivatives(cls: type[Encoder], pool: str) -> None:
    encoder = build(cls, pool, out=3, hidden=3, **DOUBLE)
    if pool in ("fspool", "points"):
        encoder.pool.fspool = FSPool(encoder.pool.fspool.in_channels, pieces=2, **DOUBLE)  # fewer to perturb
    for parameter in encoder.parameters():
        nn.init.normal_(parameter)
    names, parameters = zip(*encoder.named_parameters(), strict=True)

    def function(elements: Tensor, mask: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(encoder, dict(zip(names, parameters, strict=True)), (elements, mask))

    elements = torch.randn(1, 3, 2, **DOUBLE, requires_grad=True)
    mask = torch.rand(1, 3, **DOUBLE, requires_grad=True)
    assert gradcheck(function, (elements, mask, *parameters))
    assert gradgradcheck(function, (elements, mask, *parameters))


@pytest.mark.parametrize(
    ("cls", "pool"),
    [
        *[(PooledEncoder, "fspool"), (PooledEncoder, "max"), (RelationEncoder, "fspool")],
        *[(AttentionEncoder, "attention"), (AttentionEncoder, "points")],
    ],
)
def test_compiles_in_first_and_second_order(cls: type[Encoder], pool: str) -> None:
    encoder, z = build(cls, pool), torch.randn(2, 5)

    def inner_gradient(elements: Tensor, mask: Tensor) -> Tensor:
        return torch.func.grad(lambda x: (encoder(x, mask) - z).square().sum())(elements)

    elements, mask = torch.randn(2, 4, 2), torch.rand(2, 4)
    for function in (encoder, inner_gradient):
        eager = function(elements, mask)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(elements, mask)
        torch.testing.assert_close(compiled, eager)
        of_compiled, of_eager = (
            torch.autograd.grad(value.square().sum(), list(encoder.parameters()), materialize_grads=True)
            for value in (compiled, eager)
        )
        torch.testing.assert_close(of_compiled, of_eager)


# Dtypes and devices


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_follows_the_inputs(cls: type[Encoder], pool: str, dtype: torch.dtype) -> None:
    encoder = build(cls, pool, hidden=16, dtype=dtype)
    reference = copy.deepcopy(encoder).double()
    elements, mask, z = torch.rand(3, 6, 2, dtype=dtype), torch.rand(3, 6, dtype=dtype), torch.randn(3, 5, dtype=dtype)
    vector, expected = encoder(elements, mask), reference(elements.double(), mask.double())
    assert vector.dtype == dtype
    tolerance = 20 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(vector.double(), expected, rtol=0, atol=tolerance)
    for gradient in gradients(encoder, elements, mask, z):
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()


@EVERY_KIND
def test_autocast_is_close(cls: type[Encoder], pool: str) -> None:
    encoder = build(cls, pool, hidden=16)
    elements, mask, z = torch.rand(3, 6, 2), torch.rand(3, 6), torch.randn(3, 5)
    expected = encoder(elements, mask)
    with devices.autocast(torch.bfloat16):
        actual = encoder(elements, mask)
        of_elements, of_mask = gradients(encoder, elements, mask, z)
    tolerance = 20 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, check_dtype=False)
    assert of_elements.isfinite().all()
    assert of_mask.isfinite().all()


@EVERY_KIND
def test_device_follows_the_inputs(cls: type[Encoder], pool: str) -> None:
    encoder = build(cls, pool, device="meta")
    assert {p.device.type for p in encoder.parameters()} == {"meta"}
    assert encoder(torch.rand(2, 4, 2, device="meta")).device.type == "meta"


# Masks and layouts


@EVERY_POOLED
def test_bool_masks_are_zeros_and_ones(cls: type[Encoder]) -> None:
    encoder, elements = build(cls), torch.rand(2, 4, 2)
    mask = torch.tensor([[True, True, False, True], [False] * 4])
    assert torch.equal(encoder(elements, mask), encoder(elements, mask.float()))
    assert not torch.equal(encoder(elements, mask), encoder(elements))
    assert encoder(elements, mask)[:, -1].tolist() == [3.0, 0.0]  # the sum of the mask, for four elements


@EVERY_CLASS
def test_elements_in_any_memory_layout(cls: type[Encoder]) -> None:
    encoder, elements, mask = build(cls), torch.rand(3, 4, 2), torch.rand(3, 4)
    torch.testing.assert_close(encoder(elements.mT.contiguous().mT, mask.t().contiguous().t()), encoder(elements, mask))
    torch.testing.assert_close(encoder(elements[:1].expand(3, 4, 2))[2:], encoder(elements[:1]))


# State


@EVERY_KIND
def test_state(cls: type[Encoder], pool: str) -> None:
    encoder, elements = build(cls, pool), torch.rand(2, 4, 2)
    expected = encoder(elements)
    assert set(encoder.state_dict()) == {name for name, _ in encoder.named_parameters()}
    other = build(cls, pool)
    assert not torch.equal(other(elements), expected)
    other.load_state_dict(encoder.state_dict())
    for same in (other, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(same(elements), expected)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    encoder.reset_parameters()
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, before[name]) is (
            name.endswith("bias") and name != "embed.bias"  # zeros, both times
        )


@EVERY_POOLED
def test_repr(cls: type[Encoder]) -> None:
    text = repr(build(cls))
    assert text.startswith(f"{cls.__name__}(\n  2, 5, size_feature=True, scaling='conditioned'\n")
    assert "(pool): Pool(\n    'fspool'\n    (fspool): FSPool(4, pieces=20)" in text


# Errors

SET = torch.rand(2, 4, 2)


@EVERY_CLASS
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"`elements` must have shape \(B, N, 2\), got float32 of shape \(4, 2\)", (SET[0],)),
        (ValueError, r"`elements` must have shape \(B, N, 2\), got float32 of shape \(2, 4, 1\)", (SET[..., :1],)),
        (ValueError, r"`elements` must have at least one row.* got shape \(2, 0, 2\)", (SET[:, :0],)),
        (TypeError, "`elements` must have a floating dtype, got int64 of shape", (SET.long(),)),
        (TypeError, r"`elements` must be a tensor, got \[\] \(list\)", ([],)),
        (ValueError, r"`mask` must have shape \(2, 4\), got float32 of shape \(2, 3\)", (SET, SET[:, :3, 0])),
        (ValueError, r"`mask` must have shape \(2, 4\), got float32 of shape \(2, 4, 1\)", (SET, SET[..., :1])),
        (TypeError, "`mask` must be bool or floating .* got int64 of shape", (SET, SET[..., 0].long())),
        (TypeError, r"`mask` must be a tensor or None, got \[\] \(list\)", (SET, [])),
    ],
)
def test_refuses_inputs(cls: type[Encoder], error: type[Exception], message: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=message):
        build(cls)(*arguments)


@EVERY_POOLED
@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (ValueError, "`in_channels` must be at least 1, got 0", (0, 5), {}),
        (TypeError, r"`in_channels` must be an integer, got 2.0 \(float\)", (2.0, 5), {}),
        (ValueError, "`out_channels` must be at least 1, got 0", (2, 0), {}),
        (ValueError, "`out_channels` must be at least 2, got 1", (2, 1), {"size_feature": True}),
        (ValueError, "`hidden_channels` must be at least 1, got 0", (2, 5, 0), {}),
        (TypeError, r"`hidden_channels` must be an integer, got None \(NoneType\)", (2, 5, None), {}),
        (ValueError, "`pool` must be one of 'fspool', 'sum', 'mean', 'max', got 'avg'", (2, 5), {"pool": "avg"}),
        (ValueError, "`scaling` must be one of 'conditioned', 'dspn', 'idspn', got 'he'", (2, 5), {"scaling": "he"}),
    ],
)
def test_refuses_numbers(
    cls: type[Encoder], error: type[Exception], message: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        cls(*arguments, **options)


@pytest.mark.parametrize("batch", [2, 7, 33])
@pytest.mark.parametrize("size", [1, 3, 6, 10, 17])
@EVERY_POOLED
def test_a_sample_is_rounded_the_same_in_every_batch(cls: type[Encoder], size: int, batch: int) -> None:
    encoder = cls(18, 64, 128, size_feature=True)
    elements, mask, z = torch.rand(batch, size, 18), torch.rand(batch, size), torch.randn(64)

    def of(part: slice) -> tuple[Tensor, ...]:
        return encoder(elements[part], mask[part]), *gradients(encoder, elements[part], mask[part], z)

    together = of(slice(None))
    # BLAS with AVX-512 treats all columns alike, but not on every machine if they are few: RelationEncoder has one for
    # a set of one, and nine for a set of three.
    exact = devices.products_are_rounded_alike() and (cls is PooledEncoder or size > 3)
    tolerance = 0 if exact else devices.ENCODED_ALIKE[devices.here().type]
    for b in range(batch):
        for a, t in zip(of(slice(b, b + 1)), together, strict=True):
            torch.testing.assert_close(a[0], t[b], rtol=tolerance, atol=tolerance)
