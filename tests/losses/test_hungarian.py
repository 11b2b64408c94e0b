"""Hungarian loss: what is not common to all set losses."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from setpred.functional.pairwise import pairwise_cost
from setpred.losses.hungarian import HungarianLoss, hungarian_loss


def test_a_shuffled_set_costs_nothing() -> None:
    target, mask = torch.randn(3, 50, 4), torch.rand(3, 50) < 0.6
    shuffle = torch.randperm(50)
    loss, matching = hungarian_loss(
        target[:, shuffle] * mask[:, shuffle, None], target, mask[:, shuffle].float(), mask, return_matching=True
    )
    assert loss == 0
    assert torch.equal(matching[mask[:, shuffle]], shuffle.expand(3, -1)[mask[:, shuffle]])
    assert (matching[~mask[:, shuffle]] == -1).all()


@pytest.mark.parametrize("presence", ["feature", "bce", "none"])
@pytest.mark.parametrize("m", [6, 4, 0])
def test_matching(presence: str, m: int) -> None:
    pred, target, pred_mask = torch.randn(2, 3, 6, 2), torch.randn(3, m, 2), torch.rand(2, 3, 6)
    target_mask = torch.rand(3, m) < 0.6
    loss, matching = HungarianLoss(presence=presence)(pred, target, pred_mask, target_mask, return_matching=True)
    assert torch.equal(loss, hungarian_loss(pred, target, pred_mask, target_mask, presence=presence))
    assert matching.shape == (2, 3, 6)
    for k in range(2):
        for b in range(3):
            present = target_mask[b].nonzero().squeeze(1)
            chosen = matching[k, b][matching[k, b] >= 0]
            assert torch.equal(chosen.sort().values, present)
            if presence != "feature":
                cost = pairwise_cost(pred[k, b][None], target[b][present][None])[0]
                row, col = linear_sum_assignment(cost.cpu().numpy())
                assert torch.equal(matching[k, b][row], present[col])


def test_every_step_may_match_otherwise() -> None:
    target = torch.tensor([[[0.0], [1.0]]])
    pred = torch.stack([target, target.flip(1)])
    loss, matching = hungarian_loss(pred, target, return_matching=True)
    assert loss == 0
    assert matching.tolist() == [[[0, 1]], [[1, 0]]]


def test_a_forbidden_pair_is_not_matched() -> None:
    pred, target = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[0.0], [1.0]]])

    def not_itself(x: Tensor, y: Tensor) -> Tensor:
        return pairwise_cost(x, y).masked_fill(x == y.mT, torch.inf)

    _, matching = hungarian_loss(pred, target, matching_cost=not_itself, presence="none", return_matching=True)
    assert matching.tolist() == [[1, 0]]


def test_solver_is_handed_on() -> None:
    def in_order(cost: Tensor) -> Tensor:
        return torch.arange(cost.shape[1]).expand(cost.shape[:2])

    pred, target = torch.rand(2, 3, 2), torch.rand(2, 3, 2)
    loss, matching = HungarianLoss("l1", presence="none", solver=in_order)(pred, target, return_matching=True)
    torch.testing.assert_close(loss, (pred - target).abs().mean())
    assert matching.tolist() == [[0, 1, 2]] * 2
    with pytest.raises(ValueError, match="`solver` must be one of"):
        HungarianLoss(solver="magic")


def test_names_the_sample_of_a_nan() -> None:
    pred, target = torch.rand(4, 3, 2), torch.rand(4, 3, 2)
    pred[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or -inf: sample 2"):
        hungarian_loss(pred, target)
    steps = torch.stack([torch.rand(4, 3, 2), pred])
    with pytest.raises(ValueError, match=r"NaN or -inf: sample \(1, 2\)"):
        hungarian_loss(steps, target)


def test_more_targets_than_predictions() -> None:
    pred, mask, target = torch.rand(2, 3, 2), torch.rand(2, 3), torch.rand(2, 5, 2)
    with pytest.raises(ValueError, match=r"`target` must have at most as many rows as `pred` .* got 5 and 3"):
        hungarian_loss(pred, target)
    target_mask = torch.tensor([[True, False, True, False, True], [True, True, True, True, False]])
    for presence in ("bce", "none"):
        with pytest.raises(ValueError, match="sample 1 has 4 columns, all to be matched, but only 3 rows"):
            hungarian_loss(pred, target, mask, target_mask, presence=presence)
        alone = hungarian_loss(pred[:1], target[:1], mask[:1], target_mask[:1], presence=presence)
        wide = hungarian_loss(pred[:1], target[:1, ::2], mask[:1], presence=presence)
        torch.testing.assert_close(alone, wide)
