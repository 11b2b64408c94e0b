"""Chamfer loss: what is not common to all set losses."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from setpred.functional.pairwise import on_channels
from setpred.losses.chamfer import ChamferLoss, chamfer_loss
from tests import devices


@pytest.mark.parametrize("cost", ["huber", "mse", "l1"])
def test_large_sets_equal_broadcasting(cost: str) -> None:
    """Sizes at which tiles, and for two of the costs trees, are at work."""
    pred, target = torch.randn(2, 900, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 700, 3).double()
    difference = (pred.unsqueeze(2) - target.unsqueeze(1)).abs()
    pairs = {
        "huber": torch.where(difference < 1, difference**2 / 2, difference - 0.5),
        "mse": difference**2,
        "l1": difference,
    }[cost].mean(-1)
    expected = (pairs.amin(2).mean(1) + pairs.amin(1).mean(1)).mean()
    actual = chamfer_loss(pred, target, cost=cost, presence="none")
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(actual, pred), torch.autograd.grad(expected, pred), rtol=1e-9, atol=1e-9
    )


def test_unequal_sizes_count_as_they_are_with_the_mask_as_a_feature() -> None:
    """Nothing is padded: the channel of ones only dilutes the mean."""
    pred, target = torch.rand(2, 7, 3), torch.rand(2, 4, 3)
    torch.testing.assert_close(chamfer_loss(pred, target), 3 / 4 * chamfer_loss(pred, target, presence="none"))


def test_predictions_of_mask_zero_do_not_exist() -> None:
    pred, target = torch.tensor([[[0.0], [torch.nan], [3.0]]]), torch.tensor([[[1.0], [4.0]]])
    mask = torch.tensor([[1.0, 0.0, 1.0]], requires_grad=True)
    value = chamfer_loss(pred, target, mask, cost="l1", presence="none")
    assert value == 2
    value.backward()
    assert mask.grad is not None
    assert mask.grad.isfinite().all()
    assert chamfer_loss(pred, target, torch.zeros(1, 3), cost="l1", presence="none") == 0
    halved = chamfer_loss(pred, target, torch.tensor([[1.0, 0.0, 0.5]]), cost="mse", presence="none")
    assert halved == 2  # (1 * 1 + 0.5 * 1) / 1.5 + 1


def test_nan_is_not_silent() -> None:
    pred, target = torch.rand(2, 600, 3), torch.rand(2, 600, 3)
    pred[1, 7, 0] = torch.nan
    for cost in ("huber", "mse"):
        value = chamfer_loss(pred, target, cost=cost, presence="none", reduction="none")
        assert value[0].isfinite()
        assert value[1].isnan()


@pytest.mark.parametrize("direction", ["both", "pred_to_target", "target_to_pred"])
@pytest.mark.parametrize("point_reduction", ["mean", "sum", "max"])
@pytest.mark.parametrize("presence", ["feature", "none"])
def test_nan_on_the_side_that_is_not_charged_is_not_silent(direction: Any, point_reduction: Any, presence: Any) -> None:
    spoilt, other = torch.rand(2, 4, 3), torch.rand(2, 5, 3)
    spoilt[1, 2, 0] = torch.nan
    for pred, target in ((spoilt, other), (other, spoilt)):
        value = chamfer_loss(
            pred, target, direction=direction, point_reduction=point_reduction, presence=presence, reduction="none"
        )
        assert value.isnan().tolist() == [False, True]


DOUBLE, EXACT = {"dtype": torch.float64}, {"rtol": 1e-9, "atol": 1e-9}
OPTIONS = list(product(["both", "pred_to_target", "target_to_pred"], ["mean", "sum", "max"]))
options = pytest.mark.parametrize(("direction", "over"), OPTIONS)
squared = on_channels("mse", slice(0, 3), weight=3.0)  # the squared Euclidean distance


def literal(x: Tensor, y: Tensor, weight: Tensor | None, direction: str, over: str) -> Tensor:
    """Of one set, from its whole matrix of squared distances."""
    if 0 in (len(x), len(y)):
        return 0 * (x.sum() + y.sum())
    distance = (x.unsqueeze(1) - y.unsqueeze(0)).square().sum(-1)
    weight = torch.ones_like(distance[:, 0]) if weight is None else weight
    of_pred, of_target = distance.amin(1), distance.amin(0)
    sides = {
        "mean": ((of_pred * weight).sum() / weight.sum(), of_target.mean()),
        "sum": ((of_pred * weight).sum(), of_target.sum()),
        "max": (of_pred.max(), of_target.max()),
    }[over]
    return {"both": sides[0] + sides[1], "pred_to_target": sides[0], "target_to_pred": sides[1]}[direction]


@options
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("steps", [(), (2,)])
@settings(max_examples=15)
@given(n=st.integers(0, 5), m=st.integers(0, 4), seed=st.integers(0, 2**31))
def test_directions_and_reductions(
    direction: str, over: str, masked: bool, steps: tuple[int, ...], n: int, m: int, seed: int
) -> None:
    torch.manual_seed(seed)
    pred, target = torch.randn(*steps, 3, n, 3, **DOUBLE, requires_grad=True), torch.randn(3, m, 3, **DOUBLE)
    mask = torch.rand(*steps, 3, n, **DOUBLE).sub(0.3).relu().requires_grad_() if masked else None
    present = torch.rand(3, m) < 0.6 if masked else None
    actual, of_pred, of_target = chamfer_loss(
        pred,
        target if present is None else target.masked_fill(~present.unsqueeze(-1), torch.nan),
        mask,
        present,
        cost=squared,
        presence="none",
        direction=direction,
        point_reduction=over,
        reduction="none",
        return_points=True,
    )
    expected = torch.empty_like(actual)
    assert of_pred.shape == (*steps, 3, n)
    assert of_target.shape == (*steps, 3, m)
    for at in product(*map(range, actual.shape)):
        exists = torch.ones(n, dtype=torch.bool) if mask is None else mask[at] > 0
        there = torch.ones(m, dtype=torch.bool) if present is None else present[at[-1]]
        x, y = pred[at][exists], target[at[-1]][there]
        expected[at] = literal(x, y, None if mask is None else mask[at][exists], direction, over)
        if 0 not in (len(x), len(y)):
            distance = (x.unsqueeze(1) - y.unsqueeze(0)).square().sum(-1)
            torch.testing.assert_close(of_pred[at][exists], distance.amin(1), **EXACT)
            torch.testing.assert_close(of_target[at][there], distance.amin(0), **EXACT)
        assert (of_pred[at][~exists] == 0).all()
        assert (of_target[at][~there] == 0).all()
    torch.testing.assert_close(actual, expected, **EXACT)
    inputs = [pred] if mask is None else [pred, mask]
    gradients = [
        torch.autograd.grad(v.sum(), inputs, allow_unused=True, materialize_grads=True) for v in (actual, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@options
@pytest.mark.parametrize("presence", ["feature", "bce", "logits", "none"])
def test_directions_and_reductions_differentiate_compile_and_vmap(direction: str, over: str, presence: str) -> None:
    pred, target = torch.randn(2, 5, 2, **DOUBLE, requires_grad=True), torch.randn(2, 4, 2, **DOUBLE)
    mask, present = torch.rand(2, 5, **DOUBLE, requires_grad=True), torch.rand(2, 4) < 0.6
    loss = ChamferLoss(presence=presence, direction=direction, point_reduction=over, reduction="none")
    assert devices.gradcheck(lambda p, m: loss(p, target, 0.1 + 0.8 * m, present), (pred, mask))
    if (over, presence) == ("max", "bce"):  # one of each, for time
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            compiled(pred, target, mask, present, return_points=True),
            loss(pred, target, mask, present, return_points=True),
            **EXACT,
        )
    more = torch.stack([pred, pred.flip(0), pred + 1]).detach()
    mapped = torch.func.vmap(loss, in_dims=(0, None, None, None))(more, target, mask, present)
    torch.testing.assert_close(mapped, torch.stack([loss(x, target, mask, present) for x in more]), **EXACT)
    for spoilt in (torch.full_like(pred, torch.nan), pred):
        bad = mask if spoilt is not pred or presence == "bce" else torch.full_like(mask, torch.nan)
        if spoilt is not pred or bad is not mask:
            assert loss(spoilt, torch.zeros_like(target), bad).isnan().all()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("`direction` must be one of 'both', 'pred_to_target', 'target_to_pred', got 'back'", {"direction": "back"}),
        ("`point_reduction` must be one of 'mean', 'sum', 'max', got 'none'", {"point_reduction": "none"}),
    ],
)
def test_refuses(message: str, change: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=message):
        ChamferLoss(**change)
    with pytest.raises(ValueError, match=message):
        chamfer_loss(torch.rand(1, 3, 2), torch.rand(1, 3, 2), **change)


def test_options_in_the_repr() -> None:
    assert repr(ChamferLoss()) == "ChamferLoss(cost='huber', presence='feature', reduction='mean')"
    shown = "ChamferLoss(cost='huber', presence='none', direction='pred_to_target', point_reduction='max', "
    loss = ChamferLoss(presence="none", direction="pred_to_target", point_reduction="max")
    assert repr(loss) == shown + "reduction='mean')"


def test_published_forms() -> None:
    """The table of docs/guides/point_clouds.md, each beside its formula."""
    x, y = torch.rand(2, 9, 3, **DOUBLE), torch.rand(2, 7, 3, **DOUBLE)
    square = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)
    one, other = square.amin(2), square.amin(1)
    published = {
        "PyTorch3D, kaolin": (one.mean(1) + other.mean(1), {"cost": squared}),
        "PyTorch3D, norm=1": (
            sum((x.unsqueeze(2) - y.unsqueeze(1)).abs().sum(-1).amin(d).mean(1) for d in (1, 2)),
            {"cost": on_channels("l1", slice(0, 3), weight=3.0)},
        ),
        "Fan et al.": (one.sum(1) + other.sum(1), {"cost": squared, "point_reduction": "sum"}),
        "rooted": (one.sqrt().mean(1) + other.sqrt().mean(1), {"cost": torch.cdist, "matching_cost": "mse"}),
        "Hausdorff, one way": (
            one.sqrt().amax(1),
            {
                "cost": torch.cdist,
                "matching_cost": "mse",
                "direction": "pred_to_target",
                "point_reduction": "max",
            },
        ),
    }
    for name, (expected, own) in published.items():
        actual = chamfer_loss(x, y, presence="none", reduction="none", **own)
        torch.testing.assert_close(actual, expected, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_normals_are_charged_on_the_same_neighbours() -> None:
    points, normals = torch.rand(2, 2, 6, 3, **DOUBLE), torch.randn(2, 2, 6, 3, **DOUBLE)
    x, y = torch.cat([points, normals], -1)

    def angle(a: Tensor, b: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(a.unsqueeze(2), b.unsqueeze(1), dim=-1).abs()

    near = on_channels("mse", slice(0, 3), weight=3.0)
    actual = chamfer_loss(
        x, y, cost=on_channels(angle, slice(3, 6)), matching_cost=near, presence="none", reduction="none"
    )
    distance = (points[0].unsqueeze(2) - points[1].unsqueeze(1)).square().sum(-1)
    angles = angle(*normals)
    expected = angles.gather(2, distance.argmin(2, keepdim=True)).mean((1, 2))
    expected = expected + angles.gather(1, distance.argmin(1, keepdim=True)).mean((1, 2))
    torch.testing.assert_close(actual, expected, **EXACT)


def test_the_greatest_of_negative_costs_is_not_that_of_the_absent() -> None:
    pred, target = torch.tensor([[[1.0], [2.0], [9.0]]]), torch.tensor([[[1.0], [9.0]]])
    value = chamfer_loss(
        pred,
        target,
        torch.tensor([[1.0, 1.0, 0.0]]),
        torch.tensor([[True, False]]),
        cost=lambda x, y: -x @ y.mT,
        presence="none",
        point_reduction="max",
    )
    assert value == -3  # the greater of -1 and -2, and -2
