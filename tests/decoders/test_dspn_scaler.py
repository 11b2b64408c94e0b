"""DSPNDecoder with a scaler: it descends in standardised coordinates, and its users see their own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from setpred import DSPNDecoder, PooledEncoder, SetPrediction, StandardScaler
from tests import devices
from tests.rules import paper_decoder, with_rule

N, C, D = 4, 2, 6
LOCATION, SCALE = [300.0, -0.2], [50.0, 0.01]
DOUBLE = {"dtype": torch.float64}
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def in_the_picture(elements: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A projection in the users' coordinates; it cuts some and leaves others."""
    low, high = elements.new_tensor([[310.0, -0.205], [330.0, -0.195]])
    return torch.minimum(torch.maximum(elements, low), high), mask / 2


def of_vectors() -> nn.Module:
    """A module that gives sets in the users' coordinates."""
    start = nn.Sequential(nn.Linear(D, N * C, **DOUBLE), nn.Unflatten(1, (N, C)))
    start[0].bias.data = torch.tensor(LOCATION * N, **DOUBLE)
    return start


def make_scaler(location: list[float] = LOCATION, scale: list[float] = SCALE, **options: Any) -> StandardScaler:
    scaler = StandardScaler(C, **DOUBLE | options)
    scaler.location.copy_(torch.tensor(location, **DOUBLE))
    scaler.scale.copy_(torch.tensor(scale, **DOUBLE))
    return scaler


def make(encoder: nn.Module | None = None, **options: Any) -> DSPNDecoder:
    encoder = PooledEncoder(C, D, 8, size_feature=True, **DOUBLE) if encoder is None else encoder
    return paper_decoder(encoder, 4, **with_rule({"lr": 1.0, "set_size": N, "channels": C} | DOUBLE | options))


OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "idspn": {"differentiate": "implicit", "momentum": 0.9, "nesterov": True, "anchor": 0.1, "grad_clip": 0.1},
    "project": {"project": in_the_picture},
    "project, implicit": {"project": in_the_picture, "differentiate": "implicit", "anchor": 1.0},
    "project, checkpoint": {"project": in_the_picture, "checkpoint": True},
    "project, no mask": {"project": in_the_picture, "mask_clamp": None},
    "module": {"init": of_vectors()},
    "tol": {"tol": 0.2, "anchor": 0.2},
}


@pytest.mark.parametrize("given", ["own", "elements", "elements and mask"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_equals_one_without_that_is_mapped_around_by_hand(options: dict[str, Any], given: str) -> None:
    scaler = make_scaler().to(devices.here())
    options = dict(options)
    if isinstance(options.get("init"), nn.Module):
        options["init"] = options["init"].to(devices.here())
    decoder = make(scaler=scaler, **options)
    by_hand: dict[str, Any] = dict(options)
    if "project" in options:

        def project(elements: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            allowed, mask = in_the_picture(scaler.inverse(elements), mask)
            return scaler(allowed), mask

        by_hand["project"] = project
    if isinstance(options.get("init"), nn.Module):
        by_hand["init"] = nn.Sequential(options["init"], scaler)
    plain = make(decoder.encoder, **by_hand)
    plain.initial_elements = decoder.initial_elements
    z = torch.randn(3, D, **DOUBLE, requires_grad=True)
    init = inner = None
    if given != "own":
        elements = scaler.inverse(torch.randn(3, N, C, **DOUBLE)).requires_grad_()
        mask = torch.rand(3, N, **DOUBLE).index_fill(1, torch.tensor([1]), 0.0)  # all are taken as they are
        pair = given == "elements and mask" and decoder.mask_clamp is not None
        init, inner = ((elements, mask), (scaler(elements), mask)) if pair else (elements, scaler(elements))
    actual, expected = decoder(z, init=init, record=True), plain(z, init=inner, record=True)
    expected = SetPrediction(
        scaler.inverse(expected.elements),
        expected.mask,
        expected.trajectory._replace(elements=scaler.inverse(expected.trajectory.elements)),
    )
    for a, b in zip((*actual[:2], *actual.trajectory), (*expected[:2], *expected.trajectory), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    inputs = [z, *(p for p in decoder.parameters() if p.requires_grad), *([] if init is None else [elements])]
    weight = torch.randn(3, N, C, **DOUBLE) / torch.tensor(SCALE)
    gradients = [
        torch.autograd.grad((p.elements * weight).sum() + p.mask.sum(), inputs, materialize_grads=True)
        for p in (actual, expected)
    ]
    assert any(g.any() for g in gradients[0])
    torch.testing.assert_close(*gradients, **EXACT)
    decoder.eval()
    with torch.inference_mode():
        torch.testing.assert_close(decoder(z, init=init).elements, actual.elements.detach(), **EXACT)


def test_start_and_projection_in_the_users_coordinates() -> None:
    decoder = make(scaler=make_scaler().to(devices.here()), project=in_the_picture)
    z, init = torch.randn(3, D, **DOUBLE), torch.tensor(LOCATION, **DOUBLE) + torch.rand(3, N, C, **DOUBLE)
    steps = decoder(z, init=init).trajectory.elements
    torch.testing.assert_close(steps[0], init)
    torch.testing.assert_close(steps[1:], in_the_picture(steps[1:], z)[0], **EXACT)
    own = decoder(z).trajectory.elements[0]  # uniform in [0, 1] before it is mapped
    torch.testing.assert_close(own, decoder.scaler.inverse(decoder.initial_elements).expand(3, N, C))
    assert decoder.initial_elements.min() >= 0


@pytest.mark.parametrize("preset", ["paper", "idspn"])
@pytest.mark.parametrize("init", ["learned", "random"])
def test_units_do_not_matter(preset: str, init: str) -> None:
    """Where all elements of the data are multiplied and moved, so are the predictions, exactly."""
    encoder = PooledEncoder(C, D, 8, **DOUBLE)
    z = torch.randn(3, D, **DOUBLE)
    build = getattr(DSPNDecoder, preset)
    one = build(encoder, set_size=N, channels=C, init=init, scaler=make_scaler().to(devices.here()), **DOUBLE)
    moved = make_scaler([10 * x + 7 for x in LOCATION], [10 * x for x in SCALE]).to(devices.here())
    other = build(encoder, set_size=N, channels=C, init=init, scaler=moved, **DOUBLE)
    if init == "learned":
        other.initial_elements = one.initial_elements
    a, b = (decoder(z, generator=devices.generator(1)) for decoder in (one, other))
    torch.testing.assert_close(b.elements, 10 * a.elements + 7, **EXACT)
    assert torch.equal(b.mask, a.mask)


def test_a_descent_that_goes_on_is_one_that_never_stopped() -> None:
    decoder, z = make(scaler=make_scaler().to(devices.here()), anchor=0.0), torch.randn(3, D, **DOUBLE)
    first = decoder(z, iters=3)
    second = decoder(z, iters=2, init=(first.elements, first.mask))
    torch.testing.assert_close(second.elements, decoder(z, iters=5).elements, **EXACT)


def test_dtypes() -> None:
    """The descent is carried in the encoder's dtype, what users see is float32 at least."""
    decoder = paper_decoder(PooledEncoder(C, D, 8), 3, 1.0, set_size=N, channels=C, scaler=make_scaler())
    decoder.project = in_the_picture
    decoder.to(devices.here(), torch.bfloat16)
    elements, mask, steps = decoder(torch.randn(2, D))
    assert (elements.dtype, steps.elements.dtype, mask.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    assert decoder(torch.randn(2, D), init=300 + torch.randn(2, N, C, **DOUBLE)).elements.dtype == torch.float32


@pytest.mark.parametrize("project", [None, in_the_picture])
def test_checkpoint_after_functional_call_is_right_or_an_error(project: Any) -> None:
    """The backward pass computes steps again when the module has its own buffers back, which a projection needs."""
    decoder = make(scaler=make_scaler().to(devices.here()), project=project)
    z = torch.randn(3, D, **DOUBLE, requires_grad=True)
    others = {"scaler.location": torch.tensor([320.0, -0.2], **DOUBLE), "scaler.scale": torch.tensor([20.0, 0.02])}

    def gradient(buffers: dict[str, Tensor]) -> Tensor:
        elements = functional_call(decoder, buffers, (z,)).elements
        return torch.autograd.grad(elements.square().sum(), z)[0]

    own = dict(decoder.scaler.named_buffers(prefix="scaler"))
    expected = [gradient(buffers) for buffers in (own, others)]
    assert expected[0].any()
    assert not torch.allclose(*expected)
    decoder.checkpoint = True
    torch.testing.assert_close(gradient(own), expected[0], **EXACT)
    if project is None:
        torch.testing.assert_close(gradient(others), expected[1], **EXACT)
    else:
        with pytest.raises(RuntimeError, match="`checkpoint` needs an objective that does the same"):
            gradient(others)
