"""Layers of the encoders that are more than a plain `nn.Linear` are called; plain ones give the same, faster."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from setpred import HungarianLoss, PooledEncoder, RelationEncoder
from setpred.encoders.base import EncoderBase, are_plain
from tests.rules import paper_decoder

ENCODERS = pytest.mark.parametrize("cls", [PooledEncoder, RelationEncoder])
DOUBLE = {"dtype": torch.float64}


def places(encoder: EncoderBase) -> list[tuple[nn.Module, str]]:
    """Where each layer stands."""
    if isinstance(encoder, PooledEncoder):
        return [(encoder.layers, str(i)) for i in range(len(encoder.layers))]
    return [(encoder, "pair"), (encoder, "out")]


def layers(encoder: EncoderBase) -> list[Any]:
    return [getattr(module, name) for module, name in places(encoder)]


def replace(encoder: EncoderBase, make: Callable[[nn.Linear], nn.Module]) -> EncoderBase:
    for module, name in places(encoder):
        setattr(module, name, make(getattr(module, name)))
    return encoder


class Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Wrapper(nn.Module):
    """Like an adapter before it is trained: it has a weight and a bias, and adds zeros."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(base.in_features, 2, **DOUBLE))
        self.b = nn.Parameter(torch.zeros(2, base.out_features, **DOUBLE))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a @ self.b


def as_subclass(layer: nn.Linear) -> nn.Module:
    other = Subclass(layer.in_features, layer.out_features, **DOUBLE)
    other.load_state_dict(layer.state_dict())
    return other


def with_forward_hook(layer: nn.Linear) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: output)
    return layer


def with_pre_hook(layer: nn.Linear) -> nn.Module:
    layer.register_forward_pre_hook(lambda module, inputs: inputs)
    return layer


def with_backward_hook(layer: nn.Linear) -> nn.Module:
    layer.register_full_backward_hook(lambda module, of_input, of_output: None)
    return layer


def with_forward_in_its_place(layer: nn.Linear) -> nn.Module:
    forward = layer.forward
    layer.forward = lambda x: forward(x)  # type: ignore[method-assign]
    return layer


def parametrized(layer: nn.Linear) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


def pruned(layer: nn.Linear) -> nn.Module:
    prune.identity(layer, "weight")
    return layer


class Wrapped(Tensor):
    """Like the weight of a quantised layer: a tensor that computes in its own way."""


def with_a_weight_of_its_own(layer: nn.Linear) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Wrapped))
    return layer


def with_a_bias_of_its_own(layer: nn.Linear) -> nn.Module:
    layer.bias = nn.Parameter(layer.bias.detach().as_subclass(Wrapped))
    return layer


NOT_PLAIN = [
    as_subclass,
    Wrapper,
    with_forward_hook,
    with_pre_hook,
    with_backward_hook,
    with_forward_in_its_place,
    parametrized,
    parametrizations.weight_norm,
    pruned,
    with_a_weight_of_its_own,
    with_a_bias_of_its_own,
    lambda layer: nn.Sequential(layer),
]
IDS = [getattr(make, "__name__", "in a Sequential").replace("<lambda>", "in a Sequential") for make in NOT_PLAIN]


def derivatives(encoder: EncoderBase, elements: Tensor, mask: Tensor) -> list[Tensor]:
    """The encoding, its gradient by the set, and of that gradient another one by the set."""
    elements, mask = elements.clone().requires_grad_(), mask.clone().requires_grad_()
    vector = encoder(elements, mask)
    first = torch.autograd.grad(vector.sin().sum(), (elements, mask), create_graph=True)
    second = torch.autograd.grad(sum(part.square().sum() for part in first), (elements, mask))
    return [vector.detach(), *(part.detach() for part in first), *second]


def as_plain_tensors(values: list[Tensor]) -> list[Tensor]:
    return [value.as_subclass(Tensor) for value in values]


@ENCODERS
@pytest.mark.parametrize("pool", ["fspool", "sum"])
@pytest.mark.parametrize("make", NOT_PLAIN, ids=IDS)
def test_called_layers_give_what_plain_ones_give(cls: type[EncoderBase], pool: str, make: Any) -> None:
    encoder = cls(2, 5, 6, pool=pool, size_feature=True, **DOUBLE)
    elements, mask = torch.randn(3, 4, 2, **DOUBLE), torch.rand(3, 4, **DOUBLE)
    assert are_plain(*layers(encoder))
    expected = derivatives(encoder, elements, mask)
    replace(encoder, make)
    assert not are_plain(*layers(encoder))
    torch.testing.assert_close(as_plain_tensors(derivatives(encoder, elements, mask)), expected)


@ENCODERS
@pytest.mark.parametrize("which", [0, -1])
def test_one_layer_that_is_not_plain_is_enough(cls: type[EncoderBase], which: int) -> None:
    encoder, calls = cls(2, 5, 6), []
    elements, mask = torch.rand(3, 4, 2), torch.rand(3, 4)
    expected = encoder(elements, mask)
    layers(encoder)[which].register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape))
    torch.testing.assert_close(encoder(elements, mask), expected)
    assert len(calls) == 1
    assert calls[0][0] == 3  # elements or pairs, features last, no padding
    assert calls[0].numel() == 3 * (4 if cls is PooledEncoder else 16) * calls[0][-1]


@ENCODERS
def test_a_hook_on_all_modules_sees_the_layers(cls: type[EncoderBase]) -> None:
    encoder, seen = cls(2, 5, 6), []
    handle = register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        encoder(torch.rand(3, 4, 2))
    finally:
        handle.remove()
    assert [module for module in seen if isinstance(module, nn.Linear)] == layers(encoder)
    seen.clear()
    encoder(torch.rand(3, 4, 2))
    assert not seen


@ENCODERS
def test_a_forward_of_all_linear_layers_is_called(cls: type[EncoderBase], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, calls, forward = cls(2, 5, 6), [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append(self) or forward(self, x))
    encoder(torch.rand(3, 4, 2))
    assert calls == layers(encoder)


@ENCODERS
def test_a_layer_without_bias(cls: type[EncoderBase]) -> None:
    encoder = cls(2, 5, 6, **DOUBLE)
    elements = torch.rand(3, 4, 2, **DOUBLE)
    for layer in layers(encoder):
        nn.init.zeros_(layer.bias)
    expected = encoder(elements)

    def without_bias(layer: nn.Linear) -> nn.Module:
        other = nn.Linear(layer.in_features, layer.out_features, bias=False, **DOUBLE)
        other.weight = layer.weight
        return other

    torch.testing.assert_close(replace(encoder, without_bias)(elements), expected)


def trained(encoder: EncoderBase, steps: int = 3) -> EncoderBase:
    decoder = paper_decoder(encoder, 2, 1.0, set_size=4, channels=2, dtype=torch.float64)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        elements, mask, _ = decoder(torch.randn(3, 5, **DOUBLE))
        HungarianLoss()(elements, torch.rand(3, 4, 2, **DOUBLE), mask).backward()
        optimizer.step()
    return encoder


@contextmanager
def expecting_deprecation(make: Any) -> Iterator[None]:
    """Of the old form of weight_norm."""
    if make is weight_norm:
        with pytest.warns(FutureWarning, match="weight_norm"):
            yield
    else:
        yield


@ENCODERS
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (spectral_norm, ["weight_orig", "bias"]),
        (parametrizations.spectral_norm, ["parametrizations.weight.original", "bias"]),
        (weight_norm, ["weight_g", "weight_v", "bias"]),
        (parametrizations.weight_norm, ["parametrizations.weight.original0", "parametrizations.weight.original1"]),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), ["weight_orig", "bias"]),
        (Wrapper, ["base.weight", "a", "b"]),
    ],
    ids=["spectral norm", "new spectral norm", "weight norm", "new weight norm", "prune", "adapter"],
)
def test_what_lives_in_a_layer_is_trained(cls: type[EncoderBase], make: Any, names: list[str]) -> None:
    encoder = cls(2, 5, 6, **DOUBLE)
    with expecting_deprecation(make):
        replace(encoder, make)
    before = copy.deepcopy({name: p.detach() for name, p in encoder.named_parameters()})
    trained(encoder)
    after = dict(encoder.named_parameters())
    for layer in layers(encoder):
        for name in names:
            parameter = layer.get_parameter(name)
            full = next(key for key, value in after.items() if value is parameter)
            assert not torch.equal(parameter, before[full]), full


@ENCODERS
@pytest.mark.parametrize("make", NOT_PLAIN, ids=IDS)
def test_layers_that_are_not_plain_decode(cls: type[EncoderBase], make: Any) -> None:
    encoder, z = cls(2, 5, 6, **DOUBLE), torch.randn(3, 5, **DOUBLE)
    decoder = paper_decoder(encoder, 3, 1.0, set_size=4, channels=2, dtype=torch.float64)
    expected = decoder(z).elements
    replace(encoder, make)
    torch.testing.assert_close(decoder(z).elements.as_subclass(Tensor), expected)
    with torch.no_grad():
        torch.testing.assert_close(decoder(z).elements.as_subclass(Tensor), expected)
