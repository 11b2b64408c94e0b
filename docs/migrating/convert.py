"""Load weights of the published code, `dspn/` of Cyanogenoid/dspn, into setpred's modules.

Each function takes a state dict of the published class, as `torch.load(log)["weights"]` has it, and the prefix under
which that class's weights stand in it. It returns a module of setpred with those weights, which computes the same:

    state = torch.load("logs/clevr-state", weights_only=False)["weights"]
    encoder = relation_encoder(state, "set_encoder.")
    decoder = dspn_decoder(state, encoder, "set_decoder.", iters=10, lr=800, batch_size=32)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from setpred import DSPNDecoder, FSPool, LSTMDecoder, MLPDecoder, PooledEncoder, RelationEncoder
from setpred.encoders import SetEncoder

State = Mapping[str, Tensor]


def _part(state: State, prefix: str, needs: str) -> dict[str, Tensor]:
    part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if needs not in part:
        raise ValueError(f"`state` must have the key {prefix + needs!r}, got {', '.join(state) or 'no keys'}")
    return part


def fspool(state: State, prefix: str = "") -> FSPool:
    """Convert `FSPool`."""
    weight = _part(state, prefix, "weight")["weight"]
    pool = FSPool(weight.shape[0], weight.shape[1] - 1)
    pool.load_state_dict({"weight": weight})
    return pool


def pooled_encoder(state: State, prefix: str = "", *, in_channels: int) -> PooledEncoder:
    """Convert `FSEncoder`; `in_channels` without the mask, 2 for MNIST."""
    part = _part(state, prefix, "conv.4.weight")
    hidden, given, _ = part["conv.0.weight"].shape
    if given != in_channels + 1:
        raise ValueError(
            f"`state` must be of an FSEncoder, whose first layer has in_channels + 1 = {in_channels + 1} inputs, "
            f"got {given}: FSEncoderSized has no counterpart here"
        )
    encoder = PooledEncoder(in_channels, len(part["pool.weight"]), hidden, scaling="dspn")
    names = {f"layers.{i}.{kind}": f"conv.{2 * i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    encoder.load_state_dict(_linear(part, names) | {"pool.fspool.weight": part["pool.weight"]})
    return encoder


def relation_encoder(state: State, prefix: str = "") -> RelationEncoder:
    """Convert `RNFSEncoder`; its unused layer `lin` is left out."""
    part = _part(state, prefix, "conv.2.weight")
    hidden, given, *_ = part["conv.0.weight"].shape
    encoder = RelationEncoder(given // 2 - 1, len(part["pool.weight"]), hidden, scaling="dspn")
    names = {f"{new}.{kind}": f"conv.{i}.{kind}" for new, i in (("pair", 0), ("out", 2)) for kind in ("weight", "bias")}
    encoder.load_state_dict(_linear(part, names) | {"pool.fspool.weight": part["pool.weight"]})
    return encoder


def _linear(part: State, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename layers; a convolution of width 1, (out, in, 1[, 1]), is a linear layer (out, in)."""
    return {new: part[old].flatten(1) if part[old].dim() > 1 else part[old] for new, old in names.items()}


class LearnedStart(nn.Module):
    """Initial set and initial mask, both learned; in setpred, masks start at 0.5 unless a module gives them."""

    def __init__(self, elements: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.elements, self.mask = nn.Parameter(elements), nn.Parameter(mask)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Give every sample the same start, (B, N, C) and (B, N)."""
        return self.elements.expand(len(z), -1, -1), self.mask.expand(len(z), -1)


def dspn_decoder(
    state: State,
    encoder: SetEncoder,
    prefix: str = "",
    *,
    iters: int = 10,
    lr: float = 800.0,
    batch_size: int = 32,
    **options: Any,
) -> DSPNDecoder:
    """Convert `DSPN`, with the `lr` and batch size that it was trained with; options go to DSPNDecoder.paper."""
    part = _part(state, prefix, "starting_set")
    _, channels, set_size = part["starting_set"].shape
    start = LearnedStart(part["starting_set"].mT.contiguous(), part["starting_mask"].clone())
    recipe = {"iters": iters, "lr": lr / batch_size, "init": start} | options
    return DSPNDecoder.paper(encoder, set_size=set_size, channels=channels, **recipe)


def mlp_decoder(state: State, prefix: str = "", *, set_size: int) -> MLPDecoder:
    """Convert `MLPDecoder`, whose outputs are channel by channel; here they are element by element.

    Setpred adds 1 to the mask and clamps it to [0, 1]: the 1 is taken off the bias, the clamp is new.
    """
    part = _part(state, prefix, "model.4.weight")
    hidden, given = part["model.0.weight"].shape
    channels = len(part["model.4.bias"]) // set_size - 1
    decoder = MLPDecoder(given, set_size, channels, hidden)
    new = _linear(part, {f"{new}.{kind}": f"model.{i}.{kind}" for new, i in _MLP for kind in ("weight", "bias")})
    order = torch.arange(len(part["model.4.bias"])).view(channels + 1, set_size).T.flatten()
    new["output.weight"] = new["output.weight"][order]
    new["output.bias"] = _less_one(new["output.bias"][order].view(set_size, -1)).flatten()
    decoder.load_state_dict(new)
    return decoder


_MLP = (("input", 0), ("hidden", 2), ("output", 4))


def lstm_decoder(state: State, prefix: str = "", *, set_size: int) -> LSTMDecoder:
    """Convert `RNNDecoder`; for the mask, see :func:`mlp_decoder`."""
    part = _part(state, prefix, "lin.weight")
    hidden, given = part["lin.weight"].shape
    decoder = LSTMDecoder(given, set_size, len(part["out.bias"]) - 1, hidden)
    new = {f"lstm.{name.removeprefix('model.')}": part[name] for name in part if name.startswith("model.")}
    names = {
        f"{new}.{kind}": f"{old}.{kind}"
        for new, old in (("cell", "lin"), ("output", "out"))
        for kind in ("weight", "bias")
    }
    new |= _linear(part, names)
    new["output.bias"] = _less_one(new["output.bias"])
    decoder.load_state_dict(new)
    return decoder


def _less_one(bias: Tensor) -> Tensor:
    """Take 1 off the last channel, the mask's."""
    shift = torch.zeros_like(bias)
    shift[..., -1] = 1
    return bias - shift
