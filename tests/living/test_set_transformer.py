"""With pool="attention", AttentionEncoder is PyTorch Geometric's set transformer, but for what its docstring adds."""

import warnings

import torch
from torch import Tensor, nn

from setpred import AttentionEncoder
from setpred.encoders.attention import _Attention

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # of torch.jit.script, which it calls
    from torch_geometric.nn import aggr

HEADS, CHANNELS = 2, 8


class Ours(nn.Module):
    """Multi-head attention to one element of zeros more, of queries and keys whose norm is bounded."""

    def __init__(self, given: nn.MultiheadAttention) -> None:
        super().__init__()
        self.given = given
        self.attention = nn.MultiheadAttention(CHANNELS, HEADS, add_zero_attn=True, batch_first=True).double()
        with torch.no_grad():
            self.attention.in_proj_weight.copy_(torch.eye(CHANNELS).repeat(3, 1))
            self.attention.in_proj_bias.zero_()
            self.attention.out_proj = given.out_proj

    def forward(
        self, x: Tensor, y: Tensor, z: Tensor, absent: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, None]:
        def bounded(rows: Tensor) -> Tensor:
            heads = rows.unflatten(-1, (HEADS, -1))
            return (heads / (1 + heads.square().mean(-1, keepdim=True)).sqrt()).flatten(-2)

        weights, biases = self.given.in_proj_weight.chunk(3), self.given.in_proj_bias.chunk(3)
        q, k, v = (rows @ w.T + b for rows, w, b in zip((x, y, z), weights, biases, strict=True))
        return self.attention(bounded(q), bounded(k), v, key_padding_mask=absent)[0], None


def copy_block(ours: _Attention, theirs: nn.Module) -> None:
    attention = theirs.attn
    projections = (ours.query, ours.key, ours.value)
    attention.in_proj_weight.copy_(torch.cat([layer.weight for layer in projections]))
    attention.in_proj_bias.copy_(torch.cat([layer.bias for layer in projections]))
    attention.out_proj.load_state_dict(ours.out.state_dict())
    theirs.lin.load_state_dict(ours.feed.state_dict())


def both() -> tuple[AttentionEncoder, nn.Module]:
    encoder = AttentionEncoder(3, 4, CHANNELS, layers=2, heads=HEADS, pool="attention", dtype=torch.float64)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    theirs = aggr.SetTransformerAggregation(CHANNELS, num_encoder_blocks=2, num_decoder_blocks=0, heads=HEADS).double()
    with torch.no_grad():
        for ours, block in zip(encoder.layers, theirs.encoders, strict=True):
            copy_block(ours.spread, block.mab)
        copy_block(encoder.pool.attention, theirs.pma.mab)
        theirs.pma.lin.load_state_dict(encoder.feed.state_dict())
        theirs.pma.seed.copy_(encoder.pool.seed)
    return encoder, theirs


def encoded(encoder: AttentionEncoder, aggregation: nn.Module, elements: Tensor, sizes: Tensor) -> Tensor:
    """What our first and last layers and their aggregation make of flat elements, set after set."""
    rows = encoder.embed(torch.cat([elements, torch.ones(len(elements), 1).double()], 1))
    pooled = aggregation(rows, torch.arange(len(sizes)).repeat_interleave(sizes))
    return encoder.out((1 + sizes).sqrt().unsqueeze(1) * pooled)


def with_our_attention(aggregation: nn.Module) -> nn.Module:
    for block in [*(layer.mab for layer in aggregation.encoders), aggregation.pma.mab]:
        block.attn = Ours(block.attn)
    return aggregation


def test_all_but_the_weights_of_attention_and_the_size_is_that_of_pyg() -> None:
    torch.manual_seed(0)
    encoder, theirs = both()
    sizes = torch.tensor([1, 3, 5, 2])
    sets = [torch.randn(int(n), 3).double() for n in sizes]
    elements = nn.utils.rnn.pad_sequence(sets, batch_first=True)
    mask = torch.arange(5) < sizes.unsqueeze(1)
    expected = encoded(encoder, with_our_attention(theirs), torch.cat(sets), sizes)
    torch.testing.assert_close(encoder(elements, mask), expected)


def test_pyg_does_not_see_how_often_an_element_is_there() -> None:
    torch.manual_seed(0)
    encoder, theirs = both()
    element = torch.randn(1, 3).double()
    once, twice = theirs(encoder.embed(torch.cat([element, torch.ones(1, 1)], 1)).repeat(3, 1), torch.tensor([0, 1, 1]))
    torch.testing.assert_close(once, twice)
    assert (encoder(element.unsqueeze(0)) - encoder(element.repeat(1, 2, 1))).norm() > 0.1
