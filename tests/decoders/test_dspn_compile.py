"""DSPNDecoder under torch.compile(fullgraph=True) equals itself in eager mode.

By the backend that captures forward and backward graphs as inductor gets them, without its minute of C++ compilation;
and once by inductor.
"""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from setpred import (
    DSPNDecoder,
    GradientDescent,
    PolyakDescent,
    PooledEncoder,
    RelationEncoder,
    SetPrediction,
    StandardScaler,
)
from tests.rules import recipe

Z = 16


@pytest.fixture(autouse=True)
def _forget_compilations() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_decoder(make_encoder: type[nn.Module], name: str, **options: Any) -> DSPNDecoder:
    encoder = make_encoder(2, Z, 16)
    return getattr(DSPNDecoder, name)(encoder, **{"iters": 2, "set_size": 5, "channels": 2} | recipe(name) | options)


def trained(decoder: nn.Module, z: torch.Tensor) -> tuple[SetPrediction, list[torch.Tensor]]:
    """Prediction, and the gradients of its loss: second derivatives of the encoder."""
    prediction = decoder(z)
    loss = prediction.elements.square().sum() + prediction.mask.square().sum()
    if prediction.trajectory is not None:
        loss = loss + sum(part.square().sum() for part in prediction.trajectory)
    inputs = [z, *(p for p in decoder.parameters() if p.requires_grad)]
    return prediction, list(torch.autograd.grad(loss, inputs))


def assert_trains_the_same(decoder: DSPNDecoder, backend: str = "aot_eager") -> None:
    z = torch.randn(3, Z, requires_grad=True)
    expected, gradients = trained(decoder, z)
    actual, of_compiled = trained(torch.compile(decoder, fullgraph=True, backend=backend), z)
    assert (actual.trajectory is None) == (expected.trajectory is None)
    pairs = zip((*actual[:2], *(actual[2] or ())), (*expected[:2], *(expected[2] or ())), strict=True)
    for a, e in (*pairs, *zip(of_compiled, gradients, strict=True)):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["paper", "idspn"])
@pytest.mark.parametrize("make_encoder", [PooledEncoder, RelationEncoder])
def test_training(make_encoder: type[nn.Module], name: str) -> None:
    assert_trains_the_same(make_decoder(make_encoder, name))


@pytest.mark.parametrize("name", ["paper", "idspn"])
def test_with_a_scaler(name: str) -> None:
    scaler = StandardScaler(2).fit(3 + 2 * torch.randn(9, 2))
    assert_trains_the_same(
        make_decoder(PooledEncoder, name, scaler=scaler, project=lambda elements, mask: (elements.clamp(3, 4), mask))
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on the CPU")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own imports
@pytest.mark.filterwarnings("ignore::UserWarning:torch._inductor")  # on CUDA: of TF32, which is off
def test_training_with_the_default_backend() -> None:
    assert_trains_the_same(make_decoder(RelationEncoder, "paper"), backend="inductor")


def test_training_with_every_option() -> None:
    decoder = make_decoder(
        PooledEncoder,
        "idspn",
        differentiate="unrolled",
        lr=GradientDescent(1.0, momentum=0.9, nesterov=True, grad_clip=0.1),
        tol=0.01,
        project=lambda elements, mask: (elements.clamp(0, 1), mask),
    )
    assert_trains_the_same(decoder)


LOOPED: dict[str, dict[str, Any]] = {
    "recommended": {},
    "every option": {
        "lr": GradientDescent(1.0, momentum=0.9, nesterov=True, grad_clip=0.1),
        "tol": 0.01,
        "anchor": 0.1,
        "project": lambda elements, mask: (elements.clamp(0, 1), mask),
        "scaler": StandardScaler(2).fit(torch.tensor([[[0.0, 1.0], [2.0, 5.0]]])),
    },
    "no mask": {"mask_clamp": None},
    "several starts": {"starts": 3},
}


@pytest.mark.parametrize("options", LOOPED.values(), ids=LOOPED)
@pytest.mark.parametrize("make_encoder", [PooledEncoder, RelationEncoder])
def test_steps_without_a_graph(make_encoder: type[nn.Module], options: dict[str, Any]) -> None:
    """Those of implicit training and of inference are one step in a loop, from the same random starts."""
    decoder = DSPNDecoder.recommended(make_encoder(2, Z, 16), iters=5, set_size=5, channels=2, **options)
    compiled, z = torch.compile(decoder, fullgraph=True, backend="aot_eager"), torch.randn(3, Z, requires_grad=True)
    results = []
    for decode in (decoder, compiled):
        torch.manual_seed(0)
        elements, mask, _ = decode(z)
        inputs = [z, *decoder.encoder.parameters()]
        results.append([elements, mask, *torch.autograd.grad(elements.square().sum() + mask.sum(), inputs)])
        with torch.no_grad():
            results[-1] += decode(z.detach())[:2]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_one_step_is_compiled_whatever_their_number(train: bool) -> None:
    sizes = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        sizes.append(sum(len(part.graph.nodes) for part in parts))
        return graph

    for iters in (4, 9):
        torch._dynamo.reset()  # or the number becomes a symbol, which has nodes of its own
        decoder = DSPNDecoder.recommended(PooledEncoder(2, Z, 16), iters=iters, set_size=5, channels=2)
        with torch.set_grad_enabled(train):
            torch.compile(decoder, fullgraph=True, backend=backend)(torch.randn(3, Z))
    assert len(sizes) == 2
    assert sizes[0] == sizes[1]


class Counting(PooledEncoder):
    """An encoder that a loop cannot hold: it changes what is outside of it."""

    calls = 0

    def forward(self, elements: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        return super().forward(elements, mask)


def test_what_is_the_users_is_not_in_a_loop() -> None:
    decoder = DSPNDecoder.recommended(Counting(2, Z, 16), iters=4, set_size=5, channels=2).eval()
    with torch.no_grad():
        torch.compile(decoder, fullgraph=True, backend="eager")(torch.randn(3, Z), iters=4)
    assert decoder.encoder.calls == 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make_encoder", [PooledEncoder, RelationEncoder])
def test_inference(make_encoder: type[nn.Module], mode: Any) -> None:
    decoder, z = make_decoder(make_encoder, "paper").eval(), torch.randn(3, Z)
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    with mode():
        torch.testing.assert_close(tuple(compiled(z)[:2]), tuple(decoder(z)[:2]))


def test_inference_of_sets_without_masks_from_random_starts() -> None:
    decoder, z = make_decoder(PooledEncoder, "idspn", init="random", mask_clamp=None).eval(), torch.randn(3, Z)
    with torch.no_grad():
        elements, mask, _ = torch.compile(decoder, fullgraph=True, backend="aot_eager")(z)
    assert elements.shape == (3, 5, 2)
    assert (mask == 1).all()


def test_the_loop_is_where_the_sets_are_whatever_the_default_device() -> None:
    torch.compiler.reset()
    decoder, z = DSPNDecoder.recommended(PooledEncoder(2, Z, 16), set_size=5, channels=2).eval(), torch.randn(3, Z)
    with torch.no_grad(), torch.device("meta"):
        elements, _, _ = torch.compile(decoder, fullgraph=True, backend="aot_eager")(z)
    assert elements.isfinite().all()


@pytest.mark.parametrize("train", [False, True])
def test_numbers_that_differ_between_decoders(train: bool) -> None:
    """torch.compile makes symbols of them, which a loop does not take."""
    torch.compiler.reset()
    z = torch.randn(3, Z)
    for lr, tol, clamp, anchor in (
        (PolyakDescent(), 0.01, (0.0, 1.0), 0.1),
        (PolyakDescent(0.5, momentum=0.8), 0.02, (0.1, 0.9), 0.2),
        (GradientDescent(0.5, momentum=0.8, grad_clip=1.0), 0.02, (0.1, 0.9), 0.2),
        (GradientDescent(0.6, momentum=0.9, grad_clip=2.0), 0.03, (0.2, 0.8), 0.3),
    ):
        decoder = DSPNDecoder.recommended(
            PooledEncoder(2, Z, 16), iters=4, set_size=5, channels=2, lr=lr, tol=tol, mask_clamp=clamp, anchor=anchor
        )
        results = []
        for decode in (decoder, torch.compile(decoder, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(0)
            with torch.set_grad_enabled(train):
                results.append(tuple(decode(z)[:2]))
        torch.testing.assert_close(*results)
