"""What Hungarian and Chamfer loss have in common; what is each one's own is in its own file."""

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from setpred.decoders.mlp import MLPDecoder
from setpred.functional.pairwise import on_channels, pairwise_cost, sum_costs
from setpred.losses.chamfer import ChamferLoss, chamfer_loss
from setpred.losses.hungarian import HungarianLoss, hungarian_loss
from setpred.losses.sinkhorn import SinkhornLoss, sinkhorn_loss
from setpred.losses.sliced import SlicedWassersteinLoss, sliced_wasserstein_loss
from setpred.scaler import StandardScaler
from setpred.sets import SetPrediction
from tests import devices, oracles

EXACT = {"rtol": 1e-9, "atol": 1e-9}
DOUBLE = {"dtype": torch.float64}
LOSSES = {"hungarian": (hungarian_loss, oracles.hungarian_loss), "chamfer": (chamfer_loss, oracles.chamfer_loss)}

name = pytest.mark.parametrize("name", LOSSES)
PRESENCES = ["feature", "bce", "logits", "none"]
presence = pytest.mark.parametrize("presence", PRESENCES)
kind = pytest.mark.parametrize("kind", ["huber", "mse", "l1"])


def random_sets(
    batch: int, n: int, m: int, channels: int = 2, *, steps: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lead = (batch,) if steps is None else (steps, batch)
    pred, pred_mask = 2 * torch.randn(*lead, n, channels, **DOUBLE), torch.rand(*lead, n, **DOUBLE)
    target, target_mask = 2 * torch.randn(batch, m, channels, **DOUBLE), torch.rand(batch, m) < 0.6
    return pred.requires_grad_(), target, pred_mask.requires_grad_(), target_mask


@name
@presence
@kind
@settings(max_examples=20)
@given(batch=st.integers(1, 2), n=st.integers(1, 5), m=st.integers(0, 4), seed=st.integers(0, 2**31))
def test_equals_the_formula(name: str, presence: str, kind: str, batch: int, n: int, m: int, seed: int) -> None:
    torch.manual_seed(seed)
    loss, oracle = LOSSES[name]
    n = max(n, m)
    pred, target, pred_mask, target_mask = random_sets(batch, n, m)
    if name == "chamfer" and presence == "none":
        pred_mask = pred_mask.detach().masked_fill(torch.rand(batch, n) < 0.3, 0).requires_grad_()
    garbage = target.masked_fill(~target_mask.unsqueeze(-1), torch.nan)
    options = {"cost": kind, "presence": presence, "presence_weight": 0.3}
    actual = loss(pred, garbage, pred_mask, target_mask, reduction="none", **options)
    rows = (0, n - m) if presence == "feature" else (0, 0)  # targets count as if padded to the predictions' rows
    parts = zip(pred, F.pad(target, (0, 0, *rows)), pred_mask, F.pad(target_mask, rows), strict=True)
    expected = torch.stack([oracle(x, y, p, t, kind, presence, 0.3) for x, y, p, t in parts])
    expected = expected + 0 * (pred.sum() + pred_mask.sum())  # connected where it is empty
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(loss(pred, garbage, pred_mask, target_mask, **options), expected.mean(), **EXACT)
    total = loss(pred, garbage, pred_mask, target_mask, reduction="sum", **options)
    torch.testing.assert_close(total, expected.sum(), **EXACT)
    inputs = (pred, pred_mask)
    gradients = [torch.autograd.grad(v, inputs, allow_unused=True) for v in (total, expected.sum())]
    for a, b in zip(*gradients, strict=True):
        a = torch.zeros_like(b) if a is None else a
        torch.testing.assert_close(a, b, **EXACT)


MODULES = [
    *((m, f, p) for m, f in ((HungarianLoss, hungarian_loss), (ChamferLoss, chamfer_loss)) for p in PRESENCES),
    *((SinkhornLoss, sinkhorn_loss, p) for p in ("feature", "none")),
]


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize(("module", "function", "presence"), MODULES)
def test_a_scaler_maps_both_sides(
    module: type[nn.Module], function: Callable[..., Tensor], presence: str, steps: int | None
) -> None:
    scaler = StandardScaler(2, **DOUBLE).fit(torch.tensor([30.0, 0.2]) + torch.tensor([5.0, 0.01]) * torch.randn(99, 2))
    pred, target, pred_mask, target_mask = random_sets(3, 5, 4, steps=steps)
    target = target.masked_fill(~target_mask.unsqueeze(-1), torch.nan)
    loss = module(presence=presence, reduction="none", scaler=scaler)
    options = {"presence": presence, "reduction": "none"}
    theirs = (scaler.inverse(pred), scaler.inverse(target))  # what is absent is NaN
    actual = loss(*theirs, pred_mask, target_mask)
    expected = function(pred, scaler(scaler.inverse(target), target_mask), pred_mask, target_mask, **options)
    torch.testing.assert_close(actual, expected, **EXACT)
    inputs = (pred, pred_mask)
    gradients = [torch.autograd.grad(value.sum(), inputs, allow_unused=True) for value in (actual, expected)]
    torch.testing.assert_close(*gradients, **EXACT)
    assert not loss.state_dict()
    assert not list(loss.buffers())
    other = module(presence=presence, reduction="none")(*theirs, pred_mask, target_mask)
    assert not torch.allclose(actual, other)


@pytest.mark.parametrize(
    ("module", "function", "presence"),
    [*MODULES, *((SlicedWassersteinLoss, sliced_wasserstein_loss, p) for p in ("feature", "none"))],
)
def test_a_prediction_brings_its_mask(module: type[nn.Module], function: Callable[..., Tensor], presence: str) -> None:
    pred, target, pred_mask, target_mask = random_sets(3, 5, 4)
    options = {"presence": presence, "reduction": "none"}
    if module is SlicedWassersteinLoss:
        options["directions"] = torch.randn(8, 3 if presence == "feature" else 2)
    scaler = StandardScaler(2, **DOUBLE).fit(torch.randn(9, 2, **DOUBLE) * 3 + 1)
    prediction, inputs = SetPrediction(pred, pred_mask), (pred, pred_mask)
    losses = (partial(function, **options), module(**options), module(**options, scaler=scaler))
    for loss in (*losses, torch.compile(losses[1], backend="eager", fullgraph=True)):
        expected = loss(pred, target, pred_mask, target_mask)
        actual = loss(prediction, target, target_mask=target_mask)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        gradients = (torch.autograd.grad(x.sum(), inputs, allow_unused=True) for x in (actual, expected))
        torch.testing.assert_close(*gradients, rtol=0, atol=0)
    for loss in losses:
        with pytest.raises(ValueError, match="`pred_mask` must be None where `pred` is a SetPrediction"):
            loss(prediction, target, pred_mask, target_mask)


@name
@pytest.mark.parametrize("presence", ["bce", "logits"])
def test_a_constant_mask_is_not_scored(name: str, presence: str) -> None:
    """Of a decoder without one: the value would be large, and say nothing."""
    loss, _ = LOSSES[name]
    prediction = MLPDecoder(8, 5, 2, mask_clamp=None)(torch.randn(3, 8))
    target = torch.randn(3, 5, 2)
    with pytest.raises(ValueError, match=f"`pred` must have a mask that is trained with presence='{presence}'"):
        loss(prediction, target, presence=presence)
    with torch.no_grad():
        loss(prediction._replace(elements=prediction.elements.detach()), target, presence=presence)
    assert loss(prediction, target, presence="none").requires_grad


@name
@presence
def test_steps_are_a_batch_of_their_own(name: str, presence: str) -> None:
    loss, _ = LOSSES[name]
    pred, target, pred_mask, target_mask = random_sets(3, 5, 4, steps=4)
    stacked = loss(pred, target, pred_mask, target_mask, presence=presence, reduction="none")
    one_by_one = [
        loss(x, target, m, target_mask, presence=presence, reduction="none")
        for x, m in zip(pred, pred_mask, strict=True)
    ]
    torch.testing.assert_close(stacked, torch.stack(one_by_one), **EXACT)


@name
@presence
def test_order_does_not_matter(name: str, presence: str) -> None:
    """Of the elements, with duplicates among them."""
    loss, _ = LOSSES[name]
    pred, target, pred_mask, target_mask = (x.detach() for x in random_sets(3, 6, 6))
    pred[:, 1], target[:, 1], target_mask[:, 1] = pred[:, 0], target[:, 0], target_mask[:, 0]
    pred_mask[:, 1] = pred_mask[:, 0]
    i, j = torch.randperm(6), torch.randperm(6)
    value = loss(pred, target, pred_mask, target_mask, presence=presence)
    other = loss(pred[:, i], target[:, j], pred_mask[:, i], target_mask[:, j], presence=presence)
    torch.testing.assert_close(value, other, **EXACT)


@name
@presence
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_absent_targets_are_never_seen(name: str, presence: str, value: float) -> None:
    loss, _ = LOSSES[name]
    pred, target, pred_mask, target_mask = random_sets(3, 5, 5)
    absent = ~target_mask.unsqueeze(-1)
    results = []
    for filled in (target.masked_fill(absent, 0), target.masked_fill(absent, value)):
        filled.requires_grad_()
        result = loss(pred, filled, pred_mask, target_mask, presence=presence)
        results.append((result, *torch.autograd.grad(result, (pred, filled))))
    for a, b in zip(*results, strict=True):
        assert devices.equal(a, b)
    assert torch.equal(results[0][2][~target_mask], torch.zeros_like(target[~target_mask]))


@name
@pytest.mark.parametrize("presence", ["bce", "logits", "none"])
def test_more_padding_changes_nothing(name: str, presence: str) -> None:
    loss, _ = LOSSES[name]
    pred, target, pred_mask, target_mask = random_sets(3, 9, 5)
    value = loss(pred, target, pred_mask, target_mask, presence=presence)
    wider = torch.cat([target, torch.full((3, 7, 2), torch.nan, **DOUBLE)], 1)
    mask = torch.cat([target_mask, torch.zeros(3, 7, dtype=torch.bool)], 1)
    assert devices.equal(loss(pred, wider, pred_mask, mask, presence=presence), value)


@name
@presence
def test_a_sample_alone_costs_what_it_costs_in_the_batch(name: str, presence: str) -> None:
    loss, _ = LOSSES[name]
    inputs = random_sets(4, 5, 5)
    together = loss(*inputs, presence=presence, reduction="none")
    alone = [loss(*(x[b : b + 1] for x in inputs), presence=presence) for b in range(4)]
    torch.testing.assert_close(together, torch.stack(alone), **EXACT)


@name
@presence
@pytest.mark.parametrize("m", [5, 3])
def test_gradcheck(name: str, presence: str, m: int) -> None:
    loss, _ = LOSSES[name]
    pred, target, pred_mask, target_mask = random_sets(2, 5, m)
    target.requires_grad_()

    def value(pred: Tensor, target: Tensor, pred_mask: Tensor) -> Tensor:
        return loss(pred, target, 0.1 + 0.8 * pred_mask, target_mask, presence=presence, reduction="none")

    assert devices.gradcheck(value, (pred, target, pred_mask))


@name
@presence
@pytest.mark.parametrize("cost", ["huber", torch.cdist])
@pytest.mark.parametrize("targets", ["none in one", "none in all", "no rows", "no batch", "no predictions"])
def test_without_targets(
    name: str, presence: str, cost: str | Callable[[Tensor, Tensor], Tensor], targets: str
) -> None:
    loss, _ = LOSSES[name]
    batch, n, m = {"no batch": (0, 4, 3), "no rows": (2, 4, 0), "no predictions": (2, 0, 0)}.get(targets, (2, 4, 3))
    pred, target, pred_mask, target_mask = random_sets(batch, n, m)
    target_mask[:] = True
    if targets == "none in one":
        target_mask[:1] = False
    elif targets == "none in all":
        target_mask[:] = False
    value = loss(pred, target, pred_mask, target_mask, cost=cost, presence=presence)
    assert value.isfinite()
    value.backward()
    assert pred.grad is not None
    assert pred.grad.isfinite().all()
    if presence == "none" and targets != "none in one":
        assert value == 0
        assert (pred.grad == 0).all()


@name
@pytest.mark.parametrize("presence", PRESENCES[1:])  # with the mask as a feature, absent targets are matched too
def test_what_a_cost_makes_of_the_unmatched_is_not_seen(name: str, presence: str) -> None:
    """A cost that is NaN, or has a NaN gradient, at the zeros of absent targets."""
    loss, _ = LOSSES[name]

    def ratio(x: Tensor, y: Tensor) -> Tensor:
        return ((x.unsqueeze(2) / y.unsqueeze(1)) - 1).abs().sum(-1).sqrt()

    pred, target, pred_mask, target_mask = random_sets(4, 5, 5)
    target_mask[0] = False
    value = loss(pred, target, pred_mask, target_mask, cost=ratio, presence=presence)
    value.backward()
    assert value.isfinite()
    assert pred.grad is not None
    assert pred.grad.isfinite().all()


@name
@presence
def test_low_precision_and_autocast_cost_in_float32(name: str, presence: str) -> None:
    loss, _ = LOSSES[name]

    def matmul_cost(x: Tensor, y: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        result = -(x @ y.mT)
        assert result.dtype == torch.float32
        return result

    pred, target, pred_mask, target_mask = (x.detach().to(torch.bfloat16) for x in random_sets(3, 5, 5))
    pred.requires_grad_()
    for cost in ("huber", matmul_cost):
        expected = loss(
            pred.float(), target.float(), pred_mask.float(), target_mask.float(), cost=cost, presence=presence
        )
        for enabled in (False, True):
            with devices.autocast(torch.bfloat16, enabled=enabled):
                actual = loss(pred, target, pred_mask, target_mask, cost=cost, presence=presence)
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual, expected)
            (gradient,) = torch.autograd.grad(actual, pred)
            assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("module", [HungarianLoss, ChamferLoss])
@presence
def test_compiles_as_one_graph(module: type[nn.Module], presence: str) -> None:
    torch.compiler.reset()
    loss = module(presence=presence)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = random_sets(2, 5, 4, steps=3)
    expected, actual = loss(*inputs), compiled(*inputs)
    torch.testing.assert_close(actual, expected, **EXACT)
    for a, b in zip(torch.autograd.grad(actual, inputs[0]), torch.autograd.grad(expected, inputs[0]), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("module", [HungarianLoss, ChamferLoss])
def test_compiles_with_a_callable(module: type[nn.Module]) -> None:
    torch.compiler.reset()
    loss = module(lambda x, y: (x.unsqueeze(2) - y.unsqueeze(1)).abs().sum(-1), presence="bce")
    inputs = random_sets(2, 5, 4)
    actual, expected = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), loss(*inputs)
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs[0]), torch.autograd.grad(expected, inputs[0]), **EXACT
    )


@name
def test_charges_another_cost_than_it_matches_by(name: str) -> None:
    loss, _ = LOSSES[name]
    pred, target = torch.tensor([[[0.0, 0.0], [1.0, 9.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 9.0]]])
    first = loss(
        pred, target, presence="none", cost="l1", matching_cost=lambda x, y: pairwise_cost(x[..., :1], y[..., :1])
    )
    second = loss(
        pred, target, presence="none", cost="l1", matching_cost=lambda x, y: pairwise_cost(x[..., 1:], y[..., 1:])
    )
    sides = 1 if name == "hungarian" else 2
    assert first.item() == pytest.approx(sides * 4.5)
    assert second.item() == pytest.approx(sides * 0.5)


@pytest.mark.parametrize("module", [HungarianLoss, ChamferLoss])
def test_module(module: type[nn.Module]) -> None:
    function = hungarian_loss if module is HungarianLoss else chamfer_loss
    inputs = random_sets(2, 5, 5)
    options = {"presence": "bce", "presence_weight": 0.5, "reduction": "sum", "matching_cost": "l1"}
    loss = module("mse", **options)
    assert torch.equal(loss(*inputs), function(*inputs, cost="mse", **options))
    assert loss.state_dict() == {}
    for part in ("cost='mse'", "matching_cost='l1'", "presence='bce'", "presence_weight=0.5", "reduction='sum'"):
        assert part in repr(loss)
    assert "presence_weight" not in repr(module())

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.scale * pairwise_cost(x, y)

    loss = module(Scaled())
    loss(*inputs).backward()
    assert next(loss.parameters()).grad is not None


@name
@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"`pred` must have shape \(B, N, C\) or \(K, B, N, C\)", {"pred": torch.rand(5, 2)}),
        (TypeError, "`pred` must have a floating dtype", {"pred": torch.ones(2, 5, 2).long()}),
        (TypeError, r"`pred` must be a tensor or a SetPrediction, got \[0.0\] \(list\)", {"pred": [0.0]}),
        (TypeError, "`target` must be a tensor, got None", {"target": None}),
        (ValueError, r"`target` must have shape \(2, M, 2\), got .*\(2, 5, 3\)", {"target": torch.rand(2, 5, 3)}),
        (ValueError, r"`target` must have shape \(2, M, 2\), got .*\(3, 5, 2\)", {"target": torch.rand(3, 5, 2)}),
        (ValueError, r"`pred_mask` must have shape \(2, 5\)", {"pred_mask": torch.rand(2, 4)}),
        (TypeError, "`pred_mask` must be a tensor or None, got 0.5", {"pred_mask": 0.5}),
        (TypeError, "`pred_mask` must be bool or floating", {"pred_mask": torch.ones(2, 5).long()}),
        (
            TypeError,
            r"`pred_mask` must be floating: a bool mask is a target's, for `target_mask`; got bool of shape \(2, 5\)",
            {"pred_mask": torch.ones(2, 5).bool()},
        ),
        (ValueError, r"`target_mask` must have shape \(2, 5\)", {"target_mask": torch.ones(2, 5, 1)}),
        (TypeError, "`target_mask` must be bool or floating", {"target_mask": torch.ones(2, 5).long()}),
        (ValueError, "`cost` must be one of", {"cost": "l2"}),
        (ValueError, "`matching_cost` must be one of", {"matching_cost": "l2"}),
        (ValueError, "`presence` must be one of", {"presence": "maybe"}),
        (ValueError, "`presence_weight` must be at least 0", {"presence_weight": -1}),
        (ValueError, "`presence_weight` must be at least 0, got nan", {"presence_weight": torch.nan}),
        (ValueError, "`presence_weight` must be finite, got inf", {"presence_weight": torch.inf}),
        (TypeError, "`presence_weight` must be a number", {"presence_weight": "1"}),
        (ValueError, "`reduction` must be one of", {"reduction": "max"}),
        (ValueError, "`pred_mask` must be given with presence='bce'", {"presence": "bce"}),
    ],
)
def test_refuses(name: str, error: type[Exception], message: str, change: dict[str, object]) -> None:
    loss, _ = LOSSES[name]
    with pytest.raises(error, match=message):
        loss(**({"pred": torch.rand(2, 5, 2), "target": torch.rand(2, 5, 2)} | change))
    if not {"pred", "target", "pred_mask", "target_mask"} & change.keys() and "pred_mask" not in message:
        with pytest.raises(error, match=message):
            (HungarianLoss if name == "hungarian" else ChamferLoss)(**change)


@pytest.mark.parametrize("loss", [HungarianLoss, ChamferLoss])
@pytest.mark.parametrize("value", [1.5, -0.5, torch.nan, torch.inf, -torch.inf, "next to 1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [None, 2])
def test_cross_entropy_refuses_what_is_no_probability(
    loss: type[nn.Module], value: float | str, dtype: torch.dtype, steps: int | None
) -> None:
    """Logits, another clamp, or NaN; the error says where."""
    pred, target, pred_mask, target_mask = (x.detach() for x in random_sets(3, 4, 4, steps=steps))
    function, pred_mask = loss(presence="bce"), pred_mask.to(dtype)
    pred_mask[..., 0], pred_mask[..., 1] = 0, 1
    assert function(pred, target, pred_mask, target_mask).isfinite()
    pred_mask[(1, 2, 3) if steps else (2, 3)] = 1 + torch.finfo(dtype).eps if value == "next to 1" else value
    message = r"`pred_mask` must lie in \[0, 1\] with presence='bce', got .* in sample "
    with pytest.raises(ValueError, match=message + (r"\(1, 2\)" if steps else "2")):
        function(pred, target, pred_mask, target_mask)


@pytest.mark.parametrize("loss", [HungarianLoss, ChamferLoss])
@pytest.mark.parametrize("steps", [None, 2])
def test_cross_entropy_warns_of_what_is_certain_and_wrong(loss: type[nn.Module], steps: int | None) -> None:
    """A clamped mask, whose derivative is 1e12; not where nothing is trained, nor where the mask is right."""
    pred, target, pred_mask, _ = (x.detach() for x in random_sets(3, 4, 4, steps=steps))
    function, present = loss(presence="bce"), torch.ones(3, 4)
    cases = [(torch.ones_like(pred_mask), 0 * present)]
    if loss is HungarianLoss:  # to Chamfer, predictions of mask 0 are not there, and nobody's nearest
        cases.append((torch.zeros_like(pred_mask), present))
    for mask, target_mask in cases:
        assert function(pred, target, mask, target_mask).isfinite()
        mask = mask.requires_grad_()
        message = rf"`pred_mask` is exactly 0 or 1 in [1-9]\d* of {mask.numel()} rows where presence='bce' wants"
        with pytest.warns(RuntimeWarning, match=message):
            value = function(pred, target, mask, target_mask)
        assert torch.autograd.grad(value, mask)[0].abs().max() > 1e9
    right = torch.ones_like(pred_mask).requires_grad_()
    assert torch.autograd.grad(HungarianLoss(presence="bce")(pred, target, right, present), right)[0].abs().max() < 10


def test_values_are_not_looked_at_where_they_cannot_be_seen() -> None:
    loss = ChamferLoss(presence="bce")
    pred, target, pred_mask, target_mask = (x.detach() for x in random_sets(3, 4, 4, steps=2))
    mapped = torch.func.vmap(loss, in_dims=(0, None, 0, None))(pred, target, pred_mask, target_mask)
    alone = [loss(x, target, m, target_mask) for x, m in zip(pred, pred_mask, strict=True)]
    torch.testing.assert_close(mapped, torch.stack(alone), **EXACT)
    traced = make_fx(loss)(pred[0], target, pred_mask[0], target_mask)
    torch.testing.assert_close(traced(pred[1], target, pred_mask[1], target_mask), alone[1], **EXACT)


MASKED = {
    "the last": (on_channels("l1", [0, 2]), True),
    "-1": (on_channels("l1", [0, -1]), True),
    "a slice to the end": (on_channels("l1", slice(1, None)), True),
    "one part of a sum": (sum_costs(on_channels("l1", [0]), on_channels("mse", [-1])), True),
    "by name": (sum_costs("huber", on_channels("mse", [0])), True),
    "own": (lambda x, y: pairwise_cost(x[..., :2], y[..., :2]), True),  # nobody can know
    "own in a sum": (sum_costs(on_channels("l1", [0]), lambda x, y: pairwise_cost(x, y)), True),
    "nested": (on_channels(on_channels("l1", [-1]), [0, 2]), True),
    "not": (on_channels("l1", [0, 1]), False),
    "not in a slice": (on_channels("huber", slice(0, 2)), False),
    "not in a sum": (sum_costs(on_channels("l1", [0]), on_channels("mse", slice(1, 2), weight=3.0)), False),
    "own, but not": (on_channels(lambda x, y: pairwise_cost(x, y), [0, 1]), False),
    "nested, but not": (on_channels(on_channels("l1", [0]), [0, 2]), False),
    "a sum in channels": (on_channels(sum_costs("l1", "mse"), [1]), False),
}


@pytest.mark.parametrize("loss", [HungarianLoss, ChamferLoss, SinkhornLoss])
@pytest.mark.parametrize(("cost", "sees"), MASKED.values(), ids=MASKED)
def test_a_composed_cost_must_see_the_mask_that_it_is_to_train(
    loss: type[nn.Module], cost: Callable[[Tensor, Tensor], Tensor], sees: bool
) -> None:
    pred, target, pred_mask, target_mask = random_sets(2, 5, 5)
    function = loss(cost, presence="feature")
    if sees:
        assert function(pred, target, pred_mask, target_mask).isfinite()
    else:
        with pytest.raises(ValueError, match=r"`cost` must see the mask with presence='feature', .* of 3: add"):
            function(pred, target, pred_mask, target_mask)
    function(pred, target, None, target_mask)  # no presence is predicted
    wide = loss(cost, presence="none")
    wide(*(torch.cat([x, x], -1) for x in (pred, target)), pred_mask, target_mask)


@name
def test_what_is_matched_by_need_not_see_the_mask(name: str) -> None:
    loss, _ = LOSSES[name]
    inputs = random_sets(2, 5, 5)
    value = loss(*inputs, matching_cost=on_channels("l1", [0, 1]))
    assert torch.autograd.grad(value, inputs[2])[0].any()


@name
def test_logits_may_be_of_any_size(name: str) -> None:
    """Where probabilities would have rounded to 0 and 1; an infinite one that is right costs nothing."""
    loss, _ = LOSSES[name]
    pred, target = torch.tensor([[[0.0], [9.0]]], **DOUBLE), torch.zeros(1, 1, 1, **DOUBLE)
    for right in (800.0, torch.inf):
        mask = torch.tensor([[right, -right]], **DOUBLE, requires_grad=True)
        value = loss(pred, target, mask, presence="logits")
        assert value == 0
        assert torch.equal(torch.autograd.grad(value, mask)[0], torch.zeros_like(mask))
    mask = torch.tensor([[-800.0, 800.0]], **DOUBLE, requires_grad=True)
    if name == "hungarian":
        value = loss(pred, target, mask, presence="logits")
        assert value == 800
        assert torch.autograd.grad(value, mask)[0].tolist() == [[-0.5, 0.5]]
    with pytest.raises(ValueError, match="`pred_mask` must be given with presence='logits', got None"):
        loss(pred, target, presence="logits")
    assert "presence='logits', presence_weight=1.0" in repr(HungarianLoss(presence="logits"))


@pytest.mark.parametrize(("loss", "function"), [(HungarianLoss, hungarian_loss), (ChamferLoss, chamfer_loss)])
def test_options_are_attributes_of_the_module(loss: type[nn.Module], function: Callable[..., Tensor]) -> None:
    """They are what the function is called with, now and after a change, in a subclass and in a copy."""

    class Own(loss):
        def __init__(self, weight: float) -> None:
            super().__init__("l1", presence="bce", presence_weight=weight)
            self.own = nn.Linear(1, 1)

    inputs = [x.detach() for x in random_sets(2, 4, 4)]
    for module in (Own(2.0), copy.deepcopy(Own(2.0)), pickle.loads(pickle.dumps(loss("l1", presence="bce")))):
        module.presence_weight, module.reduction = 3.0, "sum"
        options = {"cost": "l1", "presence": "bce", "presence_weight": 3.0, "reduction": "sum"}
        assert {name: getattr(module, name) for name in options} == options
        assert "cost='l1', presence='bce', presence_weight=3.0, reduction='sum'" in repr(module)
        torch.testing.assert_close(module(*inputs), function(*inputs, **options))
        module.scaler = StandardScaler(2)
        assert "scaler=StandardScaler(2)" in repr(module)
        assert not any("scaler" in name for name in module.state_dict())


@pytest.mark.parametrize("loss", [hungarian_loss, chamfer_loss])
def test_compiles_with_sizes_and_numbers_unknown(loss: Callable[..., Tensor]) -> None:
    """Under ``dynamic=True`` options that are numbers, defaults too, are symbols."""
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (5, 6):
        sets = torch.rand(3, size, 2), torch.rand(3, size - 1, 2), torch.rand(3, size), torch.rand(3, size - 1) < 0.6
        torch.testing.assert_close(
            compiled(*sets, presence="logits", presence_weight=0.5), loss(*sets, presence="logits", presence_weight=0.5)
        )
        torch.testing.assert_close(compiled(*sets), loss(*sets))
    torch._dynamo.reset()
