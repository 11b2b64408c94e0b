"""SlotDecoder: slots that compete for tokens, each of which becomes an element."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from setpred._checks import check_choice, check_count, check_mask, check_shape
from setpred.decoders.direct import DirectDecoder, relative
from setpred.functional._precision import common_dtype, full_precision
from setpred.functional._random import standard_normal
from setpred.functional.sinkhorn import differentiable_plan, entropic_transport, plan_change
from setpred.scaler import StandardScaler
from setpred.sets import SetPrediction, Trajectory

_LEAST = 1e-8  # Attention that every token has: a slot that wins none is given the mean of all.
_TRANSPORT_ITERS = 50  # To an error of about 1e-7 while logits are of the order of 1, and 1e-4 of 5.
_MESH_STEPS, _MESH_LENGTH = 4, 8.0  # as published
ATTENTION = ("softmax", "sinkhorn", "mesh")


class _Inputs(NamedTuple):
    """What slots read, in float32 at least: keys and values (B, S, H), weights of tokens (B, S)."""

    keys: Tensor
    values: Tensor
    weight: Tensor


class SlotDecoder(DirectDecoder):
    r"""Decode tokens into sets by slot attention.

    N slots :math:`y_n`, drawn from one learned Gaussian, compete for S tokens :math:`x_s`. An iteration is

    .. math::
        a_{sn} &= \operatorname{softmax}_n\!\left(\frac{k(x_s) \cdot q(y_n)}{\sqrt{H}}\right), \qquad
        u_n = \frac{\sum_s (a_{sn} + \epsilon)\, v(x_s)}{\sum_s (a_{sn} + \epsilon)}, \qquad \epsilon = 10^{-8} \\
        y_n &\leftarrow y'_n + \operatorname{MLP}(y'_n), \qquad y'_n = \operatorname{GRU}(u_n, y_n)

    with k, q, v linear, and layer normalisation of the tokens, of the slots before q, and before the MLP. After the
    last one, an MLP of two layers maps each slot to an element and its mask. Slots have no numbers: those drawn in
    another order give the elements in that order.

    With ``attention="sinkhorn"`` tokens are transported to slots, and no slot can take them all:

    .. math::
        u_n = N \sum_s \pi_{sn}\, v(x_s), \qquad
        \pi = \operatorname*{arg\,min}_{\pi 1 = \alpha,\ \pi^\top 1 = \beta}
        \sum_{sn} \pi_{sn} \Big({-\frac{k(x_s) \cdot q(y_n)}{\sqrt{H}}} + \log \frac{\pi_{sn}}{\alpha_s \beta_n}\Big)

    whose weights are softmaxes, over tokens and over slots, of a linear map of each. ``"mesh"`` moves the costs first,
    by 4 steps of length 8 against the gradient of the plan's entropy, so that each token goes to about one slot; the
    steps are held constant when differentiated.

    Args:
        in_channels: Size D of the tokens, or of the vectors.
        set_size: Largest number of elements N, the number of slots.
        channels: Features C of an element, without the mask.
        hidden_channels: Size H of a slot. The MLP of an iteration is twice as wide.
        iters: Number of iterations T.
        tokens: Number S of tokens that a vector is mapped to, by a linear layer; None takes tokens themselves. With a
            single token there is nothing to compete for: slots differ as they were drawn.
        attention: ``"softmax"``, ``"sinkhorn"`` or ``"mesh"``.
        differentiate: ``"unrolled"`` differentiates every iteration; ``"implicit"`` runs all but the last without a
            graph and differentiates that one, with the slots before it held constant: the implicit function theorem at
            a fixed point, of whose Neumann series the first term is kept. Memory is that of one iteration. Nothing
            flows to the Gaussian then: it stays as it is, and does not require a gradient.
        mask_clamp: Range of the predicted mask; None predicts no mask (sets of fixed size).
        scaler: Standardises elements: the decoder works in its coordinates, and returns elements in the users'; see
            :class:`setpred.StandardScaler`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a number is out of its range, a choice is unknown, or ``scaler`` has other channels.

    Example:
        >>> from setpred import SlotDecoder
        >>> tokens, mask = torch.randn(8, 49, 64), torch.rand(8, 49) < 0.9
        >>> elements, mask, _ = SlotDecoder(64, set_size=10, channels=2)(tokens, mask)
        >>> elements.shape, mask.shape
        (torch.Size([8, 10, 2]), torch.Size([8, 10]))

        From one vector:

        >>> elements, mask, _ = SlotDecoder(64, set_size=10, channels=2, tokens=16)(torch.randn(8, 64))

    Source: Locatello et al., Object-Centric Learning with Slot Attention (NeurIPS 2020), Algorithm 1; implicit: Chang,
    Griffiths, Levine, Object Representations as Fixed Points (NeurIPS 2022), whose one iteration is in addition to T;
    Sinkhorn: Zhang et al., Unlocking Slot Attention by Changing Optimal Transport Costs (ICML 2023), SA-SH and SA-MESH,
    with dot products, of which the plan is that of half the squared distances, with more of Sinkhorn's iterations, and
    without noise: no two slots are drawn alike.
    """

    def __init__(
        self,
        in_channels: int,
        set_size: int,
        channels: int,
        hidden_channels: int = 64,
        *,
        iters: int = 3,
        tokens: int | None = None,
        attention: Literal["softmax", "sinkhorn", "mesh"] = "softmax",
        differentiate: Literal["unrolled", "implicit"] = "unrolled",
        mask_clamp: tuple[float, float] | None = (0.0, 1.0),
        scaler: StandardScaler | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, set_size, channels, hidden_channels, mask_clamp=mask_clamp, scaler=scaler)
        check_count("iters", iters)
        if tokens is not None:
            check_count("tokens", tokens)
        check_choice("attention", attention, ATTENTION)
        check_choice("differentiate", differentiate, ("unrolled", "implicit"))
        self.hidden_channels, self.iters, self.tokens = hidden_channels, iters, tokens
        self.attention: Literal["softmax", "sinkhorn", "mesh"] = attention
        self.differentiate: Literal["unrolled", "implicit"] = differentiate

        def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias, device=device, dtype=dtype)

        def norm(size: int) -> nn.LayerNorm:
            return nn.LayerNorm(size, device=device, dtype=dtype)

        def mlp(width: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(linear(hidden, width, True), nn.ReLU(), linear(width, outputs, True))

        hidden, width = hidden_channels, in_channels if tokens is None else hidden_channels
        learned = differentiate == "unrolled"
        self.slot_mean = nn.Parameter(torch.empty(hidden, device=device, dtype=dtype), requires_grad=learned)
        self.slot_log_std = nn.Parameter(torch.empty(hidden, device=device, dtype=dtype), requires_grad=learned)
        self.to_tokens = None if tokens is None else linear(in_channels, tokens * hidden, True)
        self.norm_tokens, self.norm_slots, self.norm_mlp = norm(width), norm(hidden), norm(hidden)
        self.key, self.value, self.query = linear(width, hidden), linear(width, hidden), linear(hidden, hidden)
        self.token_weight = None if attention == "softmax" else linear(width, 1)
        self.slot_weight = None if attention == "softmax" else linear(hidden, 1)
        self.gru = _GRUCell(hidden, hidden, device=device, dtype=dtype)
        self.mlp = mlp(2 * hidden, hidden)
        self.output = mlp(hidden, self.out_channels)
        self._standard_slots()

    def _standard_slots(self) -> None:
        nn.init.zeros_(self.slot_mean)
        nn.init.zeros_(self.slot_log_std)

    @override
    def reset_parameters(self) -> None:
        """Draw new parameters, as PyTorch's layers do; slots are drawn from the standard normal again."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm | nn.GRUCell):
                module.reset_parameters()
        self._standard_slots()

    def forward(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        *,
        iters: int | None = None,
        init: Tensor | None = None,
        record: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> SetPrediction:
        """Decode tokens, or vectors, into sets.

        Args:
            z: Tokens, shape ``(B, S, in_channels)``; where the decoder has ``tokens``, vectors
                ``(B, in_channels)``.
            mask: Which tokens are present, bool or float in [0, 1], shape ``(B, S)``; None means all. Absent ones have
                no part, one of 0.5 counts half. A sample without any is decoded from its slots alone, with
                :math:`u_n = 0`.
            iters: Number of iterations, by default the decoder's.
            init: Initial slots ``(B, N, hidden_channels)``, in place of drawn ones; N need not be ``set_size``.
            record: Whether to keep the sets after every iteration as the trajectory; by default in training mode with
                ``"unrolled"`` only. With ``"implicit"``, the slots of all but the last are constants.
            generator: Source of the slots.

        Returns:
            The predicted sets, with those after each iteration, shape ``(T, B, N, C)``, if recorded; masks in
            ``mask_clamp``.

        Raises:
            ValueError: If a shape is wrong, or vectors come with a mask.
            TypeError: If a dtype is wrong.
        """
        if iters is not None:
            check_count("iters", iters)
        if self.to_tokens is None:
            check_shape("z", z, "B", "S", self.in_channels)
        else:
            check_shape("z", z, "B", self.in_channels)
            if mask is not None:
                raise ValueError("`mask` must be None where `z` is a vector of each sample, got one: it is of tokens")
            z = self.to_tokens(z).unflatten(1, (-1, self.hidden_channels))
        check_mask("mask", mask, z.shape[:2])
        if init is None:
            noise = standard_normal((len(z), self.set_size, self.hidden_channels), self.slot_mean, generator)
            slots = self.slot_mean + self.slot_log_std.exp() * noise
        else:
            check_shape("init", init, len(z), "N", self.hidden_channels)
            slots = init.to(self.slot_mean.dtype)
        steps = self._iterate(slots, self._inputs(z, mask), iters or self.iters)
        if record is None:
            record = self.training and self.differentiate == "unrolled"
        if not record:
            return self._as_prediction(self.output(steps[-1]))
        sets, masks, _ = self._as_prediction(self.output(torch.stack(steps)))
        return SetPrediction(sets[-1], masks[-1], Trajectory(sets, masks))

    def _inputs(self, z: Tensor, mask: Tensor | None) -> _Inputs:
        mask = torch.ones_like(z[..., 0]) if mask is None else mask
        if z.shape[1] == 0:  # as one that is absent: a plan without rows has no derivative
            z, mask = (torch.cat([x, x.new_zeros(len(x), 1, *x.shape[2:])], 1) for x in (z, mask))
        absent = mask <= 0
        tokens = self.norm_tokens(z.masked_fill(absent.unsqueeze(2), 0))
        keys, values = self.key(tokens), self.value(tokens)
        dtype = common_dtype(keys)
        # Where none is present, all weigh something and say nothing.
        none = absent.all(1, keepdim=True)
        weight = mask.to(dtype).masked_fill(absent, 0).masked_fill(none, 1)
        weight = relative(weight)
        if self.token_weight is not None:
            weight = self.token_weight(tokens).squeeze(2).to(dtype).softmax(1) * weight
            weight = weight / weight.sum(1, keepdim=True)
        return _Inputs(keys.to(dtype), values.to(dtype).masked_fill(none.unsqueeze(2), 0), weight)

    def _iterate(self, slots: Tensor, inputs: _Inputs, iters: int) -> list[Tensor]:
        """Slots after each iteration."""
        steps = [slots]
        # A map, not an objective as in `descend`: there is no gradient to take, and one more iteration is all it needs.
        free = iters - 1 if self.differentiate == "implicit" else 0
        with torch.no_grad():
            for _ in range(free):
                steps.append(self._iteration(steps[-1], inputs))
        if self.differentiate == "implicit":
            steps = [slots.detach() for slots in steps]  # forward-mode differentiation sees through no_grad
        for _ in range(iters - free):
            steps.append(self._iteration(steps[-1], inputs))
        return steps[1:]

    def _iteration(self, slots: Tensor, inputs: _Inputs) -> Tensor:
        keys, values, weight = inputs
        normed = self.norm_slots(slots)
        query = self.query(normed)
        slot_logit = None if self.slot_weight is None else self.slot_weight(normed).squeeze(2)
        with full_precision(slots.device):
            logits = keys @ query.to(keys.dtype).mT * self.hidden_channels**-0.5  # (B, S, N)
            if slot_logit is None:
                won = (logits.softmax(2) + _LEAST) * weight.unsqueeze(2)
                share = won / won.sum(1, keepdim=True)
            else:
                slot_weight = slot_logit.to(keys.dtype).softmax(1)
                cost = -logits
                if self.attention == "mesh":
                    cost = cost + _sharpening(cost.detach(), weight.detach(), slot_weight.detach())
                plan = differentiable_plan(cost, weight, slot_weight, epsilon=1.0, iters=_TRANSPORT_ITERS)
                share = slots.shape[1] * plan
            updates = (share.mT @ values).to(slots.dtype)
        slots = self.gru(updates, slots)
        mapped: Tensor = self.mlp(self.norm_mlp(slots))
        return slots + mapped

    @override
    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, iters={self.iters}, tokens={self.tokens}, attention={self.attention!r}, "
            f"differentiate={self.differentiate!r}"
        )


class _GRUCell(nn.GRUCell):
    """The same, in other operations: PyTorch has no rules for its own in vmap, nor on CUDA in forward mode."""

    @override
    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:  # type: ignore[override]
        of_x, of_hidden = F.linear(x, self.weight_ih, self.bias_ih), F.linear(hidden, self.weight_hh, self.bias_hh)
        (reset, keep, new), (reset_hidden, keep_hidden, new_hidden) = of_x.chunk(3, -1), of_hidden.chunk(3, -1)
        new = torch.tanh(new + torch.sigmoid(reset + reset_hidden) * new_hidden)
        return new + torch.sigmoid(keep + keep_hidden) * (hidden - new)


@torch.no_grad()
def _sharpening(cost: Tensor, row_weight: Tensor, col_weight: Tensor) -> Tensor:
    """What to add to the cost, so that the plan has less entropy."""
    moved = cost
    for _ in range(_MESH_STEPS):
        plan = entropic_transport(moved, row_weight, col_weight, epsilon=1.0, iters=_TRANSPORT_ITERS).plan
        # The derivative of a plan by the cost is symmetric: along a direction, or of a sum weighted by it.
        log_plan = plan.clamp(min=torch.finfo(plan.dtype).tiny).log()
        slope = plan_change(plan, log_plan, torch.zeros_like(row_weight), torch.zeros_like(col_weight))
        length = slope.flatten(1).norm(dim=1).clamp(min=1e-5)  # below, the plan is sharp and the slope is rounding
        moved = moved - _MESH_LENGTH * slope / length.view(-1, 1, 1)
    return moved - cost
