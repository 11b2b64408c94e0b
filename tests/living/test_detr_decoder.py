"""TransformerDecoder equals the decoder of DETR in transformers, given its weights, queries as elements, and tokens."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers import DetrConfig
from transformers.models.detr.modeling_detr import DetrDecoder

from setpred import TransformerDecoder

N, C, WIDTH, HEADS, LAYERS = 6, 5, 16, 4, 3
NAMES = {
    "self_attn.o_proj": "self_attn.out_proj",
    "encoder_attn.o_proj": "multihead_attn.out_proj",
    "mlp.fc1": "linear1",
    "mlp.fc2": "linear2",
    "self_attn_layer_norm": "norm1",
    "encoder_attn_layer_norm": "norm2",
    "final_layer_norm": "norm3",
}
ATTENTION = {"self_attn": "self_attn", "encoder_attn": "multihead_attn"}


def detr() -> DetrDecoder:
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config={"model_type": "resnet"},
        d_model=WIDTH,
        decoder_layers=LAYERS,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=4 * WIDTH,
        dropout=0.0,
    )
    decoder = DetrDecoder(config).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # biases are zeros
    return decoder


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their weights by our names."""
    new = {f"norm.{kind}": state[f"layernorm.{kind}"] for kind in ("weight", "bias")}
    for i in range(LAYERS):
        for kind in ("weight", "bias"):
            for theirs, ours in NAMES.items():
                new[f"layers.{i}.{ours}.{kind}"] = state[f"layers.{i}.{theirs}.{kind}"]
            for theirs, ours in ATTENTION.items():
                parts = [state[f"layers.{i}.{theirs}.{part}_proj.{kind}"] for part in "qkv"]
                new[f"layers.{i}.{ours}.in_proj_{kind}"] = torch.cat(parts)
    return new


@pytest.mark.parametrize("masked", [False, True])
def test_decoder_of_detr(masked: bool) -> None:
    """DETR adds positions to what attends; here elements and tokens carry theirs, so none are given."""
    theirs = detr()
    ours = TransformerDecoder(
        WIDTH, N, C, WIDTH, layers=LAYERS, heads=HEADS, norm_first=False, mask_clamp=None, dtype=torch.float64
    )
    ours.load_state_dict(converted(theirs.state_dict()), strict=False)
    with torch.no_grad():  # DETR's projection stands before its decoder
        ours.input.weight.copy_(torch.eye(WIDTH))
        ours.input.bias.zero_()
    tokens = torch.randn(3, 7, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(7) < torch.tensor([[7], [3], [1]]) if masked else None
    steps: list[Tensor] = []
    for layer in theirs.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: steps.append(output))
    queries = ours.queries.points.expand(3, -1, -1)
    theirs(queries, encoder_hidden_states=tokens, encoder_attention_mask=None if mask is None else mask.long())
    expected = ours.output(theirs.layernorm(torch.stack(steps)))
    actual = ours(tokens, mask).trajectory.elements
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(actual)

    def gradients(result: Tensor, decoder: nn.Module) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        names, parameters = zip(*decoder.named_parameters(), strict=True)
        found = torch.autograd.grad(
            (result * weight).sum(), [tokens, ours.queries.points, *parameters], materialize_grads=True
        )
        return found[:2], dict(zip(names, found[2:], strict=True))

    (of_inputs, of_ours), (of_expected, of_theirs) = gradients(actual, ours), gradients(expected, theirs)
    torch.testing.assert_close(of_inputs, of_expected, rtol=1e-9, atol=1e-9)
    for name, gradient in converted(of_theirs).items():
        torch.testing.assert_close(of_ours[name], gradient, rtol=1e-9, atol=1e-9)
    assert all(part.any() for part in of_inputs)
