"""SlotDecoder is the slot attention of another package: parameters copied, the same slots at the start."""

from collections.abc import Iterable

import pytest
import torch
from slot_attention import SlotAttention
from torch import Tensor, nn

from setpred import SlotDecoder

NAMES = {
    "slots_mu": "slot_mean",
    "slots_logsigma": "slot_log_std",
    "to_q.weight": "query.weight",
    "to_k.weight": "key.weight",
    "to_v.weight": "value.weight",
    "norm_input": "norm_tokens",
    "norm_pre_ff": "norm_mlp",
}
BIASES = ("to_q.bias", "to_k.bias", "to_v.bias")  # here there are none
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])


def published(dtype: torch.dtype, iters: int) -> SlotAttention:
    slots = SlotAttention(num_slots=5, dim=8, iters=iters, hidden_dim=16).to(dtype)
    slots.mlp[1].inplace = False
    with torch.no_grad():
        for name, parameter in slots.named_parameters():
            parameter.mul_(0) if name in BIASES else parameter.add_(0.3 * torch.randn_like(parameter))
    return slots


def renamed(values: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    result = {}
    for name, value in values:
        if name not in BIASES:
            for there, here in NAMES.items():
                name = name.replace(there, here)
            result[name] = value.detach().flatten() if name.startswith("slot_") else value.detach()
    return result


def decoder_of(slots: SlotAttention, **options: object) -> SlotDecoder:
    """The decoder with its parameters, of which the elements are the slots."""
    decoder = SlotDecoder(8, 5, 8, 8, mask_clamp=None, dtype=slots.slots_mu.dtype, **options)
    decoder.output = nn.Identity()
    decoder.load_state_dict(renamed(slots.named_parameters()))
    return decoder


@DTYPES
@pytest.mark.parametrize("iters", [1, 4])
def test_slots_and_gradients_are_the_published_ones(dtype: torch.dtype, tolerance: float, iters: int) -> None:
    other = published(dtype, iters)
    decoder, x = decoder_of(other, iters=iters), torch.randn(3, 7, 8, dtype=dtype)
    results = []
    for model in (other, decoder):
        tokens = x.clone().requires_grad_()
        torch.manual_seed(1)
        out = model(tokens)
        slots = out.elements if model is decoder else out
        slots.sin().sum().backward()
        gradients = renamed((name, p.grad) for name, p in model.named_parameters())
        results.append({"slots": slots.detach(), "tokens": tokens.grad} | gradients)
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


@DTYPES
def test_implicit_is_one_published_iteration_from_where_others_led(dtype: torch.dtype, tolerance: float) -> None:
    other = published(dtype, 3)
    decoder, x = decoder_of(other, iters=4, differentiate="implicit"), torch.randn(3, 7, 8, dtype=dtype)
    start = torch.randn(3, 5, 8, dtype=dtype)

    def iterate(init: Tensor, iters: int) -> Tensor:
        """The slots of the package, which only draws them."""
        other.iters = iters
        noise = (init - other.slots_mu) / other.slots_logsigma.exp()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *_, **__: noise.detach())
            slots: Tensor = other(x)
        return slots

    expected = iterate(iterate(start, 3).detach(), 1)
    slots = decoder(x, init=start).elements
    torch.testing.assert_close(slots, expected, rtol=tolerance, atol=tolerance)
    expected.sin().sum().backward()
    slots.sin().sum().backward()
    wanted = renamed((name, p.grad) for name, p in other.named_parameters())
    found = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    assert wanted.keys() - found.keys() == {"slot_mean", "slot_log_std"}
    torch.testing.assert_close(found, {name: wanted[name] for name in found}, rtol=tolerance, atol=tolerance)
