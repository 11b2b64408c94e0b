"""Class losses on a matching: against PyTorch's cross-entropy, the formula, and what is not there."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from setpred import matched_cross_entropy, matched_focal_loss
from tests import devices, oracles
from tests.devices import gradcheck, gradgradcheck

DOUBLE = {"dtype": torch.float64}
EXACT = {"rtol": 1e-9, "atol": 1e-9}
LOSSES = pytest.mark.parametrize("loss", [matched_cross_entropy, matched_focal_loss])


def random_matching(steps: int, batch: int, n: int, m: int) -> Tensor:
    """Every target that fits gets a prediction; some are absent and have none."""
    matching = torch.full((steps, batch, n), -1)
    for k in range(steps):
        for b in range(batch):
            rows = torch.randperm(n)[: min(n, m)]
            present = torch.rand(len(rows)) < 0.7
            matching[k, b, rows] = torch.arange(len(rows)).where(present, -1)
    return matching


def wanted_classes(classes: Tensor, matching: Tensor, nobody: int) -> Tensor:
    wanted = torch.full(matching.shape, nobody)
    for k, b, i in (matching >= 0).nonzero().tolist():
        wanted[k, b, i] = classes[b, matching[k, b, i]]
    return wanted


sizes = {
    "steps": st.integers(1, 3),
    "batch": st.integers(1, 3),
    "n": st.integers(1, 5),
    "m": st.integers(0, 6),
    "channels": st.integers(2, 4),
    "seed": st.integers(0, 2**31),
}


@given(**sizes, weight=st.sampled_from([0.0, 0.1, 1.0]))
def test_cross_entropy_is_pytorchs(
    steps: int, batch: int, n: int, m: int, channels: int, seed: int, weight: float
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(steps, batch, n, channels, **DOUBLE)
    classes, matching = torch.randint(channels - 1, (batch, m)), random_matching(steps, batch, n, m)
    wanted = wanted_classes(classes, matching, channels - 1)
    weights = torch.ones(channels, **DOUBLE)
    weights[-1] = weight
    values = [F.cross_entropy(x.flatten(0, 1), w.flatten(), weights) for x, w in zip(logits, wanted, strict=True)]
    expected = torch.stack(values).nan_to_num(0).mean()  # weights of 0 alone: NaN there
    options = {"no_object_weight": weight}
    torch.testing.assert_close(matched_cross_entropy(logits, classes, matching, **options), expected, **EXACT)
    alone = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weights, reduction="none").view(wanted.shape)
    each = matched_cross_entropy(logits, classes, matching, reduction="none", **options)
    torch.testing.assert_close(each, alone.sum(-1), **EXACT)
    total = matched_cross_entropy(logits[0], classes, matching[0], reduction="sum", **options)
    torch.testing.assert_close(total, alone[0].sum(), **EXACT)


@given(**sizes, alpha=st.sampled_from([0.25, 0.5]), gamma=st.sampled_from([0.0, 2.0]))
def test_focal_equals_the_formula(
    steps: int, batch: int, n: int, m: int, channels: int, seed: int, alpha: float, gamma: float
) -> None:
    torch.manual_seed(seed)
    logits = 3 * torch.randn(steps, batch, n, channels, **DOUBLE)
    classes, matching = torch.randint(channels, (batch, m)), random_matching(steps, batch, n, m)
    wanted = wanted_classes(classes, matching, channels)
    expected = torch.zeros(steps, batch, **DOUBLE)
    for k in range(steps):
        for b in range(batch):
            for i in range(n):
                for c in range(channels):
                    expected[k, b] += oracles.focal(logits[k, b, i, c], bool(wanted[k, b, i] == c), alpha, gamma)
    options = {"alpha": alpha, "gamma": gamma}
    torch.testing.assert_close(
        matched_focal_loss(logits, classes, matching, reduction="none", **options), expected, **EXACT
    )
    pairs = (matching >= 0).sum((1, 2)).clamp(min=1)
    mean = (expected.sum(1) / pairs).mean()
    torch.testing.assert_close(matched_focal_loss(logits, classes, matching, **options), mean, **EXACT)
    total = matched_focal_loss(logits[0], classes, matching[0], reduction="sum", **options)
    torch.testing.assert_close(total, expected[0].sum(), **EXACT)


def test_focal_equals_torchvision() -> None:
    ops = pytest.importorskip("torchvision.ops")
    logits, classes, matching = torch.randn(2, 3, 5, 4, **DOUBLE), torch.randint(4, (3, 4)), random_matching(2, 3, 5, 4)
    there = F.one_hot(wanted_classes(classes, matching, 4), 5)[..., :4].double()
    expected = ops.sigmoid_focal_loss(logits, there).sum((-1, -2))
    torch.testing.assert_close(matched_focal_loss(logits, classes, matching, reduction="none"), expected, **EXACT)


def test_without_gamma_focal_is_half_the_binary_cross_entropy() -> None:
    logits, classes, matching = torch.randn(2, 5, 4), torch.randint(4, (2, 3)), random_matching(1, 2, 5, 3)[0]
    there = F.one_hot(wanted_classes(classes, matching.unsqueeze(0), 4)[0], 5)[..., :4].float()
    value = matched_focal_loss(logits, classes, matching, alpha=0.5, gamma=0.0, reduction="sum")
    torch.testing.assert_close(value, 0.5 * F.binary_cross_entropy_with_logits(logits, there, reduction="sum"))


@LOSSES
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients(loss: object, reduction: str) -> None:
    logits = torch.randn(2, 3, 4, 3, **DOUBLE, requires_grad=True)
    classes, matching = torch.randint(2, (3, 2)), random_matching(2, 3, 4, 2)
    call = lambda x: loss(x, classes, matching, reduction=reduction)  # noqa: E731
    assert gradcheck(call, (logits,))
    assert gradgradcheck(call, (logits,))


@LOSSES
def test_what_is_not_matched_is_not_seen(loss: object) -> None:
    logits, matching = torch.randn(2, 4, 3), torch.tensor([[1, -1, 0, -1], [-1, -1, -1, -1]])
    classes = torch.tensor([[0, 1, 7], [-100, 99, 2**40]])
    expected = loss(logits, torch.tensor([[0, 1], [0, 0]]), matching)
    assert torch.equal(loss(logits, classes, matching), expected)


@LOSSES
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty(loss: object, reduction: str) -> None:
    for steps, batch, n, m in ((2, 0, 4, 3), (2, 3, 0, 3), (2, 3, 4, 0), (2, 0, 0, 0), (0, 2, 3, 1)):
        logits = torch.randn(steps, batch, n, 3, requires_grad=True)
        matching = torch.full((steps, batch, n), -1)
        value = loss(logits, torch.zeros(batch, m, dtype=torch.long), matching, reduction=reduction)
        assert value.shape == ((steps, batch) if reduction == "none" else ())
        assert value.isfinite().all()
        value.sum().backward()
        assert logits.grad.isfinite().all()
        assert (value.sum() > 0) == (logits.numel() > 0)  # nobody is matched, and that is charged


@LOSSES
def test_half_precision_and_autocast(loss: object) -> None:
    logits, classes, matching = (
        torch.randn(2, 5, 4).bfloat16(),
        torch.randint(3, (2, 3)),
        random_matching(1, 2, 5, 3)[0],
    )
    expected = loss(logits.float(), classes, matching)
    assert expected.dtype == loss(logits, classes, matching).dtype == torch.float32
    assert torch.equal(loss(logits, classes, matching), expected)
    with devices.autocast(torch.bfloat16):
        assert torch.equal(loss(logits.float(), classes, matching), expected)


@LOSSES
def test_certain_predictions_are_finite(loss: object) -> None:
    logits = torch.tensor([[[300.0, -300.0, 0.0], [-300.0, 300.0, 300.0]]], requires_grad=True)
    for matching in ([[0, 1]], [[1, 0]], [[-1, -1]]):
        value = loss(logits, torch.tensor([[0, 1]]), torch.tensor(matching))
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_of_classes_ruled_out_is_finite(gamma: float) -> None:
    """An infinite logit where it is right is charged 0, as a class that cannot be is often masked by -inf."""
    logits = torch.tensor([[[torch.inf, -torch.inf, 0.5]]], requires_grad=True)
    value = matched_focal_loss(logits, torch.tensor([[0]]), torch.tensor([[0]]), gamma=gamma)
    expected = matched_focal_loss(logits[..., 2:].detach(), torch.zeros(1, 0).long(), torch.tensor([[-1]]), gamma=gamma)
    torch.testing.assert_close(value.detach(), expected)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.isfinite().all()


@LOSSES
def test_nan_is_seen(loss: object) -> None:
    logits = torch.randn(2, 3, 4)
    logits[1, 2, 0] = torch.nan
    value = loss(logits, torch.zeros(2, 1, dtype=torch.long), torch.full((2, 3), -1), reduction="none")
    assert value.isnan().tolist() == [False, True]


@LOSSES
def test_compiles_whole(loss: object) -> None:
    logits, classes, matching = torch.randn(2, 3, 5, 4), torch.randint(3, (3, 4)), random_matching(2, 3, 5, 4)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (compiled, loss):
        leaf = logits.clone().requires_grad_()
        call(leaf, classes, matching).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(compiled(logits, classes, matching), loss(logits, classes, matching))
    torch.testing.assert_close(*gradients)
    torch._dynamo.reset()


INPUTS = {
    "logits": torch.rand(2, 3, 4),
    "classes": torch.zeros(2, 5, dtype=torch.long),
    "matching": torch.zeros(2, 3, dtype=torch.long),
}


@LOSSES
@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"`logits` must have shape \(B, N, C\) or", {"logits": torch.rand(3, 4)}),
        (ValueError, r"`logits` must have shape .* C at least", {"logits": torch.rand(2, 3, 0)}),
        (TypeError, "`logits` must have a floating dtype", {"logits": torch.ones(2, 3, 4).long()}),
        (TypeError, "`classes` must be a tensor of dtype int64, got float32", {"classes": torch.zeros(2, 5)}),
        (ValueError, r"`classes` must have shape \(2, M\)", {"classes": torch.zeros(3, 5).long()}),
        (ValueError, r"`classes` must lie in \[0, .*got 9", {"classes": torch.full((2, 5), 9)}),
        (ValueError, r"`classes` must lie in \[0, .*got -1", {"classes": torch.full((2, 5), -1)}),
        (TypeError, "`matching` must be a tensor of dtype int64", {"matching": torch.zeros(2, 3).int()}),
        (ValueError, r"`matching` must have shape \(2, 3\)", {"matching": torch.zeros(1, 2, 3).long()}),
        (ValueError, r"`matching` must lie in \[0, 5\) .*got 5", {"matching": torch.full((2, 3), 5)}),
        (ValueError, "`reduction` must be one of", {"reduction": "batch"}),
    ],
)
def test_refuses(loss: object, error: type[Exception], message: str, change: dict[str, object]) -> None:
    change = {name: x.to(devices.here()) if isinstance(x, Tensor) else x for name, x in (INPUTS | change).items()}
    with pytest.raises(error, match=message):
        loss(**change)


@pytest.mark.parametrize(("error", "value"), [(ValueError, -1.0), (ValueError, torch.inf), (TypeError, "1")])
def test_refuses_options(error: type[Exception], value: object) -> None:
    inputs = [x.to(devices.here()) for x in INPUTS.values()]
    with pytest.raises(error, match="`no_object_weight` must be"):
        matched_cross_entropy(*inputs, no_object_weight=value)
    with pytest.raises(error, match="`gamma` must be"):
        matched_focal_loss(*inputs, gamma=value)
