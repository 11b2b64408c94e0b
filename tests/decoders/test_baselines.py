"""What all decoders must do whose network emits the elements: the baselines, and TransformerDecoder."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from setpred import HungarianLoss, LSTMDecoder, MLPDecoder, SetPrediction, StandardScaler, TransformerDecoder
from setpred.decoders.direct import as_prediction
from tests import devices

transformer = partial(TransformerDecoder, layers=2, heads=2)
EVERY = pytest.mark.parametrize("make", [MLPDecoder, LSTMDecoder, transformer], ids=["mlp", "lstm", "transformer"])


@EVERY
@pytest.mark.parametrize("mask_clamp", [None, (0.0, 1.0), (0.2, 0.7)])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_shapes_and_range(make: type[nn.Module], mask_clamp: tuple[float, float] | None, batch: int) -> None:
    elements, mask, trajectory = make(6, 4, 2, 8, mask_clamp=mask_clamp)(100 * torch.randn(batch, 6))
    assert elements.shape == (batch, 4, 2)
    assert mask.shape == (batch, 4)
    assert (trajectory is None) == (make is not transformer)
    low, high = mask_clamp or (1.0, 1.0)
    assert ((low <= mask) & (mask <= high)).all()
    assert mask.requires_grad == (mask_clamp is not None)


@given(
    value=st.floats(-1e4, 1e4),
    clamp=st.tuples(st.floats(-2, 0.4), st.floats(0.5, 2)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_masks_are_in_range_to_the_last_digit_and_differentiated_as_if_not_clamped(
    value: float, clamp: tuple[float, float], dtype: torch.dtype
) -> None:
    output = torch.tensor([[[5.0, value]]], dtype=dtype, requires_grad=True)
    elements, mask, _ = as_prediction(output, 1, clamp)
    assert elements.item() == 5
    assert torch.equal(mask, (output[..., 1] + 1).clamp(*clamp))
    (gradient,) = torch.autograd.grad(mask.sum(), output)
    assert gradient.tolist() == [[[0, 1]]]


@EVERY
@pytest.mark.parametrize("mask_clamp", [None, (0.0, 1.0)])
def test_gradcheck(make: type[nn.Module], mask_clamp: tuple[float, float] | None) -> None:
    """A clamped mask is differentiated as if it were not; so elements, and masks that are not cut off."""
    decoder = make(3, 2, 2, 4, mask_clamp=mask_clamp, dtype=torch.float64)
    with torch.no_grad():
        decoder.output.weight.mul_(0.1)
        decoder.output.bias.fill_(-0.5)
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    if mask_clamp is not None:
        assert ((decoder(z).mask > 0) & (decoder(z).mask < 1)).all()
    devices.gradcheck(lambda z: tuple(part for part in decoder(z)[:2] if part.requires_grad), z)


@EVERY
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_mode_gives_the_same(make: type[nn.Module], mode: Any) -> None:
    decoder, z = make(6, 4, 2, 8), torch.randn(3, 6)
    expected = decoder(z)
    decoder.eval()
    with mode():
        actual = decoder(z)
    torch.testing.assert_close(tuple(part.clone() for part in actual[:2]), tuple(expected[:2]))


@EVERY
def test_a_sample_alone_is_decoded_as_in_a_batch(make: type[nn.Module]) -> None:
    decoder, z = make(6, 4, 2, 8, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    alone = [decoder(z[b : b + 1]) for b in range(5)]
    torch.testing.assert_close(torch.cat([p.elements for p in alone]), decoder(z).elements)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_kept(make: type[nn.Module], dtype: torch.dtype) -> None:
    elements, mask, _ = make(6, 4, 2, 8, dtype=dtype)(torch.randn(3, 6, dtype=dtype))
    assert elements.dtype == mask.dtype == dtype


@EVERY
@pytest.mark.filterwarnings("ignore:RNN module weights:UserWarning")  # cuDNN copies those of a copy together
def test_state_dict_and_copies(make: type[nn.Module]) -> None:
    decoder, other, z = make(6, 4, 2, 8), make(6, 4, 2, 8), torch.randn(3, 6)
    assert list(decoder.state_dict()) == [name for name, _ in decoder.named_parameters()]
    assert not torch.equal(other(z).elements, decoder(z).elements)
    other.load_state_dict(decoder.state_dict())
    assert torch.equal(other(z).elements, decoder(z).elements)
    copied = copy.deepcopy(decoder)
    decoder.reset_parameters()
    assert not torch.equal(other(z).elements, decoder(z).elements)
    assert torch.equal(other(z).elements, copied(z).elements)
    assert decoder.extra_repr() == "set_size=4, channels=2, mask_clamp=(0.0, 1.0)"


@EVERY
def test_compiles(make: type[nn.Module]) -> None:
    decoder, z = make(6, 4, 2, 8), torch.randn(3, 6)
    torch._dynamo.reset()
    compiled = torch.compile(decoder, fullgraph=make is not LSTMDecoder, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(tuple(compiled(z)[:2]), tuple(decoder(z)[:2]))
    torch._dynamo.reset()


@EVERY
@pytest.mark.parametrize("mask_clamp", [None, (0.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_are_mapped_by_the_scaler(
    make: type[nn.Module], mask_clamp: tuple[float, float] | None, dtype: torch.dtype
) -> None:
    scaler = StandardScaler(2).fit(torch.tensor([300.0, -2.0]) + torch.tensor([40.0, 0.1]) * torch.randn(9, 2))
    decoder = make(6, 4, 2, 8, mask_clamp=mask_clamp, scaler=scaler, dtype=dtype)
    plain = make(6, 4, 2, 8, mask_clamp=mask_clamp, dtype=dtype)
    plain.load_state_dict(decoder.state_dict(), strict=False)
    z = torch.randn(3, 6, dtype=dtype)
    actual, expected = decoder(z), plain(z)
    assert actual.elements.dtype == torch.float32  # where users are, half precision is not enough
    assert torch.equal(actual.elements, scaler.inverse(expected.elements))
    assert torch.equal(actual.mask, expected.mask)
    assert decoder.state_dict().keys() == plain.state_dict().keys() | {"scaler.location", "scaler.scale"}


@EVERY
def test_learns_one_set(make: type[nn.Module]) -> None:
    decoder, z = make(6, 4, 2, 16), torch.randn(2, 6)
    target, target_mask = torch.rand(2, 4, 2), torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    optimizer, loss_of = torch.optim.Adam(decoder.parameters(), lr=0.01), HungarianLoss()
    losses = []
    for _ in range(150):
        prediction: SetPrediction = decoder(z)
        loss = loss_of(prediction.elements, target, prediction.mask, target_mask)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


@EVERY
@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "`in_channels` must be at least 1, got 0", {"in_channels": 0}),
        (ValueError, "`set_size` must be at least 1, got 0", {"set_size": 0}),
        (TypeError, "`set_size` must be an integer, got 2.5", {"set_size": 2.5}),
        (ValueError, "`channels` must be at least 1, got 0", {"channels": 0}),
        (ValueError, "`hidden_channels` must be at least 1, got 0", {"hidden_channels": 0}),
        (ValueError, "`mask_clamp` must be an increasing pair of numbers or None, got", {"mask_clamp": (1.0, 0.0)}),
        (ValueError, "`scaler` must have as many channels as the elements, 2, got 3", {"scaler": StandardScaler(3)}),
    ],
)
def test_refuses_settings(make: type[nn.Module], error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        make(**{"in_channels": 6, "set_size": 4, "channels": 2} | options)


@EVERY
@pytest.mark.parametrize(
    ("error", "message", "z"),
    [
        (ValueError, r"`z` must have shape \(B, 6\), got float32 of shape \(3, 5\)", torch.zeros(3, 5)),
        (ValueError, r"`z` must have shape \(B, 6\), got float32 of shape \(6,\)", torch.zeros(6)),
        (TypeError, r"`z` must have a floating dtype, got int64 of shape \(3, 6\)", torch.zeros(3, 6).long()),
        (TypeError, "`z` must be a tensor, got None", None),
    ],
)
def test_refuses_inputs(make: type[nn.Module], error: type[Exception], message: str, z: Any) -> None:
    with pytest.raises(error, match=message):
        make(6, 4, 2, 8)(z)
