"""The gradient that encoders know of themselves is autograd's, to every order that is asked for, or is not offered."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from setpred import DSPNDecoder, FSPool, PooledEncoder
from setpred.encoders.base import EncoderBase
from setpred.functional.descent import _gradient
from tests.encoders.test_layers import IDS, NOT_PLAIN, replace
from tests.encoders.test_protocol import EVERY_POOLED, POOLS, build

EVERY_POOL = pytest.mark.parametrize("pool", POOLS)
DOUBLE = {"dtype": torch.float64}
EXACT = {"rtol": 1e-9, "atol": 1e-9}

Known = tuple[Tensor, ...]


def by_autograd(encoder: EncoderBase, elements: Tensor, mask: Tensor | None, u: Tensor) -> Known:
    """Vector, and u pulled back, connected to elements, mask, u and parameters."""
    vector = encoder(elements, mask)
    inputs = (elements,) if mask is None else (elements, mask)
    return vector, *torch.autograd.grad(vector, inputs, u, create_graph=True)


def by_itself(encoder: Any, elements: Tensor, mask: Tensor | None, u: Tensor) -> Known:
    vector, pull = encoder.vjp(elements, mask)
    of_elements, of_mask = pull(u)
    assert (of_mask is None) == (mask is None)
    return vector, of_elements, *(() if of_mask is None else (of_mask,))


def inputs(encoder: EncoderBase, batch: int, size: int, masked: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    elements = torch.randn(batch, size, encoder.in_channels, **DOUBLE, requires_grad=True)
    mask = torch.rand(batch, size, **DOUBLE).requires_grad_() if masked else None
    return elements, mask, torch.randn(batch, encoder.out_channels, **DOUBLE, requires_grad=True)


def assert_alike(encoder: EncoderBase, elements: Tensor, mask: Tensor | None, u: Tensor) -> None:
    """Values, and the derivatives of a projection of them by all that they depend on."""
    found = [way(encoder, elements, mask, u) for way in (by_itself, by_autograd)]
    torch.testing.assert_close(found[0], found[1], **EXACT)
    wrt = [x for x in (elements, mask, u, *encoder.parameters()) if x is not None]
    weights = [torch.randn_like(part) for part in found[0]]
    derivatives = [
        torch.autograd.grad(
            sum((part * w).sum() for part, w in zip(parts, weights, strict=True)), wrt, materialize_grads=True
        )
        for parts in found
    ]
    torch.testing.assert_close(*derivatives, **EXACT)


@EVERY_POOLED
@EVERY_POOL
@pytest.mark.parametrize("scaling", ["conditioned", "dspn"])
@given(batch=st.integers(1, 20), size=st.integers(1, 9), masked=st.booleans(), seed=st.integers(0, 2**31))
def test_equals_autograd(
    cls: type[EncoderBase], pool: str, scaling: str, batch: int, size: int, masked: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    encoder = build(cls, pool, scaling=scaling, **DOUBLE)
    assert_alike(encoder, *inputs(encoder, batch, size, masked))


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_equals_autograd_of_any_depth(layers: int) -> None:
    encoder = PooledEncoder(3, 8, 6, layers=layers, **DOUBLE)
    assert_alike(encoder, *inputs(encoder, 5, 70, True))  # more than 64 columns: a product for each sample


@EVERY_POOLED
@EVERY_POOL
def test_equal_elements(cls: type[EncoderBase], pool: str) -> None:
    encoder = build(cls, pool, **DOUBLE)
    _, _, u = inputs(encoder, 2, 4, True)
    elements = torch.randn(2, 1, 2, **DOUBLE).repeat(1, 4, 1).requires_grad_()
    assert_alike(encoder, elements, torch.ones(2, 4, **DOUBLE, requires_grad=True), u)


class Larger(PooledEncoder):
    """One that does more than what it inherits the gradient of."""

    def forward(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        return 2 * super().forward(elements, mask)


class MeanPool(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows.mean(1)


def with_another_pool(encoder: EncoderBase) -> None:
    encoder.pool = MeanPool()


def with_a_relaxed_sort(encoder: Any) -> None:
    encoder.pool.fspool.relaxed = 0.1


def with_a_sort_of_its_own(encoder: Any) -> None:
    class Other(FSPool):
        pass

    encoder.pool.fspool = Other(encoder.row_channels, **DOUBLE)


def with_a_hook_in_the_pool(encoder: Any) -> None:
    encoder.pool.fspool.register_forward_hook(lambda module, inputs, output: output)


def with_a_hook_on_the_pool(encoder: Any) -> None:
    encoder.pool.register_forward_hook(lambda module, inputs, output: output)


CHANGES = [
    with_another_pool,
    with_a_relaxed_sort,
    with_a_sort_of_its_own,
    with_a_hook_in_the_pool,
    with_a_hook_on_the_pool,
]


@EVERY_POOLED
@pytest.mark.parametrize("make", NOT_PLAIN, ids=IDS)
def test_not_offered_where_layers_are_called(cls: type[EncoderBase], make: Callable[[nn.Linear], nn.Module]) -> None:
    encoder: Any = cls(2, 5, 6, **DOUBLE)
    elements = torch.randn(3, 4, 2, **DOUBLE)
    assert encoder.vjp(elements) is not None
    assert replace(encoder, make).vjp(elements) is None  # type: ignore[operator]


@EVERY_POOLED
@pytest.mark.parametrize("change", CHANGES)
def test_not_offered_where_the_pool_is_another(cls: type[EncoderBase], change: Callable[[EncoderBase], None]) -> None:
    encoder: Any = cls(2, 5, 6, **DOUBLE)
    change(encoder)
    assert encoder.vjp(torch.randn(3, 4, 2, **DOUBLE)) is None


def test_not_offered_by_a_subclass() -> None:
    assert Larger(2, 5, 6).vjp(torch.randn(3, 4, 2)) is None


# In a decoder


def decode(decoder: DSPNDecoder, z: Tensor) -> Known:
    """A prediction from a given start, and its gradients."""
    start = torch.linspace(-1, 1, len(z) * 5 * 2, dtype=z.dtype).view(len(z), 5, 2).requires_grad_()
    prediction = decoder(z, init=start)
    wrt = (z, start, *decoder.encoder.parameters())  # type: ignore[attr-defined]
    value = prediction.elements.square().sum() + prediction.mask.square().sum()
    return *prediction[:2], *torch.autograd.grad(value, wrt, materialize_grads=True)


@EVERY_POOLED
@pytest.mark.parametrize("differentiate", ["unrolled", "implicit"])
@pytest.mark.parametrize("options", [{}, {"mask_clamp": None}, {"anchor": 0.3}, {"repr_loss": "mse"}, {"tol": 0.01}])
def test_decoders_decode_as_by_autograd(
    cls: type[EncoderBase], differentiate: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = DSPNDecoder(
        build(cls, **DOUBLE), 4, differentiate=differentiate, set_size=5, channels=2, **options, **DOUBLE
    )
    z = torch.randn(3, 5, **DOUBLE, requires_grad=True)
    used = []
    monkeypatch.setattr("setpred.functional.descent._gradient", lambda *given: used.append(given) or _gradient(*given))
    known = decode(decoder, z)
    assert not used
    monkeypatch.setattr(cls, "vjp", lambda *_: None)
    expected = decode(decoder, z)
    assert len(used) == 4
    torch.testing.assert_close(known, expected, **EXACT)


def test_hooks_of_an_encoder_are_called() -> None:
    decoder, calls = DSPNDecoder(PooledEncoder(2, 5, 6), 3, set_size=4, channels=2), []
    decoder.encoder.register_forward_hook(lambda module, inputs, output: calls.append(module))
    decoder(torch.randn(3, 5))
    assert len(calls) == 3


class Doubled(nn.Module):
    """A wrapper that hands out what it wraps, as those of adapters do."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)

    def forward(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        return 2 * self.base(elements, mask)


def test_the_gradient_of_a_wrapper_is_not_that_of_what_it_wraps() -> None:
    base = PooledEncoder(2, 5, 6, **DOUBLE)
    z, start = torch.randn(3, 5, **DOUBLE), torch.randn(3, 4, 2, **DOUBLE)
    encoders = Doubled(base), lambda *y: 2 * base(*y)
    decoders = [DSPNDecoder(encoder, 3, 0.1, set_size=4, channels=2, **DOUBLE) for encoder in encoders]
    torch.testing.assert_close(*(decoder(z, init=start).elements for decoder in decoders), **EXACT)


class Own:
    """A user's encoder that knows its gradient: the mean of the present elements' squares."""

    def __init__(self) -> None:
        self.pulled = 0

    def __call__(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        return (elements.square() * mask.unsqueeze(-1)).mean(1)

    def vjp(self, elements: Tensor, mask: Tensor | None) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        def pull(grad: Tensor) -> tuple[Tensor, Tensor]:
            assert mask is not None
            self.pulled += 1
            grad = grad.unsqueeze(1) / elements.shape[1]
            return 2 * grad * elements * mask.unsqueeze(-1), (grad * elements.square()).sum(-1)

        return self(elements, mask), pull


def test_an_encoder_of_ones_own_may_know_its_gradient() -> None:
    encoder = Own()
    z, start = torch.rand(3, 2, **DOUBLE), torch.randn(3, 4, 2, **DOUBLE)
    decoders = [DSPNDecoder(e, 5, set_size=4, channels=2, **DOUBLE) for e in (encoder, encoder.__call__)]
    torch.testing.assert_close(*(decoder(z, init=start)[:2] for decoder in decoders), **EXACT)
    assert encoder.pulled == 5


class Module(Own, nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        Own.__init__(self)


class Bent(Module):
    """One that inherits a gradient which is no longer its own."""

    def __call__(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        return super().__call__(elements, mask).sin()


class Straight(Bent):
    """One that does nothing of its own."""


@pytest.mark.parametrize("make", [Bent, Straight])
def test_a_gradient_from_before_the_forward_pass_is_not_used(make: Callable[[], Bent]) -> None:
    encoder = make()
    z, start = torch.rand(3, 2, **DOUBLE), torch.randn(3, 4, 2, **DOUBLE)
    decoders = [DSPNDecoder(e, 5, 0.1, set_size=4, channels=2, **DOUBLE) for e in (encoder, encoder.__call__)]
    torch.testing.assert_close(*(decoder(z, init=start)[:2] for decoder in decoders), **EXACT)
    assert encoder.pulled == 0


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"`gradient of elements from encoder.vjp` must have shape \(3, 4, 2\)", lambda e, m: (e[:1], m)),
        (
            ValueError,
            r"`gradient of elements from encoder.vjp` must have shape \(3, 4, 2\)",
            lambda e, m: (e[:, :1], m),
        ),
        (ValueError, r"`gradient of mask from encoder.vjp` must have shape \(3, 4\)", lambda e, m: (e, m[:, :1])),
        (TypeError, "`gradient of mask from encoder.vjp` must be a tensor, got None", lambda e, m: (e, None)),
    ],
)
def test_a_gradient_of_another_shape(error: type[Exception], message: str, change: Callable[..., Any]) -> None:
    class Other(Own):
        def vjp(self, elements: Tensor, mask: Tensor | None) -> Any:
            vector, pull = super().vjp(elements, mask)
            return vector, lambda grad: change(*pull(grad))

    with pytest.raises(error, match=message):
        DSPNDecoder(Other(), 5, set_size=4, channels=2, **DOUBLE)(torch.rand(3, 2, **DOUBLE))


@EVERY_POOLED
def test_an_empty_batch_with_an_anchor(cls: type[EncoderBase]) -> None:
    decoder = DSPNDecoder(build(cls), 2, set_size=5, channels=2, anchor=0.1)
    assert decoder(torch.zeros(0, 5)).elements.shape == (0, 5, 2)
