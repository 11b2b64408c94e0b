"""Timings and memory of the set losses, beside what they replace: pytest tests/benchmarks/test_losses.py -s

Ratios are medians over rounds in which both sides run one after the other, so that a busy machine slows both.
"""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree

from setpred.functional import assignment
from setpred.functional.assignment import linear_assignment
from setpred.functional.nearest import nearest_neighbours
from setpred.losses.chamfer import chamfer_loss
from setpred.losses.hungarian import hungarian_loss
from tests.benchmarks.work import Function, chamfer_by_broadcasting, huber_by_broadcasting, seconds


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def compare(title: str, ours: Function, *others: Function, rounds: int) -> float:
    """Time ``ours`` beside the sum of ``others``; print and return the median of the ratios others / ours."""
    ours()
    for other in others:
        other()
    pairs = [(seconds(ours), sum(seconds(other) for other in others)) for _ in range(rounds)]
    mine, theirs = np.array(pairs).T * 1e3
    ratio = theirs / mine
    low, middle, high = np.quantile(ratio, [0.1, 0.5, 0.9])
    print(
        f"\n{title} [{torch.get_num_threads()} threads]: {np.median(mine):.3f} ms, beside {np.median(theirs):.3f} ms; "
        f"ratio {middle:.2f} (10 % to 90 %: {low:.2f} to {high:.2f}, {rounds} rounds)"
    )
    return float(middle)


def test_hungarian_beside_the_bare_loop() -> None:
    """Issue 3: at most 1.5 times the SciPy loop on the same costs plus the pairwise computation."""
    pred, mask = torch.rand(32, 10, 18, requires_grad=True), torch.rand(32, 10, requires_grad=True)
    target, target_mask = torch.rand(32, 10, 18), torch.rand(32, 10) < 0.6
    both = torch.cat([pred, mask.unsqueeze(-1)], -1).detach().requires_grad_()
    other = torch.cat([target, target_mask.unsqueeze(-1)], -1)
    costs = huber_by_broadcasting(both, other).detach().numpy()
    ratio = compare(
        "Hungarian loss 32 x 10 x 19, forward and backward, beside SciPy's loop + pairwise forward and backward",
        lambda: hungarian_loss(pred, target, mask, target_mask).backward(),
        lambda: [linear_sum_assignment(cost) for cost in costs],
        lambda: huber_by_broadcasting(both, other).mean().backward(),
        rounds=300,
    )
    assert 1 / ratio < 1.5


def test_eleven_steps_in_one_call() -> None:
    """Issue 3: cheaper than eleven calls."""
    pred, mask = torch.rand(11, 32, 10, 18, requires_grad=True), torch.rand(11, 32, 10, requires_grad=True)
    target, target_mask = torch.rand(32, 10, 18), torch.rand(32, 10) < 0.6
    ratio = compare(
        "Hungarian loss of 11 steps in one call, beside 11 calls",
        lambda: hungarian_loss(pred, target, mask, target_mask).backward(),
        lambda: [hungarian_loss(x, target, m, target_mask).backward() for x, m in zip(pred, mask, strict=True)],
        rounds=60,
    )
    assert ratio > 1


def test_chamfer_beside_broadcasting() -> None:
    """Issue 3: 352 sets of 342 x 342 x 3, Huber, forward and backward: at least 5 times faster."""
    pred, target = torch.rand(352, 342, 3, requires_grad=True), torch.rand(352, 342, 3)
    ratio = compare(
        "Chamfer loss 352 x (342 x 342 x 3) Huber, forward and backward, beside broadcasting",
        lambda: chamfer_loss(pred, target, presence="none").backward(),
        lambda: chamfer_by_broadcasting(pred, target).backward(),
        rounds=5,
    )
    assert ratio > 5


PEAK = """
import sys, torch
from setpred.losses.chamfer import chamfer_loss
from tests.benchmarks.work import chamfer_by_broadcasting as literal
torch.set_num_threads(1)
def ours(pred, target):
    return chamfer_loss(pred, target, presence="none")
sets = int(sys.argv[2])
def run(sets, size, function):
    pred = torch.rand(sets, size, 3, requires_grad=True)
    function(pred, torch.rand(sets, size, 3)).backward()
run(2, 8, ours), run(2, 8, literal)  # what is loaded once
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = memory("VmRSS")
run(sets, 342, {"ours": ours, "literal": literal}[sys.argv[1]])
print(memory("VmHWM") - before)
"""


def test_chamfer_peak_memory(threads: int) -> None:
    """Issue 3: at least 20 times lower. Growth of the resident peak in processes of their own, inputs included."""
    if threads != 1:
        pytest.skip("once is enough")
    peak = {}
    for name in ("ours", "literal"):
        printed = subprocess.run([sys.executable, "-c", PEAK, name, "352"], capture_output=True, text=True, check=True)
        peak[name] = int(printed.stdout) / 1024
    ratio = peak["literal"] / peak["ours"]
    print(
        f"\nChamfer loss 352 x (342 x 342 x 3): peak {peak['ours']:.0f} MiB, beside {peak['literal']:.0f}: {ratio:.1f}"
    )
    assert ratio > 20


def test_chamfer_beside_trees() -> None:
    """Issue 3: 20,000 x 20,000 points, squared Euclidean: within 3 times of the k-d tree queries alone."""
    pred, target = torch.rand(1, 20_000, 3, requires_grad=True), torch.rand(1, 20_000, 3)
    x, y = pred[0].detach().double().numpy(), target[0].double().numpy()
    trees = cKDTree(x), cKDTree(y)
    workers = torch.get_num_threads()
    ratio = compare(
        "Chamfer loss 20,000 x 20,000 x 3 mse, forward and backward, beside the tree queries alone",
        lambda: chamfer_loss(pred, target, cost="mse", presence="none").backward(),
        lambda: (trees[1].query(x, workers=workers), trees[0].query(y, workers=workers)),
        rounds=15,
    )
    assert 1 / ratio < 3


@pytest.mark.parametrize("size", [100, 200, 300, 500, 1000, 3000])
@pytest.mark.parametrize("channels", [2, 3, 6, 8])
def test_trees_beside_tiles(size: int, channels: int, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """What `_tree_is_faster` was decided from."""
    x, y = torch.rand(4, size, channels), torch.rand(4, size, channels)

    def by(tree: bool) -> Function:
        def search() -> None:
            monkeypatch.setattr("setpred.functional.nearest._tree_is_faster", lambda *_: tree)
            nearest_neighbours(x, y, "mse")

        return search

    compare(f"Trees, 4 x ({size} x {size} x {channels}), beside tiles", by(True), by(False), rounds=3)


@pytest.mark.parametrize(
    ("size", "batch"),
    [
        *[(5, 1), (5, 32), (5, 1024), (10, 32), (10, 1024), (20, 32), (20, 256), (20, 1024), (50, 32), (50, 256)],
        *[(100, 1), (100, 8), (100, 32), (100, 256), (300, 1), (300, 8), (300, 32), (1000, 2), (1000, 4)],
    ],
)
def test_threads_beside_a_loop(size: int, batch: int, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """What `_threads` was decided from."""
    if threads == 1:
        pytest.skip("two are compared with one")
    cost = torch.cdist(torch.rand(batch, size, 3), torch.rand(batch, size, 3))

    def by(count: int) -> Function:
        def solve() -> None:
            monkeypatch.setattr(assignment, "_threads", lambda *_: min(count, batch))
            linear_assignment(cost)

        return solve

    chosen = assignment._threads(batch, size, size)
    rounds = 3 if size >= 300 else 15
    title = f"Assignment {batch} x {size} x {size} by {min(2, batch)} threads, beside one (chosen: {chosen})"
    compare(title, by(2), by(1), rounds=rounds)
