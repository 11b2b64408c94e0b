"""Whether an encoder can be decoded with: what is wrong with it, in plain words, and what to do."""

from __future__ import annotations

import copy
import math
import textwrap
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from setpred._checks import check_count
from setpred.encoders.base import SetEncoder

SETS = 8
LEAST, MOST = 0.05, 5.0  # Curvature, a few times outside of what fresh encoders of this library have.
WANTED = 0.6
FINE = "Nothing is wrong."


class EncoderCheck(NamedTuple):
    """What :func:`setpred.check_encoder` finds; printed, a report.

    Attributes:
        verdicts: What is wrong and what to do; or that nothing is.
        ok: Whether nothing is wrong.
        out_channels: Size D of the vector, 0 where the encoder gives none.
        absent_count: Whether elements of mask 0, or how many there are, change the vector. It is no fault: one that
            changes nothing has no gradient to come back by, and zeros in their place and one number of rows make it
            the same for all. None where it was not found out.
        curvature: Largest eigenvalue of :math:`J^T J / D`, J being the derivative of the vector with respect to
            elements and mask, at random starts; the median of a few. NaN where there is none.

    Example:
        >>> from setpred import PooledEncoder, check_encoder
        >>> check_encoder(PooledEncoder(2, 16), 2).absent_count
        True
    """

    verdicts: tuple[str, ...]
    ok: bool
    out_channels: int
    absent_count: bool | None
    curvature: float

    @override
    def __str__(self) -> str:
        counts = {
            True: "count: pad all sets to one size, with zeros",
            False: "do not count, and so have no gradient to come back by",
            None: "unknown",
        }
        lines = [
            "Check of an encoder",
            f"  vector           {self.out_channels} features",
            f"  absent elements  {counts[self.absent_count]}",
            f"  curvature        {self.curvature:.2g}; a fresh encoder should have about {WANTED}",
            "Verdicts",
            *(textwrap.fill(verdict, 110, initial_indent="- ", subsequent_indent="  ") for verdict in self.verdicts),
        ]
        return "\n".join(lines)


def check_encoder(encoder: SetEncoder, channels: int, *, set_size: int = 6, masked: bool = True) -> EncoderCheck:
    """Look for what would break a descent with an encoder of your own, and say what to do about it.

    Called with random sets: does its vector depend on the elements and on their mask, and not on their order nor on
    the other samples of the batch? Are its first and second derivatives there, and right (compared with finite
    differences)? Is a fresh one curved as the recommended step wants it? A module is checked as a copy in float64, in
    the mode that it is in; nothing of it changes, nor PyTorch's random state.

    Args:
        encoder: Set encoder, called as ``encoder(elements, mask)``; see :class:`setpred.SetEncoder`. Anything but a
            module must take float64.
        channels: Features of an element.
        set_size: Number of elements of the sets.
        masked: Whether it is for sets with a mask; otherwise it is called with None alone, as by a decoder of
            ``mask_clamp=None``.

    Returns:
        Verdicts, which are of use while an encoder is written, and in a test of it:
        ``assert check.ok, check``.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> from setpred import check_encoder
        >>> def last(elements, mask):
        ...     return elements[:, -1]
        >>> print(check_encoder(last, 2, masked=False).verdicts[0])
        The order of the elements matters: ...

    Source: Zhang et al. (NeurIPS 2019), section 2 and Appendix A.
    """
    check_count("channels", channels)
    check_count("set_size", set_size, 2)
    device = torch.device("cpu")
    if isinstance(encoder, nn.Module):
        device = next((parameter.device for parameter in encoder.parameters()), device)
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    # As in the decoder: fused attention has no second derivative.
    with forked, torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        asked: SetEncoder = copy.deepcopy(encoder).double() if isinstance(encoder, nn.Module) else encoder
        torch.manual_seed(0)
        elements = torch.randn(SETS, set_size, channels, dtype=torch.float64, device=device)
        mask = 0.25 + 0.5 * torch.rand(SETS, set_size, dtype=torch.float64, device=device) if masked else None
        return _Check(asked, elements, mask).result()


class _Check(NamedTuple):
    encoder: SetEncoder
    elements: Tensor
    mask: Tensor | None

    def result(self) -> EncoderCheck:
        verdicts: list[str] = []
        x, m = self.elements, self.mask
        before = [part.clone() for part in (x, m) if part is not None]
        try:
            vector = self.encoder(x, m)
            again = self.encoder(x, m)
            everywhere = self.encoder(x, None)
            ones = everywhere if m is None else self.encoder(x, torch.ones_like(m))
        except Exception as error:  # of any kind: it is the user's code
            return self._end([f"It does not run: {_said(error)}. It is called as encoder(elements, mask)."])
        if not isinstance(vector, Tensor) or vector.dim() != 2 or len(vector) != len(x):
            came = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            return self._end([f"It must return one vector a set, (B, D) = ({len(x)}, D), and returns {came}."])
        if not vector.is_floating_point():
            return self._end([f"It must return a vector of a floating dtype, and returns {vector.dtype}."])
        vector = vector.detach()
        size = vector.shape[1]
        if not bool(vector.isfinite().all()):
            return self._end(["Its vector is not finite for standard normal elements."], size)
        if not all(b is None or torch.equal(a, b) for a, b in zip(before, (x, m), strict=False)):
            return self._end(["It changes its input in place: the descent needs it again. Compute a new tensor."], size)
        if not _close(again, vector):
            return self._end(
                ["It is random, or remembers its last call; the descent needs one function: no dropout, or .eval()."],
                size,
            )
        if vector.dtype != torch.float64:
            verdicts.append(
                f"It returns {vector.dtype} for elements and parameters of float64: something inside of it casts. "
                "Make tensors with the dtype of the elements."
            )
        if m is not None and not _close(everywhere, ones):
            verdicts.append("Without a mask it must do what a mask of ones does: None means that all are present.")
        order = torch.arange(x.shape[1], device=x.device).roll(1)
        if not _close(self.encoder(x[:, order], m if m is None else m[:, order]), vector):
            verdicts.append(
                "The order of the elements matters: it must not. Treat all rows alike (no positions, no recurrence, no "
                "weights for each row), and pool them by a sum, a mean, a maximum, FSPool or attention."
            )
        alone = self._alone()
        if isinstance(alone, str) or not _close(alone, vector[:1]):
            verdicts.append(
                "A sample's vector depends on the other samples of its batch"
                + (f" ({alone})" if isinstance(alone, str) else "")
                + ": it must not. BatchNorm in training mode does that: take LayerNorm, or .eval()."
            )
        if _close(self.encoder(x + torch.randn_like(x), m), vector):
            verdicts.append("Its vector does not depend on the elements: there is nothing to descend on.")
        if m is not None and _close(self.encoder(x, 1 - m * m), vector):
            verdicts.append(
                "It ignores the mask: absent elements count as others, and no descent finds the size. Append the mask "
                "to the elements, or weight them with it; or decode sets of one size (mask_clamp=None, masked=False)."
            )
        broken = bool(verdicts)
        verdicts += self._of_derivatives(vector)
        curvature = math.nan if verdicts else self._curvature()
        if not broken and not verdicts and not LEAST <= curvature <= MOST:
            factor = (WANTED / max(curvature, 1e-30)) ** 0.5
            verdicts.append(
                f"Its curvature is {curvature:.2g}, the recommended step wants about {WANTED}: "
                + ("the descent will hardly move." if curvature < LEAST else "the descent will be unstable.")
                + f" Multiply the vector by {factor:.2g}, if the encoder is a fresh one. Training raises it."
            )
        return self._end(verdicts, size, self._absent_count(), curvature)

    def _end(
        self, verdicts: list[str], size: int = 0, absent_count: bool | None = None, curvature: float = math.nan
    ) -> EncoderCheck:
        return EncoderCheck(tuple(verdicts) or (FINE,), not verdicts, size, absent_count, curvature)

    def _alone(self) -> Tensor | str:
        try:
            return self.encoder(self.elements[:1], None if self.mask is None else self.mask[:1])
        except Exception as error:  # BatchNorm refuses a single sample
            return _said(error)

    def _absent_count(self) -> bool | None:
        if self.mask is None:
            return None
        x, m = self.elements.clone(), torch.ones_like(self.mask)
        m[:, -1] = 0
        other = x.clone()
        other[:, -1] += 1
        try:
            with_it, with_other = self.encoder(x, m), self.encoder(other, m)
            without = self.encoder(x[:, :-1], m[:, :-1])
        except Exception:  # of one that is made for one number of rows, say
            return None
        return not (_close(with_other, with_it) and _close(without, with_it))

    def _parts(self, elements: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        parts = (elements,) if mask is None else (elements, mask)
        return tuple(part.detach().clone().requires_grad_() for part in parts)

    def _gradient(self, y: tuple[Tensor, ...], z: Tensor, graph: bool = False) -> tuple[Tensor | None, ...]:
        """Of half the squared distance to z, summed over samples."""
        loss = 0.5 * (self.encoder(y[0], y[1] if len(y) == 2 else None) - z).square().mean(1).sum()
        return torch.autograd.grad(loss, y, create_graph=graph, allow_unused=True)

    def _of_derivatives(self, vector: Tensor) -> list[str]:
        z = vector + torch.randn_like(vector)
        y = self._parts(self.elements, self.mask)
        try:
            first = self._gradient(y, z, graph=True)
        except Exception as error:
            return [f"It is not differentiable: {_said(error)}. Does it detach, or compute under torch.no_grad()?"]
        for name, part in zip(("elements", "mask"), first, strict=False):
            if part is None:
                return [f"Its vector has no gradient with respect to the {name}: is something detached, or rounded?"]
            if not bool(part.isfinite().all()):
                return [f"Its gradient with respect to the {name} is not finite."]
        slope = [part for part in first if part is not None]
        # Along a direction: central differences of the loss, and of the gradient.
        along = [torch.randn_like(part) for part in y]
        step = 1e-6

        def moved(sign: float) -> tuple[Tensor, ...]:
            return tuple((p + sign * step * d).detach().requires_grad_() for p, d in zip(y, along, strict=True))

        def loss(parts: tuple[Tensor, ...]) -> Tensor:
            with torch.no_grad():
                vectors = self.encoder(parts[0], parts[1] if len(parts) == 2 else None)
                return 0.5 * (vectors - z).square().mean(1)

        measured = (loss(moved(1)) - loss(moved(-1))) / (2 * step)
        stated = sum((g * d).flatten(1).sum(1) for g, d in zip(slope, along, strict=True))
        if vector.dtype == torch.float64 and not _mostly(stated, measured):
            return ["Its gradient is wrong (finite differences have another): is a part of it detached, or in float32?"]
        try:
            total = torch.stack([(g * d).sum() for g, d in zip(slope, along, strict=True)]).sum()
            second = torch.autograd.grad(total, y, allow_unused=True, materialize_grads=True)
        except Exception as error:
            return [
                f"It has no second derivative: {_said(error)}. Training differentiates the gradient. Write what "
                "lacks it in other operations."
            ]
        with torch.enable_grad():
            ends = [self._gradient(moved(sign), z) for sign in (1, -1)]
        for number, (hessian, name) in enumerate(zip(second, ("elements", "mask"), strict=False)):
            upper, lower = ends[0][number], ends[1][number]
            if upper is None or lower is None:
                continue
            if vector.dtype == torch.float64 and not _mostly(
                hessian.flatten(1), ((upper - lower) / (2 * step)).flatten(1)
            ):
                return [
                    f"Its second derivative with respect to the {name} is wrong (finite differences have another): a "
                    "gradient of its own (torch.autograd.Function) must be differentiable too."
                ]
        if self.mask is not None:
            # Targets hold zeros where nothing is.
            hard = (torch.arange(self.mask.shape[1], device=z.device) > 1).to(self.mask).expand_as(self.mask)
            y = self._parts(self.elements * hard.unsqueeze(-1), hard)
            try:
                grads = self._gradient(y, z)
            except Exception as error:
                return [f"It does not run where elements and mask are 0: {_said(error)}."]
            if not all(part is not None and bool(part.isfinite().all()) for part in grads):
                return [
                    "Its gradient is not finite where elements and mask are 0, as those of log, norm or square root: "
                    "masks are clamped to [0, 1], and must come back from 0."
                ]
        return []

    def _curvature(self) -> float:
        """Median over the sets, from the random starts of the recommended decoder."""
        mask = None if self.mask is None else torch.full_like(self.mask, 0.5)
        y = self._parts(0.1 * self.elements, mask)
        vector = self.encoder(y[0], y[1] if len(y) == 2 else None)
        rows = [
            torch.cat([part.flatten(1) for part in torch.autograd.grad(feature, y, retain_graph=True)], 1)
            for feature in vector.sum(0)
        ]
        jacobian = torch.stack(rows, 1)  # (B, D, all that is optimised)
        return float((torch.linalg.matrix_norm(jacobian, 2).square() / vector.shape[1]).median())


def _said(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _close(a: Tensor, b: Tensor) -> bool:
    """Up to rounding."""
    if a.shape != b.shape:
        return False
    scale = float(b.detach().abs().max()) if b.numel() > 0 else 0.0
    rounding = 1e-9 if a.dtype == b.dtype == torch.float64 else 1e-4
    return bool((a.detach() - b.detach()).abs().max() <= rounding * scale) if a.numel() > 0 else True


def _mostly(stated: Tensor | float, measured: Tensor) -> bool:
    """Whether most samples agree: a few may stand at a kink."""
    difference = (torch.as_tensor(stated) - measured).view(len(measured), -1).norm(dim=1)
    scale = measured.view(len(measured), -1).norm(dim=1)
    return bool((difference <= 1e-3 * scale + 1e-7 * (1 + scale.max())).float().mean() > 0.5)
