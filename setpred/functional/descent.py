"""The inner loop: descent along the gradient, sample by sample, and two ways to differentiate through it.

Nothing here knows of sets. What is optimised is a tensor, or a tuple of tensors, whose first dimension is the
batch; the objective gives one value per sample, and its sum over the batch is what is differentiated, so that a
sample's steps never depend on the samples beside it.
"""

from __future__ import annotations  # torch.compile cannot evaluate the annotations of nested functions

import math
from collections.abc import Callable, Iterable
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.utils import _pytree as pytree

from setpred._checks import check_at_least, check_choice, check_count, check_tensor, in_transform, is_exporting
from setpred.functional._precision import common_dtype
from setpred.functional._recompute import Recompute
from setpred.functional.step import Gradient, GradientDescent, Point, PolyakDescent, StepRule, as_rule, per_sample

Y = TypeVar("Y", Tensor, tuple[Tensor, ...])


class Descent(NamedTuple, Generic[Y]):
    """What :func:`descend` returns; the last three are None unless recorded.

    Attributes:
        value: The last point, like the initial one.
        trajectory: All points, with a new first dimension of T + 1.
        loss: Objective before each step, shape ``(T, B)``.
        grad_norm: Norm of each sample's gradient before clipping, shape ``(T, B)``.

    Example:
        >>> result = descend(lambda y: y.square().sum(1), torch.ones(3, 2), steps=4, lr=0.1, record=True)
        >>> result.trajectory.shape, result.loss.shape
        (torch.Size([5, 3, 2]), torch.Size([4, 3]))
    """

    value: Y
    trajectory: Y | None
    loss: Tensor | None
    grad_norm: Tensor | None


def _gradient(objective: Callable[[Point], Tensor], y: Point) -> Gradient:
    def total(y: Point) -> tuple[Tensor, Tensor]:
        loss = objective(y)
        check_tensor("objective(y)", loss)
        if loss.shape != y[0].shape[:1]:
            raise ValueError(
                f"`objective` must give one value per sample, shape ({len(y[0])},), got {tuple(loss.shape)}"
            )
        if not loss.requires_grad:
            raise RuntimeError(_NO_GRADIENT)
        return loss.sum(), loss

    # torch.autograd.grad is faster, and takes whatever can be differentiated; torch.func.grad works where it does not.
    outer = torch.is_grad_enabled()
    if (
        torch.compiler.is_dynamo_compiling()
        or torch.is_inference_mode_enabled()
        or in_transform()
        or _in_forward_mode(y)
    ):
        # Before PyTorch 2.12, torch.func.grad gives zeros in inference mode. Leaving it turns grad mode on.
        with torch.inference_mode(False), torch.set_grad_enabled(outer):
            return _with_norm(*_by_func(total, y))
    with torch.enable_grad():
        # Views, so that a part that was computed from another is not differentiated through it.
        leaf = tuple(part.view_as(part) if part.requires_grad else part.detach().requires_grad_() for part in y)
        value, loss = total(leaf)
        graph = outer and (any(part.requires_grad for part in y) or _depends_on_others(value, leaf))
        found = torch.autograd.grad(value, leaf, create_graph=graph, allow_unused=True)
    if all(part is None for part in found):
        raise RuntimeError(_NO_GRADIENT)
    grad = tuple(torch.zeros_like(part) if g is None else g for g, part in zip(found, y, strict=True))
    return _with_norm(grad, loss if graph else loss.detach())


_NO_GRADIENT = (
    "`objective(y)` must be differentiable with respect to y, got a value that no gradient leads to y from: is a part "
    "of it computed under torch.no_grad(), or detached? To keep parameters as they are, use requires_grad_(False)"
)


def _in_forward_mode(y: Point) -> bool:
    """Whether y carries tangents of `torch.autograd.forward_ad`, which detach() would drop."""
    return any(unpack_dual(part).tangent is not None for part in y)  # type: ignore[no-untyped-call]


def _depends_on_others(value: Tensor, leaves: Point) -> bool:
    """Whether anything that requires a gradient, but for these leaves, has a part in a value."""
    nodes, seen = [value.grad_fn], set()
    while nodes:
        for node, _ in nodes.pop().next_functions:  # type: ignore[union-attr]
            if node is not None and node not in seen:
                variable = getattr(node, "variable", None)  # of a leaf
                if variable is not None and all(variable is not leaf for leaf in leaves):
                    return True
                seen.add(node)
                nodes.append(node)
    return False


def _constant(parts: Iterable[Tensor]) -> Point:
    return tuple(part.detach() for part in parts)


def _by_func(total: Callable[[Point], tuple[Tensor, Tensor]], y: Point) -> tuple[Point, Tensor]:
    try:
        grad, (_, loss) = torch.func.grad_and_value(total, has_aux=True)(y)
    except RuntimeError as error:
        error.add_note(
            "Under torch.inference_mode() and torch.compile, and inside of torch.func's transforms, torch.func.grad "
            "takes the inner gradients. It refuses custom autograd.Functions without setup_context, buffers changed in "
            "place (BatchNorm in training mode: call .eval()) and backward hooks. Use torch.no_grad() in place of "
            "inference mode, and torch.compiler.disable() on the decoder in what is compiled"
        )
        raise
    return grad, loss


def _with_norm(grad: Point, loss: Tensor) -> Gradient:
    # In float32 at least: squares leave the range of float16.
    squares = [part.unsqueeze(-1).flatten(1).to(common_dtype(part)).square().sum(1) for part in grad]
    square = torch.stack(squares).sum(0)
    # The root has no derivative at 0: a converged sample must not turn the outer gradient into NaN.
    positive = square > 0
    norm = torch.where(positive, square, 1).sqrt() * positive
    return Gradient(grad, loss, norm)


def outside_inference(x: Tensor) -> Tensor:
    """A tensor that autograd takes, in place of one that was made in inference mode, outside of which we are."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not x.is_inference():
        return x
    return x.clone()


def _check_known(loss: Tensor, grad: Point, y: Point) -> None:
    wanted = [tuple(y[0].shape[:1]), *[tuple(part.shape) for part in y]]
    came = [tuple(part.shape) for part in (loss, *grad)]
    if came != wanted:
        raise ValueError(
            f"`objective.value_and_grad(y)` must return a value and a gradient of shapes {wanted}, got {came}"
        )


def _check_init(init: Tensor | Point) -> None:
    parts = (init,) if isinstance(init, Tensor) else init
    if not isinstance(parts, (tuple, list)) or len(parts) == 0:
        raise TypeError(f"`init` must be a tensor or a tuple of tensors, got {init!r}")
    for part in parts:
        check_tensor("init", part)
    if any(part.shape[:1] != parts[0].shape[:1] or part.dim() == 0 for part in parts):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(f"`init` must have the batch as first dimension, got shape {shapes}")


def constant(number: float) -> float:
    """As it is, for torch.compile too, which makes a symbol of what differs between calls: a loop does not take one."""
    return float(f"{number}") if torch.compiler.is_dynamo_compiling() else number


def _with_constants(rule: StepRule) -> StepRule:
    if type(rule) is PolyakDescent:
        return PolyakDescent(constant(rule.max_lr), constant(rule.momentum))
    if type(rule) is GradientDescent:
        clip = None if rule.grad_clip is None else constant(rule.grad_clip)
        return GradientDescent(constant(rule.lr), constant(rule.momentum), rule.nesterov, clip)
    return rule


def descend(
    objective: Callable[..., Tensor],
    init: Y,
    *,
    steps: int,
    lr: float | StepRule,
    args: tuple[Tensor, ...] = (),
    project: Callable[[Y], Y] | None = None,
    tol: float | None = None,
    differentiate: Literal["unrolled", "implicit"] = "unrolled",
    checkpoint: bool = False,
    record: bool = False,
) -> Descent[Y]:
    r"""Minimise an objective per sample by descent along its gradient.

    With :math:`g_t = \nabla_y \sum_b L_b(y_t)` and a step rule S, plain gradient descent where ``lr`` is a number:

    .. math::
        y_{t+1} = P(S(y_t, g_t)), \qquad S(y, g) = y - \eta\, g \;\text{for a number } \eta

    ``differentiate`` says what an outer backward pass sees:

    - ``"unrolled"`` differentiates every step; memory grows with ``steps``.
    - ``"implicit"`` runs the loop without a graph. At the point :math:`y` before the last step one gradient :math:`g`
      gets a graph, and the outer gradient flows through :math:`P(y - g) - y` with :math:`y` held constant: the implicit
      function theorem with the Hessian taken as the identity. A rule with an ``implicit_step``, as
      :class:`setpred.PolyakDescent`, has that in place of g; otherwise the rule does not enter. Nothing flows to
      ``init``, except where the objective itself depends on it. Memory is that of one step.

    Without grad mode both give the same values and no graph.

    Args:
        objective: Maps a point, and ``args``, to one value per sample, shape ``(B,)``. Sample b's value must depend on
            sample b only. One that knows its gradient has a method ``value_and_grad`` beside, from the same arguments
            to both, differentiable, or to None, and then autograd is left out.
        init: Where to start: a tensor ``(B, ...)`` or a tuple of them.
        steps: Number of steps T, at least 1.
        lr: How a step is taken: the factor :math:`\eta` on the gradient, or a rule such as
            :class:`setpred.GradientDescent`; see :class:`setpred.functional.StepRule`.
        args: What else the objective is called with, tensors ``(B, ...)``: what belongs to a sample and leaves the
            batch with it.
        project: Maps a point to the nearest allowed one, sample by sample, after each step.
        tol: A sample whose objective is at most this stays as it is from then on. In eager mode it leaves the batch,
            ``args`` with it, so that time goes with the samples that are under way: objective and ``project`` see
            those alone. This waits for the device once a step.
        differentiate: ``"unrolled"`` or ``"implicit"``.
        checkpoint: With ``"unrolled"``, whether to keep only the points and to compute each step again in the outer
            backward pass: the same gradients in the memory of one step. Does not compile.
        record: Whether to keep all points, objectives and gradient norms; ``"implicit"`` keeps them detached.

    Returns:
        The last point, and the record if asked for.

    Raises:
        ValueError: If an argument is out of its range, or the objective does not give one value per sample.
        TypeError: If an argument is of another type.
        RuntimeError: If no gradient leads from the objective to y, or, with ``checkpoint``, a step that is computed
            again does not give what it gave before.

    Example:
        >>> target = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> result = descend(lambda y: 0.5 * (y - target).square().sum(1), torch.zeros(2, 2), steps=50, lr=0.5)
        >>> result.value.round(decimals=3)
        tensor([[1., 2.],
                [3., 4.]])

    Source: Zhang et al. (NeurIPS 2019), equation 5; implicit: Zhang et al. (ICLR 2022), section 3; through a step:
    Bolte, Pauwels, Vaiter, One-step differentiation of iterative algorithms (NeurIPS 2023).
    """
    check_count("steps", steps)
    rule: StepRule = _with_constants(as_rule(lr))
    check_choice("differentiate", differentiate, ("unrolled", "implicit"))
    if tol is not None:
        check_at_least("tol", tol, -math.inf)
        tol = constant(tol)
    if checkpoint and differentiate == "implicit":
        raise ValueError("`checkpoint` must be False when `differentiate` is 'implicit', which keeps but one step")
    checkpoint = checkpoint and torch.is_grad_enabled()
    if checkpoint and in_transform():
        raise RuntimeError("`checkpoint` must be False inside of torch.func's transforms, which compute nothing again")

    # One form from here on: tuples.
    single = isinstance(init, Tensor)

    def packed(y: Point) -> Y:
        return y[0] if single else y  # type: ignore[return-value]

    def unpacked(y: Y) -> Point:
        return (y,) if isinstance(y, Tensor) else tuple(y)

    _check_init(init)
    init = packed(tuple(outside_inference(part) for part in unpacked(init)))

    value_and_grad = getattr(objective, "value_and_grad", lambda *_: None)

    def gradient_at(y: Point, args: Point) -> Gradient:
        known = value_and_grad(packed(y), *args)
        if known is not None:
            loss, grad = known[0], unpacked(known[1])
            _check_known(loss, grad, y)
            return _with_norm(grad, loss)
        return _gradient(lambda y: objective(packed(y), *args), y)

    def projected(y: Point) -> Point:
        return y if project is None else unpacked(project(packed(y)))

    def advanced(y: Point, state: Any, at: Gradient) -> tuple[Point, Any]:
        new, state = rule.step(y, at, state)
        new = projected(new)
        if tol is not None:
            still = at.loss <= tol  # not where it is NaN: that must show
            new = tuple(torch.where(per_sample(still, n), part, n) for n, part in zip(new, y, strict=True))
        return new, state

    def step(y: Point, state: Any, args: Point) -> tuple[Point, Any, Tensor, Tensor]:
        at = gradient_at(y, args)
        y, state = advanced(y, state, at)
        return y, state, at.loss, at.norm

    points: list[Point] = []
    losses: list[Tensor] = []
    norms: list[Tensor] = []

    def keep(y: Point, loss: Tensor, norm: Tensor) -> None:
        if record:
            points.append(y)
            losses.append(loss)
            norms.append(norm)

    look = not torch.compiler.is_compiling() and not in_transform()  # at values

    def run_loop(y: Point, steps: int) -> tuple[Point, Any]:
        """As run(), of which one step is compiled, whatever their number."""

        def body(done: Tensor, y: Point, state: Any) -> tuple[Tensor, Point, Any]:
            y, state, _, _ = step(y, state, args)
            return done + 1, *_laid_out((y, state))

        start = torch.zeros((), dtype=torch.int64, device=y[0].device)  # whatever the default device is
        carried = (start, *_laid_out((y, rule.init(y))))
        looped = torch.while_loop(lambda done, y, state: done < steps, body, carried)  # type: ignore[no-untyped-call]
        return looped[1], looped[2]

    def run(y: Point, steps: int) -> tuple[Point, Any]:
        if (
            torch.compiler.is_dynamo_compiling()
            and not is_exporting()
            and not (torch.is_grad_enabled() or record or in_transform())
            and y[0].device.type == "cpu"  # elsewhere the loop would wait for the device at every step
            and type(rule) in (GradientDescent, PolyakDescent)  # one of the user's may do what a loop cannot
            and value_and_grad(packed(y), *args) is not None  # so may an encoder
        ):
            return run_loop(y, steps)
        take = Recompute(step) if checkpoint else step
        state, given, rows = rule.init(y), args, None  # of the samples under way; None: all of them
        whole: tuple[Any, ...] = (y, state)
        for done in range(1, steps + 1):
            now = take(y, state, given)
            whole = now if rows is None else _put(whole, rows, now)
            keep(whole[0], *whole[2:])
            y, state, loss, _ = now
            if tol is not None and look and bool((arrived := loss <= tol).any()):
                under_way = ~arrived
                rows = under_way.nonzero().squeeze(1) if rows is None else rows[under_way]
                if len(rows) == 0:
                    for _ in range(done, steps):
                        keep(whole[0], *whole[2:])
                    break
                y, state, given = _take((y, state, given), under_way)
        return whole[0], whole[1]

    y = unpacked(init)
    if differentiate == "unrolled" or not torch.is_grad_enabled():
        points.append(y)
        y, _ = run(y, steps)
    else:
        y = _constant(y)
        points.append(y)
        with torch.no_grad():
            y, state = run(y, steps - 1)
        y = _constant(y)  # forward-mode differentiation sees through no_grad
        at = gradient_at(y, args)
        implicit_step = getattr(rule, "implicit_step", lambda at: at.grad)
        residual = tuple(-part for part in implicit_step(at))
        if project is not None:
            forward = projected(tuple(part + r for part, r in zip(y, residual, strict=True)))
            residual = tuple(f - part for f, part in zip(forward, y, strict=True))
        with torch.no_grad():
            y, _ = advanced(y, state, at)
            keep(y, at.loss, at.norm)
        points, losses, norms = [_constant(point) for point in points], list(_constant(losses)), list(_constant(norms))
        # The value is y, the derivative that of the residual.
        y = tuple(part + (r - r.detach()) for part, r in zip(_constant(y), residual, strict=True))

    if not record:
        return Descent(packed(y), None, None, None)
    trajectory = tuple(torch.stack(parts) for parts in zip(*points, strict=True))
    return Descent(packed(y), packed(trajectory), torch.stack(losses), torch.stack(norms))


def _laid_out(whole: Any) -> Any:
    """Copies in one layout, which stays the same from step to step."""
    return pytree.tree_map(lambda x: x.clone(memory_format=torch.contiguous_format), whole)


def _take(whole: Any, rows: Tensor) -> Any:
    return pytree.tree_map(lambda x: x[rows], whole)


def _put(whole: Any, rows: Tensor, part: Any) -> Any:
    return pytree.tree_map(lambda all_, some: all_.index_copy(0, rows, some), whole, part)
