"""Sinkhorn loss and the entropic transport under it: against POT, geomloss and limits."""

import pytest
import torch
from torch import Tensor

from setpred.functional.pairwise import pairwise_cost
from setpred.functional.sinkhorn import entropic_transport
from setpred.losses.hungarian import hungarian_loss
from setpred.losses.sinkhorn import SinkhornLoss, sinkhorn_loss
from tests import devices

EXACT = {"rtol": 1e-9, "atol": 1e-9}
DOUBLE = {"dtype": torch.float64}
presence = pytest.mark.parametrize("presence", ["feature", "none"])


def random_sets(n: int = 5, m: int = 4, *, steps: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lead = (3,) if steps is None else (steps, 3)
    pred, pred_mask = torch.randn(*lead, n, 2, **DOUBLE), torch.rand(*lead, n, **DOUBLE)
    target, target_mask = torch.randn(3, m, 2, **DOUBLE), torch.rand(3, m) < 0.6
    target_mask[:, 0] = True
    return pred.requires_grad_(), target, pred_mask.requires_grad_(), target_mask


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.03])
def test_transport_equals_pot(epsilon: float) -> None:
    ot = pytest.importorskip("ot")
    cost = pairwise_cost(torch.rand(2, 6, 2, **DOUBLE), torch.rand(2, 8, 2, **DOUBLE), "mse")
    a, b = torch.rand(2, 6, **DOUBLE), torch.rand(2, 8, **DOUBLE)
    a[:, 2], b[:, 5] = 0, 0
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    found = entropic_transport(cost, a, b, epsilon=epsilon, iters=2000)
    for k in range(2):
        i, j = a[k] > 0, b[k] > 0
        c = cost[k][i][:, j]
        inputs = (x.cpu().numpy() for x in (a[k][i], b[k][j], c))
        plan = ot.sinkhorn(*inputs, epsilon, method="sinkhorn_log", stopThr=1e-13, numItermax=20_000)
        plan = torch.as_tensor(plan)
        torch.testing.assert_close(found.plan[k][i][:, j], plan, **EXACT)
        assert found.plan[k].sum().item() == pytest.approx(1, abs=1e-12)
        entropy = (plan * (plan / (a[k][i].unsqueeze(1) * b[k][j])).log()).sum()
        torch.testing.assert_close(found.value[k], (plan * c).sum() + epsilon * entropy, **EXACT)


def test_divergence_agrees_with_geomloss() -> None:
    """geomloss stops after one sweep of its own schedule of epsilon, so that it is near the optimum, not at it."""
    geomloss = pytest.importorskip("geomloss")
    pred, target = torch.rand(3, 7, 2, **DOUBLE, requires_grad=True), torch.rand(3, 9, 2, **DOUBLE)
    reference = geomloss.SamplesLoss("sinkhorn", p=2, blur=1.0, scaling=0.97, backend="tensorized")(pred, target)
    actual = sinkhorn_loss(
        pred,
        target,
        cost=lambda x, y: (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1) / 2,
        epsilon=1.0,
        iters=300,
        presence="none",
        reduction="none",
    )
    torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-7)
    gradients = [torch.autograd.grad(value.sum(), pred)[0] for value in (actual, reference)]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-5)


def test_small_epsilon_is_the_hungarian_loss() -> None:
    pred, target = torch.rand(3, 6, 2, **DOUBLE), torch.rand(3, 6, 2, **DOUBLE)
    expected = hungarian_loss(pred, target, cost="mse", presence="none", reduction="none")
    actual = sinkhorn_loss(pred, target, epsilon=1e-4, iters=3000, presence="none", debias=False, reduction="none")
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-4)


@presence
def test_a_shuffled_set_costs_nothing_another_something(presence: str) -> None:
    pred, target, pred_mask, target_mask = random_sets(5, 5)
    target, shuffle = target * target_mask.unsqueeze(-1), torch.randperm(5)
    same = sinkhorn_loss(target[:, shuffle], target, target_mask[:, shuffle].double(), target_mask, presence=presence)
    assert same.abs() < 1e-4
    assert (sinkhorn_loss(pred, target, pred_mask, target_mask, presence=presence, reduction="none") > 1e-3).all()


@presence
@pytest.mark.parametrize("debias", [True, False])
def test_gradcheck(presence: str, debias: bool) -> None:
    pred, target, pred_mask, target_mask = random_sets(3, 2)
    target.requires_grad_()

    def value(pred: Tensor, target: Tensor, pred_mask: Tensor) -> Tensor:
        return sinkhorn_loss(
            pred,
            target,
            pred_mask,
            target_mask,
            epsilon=2.0,
            iters=40,
            debias=debias,
            presence=presence,
            reduction="none",
        )

    assert devices.gradcheck(value, (pred, target, pred_mask))


@presence
def test_padding_steps_and_batch(presence: str) -> None:
    pred, target, pred_mask, target_mask = random_sets(steps=2)
    garbage = target.masked_fill(~target_mask.unsqueeze(-1), torch.nan)
    value = sinkhorn_loss(pred, target, pred_mask, target_mask, presence=presence, reduction="none")
    assert value.shape == (2, 3)
    assert torch.equal(sinkhorn_loss(pred, garbage, pred_mask, target_mask, presence=presence, reduction="none"), value)
    for k in range(2):
        for b in range(3):
            alone = sinkhorn_loss(
                pred[k, b : b + 1],
                garbage[b : b + 1],
                pred_mask[k, b : b + 1],
                target_mask[b : b + 1],
                presence=presence,
            )
            torch.testing.assert_close(alone, value[k, b], **EXACT)
    if presence == "none":
        i = target_mask[0]
        short = sinkhorn_loss(pred[:, :1], target[:1][:, i], pred_mask[:, :1], presence="none", reduction="none")
        torch.testing.assert_close(short, value[:, :1], **EXACT)


@presence
@pytest.mark.parametrize("targets", ["none in one", "none in all", "no rows", "no batch", "no predictions"])
def test_without_targets(presence: str, targets: str) -> None:
    batch, n, m = {"no batch": (0, 4, 3), "no rows": (2, 4, 0), "no predictions": (2, 0, 0)}.get(targets, (2, 4, 3))
    pred, target = torch.randn(batch, n, 2, requires_grad=True), torch.randn(batch, m, 2)
    pred_mask, target_mask = torch.rand(batch, n, requires_grad=True), torch.ones(batch, m)
    target_mask[: {"none in one": 1, "none in all": 2}.get(targets, 0)] = 0
    value = sinkhorn_loss(pred, target, pred_mask, target_mask, presence=presence)
    assert value.isfinite()
    value.backward()
    assert pred.grad is not None
    assert pred.grad.isfinite().all()


@presence
def test_low_precision_and_autocast(presence: str) -> None:
    pred, target, pred_mask, target_mask = (x.detach().to(torch.bfloat16) for x in random_sets())
    loss = SinkhornLoss(iters=10, presence=presence)
    expected = loss(pred.float(), target.float(), pred_mask.float(), target_mask)
    with devices.autocast(torch.bfloat16):
        actual = loss(pred, target, pred_mask, target_mask)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)


def test_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    loss, inputs = SinkhornLoss(iters=3, presence="none"), random_sets()
    actual, expected = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), loss(*inputs)
    torch.testing.assert_close(actual, expected, **EXACT)
    wanted = torch.autograd.grad(expected, inputs[::2])
    torch.testing.assert_close(torch.autograd.grad(actual, inputs[::2]), wanted, **EXACT)


@presence
def test_transport_is_returned(presence: str) -> None:
    pred, target, pred_mask, target_mask = random_sets(steps=2)
    loss = SinkhornLoss(epsilon=0.3, iters=500, presence=presence, debias=False, reduction="none")
    value, found = loss(pred, target, pred_mask, target_mask, return_transport=True)
    assert torch.equal(value, loss(pred, target, pred_mask, target_mask))
    assert torch.equal(value, found.value)
    cols = 5 if presence == "feature" else 4
    assert [x.shape for x in found] == [(2, 3), (2, 3, 5, cols), (2, 3, 5), (2, 3, cols), (2, 3)]
    rows, columns = torch.full((2, 3, 5), 0.2, **DOUBLE), torch.full((2, 3, cols), 0.2, **DOUBLE)
    if presence == "none":
        rows = pred_mask / pred_mask.sum(2, keepdim=True)
        columns = (target_mask.double() / target_mask.sum(1, keepdim=True)).expand(2, 3, 4)
    torch.testing.assert_close(found.plan.sum(3), rows, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.plan.sum(2), columns, **EXACT)
    assert (found.error < 1e-6).all()


@presence
def test_transport_of_an_empty_set_is_nothing(presence: str) -> None:
    pred, target, pred_mask, target_mask = random_sets()
    target_mask[0], target_mask[1] = False, True
    value, found = sinkhorn_loss(
        pred, target, pred_mask, target_mask, presence=presence, reduction="none", return_transport=True
    )
    assert bool(found.plan[0].any()) is (presence == "feature")  # there, it goes to absent elements
    assert found.plan[1].any()
    for n, m in ((0, 3), (4, 0), (0, 0)):
        pred, target = torch.rand(2, 3, n, 2), torch.rand(3, m, 2)
        value, found = sinkhorn_loss(pred, target, presence=presence, reduction="none", return_transport=True)
        assert [x.shape for x in found] == [(2, 3), (2, 3, n, m), (2, 3, n), (2, 3, m), (2, 3)]
        assert not value.any()
        assert not any(x.any() for x in found)


def test_tol_and_rho_reach_the_transport() -> None:
    pred, target, *_ = random_sets()
    loss = SinkhornLoss(epsilon=0.05, iters=10**9, tol=1e-4, presence="none")  # would take hours
    value, found = loss(pred, target, return_transport=True)
    assert (found.error <= 1e-4).all()
    torch.testing.assert_close(
        value, sinkhorn_loss(pred, target, epsilon=0.05, iters=2000, presence="none"), rtol=0, atol=1e-3
    )
    far = torch.cat([target, 1e3 + target[:, :1]], 1)
    paid = sinkhorn_loss(pred, far, epsilon=0.05, rho=1.0, presence="none", reduction="none")
    assert (paid < 5).all()
    assert (sinkhorn_loss(pred, far, epsilon=0.05, presence="none", reduction="none") > 1e5).all()


@presence
def test_unbalanced_gradcheck(presence: str) -> None:
    pred, target, pred_mask, target_mask = random_sets(3, 2)

    def value(*inputs: Tensor) -> Tensor:
        return sinkhorn_loss(*inputs, target_mask, epsilon=0.5, rho=0.7, iters=200, presence=presence, reduction="none")

    assert devices.gradcheck(value, (pred, target.requires_grad_(), pred_mask))


def test_unbalanced_divergence_agrees_with_geomloss() -> None:
    geomloss = pytest.importorskip("geomloss")
    pred, target = torch.rand(3, 7, 2, **DOUBLE, requires_grad=True), torch.rand(3, 9, 2, **DOUBLE)
    reference = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.5, reach=0.7, scaling=0.99, backend="tensorized")
    half = lambda x, y: (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1) / 2  # noqa: E731
    values = [
        reference(pred, target),
        sinkhorn_loss(pred, target, cost=half, epsilon=0.25, rho=0.49, presence="none", reduction="none"),
    ]
    torch.testing.assert_close(*values, rtol=2e-3, atol=1e-5)
    theirs, ours = (torch.autograd.grad(value.sum(), pred)[0] for value in values)
    # It means to multiply its gradient by rho + epsilon, but PyTorch does not call a module's `backward`.
    torch.testing.assert_close(theirs * (0.49 + 0.25) / (0.49 + 0.25 / 2), ours, rtol=1e-2, atol=1e-4)


def test_module_and_refusals() -> None:
    loss = SinkhornLoss("l1", epsilon=0.1, iters=5, debias=False, presence="none", reduction="sum")
    inputs = random_sets()
    options = {"epsilon": 0.1, "iters": 5, "debias": False, "presence": "none", "reduction": "sum"}
    assert torch.equal(loss(*inputs), sinkhorn_loss(*inputs, cost="l1", **options))
    assert repr(loss) == (
        "SinkhornLoss(cost='l1', epsilon=0.1, iters=5, debias=False, presence='none', reduction='sum')"
    )
    for message, change in {
        "`presence` must be one of 'feature', 'none', got 'bce'": {"presence": "bce"},
        "`epsilon` must be positive, got 0.0": {"epsilon": 0.0},
        "`epsilon` must be positive, got nan": {"epsilon": torch.nan},
        "`epsilon` must be finite, got inf": {"epsilon": torch.inf},
        "`debias` must be one of True, False, got 'no'": {"debias": "no"},
        "`iters` must be at least 1": {"iters": 0},
        "`tol` must be positive, got 0.0": {"tol": 0.0},
        "`rho` must be positive, got 0.0": {"rho": 0.0},
        "`cost` must be one of": {"cost": "l2"},
        "`reduction` must be one of": {"reduction": "max"},
    }.items():
        with pytest.raises(ValueError, match=message):
            SinkhornLoss(**change)
        with pytest.raises(ValueError, match=message):
            sinkhorn_loss(*inputs, **change)
    for message, change in {
        "`iters` must be an integer, got 2.5": {"iters": 2.5},
        "`epsilon` must be a number, got '1'": {"epsilon": "1"},
    }.items():
        with pytest.raises(TypeError, match=message):
            SinkhornLoss(**change)
        with pytest.raises(TypeError, match=message):
            entropic_transport(torch.rand(1, 2, 3), torch.rand(1, 2), torch.rand(1, 3), **change)
    for name, wrong in {"pred": [0.0], "target": None, "pred_mask": 0.5, "target_mask": [True]}.items():
        with pytest.raises(TypeError, match=f"`{name}` must be a tensor"):
            sinkhorn_loss(
                **dict(zip(["pred", "target", "pred_mask", "target_mask"], inputs, strict=True)) | {name: wrong}
            )
    with pytest.raises(TypeError, match="`pred_mask` must be floating: a bool mask is a target's"):
        sinkhorn_loss(inputs[0], inputs[0], inputs[2] > 0.5)
    with pytest.raises(ValueError, match=r"`row_weight` must have shape \(1, 2\)"):
        entropic_transport(torch.rand(1, 2, 3), torch.rand(1, 3), torch.rand(1, 3))
    with pytest.raises(ValueError, match="`epsilon` must be finite"):
        entropic_transport(torch.rand(1, 2, 3), torch.rand(1, 2), torch.rand(1, 3), epsilon=torch.inf)
