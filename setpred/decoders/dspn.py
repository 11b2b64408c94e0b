"""DSPNDecoder: a vector becomes the set that encodes to it, by gradient descent on the set."""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from typing_extensions import override

from setpred._checks import (
    check_at_least,
    check_choice,
    check_count,
    check_interval,
    check_mask,
    check_shape,
    in_transform,
)
from setpred.decoders._objective import Objective
from setpred.decoders._watch import Watch
from setpred.decoders.diagnosis import Diagnosis, diagnose
from setpred.encoders.base import SetEncoder, encode, parameter_dtype
from setpred.functional._random import standard_normal
from setpred.functional._recompute import check_versions, uncompiled
from setpred.functional.descent import Descent, constant, descend, outside_inference
from setpred.functional.representation import KINDS, Kind, distance
from setpred.functional.step import GradientDescent, PolyakDescent, StepRule, as_rule
from setpred.losses.dspn import SetLoss
from setpred.scaler import StandardScaler, check_scaler, scaled, unscaled
from setpred.sets import SetPrediction, Trajectory

Init = Tensor | tuple[Tensor, Tensor] | SetPrediction
_Parts = tuple[Tensor, ...]  # elements, and mask if one is carried
_LR = PolyakDescent()
Project = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class DSPNDecoder(nn.Module):
    r"""Decode vectors into sets by minimising the representation loss over the set.

    From an initial set :math:`Y_0`, T steps of descent on

    .. math::
        \mathcal{L}_\text{repr}(Y, z) &= \frac{1}{D}\sum_d \ell(H(Y)_d - z_d)
        \;\Big(+ \frac{w}{2} \operatorname{mean}\,(Y - Y_0)^2 \Big) \\
        Y_{t+1} &= P\!\left(Y_t - \eta\,\frac{\partial \mathcal{L}_\text{repr}(Y_t, z)}{\partial Y_t}\right)

    where H is the encoder, the step is that of ``lr`` (above: a number), and P clamps the masks, which are optimised
    like the elements, and then applies ``project``. The gradient of a permutation-invariant H is
    permutation-equivariant, so no order is ever imposed on the elements. The loss is a mean over features and a sum
    over samples: a sample is decoded the same in every batch.

    Works in training and evaluation mode, under ``no_grad`` and ``inference_mode``, and compiles with
    ``torch.compile(fullgraph=True)``. ``torch.compile`` leaves the descent out where the encoder has a BatchNorm in
    training mode or backward hooks, and under ``checkpoint``. While gradients are wanted, attention inside the encoder
    uses PyTorch's math kernel: the fused ones have no second derivative.

    Args:
        encoder: Set encoder H, called as ``encoder(elements, mask)``; see :class:`setpred.SetEncoder`.
        iters: Number of inner steps T.
        lr: How a step is taken: the inner learning rate :math:`\eta`, a factor on the gradient, or a rule such as
            :class:`setpred.GradientDescent`, with momentum and clipping, or :class:`setpred.PolyakDescent`, which sizes
            itself.
        mask_clamp: Range of the mask; None carries no mask (sets of fixed size) and calls ``encoder(elements, None)``.
        set_size: Largest number of elements N.
        channels: Features C of an element, without the mask.
        eval_iters: Number of inner steps in evaluation mode; by default the same.
        repr_loss: :math:`\ell`: ``"huber"`` or ``"mse"``; see :func:`setpred.representation_loss`.
        anchor: Weight w of the pull of the elements towards :math:`Y_0`, a mean over the set's N x C values.
        project: Maps ``(elements, mask)`` to the nearest allowed ones, after each step and after the clamp.
        tol: Stop a sample once its loss is at most this; in eager mode it leaves the batch, so that it costs nothing
            more, and ``project`` sees the samples under way alone; see :func:`setpred.functional.descend`.
        differentiate: How an outer backward pass goes through the descent: ``"unrolled"``, through every step; or
            ``"implicit"``, in the memory and time of one step's backward, through the last step alone. Implicit,
            :math:`Y_0` receives a gradient only through ``anchor``: without it, a learned :math:`Y_0` stays as it was
            drawn (and does not require a gradient), and a module in ``init`` is not trained.
        checkpoint: Whether ``"unrolled"`` keeps only the sets and computes each step again in the backward pass: the
            same gradients in the memory of one step, for more time. What an encoder counts when it is called, such as
            batch normalisation's statistics, it counts twice.
        init: :math:`Y_0`: ``"learned"`` (one parameter, uniform in [0, 1]), ``"random"`` (0.1 times standard normal,
            drawn at each call: an encoder that is trained from many starts decodes from any), or a module from z to
            elements ``(B, N, C)``, or to elements and mask ``(B, N)``, or to a :class:`setpred.SetPrediction`, as
            another decoder, whose sets are then refined. Masks start at 0.5 unless the module gives them; that of a
            prediction is left out where no mask is carried. A module is given z in the dtype of its parameters. Other
            sets than the learned one are carried in the dtype of the encoder's parameters, if it has any.
        starts: Number of descents K, of which each sample keeps the one with the least representation loss at its end;
            the first is from :math:`Y_0`, the others from random elements, as ``"random"`` draws them, with the masks
            of :math:`Y_0`. They run side by side; in eager mode with ``tol``, one after the other, for the samples
            whose loss is above it.
        scaler: Standardises elements: the descent, the encoder, the anchor and the learned or random :math:`Y_0` are in
            its coordinates; what is returned or given as ``init``, and what ``project`` sees, are in the users'. See
            :class:`setpred.StandardScaler`.
        device: Device of the learned :math:`Y_0`.
        dtype: Dtype of the learned :math:`Y_0`.

    Raises:
        ValueError: If a number is out of its range, a choice is unknown, or ``scaler`` has other channels.

    Example:
        >>> from setpred import DSPNDecoder, PooledEncoder
        >>> encoder = PooledEncoder(in_channels=2, out_channels=64)
        >>> decoder = DSPNDecoder.recommended(encoder, set_size=30, channels=2)
        >>> elements, mask, trajectory = decoder(torch.randn(8, 64), record=True)
        >>> elements.shape, mask.shape, trajectory.elements.shape
        (torch.Size([8, 30, 2]), torch.Size([8, 30]), torch.Size([11, 8, 30, 2]))

    Source: Zhang, Hare, Prügel-Bennett, Deep Set Prediction Networks (NeurIPS 2019), Algorithm 1 and equation 5;
    implicit: Zhang et al., Multiset-Equivariant Set Prediction with Approximate Implicit Differentiation (ICLR 2022).
    """

    initial_elements: nn.Parameter | None

    def __init__(
        self,
        encoder: SetEncoder,
        iters: int = 10,
        lr: float | StepRule = _LR,
        mask_clamp: tuple[float, float] | None = (0.0, 1.0),
        *,
        set_size: int,
        channels: int,
        eval_iters: int | None = None,
        repr_loss: Kind = "huber",
        anchor: float = 0.0,
        project: Project | None = None,
        tol: float | None = None,
        differentiate: Literal["unrolled", "implicit"] = "unrolled",
        checkpoint: bool = False,
        init: Literal["learned", "random"] | nn.Module = "learned",
        starts: int = 1,
        scaler: StandardScaler | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("iters", iters)
        if eval_iters is not None:
            check_count("eval_iters", eval_iters)
        as_rule(lr)
        check_interval("mask_clamp", mask_clamp)
        check_count("set_size", set_size)
        check_count("channels", channels)
        check_at_least("anchor", anchor, 0)
        if tol is not None:
            check_at_least("tol", tol, -math.inf)
        check_choice("repr_loss", repr_loss, KINDS)
        check_choice("differentiate", differentiate, ("unrolled", "implicit"))
        if checkpoint and differentiate == "implicit":
            raise ValueError("`checkpoint` must be False when `differentiate` is 'implicit', which keeps but one step")
        if not isinstance(init, nn.Module) and init not in ("learned", "random"):
            raise ValueError(f"`init` must be 'learned', 'random' or a module, got {init!r}")
        check_count("starts", starts)
        check_scaler(scaler, channels)
        self.encoder = encoder
        self.iters, self.eval_iters, self.lr, self.mask_clamp = iters, eval_iters, lr, mask_clamp
        self.set_size, self.channels = set_size, channels
        self.repr_loss: Kind = repr_loss
        self.anchor, self.project, self.tol = anchor, project, tol
        self.differentiate: Literal["unrolled", "implicit"] = differentiate
        self.checkpoint = checkpoint
        self.init, self.starts, self.scaler = init, starts, scaler
        self._watch = Watch()
        if init == "learned":
            self.initial_elements = nn.Parameter(
                torch.empty(set_size, channels, device=device, dtype=dtype),
                requires_grad=differentiate == "unrolled" or anchor > 0,
            )
        else:
            self.register_parameter("initial_elements", None)
        self.reset_parameters()

    @classmethod
    def recommended(cls, encoder: SetEncoder, *, set_size: int, channels: int, **overrides: Any) -> Self:
        """Build the decoder to begin with: nothing in it has to be tuned.

        10 steps of :class:`setpred.PolyakDescent`, which size themselves, on half the squared error, differentiated
        implicitly, so that memory does not grow with them; from random sets, so that the encoder learns to decode from
        any; in evaluation mode four times as many steps, since the descent goes on to improve. Train it with a set loss
        of the prediction alone.

        Args:
            encoder: Set encoder; a :class:`setpred.PooledEncoder` as it is made by default. One of your own should have
                about the same curvature: see the documentation, concepts, inner optimisation.
            set_size: Largest number of elements.
            channels: Features of an element.
            **overrides: Any argument of :class:`DSPNDecoder`, to change the recipe.

        Example:
            >>> from setpred import DSPNDecoder, PooledEncoder
            >>> DSPNDecoder.recommended(PooledEncoder(2, 64), set_size=30, channels=2).lr
            PolyakDescent(max_lr=1.0, momentum=0.9)

        Source: implicit differentiation, momentum and random starts: Zhang et al. (ICLR 2022).
        """
        recipe: dict[str, Any] = {
            "iters": 10,
            "eval_iters": 4 * (overrides.get("iters") or 10),
            "lr": PolyakDescent(),
            "mask_clamp": (0.0, 1.0),
            "repr_loss": "mse",
            "differentiate": "implicit",
            "init": "random",
        }
        return cls(encoder, set_size=set_size, channels=channels, **recipe | overrides)

    @classmethod
    def paper(cls, encoder: SetEncoder, *, set_size: int, channels: int, **overrides: Any) -> Self:
        """Build the decoder of the DSPN paper's experiments.

        10 steps of plain gradient descent (no momentum), lr 25 (the published 800 for a mean over a batch of 32), masks
        clamped to [0, 1] and starting at 0.5, Huber loss, learned initial set, every step differentiated.

        Args:
            encoder: Set encoder of ``scaling="dspn"``, which ``lr`` belongs to; the paper has ``PooledEncoder(2, 256,
                256)`` for MNIST (its script: 64 features out), and ``RelationEncoder(C, 512, 512)`` for CLEVR.
            set_size: Largest number of elements; the paper has 342 for MNIST, 10 for CLEVR.
            channels: Features of an element.
            **overrides: Any argument of :class:`DSPNDecoder`, to change the recipe.

        Example:
            >>> from setpred import DSPNDecoder, PooledEncoder
            >>> DSPNDecoder.paper(PooledEncoder(2, 64, scaling="dspn"), set_size=30, channels=2).iters
            10

        Source: Zhang et al. (NeurIPS 2019), section 5 and Appendix B; lr from the published code.
        """
        recipe: dict[str, Any] = {
            "iters": 10,
            "lr": 25.0,
            "mask_clamp": (0.0, 1.0),
            "repr_loss": "huber",
            "differentiate": "unrolled",
            "init": "learned",
        }
        return cls(encoder, set_size=set_size, channels=channels, **recipe | overrides)

    @classmethod
    def idspn(cls, encoder: SetEncoder, *, set_size: int, channels: int, **overrides: Any) -> Self:
        """Build the decoder of the iDSPN paper's recipe.

        20 steps with Nesterov momentum 0.9 and lr 1, half squared error, each sample's gradient clipped to norm 10,
        implicit differentiation, a random initial set. Train it without a representation term:
        ``DSPNLoss(..., repr_weight=0, steps="last")``, or any set loss by itself.

        The published training on CLEVR goes over to 40 steps half-way; other experiments learn the initial set through
        ``init="learned", anchor=0.1``. Masks are ordinary channels there, here they are clamped to [0, 1].

        Args:
            encoder: Set encoder; the paper has ``PooledEncoder(C, 512, 512, layers=2, scaling="idspn")`` for CLEVR.
            set_size: Largest number of elements.
            channels: Features of an element.
            **overrides: Any argument of :class:`DSPNDecoder`, to change the recipe.

        Example:
            >>> from setpred import DSPNDecoder, PooledEncoder
            >>> DSPNDecoder.idspn(PooledEncoder(2, 64, scaling="idspn"), set_size=30, channels=2).differentiate
            'implicit'

        Source: Zhang et al. (ICLR 2022), sections 3 and 4, and their published scripts.
        """
        recipe: dict[str, Any] = {
            "iters": 20,
            "lr": GradientDescent(1.0, momentum=0.9, nesterov=True, grad_clip=10.0),
            "mask_clamp": (0.0, 1.0),
            "repr_loss": "mse",
            "differentiate": "implicit",
            "init": "random",
        }
        return cls(encoder, set_size=set_size, channels=channels, **recipe | overrides)

    def reset_parameters(self) -> None:
        """Draw a new learned initial set, uniform in [0, 1]; the encoder is left alone."""
        if self.initial_elements is not None:
            nn.init.uniform_(self.initial_elements)

    def forward(
        self,
        z: Tensor,
        *,
        iters: int | None = None,
        init: Init | None = None,
        starts: int | None = None,
        record: bool | None = None,
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
    ) -> SetPrediction:
        """Decode vectors into sets.

        Args:
            z: Target representations, shape ``(B, D)``.
            iters: Number of steps, by default the decoder's in its mode.
            init: Initial elements ``(B, N, C)``, or elements and mask ``(B, N)``, or a prediction, in place of the
                decoder's own.
            starts: Number of descents for each sample, by default the decoder's.
            record: Whether to keep the trajectory; by default in training mode with ``"unrolled"`` only.
            generator: Source of random initial sets. A module in ``init`` does not get it: a start that is random, but
                shall be the same again, is given as ``init=start(z, generator=generator)``.
            chunk_size: Number of samples that descend at a time, by default all. Without gradients, the memory of the
                descent goes with it and not with B. What is predicted is the same, unless the encoder mixes samples
                (BatchNorm in training).

        Returns:
            The predicted sets, with their trajectory if recorded.

        Raises:
            ValueError: If a shape is wrong, the encoder does not return ``(B, D)``, or ``init`` comes with a mask where
                none is carried.
            TypeError: If a dtype is wrong.
        """
        check_shape("z", z, "B", "D")
        z = outside_inference(z)
        if iters is not None:
            check_count("iters", iters)
        if record is None:
            record = self.training and self.differentiate == "unrolled"
        starts = self.starts if starts is None else starts
        check_count("starts", starts)
        elements, mask = self._initial(z, init, generator)
        starting = [elements]
        if starts > 1:
            shape = (starts - 1, *elements.shape)
            starting.extend(_random_elements(shape, elements, generator).unbind())
        descended = self._descend_from
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
            descended = partial(self._descend_in_chunks, chunk_size)
        if torch.compiler.is_compiling() and _refuses_func_grad(self.encoder):
            descended = uncompiled(descended)
        watched = self.training and not torch.compiler.is_compiling() and not in_transform() and self._watch.due()
        # A start that was made for this z may be at the end already.
        judged = watched and self._own_start(init) and self._watch.wants_loss
        own = self.iters if self.training or self.eval_iters is None else self.eval_iters
        descent = descended(z, starting, mask, iters or own, record or judged)
        if watched:
            self._watch.look(descent.value, descent.loss if judged else None, self.tol)
        ones = z.new_ones(elements.shape[:2], dtype=elements.dtype)
        elements, mask = descent.value if mask is not None else (*descent.value, ones)
        if not record or descent.trajectory is None or descent.loss is None or descent.grad_norm is None:
            return SetPrediction(unscaled(elements, self.scaler), mask, None)
        elements, steps = unscaled(elements, self.scaler), unscaled(descent.trajectory[0], self.scaler)
        masks = descent.trajectory[1] if len(descent.trajectory) > 1 else ones.expand(len(steps), *ones.shape)
        return SetPrediction(elements, mask, Trajectory(steps, masks, descent.loss, descent.grad_norm))

    def _initial(self, z: Tensor, init: Init | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """Elements, and mask if one is carried, before the first step."""
        shape = (len(z), self.set_size, self.channels)
        # The descent is carried in the precision of the encoder, whatever autocast made of z or of the module's result.
        dtype = parameter_dtype(self.encoder)
        given: Any = init
        if given is None:
            if self.initial_elements is not None:
                given = self.initial_elements.expand(shape)
            elif isinstance(self.init, nn.Module):
                given = self.init(z.to(parameter_dtype(self.init) or z.dtype))
            else:
                given = _random_elements(shape, z if dtype is None else z.to(dtype), generator)
        if isinstance(given, SetPrediction):
            given = given.elements if self.mask_clamp is None else given[:2]
        if isinstance(given, tuple) and len(given) != 2:
            raise ValueError(f"`init` must be elements, or elements and mask, or a prediction, got {len(given)} parts")
        elements, mask = given if isinstance(given, tuple) else (given, None)
        check_shape("init elements", elements, *shape)
        check_mask("init mask", mask, shape[:2])
        if not self._own_start(init):
            elements = scaled(elements, self.scaler)
        elements = outside_inference(elements.to(dtype or elements.dtype))
        if self.mask_clamp is None:
            if mask is not None:
                raise ValueError("`init` must be elements alone when `mask_clamp` is None, got a mask too")
            return elements, None
        if mask is None:
            mask = elements.new_full(shape[:2], 0.5)
        return elements, mask.to(elements.dtype).clamp(*self.mask_clamp)

    def _own_start(self, init: Init | None) -> bool:
        """Whether the start is learned or random, not given in the users' coordinates."""
        return init is None and not isinstance(self.init, nn.Module)

    def representation_loss(self, prediction: SetPrediction, z: Tensor) -> Tensor:
        """How far each predicted set is from what it was decoded from: the representation loss of each sample.

        A sample whose loss is far above others' was not decoded: a confidence, and what ``starts`` chooses by.

        Args:
            prediction: What :meth:`forward` returned.
            z: What it was given, shape ``(B, D)``.

        Returns:
            Shape ``(B,)``.

        Raises:
            TypeError: If the prediction is none.
            ValueError: If a shape is wrong.

        Example:
            >>> from setpred import DSPNDecoder, PooledEncoder
            >>> decoder = DSPNDecoder(PooledEncoder(2, 16), set_size=5, channels=2)
            >>> z = torch.randn(3, 16)
            >>> decoder.representation_loss(decoder(z), z).shape
            torch.Size([3])
        """
        if not isinstance(prediction, SetPrediction):
            raise TypeError(f"`prediction` must be a SetPrediction, got a {type(prediction).__name__}")
        mask = None if self.mask_clamp is None else prediction.mask
        return self._loss(encode(self.encoder, scaled(prediction.elements, self.scaler), mask), z)

    def diagnose(
        self,
        z: Tensor,
        target: Tensor,
        target_mask: Tensor | None = None,
        *,
        iters: int | None = None,
        set_loss: SetLoss | None = None,
        generator: torch.Generator | None = None,
    ) -> Diagnosis:
        """Look at the descent on a validation batch, and say what is wrong and what to do about it.

        ``print(decoder.diagnose(z, target, target_mask))`` is a report. It takes a descent of four times the steps and
        one from the target, in evaluation mode, without compiling, and waits for the device. Nothing changes: no
        parameter, buffer, gradient or mode, nor PyTorch's random state.

        Args:
            z: What the decoder is given, shape ``(B, D)``, B >= 1.
            target: Target elements, shape ``(B, M, C)`` with M at most ``set_size``.
            target_mask: Bool or float {0, 1}, shape ``(B, M)``; None means that all are present. Values of absent
                elements are not seen.
            iters: Number of steps T, by default those of the training.
            set_loss: The set error, called as ``set_loss(pred, target, pred_mask, target_mask)``, a scalar; by default
                :class:`setpred.HungarianLoss`. Without a scaler of its own it gets elements in the decoder's
                coordinates, as :class:`setpred.DSPNLoss` calls it.
            generator: Source of random initial sets; it does go on.

        Returns:
            Numbers, and verdicts that are judged on the set error: the loss of the descent may fall while the sets get
            worse.

        Raises:
            ValueError: If a shape is wrong, there is no sample, or the targets have more rows than ``set_size``.
            TypeError: If a dtype is wrong.

        Example:
            >>> from setpred import DSPNDecoder, PolyakDescent, PooledEncoder
            >>> encoder = PooledEncoder(2, 64, 64)
            >>> decoder = DSPNDecoder(encoder, iters=40, lr=PolyakDescent(), set_size=5, channels=2)
            >>> target = torch.randn(16, 5, 2)
            >>> diagnosis = decoder.diagnose(encoder(target), target)
            >>> diagnosis.steps
            (0, 40, 80, 160)
            >>> print(diagnosis)
            Diagnosis of 16 samples, 40 steps
              set error ...
        """
        return diagnose(self, z, target, target_mask, iters=iters, set_loss=set_loss, generator=generator)

    def _loss(self, representation: Tensor, z: Tensor) -> Tensor:
        check_shape("encoder(elements, mask)", representation, *z.shape)
        return distance(representation, z, self.repr_loss)

    def _descend_in_chunks(
        self, size: int, z: Tensor, starts: list[Tensor], mask: Tensor | None, iters: int, record: bool
    ) -> Descent[_Parts]:
        chunks = [slice(first, first + size) for first in range(0, len(z), size)]
        if len(chunks) <= 1:
            return self._descend_from(z, starts, mask, iters, record)
        return _joined(
            self._descend_from(z[rows], [s[rows] for s in starts], None if mask is None else mask[rows], iters, record)
            for rows in chunks
        )

    def _descend_from(
        self, z: Tensor, starts: list[Tensor], mask: Tensor | None, iters: int, record: bool
    ) -> Descent[_Parts]:
        """Descend from several initial sets each; keep what ends with the least representation loss."""
        if len(starts) == 1:
            return self._descend(z, starts[0], mask, iters, record)
        numbers = torch.arange(len(z), device=z.device)
        if self.tol is None or torch.compiler.is_compiling() or in_transform():
            each = z.repeat(len(starts), 1)
            masks = None if mask is None else mask.repeat(len(starts), 1)
            descent = self._descend(each, torch.cat(starts), masks, iters, record)
            best = self._final_loss(descent, each).view(len(starts), len(z)).argmin(0)
            return _samples(best * len(z) + numbers, descent)
        # One after the other, for the samples that have not arrived.
        descent = self._descend(z, starts[0], mask, iters, record)
        loss = self._final_loss(descent, z)
        rows = (loss > self.tol).nonzero().squeeze(1)
        if len(rows) == 0:
            return descent
        others = [start[rows] for start in starts[1:]]
        again = self._descend_from(z[rows], others, None if mask is None else mask[rows], iters, record)
        better = self._final_loss(again, z[rows]) < loss[rows]
        chosen = numbers.index_copy(0, rows[better], len(z) + better.nonzero().squeeze(1))
        return _samples(chosen, descent, again)

    @torch.no_grad()
    def _final_loss(self, descent: Descent[_Parts], z: Tensor) -> Tensor:
        """To choose by: what is within the tolerance is alike, and what is broken comes last."""
        elements, mask = descent.value if len(descent.value) == 2 else (descent.value[0], None)
        loss = self._loss(self.encoder(elements, mask), z)
        if self.tol is not None:
            loss = loss.clamp(min=self.tol)
        return loss.masked_fill(loss.isnan(), math.inf)

    def _descend(self, z: Tensor, elements: Tensor, mask: Tensor | None, iters: int, record: bool) -> Descent[_Parts]:
        differentiable = torch.is_grad_enabled()
        checkpoint = self.checkpoint and differentiable
        encoder = self.encoder
        if checkpoint and isinstance(encoder, nn.Module):
            encoder = _AsNow(encoder)

        def project(y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if self.mask_clamp is None:
                return self._project(y[0], torch.ones_like(y[0][..., 0]))[:1]
            low, high = self.mask_clamp
            return self._project(y[0], y[1].clamp(constant(low), constant(high)))

        # Fused attention has no second derivative; where none will be taken, it is faster.
        with sdpa_kernel(SDPBackend.MATH) if differentiable else nullcontext():
            return descend(
                Objective(encoder, self.repr_loss, constant(self.anchor)),
                (elements,) if mask is None else (elements, mask),
                steps=iters,
                lr=self.lr,
                args=(z, elements),
                project=None if self.mask_clamp is None and self.project is None else project,
                tol=self.tol,
                differentiate=self.differentiate,
                checkpoint=checkpoint,
                record=record,
            )

    def _project(self, elements: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if self.project is None:
            return elements, mask
        allowed, mask = self.project(unscaled(elements, self.scaler), mask)
        return scaled(allowed, self.scaler).to(elements.dtype), mask

    @override
    def extra_repr(self) -> str:
        return (
            f"iters={self.iters}, lr={self.lr}, mask_clamp={self.mask_clamp}, set_size={self.set_size}, "
            f"channels={self.channels}, eval_iters={self.eval_iters}, repr_loss={self.repr_loss!r}, "
            f"anchor={self.anchor}, tol={self.tol}, "
            f"differentiate={self.differentiate!r}, checkpoint={self.checkpoint}, starts={self.starts}"
            + (f", init={self.init!r}" if isinstance(self.init, str) else "")
        )


def _random_elements(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return 0.1 * standard_normal(shape, like, generator)


def _joined(descents: Iterable[Descent[_Parts]]) -> Descent[_Parts]:
    """Put descents of some samples each into one."""
    values, trajectories, losses, norms = zip(*descents, strict=True)
    value = tuple(map(torch.cat, zip(*values, strict=True)))
    if losses[0] is None:
        return Descent(value, None, None, None)
    trajectory = tuple(torch.cat(parts, 1) for parts in zip(*trajectories, strict=True))
    return Descent(value, trajectory, torch.cat(losses, 1), torch.cat(norms, 1))


def _samples(rows: Tensor, *descents: Descent[_Parts]) -> Descent[_Parts]:
    """Take samples, numbered through all of these descents, into one."""
    value, trajectory, loss, norm = _joined(descents)
    value = tuple(part.index_select(0, rows) for part in value)
    if trajectory is None or loss is None or norm is None:
        return Descent(value, None, None, None)
    trajectory = tuple(part.index_select(1, rows) for part in trajectory)
    return Descent(value, trajectory, loss.index_select(1, rows), norm.index_select(1, rows))


class _AsNow:
    """An encoder with the parameters that it has now, also where the backward pass calls it again.

    There, after a `torch.func.functional_call`, the module has its own again.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder
        self.parameters = dict(encoder.named_parameters())
        self.buffers = dict(encoder.named_buffers())
        self.versions: dict[Tensor, int] = {parameter: parameter._version for parameter in self.parameters.values()}

    def __call__(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        check_versions(self.versions)  # of all, frozen ones too
        vector: Tensor
        if all(parameter is self.parameters.get(name) for name, parameter in self.encoder.named_parameters()):
            vector = self.encoder(elements, mask)
        else:
            vector = functional_call(self.encoder, self.parameters | self.buffers, (elements, mask))
        return vector


def _refuses_func_grad(encoder: object) -> bool:
    """Whether `torch.func.grad` cannot run the encoder: buffers changed in place, or backward hooks."""
    return isinstance(encoder, nn.Module) and any(
        (isinstance(module, _NormBase) and module.training and module.track_running_stats)
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in encoder.modules()
    )
