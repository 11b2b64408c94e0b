"""What all set losses share: reduction, and the door through which their arguments come in."""

import warnings
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import dataclass_transform, override

from setpred._checks import (
    check_at_least,
    check_channels,
    check_choice,
    check_finite,
    check_mask,
    check_shape,
    check_soft_mask,
    check_tensor,
)
from setpred.functional._precision import common_dtype
from setpred.functional._precision import full_precision as full_precision
from setpred.functional.pairwise import Cost, channels_seen, check_cost, cost_of_pairs
from setpred.scaler import StandardScaler, check_scaler, scaled
from setpred.sets import SetPrediction, opened

Reduction = Literal["mean", "sum", "none"]
Presence = Literal["feature", "bce", "logits", "none"]
REDUCTIONS = ("mean", "sum", "none")
PRESENCES = ("feature", "bce", "logits", "none")
SCORED = ("bce", "logits")  # the presences with a loss of their own


def reduce(value: Tensor, reduction: Reduction, shape: torch.Size | None = None) -> Tensor:
    """Mean (0 for an empty batch, not NaN), sum, or the values themselves, in another shape if one is given."""
    if reduction == "none":
        return value if shape is None else value.view(shape)
    return value.mean() if reduction == "mean" and value.numel() > 0 else value.sum()


def mean_rows(value: Tensor) -> Tensor:
    """Mean over the last dimension, 0 (not NaN) where it is empty."""
    return value.mean(-1) if value.shape[-1] > 0 else value.sum(-1)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each set: (S, M, C) and indices (S, N) to (S, N, C)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def as_encoded(target: Tensor, mask: Tensor | None, rows: int) -> tuple[Tensor, Tensor | None]:
    """Targets as they are encoded: 0 where absent, and padded with absent elements to the prediction's rows."""
    if mask is not None:
        target = target.masked_fill((mask == 0).unsqueeze(-1), 0)
    missing = rows - target.shape[1]
    if missing > 0:
        mask = target.new_ones(target.shape[:2]) if mask is None else mask
        target, mask = F.pad(target, (0, 0, 0, missing)), F.pad(mask, (0, missing))
    return target, mask


def charge(pred: Tensor, partner: Tensor, cost: Cost, charged: Tensor | None) -> Tensor:
    """Cost of each pair, (S, N); 0 where ``charged`` is False.

    Whatever a cost makes of those, NaN too, reaches neither the value nor a gradient.
    """
    if charged is None:
        return cost_of_pairs(pred, partner, cost)
    left_out = ~charged
    pred, partner = (side.masked_fill(left_out.unsqueeze(-1), 0) for side in (pred, partner))
    return cost_of_pairs(pred, partner, cost).masked_fill(left_out, 0)


def check_options(
    cost: object, matching_cost: object, presence: object, presence_weight: float, reduction: object
) -> None:
    """Check what the matching losses are configured with."""
    check_cost("cost", cost)
    if matching_cost is not None:
        check_cost("matching_cost", matching_cost)
    check_choice("presence", presence, PRESENCES)
    check_at_least("presence_weight", presence_weight, 0)
    check_finite("presence_weight", presence_weight)
    check_choice("reduction", reduction, REDUCTIONS)


class ScaledLoss(nn.Module):
    """What the modules of losses share: where a scaler is given, they measure in its coordinates."""

    scaler: StandardScaler | None

    def __init__(self, scaler: StandardScaler | None) -> None:
        super().__init__()
        check_scaler(scaler)
        self.scaler = scaler

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scaler":
            object.__setattr__(self, name, value)  # past nn.Module, which would register what is the decoder's
        else:
            super().__setattr__(name, value)

    def _scaled(self, pred: Tensor, target: Tensor, name: str = "pred") -> tuple[Tensor, Tensor]:
        """Both sides in the scaler's coordinates; what is absent is zeroed after it, as everywhere in the losses."""
        if self.scaler is not None:
            check_channels(name, pred, self.scaler.channels)
            check_channels("target", target, self.scaler.channels)
        return scaled(pred, self.scaler), scaled(target, self.scaler)


class SetLoss(ScaledLoss):
    """A set loss as a module. Its fields are the function's options and a scaler: see :func:`with_options`."""

    presence: Any
    _names: tuple[str, ...]

    @property
    def options(self) -> dict[str, Any]:
        """What the function is called with beside the sets."""
        return {name: getattr(self, name) for name in self._names}

    def _opened(
        self, pred: Tensor | SetPrediction, target: Tensor, pred_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Prediction and target in the scaler's coordinates, and the predicted mask."""
        pred, pred_mask = open_pred(pred, pred_mask, self.presence)
        return *self._scaled(pred, target), pred_mask

    @override
    def extra_repr(self) -> str:
        """Say what the loss is configured with, but for submodules, which are shown anyway."""
        options = self.options
        if options["presence"] not in SCORED:
            options.pop("presence_weight", None)
        for option in fields(self):  # type: ignore[arg-type]
            if not option.repr and options.get(option.name) == option.default:
                del options[option.name]
        shown = {k: v for k, v in options.items() if v is not None and not isinstance(v, nn.Module)}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items()) + scaler_repr(self)


_Loss = TypeVar("_Loss", bound=SetLoss)


@dataclass_transform(eq_default=False, field_specifiers=(field,))
def with_options(loss: type[_Loss]) -> type[_Loss]:
    """Class decorator: annotated names are arguments of the constructor and attributes, as in a dataclass.

    Those of ``field(..., repr=False)`` are shown in the repr only where they are not the default.
    """
    assign = dataclass(eq=False, repr=False)(loss).__init__  # calls __post_init__ too

    @wraps(assign)
    def __init__(self: _Loss, *args: Any, **options: Any) -> None:  # noqa: N807
        nn.Module.__init__(self)
        assign(self, *args, **options)
        check_scaler(self.scaler)

    loss.__init__ = __init__  # type: ignore[assignment,method-assign]
    names = [option.name for option in fields(loss)]  # type: ignore[arg-type]
    loss._names = tuple(name for name in names if name != "scaler")
    for name in names:
        delattr(loss, name)  # the default, which would hide a submodule of that name
    return loss


def scaler_repr(module: ScaledLoss) -> str:
    """Say which scaler there is, which is no submodule."""
    return "" if module.scaler is None else f", scaler={module.scaler}"


def check_sees_mask(cost: Cost, channels: int) -> None:
    """Raise if a composed cost leaves out the last of ``channels`` channels, the mask: no presence would be learned.

    What a callable of the user's own looks at cannot be known without a call on made-up sets.
    """
    seen = channels_seen(cost, channels)
    if channels - 1 not in seen:
        raise ValueError(
            "`cost` must see the mask with presence='feature', the last channel (-1), got one of channels "
            f"{sorted(seen)} of {channels}: add on_channels(..., [-1]), or take another presence"
        )


def check_probabilities(name: str, value: Tensor) -> None:
    """Raise unless all values lie in [0, 1], as cross-entropy needs.

    On the CPU this takes 4 us. On a GPU it waits for the device once a call (SciPy's matching does so anyway), because
    PyTorch's own check there ends the process, and names no argument. Values are not looked at while compiling or
    capturing a CUDA graph, and under transformations that hide them.
    """
    if _is_hidden(value):
        return
    value = value.detach()
    try:
        if torch.equal(value, value.clamp(0, 1)):  # NaN is not equal to itself
            return
    except RuntimeError:  # vmap, make_fx: no values are there to look at
        return
    *sample, row = ((value >= 0) & (value <= 1)).logical_not().nonzero()[0].tolist()
    raise ValueError(
        f"`{name}` must lie in [0, 1] with presence='bce', got {value[(*sample, row)].item()} in sample "
        f"{sample[0] if len(sample) == 1 else tuple(sample)}"
    )


def _is_hidden(value: Tensor) -> bool:
    return torch.compiler.is_compiling() or (value.is_cuda and torch.cuda.is_current_stream_capturing())


def _warn_if_certain(pred_mask: Tensor, wanted: Tensor) -> None:
    """Warn where a probability that is trained is exactly the wrong one of 0 and 1; seen as `check_probabilities` is.

    PyTorch's derivative there is about 1e12, beside which nothing else is learned.
    """
    if _is_hidden(pred_mask) or not pred_mask.requires_grad:
        return
    try:
        number = int((pred_mask == (~wanted).to(pred_mask.dtype)).sum())
    except RuntimeError:  # as above
        return
    if number > 0:
        warnings.warn(
            f"`pred_mask` is exactly 0 or 1 in {number} of {pred_mask.numel()} rows where presence='bce' wants the "
            "other one, and its derivative there is about 1e12. Give a clamped mask, as decoders predict it, to "
            "presence='feature', and what a linear layer gives to 'logits'",
            RuntimeWarning,
            stacklevel=4,
        )


def presence_loss(pred_mask: Tensor, wanted: Tensor, presence: Presence) -> Tensor:
    """Binary cross-entropy of each set's mask, (S, N), a mean over its rows: shape (S,)."""
    if presence == "logits":  # finite where an infinite logit is right, unlike PyTorch's function
        return mean_rows(-F.logsigmoid(torch.where(wanted, pred_mask, -pred_mask)))
    _warn_if_certain(pred_mask, wanted)
    return mean_rows(F.binary_cross_entropy(pred_mask, wanted.to(pred_mask.dtype), reduction="none"))


def as_weight(pred_mask: Tensor) -> Tensor:
    """Masks as weights: NaN for what is none, negative or NaN. Those of weight 0 get no gradient: they do not exist."""
    return torch.where(pred_mask > 0, pred_mask, 0 * pred_mask.detach().sqrt())


def distribution(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights (S, N) of sum 1, and which sets (S,) are empty; those get equal weights, to stay finite."""
    weight = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
    total = weight.sum(1, keepdim=True)
    empty = total == 0
    return torch.where(empty, 1 / max(x.shape[1], 1), weight / torch.where(empty, 1, total)), empty.squeeze(1)


def nothing(*given: Tensor) -> Tensor:
    """Loss (S,) where a side has no rows: 0, but connected to all that was given, and NaN where that is."""
    return sum((0 * x.flatten(1).sum(1) for x in given), given[0].new_zeros(len(given[0])))


def keep_nan(value: Tensor, *given: Tensor) -> Tensor:
    """Make a set's loss (S,) NaN where something given is: where nothing is charged, it would be 0."""
    total, *others = (x.detach().sum(tuple(range(1, x.dim()))) for x in given)  # faster than to look at each number
    return value.masked_fill(sum(others, total).isnan(), torch.nan)


class Sets(NamedTuple):
    """Predictions and targets of one loss, in one form: ``S`` = steps x batch sets.

    Attributes:
        pred: Shape ``(S, N, C)``, the mask as its last channel with ``presence="feature"``.
        target: Shape ``(S, M, C)``, zero where absent.
        pred_mask: Shape ``(S, N)``, None if there is none or it is a channel.
        present: Which targets exist, bool of shape ``(S, M)``, None if all do.
        shape: What the loss of one set each is reshaped to, ``(B,)`` or ``(K, B)``.
    """

    pred: Tensor
    target: Tensor
    pred_mask: Tensor | None
    present: Tensor | None
    shape: torch.Size


def fill_up(sets: Sets, *, sized: bool) -> tuple[Tensor, Tensor | None]:
    """Targets with the mask as a feature, and which of their rows count, None if all do.

    However a set was padded, as many count as there are predictions, or as are present if those are more. Where
    neither side has a mask (``sized`` is False), sizes are not compared: all rows count as they are.
    """
    target, present, rows, cols = sets.target, sets.present, sets.pred.shape[1], sets.target.shape[1]
    if sized and cols < rows:
        return F.pad(target, (0, 0, 0, rows - cols)), None
    if present is None or cols == rows:
        return target, None
    absent = ~present
    return target, present | (absent.cumsum(1) <= rows - present.sum(1, keepdim=True))


def open_pred(pred: Tensor | SetPrediction, pred_mask: Tensor | None, presence: object) -> tuple[Tensor, Tensor | None]:
    """Predicted elements and mask; that of a prediction must be trained where it is scored."""
    elements, mask = opened(("pred", "pred_mask"), pred, pred_mask, "the target's is `target_mask`")
    trained = isinstance(elements, Tensor) and elements.requires_grad
    constant = isinstance(mask, Tensor) and not mask.requires_grad
    if isinstance(pred, SetPrediction) and presence in SCORED and trained and constant:
        raise ValueError(
            f"`pred` must have a mask that is trained with presence={presence!r}, got a constant one, as of a decoder "
            "with mask_clamp=None: take presence='none'"
        )
    return elements, mask


def enter(
    pred: Tensor, target: Tensor, pred_mask: Tensor | None, target_mask: Tensor | None, presence: Presence
) -> Sets:
    """Check the arguments of a set loss, and bring them to one form."""
    check_tensor("pred", pred)
    if pred.dim() not in (3, 4):
        raise ValueError(f"`pred` must have shape (B, N, C) or (K, B, N, C), got shape {tuple(pred.shape)}")
    check_shape("target", target, pred.shape[-3], "M", pred.shape[-1])
    check_soft_mask("pred_mask", pred_mask, pred.shape[:-1])
    check_mask("target_mask", target_mask, target.shape[:-1])
    if presence in SCORED and pred_mask is None:
        raise ValueError(f"`pred_mask` must be given with presence={presence!r}, got None")
    if presence == "bce" and pred_mask is not None:
        check_probabilities("pred_mask", pred_mask)
    shape = pred.shape[:-2]
    dtype = common_dtype(pred, target)
    pred, target = pred.to(dtype), target.to(dtype)
    present = None
    if target_mask is not None:
        present = target_mask.bool()
        target = torch.where(present.unsqueeze(-1), target, 0)
    if pred_mask is not None:
        pred_mask = pred_mask.to(dtype)
    if presence == "feature":
        mask = pred.new_ones(pred.shape[:-1]) if pred_mask is None else pred_mask
        pred, pred_mask = torch.cat([pred, mask.unsqueeze(-1)], -1), None
        mask = target.new_ones(target.shape[:-1]) if target_mask is None else target_mask.to(dtype)
        target = torch.cat([target, mask.unsqueeze(-1)], -1)
    if pred.dim() == 4:
        steps = len(pred)
        pred = pred.flatten(0, 1)
        pred_mask = None if pred_mask is None else pred_mask.flatten(0, 1)
        target = target.expand(steps, *target.shape).flatten(0, 1)
        present = None if present is None else present.expand(steps, *present.shape).flatten(0, 1)
    return Sets(pred, target, pred_mask, present, shape)
