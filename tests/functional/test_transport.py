"""Exact transport: against POT, brute force and what is known of the plan."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from setpred.functional import transport
from setpred.functional.assignment import linear_assignment
from setpred.functional.pairwise import euclidean_cost
from setpred.functional.transport import exact_transport
from tests import devices, oracles

ot = pytest.importorskip("ot")
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@settings(max_examples=60)
@given(n=st.integers(0, 13), m=st.integers(0, 13), ties=st.booleans(), masked=st.booleans(), seed=st.integers(0, 2**31))
def test_equals_pot(n: int, m: int, ties: bool, masked: bool, seed: int) -> None:
    torch.manual_seed(seed)
    cost = torch.randn(2, n, m, dtype=torch.float64)
    cost = cost.round() if ties else cost
    rows, cols = ((torch.rand(2, size) < (0.7 if masked else 2)) for size in (n, m))
    garbage = cost.masked_fill(~(rows.unsqueeze(2) & cols.unsqueeze(1)), torch.nan)
    masks = {"row_mask": rows, "col_mask": cols.double()} if masked else {}
    plan = exact_transport(garbage, **masks)
    assert plan.shape == cost.shape
    for s in range(2):
        own, part = cost[s][rows[s]][:, cols[s]], plan[s][rows[s]][:, cols[s]]
        assert plan[s].sum() == pytest.approx(float(part.numel() > 0), abs=1e-12)  # nothing goes to the absent
        if part.numel() == 0:
            continue
        a, b = (torch.full((size,), 1 / size, dtype=torch.float64) for size in part.shape)
        torch.testing.assert_close(part.sum(1), a, **EXACT)
        torch.testing.assert_close(part.sum(0), b, **EXACT)
        assert (part >= 0).all()
        assert (part > 0).sum() <= 4 * max(n, m)
        least = own.min()  # POT finds a single pair of cost below -2 infeasible
        expected = ot.emd2(a.cpu().numpy(), b.cpu().numpy(), (own - least).cpu().numpy())
        assert (part * (own - least)).sum().item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("n", "m"), [(7, 7), (1, 9), (30, 20), (31, 29)])
def test_both_ways_to_solve(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the elements where they are few, the linear program elsewhere: the same plan, if there is but one."""
    cost = torch.rand(1, n, m, dtype=torch.float64)
    plan = exact_transport(cost)
    monkeypatch.setattr(math, "lcm", lambda *_: 10**9)  # never few
    torch.testing.assert_close(exact_transport(cost), plan, **EXACT)


@pytest.mark.parametrize("far", [0.0, 1.0], ids=["one scale", "far groups of elements"])
@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1e-6, 1e-3, 1e6])
def test_exact_at_every_scale(scale: float, far: float) -> None:
    """HiGHS takes costs for equal that differ by 1e-7: the linear program must not be given them as they are."""
    n, m = 13, 11
    x, y = (torch.randn(1, size, 3, dtype=torch.float64) * scale for size in (n, m))
    for i in range(2):
        x[:, i] += far * 4**i
        y[:, i] += far * 4**i
    cost = euclidean_cost(x, y)
    copies = cost.repeat_interleave(m, 1).repeat_interleave(n, 2)
    expected = copies.gather(2, linear_assignment(copies).unsqueeze(2)).mean()
    torch.testing.assert_close((exact_transport(cost) * cost).sum() / expected, torch.ones_like(expected), **EXACT)


@given(n=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_of_equal_sizes_is_the_assignment(n: int, seed: int) -> None:
    torch.manual_seed(seed)
    cost = torch.randn(1, n, n, dtype=torch.float64)
    plan = exact_transport(cost)
    torch.testing.assert_close((plan * cost).sum() * n, oracles.least_assignment(cost[0]), **EXACT)
    assert torch.equal(plan.argmax(2), linear_assignment(cost))


def test_dtypes_leading_dimensions_and_no_graph() -> None:
    cost = torch.rand(2, 3, 5, 4, requires_grad=True)
    plan = exact_transport(cost.bfloat16())
    assert plan.dtype == torch.float32
    assert not plan.requires_grad
    flat = exact_transport(cost.bfloat16().flatten(0, 1).double())
    torch.testing.assert_close(plan, flat.view(2, 3, 5, 4).float())
    assert exact_transport(torch.rand(0, 3, 4)).shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("error", "message", "cost", "masks"),
    [
        (ValueError, r"`cost` must be finite: sample \(1, 0\), 2 rows, 3 columns", torch.rand(2, 1, 2, 3), {}),
        (ValueError, r"`cost` must have shape \(B, N, M\), got shape \(2, 3\)", torch.rand(2, 3), {}),
        (TypeError, "`cost` must have a floating dtype", torch.ones(1, 2, 3).long(), {}),
        (ValueError, r"`row_mask` must have shape \(1, 2\)", torch.rand(1, 2, 3), {"row_mask": torch.ones(1, 3)}),
        (ValueError, r"`col_mask` must have shape \(1, 3\)", torch.rand(1, 2, 3), {"col_mask": torch.ones(1, 2)}),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_refuses(error: type[Exception], message: str, cost: Tensor, masks: dict[str, Tensor], value: float) -> None:
    if "finite" in message:
        cost = cost.clone()
        cost[1, 0, 1, 2] = value
    with pytest.raises(error, match=message):
        exact_transport(cost, **masks)


def test_says_when_the_program_is_not_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        success, message = False, "time limit"

    monkeypatch.setattr("scipy.optimize.linprog", lambda *_, **__: Failed)
    with pytest.raises(RuntimeError, match="HiGHS found no transport of 7 to 6 elements: time limit"):
        transport._plan(torch.rand(7, 6).double().cpu().numpy())


def test_is_an_operator() -> None:
    cost, mask = torch.rand(2, 3, 4), torch.rand(2, 4) < 0.5
    for col_mask in (None, mask):
        torch.library.opcheck(torch.ops.setpred.exact_transport.default, (cost, None, col_mask))
    compiled = torch.compile(lambda c, m: exact_transport(2 * c, col_mask=m), fullgraph=True, backend="aot_eager")
    assert devices.equal(compiled(cost, mask), exact_transport(2 * cost, col_mask=mask))
