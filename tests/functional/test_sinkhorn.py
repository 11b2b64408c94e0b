"""Entropic transport: against its formula and POT, balanced and not, and where numbers are extreme."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from setpred.functional.pairwise import pairwise_cost
from setpred.functional.sinkhorn import Transport, entropic_transport
from tests import devices, oracles

EXACT = {"rtol": 1e-9, "atol": 1e-9}
DOUBLE = {"dtype": torch.float64}
rhos = pytest.mark.parametrize("rho", [None, 0.3])


def problem(batch: int = 3, n: int = 4, m: int = 5, *, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Costs and weights of sum 1, all positive."""
    a, b = 0.1 + torch.rand(batch, n, **DOUBLE), 0.1 + torch.rand(batch, m, **DOUBLE)
    return scale * torch.rand(batch, n, m, **DOUBLE), a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)


def uniform(batch: int, n: int, m: int, **options: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.full((batch, n), 1 / n, **options), torch.full((batch, m), 1 / m, **options)


@settings(max_examples=30)
@given(
    n=st.integers(1, 4),
    m=st.integers(1, 4),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    epsilon=st.floats(0.1, 5.0),
    rho=st.one_of(st.none(), st.floats(0.02, 30.0)),
    absent=st.booleans(),
)
def test_equals_the_formula(n: int, m: int, scale: float, epsilon: float, rho: float | None, absent: bool) -> None:
    cost, a, b = problem(2, n, m, scale=scale)
    if rho is not None:
        a = 2 * a
        rho = rho * scale
    given_cost, given_a, given_b = cost, a, b
    if absent:  # a row and a column that do not exist, of any cost
        given_cost = nn.functional.pad(cost, (1, 0, 0, 1), value=torch.nan)
        given_a, given_b = nn.functional.pad(a, (0, 1)), nn.functional.pad(b, (1, 0))
    found = entropic_transport(given_cost, given_a, given_b, epsilon=epsilon * scale, iters=1000, rho=rho)
    plan = found.plan[:, :n, 1:] if absent else found.plan
    assert plan.sum().item() == pytest.approx(found.plan.sum().item(), rel=1e-12)
    assert (found.error < 1e-12).all()
    for k in range(2):
        value, expected = oracles.entropic_transport(cost[k], a[k], b[k], epsilon * scale, rho)
        torch.testing.assert_close(plan[k], expected, **EXACT)
        torch.testing.assert_close(found.value[k] / scale, value / scale, **EXACT)
    # The plan is that of the potentials.
    f, g = found.row_potential, found.col_potential
    f, g = (f[:, :n], g[:, 1:]) if absent else (f, g)
    exponent = (f.unsqueeze(2) + g.unsqueeze(1) - cost) / (epsilon * scale)
    torch.testing.assert_close(a.unsqueeze(2) * b.unsqueeze(1) * exponent.exp(), plan, **EXACT)


@pytest.mark.parametrize("rho", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("epsilon", [0.5, 0.05])
def test_unbalanced_equals_pot(epsilon: float, rho: float) -> None:
    ot = pytest.importorskip("ot")
    cost, a, b = problem(2, 6, 8)
    b = 1.5 * b
    found = entropic_transport(cost, a, b, epsilon=epsilon, iters=2000, rho=rho)
    for k in range(2):
        inputs = (x[k].cpu().numpy() for x in (a, b, cost))
        # The oldest POT that is admitted has the entropy of the plan alone as its default.
        precise = {"reg_type": "kl", "stopThr": 1e-15, "numItermax": 100_000}
        plan = ot.unbalanced.sinkhorn_unbalanced(*inputs, epsilon, rho, **precise)
        torch.testing.assert_close(found.plan[k], torch.as_tensor(plan), **EXACT)


def test_gradient_equals_pot() -> None:
    batch = pytest.importorskip("ot.batch")
    cost, a, b = problem(3, 6, 8)
    cost.requires_grad_()
    reference = batch.solve_batch(
        cost, 0.1, a, b, max_iter=20_000, tol=1e-14, reg_type="kl", method="log_sinkhorn", grad="envelope"
    )
    value = entropic_transport(cost, a, b, epsilon=0.1, iters=2000).value
    torch.testing.assert_close(value, reference.value, **EXACT)
    gradients = [torch.autograd.grad(x.sum(), cost)[0] for x in (value, reference.value)]
    torch.testing.assert_close(*gradients, **EXACT)


@rhos
def test_gradcheck(rho: float | None) -> None:
    cost, *_ = problem(2, 3, 4)
    logits = torch.randn(2, 3, **DOUBLE), torch.randn(2, 4, **DOUBLE)

    def value(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.softmax(1), b.softmax(1)
        if rho is not None:
            a = 1.5 * a
        return entropic_transport(cost, a, b, epsilon=0.3, iters=300, rho=rho).value

    inputs = [x.requires_grad_() for x in (cost, *logits)]
    assert devices.gradcheck(value, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rho", [None, 1e-3, 1e3])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-2, 1e3])
def test_extreme_numbers_stay_numbers(epsilon: float, rho: float | None, dtype: torch.dtype) -> None:
    """Costs from 0 to 10,000, weights from 1e-12 on."""
    cost = (torch.rand(4, 9, 7, dtype=dtype) * 4).pow(10) / 1e2
    a, b = (torch.randn(4, k, dtype=dtype).mul(9).softmax(1) for k in (9, 7))
    for iters in (1, 5, 100, 400):
        found = entropic_transport(cost, a, b, epsilon=epsilon, rho=rho, iters=iters)
        assert all(x.isfinite().all() for x in found)
        assert (found.plan >= 0).all()
        if rho is None:
            torch.testing.assert_close(found.plan.sum(1), b, rtol=1e-3, atol=1e-6)


def test_small_epsilon_is_the_assignment() -> None:
    """Also where a kernel of exp(-cost / epsilon) would be zeros only."""
    cost = 100 + 100 * torch.rand(3, 8, 8)
    found = entropic_transport(cost, *uniform(3, 8, 8), epsilon=0.02, iters=2000)
    for k in range(3):
        row, col = linear_sum_assignment(cost[k].cpu().numpy())
        assert found.value[k].item() == pytest.approx(cost[k, row, col].mean().item(), abs=0.02 * 2.1)


def test_large_rho_is_balanced() -> None:
    cost, a, b = problem()
    balanced = entropic_transport(cost, a, b, epsilon=0.1, iters=500)
    found = entropic_transport(cost, a, b, epsilon=0.1, iters=500, rho=1e7)
    torch.testing.assert_close(found.plan, balanced.plan, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.value, balanced.value, rtol=0, atol=1e-6)


def test_what_is_too_far_is_left() -> None:
    cost = torch.tensor([[[0.0, 50.0], [50.0, 100.0]]], **DOUBLE)
    plan = entropic_transport(cost, *uniform(1, 2, 2, **DOUBLE), epsilon=0.01, rho=1.0).plan
    assert plan[0, 0, 0].item() == pytest.approx(0.5, abs=0.01)
    assert plan[0, 1, 1].item() < 1e-12


@rhos
def test_tol_ends_the_iterations_of_each_sample_by_itself(rho: float | None) -> None:
    cost, a, b = problem(8, 12, 12)
    cost = cost * torch.linspace(0.1, 4, 8, **DOUBLE).view(-1, 1, 1)  # some converge sooner
    solve = partial(entropic_transport, epsilon=0.03, rho=rho)
    found = solve(cost, a, b, iters=10**9, tol=1e-6)  # would take hours
    assert (found.error <= 1e-6).all()
    assert (found.error > 1e-14).any()  # it ended before all was done
    converged = solve(cost, a, b, iters=5000)
    assert (found.plan - converged.plan).abs().sum((1, 2)).max() < 1e-3
    for k in range(8):
        alone = solve(*(x[k : k + 1] for x in (cost, a, b)), iters=10**9, tol=1e-6)
        for one, batched in zip(alone, found, strict=True):
            torch.testing.assert_close(one[0], batched[k], **EXACT)
    short = solve(cost, a, b, iters=8, tol=1e-6)
    assert (short.error > 1e-6).any()  # it says so


@rhos
def test_error_is_that_of_the_marginals(rho: float | None) -> None:
    cost, a, b = problem()
    found = entropic_transport(cost, a, b, epsilon=0.02, iters=3, rho=rho)
    kept_a, kept_b = (1, 1) if rho is None else ((-x / rho).exp() for x in (found.row_potential, found.col_potential))
    assert (found.error > 1e-3).any()
    torch.testing.assert_close(found.error, (found.plan.sum(2) - a * kept_a).abs().sum(1), **EXACT)
    torch.testing.assert_close(found.plan.sum(1), b * kept_b, **EXACT)


@rhos
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0), (0, 0, 0)])
def test_empty(shape: tuple[int, int, int], rho: float | None) -> None:
    batch, n, m = shape
    cost, a, b = torch.rand(shape, requires_grad=True), torch.zeros(batch, n), torch.zeros(batch, m)
    found = entropic_transport(cost, a, b, rho=rho, tol=1e-3)
    assert [x.shape for x in found] == [(batch,), shape, (batch, n), (batch, m), (batch,)]
    assert all(not x.any() for x in found)
    found.value.sum().backward()
    assert cost.grad is not None


@rhos
def test_half_precision_and_autocast(rho: float | None) -> None:
    inputs = [x.bfloat16() for x in problem()]
    expected = entropic_transport(*(x.float() for x in inputs), epsilon=0.05, rho=rho)
    with devices.autocast(torch.bfloat16):
        found = entropic_transport(*inputs, epsilon=0.05, rho=rho)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert devices.equal(one, other)


class Both(nn.Module):
    """Balanced and unbalanced, with and without an end by `tol`."""

    def __init__(self, iters: int) -> None:
        super().__init__()
        self.iters = iters

    def forward(self, cost: Tensor, a: Tensor, b: Tensor) -> tuple[Transport, Transport]:
        solve = partial(entropic_transport, cost, a, b, epsilon=0.1, iters=self.iters)
        return solve(tol=1e-3), solve(rho=0.5)


def test_compiles_as_one_operator() -> None:
    inputs, nodes = problem(), []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        nodes.append(len(graph.graph.nodes))
        return graph

    for iters in (3, 300):
        torch.compiler.reset()
        module = Both(iters)
        compiled = torch.compile(module, fullgraph=True, backend=count)
        for actual, expected in zip(compiled(*inputs), module(*inputs), strict=True):
            for one, other in zip(actual, expected, strict=True):
                assert devices.equal(one, other)
    assert nodes[0] == nodes[1] < 200
    torch.compiler.reset()
    cost = inputs[0].requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(*inputs)[1].value.sum(), cost)[0] for f in (compiled, module)]
    torch.testing.assert_close(*gradients, **EXACT)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_without_an_operator_of_ours(strict: bool) -> None:
    if strict and torch.__version__ < "2.11":  # a TorchVersion, which compares as versions do
        pytest.skip("there, strict export cannot be told from torch.compile")
    inputs, module = problem(), Both(12)
    exported = torch.export.export(module, inputs, strict=strict)
    graphs = [str(part.graph) for part in exported.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    assert any("aten.exp" in graph for graph in graphs)
    assert not any("setpred" in graph for graph in graphs)
    for actual, expected in zip(exported.module()(*inputs), module(*inputs), strict=True):
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, **EXACT)


def test_operator_is_registered_right() -> None:
    for tol, rho in ((None, None), (1e-3, 0.5)):
        torch.library.opcheck(torch.ops.setpred.entropic_transport.default, (*problem(), 0.1, 20, tol, rho))


def test_symmetric_problems_have_equal_potentials() -> None:
    x = torch.rand(2, 6, 3, **DOUBLE)
    a, _ = uniform(2, 6, 6, **DOUBLE)
    found = entropic_transport(pairwise_cost(x, x, "mse"), a, a, epsilon=0.1, iters=1000)
    torch.testing.assert_close(found.plan, found.plan.mT, **EXACT)


def test_refusals() -> None:
    inputs = problem()
    for message, change in {
        "`tol` must be positive, got 0": {"tol": 0},
        "`tol` must be positive, got nan": {"tol": torch.nan},
        "`rho` must be positive, got -1.0": {"rho": -1.0},
        "`rho` must be finite, got inf": {"rho": torch.inf},
        "`iters` must be at least 1, got 0": {"iters": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            entropic_transport(*inputs, **change)
    for name in ("tol", "rho", "epsilon"):
        with pytest.raises(TypeError, match=f"`{name}` must be a number, got 'small'"):
            entropic_transport(*inputs, **{name: "small"})
    with pytest.raises(ValueError, match=r"`col_weight` must have shape \(3, 5\)"):
        entropic_transport(*inputs[:2], inputs[1])
    with pytest.raises(TypeError, match="`cost` must have a floating dtype"):
        entropic_transport(inputs[0].long(), *inputs[1:])


@settings(max_examples=30)
@given(
    n=st.integers(1, 5),
    kind=st.sampled_from(["mse", "l1", "huber", "any"]),
    epsilon=st.floats(0.05, 2.0),
    rho=st.one_of(st.none(), st.floats(0.02, 30.0)),
    absent=st.booleans(),
    tol=st.booleans(),
)
def test_onto_itself_is_the_general_transport(
    n: int, kind: str, epsilon: float, rho: float | None, absent: bool, tol: bool
) -> None:
    """Also for costs whose kernel has negative eigenvalues, where it converges more slowly."""
    x, (_, a, _) = torch.randn(2, n, 3, **DOUBLE), problem(2, n, 1)
    cost = torch.rand(2, n, n, **DOUBLE) if kind == "any" else pairwise_cost(x, x, kind)
    cost = cost + cost.mT
    a = a if rho is None else 1.5 * a
    if absent:
        cost, a = nn.functional.pad(cost, (1, 0, 1, 0), value=torch.nan), nn.functional.pad(a, (1, 0))
    inputs = [z.requires_grad_() for z in (cost, a)]
    options = {"epsilon": epsilon, "iters": 5000, "rho": rho}
    found, expected = (
        entropic_transport(*inputs, tol=1e-12 if tol else None, **options),
        entropic_transport(*inputs, a, **options),
    )
    assert (found.error < 1e-11).all()
    torch.testing.assert_close(found.plan, found.plan.mT, **EXACT)
    right = expected.error < 1e-13  # within these iterations, it does not always converge
    gradients = [torch.autograd.grad(x.value.sum(), inputs) for x in (found, expected)]
    gradients = [(by_cost, by_a * (a > 0)) for by_cost, by_a in gradients]  # of what does not exist, it is arbitrary
    for one, other in zip(
        (found.value, found.plan, *gradients[0]), (expected.value, expected.plan, *gradients[1]), strict=True
    ):
        torch.testing.assert_close(one[right], other[right], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rho", [None, 1e-3, 1e3])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-2, 1e3])
def test_onto_itself_extreme_numbers_stay_numbers(epsilon: float, rho: float | None, dtype: torch.dtype) -> None:
    cost = (torch.rand(4, 9, 9, dtype=dtype) * 4).pow(10) / 1e2
    cost, a = cost + cost.mT, torch.randn(4, 9, dtype=dtype).mul(9).softmax(1)
    for iters in (1, 5, 100, 400):
        found = entropic_transport(cost, a, epsilon=epsilon, rho=rho, iters=iters)
        assert all(x.isfinite().all() for x in found)
        if rho is None:
            torch.testing.assert_close(found.plan.sum(1), a, rtol=1e-3, atol=1e-6)


def test_onto_itself_half_the_work_converges_sooner() -> None:
    x = torch.rand(4, 60, 2, **DOUBLE)
    cost, (a, _) = pairwise_cost(x, x, "mse"), uniform(4, 60, 60, **DOUBLE)
    own, general = (entropic_transport(cost, a, *b, epsilon=0.01, iters=20).error for b in ((), (a,)))
    assert (own < general / 10).all()


@pytest.mark.parametrize("tol", [None, 1e-5])
def test_a_side_without_mass_is_destroyed(tol: float | None) -> None:
    """Beside samples that have some, which it leaves alone."""
    cost, a, b = problem(4, 3, 5)
    a, b = 2 * a, b.clone()
    a[1], b[2], a[3], b[3], b[1, 0] = 0, 0, 0, 0, 0
    inputs = [x.requires_grad_() for x in (cost, a, b)]
    solve = partial(entropic_transport, epsilon=0.1, rho=0.7, iters=500, tol=tol)
    found = solve(*inputs)
    value = found.value.detach()
    torch.testing.assert_close(value[1:], 0.7 * torch.stack([b[1].sum(), a[2].sum(), b[3].sum()]).detach(), **EXACT)
    assert not found.plan[1:].any()
    assert not found.error[1:].any()
    assert found.col_potential[1].tolist() == [0] + 4 * [torch.inf]
    assert found.row_potential[1].tolist() == 3 * [0]
    by_cost, by_a, by_b = torch.autograd.grad(found.value.sum(), inputs)
    assert not by_cost[1:].any()
    torch.testing.assert_close(by_b[1, 1:], torch.full((4,), 0.7, **DOUBLE), **EXACT)
    torch.testing.assert_close(by_a[2], torch.full((3,), 0.7, **DOUBLE), **EXACT)
    assert all(x.isfinite().all() for x in (by_a, by_b))
    for one, batched in zip(solve(*(x[:1] for x in inputs)), found, strict=True):
        torch.testing.assert_close(one, batched[:1], **EXACT)
    nearly = solve(cost[1:2], torch.full_like(a[1:2], 1e-26), b[1:2])  # the limit
    torch.testing.assert_close(nearly.value.detach(), value[1:2], rtol=0, atol=1e-9)
    onto_itself = entropic_transport(torch.rand(1, 3, 3), torch.zeros(1, 3), rho=1.0)
    assert not any(x.any() for x in onto_itself)


SECOND = {
    "twice": lambda f, x: grad(lambda x: grad(f)(x).square().sum())(x),
    "reverse of forward": lambda f, x: grad(lambda x: jvp(f, (x,), (x.cos(),))[1])(x),
    "forward of reverse": lambda f, x: jvp(grad(f), (x,), (x.cos(),)),
    "forward of forward": lambda f, x: jvp(lambda x: jvp(f, (x,), (x.cos(),))[1], (x,), (x.cos(),)),
    "of each sample": lambda f, x: vmap(lambda x: grad(lambda x: grad(f)(x).square().sum())(x))(x.unsqueeze(0)),
}


@rhos
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("place", [0, 1, 2, "itself"])
def test_second_derivatives_are_refused(way: str, place: int | str, rho: float | None) -> None:
    """Those of a value that holds the plan fixed would be wrong."""
    inputs = [*problem()]
    if place == "itself":
        inputs, place = [torch.rand(3, 4, 4, **DOUBLE), inputs[1]], 0

    def value(x: Tensor) -> Tensor:
        return entropic_transport(*inputs[:place], x, *inputs[place + 1 :], rho=rho).value.square().sum()

    first, forward = grad(value)(inputs[place]), jvp(value, (inputs[place],), (inputs[place].cos(),))[1]
    torch.testing.assert_close((first * inputs[place].cos()).sum(), forward, **EXACT)
    with pytest.raises(RuntimeError, match="no second derivative: it differentiates once"):
        SECOND[way](value, inputs[place])
    if way == "twice":
        x = inputs[place].requires_grad_()
        (first,) = torch.autograd.grad(value(x), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative: it differentiates once"):
            first.sum().backward()


@pytest.mark.parametrize("way", ["twice", "forward of reverse", "of each sample"])
def test_compiled_second_derivatives_are_nan(way: str) -> None:
    """Where the refusal does not compile."""
    torch.compiler.reset()
    cost, a, b = problem()

    def value(cost: Tensor) -> Tensor:
        return entropic_transport(cost, a, b).value.square().sum()

    def compiled(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.compile(f, fullgraph=True, backend="aot_eager")

    torch.testing.assert_close(compiled(lambda x: grad(value)(x))(cost), grad(value)(cost), **EXACT)
    found = compiled(lambda x: SECOND[way](value, x))(cost)
    assert (found[1] if isinstance(found, tuple) else found).isnan().all()
