"""DSPNLoss: set loss over the trajectory plus the weighted representation loss of the target."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setpred import (
    ChamferLoss,
    DSPNLoss,
    HungarianLoss,
    PooledEncoder,
    SetPrediction,
    StandardScaler,
    hungarian_loss,
)
from tests import oracles
from tests.rules import paper_decoder

EXACT = {"rtol": 1e-9, "atol": 1e-9}
B, N, C, D, T = 3, 4, 2, 6, 3


def squared(pred: Tensor, target: Tensor, pred_mask: Tensor | None, target_mask: Tensor | None) -> Tensor:
    """A set loss of one's own: slot by slot, a mean over all steps, samples and elements."""
    wanted = torch.ones_like(target[..., 0]) if target_mask is None else target_mask.to(target.dtype)
    return (pred - target).square().mean() + (pred_mask - wanted).square().mean()


class Problem:
    def __init__(self, **options: Any) -> None:
        encoder = PooledEncoder(C, D, 8, dtype=torch.float64)
        self.decoder = paper_decoder(encoder, T, 1.0, set_size=N, channels=C, dtype=torch.float64, **options)
        self.encoder = encoder
        self.z = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
        self.mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
        self.target = torch.rand(B, N, C, dtype=torch.float64) * self.mask.unsqueeze(-1)

    def representation_term(self, kind: str = "huber") -> Tensor:
        return oracles.representation_loss(self.encoder(self.target, self.mask), self.z, kind).mean()

    def assert_equal(self, actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, **EXACT)
        inputs = [self.z, *(p for p in self.decoder.parameters() if p.requires_grad)]
        of_actual, of_expected = (
            torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)
            for value in (actual, expected)
        )
        torch.testing.assert_close(of_actual, of_expected, **EXACT)


@pytest.mark.parametrize("make_set_loss", [lambda: squared, HungarianLoss, ChamferLoss])
def test_all_steps_are_averaged_the_first_included(make_set_loss: Any) -> None:
    problem, set_loss = Problem(), make_set_loss()
    prediction = problem.decoder(problem.z)
    steps = prediction.trajectory
    per_step = [set_loss(steps.elements[t], problem.target, steps.mask[t], problem.mask).double() for t in range(T + 1)]
    loss = DSPNLoss(problem.encoder, set_loss)
    expected = sum(per_step) / (T + 1)
    problem.assert_equal(loss(prediction, problem.target, problem.mask), expected)
    problem.assert_equal(
        loss(prediction, problem.target, problem.mask, z=problem.z), expected + 0.1 * problem.representation_term()
    )


@pytest.mark.parametrize("differentiate", ["unrolled", "implicit"])
@pytest.mark.parametrize("weight", [0.0, 2.0])
@pytest.mark.parametrize("kind", ["huber", "mse"])
def test_the_last_step_alone(differentiate: str, weight: float, kind: str) -> None:
    problem = Problem(differentiate=differentiate)
    prediction = problem.decoder(problem.z)
    loss = DSPNLoss(problem.encoder, squared, repr_weight=weight, repr_loss=kind, steps="last")
    expected = squared(prediction.elements, problem.target, prediction.mask, problem.mask)
    problem.assert_equal(loss(prediction, problem.target, problem.mask), expected)
    problem.assert_equal(
        loss(prediction, problem.target, problem.mask, z=problem.z),
        expected + weight * problem.representation_term(kind),
    )


@pytest.mark.parametrize("set_loss", [squared, hungarian_loss, ChamferLoss()])
@pytest.mark.parametrize("steps", ["all", "last"])
@pytest.mark.parametrize("rows", [N, N - 1])
def test_with_a_scaler_both_terms_are_standardised(set_loss: Any, steps: str, rows: int) -> None:
    scaler = StandardScaler(C, dtype=torch.float64).fit(
        torch.tensor([[300.0, 0.1], [340.0, 0.11], [280.0, 0.12]], dtype=torch.float64)
    )
    problem = Problem(scaler=scaler)
    plain = paper_decoder(problem.encoder, T, 1.0, set_size=N, channels=C, dtype=torch.float64)
    plain.initial_elements = problem.decoder.initial_elements
    target, mask = problem.target[:, :rows], problem.mask[:, :rows]
    theirs = scaler.inverse(target).masked_fill((mask == 0).unsqueeze(-1), torch.nan)
    loss = DSPNLoss(problem.encoder, set_loss, repr_weight=3.0, steps=steps, scaler=scaler)
    expected = DSPNLoss(problem.encoder, set_loss, repr_weight=3.0, steps=steps)
    for z in (None, problem.z):
        problem.assert_equal(
            loss(problem.decoder(problem.z), theirs, mask, z=z), expected(plain(problem.z), target, mask, z=z)
        )
    assert not loss.state_dict()


def test_a_scaler_is_given_once() -> None:
    scaler = StandardScaler(C)
    for options in ({}, {"scaler": scaler}):
        with pytest.raises(ValueError, match="`set_loss` must have no scaler of its own: give it to DSPNLoss"):
            DSPNLoss(PooledEncoder(C, D), HungarianLoss(scaler=scaler), **options)


def test_without_a_mask_all_targets_are_present() -> None:
    problem = Problem()
    loss, prediction = DSPNLoss(problem.encoder, HungarianLoss()), problem.decoder(problem.z)
    ones = torch.ones(B, N, dtype=torch.float64)
    problem.assert_equal(
        loss(prediction, problem.target, z=problem.z), loss(prediction, problem.target, ones, z=problem.z)
    )


@pytest.mark.parametrize("make_set_loss", [lambda: squared, HungarianLoss, ChamferLoss])
@pytest.mark.parametrize("garbage", [7.0, math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64])
def test_values_of_absent_targets_are_not_seen(make_set_loss: Any, garbage: float, dtype: torch.dtype) -> None:
    problem = Problem()
    loss, prediction = DSPNLoss(problem.encoder, make_set_loss()), problem.decoder(problem.z)
    absent = (problem.mask == 0).unsqueeze(-1)
    values = [
        loss(prediction, problem.target.masked_fill(absent, value), problem.mask.to(dtype), z=problem.z)
        for value in (0.0, garbage)
    ]
    assert values[0].isfinite()
    problem.assert_equal(values[1], values[0])


def test_gradients_of_the_representation_term_reach_encoder_and_vector() -> None:
    problem = Problem()
    prediction = SetPrediction(*(part.detach() for part in problem.decoder(problem.z)[:2]))
    loss = DSPNLoss(problem.encoder, squared, steps="last")
    loss(prediction, problem.target, problem.mask, z=problem.z).backward()
    assert problem.z.grad.any()
    assert all(p.grad.any() for p in problem.encoder.parameters())
    assert problem.decoder.initial_elements.grad is None


def test_keeps_no_parameters_but_those_of_the_set_loss() -> None:
    problem = Problem()
    assert not DSPNLoss(problem.encoder, HungarianLoss()).state_dict()

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    assert [name for name, _ in DSPNLoss(problem.encoder, Learned()).named_parameters()] == ["set_loss.scale"]


def test_a_model_that_holds_decoder_and_loss_is_copied_with_one_encoder() -> None:
    problem = Problem()
    model = nn.ModuleDict({"decoder": problem.decoder, "loss": DSPNLoss(problem.encoder, HungarianLoss())})
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied["decoder"].encoder.parameters():
            parameter.zero_()
    prediction = SetPrediction(problem.target, problem.mask)
    loss = copied["loss"]
    loss.steps = "last"
    z = torch.full((B, D), 3.0, dtype=torch.float64)
    without, with_term = (loss(prediction, problem.target, problem.mask, z=given) for given in (None, z))
    assert (with_term - without).item() == pytest.approx(0.1 * 2.5)  # the encoder of the copy gives zeros


def test_evaluates_a_recorded_trajectory_without_gradients() -> None:
    problem = Problem(differentiate="implicit")
    with torch.no_grad():
        prediction = problem.decoder(problem.z, record=True)
        actual = DSPNLoss(problem.encoder, squared)(prediction, problem.target, problem.mask)
    steps = prediction.trajectory
    expected = squared(
        steps.elements, problem.target.expand(T + 1, B, N, C), steps.mask, problem.mask.expand(T + 1, B, N)
    )
    torch.testing.assert_close(actual, expected)


def test_repr_says_what_it_does() -> None:
    loss = DSPNLoss(Problem().encoder, HungarianLoss(), repr_weight=0.5, steps="last")
    assert loss.extra_repr() == "repr_weight=0.5, repr_loss='huber', steps='last'"
    assert "(set_loss): HungarianLoss(" in repr(loss)
    assert "PooledEncoder" not in repr(loss)


@pytest.mark.parametrize("options", [{"record": False}, {}], ids=["not recorded", "implicit"])
def test_refuses_all_steps_without_a_trajectory(options: dict[str, Any]) -> None:
    problem = Problem(differentiate="unrolled" if options else "implicit")
    message = "`prediction` must carry its trajectory for steps='all': decode with record=True, or use steps='last'"
    with pytest.raises(ValueError, match=message):
        DSPNLoss(problem.encoder, squared)(problem.decoder(problem.z, **options), problem.target)


def test_refuses_all_steps_of_a_detached_trajectory() -> None:
    problem = Problem(differentiate="implicit")
    message = "`prediction` must carry a differentiable trajectory for steps='all': .*'implicit'.*use steps='last'"
    with pytest.raises(ValueError, match=message):
        DSPNLoss(problem.encoder, squared)(problem.decoder(problem.z, record=True), problem.target)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("`repr_weight` must be at least 0, got -1", {"repr_weight": -1}),
        ("`repr_weight` must be at least 0, got nan", {"repr_weight": math.nan}),
        ("`repr_weight` must be finite, got inf", {"repr_weight": math.inf}),
        ("`repr_loss` must be one of 'huber', 'mse', got 'l1'", {"repr_loss": "l1"}),
        ("`steps` must be one of 'all', 'last', got 'first'", {"steps": "first"}),
    ],
)
def test_refuses_settings(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        DSPNLoss(Problem().encoder, squared, **options)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"`target` must have shape \(3, M, 2\), got .* \(3, 4, 5\)", {"target": torch.zeros(3, 4, 5)}),
        (ValueError, r"`target` must have shape \(3, M, 2\), got .* \(3, 2\)", {"target": torch.zeros(3, 2)}),
        (TypeError, "`target` must have a floating dtype, got int64", {"target": torch.zeros(3, 4, 2).long()}),
        (ValueError, r"`target_mask` must have shape \(3, 4\), got", {"target_mask": torch.zeros(3, 5)}),
        (TypeError, "`target_mask` must be bool or floating", {"target_mask": torch.zeros(3, 4).long()}),
        (ValueError, r"`z` must have shape \(3, 6\), got .* \(3, 5\)", {"z": torch.zeros(3, 5)}),
        (TypeError, "`z` must have a floating dtype, got int64", {"z": torch.zeros(3, 6).long()}),
        (ValueError, r"`target` must have shape \(3, M, 2\), got .* \(2, 4, 2\)", {"target": torch.zeros(2, 4, 2)}),
    ],
)
def test_refuses_inputs(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    problem = Problem()
    with pytest.raises(error, match=message):
        DSPNLoss(problem.encoder, squared)(problem.decoder(problem.z), **{"target": problem.target} | arguments)


@pytest.mark.parametrize("name", ["encoder", "set_loss"])
@pytest.mark.parametrize("value", [None, "huber", 1.0])
def test_refuses_what_cannot_be_called(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"`{name}` must be callable, got {value!r}"):
        DSPNLoss(**{"encoder": Problem().encoder, "set_loss": squared} | {name: value})


def test_refuses_other_predictions() -> None:
    problem = Problem()
    loss = DSPNLoss(problem.encoder, squared, steps="last")
    elements, mask, _ = problem.decoder(problem.z)
    for prediction in (elements, (elements, mask), None):
        with pytest.raises(TypeError, match="`prediction` must be a SetPrediction, got"):
            loss(prediction, problem.target)
    for error, message, prediction in [
        (TypeError, "`prediction.elements` must be a tensor", SetPrediction(None, None)),
        (ValueError, r"`prediction.elements` must have shape \(B, N, C\)", SetPrediction(elements[0], mask[0])),
        (ValueError, r"`prediction.mask` must have shape \(3, 4\)", SetPrediction(elements, mask[:2])),
        (TypeError, "`prediction.mask` must be floating: a bool mask", SetPrediction(elements, mask > 0.5)),
    ]:
        with pytest.raises(error, match=message):
            loss(prediction, problem.target)


@pytest.mark.parametrize("set_loss", [HungarianLoss(reduction="none"), ChamferLoss(reduction="none")])
@pytest.mark.parametrize("steps", ["all", "last"])
def test_refuses_a_set_loss_that_is_not_reduced(set_loss: nn.Module, steps: str) -> None:
    problem = Problem()
    with pytest.raises(ValueError, match=r"`set_loss\(.*\)` must have shape \(\), got float64 of shape"):
        DSPNLoss(problem.encoder, set_loss, steps=steps)(problem.decoder(problem.z), problem.target, z=problem.z)


@pytest.mark.parametrize("result", [lambda x: x, lambda x: x.sum(), lambda x: x.sum(1)[:2], lambda x: x.sum(1).long()])
def test_refuses_what_is_no_encoding(result: Any) -> None:
    problem = Problem()
    with pytest.raises((ValueError, TypeError), match=r"`encoder\(target, target_mask\)` must have"):
        DSPNLoss(lambda elements, mask: result(elements), squared)(
            problem.decoder(problem.z), problem.target, z=problem.z
        )


def test_z_is_given_by_name() -> None:
    problem = Problem()
    with pytest.raises(TypeError, match="positional"):
        DSPNLoss(problem.encoder, squared)(problem.decoder(problem.z), problem.target, problem.mask, problem.z)
