"""Entropic transport beside POT and geomloss, as accurate or more: pytest tests/benchmarks/test_transport.py -s

Errors are measured against the converged problem in float64, and must be the smaller ones. Uniform points in a cube,
whose mean squared distances are the costs; epsilon 0.01.
"""

import pytest
import torch
from torch import Tensor

from setpred import SinkhornLoss
from setpred.functional import entropic_transport, pairwise_cost
from tests.benchmarks.test_losses import compare, threads  # noqa: F401 (a fixture)

EPSILON = 0.01
sizes = pytest.mark.parametrize(("batch", "size"), [(32, 100), (8, 1000)])


def points(batch: int, size: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(batch, size, 3, requires_grad=True), torch.rand(batch, size, 3)


@sizes
@pytest.mark.parametrize("solver", ["sinkhorn", "sinkhorn_log", "batch"])
def test_plans_beside_pot(batch: int, size: int, solver: str) -> None:
    """POT in a loop, in float64 by its default tolerance, or its batched solver in float32 with the same tolerance."""
    ot = pytest.importorskip("ot")
    if solver == "sinkhorn_log" and size == 1000:
        pytest.skip("takes minutes")
    cost = pairwise_cost(*points(batch, size), "mse").detach()
    weight = torch.full((batch, size), 1 / size)
    exact = entropic_transport(*(x.double() for x in (cost, weight, weight)), epsilon=EPSILON, iters=5000, tol=1e-12)
    matrices, masses = cost.double().numpy(), weight[0].double().numpy()

    def ours() -> Tensor:
        return entropic_transport(cost, weight, weight, epsilon=EPSILON, iters=1000, tol=1e-6).plan

    def theirs() -> Tensor:
        if solver == "batch":
            found = ot.batch.solve_batch(cost, EPSILON, weight, weight, max_iter=1000, tol=1e-6, grad="detach")
            return found.plan
        plans = [ot.sinkhorn(masses, masses, c, EPSILON, method=solver, stopThr=1e-6) for c in matrices]
        return torch.stack([torch.as_tensor(plan) for plan in plans])

    errors = [float((plans() - exact.plan).abs().sum((1, 2)).mean()) for plans in (ours, theirs)]
    title = (
        f"Plans {batch} x {size} x {size}, tol=1e-6, errors {errors[0]:.0e} beside {errors[1]:.0e} of POT's {solver}"
    )
    ratio = compare(title, ours, theirs, rounds=5 if size < 1000 else 2)
    assert errors[0] <= errors[1]
    assert ratio > 1


@sizes
@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize(("scaling", "iters"), [(0.5, 7), (0.9, 20)])
def test_losses_beside_geomloss(batch: int, size: int, debias: bool, scaling: float, iters: int) -> None:
    """Forward and backward; geomloss goes once through its values of epsilon, ever finer with ``scaling``."""
    geomloss = pytest.importorskip("geomloss")
    pred, target = points(batch, size)
    ours = SinkhornLoss(epsilon=EPSILON, iters=iters, debias=debias, presence="none", reduction="none")
    exact = SinkhornLoss(epsilon=EPSILON, iters=1000, debias=debias, presence="none", reduction="none")
    # Its cost is half the squared distance, ours a third of it.
    module = geomloss.SamplesLoss(
        "sinkhorn", blur=(1.5 * EPSILON) ** 0.5, scaling=scaling, debias=debias, backend="tensorized"
    )

    def theirs(pred: Tensor, target: Tensor) -> Tensor:
        return module(pred, target) / 1.5

    def gradient(loss: SinkhornLoss, pred: Tensor = pred, target: Tensor = target) -> Tensor:
        return torch.autograd.grad(loss(pred, target).sum(), pred)[0]

    wanted = gradient(exact, pred.double(), target.double())
    errors = [float((gradient(loss) - wanted).norm() / wanted.norm()) for loss in (ours, theirs)]
    title = (
        f"Sinkhorn {'divergence' if debias else 'loss'} {batch} x {size} x {size}, {iters} iterations, error of "
        f"gradients {errors[0]:.3f} beside {errors[1]:.3f} of geomloss, scaling={scaling}"
    )
    ratio = compare(title, lambda: gradient(ours), lambda: gradient(theirs), rounds=5 if size < 1000 else 2)
    assert errors[0] <= errors[1]
    assert ratio > 1 or scaling == 0.5  # where both are far from converged, about as fast


@sizes
def test_kernels_beside_the_log_domain(batch: int, size: int) -> None:
    """Why not all iterations are in the log domain: 100 of them."""
    cost = pairwise_cost(*points(batch, size), "mse").detach()
    weight = torch.full((batch, size), 1 / size)

    def in_the_log_domain() -> None:
        f, g, scaled = torch.zeros_like(weight), torch.zeros_like(weight), cost / EPSILON
        for _ in range(100):
            f = -torch.logsumexp(g.unsqueeze(1) - scaled, 2)
            g = -torch.logsumexp(f.unsqueeze(2) - scaled, 1)

    title = f"Entropic transport {batch} x {size} x {size}, 100 iterations, beside as many in the log domain"
    ours = lambda: entropic_transport(cost, weight, weight, epsilon=EPSILON)  # noqa: E731
    assert compare(title, ours, in_the_log_domain, rounds=5 if size < 1000 else 2) > 2
