"""Sliced Wasserstein loss: what is not common to all set losses."""

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from setpred import earth_mover_distance
from setpred.losses.sliced import SlicedWassersteinLoss, sliced_wasserstein_loss
from tests import oracles
from tests.devices import gradcheck, gradgradcheck

EXACT = {"rtol": 1e-9, "atol": 1e-9}
DOUBLE = {"dtype": torch.float64}
C = 3


def random_sets(n: int, m: int, *steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pred, pred_mask = torch.randn(*steps, 2, n, C, **DOUBLE), 0.1 + 0.9 * torch.rand(*steps, 2, n, **DOUBLE)
    return pred.requires_grad_(), torch.randn(2, m, C, **DOUBLE), pred_mask.requires_grad_(), torch.rand(2, m) < 0.7


def lines(channels: int = C, count: int = 4) -> Tensor:
    return torch.randn(count, channels, **DOUBLE)


@settings(max_examples=60)
@given(
    n=st.integers(1, 7),
    m=st.integers(1, 7),
    power=st.sampled_from([1.0, 1.5, 2.0, 3.0]),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_formula(n: int, m: int, power: float, masked: bool, seed: int) -> None:
    torch.manual_seed(seed)
    pred, target, pred_mask, target_mask = random_sets(n, m)
    directions = lines()
    masks = (pred_mask, target_mask) if masked else (None, None)
    options = {"directions": directions, "power": power, "presence": "none", "reduction": "none"}
    garbage = target.masked_fill(~target_mask.unsqueeze(-1), torch.nan) if masked else target
    actual = sliced_wasserstein_loss(pred, garbage, *masks, **options)
    for b, value in enumerate(actual):
        x_weight = pred_mask[b] if masked else torch.ones(n, **DOUBLE)
        keep = target_mask[b] if masked else torch.ones(m, dtype=torch.bool)
        if not keep.any():
            assert value == 0
            continue
        expected = torch.stack(
            [
                oracles.transport_on_a_line(pred[b] @ line, x_weight, target[b][keep] @ line, power)
                for line in directions / directions.norm(dim=1, keepdim=True)
            ]
        ).mean()
        torch.testing.assert_close(value, expected, **EXACT)
        wrt = (pred, pred_mask) if masked else (pred,)
        gradients = [torch.autograd.grad(v, wrt, retain_graph=True) for v in (value, expected)]
        torch.testing.assert_close(*gradients, **EXACT)


def test_equals_pot() -> None:
    pred, target, _, _ = random_sets(6, 9)
    directions = lines(count=20)
    unit = (directions / directions.norm(dim=1, keepdim=True)).T
    for power in (1, 2):
        actual = sliced_wasserstein_loss(
            pred, target, directions=directions, power=power, presence="none", reduction="none"
        )
        expected = [
            ot.sliced_wasserstein_distance(x.detach().numpy(), y.numpy(), projections=unit.numpy(), p=power) ** power
            for x, y in zip(pred, target, strict=True)
        ]
        torch.testing.assert_close(actual.detach(), torch.tensor(expected, **DOUBLE), **EXACT)


def test_of_one_channel_it_is_the_earth_movers_distance() -> None:
    pred, target, _, target_mask = random_sets(5, 4)
    actual = sliced_wasserstein_loss(pred[..., :1], target[..., :1], None, target_mask, power=1, presence="none")
    torch.testing.assert_close(actual, earth_mover_distance(pred[..., :1], target[..., :1], None, target_mask), **EXACT)


@pytest.mark.parametrize("presence", ["feature", "none"])
def test_padding_order_steps_and_batch_do_not_matter(presence: str) -> None:
    pred, target, pred_mask, target_mask = random_sets(5, 4, 3)
    options = {"directions": lines(C + (presence == "feature")), "presence": presence, "reduction": "none"}

    def value(pred: Tensor, target: Tensor, pred_mask: Tensor, target_mask: Tensor) -> Tensor:
        return sliced_wasserstein_loss(pred, target, pred_mask, target_mask, **options)

    expected = value(pred, target, pred_mask, target_mask)
    assert expected.shape == (3, 2)
    one_by_one = torch.stack([value(x, target, m, target_mask) for x, m in zip(pred, pred_mask, strict=True)])
    torch.testing.assert_close(one_by_one, expected, **EXACT)
    order, other = torch.randperm(5), torch.randperm(4)
    shuffled = value(pred[..., order, :], target[:, other], pred_mask[..., order], target_mask[:, other])
    torch.testing.assert_close(shuffled, expected, **EXACT)
    pad = torch.nn.functional.pad
    padded = value(pred, pad(target, (0, 0, 0, 1), value=torch.nan), pred_mask, pad(target_mask, (0, 1)))
    torch.testing.assert_close(padded, expected, **EXACT)
    alone = value(pred[:, :1], target[:1], pred_mask[:, :1], target_mask[:1])
    torch.testing.assert_close(alone, expected[:, :1], **EXACT)
    same = value(target.where(target_mask.unsqueeze(-1), 0), target, target_mask.double(), target_mask)
    assert (same.abs() < 1e-12).all()


@pytest.mark.parametrize("presence", ["feature", "none"])
def test_gradients(presence: str) -> None:
    pred, target, pred_mask, target_mask = random_sets(4, 3)
    directions = lines(C + (presence == "feature"))

    def value(pred: Tensor, pred_mask: Tensor) -> Tensor:
        return sliced_wasserstein_loss(pred, target, pred_mask, target_mask, directions=directions, presence=presence)

    assert gradcheck(value, (pred, pred_mask))
    assert gradgradcheck(value, (pred, pred_mask))


@pytest.mark.parametrize("presence", ["feature", "none"])
def test_nothing_on_a_side_and_nan(presence: str) -> None:
    loss = SlicedWassersteinLoss(presence=presence, reduction="none")
    pred, target, pred_mask, _ = random_sets(4, 3)
    value = loss(pred, target[:, :0], pred_mask)
    assert value.shape == (2,)
    if presence == "none":
        assert (value == 0).all()
        assert (loss(pred, target, torch.zeros_like(pred_mask)) == 0).all()
        assert (loss(pred, target, pred_mask, torch.zeros(2, 3, dtype=torch.bool)) == 0).all()
    broken = pred.detach().clone()
    broken[0, 1, 2] = torch.nan
    assert loss(broken, target, pred_mask).isnan().tolist() == [True, False]


def test_directions_are_drawn_anew() -> None:
    loss, (pred, target, *_) = SlicedWassersteinLoss(directions=2), random_sets(4, 4)
    torch.manual_seed(0)
    first, second = loss(pred, target), loss(pred, target)
    torch.manual_seed(0)
    assert first != second
    assert first == loss(pred, target)


def test_compiles_in_one_graph() -> None:
    torch.compiler.reset()
    inputs = random_sets(4, 3)
    loss = SlicedWassersteinLoss(directions=lines(C + 1))
    values = [f(*inputs) for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(*values, **EXACT)
    torch.testing.assert_close(*(torch.autograd.grad(value, inputs[0]) for value in values), **EXACT)


def test_autocast_and_half_precision() -> None:
    pred, target, pred_mask, target_mask = random_sets(5, 4)
    inputs = (pred.float(), target.float(), pred_mask.float(), target_mask)
    loss = SlicedWassersteinLoss(directions=lines(C + 1).float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(*inputs), loss(*inputs))
        value = loss(*inputs)
    assert torch.equal(value, loss(*inputs))
    assert loss(pred.half(), target.half(), pred_mask.half(), target_mask).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": 0}, "`directions` must be at least 1, got 0"),
        ({"power": 0.5}, "`power` must be at least 1, got 0.5"),
        ({"power": float("inf")}, "`power` must be finite, got inf"),
        ({"presence": "bce"}, "`presence` must be one of 'feature', 'none', got 'bce'"),
        ({"reduction": "max"}, "`reduction` must be one of 'mean', 'sum', 'none', got 'max'"),
    ],
)
def test_errors(options: dict[str, object], message: str) -> None:
    for call in (
        SlicedWassersteinLoss,
        lambda **o: sliced_wasserstein_loss(torch.rand(1, 2, 3), torch.rand(1, 2, 3), **o),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            call(**options)


def test_directions_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"^`directions` must have shape \(L, 4\), got float64 of shape \(4, 3\)$"):
        sliced_wasserstein_loss(*random_sets(4, 3)[:2], directions=lines())


def test_what_is_no_direction() -> None:
    pred, target, *_ = random_sets(4, 3)
    with pytest.raises(ValueError, match=r"^`directions` must be at least 1, got 0$"):
        sliced_wasserstein_loss(pred, target, directions=lines(C + 1, 0))
    directions = lines(C + 1)
    short = sliced_wasserstein_loss(pred, target, directions=1e-20 * directions)
    torch.testing.assert_close(short, sliced_wasserstein_loss(pred, target, directions=directions), **EXACT)
    assert sliced_wasserstein_loss(pred, target, directions=0 * directions).isnan()
