"""The whole: backbone, decoder, loss, training, evaluation and back to lists of sets."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setpred import (
    ChamferLoss,
    DSPNDecoder,
    DSPNLoss,
    HungarianLoss,
    LSTMDecoder,
    MLPDecoder,
    PooledEncoder,
    RelationEncoder,
    SetPrediction,
    pad_sets,
    unpad_sets,
)

N, C, D = 4, 2, 16


def make_sets(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A vector that says where a set of 1 to 4 points lies, and the set: (x, elements, mask)."""
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    x = torch.rand(count, 3)
    sizes = 1 + (4 * x[:, 2]).long()
    sets = [
        0.5 * corners[torch.randperm(4)[:n].sort().values] + 0.5 * at for n, at in zip(sizes, x[:, :2], strict=True)
    ]
    elements, mask = pad_sets(sets, size=N)
    return x, elements, mask


class Model(nn.Module):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, D))
        self.decoder = decoder

    def forward(self, x: Tensor, **options: Any) -> tuple[SetPrediction, Tensor]:
        z = self.backbone(x)
        return self.decoder(z, **options), z


def paper() -> nn.Module:
    return DSPNDecoder.paper(PooledEncoder(C, D, 32, scaling="dspn"), set_size=N, channels=C, iters=5)


def paper_relation() -> nn.Module:
    return DSPNDecoder.paper(RelationEncoder(C, D, 32, scaling="dspn"), set_size=N, channels=C, iters=5)


def idspn() -> nn.Module:
    return DSPNDecoder.idspn(PooledEncoder(C, D, 32), set_size=N, channels=C, iters=10, init="learned")


def trained(
    model: Model, loss_of: Callable[[SetPrediction, Tensor, Tensor, Tensor], Tensor], steps: int
) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        x, target, mask = make_sets(32)
        prediction, z = model(x)
        loss = loss_of(prediction, target, mask, z=z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def error(model: Model, set_loss: nn.Module, **options: Any) -> float:
    """Mean loss of sets that were not seen."""
    model.eval()
    x, target, mask = make_sets(256)
    with torch.inference_mode():
        prediction, _ = model(x, **options)
        return set_loss(prediction.elements, target, prediction.mask, mask).item()


@pytest.mark.parametrize("make_decoder", [paper, paper_relation, idspn])
@pytest.mark.parametrize("set_loss", [HungarianLoss(), ChamferLoss()], ids=["hungarian", "chamfer"])
def test_predicts_sets_from_vectors(make_decoder: Callable[[], nn.Module], set_loss: nn.Module) -> None:
    model = Model(make_decoder())
    implicit = model.decoder.differentiate == "implicit"
    options = {"repr_weight": 0.0, "steps": "last"} if implicit else {}
    before = error(model, set_loss)
    trained(model.train(), DSPNLoss(model.decoder.encoder, set_loss, **options), 60)
    assert error(model, set_loss) < 0.7 * before
    assert error(model, set_loss, iters=2 * model.decoder.iters) < 0.8 * before  # more steps than in training


@pytest.mark.parametrize("make_decoder", [MLPDecoder, LSTMDecoder])
def test_baselines_take_the_same_place(make_decoder: Callable[..., nn.Module]) -> None:
    model = Model(make_decoder(D, N, C, 32))
    loss = DSPNLoss(PooledEncoder(C, D, 32), HungarianLoss(), repr_weight=0.0, steps="last")
    before = error(model, HungarianLoss())
    trained(model.train(), loss, 60)
    assert error(model, HungarianLoss()) < 0.7 * before


@pytest.mark.parametrize("make_decoder", [paper, idspn])
def test_autoencodes(make_decoder: Callable[[], nn.Module]) -> None:
    """A decoder that is given what its encoder made of a set moves its start towards that vector, untrained."""
    decoder = make_decoder().eval()
    _, target, mask = make_sets(16)
    z = decoder.encoder(target, mask)
    with torch.no_grad():
        losses = decoder(z, iters=40, record=True).trajectory.repr_loss
    assert (losses[-1] < losses[0]).all()


def test_a_checkpoint_predicts_the_same_in_lists_of_sets() -> None:
    model = Model(idspn())
    trained(model, DSPNLoss(model.decoder.encoder, HungarianLoss(), repr_weight=0.0, steps="last"), 20)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = Model(idspn())
    other.load_state_dict(torch.load(file))
    x, _, _ = make_sets(8)
    with torch.no_grad():
        (elements, mask, _), _ = model.eval()(x)
        sets = unpad_sets(elements, mask)
        (again, again_mask, _), _ = other.eval()(x)
    assert [len(s) for s in sets] == (mask > 0.5).sum(1).tolist()
    assert all(torch.equal(s, o) for s, o in zip(sets, unpad_sets(again, again_mask), strict=True))
    padded, present = pad_sets(sets, size=N)
    assert present.sum() == (mask > 0.5).sum()
    assert padded.shape == elements.shape
