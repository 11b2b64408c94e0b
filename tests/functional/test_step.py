"""Step rules: what the descent asks of them, and what theirs is."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from setpred import GradientDescent, PolyakDescent
from setpred.functional import Gradient, StepRule, descend


class HeavyBall:
    """A rule that a user writes, with a state of two parts, one of them of another shape than the point."""

    def __init__(self, lr: float, momentum: float) -> None:
        self.lr, self.momentum = lr, momentum

    def init(self, y: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        return y, torch.zeros(len(y[0]), dtype=torch.long, device=y[0].device)

    def step(self, y: tuple[Tensor, ...], gradient: Gradient, state: Any) -> tuple[tuple[Tensor, ...], Any]:
        before, count = state
        moved = tuple(
            part - self.lr * g + self.momentum * (part - old)
            for part, g, old in zip(y, gradient.grad, before, strict=True)
        )
        return moved, (y, count + 1)


def half_square(y: Tensor, scale: Tensor) -> Tensor:
    return 0.5 * scale * y.square().sum(1)


def curvatures(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("tol", [None, 1e-3])
@pytest.mark.parametrize(
    ("differentiate", "checkpoint"), [("unrolled", False), ("unrolled", True), ("implicit", False)]
)
def test_a_rule_of_ones_own_takes_the_place(tol: float | None, differentiate: str, checkpoint: bool) -> None:
    scale = curvatures(0.1, 1.0, 0.5).requires_grad_()
    start = torch.ones(3, 2, dtype=torch.float64)
    options = {"args": (scale,), "steps": 30, "tol": tol, "differentiate": differentiate, "checkpoint": checkpoint}
    own = descend(half_square, start, lr=HeavyBall(0.5, 0.4), record=True, **options)
    ours = descend(half_square, start, lr=GradientDescent(0.5, momentum=0.4), record=True, **options)
    torch.testing.assert_close(tuple(own), tuple(ours), rtol=1e-12, atol=1e-12)
    of_own, of_ours = (torch.autograd.grad(result.value.sum(), scale)[0] for result in (own, ours))
    torch.testing.assert_close(of_own, of_ours, rtol=1e-12, atol=1e-12)
    assert of_own.any()


class Sized(HeavyBall):
    """One that says what is differentiated."""

    def implicit_step(self, gradient: Gradient) -> tuple[Tensor, ...]:
        return tuple(self.lr * g for g in gradient.grad)


def implicit(scale: Tensor, start: Tensor, rule: Any) -> Tensor:
    floor = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)  # the last one's least value is not 0
    objective = lambda y, scale, floor: half_square(y, scale) + floor  # noqa: E731
    return descend(objective, start, args=(scale, floor), steps=3, lr=rule, differentiate="implicit").value


def test_implicit_gradient_goes_through_the_implicit_step() -> None:
    """By hand: of the rule's last step without momentum, from a point that is held constant."""
    scale = curvatures(2.0, 100.0, 1.0).requires_grad_()
    start = torch.randn(3, 2, dtype=torch.float64)
    v = torch.randn_like(start)

    def by_hand(rule: Any, factor: Any) -> Tensor:
        with torch.no_grad():
            floor = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
            y = descend(lambda y: half_square(y, scale) + floor, start, steps=2, lr=rule).value
        square = (scale.unsqueeze(1) * y).square().sum(1)
        step = factor(half_square(y, scale) + floor, square).unsqueeze(1) * scale.unsqueeze(1) * y
        return torch.autograd.grad(-(v * step).sum(), scale)[0]

    def polyak_lr(loss: Tensor, square: Tensor) -> Tensor:
        lr = (loss / square).clamp(max=0.7)  # half the inverse of the curvature: 0.25, 0.005, and 0.7
        assert lr[2] == 0.7
        differentiated = torch.tensor([0.0, 1 - 0.005 / 0.035, 0.0], dtype=torch.float64)
        return lr.detach() + differentiated * (lr - lr.detach())

    def derivative(rule: Any) -> Tensor:
        return torch.autograd.grad((v * implicit(scale, start, rule)).sum(), scale)[0]

    polyak = PolyakDescent(0.7, momentum=0.3)
    torch.testing.assert_close(derivative(polyak), by_hand(polyak, polyak_lr))
    one = lambda loss, square: torch.ones_like(loss)  # noqa: E731
    fixed = GradientDescent(0.5, momentum=0.4)
    torch.testing.assert_close(derivative(fixed), by_hand(fixed, one))  # as published: without its lr
    torch.testing.assert_close(derivative(Sized(0.5, 0.4)), 0.5 * derivative(HeavyBall(0.5, 0.4)))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_polyak_gives_the_objective_no_reason_to_grow_without_end(size: float) -> None:
    """Far below `max_lr`, steps are those of the objective times any number, and so is what is learned from them."""
    factor = torch.full((2,), size, dtype=torch.float64, requires_grad=True)
    curvature = curvatures(1.0, 10.0, 100.0)
    objective = lambda y, factor: 0.5 * factor * (curvature * y.square()).sum(1)  # noqa: E731
    start = torch.randn(2, 3, dtype=torch.float64)
    for rule, grows in ((PolyakDescent(math.inf), False), (GradientDescent(1e-3 / size), True)):
        options = {"args": (factor,), "steps": 5, "differentiate": "implicit", "lr": rule}
        value = descend(objective, start, **options).value
        (of_factor,) = torch.autograd.grad((value * torch.tensor([1.0, 2.0, 3.0])).sum(), factor)
        assert bool((of_factor.abs() * size > 1e-6).any()) == grows


def test_rules_are_known_by_their_methods() -> None:
    assert isinstance(HeavyBall(1, 0), StepRule)
    assert isinstance(GradientDescent(1.0), StepRule)
    assert isinstance(PolyakDescent(), StepRule)
    assert not isinstance(0.1, StepRule)
    with pytest.raises(TypeError, match=r"`lr` must be a number or a StepRule, got None \(NoneType\)"):
        descend(lambda y: y.square().sum(1), torch.ones(1, 1), steps=1, lr=None)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_polyak_needs_no_scale(size: float) -> None:
    """Of a quadratic with curvatures a hundredfold apart, wherever they lie; a fixed step has to know where."""
    scale = size * curvatures(1.0, 10.0, 100.0)
    objective = lambda y: 0.5 * (scale * y.square()).sum(1)  # noqa: E731
    start = torch.ones(1, 3, dtype=torch.float64)
    result = descend(objective, start, steps=100, lr=PolyakDescent(math.inf), record=True)
    assert objective(result.value) < 1e-4 * objective(start)
    unit = descend(lambda y: objective(y) / size, start, steps=10, lr=PolyakDescent(math.inf)).value
    torch.testing.assert_close(result.trajectory[10], unit, rtol=1e-9, atol=1e-12)


def test_polyak_is_bounded_where_the_minimum_is_not_zero() -> None:
    objective = lambda y: 1.0 + 0.5 * y.square().sum(1)  # noqa: E731
    start = torch.full((1, 2), 3.0, dtype=torch.float64)
    result = descend(objective, start, steps=200, lr=PolyakDescent(1.0, momentum=0.5), record=True)
    assert result.value.abs().max() < 1e-6
    assert result.trajectory.isfinite().all()
    unbounded = descend(objective, start, steps=200, lr=PolyakDescent(1e9, momentum=0.5), record=True)
    assert unbounded.trajectory[-20:].abs().max() > 10  # what the bound is for


def test_polyak_stands_still_and_stays_differentiable_where_there_is_no_gradient() -> None:
    z = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    start = torch.stack([torch.zeros(3), torch.ones(3)]).double()
    result = descend(
        lambda y, z: 0.5 * (y - z).square().sum(1), start, args=(z,), steps=4, lr=PolyakDescent(2.0), record=True
    )
    assert torch.equal(result.value[0], start[0])
    (of_z,) = torch.autograd.grad(result.value.sum(), z)
    assert of_z.isfinite().all()
    assert of_z.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_polyak_keeps_dtypes(dtype: torch.dtype) -> None:
    start = torch.ones(2, 3, dtype=dtype)
    value = descend(lambda y: 0.5 * y.float().square().sum(1), start, steps=20, lr=PolyakDescent(10.0)).value
    assert value.dtype == dtype
    assert value.abs().max() < 0.1


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("`max_lr` must be positive, got 0", lambda: PolyakDescent(0)),
        ("`momentum` must be at least 0, got -1", lambda: PolyakDescent(momentum=-1)),
        ("`lr` must be positive, got 0", lambda: GradientDescent(0)),
        ("`momentum` must be positive when `nesterov` is True, got 0", lambda: GradientDescent(1.0, nesterov=True)),
        ("`grad_clip` must be positive, got -1", lambda: GradientDescent(1.0, grad_clip=-1)),
    ],
)
def test_refuses(message: str, make: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make()
