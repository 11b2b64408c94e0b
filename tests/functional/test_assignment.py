"""Linear assignment: against SciPy, brute force and optima known by construction."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from setpred.functional import assignment
from setpred.functional.assignment import choose_solver, linear_assignment, matched_pairs
from tests import oracles

seeds = st.integers(0, 2**31)


def plain_solver(cost: Tensor) -> Tensor:
    """What a user's solver may be: no masks, all of the smaller side matched."""
    assigned = torch.full(cost.shape[:2], -1)
    for s, problem in enumerate(cost):
        row, col = linear_sum_assignment(problem.cpu().numpy())
        assigned[s, torch.as_tensor(row)] = torch.as_tensor(col)
    return assigned


SOLVERS = pytest.mark.parametrize("solver", ["scipy", plain_solver])


def random_costs(batch: int, n: int, m: int, kind: str) -> Tensor:
    cost = torch.randn(batch, n, m, dtype=torch.float64)
    if kind == "ties":
        return cost.round()
    if kind == "equal":
        return torch.ones_like(cost)
    if kind == "forbidden":  # never a whole diagonal, so that there is an assignment
        i, j = torch.arange(n).unsqueeze(1), torch.arange(m)
        return cost.masked_fill((torch.rand(batch, n, m) < 0.4) & (i != j), torch.inf)
    return cost


@SOLVERS
@given(
    batch=st.integers(0, 3),
    n=st.integers(0, 7),
    m=st.integers(0, 7),
    kind=st.sampled_from(["normal", "ties", "equal", "forbidden"]),
    masks=st.sampled_from(["", "rows", "cols", "rows cols", "front"]),
    seed=seeds,
)
def test_equals_scipy(solver: object, batch: int, n: int, m: int, kind: str, masks: str, seed: int) -> None:
    torch.manual_seed(seed)
    cost = random_costs(batch, n, m, kind)
    row_mask = torch.rand(batch, n) < 0.7 if "rows" in masks else None
    col_mask = torch.rand(batch, m) < 0.7 if "cols" in masks else None
    if masks == "front":
        col_mask = torch.arange(m) < torch.randint(0, m + 1, (batch, 1))
    if kind == "forbidden" and masks:
        cost = cost.nan_to_num(posinf=10.0)  # masks may cut the diagonal that makes it feasible
    garbage = cost.clone()
    if row_mask is not None:
        garbage[~row_mask] = torch.nan
    if col_mask is not None:
        garbage.mT[~col_mask] = -torch.inf
    assigned = linear_assignment(garbage, row_mask=row_mask, col_mask=col_mask, solver=solver)
    assert assigned.shape == (batch, n)
    assert assigned.dtype == torch.int64
    for b in range(batch):
        rows = torch.arange(n) if row_mask is None else row_mask[b].nonzero().squeeze(1)
        cols = torch.arange(m) if col_mask is None else col_mask[b].nonzero().squeeze(1)
        problem = cost[b][rows][:, cols]
        i, j = linear_sum_assignment(problem.cpu().numpy())
        expected = torch.full((n,), -1)
        expected[rows[torch.as_tensor(i)]] = cols[torch.as_tensor(j)]
        if kind == "normal":  # the optimum is unique
            assert torch.equal(assigned[b], expected)
        pairs = assigned[b] >= 0
        assert pairs.sum() == min(problem.shape)
        assert len(assigned[b][pairs].unique()) == pairs.sum()
        total = cost[b][pairs, assigned[b][pairs]].sum()
        torch.testing.assert_close(total, cost[b][expected >= 0, expected[expected >= 0]].sum(), rtol=1e-9, atol=1e-9)
        # The same sample alone.
        alone = linear_assignment(
            garbage[b : b + 1],
            row_mask=None if row_mask is None else row_mask[b : b + 1].double(),
            col_mask=None if col_mask is None else col_mask[b : b + 1].double(),
            solver=solver,
        )
        assert torch.equal(alone[0], assigned[b])


@SOLVERS
@given(n=st.integers(1, 7), m=st.integers(1, 5), kind=st.sampled_from(["normal", "ties", "forbidden"]), seed=seeds)
def test_equals_brute_force(solver: object, n: int, m: int, kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    cost = random_costs(1, n, m, kind)
    sample, row, col = matched_pairs(linear_assignment(cost, solver=solver))
    total = cost[sample, row, col].sum()
    torch.testing.assert_close(total, oracles.least_assignment(cost[0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [7, 50, 300])
def test_finds_permutations_known_by_construction(size: int) -> None:
    """For c_ij = u_i v_j with u rising, the optimum pairs it with v falling (the rearrangement inequality)."""
    u, v = torch.rand(2, 3, size, dtype=torch.float64).sort(-1).values
    shuffle = torch.stack([torch.randperm(size) for _ in range(3)])
    cost = u.unsqueeze(2) * v.gather(1, shuffle).unsqueeze(1)
    # Row i has the i-th largest v: where the shuffle holds size - 1 - i.
    assert torch.equal(linear_assignment(cost), shuffle.argsort(1).flip(1))


def test_large_batches_go_through_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = torch.rand(7, 6, 9)
    alone = linear_assignment(cost)
    monkeypatch.setattr(assignment, "_threads", lambda *_: 3)
    assert torch.equal(linear_assignment(cost), alone)
    cost[5, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="sample 5"):
        linear_assignment(cost)
    monkeypatch.undo()
    threads = torch.get_num_threads()
    assert assignment._threads(32, 10, 10) == 1
    assert assignment._threads(64, 100, 100) == threads
    assert assignment._threads(1, 1000, 1000) == 1


def test_leading_dimensions() -> None:
    cost, col_mask = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 5) < 0.7
    for solver in ("auto", plain_solver):
        assigned = linear_assignment(cost, col_mask=col_mask, solver=solver)
        flat = linear_assignment(cost.flatten(0, 1), col_mask=col_mask.flatten(0, 1), solver=solver)
        assert torch.equal(assigned, flat.view(2, 3, 4))
    cost[1, 2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"sample \(1, 2\)"):
        linear_assignment(cost)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    cost = torch.rand(4, 6, 6).to(dtype)
    assert torch.equal(linear_assignment(cost), linear_assignment(cost.double()))


def test_no_graph_and_no_copy_written_to() -> None:
    cost = torch.rand(2, 3, 3, requires_grad=True)
    before = cost.detach().clone()
    assert not linear_assignment(cost).requires_grad
    assert torch.equal(cost, before)
    with torch.inference_mode():
        linear_assignment(torch.rand(2, 3, 3))


@SOLVERS
@pytest.mark.parametrize(("value", "message"), [(torch.nan, "NaN or -inf"), (-torch.inf, "NaN or -inf")])
def test_names_the_sample_of_a_bad_cost(solver: object, value: float, message: str) -> None:
    cost = torch.rand(4, 3, 3)
    cost[2, 1, 1] = value
    with pytest.raises(ValueError, match=f"{message}.*sample 2"):
        linear_assignment(cost, solver=solver)


def test_names_the_sample_without_an_assignment() -> None:
    cost = torch.rand(4, 3, 3)
    cost[1, 0] = torch.inf
    with pytest.raises(ValueError, match=r"leaves no assignment.*sample 1, 3 rows, 3 columns"):
        linear_assignment(cost)


@SOLVERS
def test_every_column(solver: object) -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert assignment.assign(torch.rand(2, 3, 3), None, mask, solver, every_column=True).shape == (2, 3)
    with pytest.raises(ValueError, match="sample 1 has 3 columns, all to be matched, but only 2 rows"):
        assignment.assign(torch.rand(2, 2, 3), None, mask, solver, every_column=True)


@pytest.mark.parametrize(
    ("error", "message", "cost", "options"),
    [
        (TypeError, "`cost` must have a floating dtype", torch.ones(1, 2, 2).long(), {}),
        (ValueError, r"`cost` must have shape \(B, N, M\), got shape \(2, 2\)", torch.rand(2, 2), {}),
        (ValueError, r"`row_mask` must have shape \(1, 2\)", torch.rand(1, 2, 3), {"row_mask": torch.ones(1, 3)}),
        (TypeError, "`col_mask` must be bool or float", torch.rand(1, 2, 3), {"col_mask": torch.ones(1, 3).long()}),
        (ValueError, "`solver` must be one of", torch.rand(1, 2, 3), {"solver": "magic"}),
        (ValueError, "`solver` must return int64", torch.rand(1, 2, 3), {"solver": lambda cost: cost[:, :, 0]}),
    ],
)
def test_refuses(error: type[Exception], message: str, cost: Tensor, options: dict[str, object]) -> None:
    with pytest.raises(error, match=message):
        linear_assignment(cost, **options)
    if cost.dim() == 2:
        with pytest.raises(ValueError, match=r"`assignment` must have shape \(B, N\)"):
            matched_pairs(cost[0])


def test_choice_of_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(assignment, "_cuda_solver_installed", lambda: False)
    assert choose_solver(cpu) == choose_solver(cuda) == "scipy"
    with pytest.raises(ModuleNotFoundError, match=r"setpred\[cuda\]"):
        choose_solver(cuda, "cuda")
    monkeypatch.setattr(assignment, "_cuda_solver_installed", lambda: True)
    assert choose_solver(cpu) == "scipy"
    assert choose_solver(cuda) == "cuda"
    assert choose_solver(cuda, "scipy") == "scipy"
    with pytest.raises(ValueError, match="needs `cost` on a CUDA device, got one on cpu"):
        choose_solver(cpu, "cuda")


def test_the_cuda_package_is_called_as_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package itself runs on CUDA only; here a stand-in with its signature and its errors."""

    class Package:
        @staticmethod
        def batch_linear_assignment(cost: Tensor) -> Tensor:
            if cost.isnan().any():
                raise ValueError("matrix contains invalid numeric entries")
            return plain_solver(cost)

    monkeypatch.setattr(assignment.importlib, "import_module", lambda name: Package)
    cost, mask = torch.rand(3, 4, 6), torch.rand(3, 6) < 0.5
    assert torch.equal(
        assignment._solve(cost, None, mask, "cuda", False), assignment._solve(cost, None, mask, "scipy", False)
    )
    cost[1] = torch.nan
    with pytest.raises(ValueError, match="sample 1"):
        assignment._solve(cost, None, None, "cuda", False)


@pytest.mark.parametrize("masked", [False, True])
def test_one_copy_brings_costs_and_masks_to_the_host(masked: bool) -> None:
    """The packing of another device's tensors; `meta` would hold no values, so the CPU stands in for it."""

    class Elsewhere(Tensor):
        device = torch.device("cuda")

    cost, mask = torch.rand(2, 3, 4), torch.rand(2, 4) < 0.5
    host, (row_mask, col_mask) = assignment._to_host(cost.as_subclass(Elsewhere), None, mask if masked else None)
    assert torch.equal(host.as_subclass(Tensor), cost.cpu())
    assert row_mask is None
    assert (col_mask is None) != masked
    if masked:
        assert torch.equal(col_mask.as_subclass(Tensor), mask.cpu())


def test_is_an_operator() -> None:
    cost, mask = torch.rand(2, 3, 4), torch.rand(2, 4) < 0.5
    operator = torch.ops.setpred.linear_assignment.default
    for col_mask in (None, mask):
        torch.library.opcheck(operator, (cost, None, col_mask, "scipy", False))

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(cost: Tensor, mask: Tensor) -> Tensor:
        return linear_assignment(2 * cost, col_mask=mask)

    assert torch.equal(compiled(cost, mask), linear_assignment(cost, col_mask=mask))
    bad = cost.clone()
    bad[1] = torch.nan
    with pytest.raises(ValueError, match="sample 1"):
        compiled(bad, torch.ones_like(mask))
