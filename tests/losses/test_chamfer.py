"""Chamfer loss: what is not common to all set losses."""

import pytest
import torch

from setpred.losses.chamfer import chamfer_loss


@pytest.mark.parametrize("cost", ["huber", "mse", "l1"])
def test_large_sets_equal_broadcasting(cost: str) -> None:
    """Sizes at which tiles, and for two of the costs trees, are at work."""
    pred, target = torch.randn(2, 900, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 700, 3).double()
    difference = (pred.unsqueeze(2) - target.unsqueeze(1)).abs()
    pairs = {
        "huber": torch.where(difference < 1, difference**2 / 2, difference - 0.5),
        "mse": difference**2,
        "l1": difference,
    }[cost].mean(-1)
    expected = (pairs.amin(2).mean(1) + pairs.amin(1).mean(1)).mean()
    actual = chamfer_loss(pred, target, cost=cost, presence="none")
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(actual, pred), torch.autograd.grad(expected, pred), rtol=1e-9, atol=1e-9
    )


def test_unequal_sizes_count_as_they_are_with_the_mask_as_a_feature() -> None:
    """Nothing is padded: the channel of ones only dilutes the mean."""
    pred, target = torch.rand(2, 7, 3), torch.rand(2, 4, 3)
    torch.testing.assert_close(chamfer_loss(pred, target), 3 / 4 * chamfer_loss(pred, target, presence="none"))


def test_predictions_of_mask_zero_do_not_exist() -> None:
    pred, target = torch.tensor([[[0.0], [torch.nan], [3.0]]]), torch.tensor([[[1.0], [4.0]]])
    mask = torch.tensor([[1.0, 0.0, 1.0]], requires_grad=True)
    value = chamfer_loss(pred, target, mask, cost="l1", presence="none")
    assert value == 2
    value.backward()
    assert mask.grad is not None
    assert mask.grad.isfinite().all()
    assert chamfer_loss(pred, target, torch.zeros(1, 3), cost="l1", presence="none") == 0
    halved = chamfer_loss(pred, target, torch.tensor([[1.0, 0.0, 0.5]]), cost="mse", presence="none")
    assert halved == 2  # (1 * 1 + 0.5 * 1) / 1.5 + 1


def test_nan_is_not_silent() -> None:
    pred, target = torch.rand(2, 600, 3), torch.rand(2, 600, 3)
    pred[1, 7, 0] = torch.nan
    for cost in ("huber", "mse"):
        value = chamfer_loss(pred, target, cost=cost, presence="none", reduction="none")
        assert value[0].isfinite()
        assert value[1].isnan()
