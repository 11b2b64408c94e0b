"""DSPNDecoder decodes anywhere: modes, dtypes, autocast, copies and checkpoints."""

import copy
import io
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setpred import DSPNDecoder, PooledEncoder, RelationEncoder, SetPrediction
from tests import devices
from tests.rules import recipe

PRESETS = pytest.mark.parametrize("name", ["paper", "idspn"])
ENCODERS = pytest.mark.parametrize("make_encoder", [RelationEncoder, PooledEncoder])


def make_decoder(name: str = "paper", make_encoder: type[nn.Module] = PooledEncoder, **options: Any) -> DSPNDecoder:
    # Sets that move little: those of a conditioned encoder soon go their own way in half precision.
    encoder = make_encoder(2, 16, 16, size_feature=True, scaling="dspn", dtype=options.get("dtype"))
    return getattr(DSPNDecoder, name)(encoder, **{"iters": 4, "set_size": 5, "channels": 2} | recipe(name) | options)


def assert_equal(actual: SetPrediction, expected: SetPrediction, **tolerance: float) -> None:
    torch.testing.assert_close(tuple(actual[:2]), tuple(expected[:2]), **tolerance)


@ENCODERS
@PRESETS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, {"mask_clamp": None}, {"tol": 0.1}], ids=["plain", "no mask", "tol"])
def test_every_mode_gives_the_same(
    make_encoder: type[nn.Module], name: str, training: bool, mode: Any, options: dict[str, Any]
) -> None:
    decoder = make_decoder(name, make_encoder, dtype=torch.float64, **options)
    z = torch.randn(3, 16, dtype=torch.float64)
    expected = decoder(z, record=True)
    decoder.train(training)
    with mode():
        actual = decoder(z, record=True)
    for a, e in zip((*actual[:2], *actual.trajectory), (*expected[:2], *expected.trajectory), strict=True):
        torch.testing.assert_close(a.clone(), e, rtol=1e-12, atol=1e-12)
    assert actual.elements.requires_grad == (mode is nullcontext)


@PRESETS
def test_trains_on_after_validation_in_inference_mode(name: str) -> None:
    decoder, z = make_decoder(name), torch.randn(3, 16)
    with torch.inference_mode():
        decoder.eval()(z)
    decoder.train()(z).elements.sum().backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())


@ENCODERS
@PRESETS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(make_encoder: type[nn.Module], name: str, dtype: torch.dtype) -> None:
    decoder = make_decoder(name, make_encoder)
    z = torch.randn(3, 16)
    expected = decoder(z)
    decoder.to(dtype)
    elements, mask, trajectory = decoder(z.to(dtype), record=True)
    assert elements.dtype == mask.dtype == trajectory.elements.dtype == trajectory.mask.dtype == dtype
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    assert trajectory.repr_loss.dtype == trajectory.grad_norm.dtype == at_least_float32
    torch.testing.assert_close(elements.float(), expected.elements, rtol=0.1, atol=0.1)
    elements.float().square().sum().backward()
    for parameter in decoder.parameters():
        assert parameter.grad.dtype == dtype
        assert parameter.grad.isfinite().all()


@PRESETS
@pytest.mark.parametrize("init", ["learned", "random"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_z_may_be_of_another_dtype_than_the_parameters(name: str, init: str, dtype: torch.dtype) -> None:
    decoder = make_decoder(name, init=init)
    z = torch.randn(3, 16, dtype=dtype, requires_grad=True)
    prediction = decoder(z)
    assert prediction.elements.dtype == prediction.mask.dtype == torch.float32
    prediction.elements.sum().backward()
    assert z.grad.dtype == dtype
    assert z.grad.any()


class Start(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 15)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.linear(z).view(-1, 5, 3)
        return rows[..., :2], rows[..., 2]


@ENCODERS
@PRESETS
@pytest.mark.parametrize("make_init", [lambda: "learned", lambda: "random", Start], ids=["learned", "random", "module"])
def test_trains_under_autocast(make_encoder: type[nn.Module], name: str, make_init: Any) -> None:
    backbone, decoder = nn.Linear(8, 16), make_decoder(name, make_encoder, init=make_init())
    x = torch.randn(3, 8)
    generator = devices.generator(0)
    expected = decoder(backbone(x), generator=generator.manual_seed(0))
    with devices.autocast(torch.bfloat16):
        z = backbone(x)
        assert z.dtype == torch.bfloat16
        prediction = decoder(z, generator=generator.manual_seed(0))
    assert prediction.elements.dtype == prediction.mask.dtype == torch.float32  # the descent is carried in float32
    assert_equal(prediction, expected, rtol=0.1, atol=0.1)
    (prediction.elements.square().sum() + prediction.mask.sum()).backward()
    for parameter in (*backbone.parameters(), *decoder.parameters()):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.dtype == torch.float32
    assert backbone.weight.grad.any()


@PRESETS
def test_state_dict_holds_parameters_only(name: str) -> None:
    decoder = make_decoder(name)
    assert list(decoder.state_dict()) == [key for key, _ in decoder.named_parameters()]
    assert "initial_elements" in decoder.state_dict()
    file = io.BytesIO()
    torch.save(decoder.state_dict(), file)
    file.seek(0)
    other = make_decoder(name, iters=9, lr=0.5)  # which may change between training and evaluation
    other.load_state_dict(torch.load(file))
    z = torch.randn(3, 16)
    assert_equal(other(z, iters=4), make_like(decoder, name, lr=0.5)(z), rtol=0, atol=0)
    assert not torch.equal(other(z).elements, decoder(z).elements)
    other.iters, other.lr = decoder.iters, decoder.lr
    assert_equal(other(z), decoder(z), rtol=0, atol=0)


def make_like(decoder: DSPNDecoder, name: str, **options: Any) -> DSPNDecoder:
    other = make_decoder(name, **options)
    other.load_state_dict(decoder.state_dict())
    return other


@PRESETS
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda decoder: pickle.loads(pickle.dumps(decoder))])
def test_copies_are_equal_and_independent(name: str, copied: Any) -> None:
    decoder, z = make_decoder(name), torch.randn(3, 16)
    decoder(z).elements.sum().backward()
    other = copied(decoder)
    assert_equal(other(z), decoder(z), rtol=0, atol=0)
    assert repr(other) == repr(decoder)
    before = decoder(z)
    with torch.no_grad():
        other.initial_elements.zero_()
        other.encoder.layers[0].weight.zero_()
    assert_equal(decoder(z), before, rtol=0, atol=0)


def test_moves_to_another_device() -> None:
    decoder = make_decoder().to("meta")
    elements, mask, _ = decoder(torch.randn(3, 16, device="meta"))
    assert elements.device.type == mask.device.type == "meta"
    assert elements.shape == (3, 5, 2)
