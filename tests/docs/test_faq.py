"""The errors that the FAQ explains are those that users see."""

import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

from setpred import (
    DSPNDecoder,
    DSPNLoss,
    FSPool,
    GradientDescent,
    HungarianLoss,
    MLPDecoder,
    PooledEncoder,
    SetPrediction,
    SlotDecoder,
    StandardScaler,
    TransformerDecoder,
    earth_mover_distance,
    hungarian_loss,
    linear_assignment,
    matched_cross_entropy,
    on_channels,
    pad_sets,
    sinkhorn_loss,
    unpad_sets,
)
from setpred.functional import assignment, matched_pairs
from setpred.metrics import average_precision
from setpred.plot import draw_points
from tests.rules import paper_decoder

# An entry of the FAQ's list: the message between backticks, then what to do.
ENTRY = re.compile(r"^(`+) ?(.+?) ?\1\n:", re.MULTILINE)
FAQ = (Path(__file__).parents[2] / "docs/faq.md").read_text()
MESSAGES = [message for _, message in ENTRY.findall(FAQ)]

weight = torch.ones(2, requires_grad=True)
rows, sets, mask = torch.rand(8, 10, 4), torch.rand(3, 5, 2), torch.ones(3, 5)
eight_to_twelve = on_channels("l1", slice(8, 12))


def decoder(**options: object) -> DSPNDecoder:
    return paper_decoder(PooledEncoder(2, 8, 8), set_size=5, channels=2, **options)


def train(encoder: Callable[..., torch.Tensor], width: int = 5) -> None:
    paper_decoder(encoder, set_size=5, channels=2)(torch.randn(3, width)).elements.sum().backward()


def draw_without_matplotlib() -> None:
    with patch.dict(sys.modules, {"matplotlib.pyplot": None}):
        draw_points(torch.rand(3, 2))


def decode_in_inference_mode() -> None:
    encoder = PooledEncoder(2, 8, 8)
    encoder.register_full_backward_hook(lambda *_: None)
    with torch.inference_mode():
        paper_decoder(encoder, set_size=5, channels=2)(torch.randn(3, 8))


def change_before_backward() -> None:
    checkpointed = decoder(checkpoint=True)
    elements = checkpointed(torch.randn(3, 8)).elements
    with torch.no_grad():
        checkpointed.encoder.layers[0].weight.add_(1)
    elements.sum().backward()


def turn_before_backward(layer: nn.Module) -> None:
    checkpointed = decoder(checkpoint=True)
    checkpointed.encoder.layers.append(layer)
    elements = checkpointed(torch.randn(3, 8)).elements
    checkpointed.eval()
    elements.sum().backward()


def outer_loss(prediction: SetPrediction) -> None:
    DSPNLoss(PooledEncoder(2, 8), hungarian_loss)(prediction, sets)


# What provokes each of them.
CALLS: list[Callable[[], object]] = [
    lambda: PooledEncoder(4, 16)(rows.mT),
    lambda: PooledEncoder(4, 16)(rows, torch.ones(8, 10, dtype=torch.long)),
    lambda: decoder()(torch.ones(3, 8, dtype=torch.long)),
    lambda: SlotDecoder(64, 5, 2)(torch.randn(8, 64)),
    lambda: SlotDecoder(64, 5, 2, tokens=16)(torch.randn(8, 64), torch.ones(8, 16)),
    lambda: paper_decoder(PooledEncoder(2, 64), set_size=5, channels=2)(torch.randn(8, 128)),
    lambda: PooledEncoder(4, 16)(rows[:, :0]),
    lambda: TransformerDecoder(4, 5, 2, 8, layers=1)(rows[:, :0]),
    lambda: TransformerDecoder(4, 5, 2, 20),
    lambda: pad_sets([torch.rand(12, 2)], size=10),
    lambda: decoder(scaler=StandardScaler(4)),
    lambda: HungarianLoss(scaler=StandardScaler(4))(sets, sets),
    lambda: DSPNLoss(PooledEncoder(2, 8), HungarianLoss(scaler=StandardScaler(2))),
    lambda: StandardScaler(2).fit((sets, mask)),
    lambda: StandardScaler(2).fit(sets / 0, mask),
    lambda: StandardScaler(2).fit(sets, 0 * mask),
    lambda: StandardScaler(2).fit(1e60 * sets.double()),
    lambda: hungarian_loss(torch.rand(1, 10, 2), torch.rand(1, 12, 2), torch.rand(1, 10), presence="feature"),
    lambda: hungarian_loss(torch.rand(1, 10, 2), torch.rand(1, 12, 2), presence="none"),
    lambda: HungarianLoss(matches_per_target=2),
    lambda: DSPNLoss(PooledEncoder(2, 8), hungarian_loss, steps="last")(
        SetPrediction(torch.rand(1, 10, 2), torch.rand(1, 10)),
        torch.rand(1, 12, 2),
        torch.ones(1, 12),
        z=torch.rand(1, 8),
    ),
    lambda: hungarian_loss(sets, sets, mask.bool()),
    lambda: hungarian_loss(sets, sets, 1.5 * mask, presence="bce"),
    lambda: hungarian_loss(sets, sets, mask.clone().requires_grad_(), 0 * mask, presence="bce"),
    lambda: hungarian_loss(sets, sets, mask, cost=on_channels("l1", slice(0, 2))),
    lambda: hungarian_loss(sets, sets, presence="bce"),
    lambda: hungarian_loss(MLPDecoder(8, 5, 2, mask_clamp=None)(torch.randn(3, 8)), sets, presence="bce"),
    lambda: outer_loss(decoder().eval()(torch.randn(3, 8))),
    lambda: outer_loss(decoder(differentiate="implicit")(torch.randn(3, 8), record=True)),
    lambda: hungarian_loss(decoder()(torch.randn(3, 8)), sets, mask),
    lambda: earth_mover_distance(decoder()(torch.randn(3, 8)), sets),
    lambda: outer_loss((sets, mask)),
    lambda: DSPNLoss(PooledEncoder(2, 8), hungarian_loss)(SetPrediction(sets, mask), sets, mask, torch.rand(3, 8)),
    lambda: DSPNLoss(PooledEncoder(2, 8), HungarianLoss(reduction="none"), steps="last")(
        SetPrediction(sets, mask), sets
    ),
    lambda: unpad_sets(sets, mask.index_fill(0, torch.tensor([1]), torch.nan)),
    lambda: linear_assignment(torch.full((4, 10, 10), torch.nan).index_fill(0, torch.arange(3), 0.0)),
    lambda: linear_assignment(torch.full((1, 2, 2), torch.inf)),
    lambda: earth_mover_distance(torch.tensor([0, torch.nan]).view(2, 1, 1).expand(2, 3, 1), torch.rand(2, 4, 1)),
    lambda: torch.func.hessian(lambda pred: sinkhorn_loss(pred, sets))(sets),
    lambda: hungarian_loss(torch.rand(1, 2, 6), torch.rand(1, 2, 6), cost=eight_to_twelve, presence="none"),
    lambda: GradientDescent(1.0, nesterov=True),
    lambda: decoder(lr="fast"),
    lambda: decoder(mask_clamp=None, init=nn.Identity())(torch.randn(3, 8), init=(sets, mask)),
    decode_in_inference_mode,
    lambda: train(lambda elements, mask: elements.detach().sum(1), width=2),
    lambda: decoder().diagnose(torch.randn(0, 8), sets[:0]),
    lambda: decoder().diagnose(torch.randn(3, 8), torch.rand(3, 6, 2)),
    lambda: train(lambda elements, mask: elements.detach().sum(1) * weight, width=2),
    change_before_backward,
    lambda: turn_before_backward(nn.Dropout(0.5)),
    lambda: torch.func.vmap(decoder(checkpoint=True))(torch.randn(2, 3, 8)),
    lambda: FSPool(2, relaxed=1.0)(sets, mask),
    lambda: matched_cross_entropy(torch.rand(1, 2, 4), torch.tensor([[3]]), torch.tensor([[0, -1]])),
    lambda: average_precision(rows, torch.rand(8, 10), rows, target_class=torch.zeros(8, 10, dtype=torch.long)),
    lambda: average_precision(rows, torch.full((8, 10), torch.nan), rows),
    lambda: average_precision(rows, torch.rand(8, 10), rows, pred_mask=torch.rand(8, 10)),
    lambda: torch.func.vmap(matched_pairs)(torch.zeros(2, 3, 5, dtype=torch.long)),
    lambda: linear_assignment(torch.rand(1, 2, 2), solver="cuda"),
    draw_without_matplotlib,
    lambda: train(lambda elements, mask: torch.cdist(elements, elements).sum(-1) * mask),
]

# Those that only older versions of PyTorch give: the first that does not.
GONE_SINCE = {"the derivative for '_cdist_backward' is not implemented": "2.14"}


# PyTorch's own: it defines operators by scripts when forward mode is first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize(("message", "call"), list(zip(MESSAGES, CALLS, strict=True)), ids=MESSAGES)
def test_message(message: str, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assignment, "_cuda_solver_installed", lambda: False)  # also where it is
    shown = re.escape(message.removesuffix(" ..."))
    gone = message in GONE_SINCE and torch.__version__ >= GONE_SINCE[message]
    errors = (ValueError, TypeError, RuntimeError, ImportError, RuntimeWarning)
    with nullcontext() if gone else pytest.raises(errors, match=shown):
        call()
