"""DSPNDecoder with encoders that users write."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from setpred import DSPNDecoder, FSPool, GradientDescent, PooledEncoder, SetEncoder
from tests import devices
from tests.custom import Square
from tests.rules import paper_decoder

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
    return paper_decoder(encoder, 3, **{"lr": 1.0, "set_size": N, "channels": C} | options)


def check_trains(decoder: DSPNDecoder, z: Tensor) -> None:
    elements, mask, _ = decoder(z)
    (elements.square().sum() + mask.sum()).backward()
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
    assert decoder.encoder.linear.weight.grad.any()
    assert z.grad.any()


class CustomFunction(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return Square.apply(rows)


class Counting(nn.Module):
    """Buffers that are changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, rows: Tensor) -> Tensor:
        self.calls += 1
        self.mean.lerp_(rows.detach().mean((0, 1)), 0.1)
        return rows.sin()


@pytest.mark.parametrize("make_layer", [Norm, hooked, pre_hooked, CustomFunction, Counting])
@BOTH_DERIVATIVES
def test_encoders_that_func_grad_cannot_run(make_layer: Callable[[], nn.Module], differentiate: str) -> None:
    decoder = make_decoder(Encoder(make_layer()), differentiate=differentiate)
    z = torch.randn(3, D, requires_grad=True)
    check_trains(decoder, z)
    expected = decoder(z)
    with torch.no_grad():
        torch.testing.assert_close(tuple(decoder(z)[:2]), tuple(expected[:2]))
    message = r"(?s)torch.func.grad takes.*BatchNorm .*\.eval\(\).*backward hooks.*Use torch.no_grad\(\)"
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
        lr=GradientDescent(1.0, momentum=0.5),
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


# What `torch.func.grad` cannot run, compiled


def results(decode: Callable[[Tensor], Any], z: Tensor, decoder: DSPNDecoder) -> list[Tensor]:
    elements, mask, _ = decode(z)
    total = elements.square().sum() + mask.sum()
    return [elements, mask, *torch.autograd.grad(total, [z, *decoder.parameters()], materialize_grads=True)]


@pytest.mark.filterwarnings("ignore:.*that is not a leaf")  # Dynamo looks at z's gradient
@pytest.mark.parametrize("make_layer", [Norm, hooked, pre_hooked, transformer])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_compiling_breaks_the_graph_where_it_must(make_layer: Callable[[], nn.Module], checkpoint: bool) -> None:
    torch._dynamo.reset()
    decoder = make_decoder(Encoder(make_layer()), checkpoint=checkpoint)
    z = torch.randn(3, D, requires_grad=True)
    compiled, expected = torch.compile(decoder, backend="aot_eager"), results(decoder, z, decoder)
    torch.testing.assert_close(results(compiled, z, decoder), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(z).elements, decoder(z).elements, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*that is not a leaf")
@pytest.mark.parametrize("make_layer", [CustomFunction, Counting])
def test_a_decoder_can_be_left_out_of_what_is_compiled(make_layer: Callable[[], nn.Module]) -> None:
    """As docs/guides/compile.md says: PyTorch compiles custom functions under torch.func.grad wrongly."""
    torch._dynamo.reset()
    decoder, backbone = make_decoder(Encoder(make_layer())), nn.Linear(D, D)
    z = torch.randn(3, D, requires_grad=True)
    expected = results(lambda z: decoder(backbone(z)), z, decoder)
    uncompiled = torch.compiler.disable(decoder)
    compiled = torch.compile(lambda z: uncompiled(backbone(z)), backend="aot_eager")
    torch.testing.assert_close(results(compiled, z, decoder), expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


# Steps that are computed again


def gradients_of(decoder: DSPNDecoder, z: Tensor, *, before_backward: Callable[[], object] = lambda: None) -> Any:
    elements, mask, _ = decoder(z)
    total = elements.square().sum() + mask.sum()
    before_backward()
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    return torch.autograd.grad(total, parameters, materialize_grads=True)


@pytest.mark.parametrize("make_layer", [Norm, hooked, CustomFunction, Attention, FunctionalAttention, transformer])
def test_checkpoint_gives_the_same_gradients(make_layer: Callable[[], nn.Module]) -> None:
    decoder, z = make_decoder(Encoder(make_layer())), torch.randn(3, D)
    expected = gradients_of(decoder, z)
    decoder.checkpoint = True
    torch.testing.assert_close(gradients_of(decoder, z), expected)
    with devices.autocast(torch.bfloat16):
        under_autocast = gradients_of(decoder, z)
        decoder.checkpoint = False
        torch.testing.assert_close(under_autocast, gradients_of(decoder, z))


@pytest.mark.parametrize("make_encoder", [lambda: PooledEncoder(C, D, 16), lambda: Encoder(nn.Linear(D, D))])
def test_checkpoint_computes_with_the_parameters_of_functional_call(make_encoder: Callable[[], nn.Module]) -> None:
    decoder, z = make_decoder(make_encoder()), torch.randn(3, D)
    other = {name: (p + 0.1 * torch.randn_like(p)).detach().requires_grad_() for name, p in decoder.named_parameters()}

    def gradients(checkpoint: bool) -> tuple[Tensor, ...]:
        decoder.checkpoint = checkpoint
        elements = functional_call(decoder, other, (z,)).elements
        return torch.autograd.grad(elements.square().sum(), list(other.values()))

    expected = gradients(False)
    assert all(part.any() for part in expected)
    torch.testing.assert_close(gradients(True), expected)


class Switched(nn.Module):
    """Does the same operations in both modes, on other numbers."""

    def __init__(self, size: float = 1.0) -> None:
        super().__init__()
        self.size = size

    def forward(self, rows: Tensor) -> Tensor:
        return self.size * rows * (1.0 if self.training else 1.1)


def test_checkpoint_refuses_what_is_not_computed_again_the_same() -> None:
    z = torch.randn(3, D)
    linear = make_decoder(Encoder(nn.Linear(D, D)), checkpoint=True)

    def optimizer_step() -> None:
        with torch.no_grad():
            linear.encoder.layer.weight.mul_(1 + 1e-6)

    with pytest.raises(RuntimeError, match="`checkpoint` needs parameters that stay as they are"):
        gradients_of(linear, z, before_backward=optimizer_step)
    frozen = make_decoder(Encoder(nn.Linear(D, D).requires_grad_(False)), checkpoint=True)

    def average() -> None:
        with torch.no_grad():
            frozen.encoder.layer.weight.mul_(1 + 1e-6)

    with pytest.raises(RuntimeError, match="`checkpoint` needs parameters that stay as they are"):
        gradients_of(frozen, z, before_backward=average)
    for layer in (Switched(), Switched(1e-4), Switched(1e4), nn.Dropout(0.5), Norm()):
        decoder = make_decoder(Encoder(layer), checkpoint=True)
        with pytest.raises(RuntimeError, match="`checkpoint` needs an objective that does the same"):
            gradients_of(decoder, z, before_backward=decoder.eval)


class Reassigning(nn.Module):
    """Puts other tensors in the place of its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, rows: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return rows


def test_checkpoint_calls_the_encoder_itself() -> None:
    decoder, z = make_decoder(Encoder(Reassigning())), torch.randn(3, D)
    expected = gradients_of(decoder, z)
    assert decoder.encoder.layer.calls == 3
    decoder.checkpoint = True
    torch.testing.assert_close(gradients_of(decoder, z), expected)
    assert decoder.encoder.layer.calls == 3 + 2 * 3  # as documented, twice


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_checkpoint_of_a_traced_encoder() -> None:
    encoder, z = Encoder(nn.Linear(D, D)), torch.randn(3, D)
    decoder = make_decoder(torch.jit.trace(encoder, (torch.rand(3, N, C), torch.rand(3, N))))
    expected = gradients_of(decoder, z)
    decoder.checkpoint = True
    torch.testing.assert_close(gradients_of(decoder, z), expected)


# Modes beside those of gradients


@BOTH_DERIVATIVES
@pytest.mark.parametrize("what", ["z", "init", "parameters"])
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")  # its own
def test_forward_mode(differentiate: str, what: str) -> None:
    """Of `torch.autograd.forward_ad`, against the backward pass, or against torch.func where that is no derivative."""
    iters = 3 if differentiate == "unrolled" else 1
    decoder = paper_decoder(
        Encoder(nn.Linear(D, D)).double(), iters, GradientDescent(1.0, 0.5), set_size=N, channels=C, dtype=torch.float64
    )
    z = torch.randn(3, D, dtype=torch.float64)
    inputs = {"z": z, "init": torch.rand(3, N, C, dtype=torch.float64)}

    def decode(value: Tensor) -> Tensor:
        if what == "parameters":
            state = {"encoder.linear.weight": value}
            return functional_call(decoder, state, (z,), {"init": inputs["init"]}).elements
        values = inputs | {what: value}
        return decoder(values["z"], init=values["init"]).elements

    value = decoder.encoder.linear.weight.detach() if what == "parameters" else inputs[what]
    tangent = torch.randn_like(value)
    with forward_ad.dual_level():
        actual = forward_ad.unpack_dual(decode(forward_ad.make_dual(value, tangent))).tangent
    jacobian = torch.autograd.functional.jacobian(decode, value)
    expected = torch.tensordot(jacobian, tangent, tangent.dim())
    if differentiate == "unrolled":
        torch.testing.assert_close(actual, expected)
    else:
        actual = torch.zeros_like(expected) if actual is None else actual
        torch.testing.assert_close(actual, torch.func.jvp(decode, (value,), (tangent,))[1])


def test_inference_tensors_are_decoded_outside_of_inference_mode() -> None:
    decoder = make_decoder(PooledEncoder(C, D, 16))
    with torch.inference_mode():
        z, init = torch.randn(3, D), (torch.rand(3, N, C), torch.rand(3, N))
        expected = decoder(z, init=init)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            torch.testing.assert_close(decoder(z, init=init).elements.detach(), expected.elements)


# What no gradient leaves


class Frozen(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.body, self.head = PooledEncoder(C, D, 16), nn.Linear(D, D)

    def forward(self, elements: Tensor, mask: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.how == "detached"):
            vector = self.body(elements, mask)
        return vector.detach() if self.how == "detached" else vector


class FrozenBody(Frozen):
    def forward(self, elements: Tensor, mask: Tensor) -> Tensor:
        return self.head(super().forward(elements, mask))


@pytest.mark.parametrize("how", ["no_grad", "detached"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("anchor", [0.0, 0.1])
def test_an_encoder_that_no_gradient_leaves_is_refused(how: str, mode: Any, anchor: float) -> None:
    decoder = make_decoder(Frozen(how), anchor=anchor)
    message = r"`encoder\(elements, mask\)` must be differentiable.*requires_grad_\(False\)"
    with mode(), pytest.raises(RuntimeError, match=message):
        decoder(torch.randn(3, D))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_an_encoder_with_a_part_that_no_gradient_leaves_is_refused(mode: Any) -> None:
    with mode(), pytest.raises(RuntimeError, match="no gradient leads to y from"):
        make_decoder(FrozenBody("no_grad"))(torch.randn(3, D))


def test_frozen_parameters_are_no_obstacle() -> None:
    encoder = PooledEncoder(C, D, 16).requires_grad_(False)
    decoder, z = make_decoder(encoder), torch.randn(3, D)
    assert not torch.equal(decoder(z).elements[0], decoder.initial_elements)
