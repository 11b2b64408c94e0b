"""Hungarian loss: what is not common to all set losses."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from setpred.functional.pairwise import pairwise_cost
from setpred.losses.hungarian import HungarianLoss, hungarian_loss
from tests import devices, oracles

DOUBLE, EXACT = {"dtype": torch.float64}, {"rtol": 1e-9, "atol": 1e-9}
PRESENCES = ["feature", "bce", "logits", "none"]
OF_TARGETS = ["bce", "logits", "none"]  # those that match present targets only
seeds = st.integers(0, 2**31)


def random_sets(*shape: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Predictions of a shape (..., B, N, C) and m targets each, in float64."""
    pred, pred_mask = torch.randn(shape, **DOUBLE), torch.rand(shape[:-1], **DOUBLE)
    target, target_mask = torch.randn(shape[-3], m, shape[-1], **DOUBLE), torch.rand(shape[-3], m) < 0.6
    return pred.requires_grad_(), target, pred_mask.requires_grad_(), target_mask


def test_a_shuffled_set_costs_nothing() -> None:
    target, mask = torch.randn(3, 50, 4), torch.rand(3, 50) < 0.6
    shuffle = torch.randperm(50)
    loss, matching = hungarian_loss(
        target[:, shuffle] * mask[:, shuffle, None], target, mask[:, shuffle].float(), mask, return_matching=True
    )
    assert loss == 0
    assert torch.equal(matching[mask[:, shuffle]], shuffle.expand(3, -1)[mask[:, shuffle]])
    assert (matching[~mask[:, shuffle]] == -1).all()


@pytest.mark.parametrize("presence", PRESENCES)
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


@pytest.mark.parametrize("presence", OF_TARGETS)
@pytest.mark.parametrize("steps", [(), (2,)])
@given(batch=st.integers(0, 3), m=st.integers(0, 4), masked=st.booleans(), k=st.integers(1, 2), seed=seeds)
def test_an_average_over_the_batch(
    presence: str, steps: tuple[int, ...], batch: int, m: int, masked: bool, k: int, seed: int
) -> None:
    """DETR's: the sum of all pairs' costs by the number of targets, at least one; presence stays a mean over all."""
    torch.manual_seed(seed)
    pred, target, pred_mask, target_mask = random_sets(*steps, batch, 8, 2, m=m)
    target_mask = target_mask if masked else None
    options = {"presence": presence, "presence_weight": 0.3, "matches_per_target": k}
    each, matching = hungarian_loss(
        pred, target, pred_mask, target_mask, return_matching=True, reduction="none", **options
    )
    pairs = matching.ge(0).sum(-1)
    scored = 0
    if presence != "none":
        probability = pred_mask if presence == "bce" else pred_mask.sigmoid()
        scored = 0.3 * F.binary_cross_entropy(probability, matching.ge(0).double(), reduction="none").mean(-1)
    targets = max(k * (int(target_mask.sum()) if masked else batch * m), 1)
    sums = ((each - scored) * pairs).sum(-1) / targets
    expected = (sums + (scored.mean(-1) if presence != "none" and batch > 0 else 0)).mean()
    actual = hungarian_loss(pred, target, pred_mask, target_mask, average_over="batch", **options)
    torch.testing.assert_close(actual, expected, **EXACT)
    inputs = (pred, pred_mask)
    gradients = [torch.autograd.grad(v, inputs, allow_unused=True, materialize_grads=True) for v in (actual, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_an_average_over_the_batch_with_the_mask_as_a_feature() -> None:
    """Every set has N pairs: both averages are the same."""
    inputs = random_sets(3, 5, 2, m=4)
    one, other = (hungarian_loss(*inputs, average_over=over, reduction="none") for over in ("set", "batch"))
    assert torch.equal(one, other)


@pytest.mark.parametrize("presence", OF_TARGETS)
@given(n=st.integers(1, 6), m=st.integers(0, 3), k=st.integers(1, 3), seed=seeds)
def test_targets_are_matched_to_several_predictions(presence: str, n: int, m: int, k: int, seed: int) -> None:
    """As if each were there k times."""
    torch.manual_seed(seed)
    pred, target, pred_mask, target_mask = random_sets(2, max(n, k * m), 2, m=m)
    options = {"presence": presence, "return_matching": True, "reduction": "none"}
    value, matching = hungarian_loss(pred, target, pred_mask, target_mask, matches_per_target=k, **options)
    repeated = [x.repeat_interleave(k, 1) for x in (target, target_mask)]
    expected, theirs = hungarian_loss(pred, repeated[0], pred_mask, repeated[1], **options)
    torch.testing.assert_close(value, expected, **EXACT)
    assert torch.equal(matching, theirs.where(theirs < 0, theirs // k))
    for own, mask in zip(matching, target_mask, strict=True):
        assert torch.equal(own[own >= 0].bincount(minlength=m), k * mask.long())


@pytest.mark.parametrize("presence", PRESENCES)
@given(n=st.integers(0, 4), m=st.integers(0, 6), masked=st.booleans(), seed=seeds)
def test_surplus_targets_are_dropped(presence: str, n: int, m: int, masked: bool, seed: int) -> None:
    """By the least cost of matching all of the smaller side; with the mask as a feature, absent ones first."""
    torch.manual_seed(seed)
    pred, target, pred_mask, target_mask = random_sets(1, n, 2, m=m)
    target_mask = target_mask if masked else torch.ones_like(target_mask)
    value, matching = hungarian_loss(
        pred,
        target,
        pred_mask,
        target_mask if masked else None,
        presence=presence,
        presence_weight=0,
        surplus="drop",
        return_matching=True,
    )
    left, right = pred[0], target[0][target_mask[0]]
    count = min(n, len(right))
    if presence == "feature":
        left = torch.cat([left, pred_mask[0].unsqueeze(1)], 1)
        right = torch.cat([right, torch.ones_like(right[:, :1])], 1)
        right = F.pad(right, (0, 0, 0, max(n - len(right), 0)))
    least = oracles.least_assignment(pairwise_cost(left[None], right[None])[0])
    expected = least / max(n if presence == "feature" else count, 1)
    torch.testing.assert_close(value, expected + 0 * value, **EXACT)
    chosen = matching[0][matching[0] >= 0]
    assert len(chosen) == len(chosen.unique()) == count
    assert target_mask[0][chosen].all()


@pytest.mark.parametrize("presence", PRESENCES)
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf, "no assignment"])
@pytest.mark.parametrize("average", ["set", "batch"])
def test_sets_that_are_not_finite_are_skipped(presence: str, bad: float | str, average: str) -> None:
    """They cost 0 and get gradients of 0; the others cost what they do alone."""
    pred, target, pred_mask, target_mask = random_sets(4, 5, 2, m=3)
    target_mask[:] = True
    target_mask[2, 0] = False
    target_mask[3] = False

    def matching_cost(x: Tensor, y: Tensor) -> Tensor:
        value = torch.inf if bad == "no assignment" else bad
        return pairwise_cost(x, y).masked_fill((x == 7).any(2, keepdim=True), value)

    spoilt, mask = pred.detach().clone(), pred_mask.detach().clone()
    spoilt[1] = 7
    if bad is torch.nan:
        spoilt[1, 0] = torch.nan
        if presence in ("feature", "logits", "none"):
            mask[1, 2] = torch.nan
    spoilt.requires_grad_()
    mask.requires_grad_()
    options = {"presence": presence, "matching_cost": matching_cost, "average_over": average, "reduction": "none"}
    expected = hungarian_loss(pred, target, pred_mask, target_mask, **options)
    with pytest.warns(RuntimeWarning, match="in sample 1: left unmatched"):
        loss, matching = hungarian_loss(
            spoilt, target, mask, target_mask, nonfinite="skip", return_matching=True, **options
        )
    assert (matching[1] == -1).all()
    keep = torch.tensor([0, 2, 3])
    torch.testing.assert_close(loss[keep], expected[keep], **EXACT)
    assert loss[1] == 0
    gradients = torch.autograd.grad(loss.sum(), (spoilt, mask), allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(expected.sum(), (pred, pred_mask), allow_unused=True, materialize_grads=True)
    for own, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(own[keep], other[keep], **EXACT)
        assert torch.equal(own[1], torch.zeros_like(own[1]))
    with warnings.catch_warnings():  # where all is well, none, and nothing changes
        warnings.simplefilter("error")
        same = hungarian_loss(pred, target, pred_mask, target_mask, nonfinite="skip", **options)
    torch.testing.assert_close(same, expected, **EXACT)


ALL = {"average_over": "batch", "matches_per_target": 2, "surplus": "drop", "nonfinite": "skip"}


@pytest.mark.parametrize("presence", OF_TARGETS)
def test_options_together(presence: str) -> None:
    """Their gradients are right, they compile, and `vmap` gives what a loop gives."""
    pred, target, pred_mask, target_mask = random_sets(2, 5, 2, m=4)
    target.requires_grad_()
    loss = HungarianLoss(presence=presence, reduction="none", **ALL)
    assert devices.gradcheck(lambda p, t, m: loss(p, t, 0.1 + 0.8 * m, target_mask), (pred, target, pred_mask))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = (pred, target, pred_mask, target_mask)
    actual, expected = compiled(*inputs), loss(*inputs)
    torch.testing.assert_close(actual, expected, **EXACT)
    gradients = [torch.autograd.grad(v.sum(), (pred, target), retain_graph=True) for v in (actual, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    more = torch.stack([pred, pred.flip(0), pred + 1]).detach()
    mapped = torch.func.vmap(loss, in_dims=(0, None, None, None))(more, target, pred_mask, target_mask)
    alone = torch.stack([loss(x, target, pred_mask, target_mask) for x in more])
    torch.testing.assert_close(mapped, alone, **EXACT)
    shown = "average_over='batch', matches_per_target=2, surplus='drop', nonfinite='skip', reduction='none'"
    assert shown in repr(loss)
    assert "surplus" not in repr(HungarianLoss())


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "`average_over` must be one of 'set', 'batch', got 'targets'", {"average_over": "targets"}),
        (ValueError, "`matches_per_target` must be at least 1, got 0", {"matches_per_target": 0}),
        (TypeError, "`matches_per_target` must be an integer", {"matches_per_target": 2.0}),
        (ValueError, "`matches_per_target` must be 1 with presence='feature', got 2", {"matches_per_target": 2}),
        (ValueError, "`surplus` must be one of 'raise', 'drop', got 'ignore'", {"surplus": "ignore"}),
        (ValueError, "`nonfinite` must be one of 'raise', 'skip', got None", {"nonfinite": None}),
    ],
)
def test_refuses(error: type[Exception], message: str, options: dict[str, object]) -> None:
    with pytest.raises(error, match=message):
        HungarianLoss(**options)
    with pytest.raises(error, match=message):
        hungarian_loss(torch.rand(1, 3, 2), torch.rand(1, 3, 2), **options)


def test_too_many_matches_are_an_error() -> None:
    pred, target = torch.rand(2, 5, 2), torch.rand(2, 3, 2)
    with pytest.raises(ValueError, match="sample 0 has 6 columns, all to be matched, but only 5 rows"):
        hungarian_loss(pred, target, presence="none", matches_per_target=2)
