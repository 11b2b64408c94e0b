"""Earth mover's distance: against POT, the Hungarian loss, and what a metric must be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from setpred.functional import euclidean_cost, pairwise_cost
from setpred.losses.earth_mover import earth_mover_distance
from setpred.losses.hungarian import hungarian_loss
from tests import devices

ot = pytest.importorskip("ot")
DOUBLE, EXACT = {"dtype": torch.float64}, {"rtol": 1e-9, "atol": 1e-9}
seeds = st.integers(0, 2**31)


def random_sets(n: int, m: int, *steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pred, target = torch.randn(*steps, 3, n, 2, **DOUBLE), torch.randn(3, m, 2, **DOUBLE)
    return pred.requires_grad_(), target, torch.rand(*steps, 3, n) < 0.7, torch.rand(3, m) < 0.7


@pytest.mark.parametrize("cost", [euclidean_cost, "huber", "mse", "l1"])
@pytest.mark.parametrize("steps", [(), (2,)])
@settings(max_examples=20)
@given(n=st.integers(0, 6), m=st.integers(0, 6), seed=seeds)
def test_equals_pot(cost: object, steps: tuple[int, ...], n: int, m: int, seed: int) -> None:
    torch.manual_seed(seed)
    pred, target, exists, present = random_sets(n, m, *steps)
    actual = earth_mover_distance(
        pred.masked_fill(~exists.unsqueeze(-1), torch.nan),
        target.masked_fill(~present.unsqueeze(-1), torch.nan),
        exists,
        present,
        cost=cost,
        reduction="none",
    )
    assert actual.shape == (*steps, 3)
    expected = []
    for x, e, b in zip(pred.flatten(0, -3), exists.flatten(0, -2), range(actual.numel()), strict=True):
        x, y = x[e], target[b % 3][present[b % 3]]
        if 0 in (len(x), len(y)):
            expected.append(0 * pred.sum())
            continue
        costs = pairwise_cost(x[None], y[None], cost)[0]
        a, b = (torch.full((len(z),), 1 / len(z), **DOUBLE).cpu().numpy() for z in (x, y))
        expected.append((torch.as_tensor(ot.emd(a, b, costs.detach().cpu().numpy())).to(costs) * costs).sum())
    expected = torch.stack(expected).view(actual.shape)
    torch.testing.assert_close(actual, expected, **EXACT)
    theirs, ours = (torch.autograd.grad(value.sum(), pred)[0] for value in (expected, actual))
    torch.testing.assert_close(ours, theirs, **EXACT)
    for reduction, total in (("mean", expected.mean()), ("sum", expected.sum())):
        value = earth_mover_distance(pred, target, exists, present, cost=cost, reduction=reduction)
        torch.testing.assert_close(value, total, **EXACT)


@given(n=st.integers(1, 8), seed=seeds)
def test_of_equal_sizes_is_the_hungarian_loss(n: int, seed: int) -> None:
    torch.manual_seed(seed)
    pred, target, *_ = random_sets(n, n)
    expected = hungarian_loss(pred, target, cost=euclidean_cost, presence="none")
    torch.testing.assert_close(earth_mover_distance(pred, target), expected, **EXACT)


@given(n=st.integers(1, 5), m=st.integers(1, 5), k=st.integers(1, 5), seed=seeds)
def test_is_a_metric(n: int, m: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, y, z = (torch.randn(1, size, 3, **DOUBLE) for size in (n, m, k))
    distance = earth_mover_distance(x, y)
    torch.testing.assert_close(earth_mover_distance(y, x), distance, **EXACT)
    assert distance <= earth_mover_distance(x, z) + earth_mover_distance(z, y) + 1e-9
    assert earth_mover_distance(x, x.flip(1).repeat(1, 2, 1)) == pytest.approx(0, abs=1e-12)


def test_equal_sets_have_a_gradient_of_zero() -> None:
    x = torch.rand(1, 4, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(earth_mover_distance(x, x.detach().flip(1)), x)
    assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize(("n", "m"), [(5, 5), (5, 4), (7, 6)])
def test_differentiates_compiles_and_vmaps(n: int, m: int) -> None:
    pred, target, exists, present = random_sets(n, m)
    target.requires_grad_()

    def value(pred: Tensor, target: Tensor) -> Tensor:
        return earth_mover_distance(pred, target, exists, present, reduction="none")

    assert devices.gradcheck(value, (pred, target))
    torch._dynamo.reset()
    actual, expected = torch.compile(value, fullgraph=True, backend="aot_eager")(pred, target), value(pred, target)
    torch.testing.assert_close(actual, expected, **EXACT)
    gradients = [torch.autograd.grad(v.sum(), (pred, target)) for v in (actual, expected)]
    torch.testing.assert_close(*gradients, **EXACT)
    more = torch.stack([pred, pred.flip(0), pred + 1]).detach()
    mapped = torch.func.vmap(value, in_dims=(0, None))(more, target)
    torch.testing.assert_close(mapped, torch.stack([value(x, target) for x in more]), **EXACT)


def test_costs_are_float32_under_autocast() -> None:
    pred, target, exists, present = (x.detach() for x in random_sets(5, 4))

    def product(x: Tensor, y: Tensor) -> Tensor:
        result = x @ y.mT
        assert result.dtype == torch.float32
        return result

    with devices.autocast(torch.bfloat16, enabled=True):
        value = earth_mover_distance(pred.bfloat16(), target.bfloat16(), exists, present, cost=product)
    assert value.dtype == torch.float32


def test_nan_is_not_silent() -> None:
    pred, target = torch.rand(2, 3, 2), torch.rand(2, 4, 2)
    pred[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="`cost` must be finite: sample 1, 3 rows, 4 columns"):
        earth_mover_distance(pred, target)
    with pytest.raises(ValueError, match=r"`cost` must be finite: sample \(1, 1\), 3 rows, 4 columns"):
        earth_mover_distance(torch.stack([target[:, :3], pred]), target)
    assert earth_mover_distance(pred, target[:, :0], reduction="none").isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "`pred_mask` must be bool or hold only 0 and 1", {"pred_mask": torch.full((2, 3), 0.5)}),
        (ValueError, r"`pred_mask` must have shape \(2, 3\)", {"pred_mask": torch.ones(2, 4)}),
        (ValueError, r"`target_mask` must have shape \(2, 4\)", {"target_mask": torch.ones(2, 3)}),
        (ValueError, r"`target` must have shape \(2, M, 2\)", {"target": torch.rand(2, 4, 3)}),
        (ValueError, "`cost` must be one of", {"cost": "cosine"}),
        (ValueError, "`reduction` must be one of", {"reduction": "max"}),
    ],
)
def test_refuses(error: type[Exception], message: str, change: dict[str, object]) -> None:
    with pytest.raises(error, match=message):
        earth_mover_distance(**({"pred": torch.rand(2, 3, 2), "target": torch.rand(2, 4, 2)} | change))
