"""The same sets have the same loss, however many rows they were padded to."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from setpred import (
    ChamferLoss,
    DSPNLoss,
    HungarianLoss,
    PooledEncoder,
    RelationEncoder,
    SinkhornLoss,
    SlicedWassersteinLoss,
    chamfer_loss,
    pad_sets,
    sinkhorn_loss,
)
from tests.rules import paper_decoder

EXACT = {"rtol": 1e-9, "atol": 1e-9}
N, C, D = 6, 2, 8
LOSSES = [
    *(loss(presence=presence) for loss in (HungarianLoss, ChamferLoss) for presence in ("feature", "bce", "none")),
    *(SinkhornLoss(iters=4, presence=presence) for presence in ("feature", "none")),
    SlicedWassersteinLoss(directions=torch.eye(C + 1)),
    SlicedWassersteinLoss(directions=torch.eye(C), presence="none"),
]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=str)
SIZES = [[1, 2], [0, 0], [0, 3], [6, 1]]


def random_sets(sizes: list[int]) -> list[Tensor]:
    return [torch.rand(n, C, dtype=torch.float64) for n in sizes]


def assert_same(values: list[Tensor], inputs: list[Tensor]) -> None:
    gradients = [
        torch.autograd.grad(value.sum(), inputs, materialize_grads=True, allow_unused=True) for value in values
    ]
    for value, gradient in zip(values[1:], gradients[1:], strict=True):
        torch.testing.assert_close(value, values[0], **EXACT)
        torch.testing.assert_close(gradient, gradients[0], **EXACT)


@every_loss
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("steps", [False, True])
def test_set_losses(loss: nn.Module, sizes: list[int], steps: bool) -> None:
    """Fewer rows than predictions, as many, and more; and absent elements in any place."""
    sets, lead = random_sets(sizes), (3,) if steps else ()
    pred = torch.rand(*lead, len(sets), N, C, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(*lead, len(sets), N, dtype=torch.float64, requires_grad=True)
    refused = isinstance(loss, HungarianLoss) and loss.presence == "feature"
    values = []
    for rows in (max(sizes), N, *([] if refused else [N + 1, 3 * N])):
        elements, present = pad_sets(sets, size=rows)
        shuffle = torch.randperm(rows)
        values.append(loss(pred, elements, mask, present))
        values.append(loss(pred, elements[:, shuffle], mask, present[:, shuffle].double()))
    assert_same(values, [pred, mask])
    if refused:
        elements, present = pad_sets(sets, size=N + 1)
        with pytest.raises(ValueError, match="`target` must have at most as many rows as `pred`"):
            loss(pred, elements, mask, present)


@pytest.mark.parametrize("function", [chamfer_loss, sinkhorn_loss])
def test_more_targets_than_predictions_count_as_they_are(function: object) -> None:
    pred, mask = torch.rand(1, 3, C, dtype=torch.float64), torch.rand(1, 3, dtype=torch.float64)
    target = torch.rand(1, 5, C, dtype=torch.float64)
    padded, present = F.pad(target, (0, 0, 0, 4)), torch.arange(9).unsqueeze(0) < 5
    torch.testing.assert_close(function(pred, padded, mask, present), function(pred, target, mask), **EXACT)


@pytest.mark.parametrize("function", [chamfer_loss, sinkhorn_loss])
def test_without_masks_sets_are_as_they_are(function: object) -> None:
    """Point clouds of different sizes: the channel of ones takes part in the mean over channels alone."""
    pred, target = torch.rand(2, 7, C, dtype=torch.float64), torch.rand(2, 4, C, dtype=torch.float64)
    value = function(pred, target, cost="mse", presence="none")
    scaled = {"epsilon": 0.01 * C / (C + 1)} if function is sinkhorn_loss else {}
    as_feature = function(pred, target, cost="mse", **scaled)
    torch.testing.assert_close(as_feature, C / (C + 1) * value, **EXACT)


@pytest.mark.filterwarnings("ignore:`pred_mask` is exactly 0 or 1:RuntimeWarning")  # the decoder's are clamped
@every_loss
@pytest.mark.parametrize("encoder", [PooledEncoder, RelationEncoder])
@pytest.mark.parametrize("options", [{}, {"size_feature": True}, {"pool": "mean"}, {"pool": "sum"}], ids=str)
def test_dspn_loss(loss: nn.Module, encoder: type, options: dict[str, object]) -> None:
    model = encoder(C, D, 8, **options, dtype=torch.float64)
    decoder = paper_decoder(model, iters=2, set_size=N, channels=C, dtype=torch.float64)
    outer = DSPNLoss(model, loss)
    z = torch.randn(2, D, dtype=torch.float64, requires_grad=True)
    prediction = decoder(z)
    for sizes in SIZES:
        sets = random_sets(sizes)
        values = [
            outer(prediction, elements, mask, z=z)
            for elements, present in (pad_sets(sets, size=rows) for rows in range(max(sizes), N + 1))
            for mask in (present, present.float())
        ]
        if sizes[0] == sizes[1]:  # all present: no mask is needed
            values.append(outer(prediction, torch.stack(sets), z=z))
        gradients = [torch.autograd.grad(v, [z, *decoder.parameters()], retain_graph=True) for v in values]
        for value, gradient in zip(values, gradients, strict=True):
            torch.testing.assert_close(value, values[-1], **EXACT)
            torch.testing.assert_close(gradient, gradients[-1], **EXACT)


@pytest.mark.parametrize("rows", [0, 3, N])
def test_the_encoder_sees_the_rows_of_the_prediction(rows: int) -> None:
    """And so does a set loss of one's own, which may compare slot by slot."""
    seen = []

    def encoder(elements: Tensor, mask: Tensor | None) -> Tensor:
        seen.append((elements, mask))
        return elements.sum(1)

    def set_loss(pred: Tensor, target: Tensor, pred_mask: Tensor | None, target_mask: Tensor | None) -> Tensor:
        seen.append((target, target_mask))
        return (pred - target).square().mean()

    decoder = paper_decoder(PooledEncoder(C, C, 8), iters=2, set_size=N, channels=C)
    z, target = torch.randn(2, C), torch.rand(2, rows, C)
    DSPNLoss(encoder, set_loss)(decoder(z), target, z=z)
    for elements, mask in seen:
        assert torch.equal(elements, F.pad(target, (0, 0, 0, N - rows)))
        if rows < N:
            assert torch.equal(mask.bool(), (torch.arange(N) < rows).expand(2, N))
    assert (seen[1][1] is None) == (rows == N)


def test_a_target_of_more_rows_is_not_encoded() -> None:
    decoder = paper_decoder(PooledEncoder(C, D, 8), iters=2, set_size=N, channels=C)
    z, outer = torch.randn(2, D), DSPNLoss(decoder.encoder, ChamferLoss())
    elements, mask = pad_sets([torch.rand(n, C) for n in (1, 2)], size=N + 1)
    prediction = decoder(z)
    torch.testing.assert_close(outer(prediction, elements, mask), outer(prediction, elements[:, :N], mask[:, :N]))
    with pytest.raises(ValueError, match=r"`target` must have at most as many rows as `prediction` .*, got 7 and 6"):
        outer(prediction, elements, mask, z=z)


@pytest.mark.parametrize(("loss", "rows"), list(product(LOSSES, (0, 2, N))), ids=str)
def test_padding_compiles(loss: nn.Module, rows: int) -> None:
    torch.compiler.reset()
    pred, mask = torch.rand(2, N, C), torch.rand(2, N)
    target, present = torch.rand(2, rows, C), torch.ones(2, rows, dtype=torch.bool)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pred, target, mask, present), loss(pred, target, mask, present))


@pytest.mark.parametrize("rows", [0, 2, N])
def test_dspn_loss_compiles(rows: int) -> None:
    torch.compiler.reset()
    encoder = PooledEncoder(C, D, 8)
    with torch.no_grad():
        prediction = paper_decoder(encoder, iters=2, set_size=N, channels=C)(torch.randn(2, D))
    outer = DSPNLoss(encoder, ChamferLoss(presence="bce"))
    target, present, z = torch.rand(2, rows, C), torch.ones(2, rows, dtype=torch.bool), torch.randn(2, D)
    compiled = torch.compile(outer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(prediction, target, present, z=z), outer(prediction, target, present, z=z))
