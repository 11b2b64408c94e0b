"""Linear assignment: against SciPy, brute force and optima known by construction."""

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from setpred.functional import assignment
from setpred.functional.assignment import choose_solver, linear_assignment, matched_indices, matched_pairs
from tests import oracles

seeds = st.integers(0, 2**31)


def plain_solver(cost: Tensor) -> Tensor:
    """What a user's solver may be: no masks, all of the smaller side matched."""
    assigned = torch.full(cost.shape[:2], -1)
    for s, problem in enumerate(cost):
        row, col = linear_sum_assignment(problem.cpu().numpy())
        assigned[s, torch.as_tensor(row)] = torch.as_tensor(col)
    return assigned


def full_solver(cost: Tensor) -> Tensor:
    """A solver that compiles, for costs of as many rows as columns: the diagonal."""
    return torch.arange(cost.shape[1]).expand(len(cost), -1)


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
        (TypeError, "`cost` must have a floating or integer dtype, got bool", torch.ones(1, 2, 2).bool(), {}),
        (TypeError, "`cost` must have a floating or integer dtype, got complex", torch.ones(1, 2, 2).cfloat(), {}),
        (TypeError, "`cost` must be a tensor", [[[1.0]]], {}),
        (ValueError, "`maximize` must be one of False, True, got 'yes'", torch.rand(1, 2, 3), {"maximize": "yes"}),
        (ValueError, "`rows_per_column` must be at least 1, got 0", torch.rand(1, 2, 3), {"rows_per_column": 0}),
        (TypeError, "`rows_per_column` must be an integer", torch.rand(1, 2, 3), {"rows_per_column": 1.5}),
        (ValueError, "`nonfinite` must be one of 'raise', 'skip'", torch.rand(1, 2, 3), {"nonfinite": "ignore"}),
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


@pytest.mark.parametrize("index", [matched_pairs, matched_indices])
def test_pairs_are_of_a_batch(index: Callable[[Tensor], object]) -> None:
    with pytest.raises(ValueError, match=r"`assignment` must have shape \(B, N\), got int64 of shape \(3,\)"):
        index(torch.zeros(3).long())
    for wrong in (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), [[0]]):  # a bool would be 0 and 1
        with pytest.raises(TypeError, match="`assignment` must be a tensor of dtype int64"):
            index(wrong)  # type: ignore[arg-type]


@given(batch=st.integers(0, 3), n=st.sampled_from([0, 1, 5, 100]), m=st.sampled_from([0, 1, 6, 90]), seed=seeds)
def test_indices_of_each_sample_are_its_pairs(batch: int, n: int, m: int, seed: int) -> None:
    torch.manual_seed(seed)
    assigned = linear_assignment(torch.rand(batch, n, m), col_mask=torch.rand(batch, m) < 0.6)
    row, column = matched_indices(assigned)
    assert row.shape == column.shape == (batch, n)
    for one, own_row, own_column in zip(assigned.tolist(), row.tolist(), column.tolist(), strict=True):
        pairs = [(i, j) for i, j in enumerate(one) if j >= 0]
        assert list(zip(own_row, own_column, strict=True)) == pairs + [(-1, -1)] * (n - len(pairs))
    sample = torch.arange(batch).unsqueeze(1).expand_as(row)[row >= 0]
    for flat, padded in zip(matched_pairs(assigned), (sample, row[row >= 0], column[row >= 0]), strict=True):
        assert torch.equal(flat, padded)


@SOLVERS
@given(n=st.integers(0, 6), m=st.integers(0, 6), seed=seeds)
def test_maximize(solver: object, n: int, m: int, seed: int) -> None:
    torch.manual_seed(seed)
    score, mask = torch.randn(2, n, m, dtype=torch.float64), torch.rand(2, m) < 0.7
    assigned = linear_assignment(score, col_mask=mask, maximize=True, solver=solver)
    assert torch.equal(assigned, linear_assignment(-score, col_mask=mask, solver=solver))
    if n > 0 and n == m:
        forbidden = torch.full_like(score, -torch.inf)
        forbidden.diagonal(dim1=1, dim2=2).zero_()
        found = linear_assignment(forbidden, maximize=True, solver=solver)
        assert torch.equal(found, torch.arange(n).expand(2, -1))


@SOLVERS
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize("maximize", [False, True])
def test_integer_costs(solver: object, dtype: torch.dtype, maximize: bool) -> None:
    """The optimum of large integers is exact, where float32 would see ties; the least of a dtype has no negative."""
    end = min(torch.iinfo(dtype).max, 2**40)
    start = max(torch.iinfo(dtype).min, -(2**40))
    cost = torch.tensor([[[end, end - 1], [end - 1, end - 3]], [[start, start + 1], [start + 2, start]]]).to(dtype)
    expected = [[0, 1], [1, 0]] if maximize else [[0, 1], [0, 1]]
    assert cost[0].tolist() == [[end, end - 1], [end - 1, end - 3]]
    best = [max, min][not maximize]
    for s in range(2):
        totals = {(0, 1): int(cost[s, 0, 0]) + int(cost[s, 1, 1]), (1, 0): int(cost[s, 0, 1]) + int(cost[s, 1, 0])}
        expected[s] = list(best(totals, key=totals.__getitem__))
    assert linear_assignment(cost, maximize=maximize, solver=solver).tolist() == expected


@SOLVERS
@given(n=st.integers(0, 7), m=st.integers(0, 3), k=st.integers(1, 3), masked=st.booleans(), seed=seeds)
def test_columns_are_matched_to_several_rows(solver: object, n: int, m: int, k: int, masked: bool, seed: int) -> None:
    """As with k copies of each column; min(n, k m) pairs of the least total."""
    torch.manual_seed(seed)
    cost = torch.randn(2, n, m, dtype=torch.float64)
    mask = torch.rand(2, m) < 0.7 if masked else torch.ones(2, m, dtype=torch.bool)
    assigned = linear_assignment(cost, col_mask=mask if masked else None, rows_per_column=k, solver=solver)
    for s in range(2):
        present = mask[s].nonzero().squeeze(1)
        problem = cost[s][:, present].repeat_interleave(k, 1)
        row, col = assigned[s].ge(0).nonzero().squeeze(1), assigned[s][assigned[s] >= 0]
        assert len(row) == min(problem.shape)
        assert set(col.tolist()) <= set(present.tolist())
        assert col.numel() == 0 or col.bincount().max() <= k
        expected = problem.numpy()[linear_sum_assignment(problem.numpy())].sum()
        torch.testing.assert_close(cost[s][row, col].sum().item(), expected, rtol=1e-9, atol=1e-9)


@SOLVERS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_skips_samples_that_are_not_finite(solver: object, masked: bool, value: float) -> None:
    cost, mask = torch.rand(2, 3, 4, 4), torch.ones(2, 3, 4, dtype=torch.bool)
    mask[..., -1] = not masked
    options = {"col_mask": mask if masked else None, "nonfinite": "skip", "solver": solver}
    whole = linear_assignment(cost, **options)  # no warning
    bad = cost.clone()
    bad[0, 1, 2, 0] = bad[1, 2] = value
    with pytest.warns(RuntimeWarning, match=r"in sample \(0, 1\), sample \(1, 2\): left unmatched") as warned:
        assigned = linear_assignment(bad, **options)
    assert len(warned) == 1
    assert (assigned[0, 1] == -1).all()
    assert (assigned[1, 2] == -1).all()
    finite = bad.isfinite().all(-1).all(-1)
    assert torch.equal(assigned[finite], whole[finite])


def test_skips_samples_without_an_assignment() -> None:
    cost = torch.rand(4, 3, 3)
    cost[1, 0] = torch.inf
    with pytest.warns(RuntimeWarning, match="in sample 1: left unmatched"):
        assigned = linear_assignment(cost, nonfinite="skip")
    assert (assigned >= 0).all(1).tolist() == [True, False, True, True]


def takes_any(cost: Tensor) -> Tensor:
    """A solver that takes what is forbidden, as those with large numbers for +inf do."""
    return plain_solver(cost.nan_to_num(posinf=1e6))


@pytest.mark.parametrize("masked", [False, True])
def test_a_forbidden_pair_is_no_assignment_whoever_solves(masked: bool) -> None:
    cost = torch.rand(2, 3, 4, 5)
    cost[1, 2, 0] = torch.inf
    mask = torch.ones(2, 3, 5)
    mask[..., 4] = not masked
    options = {"col_mask": mask if masked else None, "solver": takes_any}
    with pytest.raises(ValueError, match=r"`cost` leaves no assignment without \+inf: sample \(1, 2\)"):
        linear_assignment(cost, **options)
    with pytest.warns(RuntimeWarning, match=r"in sample \(1, 2\): left unmatched"):
        assigned = linear_assignment(cost, nonfinite="skip", **options)
    assert (assigned[1, 2] == -1).all()
    cost[1, 2, 0, 0] = 0
    assert torch.equal(linear_assignment(cost, **options), linear_assignment(cost, col_mask=options["col_mask"]))


@pytest.mark.parametrize("solver", ["scipy", full_solver])
def test_options_compile(solver: object) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(cost: Tensor) -> tuple[Tensor, ...]:
        assigned = linear_assignment(cost, maximize=True, rows_per_column=2, nonfinite="skip", solver=solver)
        return assigned, *matched_indices(assigned)

    cost = torch.rand(3, 4, 2)
    cost[1, 0, 0] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assigned = linear_assignment(cost, maximize=True, rows_per_column=2, nonfinite="skip", solver=solver)
        for actual, expected in zip(compiled(cost), (assigned, *matched_indices(assigned)), strict=True):
            assert torch.equal(actual, expected)
    assert (assigned[1] == -1).all()


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
