"""Linear assignment of whole batches: costs in, indices out, no gradient. The only place that calls SciPy's solver."""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from setpred._checks import (
    check_choice,
    check_count,
    check_integers,
    check_mask,
    check_real_tensor,
    explained,
    in_transform,
)
from setpred.functional._batching import in_front
from setpred.functional._precision import common_dtype

Solver = Literal["auto", "scipy", "cuda"] | Callable[[Tensor], Tensor]
SOLVERS = ("auto", "scipy", "cuda")
NonFinite = Literal["raise", "skip"]
_Indices = NDArray[np.int64]


def linear_assignment(
    cost: Tensor,
    *,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
    maximize: bool = False,
    rows_per_column: int = 1,
    nonfinite: NonFinite = "raise",
    solver: Solver = "auto",
) -> Tensor:
    r"""Assign rows to columns at the least total cost, each sample of a batch for itself.

    .. math:: \min_{p} \sum_i \text{cost}_{i, p(i)}, \quad p \text{ injective}

    With n rows and m columns present, ``min(n, m)`` pairs are matched: what is left over on the larger side stays
    unmatched. A cost of +inf forbids its pair. Costs in half precision are solved in float32, integers in float64; no
    gradient flows.

    Args:
        cost: Floating or integer, shape ``(B, N, M)``; more leading dimensions are more samples.
        row_mask: Which rows exist, bool or float {0, 1}, shape ``(B, N)``. Costs of others are never looked at.
        col_mask: Which columns exist, shape ``(B, M)``.
        maximize: Whether to match at the greatest total instead, as of scores. Then -inf forbids a pair.
        rows_per_column: How many rows each column may be matched to, k: ``min(n, k m)`` pairs.
        nonfinite: What becomes of a sample with NaN or -inf among its costs, or without an assignment that avoids
            +inf: ``"raise"`` an error, or ``"skip"`` it: all its rows are -1, and a RuntimeWarning names it.
        solver: Who solves:

            - ``"scipy"``: ``scipy.optimize.linear_sum_assignment`` on the CPU, after one copy from the device;
            - ``"cuda"``: ``torch-linear-assignment`` (the extra ``setpred[cuda]``), on the GPU;
            - ``"auto"``: ``"cuda"`` for costs on a CUDA device where that package is installed, else ``"scipy"``;
            - a callable that maps costs ``(B, N', M')`` to the column of each row, ``(B, N')``, -1 where unmatched.
              Masks are already expressed in its costs, with +inf and rows or columns added where necessary.

    Returns:
        The column of each row, -1 where unmatched, int64 of shape ``(B, N)``.

    Raises:
        ValueError: If a cost between present rows and columns is NaN or -inf, or forbidden pairs leave no
            assignment (both name the sample), a shape is wrong, or ``rows_per_column`` is less than 1.
        TypeError: If a dtype is wrong, or ``rows_per_column`` is no integer.
        ModuleNotFoundError: If ``solver="cuda"`` and its package is missing.

    Example:
        >>> cost = torch.tensor([[[4.0, 1.0, 3.0], [2.0, 0.0, 5.0]]])
        >>> linear_assignment(cost)
        tensor([[1, 0]])
        >>> linear_assignment(cost, col_mask=torch.tensor([[True, False, False]]))
        tensor([[-1,  0]])
        >>> linear_assignment(cost, maximize=True)
        tensor([[0, 2]])

    Source: Kuhn, The Hungarian method (1955); the paper's equation 2.
    """
    check_choice("maximize", maximize, (False, True))
    check_count("rows_per_column", rows_per_column)
    check_choice("nonfinite", nonfinite, ("raise", "skip"))
    return assign(
        cost, row_mask, col_mask, solver, maximize=maximize, rows_per_column=rows_per_column, nonfinite=nonfinite
    )


def assign(
    cost: Tensor,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
    solver: Solver = "auto",
    *,
    every_column: bool = False,
    maximize: bool = False,
    rows_per_column: int = 1,
    nonfinite: NonFinite = "raise",
) -> Tensor:
    """:func:`linear_assignment` of checked options; with ``every_column``, more columns than rows are an error too."""
    check_real_tensor("cost", cost)
    if cost.dim() < 3:
        raise ValueError(f"`cost` must have shape (B, N, M), got shape {tuple(cost.shape)}")
    check_mask("row_mask", row_mask, cost.shape[:-1])
    check_mask("col_mask", col_mask, (*cost.shape[:-2], cost.shape[-1]))
    cost = cost.detach().to(common_dtype(cost) if cost.is_floating_point() else torch.float64)
    row_mask, col_mask = (None if mask is None else mask.bool() for mask in (row_mask, col_mask))
    cols = cost.shape[-1]
    if maximize:
        cost = -cost
    if rows_per_column > 1:
        cost = torch.cat([cost] * rows_per_column, -1)
        col_mask = None if col_mask is None else torch.cat([col_mask] * rows_per_column, -1)
    if callable(solver):
        call = _CallSolver.apply if in_transform() else _call_solver
        assigned: Tensor = call(cost, row_mask, col_mask, solver, every_column, nonfinite == "skip")
    else:
        assigned = torch.ops.setpred.linear_assignment.default(
            cost, row_mask, col_mask, choose_solver(cost.device, solver), every_column, nonfinite == "skip"
        )
    return assigned if rows_per_column == 1 else assigned.where(assigned < 0, assigned % max(cols, 1))


def check_solver(solver: object) -> None:
    """Raise unless ``solver`` is callable or the name of a solver."""
    if not callable(solver):
        check_choice("solver", solver, SOLVERS)


def matched_pairs(assignment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index the matched pairs of a batch: ``pred[sample, row]`` belongs to ``target[sample, column]``.

    The number of pairs depends on the values: this waits for the device, and breaks a ``torch.compile`` graph.

    Args:
        assignment: As :func:`linear_assignment` returns it, shape ``(B, N)``.

    Returns:
        Sample, row and column of each pair, int64, each of shape ``(pairs,)``, by sample, then by row.

    Raises:
        ValueError: If the shape is wrong.
        TypeError: If the dtype is not int64.
        RuntimeError: Under ``torch.func.vmap``, which has no shapes that depend on values.

    Example:
        >>> sample, row, column = matched_pairs(torch.tensor([[2, -1, 0], [-1, -1, 1]]))
        >>> sample.tolist(), row.tolist(), column.tolist()
        ([0, 0, 1], [0, 2, 2], [2, 0, 1])
    """
    _check_assignment(assignment)
    with explained("matched_pairs", "how many pairs there are depends on values"):
        sample, row = (assignment >= 0).nonzero(as_tuple=True)
    return sample, row, assignment[sample, row]


def matched_indices(assignment: Tensor) -> tuple[Tensor, Tensor]:
    """Index the matched pairs of each sample: ``pred[b, row[b, k]]`` belongs to ``target[b, column[b, k]]``.

    Unlike :func:`matched_pairs`, it does not wait for the device, and it compiles: each sample has N places for its
    pairs, of which those left over are -1. With M columns, at most ``min(N, M)`` are used: cut the rest off by slicing.

    Args:
        assignment: As :func:`linear_assignment` returns it, shape ``(B, N)``.

    Returns:
        Row and column of each pair, int64, each of shape ``(B, N)``, by row; -1 after the last pair.

    Raises:
        ValueError: If the shape is wrong.
        TypeError: If the dtype is not int64.

    Example:
        >>> row, column = matched_indices(torch.tensor([[2, -1, 0], [-1, -1, 1]]))
        >>> row
        tensor([[ 0,  2, -1],
                [ 2, -1, -1]])
        >>> column
        tensor([[ 2,  0, -1],
                [ 1, -1, -1]])
    """
    _check_assignment(assignment)
    unmatched = assignment < 0
    row = unmatched.to(torch.uint8).argsort(dim=-1, stable=True)
    return row.masked_fill(unmatched.gather(1, row), -1), assignment.gather(1, row)


def _check_assignment(assignment: Tensor) -> None:
    check_integers("assignment", assignment, "B", "N")


@lru_cache(maxsize=1)
def _cuda_solver_installed() -> bool:
    return importlib.util.find_spec("torch_linear_assignment") is not None


def choose_solver(device: torch.device, solver: Literal["auto", "scipy", "cuda"] = "auto") -> str:
    """Name the solver that ``solver`` stands for on ``device``: ``"scipy"`` or ``"cuda"``."""
    check_choice("solver", solver, SOLVERS)
    if solver == "auto":
        return "cuda" if device.type == "cuda" and _cuda_solver_installed() else "scipy"
    if solver == "cuda":
        if not _cuda_solver_installed():
            raise ModuleNotFoundError('`solver="cuda"` needs torch-linear-assignment: pip install "setpred[cuda]"')
        if device.type != "cuda":
            raise ValueError(f'`solver="cuda"` needs `cost` on a CUDA device, got one on {device}')
    return solver


def _solve(
    cost: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    solver: str,
    every_column: bool,
    skip: bool = False,
) -> Tensor:
    if solver == "scipy":
        return _with_scipy(cost, row_mask, col_mask, every_column, skip)
    package = importlib.import_module("torch_linear_assignment")
    try:
        return _with_plain_solver(package.batch_linear_assignment, cost, row_mask, col_mask, every_column)
    except ValueError:  # some sample's costs are wrong: SciPy's way says whose, or skips it
        return _with_scipy(cost, row_mask, col_mask, every_column, skip)


# An operator, so that torch.compile need not look inside. Defined at this level because a call through
# torch.library.custom_op takes as long as solving ten problems of size 10.
torch.library.define(
    "setpred::linear_assignment",
    "(Tensor cost, Tensor? row_mask, Tensor? col_mask, str solver, bool every_column, bool skip=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("setpred::linear_assignment", "CompositeExplicitAutograd")(_solve)


@torch.library.register_fake("setpred::linear_assignment")  # type: ignore[untyped-decorator]
def _solved_shape(
    cost: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    solver: str,
    every_column: bool,
    skip: bool = False,
) -> Tensor:
    return cost.new_empty(cost.shape[:-1], dtype=torch.int64)


@torch.library.register_vmap("setpred::linear_assignment")  # type: ignore[untyped-decorator]
def _solve_all(
    info: Any,
    in_dims: tuple[int | None, ...],
    cost: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    solver: str,
    every_column: bool,
    skip: bool = False,
) -> tuple[Tensor, int]:
    """One more leading dimension is more samples, which an error names by their place in it too."""
    batched = in_front(info, in_dims, cost, row_mask, col_mask)
    return torch.ops.setpred.linear_assignment.default(*batched, solver, every_column, skip), 0


def sample_name(sample: int, batch: torch.Size) -> str:
    """Say which sample of a batch it is, by its index in all leading dimensions."""
    index = [int(i) for i in np.unravel_index(sample, batch)]
    return f"sample {index[0] if len(index) == 1 else tuple(index)}"


def _too_many(sample: int, batch: torch.Size, rows: int, cols: int) -> str:
    return f"{sample_name(sample, batch)} has {cols} columns, all to be matched, but only {rows} rows"


def _warn_skipped(samples: Iterable[int], batch: torch.Size) -> None:
    names = ", ".join(sample_name(sample, batch) for sample in samples)
    if names:
        warnings.warn(
            f"`cost` is NaN or -inf, or leaves no assignment without +inf, in {names}: left unmatched, as "
            "nonfinite='skip' says",
            RuntimeWarning,
            stacklevel=2,
        )


def _to_host(cost: Tensor, *masks: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
    """Bring costs and masks to the CPU in one copy, which is one wait for the device."""
    given = [mask for mask in masks if mask is not None]
    if cost.device.type == "cpu" or not given:
        return cost.cpu(), list(masks)
    packed = torch.cat([cost.reshape(-1), *(mask.reshape(-1).to(cost.dtype) for mask in given)]).cpu()
    parts = iter(torch.split(packed, [cost.numel(), *(mask.numel() for mask in given)]))
    host = next(parts).view(cost.shape)
    return host, [None if mask is None else next(parts).view(mask.shape).bool() for mask in masks]


def _present_first(mask: Tensor | None, shape: tuple[int, int]) -> tuple[_Indices | None, list[int]]:
    """Order (S, n) that brings what is present to the front, None if it is there, and how many there are."""
    if mask is None:
        return None, [shape[1]] * shape[0]
    present = mask.reshape(shape).numpy()
    in_front = bool((present[:, 1:] <= present[:, :-1]).all())
    return None if in_front else np.argsort(~present, axis=1, kind="stable"), present.sum(1).tolist()


def _threads(samples: int, rows: int, cols: int) -> int:
    """Threads pay (SciPy lets go of the GIL) from some ten milliseconds of solving on: see tests/benchmarks."""
    work = samples * rows * cols * min(rows, cols)
    return min(samples, torch.get_num_threads()) if work > 20_000_000 else 1


def _with_scipy(
    cost: Tensor, row_mask: Tensor | None, col_mask: Tensor | None, every_column: bool, skip: bool
) -> Tensor:
    from scipy.optimize import linear_sum_assignment  # half a second, for those who match

    batch, (rows, cols), device = cost.shape[:-2], cost.shape[-2:], cost.device
    samples = batch.numel()
    cost, (row_mask, col_mask) = _to_host(cost, row_mask, col_mask)
    # SciPy wants float64: converted once, not per sample.
    costs = cost.numpy().astype(np.float64, copy=False).reshape(samples, rows, cols)
    row_order, row_counts = _present_first(row_mask, (samples, rows))
    col_order, col_counts = _present_first(col_mask, (samples, cols))
    if row_order is not None:
        costs = np.take_along_axis(costs, row_order[:, :, None], 1)
    if col_order is not None:
        costs = np.take_along_axis(costs, col_order[:, None, :], 2)
    problems, masked = list(costs), row_mask is not None or col_mask is not None
    if masked:
        problems = [c[:n, :m] for c, n, m in zip(costs, row_counts, col_counts, strict=True)]

    nobody, skipped = np.empty(0, np.int64), set()

    def solve(start: int, stop: int) -> list[tuple[_Indices, _Indices]]:
        pairs = []
        for s in range(start, stop):
            try:
                pairs.append(linear_sum_assignment(problems[s]))
            except ValueError:
                if skip:
                    pairs.append((nobody, nobody))
                    skipped.add(s)
                    continue
                bad = np.isnan(problems[s]) | np.isneginf(problems[s])
                what = "must not be NaN or -inf" if bad.any() else "leaves no assignment without +inf"
                n, m = problems[s].shape
                raise ValueError(f"`cost` {what}: {sample_name(s, batch)}, {n} rows, {m} columns") from None
        return pairs

    if every_column:
        for s, (n, m) in enumerate(zip(row_counts, col_counts, strict=True)):
            if m > n:
                raise ValueError(_too_many(s, batch, n, m))
    threads = _threads(samples, rows, cols)
    if threads <= 1:
        pairs = solve(0, samples)
    else:
        bounds = np.linspace(0, samples, threads + 1).astype(int).tolist()
        with ThreadPoolExecutor(threads) as pool:
            pairs = [pair for part in pool.map(solve, bounds[:-1], bounds[1:]) for pair in part]

    _warn_skipped(sorted(skipped), batch)

    if samples > 0 and rows <= cols and not masked and not skipped:  # every row is matched, in order
        assigned = np.concatenate([col for _, col in pairs])
    elif samples > 0:
        assigned = np.full((samples, rows), -1)
        sample = np.repeat(np.arange(samples), [len(row) for row, _ in pairs])
        row, col = (np.concatenate(side) for side in zip(*pairs, strict=True))
        row = row if row_order is None else row_order[sample, row]
        assigned[sample, row] = col if col_order is None else col_order[sample, col]
    else:
        assigned = np.empty(0, np.int64)
    return torch.from_numpy(assigned).view(*batch, rows).to(device)


def _checked(solver: Callable[[Tensor], Tensor], batch: torch.Size, skip: bool) -> Callable[[Tensor], Tensor]:
    """Make up for what a user's solver may not check itself: costs that are no numbers, forbidden pairs."""

    def solve(cost: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if compiling and not skip:
            return solver(cost)
        bad = (cost.isnan() | cost.isneginf()).flatten(1).any(1)
        if not skip and bool(bad.any()):
            raise ValueError(f"`cost` must not be NaN or -inf: {sample_name(int(bad.nonzero()[0]), batch)}")
        if compiling or bool(bad.any()):
            cost = cost.masked_fill(bad.view(-1, 1, 1), 0)
        assigned = solver(cost)
        if not _is_assignment(assigned, cost):
            return assigned
        taken = cost.gather(2, assigned.clamp(min=0).unsqueeze(2)).squeeze(2)
        infeasible = (taken.isposinf() & (assigned >= 0)).any(1)
        if not skip and bool(infeasible.any()):
            sample = sample_name(int(infeasible.nonzero()[0]), batch)
            raise ValueError(f"`cost` leaves no assignment without +inf: {sample}")
        bad = bad | infeasible
        if skip and not compiling:
            _warn_skipped(bad.nonzero().flatten().tolist(), batch)
        return assigned.masked_fill(bad.view(-1, 1), -1)

    return solve


def _is_assignment(assigned: Tensor, cost: Tensor) -> bool:
    return assigned.shape == cost.shape[:2] and assigned.dtype == torch.int64


def _call_solver(
    cost: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    solver: Callable[[Tensor], Tensor],
    every_column: bool,
    skip: bool,
) -> Tensor:
    return _with_plain_solver(_checked(solver, cost.shape[:-2], skip), cost, row_mask, col_mask, every_column)


class _CallSolver(torch.autograd.Function):
    """Gives a user's solver tensors that show their values, also inside of torch.func's transforms."""

    forward = staticmethod(_call_solver)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, ...]:
        return (None,) * 6

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _CallSolver.apply(*in_front(info, in_dims, *args[:3]), *args[3:]), 0


def _with_plain_solver(
    solver: Callable[[Tensor], Tensor],
    cost: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    every_column: bool,
) -> Tensor:
    """Use a solver that knows no masks, and matches all of the smaller side."""
    batch, (rows, cols) = cost.shape[:-2], cost.shape[-2:]
    if cost.numel() == 0:
        return cost.new_full((*batch, rows), -1, dtype=torch.int64)
    cost = cost.reshape(-1, rows, cols)
    row_present = cost.new_ones(cost.shape[:2], dtype=torch.bool) if row_mask is None else row_mask.reshape(-1, rows)
    col_present = cost.new_ones(cost.shape[::2], dtype=torch.bool) if col_mask is None else col_mask.reshape(-1, cols)
    n, m = row_present.sum(1), col_present.sum(1)
    if every_column and (cols > rows or row_mask is not None) and bool((m > n).any()):
        s = int((m > n).nonzero()[0])
        raise ValueError(_too_many(s, batch, int(n[s]), int(m[s])))

    plain = cost
    if row_mask is not None or col_mask is not None:
        # Of the side with fewer present, each must get a partner that is present: pairs with absent ones are
        # forbidden to it. All other pairs cost nothing, and as the solver matches a whole side, it makes the
        # same number of them whatever it chooses. That side must be one that is matched wholly: where it
        # may be the larger one, the problem is made square.
        if rows < cols and col_mask is not None:
            plain = F.pad(plain, (0, 0, 0, cols - rows))
            row_present = F.pad(row_present, (0, cols - rows))
        elif rows > cols and row_mask is not None:
            plain = F.pad(plain, (0, rows - cols))
            col_present = F.pad(col_present, (0, rows - cols))
        row, col = row_present.unsqueeze(2), col_present.unsqueeze(1)
        forbidden = torch.where((n <= m).view(-1, 1, 1), row & ~col, ~row & col)
        plain = plain.masked_fill(~(row & col), 0).masked_fill(forbidden, torch.inf)
    assigned = solver(plain)
    if not _is_assignment(assigned, plain):
        raise ValueError(
            f"`solver` must return int64 of shape {tuple(plain.shape[:2])}, got {assigned.dtype} of shape "
            f"{tuple(assigned.shape)}"
        )
    paired = (assigned >= 0) & row_present & col_present.gather(1, assigned.clamp(min=0))
    return assigned.where(paired, -1)[:, :rows].reshape(*batch, rows)
