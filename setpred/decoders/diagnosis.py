"""What goes on in a decoder's descent: numbers, and what they say in plain words."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from setpred._checks import check_count, check_mask, check_shape
from setpred.encoders.base import encode, parameter_dtype
from setpred.functional._precision import common_dtype
from setpred.functional.descent import outside_inference
from setpred.functional.step import GradientDescent, PolyakDescent, StepRule, as_rule
from setpred.losses._common import ScaledLoss, as_encoded
from setpred.losses.dspn import SetLoss
from setpred.losses.hungarian import HungarianLoss
from setpred.scaler import scaled, unscaled
from setpred.sets import SetPrediction

if TYPE_CHECKING:
    from setpred.decoders.dspn import DSPNDecoder

CHANGE = 0.1  # A set error that changes by less than a tenth is within what validation batches differ by.
BLOWN_UP = 10.0  # Times the set error or the loss at the start: no set of one step too many is that far away.
HUGE = 1e15  # Squares of more, summed over a set, leave float32.
AWAY = 0.5  # Share of the error that a descent from the target ends with, from which on the target is to blame.
DECODED = 1e-3  # Share of the start's set error: less is nothing, whatever its trend.
REMAINS = 0.1  # Share of the start's set error: what is below needs no other minimum.
ROSE = 1.01  # Times the loss before a step: below, it is rounding.
RECENT = 5  # Last steps in which the loss may rise.
FALLS = 0.5  # Share of the loss at the start: a descent that stays above has hardly begun.
ARRIVES = 3.0  # Times lr x curvature that a descent must go: exp(-3), a twentieth, is left of the steepest direction.
FLAT = 1e-3  # Share of the loss that a move as long as the set itself changes along the steepest direction.
PRODUCTS = 20  # Lanczos: the largest eigenvalue to a few per cent at worst, exact for up to as many dimensions.


class Diagnosis(NamedTuple):
    r"""What :meth:`setpred.DSPNDecoder.diagnose` finds; printed, a report. T is the number of steps.

    Everything is measured in the coordinates of the decoder's scaler, if it has one.

    Attributes:
        verdicts: What is wrong and what to do, judged on the set error; or that nothing is.
        samples: Samples that were looked at: those of the batch that hold neither NaN nor infinity.
        steps: Numbers of steps: 0, T, 2T and 4T.
        set_error: Set loss after as many steps; infinite where a sample is not finite any more.
        loss: Representation loss before the first and after each of T steps, the median over samples,
            shape ``(T + 1,)``.
        rising: Samples whose representation loss rose, by more than 1 %, in one of the last five of T steps.
        target_loss: Representation loss of the target itself, the median over samples: 0 for an autoencoder. If it is
            above the prediction's, ``loss[-1]``, the target is no minimum.
        target_error: Set loss of the target itself, and after T steps that start at it: does it stay there?
        curvature: Largest eigenvalue of each sample's :math:`J^T J / D` where its loss is least on the way, J being the
            derivative of the encoding with respect to elements and mask; shape ``(samples,)``. It is that of the inner
            Hessian of an encoder that is piecewise linear (ReLU, FSPool), and an upper bound where Huber's loss is
            linear; an encoder's own second derivatives are left out.
        stability: ``lr`` times the curvature, shape ``(samples,)``; None if the step rule has no fixed ``lr``.
        limit: What it must stay below: 2 for plain gradient descent, :math:`2 (1 + \mu)` with momentum and
            :math:`2 (1 + \mu) / (1 + 2 \mu)` with Nesterov's. Training leads to somewhat above it without harm; it is
            judged where more steps do not lower the set error.
        predicted_size: Predicted number of elements (mask above 0.5), a mean over samples.
        target_size: True number of elements, a mean over samples.
        size_error: Absolute difference of both, a mean over samples.

    Example:
        >>> from setpred import DSPNDecoder, PooledEncoder
        >>> encoder = PooledEncoder(2, 16)
        >>> decoder = DSPNDecoder(encoder, lr=1e-9, set_size=5, channels=2)
        >>> target = torch.randn(8, 5, 2)
        >>> decoder.diagnose(encoder(target), target).verdicts[0]
        'The descent does not move the set: ...'

    Source: limits of a stable step: Polyak, Some methods of speeding up the convergence of iteration methods (1964);
    with Nesterov's momentum: Cohen et al., Gradient Descent on Neural Networks Typically Occurs at the Edge of
    Stability (ICLR 2021), section 2.
    """

    verdicts: tuple[str, ...]
    samples: int
    steps: tuple[int, int, int, int]
    set_error: tuple[float, float, float, float]
    loss: Tensor
    rising: int
    target_loss: float
    target_error: tuple[float, float]
    curvature: Tensor
    stability: Tensor | None
    limit: float | None
    predicted_size: float
    target_size: float
    size_error: float

    @override
    def __str__(self) -> str:
        after = [f"{error:.3g} after {steps}" for steps, error in zip(self.steps[1:], self.set_error[1:], strict=True)]
        if self.stability is None or self.limit is None:
            stability = "the step rule has no fixed lr"
        else:
            stability = f"{_spread(self.stability)}; stable below {self.limit:.3g}"
        lines = [
            f"Diagnosis of {self.samples} samples, {self.steps[1]} steps",
            f"  set error            {self.set_error[0]:.3g} at the start, {', '.join(after)} steps",
            f"  representation loss  {self.loss[0]:.3g} at the start, {self.loss[-1]:.3g} after {self.steps[1]} steps "
            f"(medians); rising at the end: {self.rising} of {self.samples} samples",
            f"  target               representation loss {self.target_loss:.3g} (median); set error "
            f"{self.target_error[0]:.3g}, {self.target_error[1]:.3g} after {self.steps[1]} steps from it",
            f"  curvature            {_spread(self.curvature)}",
            f"  lr x curvature       {stability}",
            f"  elements             {self.predicted_size:.3g} predicted, {self.target_size:.3g} true; off by "
            f"{self.size_error:.2g}",
            "Verdicts",
            *(textwrap.fill(verdict, 110, initial_indent="- ", subsequent_indent="  ") for verdict in self.verdicts),
        ]
        return "\n".join(lines)


def diagnose(
    decoder: DSPNDecoder,
    z: Tensor,
    target: Tensor,
    target_mask: Tensor | None,
    *,
    iters: int | None,
    set_loss: SetLoss | None,
    generator: torch.Generator | None,
) -> Diagnosis:
    """See :meth:`setpred.DSPNDecoder.diagnose`."""
    check_shape("z", z, "B", "D")
    check_shape("target", target, len(z), "M", decoder.channels)
    check_mask("target_mask", target_mask, target.shape[:2])
    if iters is not None:
        check_count("iters", iters)
    if len(z) == 0:
        raise ValueError("`z` must hold a sample to diagnose, got none")
    if target.shape[1] > decoder.set_size:
        raise ValueError(
            f"`target` must have at most the decoder's {decoder.set_size} rows to be decoded, got {target.shape[1]}"
        )
    forked = torch.random.fork_rng([z.device] if z.is_cuda else [])
    with torch.inference_mode(False), torch.no_grad(), forked, _evaluating(decoder):
        z, target = outside_inference(z), outside_inference(target)
        target, target_mask = as_encoded(scaled(target, decoder.scaler), target_mask, decoder.set_size)
        broken = _broken(decoder, z, target)
        corrupt = not all(bool(parameter.isfinite().all()) for parameter in decoder.parameters())
        sound = z.isfinite().all(1) & target.flatten(1).isfinite().all(1)
        z, target, target_mask = z[sound], target[sound], None if target_mask is None else target_mask[sound]
        if len(z) == 0 or corrupt:
            return _nothing(iters or decoder.iters, broken)
        examination = _Examination(decoder, z, target, target_mask, set_loss or HungarianLoss())
        found = examination.diagnosis(iters or decoder.iters, generator)
        reach = _median(target.flatten(1).square().sum(1))
    return found._replace(verdicts=tuple(broken + _verdicts(found, decoder, reach)) or (_FINE,))


@contextmanager
def _evaluating(decoder: nn.Module) -> Iterator[None]:
    """Evaluation mode; then each module gets its own mode again, also where they differed."""
    modes = {module: module.training for module in decoder.modules()}
    try:
        decoder.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _broken(decoder: nn.Module, z: Tensor, target: Tensor) -> list[str]:
    """Say what is given as NaN or infinity."""
    verdicts = []
    names = [name for name, parameter in decoder.named_parameters() if not bool(parameter.isfinite().all())]
    if names:
        others = f" and {len(names) - 1} other parameters" if len(names) > 1 else ""
        verdicts.append(f"NaN or infinity in `{names[0]}`{others}: training has diverged; start from an earlier state.")
    for name, values, source in (("z", z, "what gives it has diverged"), ("target", target, "the data are broken")):
        count = int((~values.flatten(1).isfinite().all(1)).sum())
        if count > 0:
            verdicts.append(
                f"NaN or infinity in `{name}` of {count} of {len(values)} samples: {source}. The rest leaves them out."
            )
    return verdicts


def _nothing(iters: int, verdicts: list[str]) -> Diagnosis:
    nan = math.nan
    return Diagnosis(
        verdicts=tuple(verdicts),
        samples=0,
        steps=(0, iters, 2 * iters, 4 * iters),
        set_error=(nan, nan, nan, nan),
        loss=torch.full((iters + 1,), nan),
        rising=0,
        target_loss=nan,
        target_error=(nan, nan),
        curvature=torch.empty(0),
        stability=None,
        limit=None,
        predicted_size=nan,
        target_size=nan,
        size_error=nan,
    )


class _Examination(NamedTuple):
    """A decoder and what it is examined on: targets in the scaler's coordinates, padded to the decoder's rows."""

    decoder: DSPNDecoder
    z: Tensor
    target: Tensor
    mask: Tensor | None
    set_loss: SetLoss

    def diagnosis(self, iters: int, generator: torch.Generator | None) -> Diagnosis:
        decoder, z = self.decoder, self.z
        steps = (0, iters, 2 * iters, 4 * iters)
        path = decoder(z, iters=steps[-1], record=True, generator=generator).trajectory
        sets = [SetPrediction(*at) for at in zip(path.elements, path.mask, strict=True)]
        loss = torch.stack([decoder.representation_loss(at, z) for at in sets[: iters + 1]])
        loss = loss.nan_to_num(nan=math.inf, posinf=math.inf)
        own = unscaled(self.target, decoder.scaler)
        present = own.new_ones(own.shape[:2]) if self.mask is None else self.mask.to(own.dtype)
        kept = decoder(z, iters=iters, starts=1, init=own if decoder.mask_clamp is None else (own, present))
        curvature = self._curvature(path.elements, path.mask, loss.argmin(0), generator)
        rule = as_rule(decoder.lr)
        size, wanted = (sets[iters].mask > 0.5).sum(1).float(), (present > 0.5).sum(1).float()
        recent = loss[-RECENT - 1 :]
        errors = [self._error(sets[step]) for step in steps]
        return Diagnosis(
            verdicts=(),
            samples=len(z),
            steps=steps,
            set_error=(errors[0], errors[1], errors[2], errors[3]),
            loss=loss.median(1).values.cpu(),
            rising=int((recent[1:] > ROSE * recent[:-1]).any(0).sum()),
            target_loss=_median(decoder._loss(encode(decoder.encoder, self.target, self.mask), z)),
            target_error=(self._error(SetPrediction(own, present)), self._error(kept)),
            curvature=curvature.cpu(),
            stability=rule.lr * curvature.cpu() if isinstance(rule, GradientDescent) else None,
            limit=_limit(rule) if isinstance(rule, GradientDescent) else None,
            predicted_size=float(size.mean()),
            target_size=float(wanted.mean()),
            size_error=float((size - wanted).abs().mean()),
        )

    def _error(self, prediction: SetPrediction) -> float:
        """Set loss; infinite where a set has become so."""
        elements, mask, _ = prediction
        if not bool((elements.abs().amax() < HUGE) & (mask.abs().amax() < HUGE)):  # NaN is not below
            return math.inf
        scaler = self.decoder.scaler
        elements, target = scaled(elements, scaler), self.target
        if isinstance(self.set_loss, ScaledLoss) and self.set_loss.scaler is not None:  # it wants users' coordinates
            elements, target = prediction.elements, unscaled(target, scaler)
        value = self.set_loss(elements, target, mask, self.mask)
        check_shape("set_loss(pred, target, pred_mask, target_mask)", value)
        return float(value)

    def _curvature(self, elements: Tensor, mask: Tensor, step: Tensor, generator: torch.Generator | None) -> Tensor:
        """Largest eigenvalue of each sample's J^T J / D, and of the anchor's part, at one of its steps."""
        decoder = self.decoder
        numbers = torch.arange(len(step), device=step.device)
        elements = scaled(elements[step, numbers], decoder.scaler)
        elements = elements.to(parameter_dtype(decoder.encoder) or elements.dtype)
        y = (elements, mask[step, numbers].to(elements.dtype))[: 1 if decoder.mask_clamp is None else 2]
        for part in y:
            part.requires_grad_()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            vector = decoder.encoder(y[0], y[1] if len(y) == 2 else None)
            # Pulled back, a vector u gives J^T u, which is linear in u: its derivative is J.
            u = torch.zeros_like(vector, requires_grad=True)
            pulled = torch.autograd.grad(vector, y, u, create_graph=True, allow_unused=True, materialize_grads=True)

        def product(v: Tensor) -> Tensor:
            parts = torch.split(v, [part[0].numel() for part in y], 1)
            with torch.enable_grad():
                along = torch.stack([(g * d.view_as(g)).sum() for g, d in zip(pulled, parts, strict=True)]).sum()
            (pushed,) = torch.autograd.grad(along, u, retain_graph=True)
            back = torch.autograd.grad(vector, y, pushed, retain_graph=True, allow_unused=True, materialize_grads=True)
            curved = torch.cat([part.flatten(1) for part in back], 1) / vector.shape[1]
            curved[:, : parts[0].shape[1]] += decoder.anchor / parts[0].shape[1] * parts[0]
            return curved

        size = sum(part[0].numel() for part in y)
        dtype = common_dtype(elements)
        start = torch.randn(len(step), size, device=elements.device, dtype=dtype, generator=generator)
        return _largest_eigenvalue(product, start)


def _largest_eigenvalue(product: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Of each of B symmetric matrices (n, n), from their products with vectors (B, n): Lanczos, orthogonalised anew."""
    basis: list[Tensor] = []
    diagonal, beside = [], []
    v = start / start.norm(dim=1, keepdim=True)
    for _ in range(min(PRODUCTS, start.shape[1])):
        basis.append(v)
        w = product(v).to(v.dtype)
        diagonal.append((v * w).sum(1))
        for _ in range(2):  # twice is enough
            for b in basis:
                w = w - (b * w).sum(1, keepdim=True) * b
        norm = w.norm(dim=1, keepdim=True)
        beside.append(norm.squeeze(1))
        v = w / torch.where(norm > 0, norm, 1)
    matrix = torch.stack(diagonal, 1).diag_embed()
    if len(beside) > 1:
        off = torch.stack(beside[:-1], 1)
        matrix = matrix + off.diag_embed(1) + off.diag_embed(-1)
    broken = ~matrix.isfinite().flatten(1).all(1)
    largest: Tensor = torch.linalg.eigvalsh(matrix.masked_fill(broken.view(-1, 1, 1), 0))
    return largest[:, -1].masked_fill(broken, math.nan)


def _limit(rule: GradientDescent) -> float:
    """What lr times curvature must stay below, for the descent of a quadratic not to diverge."""
    mu = rule.momentum
    return 2 * (1 + mu) / (1 + 2 * mu if rule.nesterov else 1)


_FINE = "Nothing is wrong: the descent lowers the set error, and more steps neither lower nor raise it by much."


def _verdicts(found: Diagnosis, decoder: DSPNDecoder, reach: float) -> list[str]:
    """What the numbers say; ``reach`` is the squared length of the target sets."""
    _, once, twice, four = found.steps
    start, end, *later = found.set_error
    first, last = float(found.loss[0]), float(found.loss[-1])
    left, away = found.target_error
    errors = f"set error {start:.3g} at the start, {end:.3g} after {once} steps"
    further = f"{later[0]:.3g} after {twice}, {later[1]:.3g} after {four}"

    blown = max(end, *later) > BLOWN_UP * start or last > BLOWN_UP * first
    least, counted = DECODED * start, max(end, DECODED * start)
    arrived = max(min(later), least) >= (1 - CHANGE) * counted
    stability, limit = (math.nan if found.stability is None else _median(found.stability)), found.limit or math.nan
    unstable = stability > limit
    stuck = end > (1 - CHANGE) * start
    falls = last < FALLS * first
    verdicts = []
    if blown:
        verdicts.append(f"It blows up: {errors}, {further}. {_smaller_steps(found, as_rule(decoder.lr))}")
    elif unstable and arrived:
        verdicts.append(f"It is unstable: {errors}, {further}. {_smaller_steps(found, as_rule(decoder.lr))}")
    elif stuck and falls:
        verdicts.append(
            f"The descent does not lower the set error: {errors}, though the representation loss falls from "
            f"{first:.3g} to {last:.3g}. Train on; if it stays so, the encoder does not tell these sets apart, or `z` "
            "does not say which one is wanted."
        )
    elif stuck:
        verdicts.append(f"The descent does not move the set: {errors}. {_larger_steps(found, decoder, reach)}")

    sound = not (blown or (unstable and arrived))
    if sound and not arrived:
        times, best = min(("twice", later[0]), ("four times", later[1]), key=lambda pair: pair[1])
        verdicts.append(
            f"It has not arrived: {times} the steps lower the set error by {100 * (1 - best / end):.0f} %. Raise "
            "`iters`, in evaluation first, where no training has to be repeated"
            + (f", or `lr` to {_good_lr(found)}." if stability < limit / 4 else ".")
        )
    if sound and later[1] > (1 + CHANGE) * counted:
        verdicts.append(
            f"More steps make the set worse: set error {end:.3g} after {once}, {further}. The descent goes past the "
            "set: evaluate with the steps of the training, or train with more; if it stays so, take another encoder, "
            "such as PooledEncoder."
        )
    if away - left >= AWAY * counted and found.target_loss > last:
        verdicts.append(
            f"The target is no minimum: its representation loss is {found.target_loss:.3g}, the prediction's "
            f"{last:.3g}, and {once} steps that start at it end with set error {away:.3g}. What is wrong is in "
            "`z`, not in the descent: train on, look at what gives `z`, and with unrolled steps raise `repr_weight`."
        )
    elif sound and arrived and not stuck and end > REMAINS * start and away - left < CHANGE * end:
        verdicts.append(
            f"It ends elsewhere: {errors}, while a descent that starts at the target stays there ({away:.3g}). Between "
            "them are other minima: take several starts (starts=4), and train on."
        )
    if sound and not stuck and found.size_error > CHANGE * found.target_size:
        verdicts.append(
            f"Sizes are off: {found.predicted_size:.3g} elements are predicted where {found.target_size:.3g} are true, "
            f"with a mean difference of {found.size_error:.2g}. "
            + (
                "This decoder carries no mask: give it a `mask_clamp`."
                if decoder.mask_clamp is None
                else "Give the encoder size_feature=True, and train on."
            )
        )
    return verdicts


def _smaller_steps(found: Diagnosis, rule: StepRule) -> str:
    if found.stability is None or found.limit is None:
        if isinstance(rule, PolyakDescent):
            return f"Lower `max_lr`, which is {rule.max_lr:g}, or train with a smaller learning rate."
        return "The step rule must take smaller steps."
    if _median(found.stability) > found.limit:
        return (
            f"lr x curvature is {_median(found.stability):.2g}, above {found.limit:.3g}: use PolyakDescent, or lower "
            f"`lr` to {_good_lr(found)}."
        )
    return "Use PolyakDescent, lower `lr`, or set `grad_clip`."


def _larger_steps(found: Diagnosis, decoder: DSPNDecoder, reach: float) -> str:
    rule, curvature = as_rule(decoder.lr), _median(found.curvature)
    if curvature * reach <= FLAT * float(found.loss[0]):
        return (
            f"The encoding hardly depends on the elements (curvature {curvature:.2g}): the encoder is saturated or has "
            "forgotten them; standardise the elements (StandardScaler), train on, or take another encoder."
        )
    steps = found.steps[1]
    if isinstance(rule, GradientDescent) and steps * rule.lr * curvature < ARRIVES * (1 - rule.momentum):
        return (
            f"lr x curvature is {rule.lr * curvature:.2g}, too little for {steps} steps: use PolyakDescent, or raise "
            f"`lr` to {_good_lr(found)}."
        )
    if isinstance(rule, PolyakDescent) and steps * rule.max_lr * curvature < ARRIVES * (1 - rule.momentum):
        return f"max_lr x curvature is {rule.max_lr * curvature:.2g}, too little for {steps} steps: raise `max_lr`."
    return "Steps of this size should move it: `z` may be far from any encoding, or the encoder untrained; train on."


def _good_lr(found: Diagnosis) -> str:
    """Half of what is stable for nine samples of ten."""
    lr = 0.5 * (found.limit or 0) / float(found.curvature.nanquantile(0.9))
    return f"{float(f'{lr:.1g}'):g}"


def _median(values: Tensor) -> float:
    return float(values.nanmedian())


def _spread(values: Tensor) -> str:
    if len(values) == 0:
        return "unknown"
    return f"{_median(values):.2g} (median; {float(values.nan_to_num(nan=math.inf).max()):.2g} at most)"
