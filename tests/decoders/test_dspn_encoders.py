"""DSPNDecoder with encoders that users write."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from setpred import DSPNDecoder, FSPool, SetEncoder

N, C, D = 4, 2, 8
BOTH_DERIVATIVES = pytest.mark.parametrize("differentiate", ["unrolled", "implicit"])


class Encoder(nn.Module):
    """A layer between a linear map of each element and a mean."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(C + 1, D)
        self.layer = layer

    def forward(self, elements: Tensor, mask: Tensor) -> Tensor:
        return self.layer(self.linear(torch.cat([elements, mask.unsqueeze(-1)], -1)).tanh()).mean(1)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def forward(self, rows: Tensor) -> Tensor:
        return self.norm(rows.mT).mT


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, rows: Tensor) -> Tensor:
        return self.attention(rows, rows, rows, need_weights=False)[0]


class FunctionalAttention(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        heads = rows.unflatten(-1, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def hooked() -> nn.Module:
    layer = nn.Linear(D, D)
    layer.register_full_backward_hook(lambda module, of_input, of_output: None)
    return layer


def pre_hooked() -> nn.Module:
    layer = nn.Linear(D, D)
    layer.register_full_backward_pre_hook(lambda module, of_output: None)
    return layer


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=True)


def make_decoder(encoder: Any, **options: Any) -> DSPNDecoder:
    return DSPNDecoder(encoder, 3, 1.0, set_size=N, channels=C, **options)


def check_trains(decoder: DSPNDecoder, z: Tensor) -> None:
    elements, mask, _ = decoder(z)
    (elements.square().sum() + mask.sum()).backward()
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
    assert decoder.encoder.linear.weight.grad.any()
    assert z.grad.any()


@pytest.mark.parametrize("make_layer", [Norm, hooked, pre_hooked])
@BOTH_DERIVATIVES
def test_encoders_that_func_grad_cannot_run(make_layer: Callable[[], nn.Module], differentiate: str) -> None:
    decoder = make_decoder(Encoder(make_layer()), differentiate=differentiate)
    z = torch.randn(3, D, requires_grad=True)
    check_trains(decoder, z)
    expected = decoder(z)
    with torch.no_grad():
        torch.testing.assert_close(tuple(decoder(z)[:2]), tuple(expected[:2]))
    message = (
        r"cannot run under torch.inference_mode\(\): use torch.no_grad\(\).*BatchNorm .*\.eval\(\).*backward hooks"
    )
    with torch.inference_mode(), pytest.raises(RuntimeError, match=message):
        decoder(z)


def test_batch_norm_in_evaluation_mode_runs_everywhere_and_learns_its_statistics_in_training() -> None:
    decoder, z = make_decoder(Encoder(Norm())), torch.randn(3, D)
    norm = decoder.encoder.layer.norm
    decoder(z)
    assert norm.num_batches_tracked == 3  # once a step
    assert norm.running_mean.any()
    expected = decoder.eval()(z).elements
    with torch.inference_mode():
        torch.testing.assert_close(decoder(z).elements.clone(), expected)
    assert norm.num_batches_tracked == 3


@BOTH_DERIVATIVES
def test_the_fallback_equals_func_grad(differentiate: str) -> None:
    """With a projection that makes the elements a function of the mask: each is still differentiated by itself."""
    decoder = make_decoder(
        Encoder(nn.Linear(D, D)),
        differentiate=differentiate,
        momentum=0.5,
        anchor=0.1,
        project=lambda elements, mask: (elements * mask.unsqueeze(-1), mask),
    ).double()
    z = torch.randn(3, D, dtype=torch.float64, requires_grad=True)

    def results() -> list[Tensor]:
        elements, mask, trajectory = decoder(z, record=True)
        inputs = [z, *decoder.parameters()]
        return [elements, mask, *trajectory, *torch.autograd.grad(elements.square().sum() + mask.sum(), inputs)]

    expected = results()
    decoder.encoder.layer.register_full_backward_hook(lambda module, of_input, of_output: None)
    torch.testing.assert_close(results(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make_layer", [Attention, FunctionalAttention, transformer])
@BOTH_DERIVATIVES
def test_attention_trains(make_layer: Callable[[], nn.Module], differentiate: str) -> None:
    decoder = make_decoder(Encoder(make_layer()), differentiate=differentiate)
    z = torch.randn(3, D, requires_grad=True)
    check_trains(decoder, z)
    with sdpa_kernel(SDPBackend.MATH):
        expected = decoder(z)
    modes: list[Callable[[], AbstractContextManager[Any]]] = [torch.enable_grad, torch.no_grad, torch.inference_mode]
    for training in (True, False):
        decoder.train(training)
        for mode in modes:
            with mode():
                actual = decoder(z)
            torch.testing.assert_close(actual.elements.clone(), expected.elements, rtol=1e-4, atol=1e-5)


def test_attention_needs_the_math_kernel_to_train() -> None:
    """The reason for which the decoder chooses it: the fused kernels have no second derivative."""
    x = torch.randn(1, 2, 3, D, requires_grad=True)
    (gradient,) = torch.autograd.grad(F.scaled_dot_product_attention(x, x, x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        gradient.sum().backward()


def mean_encoder(elements: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    return torch.cat([elements, mask.unsqueeze(-1)], -1).mean(1)


@BOTH_DERIVATIVES
def test_a_function_is_an_encoder(differentiate: str) -> None:
    assert isinstance(mean_encoder, SetEncoder)
    decoder = make_decoder(mean_encoder, differentiate=differentiate)
    assert [name for name, _ in decoder.named_parameters()] == ["initial_elements"]
    z = torch.rand(3, C + 1, requires_grad=True)
    elements, mask, _ = decoder(z, iters=100)
    torch.testing.assert_close(torch.cat([elements, mask.unsqueeze(-1)], -1).mean(1), z, rtol=0, atol=1e-3)
    elements.sum().backward()
    assert z.grad.any()


@BOTH_DERIVATIVES
def test_a_module_around_fspool_is_an_encoder(differentiate: str) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(C, D)
            self.pool = FSPool(D)

        def forward(self, elements: Tensor, mask: Tensor | None) -> Tensor:
            return self.pool(self.linear(elements).relu() * mask.unsqueeze(-1))

    assert isinstance(Mine(), SetEncoder)
    check_trains(make_decoder(Mine(), differentiate=differentiate), torch.randn(3, D, requires_grad=True))


def test_dropout_in_the_encoder_is_drawn_anew_in_every_step() -> None:
    decoder = make_decoder(Encoder(nn.Dropout(0.5)))
    z = torch.randn(3, D, requires_grad=True)
    check_trains(decoder, z)
    assert not torch.equal(decoder(z).elements, decoder(z).elements)
    decoder.eval()
    assert torch.equal(decoder(z).elements, decoder(z).elements)
