"""What a loss makes of NaN and of nothing: NaN never looks like a result, and nothing costs 0, with gradients of 0.

Every set loss, presence and reduction, and every place where NaN or nothing may stand.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from setpred import ChamferLoss, DSPNLoss, HungarianLoss, PooledEncoder, SetPrediction, SinkhornLoss
from setpred import representation_loss as representation

B, N, C = 4, 5, 2
BAD, EMPTY = 1, 2  # a sample with NaN, and one without targets
LOSSES = [
    pytest.param(loss, presence, id=f"{loss.__name__}-{presence}")
    for loss, presence in product((HungarianLoss, ChamferLoss, SinkhornLoss), ("feature", "bce", "none"))
    if (loss, presence) != (SinkhornLoss, "bce")
]
every_loss = pytest.mark.parametrize(("loss", "presence"), LOSSES)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])


def make(loss: type, presence: str, reduction: str = "none") -> torch.nn.Module:
    return loss(presence=presence, reduction=reduction, **({"iters": 10} if loss is SinkhornLoss else {}))


def sets(rows: int = N, dtype: torch.dtype = torch.float32, *, batch: int = B) -> tuple[Tensor, ...]:
    """Elements and masks of both sides, all but the target's mask with a gradient."""
    pred, target = torch.rand(batch, N, C, dtype=dtype), torch.rand(batch, rows, C, dtype=dtype)
    pred_mask, target_mask = 0.1 + 0.8 * torch.rand(batch, N).to(dtype), torch.rand(batch, rows) < 0.6
    target_mask[:, :1] = True
    return pred.requires_grad_(), target.requires_grad_(), pred_mask.requires_grad_(), target_mask


def gradients(value: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    assert value.requires_grad
    return list(torch.autograd.grad(value.sum(), inputs, allow_unused=True, materialize_grads=True))


def refusal(loss: type, presence: str, where: str, present: bool) -> str | None:
    """What is said of NaN there, if it is an error: where the cross-entropy or the matching sees it."""
    if presence == "bce" and "element" not in where:
        return r"`pred_mask` must lie in \[0, 1\]"
    seen = presence == "feature" or (present and "mask" not in where)
    return "`cost` must not be NaN or -inf" if loss is HungarianLoss and seen else None


@every_loss
@every_dtype
@pytest.mark.parametrize("where", ["one element", "one mask", "all"])
@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("targets", ["some", "none", "no rows", "no mask"])
def test_nan_is_an_error_or_nan_and_stays_in_its_sample(
    loss: type, presence: str, dtype: torch.dtype, where: str, steps: bool, targets: str
) -> None:
    pred, target, pred_mask, target_mask = (x.detach() for x in sets(0 if targets == "no rows" else N, dtype))
    if targets == "none":
        target_mask[BAD] = False
    if steps:
        pred, pred_mask = torch.stack([pred, pred]), torch.stack([pred_mask, pred_mask])
    at = (1, BAD) if steps else BAD
    if where != "one mask":
        pred[at][slice(None) if where == "all" else 3] = torch.nan
    if where != "one element":
        pred_mask[at][slice(None) if where == "all" else 3] = torch.nan
    inputs = pred.requires_grad_(), pred_mask.requires_grad_()
    masks = None if targets == "no mask" else target_mask
    function = make(loss, presence)
    if (said := refusal(loss, presence, where, targets in ("some", "no mask"))) is not None:
        with pytest.raises(ValueError, match=said + r".*sample \(1, 1\)" if steps else said + ".*sample 1"):
            function(pred, target, pred_mask, masks)
        return
    value = function(pred, target, pred_mask, masks)
    bad = torch.zeros(value.shape, dtype=torch.bool)
    bad[at] = True
    assert torch.equal(value.isnan(), bad)
    for gradient in gradients(value[~bad], inputs):
        assert gradient[~bad].isfinite().all()
    for reduction in ("mean", "sum"):
        assert make(loss, presence, reduction)(pred, target, pred_mask, masks).isnan()


@every_loss
@pytest.mark.parametrize("mask", ["zeros", "ones"])
def test_nan_in_a_target_is_an_error_or_nan(loss: type, presence: str, mask: str) -> None:
    """Whatever is predicted, nothing too."""
    pred, target, pred_mask, target_mask = (x.detach() for x in sets())
    target[BAD, 0] = torch.nan
    pred_mask[BAD] = float(mask == "ones")
    if loss is HungarianLoss:
        with pytest.raises(ValueError, match="`cost` must not be NaN or -inf: sample 1"):
            make(loss, presence)(pred, target, pred_mask, target_mask)
    else:
        value = make(loss, presence)(pred, target, pred_mask, target_mask)
        assert value.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("loss", "presence", "masked"),
    [(*p.values, masked) for p in LOSSES for masked in (True, False) if masked or p.values[1] != "bce"],
)
@every_dtype
@pytest.mark.parametrize(
    "nothing", ["no target rows", "no targets", "no targets in one", "nothing predicted", "no batch", "both"]
)
def test_nothing_costs_nothing(loss: type, presence: str, masked: bool, dtype: torch.dtype, nothing: str) -> None:
    """Finite in all cases, and 0 with gradients of 0 where sets are compared by what is present alone."""
    rows, batch = 0 if nothing == "no target rows" else N, 0 if nothing == "no batch" else B
    pred, target, pred_mask, target_mask = sets(rows, dtype, batch=batch)
    if nothing in ("no targets", "both"):
        target_mask[:] = False
    elif nothing == "no targets in one":
        target_mask[EMPTY] = False
    if nothing in ("nothing predicted", "both"):
        least = 1e-3 if presence == "bce" else 0.0  # at 0, the slope of the cross-entropy is beyond float16
        pred_mask = torch.full_like(pred_mask, least, requires_grad=True)
    inputs = (pred, target, pred_mask) if masked else (pred, target)
    for reduction in ("none", "mean", "sum"):
        value = make(loss, presence, reduction)(pred, target, pred_mask if masked else None, target_mask)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.shape == ((batch,) if reduction == "none" else ())
        assert value.isfinite().all()
        found = gradients(value, inputs)
        assert all(gradient.isfinite().all() for gradient in found)
        if nothing == "no batch":
            assert (value == 0).all()
        if presence != "none" or (nothing == "nothing predicted" and loss is HungarianLoss):
            continue  # masks are scored; the Hungarian loss matches all rows, whatever their masks
        if nothing == "nothing predicted" and not masked:
            continue
        empty = slice(EMPTY, EMPTY + 1) if nothing == "no targets in one" else slice(None)
        if reduction == "none":
            assert (value[empty] == 0).all()
        for gradient in found:
            assert (gradient[empty] == 0).all()


@every_loss
def test_no_predicted_rows_either(loss: type, presence: str) -> None:
    pred, mask = torch.rand(B, 0, C, requires_grad=True), torch.rand(B, 0, requires_grad=True)
    value = make(loss, presence)(pred, torch.rand(B, 0, C), mask, torch.zeros(B, 0))
    assert torch.equal(value, torch.zeros(B))
    assert [g.shape for g in gradients(value, (pred, mask))] == [(B, 0, C), (B, 0)]


@pytest.mark.parametrize("loss", [ChamferLoss, SinkhornLoss])
def test_a_negative_weight_is_nan(loss: type) -> None:
    """Logits given for probabilities; their sum may be 0, as of an empty set."""
    pred, target, _, target_mask = sets()
    mask = torch.full((B, N), 0.5)
    mask[BAD] = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0])
    value = make(loss, "none")(pred, target, mask, target_mask)
    assert value.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("loss", [ChamferLoss, SinkhornLoss])
def test_what_does_not_exist_gets_no_gradient(loss: type) -> None:
    pred, target, _, target_mask = sets()
    mask = torch.rand(B, N).masked_fill(torch.rand(B, N) < 0.4, 0).requires_grad_()
    of_pred, of_mask = gradients(make(loss, "none")(pred, target, mask, target_mask), (pred, mask))
    assert not of_pred[mask == 0].any()
    assert not of_mask[mask == 0].any()
    assert of_pred.any()
    assert of_mask.any()


@every_dtype
@pytest.mark.parametrize("kind", ["huber", "mse"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_representation_loss(dtype: torch.dtype, kind: str, shape: tuple[int, int]) -> None:
    encoded, z = torch.rand(3, 4).to(dtype), torch.rand(3, 4)
    encoded[1, 2] = torch.nan
    assert representation(encoded, z, kind=kind, reduction="none").isnan().tolist() == [False, True, False]
    assert representation(z, encoded, kind=kind).isnan()
    empty = torch.rand(shape).to(dtype).requires_grad_()
    value = representation(empty, torch.rand(shape), kind=kind)
    assert value == 0
    assert gradients(value, (empty,))[0].isfinite().all()


@every_loss
@pytest.mark.parametrize("what", ["element", "mask", "z", "target element"])
def test_dspn_loss(loss: type, presence: str, what: str) -> None:
    encoder = PooledEncoder(C, 8, 16)
    pred, target, pred_mask, target_mask = (x.detach() for x in sets())
    z = torch.rand(B, 8)
    {"element": pred, "mask": pred_mask, "z": z, "target element": target}[what][BAD, 0] = torch.nan
    outer = DSPNLoss(encoder, make(loss, presence, "mean"), steps="last")
    prediction = SetPrediction(pred, pred_mask)
    said = None if what == "z" else refusal(loss, presence, what, present=True)
    if said is None:
        assert outer(prediction, target, target_mask, z=z).isnan()
    else:
        with pytest.raises(ValueError, match=said + ".*sample 1"):
            outer(prediction, target, target_mask, z=z)


@every_loss
@pytest.mark.parametrize("nothing", ["rows", "targets", "batch"])
def test_dspn_loss_of_nothing(loss: type, presence: str, nothing: str) -> None:
    encoder, batch = PooledEncoder(C, 8, 16), 0 if nothing == "batch" else B
    pred, target, pred_mask, target_mask = sets(0 if nothing == "rows" else N, batch=batch)
    z = torch.rand(batch, 8, requires_grad=True)
    if nothing == "targets":
        target_mask[:] = False
    outer = DSPNLoss(encoder, make(loss, presence, "mean"), steps="last")
    value = outer(SetPrediction(pred, pred_mask), target, target_mask, z=z)
    assert value.isfinite()
    for gradient in gradients(value, (pred, pred_mask, z, *encoder.parameters())):
        assert gradient.isfinite().all()
