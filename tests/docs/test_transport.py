"""The tables of docs/guides/transport.md, against geomloss and POT."""

import pytest
import torch
from torch import Tensor

from setpred import earth_mover_distance, on_channels, sinkhorn_loss
from setpred.functional import entropic_transport, euclidean_cost, exact_transport

DOUBLE, EXACT = {"dtype": torch.float64}, {"rtol": 1e-9, "atol": 1e-9}
half_squared = on_channels("mse", slice(0, 2), weight=2 / 2)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("reach", [None, 0.7])
@pytest.mark.parametrize(("p", "cost"), [(1, euclidean_cost), (2, half_squared)])
def test_geomloss(p: int, cost: object, reach: float | None, weighted: bool, debias: bool) -> None:
    geomloss = pytest.importorskip("geomloss")
    x, y = torch.rand(3, 7, 2, **DOUBLE), torch.rand(3, 9, 2, **DOUBLE)
    a, present = torch.rand(3, 7, **DOUBLE), torch.rand(3, 9) < 0.7
    present[:, 0] = True
    b = present / present.sum(1, keepdim=True).double()
    a = a / a.sum(1, keepdim=True)
    theirs = geomloss.SamplesLoss(
        "sinkhorn", p=p, blur=0.5, reach=reach, scaling=0.995, debias=debias, backend="tensorized"
    )
    ours = sinkhorn_loss(
        x,
        y,
        *((3 * a, present) if weighted else ()),
        cost=cost,
        epsilon=0.5**p,
        rho=None if reach is None else reach**p,
        debias=debias,
        presence="none",
        reduction="none",
    )
    torch.testing.assert_close(ours, theirs(a, x, b, y) if weighted else theirs(x, y), rtol=2e-3, atol=1e-5)


def test_geomloss_potentials() -> None:
    geomloss = pytest.importorskip("geomloss")
    x, y = torch.rand(3, 7, 2, **DOUBLE), torch.rand(3, 9, 2, **DOUBLE)
    loss = geomloss.SamplesLoss(
        "sinkhorn", p=2, blur=0.5, scaling=0.995, debias=False, potentials=True, backend="tensorized"
    )
    options = {"cost": half_squared, "epsilon": 0.25, "presence": "none", "debias": False}
    _, found = sinkhorn_loss(x, y, return_transport=True, **options)
    for ours, theirs in zip(found[2:4], loss(x, y), strict=True):
        centred = [z.view(3, -1) - z.view(3, -1).mean(1, keepdim=True) for z in (ours, theirs)]
        torch.testing.assert_close(*centred, rtol=0, atol=1e-4)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    a, b = torch.rand(1, 6, **DOUBLE), torch.rand(1, 8, **DOUBLE)
    return torch.rand(1, 6, 8, **DOUBLE), a / a.sum(), b / b.sum()


def test_pot() -> None:
    ot = pytest.importorskip("ot")
    cost, a, b = problem()
    inputs = [z[0].cpu().numpy() for z in (a, b, cost)]
    precise = {"numItermax": 100_000, "stopThr": 1e-14}
    found = entropic_transport(cost, a, b, epsilon=0.1, iters=5000, tol=1e-13)
    plan, log = ot.sinkhorn(*inputs, 0.1, log=True, **precise)
    torch.testing.assert_close(found.plan[0], torch.as_tensor(plan), **EXACT)
    u, v = a * (found.row_potential / 0.1).exp(), b * (found.col_potential / 0.1).exp()
    theirs = torch.as_tensor(log["u"]), torch.as_tensor(log["v"])
    torch.testing.assert_close(u[0] / u[0, 0], theirs[0] / theirs[0][0], **EXACT)
    torch.testing.assert_close(v[0] * u[0, 0], theirs[1] * theirs[0][0], **EXACT)
    charged = (found.plan * cost).sum((1, 2))
    torch.testing.assert_close(charged[0], torch.as_tensor(ot.sinkhorn2(*inputs, 0.1, **precise)).squeeze(), **EXACT)
    entropy = (found.plan * (found.plan / (a.unsqueeze(2) * b.unsqueeze(1))).log()).sum((1, 2))
    torch.testing.assert_close(found.value, charged + 0.1 * entropy, **EXACT)
    unbalanced = entropic_transport(cost, a, b, epsilon=0.1, rho=0.3, iters=5000)
    plan = ot.unbalanced.sinkhorn_unbalanced(*inputs, 0.1, 0.3, reg_type="kl", **precise)
    torch.testing.assert_close(unbalanced.plan[0], torch.as_tensor(plan), **EXACT)


def test_pot_exact() -> None:
    ot = pytest.importorskip("ot")
    cost, *_ = problem()
    plan = ot.emd([], [], cost[0].cpu().numpy())  # equal weights
    torch.testing.assert_close(exact_transport(cost)[0], torch.as_tensor(plan), **EXACT)
    x, y = torch.rand(1, 6, 2, **DOUBLE), torch.rand(1, 8, 2, **DOUBLE)
    distance = ot.emd2([], [], euclidean_cost(x, y)[0].cpu().numpy())
    assert earth_mover_distance(x, y).item() == pytest.approx(distance, rel=1e-9)
