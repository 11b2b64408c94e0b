"""The inner loop: its steps, its two derivatives, and the modes it runs in. Nothing here is a set."""

import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from setpred import GradientDescent, functional
from setpred.functional import Descent
from tests import devices, oracles
from tests.custom import Square
from tests.rules import with_rule

EXACT = {"rtol": 1e-9, "atol": 1e-9}
DOUBLE = {"dtype": torch.float64}
BOTH_GRADIENTS = pytest.mark.parametrize("gradient", ["func", "autograd"])
BOTH_DERIVATIVES = pytest.mark.parametrize("differentiate", ["unrolled", "implicit"])

FEATURES = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.8},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "clip": {"grad_clip": 0.3},
    "project": {"project": lambda y: y.clamp(-0.5, 0.5)},
    "tol": {"tol": 0.15},
    "polyak": {"polyak": True, "momentum": 0.8},
    "all": {
        "momentum": 0.8,
        "nesterov": True,
        "grad_clip": 0.3,
        "project": lambda y: y.clamp(-0.5, 0.5),
        "tol": 0.15,
    },
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def descend(*arguments: Any, gradient: str | None = None, **options: Any) -> Descent[Any]:
    """The library's, by a way to take gradients that is not necessarily its own choice."""
    options = with_rule(options)
    if gradient is None:
        return functional.descend(*arguments, **options)
    with patch("setpred.functional.descent.in_transform", return_value=gradient == "func"):
        return functional.descend(*arguments, **options)


class Problem:
    """Find y with tanh(W y) = z: parameters W, conditioning z, start y0, a vector per sample."""

    def __init__(self, batch: int) -> None:
        self.weight = torch.randn(FEATURES, FEATURES, **DOUBLE, requires_grad=True)
        self.z = torch.randn(batch, FEATURES, **DOUBLE).tanh().requires_grad_()
        self.init = (0.5 * torch.randn(batch, FEATURES, **DOUBLE)).requires_grad_()
        self.inputs = (self.weight, self.z, self.init)

    def objective(self, y: Tensor, z: Tensor | None = None) -> Tensor:
        return 0.5 * ((y @ self.weight.t()).tanh() - (self.z if z is None else z)).square().sum(1)

    def of_sample(self, b: int) -> Callable[[Tensor], Tensor]:
        return lambda y: 0.5 * ((self.weight @ y).tanh() - self.z[b]).square().sum()

    def literally(self, **options: Any) -> Descent[Tensor]:
        """Every sample by itself, by the oracle."""
        samples = [oracles.descend(self.of_sample(b), y, **options) for b, y in enumerate(self.init)]
        points, losses, norms = (torch.stack([torch.stack(s[i]) for s in samples], 1) for i in range(3))
        return Descent(points[-1], points, losses, norms)


def gradients(value: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Of a value's random but fixed projection; zeros where it does not depend on an input."""
    torch.manual_seed(1)
    projected = (value * torch.randn_like(value)).sum()
    return list(torch.autograd.grad(projected, inputs, retain_graph=True, materialize_grads=True))


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected)


# Steps


@EVERY_OPTION
@BOTH_GRADIENTS
@given(batch=st.integers(1, 4), steps=st.integers(1, 6), lr=st.floats(0.1, 1), seed=st.integers(0, 2**31))
def test_steps_equal_the_formula(
    options: dict[str, Any], gradient: str, batch: int, steps: int, lr: float, seed: int
) -> None:
    torch.manual_seed(seed)
    problem = Problem(batch)
    actual = descend(
        problem.objective,
        problem.init,
        args=(problem.z,),
        steps=steps,
        lr=lr,
        **options,
        record=True,
        gradient=gradient,
    )
    expected = problem.literally(steps=steps, lr=lr, **options)
    assert_close(actual, expected)
    assert actual.trajectory.shape == (steps + 1, batch, FEATURES)
    assert actual.loss.shape == actual.grad_norm.shape == (steps, batch)


@EVERY_OPTION
@BOTH_GRADIENTS
def test_unrolled_gradient_equals_that_of_the_literal_loop(options: dict[str, Any], gradient: str) -> None:
    problem = Problem(3)
    actual = descend(
        problem.objective, problem.init, args=(problem.z,), steps=4, lr=0.5, **options, record=True, gradient=gradient
    )
    expected = problem.literally(steps=4, lr=0.5, **options)
    for a, e in zip(actual, expected, strict=True):  # the whole record is differentiable
        assert_close(gradients(a, problem.inputs), gradients(e, problem.inputs))


@EVERY_OPTION
@BOTH_DERIVATIVES
def test_a_sample_alone_descends_as_in_a_batch(options: dict[str, Any], differentiate: str) -> None:
    problem = Problem(4)
    batch = descend(
        problem.objective,
        problem.init,
        args=(problem.z,),
        steps=5,
        lr=0.5,
        **options,
        record=True,
        differentiate=differentiate,
    )
    of_batch = torch.autograd.grad(batch.value[2].sum(), (problem.weight, problem.z), materialize_grads=True)
    alone = descend(
        lambda y: problem.of_sample(2)(y[0]).view(1),
        problem.init[2:3],
        steps=5,
        lr=0.5,
        **options,
        record=True,
        differentiate=differentiate,
    )
    assert_close([alone.value[0], alone.trajectory[:, 0]], [batch.value[2], batch.trajectory[:, 2]])
    of_alone = torch.autograd.grad(alone.value.sum(), (problem.weight, problem.z), materialize_grads=True)
    assert_close(of_alone, of_batch)


@EVERY_OPTION
@BOTH_DERIVATIVES
@BOTH_GRADIENTS
def test_a_tuple_descends_as_one_tensor(options: dict[str, Any], differentiate: str, gradient: str) -> None:
    problem, how = Problem(3), {"differentiate": differentiate, "gradient": gradient, "record": True}
    one = descend(problem.objective, problem.init, args=(problem.z,), steps=5, lr=0.5, **options, **how)
    options = dict(options)
    if "project" in options:
        options["project"] = lambda y: tuple(part.clamp(-0.5, 0.5) for part in y)
    two = descend(
        lambda y, z: problem.objective(torch.cat([y[0].flatten(1), y[1].unsqueeze(1)], 1), z),
        (problem.init[:, :3].view(3, 3, 1), problem.init[:, 3]),
        args=(problem.z,),
        steps=5,
        lr=0.5,
        **options,
        **how,
    )
    assert two.value[0].shape == (3, 3, 1)
    assert two.trajectory[1].shape == (6, 3)
    joined = torch.cat([two.value[0].flatten(1), two.value[1].unsqueeze(1)], 1)
    assert_close([joined, two.loss, two.grad_norm], [one.value, one.loss, one.grad_norm])
    assert_close(gradients(joined, problem.inputs), gradients(one.value, problem.inputs))


@BOTH_GRADIENTS
def test_a_part_that_the_objective_ignores_stays(gradient: str) -> None:
    init = (torch.rand(2, 3), torch.rand(2, 5))
    value = descend(lambda y: y[0].square().sum(1), init, steps=3, lr=0.1, gradient=gradient, momentum=0.5).value
    assert torch.equal(value[1], init[1])
    assert not torch.equal(value[0], init[0])


def test_nothing_is_recorded_unless_asked() -> None:
    problem = Problem(2)
    assert descend(problem.objective, problem.init, args=(problem.z,), steps=2, lr=0.1)[1:] == (None, None, None)


# Stopping


def test_converged_samples_freeze_and_the_loop_ends_early() -> None:
    target = torch.zeros(3, 1)
    calls: list[int] = []

    def objective(y: Tensor, target: Tensor) -> Tensor:
        calls.append(len(y))
        return 0.5 * (y - target).square().sum(1)

    # Halved at each step, objectives 0.5 * 4^-t from 0.5, 8 and 0: under 0.1 after 2, 4 and 0 steps.
    init = torch.tensor([[1.0], [4.0], [0.0]])
    result = descend(objective, init, args=(target,), steps=10, lr=0.5, tol=0.1, record=True)
    expected = [[1, 0.5, 0.25], [4, 2, 1, 0.5, 0.25], [0]]
    for b, points in enumerate(expected):
        assert result.trajectory[:, b, 0].tolist() == points + points[-1:] * (11 - len(points))
    assert result.trajectory.shape == (11, 3, 1)
    assert torch.equal(result.loss, 0.5 * result.trajectory[:-1, :, 0].square())
    assert torch.equal(result.grad_norm, result.trajectory[:-1, :, 0].abs())
    assert calls == [3, 2, 2, 1, 1]  # samples under way


@BOTH_DERIVATIVES
def test_tol_gives_the_same_compiled(differentiate: str) -> None:
    weight, z = torch.randn(4, 4, requires_grad=True), torch.randn(3, 4)
    rule = GradientDescent(0.5, momentum=0.9, nesterov=True, grad_clip=0.5)

    def run(init: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result = functional.descend(
            lambda y, z: 0.5 * ((y @ weight).tanh() - z.tanh()).square().sum(1),
            init,
            args=(z,),
            steps=6,
            lr=rule,
            tol=0.3,
            record=True,
            differentiate=differentiate,
        )
        return result.value, result.trajectory, result.loss

    init = torch.zeros(3, 4)
    eager, compiled = run(init), torch.compile(run, fullgraph=True, backend="aot_eager")(init)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients(compiled[0], (weight,)), gradients(eager[0], (weight,)))


@BOTH_GRADIENTS
@BOTH_DERIVATIVES
@pytest.mark.parametrize("start", ["all converged", "one converged"])
def test_converged_samples_have_finite_outer_gradients(gradient: str, differentiate: str, start: str) -> None:
    z = torch.randn(3, 4, **DOUBLE, requires_grad=True)
    init = z.detach().clone()
    if start == "one converged":
        init[1:] += 1
    result = descend(
        lambda y: 0.5 * (y - z).square().sum(1),
        init,
        steps=3,
        lr=0.5,
        grad_clip=0.1,
        record=True,
        gradient=gradient,
        differentiate=differentiate,
    )
    total = result.value.sum() + result.grad_norm.sum()
    (of_z,) = torch.autograd.grad(total, z)
    assert of_z.isfinite().all()
    assert of_z.any()
    assert not result.grad_norm[:, 0].any()


# Implicit differentiation


@BOTH_GRADIENTS
@pytest.mark.parametrize("bounds", [None, (-0.3, 0.3)], ids=["free", "projected"])
@pytest.mark.parametrize("steps", [1, 4])
def test_implicit_gradient_is_that_of_one_step(gradient: str, bounds: tuple[float, float] | None, steps: int) -> None:
    problem = Problem(5)
    options = {"lr": 0.5, "momentum": 0.9, "nesterov": True, "grad_clip": 0.5}
    options["project"] = None if bounds is None else lambda y: y.clamp(*bounds)
    result = descend(
        problem.objective,
        problem.init,
        args=(problem.z,),
        steps=steps,
        **options,
        differentiate="implicit",
        gradient=gradient,
    )
    points = problem.literally(steps=steps, **options).trajectory.detach()
    assert_close(result.value, points[-1])

    # By hand, at the point y before the last step: -v^T d(grad L(y)), where the step y - grad is not cut off.
    v = torch.randn_like(result.value)
    y = points[-2].clone().requires_grad_()
    (g,) = torch.autograd.grad(problem.objective(y).sum(), y, create_graph=True)
    free = torch.ones_like(y) if bounds is None else (bounds[0] < y - g) & (y - g < bounds[1])
    expected = torch.autograd.grad(-(v * free * g).sum(), (problem.weight, problem.z))
    actual = torch.autograd.grad((v * result.value).sum(), problem.inputs, allow_unused=True)
    assert_close(actual[:2], expected)
    assert all(part.any() for part in expected)
    assert actual[2] is None  # the initial point has no part in it
    if bounds is not None:
        assert 0 < free.sum() < free.numel()  # both cases are there


def test_implicit_gradient_is_exact_where_the_hessian_is_the_identity() -> None:
    weight, z = torch.randn(3, 4, **DOUBLE, requires_grad=True), torch.randn(2, 4, **DOUBLE, requires_grad=True)
    result = descend(
        lambda y: 0.5 * (y - z @ weight.t()).square().sum(1),
        torch.zeros(2, 3, **DOUBLE),
        steps=60,
        lr=0.5,
        differentiate="implicit",
    )
    solution = z @ weight.t()
    assert_close(result.value, solution)
    assert_close(gradients(result.value, (weight, z)), gradients(solution, (weight, z)))


@BOTH_GRADIENTS
def test_implicit_gradient_reaches_init_through_an_objective_that_holds_it(gradient: str) -> None:
    init = torch.randn(2, 3, **DOUBLE, requires_grad=True)
    result = descend(
        lambda y: 0.5 * (y - 2).square().sum(1) + 0.25 * (y - init).square().sum(1),
        init,
        steps=3,
        lr=0.1,
        differentiate="implicit",
        gradient=gradient,
    )
    v = torch.randn(2, 3, **DOUBLE)
    (of_init,) = torch.autograd.grad((v * result.value).sum(), init)
    assert_close(of_init, 0.5 * v)  # -v^T d(y - 2 + (y - init) / 2) / d(init)


def test_implicit_records_detached() -> None:
    problem = Problem(2)
    options = {"steps": 3, "lr": 0.5, "record": True}
    implicit = descend(problem.objective, problem.init, args=(problem.z,), **options, differentiate="implicit")
    assert implicit.value.requires_grad
    assert not any(part.requires_grad for part in implicit[1:])
    assert_close(implicit, descend(problem.objective, problem.init, args=(problem.z,), **options))


# Modes


@EVERY_OPTION
@BOTH_DERIVATIVES
@BOTH_GRADIENTS
def test_values_are_the_same_without_grad_mode(options: dict[str, Any], differentiate: str, gradient: str) -> None:
    problem = Problem(3)

    def run() -> Descent[Tensor]:
        return descend(
            problem.objective,
            problem.init,
            args=(problem.z,),
            steps=4,
            lr=0.5,
            **options,
            record=True,
            differentiate=differentiate,
            gradient=gradient,
        )

    expected = run()
    with torch.no_grad():
        actual = run()
    assert not any(part.requires_grad for part in actual)
    assert_close(actual, expected)
    with torch.inference_mode():
        inference = run()
    torch.testing.assert_close(inference, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(inference.value, problem.init)


@BOTH_GRADIENTS
@pytest.mark.parametrize("mode", ["no_grad", "implicit", "unrolled"])
def test_memory_grows_with_steps_only_where_they_are_unrolled(mode: str, gradient: str) -> None:
    problem, points, alive = Problem(2), [], []

    def project(y: Tensor) -> Tensor:
        alive.append(sum(point() is not None for point in points))
        y = y.clone()
        points.append(weakref.ref(y))
        return y

    with torch.set_grad_enabled(mode != "no_grad"):
        differentiate = "implicit" if mode == "implicit" else "unrolled"
        descend(
            problem.objective,
            problem.init,
            args=(problem.z,),
            steps=12,
            lr=0.1,
            project=project,
            differentiate=differentiate,
            gradient=gradient,
        )
    assert max(alive) == 11 if mode == "unrolled" else max(alive) <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@BOTH_DERIVATIVES
def test_dtypes_are_kept(dtype: torch.dtype, differentiate: str) -> None:
    z = torch.randn(2, 3, dtype=dtype, requires_grad=True)
    result = descend(
        lambda y, z: 0.5 * (y.float() - z.float()).square().sum(1),
        torch.zeros(2, 3, dtype=dtype),
        args=(z,),
        steps=8,
        lr=0.5,
        momentum=0.3,
        grad_clip=10.0,
        tol=1e-6,
        differentiate=differentiate,
    )
    assert result.value.dtype == dtype
    torch.testing.assert_close(result.value, z, rtol=0, atol=0.05)
    assert torch.autograd.grad(result.value.sum(), z)[0].isfinite().all()


def test_norms_of_float16_do_not_overflow() -> None:
    init = torch.zeros(1, 4, dtype=torch.float16)
    result = descend(lambda y: 300 * y.sum(1), init, steps=1, lr=1.0, grad_clip=1.0, record=True)
    assert result.grad_norm.item() == 600
    assert result.value.tolist() == [[-0.5] * 4]


@BOTH_DERIVATIVES
@BOTH_GRADIENTS
def test_an_empty_batch_descends_to_an_empty_batch(differentiate: str, gradient: str) -> None:
    init = torch.zeros(0, 3, requires_grad=True)
    result = descend(
        lambda y: y.square().sum(1),
        init,
        steps=4,
        lr=0.1,
        grad_clip=1.0,
        tol=0.1,
        record=True,
        differentiate=differentiate,
        gradient=gradient,
    )
    assert result.value.shape == (0, 3)
    assert result.trajectory.shape == (5, 0, 3)
    assert result.loss.shape == result.grad_norm.shape == (4, 0)


# Something else than a set: points up to rotation


def test_decodes_points_up_to_rotation_from_their_inner_products() -> None:
    points = torch.randn(4, 6, 2, **DOUBLE)
    gram = points @ points.mT

    def objective(y: Tensor) -> Tensor:
        return 0.25 * (y @ y.mT - gram).square().sum((1, 2))

    result = descend(
        objective, 0.1 * torch.randn(4, 6, 2, **DOUBLE), steps=600, lr=0.02, momentum=0.9, grad_clip=5.0, record=True
    )
    assert (result.loss[-1] < 1e-12 * result.loss[0]).all()
    # Orthogonal Procrustes: the best rotation or reflection of the decoded points onto the true ones.
    u, _, v = torch.linalg.svd(result.value.mT @ points)
    torch.testing.assert_close(result.value @ (u @ v), points, rtol=0, atol=1e-5)
    assert (result.value - points).abs().amax((1, 2)).min() > 0.01  # and it is not the one it was made from


# Errors

START = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "`steps` must be at least 1, got 0", {"steps": 0}),
        (TypeError, r"`steps` must be an integer, got 2.5 \(float\)", {"steps": 2.5}),
        (ValueError, "`lr` must be positive, got 0", {"lr": 0}),
        (ValueError, "`lr` must be positive, got nan", {"lr": float("nan")}),
        (TypeError, r"`lr` must be a number or a StepRule, got '1' \(str\)", {"lr": "1"}),
        (ValueError, "`momentum` must be at least 0, got -0.1", {"momentum": -0.1}),
        (ValueError, "`momentum` must be positive when `nesterov` is True, got 0", {"nesterov": True}),
        (ValueError, "`grad_clip` must be positive, got 0", {"grad_clip": 0}),
        (TypeError, "`tol` must be a number, got 'a'", {"tol": "a"}),
        (ValueError, "`tol` must be at least -inf, got nan", {"tol": float("nan")}),
        (
            ValueError,
            "`checkpoint` must be False when `differentiate` is 'implicit'",
            {"checkpoint": True, "differentiate": "implicit"},
        ),
        (ValueError, "`differentiate` must be one of 'unrolled', 'implicit', got 'no'", {"differentiate": "no"}),
        (TypeError, r"`init` must be a tensor or a tuple of tensors, got 1.0", {"init": 1.0}),
        (TypeError, r"`init` must be a tensor or a tuple of tensors, got \(\)", {"init": ()}),
        (TypeError, r"`init` must be a tensor, got 1.0 \(float\)", {"init": (START, 1.0)}),
        (TypeError, "`init` must have a floating dtype, got int64 of shape", {"init": START.long()}),
        (ValueError, r"`init` must have the batch as first dimension, got shape \(\)", {"init": START.sum()}),
        (
            ValueError,
            r"`init` must have the batch as first dimension, got shape \(2, 3\), \(1, 3\)",
            {"init": (START, START[:1])},
        ),
    ],
)
def test_refuses(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    arguments = {"init": START, "steps": 2, "lr": 0.1} | options
    with pytest.raises(error, match=message):
        descend(lambda y: y.square().sum(1), **arguments)


@BOTH_GRADIENTS
@pytest.mark.parametrize(
    ("error", "message", "objective"),
    [
        (ValueError, r"one value per sample, shape \(2,\), got \(\)", lambda y: y.sum()),
        (ValueError, r"one value per sample, shape \(2,\), got \(2, 3\)", lambda y: y * 2),
        (TypeError, r"`objective\(y\)` must be a tensor, got 1.0", lambda y: 1.0),
    ],
)
def test_refuses_objectives(
    gradient: str, error: type[Exception], message: str, objective: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(error, match=message):
        descend(objective, START, steps=1, lr=0.1, gradient=gradient)


@pytest.mark.parametrize("value", [torch.ones(()), torch.ones(3, 1), torch.ones(3)])
@pytest.mark.parametrize("grad", [torch.ones(3, 1), torch.ones(1, 2), torch.ones(3, 2)])
def test_refuses_a_known_gradient_of_another_shape(value: Tensor, grad: Tensor) -> None:
    class Objective:
        def __call__(self, y: Tensor) -> Tensor:
            return y.sum(1)

        def value_and_grad(self, y: Tensor) -> tuple[Tensor, Tensor]:
            return value, grad

    if value.shape == (3,) and grad.shape == (3, 2):
        assert functional.descend(Objective(), torch.zeros(3, 2), steps=1, lr=1.0).value.tolist() == [[-1, -1]] * 3
        return
    with pytest.raises(ValueError, match=r"`objective.value_and_grad\(y\)` must return .* \[\(3,\), \(3, 2\)\]"):
        functional.descend(Objective(), torch.zeros(3, 2), steps=1, lr=1.0)


def test_tol_does_not_hide_a_value_that_is_no_number() -> None:
    start = torch.tensor([[1.0], [torch.nan]])
    result = descend(lambda y: y.square().sum(1), start, steps=3, lr=0.5, tol=10.0)
    assert result.value[0] == 1
    assert result.value[1].isnan()


def outer_gradients(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """Of every point, objective and gradient norm together."""
    result = descend(problem.objective, problem.init, args=(problem.z,), steps=6, lr=0.7, record=True, **options)
    total = sum((part.square().sum() for part in result), torch.zeros(()))
    return torch.autograd.grad(total, problem.inputs, create_graph=True)


@EVERY_OPTION
def test_checkpoint_gives_the_same_gradients(options: dict[str, Any]) -> None:
    problem = Problem(batch=3)
    plain, again = outer_gradients(problem, **options), outer_gradients(problem, checkpoint=True, **options)
    assert_close(again, plain)
    second, of_again = (
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), problem.inputs) for grads in (plain, again)
    )
    assert_close(of_again, second)


def test_checkpoint_keeps_the_graph_for_a_second_backward_pass() -> None:
    problem = Problem(batch=3)
    value = (
        descend(problem.objective, problem.init, args=(problem.z,), steps=4, lr=0.7, checkpoint=True)
        .value.square()
        .sum()
    )
    first = torch.autograd.grad(value, problem.inputs, retain_graph=True)
    assert_close(torch.autograd.grad(value, problem.inputs), first)


def test_checkpoint_draws_the_same_random_numbers_again() -> None:
    problem = Problem(batch=3)

    def objective(y: Tensor) -> Tensor:
        return problem.objective(torch.nn.functional.dropout(y, 0.5))

    gradients, states = [], []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        value = descend(objective, problem.init, steps=4, lr=0.7, checkpoint=checkpoint).value
        gradients.append(torch.autograd.grad(value.square().sum(), problem.inputs))
        states.append(devices.random_state())
    assert_close(gradients[1], gradients[0])
    assert torch.equal(states[0], states[1])


def test_checkpoint_refuses_an_objective_that_changes() -> None:
    problem, calls = Problem(batch=3), []

    def objective(y: Tensor) -> Tensor:
        calls.append(y)
        return problem.objective(y) if len(calls) < 3 else problem.objective(y.sin())

    value = descend(objective, problem.init, steps=2, lr=0.7, checkpoint=True).value
    with pytest.raises(RuntimeError, match="`checkpoint` needs an objective that does the same"):
        value.sum().backward()


def test_checkpoint_computes_nothing_again_without_grad() -> None:
    calls = []

    def objective(y: Tensor) -> Tensor:
        calls.append(y)
        return y.square().sum(1)

    with torch.inference_mode():
        descend(objective, torch.ones(2, 3), steps=3, lr=0.1, checkpoint=True)
    assert len(calls) == 3


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_checkpoint_uses_the_attention_kernels_of_the_forward_pass(backend: SDPBackend) -> None:
    seen = []

    def objective(y: Tensor) -> Tensor:
        seen.append(torch.backends.cuda.math_sdp_enabled())
        return y.square().sum(1)

    init = torch.ones(2, 3, requires_grad=True)
    with sdpa_kernel(backend):
        value = descend(objective, init, steps=2, lr=0.1, checkpoint=True).value
    value.sum().backward()
    assert seen == [backend == SDPBackend.MATH] * 4


def test_checkpoint_refuses_parameters_that_an_optimizer_has_changed() -> None:
    problem = Problem(batch=3)
    problem.weight = problem.weight.detach().requires_grad_()
    optimizer = torch.optim.SGD([problem.weight], lr=1e-6)  # too little to be seen in the values
    value = descend(problem.objective, problem.init, args=(problem.z,), steps=2, lr=0.7, checkpoint=True).value
    problem.weight.grad = torch.ones_like(problem.weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="`checkpoint` needs parameters that stay as they are"):
        value.sum().backward()


def test_checkpoint_refuses_a_tensor_that_was_replaced() -> None:
    problem = Problem(batch=3)
    value = descend(problem.objective, problem.init, steps=2, lr=0.7, checkpoint=True).value
    problem.z = problem.z.detach() + 0.01
    with pytest.raises(RuntimeError, match="`checkpoint` needs an objective that does the same"):
        value.sum().backward()


def test_checkpoint_carries_on_where_a_value_is_no_number() -> None:
    start = torch.tensor([[1.0], [torch.nan]], requires_grad=True)
    (of_start,) = torch.autograd.grad(
        descend(lambda y: y.square().sum(1), start, steps=3, lr=0.25, checkpoint=True).value.sum(), start
    )
    assert of_start[0] == 1 / 8


@pytest.mark.filterwarnings("ignore:.*that is not a leaf")  # Dynamo looks at gradients
@pytest.mark.parametrize("options", [{}, {"tol": 0.15, "momentum": 0.5}], ids=["plain", "tol"])
def test_checkpoint_breaks_the_graph_of_a_compiled_descent(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    problem = Problem(batch=3)

    def run(init: Tensor) -> Tensor:
        return descend(problem.objective, init, args=(problem.z,), steps=3, lr=0.7, checkpoint=True, **options).value

    compiled, eager = torch.compile(run, backend="aot_eager")(problem.init), run(problem.init)
    assert_close(compiled, eager)
    assert_close(gradients(compiled, problem.inputs), gradients(eager, problem.inputs))
    torch._dynamo.reset()


# Transforms of torch.func


@EVERY_OPTION
@BOTH_DERIVATIVES
def test_vmap_runs_descents_side_by_side(options: dict[str, Any], differentiate: str) -> None:
    problem, weights = Problem(3), torch.randn(4, FEATURES, FEATURES, **DOUBLE)

    def run(weight: Tensor) -> Tensor:
        return descend(
            lambda y, z: 0.5 * ((y @ weight.t()).tanh() - z).square().sum(1),
            problem.init,
            args=(problem.z,),
            steps=4,
            lr=0.5,
            differentiate=differentiate,
            **options,
        ).value

    assert_close(torch.vmap(run)(weights), torch.stack([run(weight) for weight in weights]))

    def gradient(weight: Tensor) -> Tensor:
        return torch.func.grad(lambda weight: run(weight).square().sum())(weight)

    assert_close(torch.vmap(gradient)(weights), torch.stack([gradient(weight) for weight in weights]))
    weights.requires_grad_()
    (expected,) = torch.autograd.grad(sum(run(weight).square().sum() for weight in weights), weights)
    assert_close(torch.vmap(gradient)(weights), expected)


def test_checkpoint_refuses_transforms() -> None:
    with pytest.raises(RuntimeError, match=r"`checkpoint` must be False inside of torch.func's transforms"):
        torch.func.grad(
            lambda y: descend(lambda y: y.square().sum(1), y, steps=2, lr=0.1, checkpoint=True).value.sum()
        )(START)


# Where nothing outside wants a gradient


@BOTH_DERIVATIVES
@BOTH_GRADIENTS
@pytest.mark.parametrize("wanted", ["weight", "z", "init", None])
def test_a_result_requires_a_gradient_where_something_outside_does(
    wanted: str | None, gradient: str, differentiate: str
) -> None:
    problem = Problem(3)
    for name in ("weight", "z", "init"):
        setattr(problem, name, getattr(problem, name).detach().requires_grad_(name == wanted))
    if wanted == "z":
        problem.z = problem.z * 1  # as behind a backbone
    result = descend(
        problem.objective,
        problem.init,
        args=(problem.z,),
        steps=3,
        lr=0.5,
        gradient=gradient,
        differentiate=differentiate,
        record=True,
    )
    expected = wanted in ("weight", "z") or (wanted == "init" and differentiate == "unrolled")
    assert result.value.requires_grad == expected
    if differentiate == "unrolled":
        assert all(part.requires_grad == expected for part in result[1:])


# What cannot be differentiated


@BOTH_DERIVATIVES
def test_custom_functions_are_differentiated(differentiate: str) -> None:
    problem = Problem(3)

    def run(square: Callable[[Tensor], Tensor]) -> Tensor:
        return descend(
            lambda y: square((y @ problem.weight.t()).tanh() - problem.z).sum(1),
            problem.init,
            steps=3,
            lr=0.1,
            differentiate=differentiate,
        ).value

    actual, expected = run(Square.apply), run(torch.square)
    assert_close(actual, expected)
    assert_close(gradients(actual, problem.inputs), gradients(expected, problem.inputs))
    with torch.no_grad():
        assert_close(run(Square.apply), expected)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"(?s)setup_context.*Use torch.no_grad\(\)"),
    ):
        run(Square.apply)


PARAMETER = torch.ones(3, requires_grad=True)


@pytest.mark.parametrize(
    "objective",
    [
        lambda y: torch.zeros(2),
        lambda y: y.detach().square().sum(1),
        lambda y: (y.detach() * PARAMETER).sum(1),  # has a gradient, but not to y
    ],
    ids=["constant", "detached", "detached, with a parameter"],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@BOTH_DERIVATIVES
def test_an_objective_that_no_gradient_leaves_is_refused(
    objective: Callable[[Tensor], Tensor], mode: Any, differentiate: str
) -> None:
    with mode(), pytest.raises(RuntimeError, match=r"`objective\(y\)` must be differentiable with respect to y"):
        descend(objective, START, steps=2, lr=0.1, differentiate=differentiate)


def test_an_objective_without_a_gradient_is_refused_in_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"`objective\(y\)` must be differentiable"):
        descend(lambda y: y.detach().square().sum(1), START, steps=2, lr=0.1)
