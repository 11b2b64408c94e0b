"""DSPNLoss: the outer loss, a set loss over the trajectory plus the weighted representation loss."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from typing_extensions import override

from setpred._checks import check_at_least, check_choice, check_finite, check_mask, check_shape, check_soft_mask
from setpred.encoders.base import SetEncoder, encode
from setpred.functional.representation import KINDS, Kind
from setpred.losses._common import ScaledLoss, as_encoded, scaler_repr
from setpred.losses.representation import representation_loss
from setpred.scaler import StandardScaler
from setpred.sets import SetPrediction

SetLoss = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


class DSPNLoss(ScaledLoss):
    r"""Outer loss of a set predictor that decodes with an encoder.

    .. math:: \mathcal{L} = \frac{1}{T+1} \sum_{t=0}^{T} \mathcal{L}_\text{set}(\hat Y_t, Y)
              + \lambda\, \mathcal{L}_\text{repr}(Y, z)

    The second term makes the target set itself encode to z; an autoencoder, whose z is that encoding, leaves it out.
    An encoding depends on the number of rows: a target of fewer rows than the prediction's N is first padded to N with
    absent elements. It is encoded in the dtype of the encoder's parameters. The loss keeps no parameters: the encoder
    stays the decoder's, and is not in the loss's ``state_dict``.

    Args:
        encoder: The decoder's set encoder H.
        set_loss: Called as ``set_loss(pred, target, pred_mask, target_mask)`` with ``pred`` ``(B, N, C)`` or
            ``(T+1, B, N, C)``; returns a scalar. :class:`setpred.HungarianLoss` or :class:`setpred.ChamferLoss`.
        repr_weight: Weight :math:`\lambda`; the paper has 0.1 on CLEVR.
        repr_loss: ``"huber"`` or ``"mse"``; the decoder's own.
        steps: ``"all"`` averages the set loss over the trajectory, :math:`Y_0` included (the paper); ``"last"``
            takes the prediction alone.
        scaler: The decoder's: both terms are measured in its coordinates. It is given here and not to ``set_loss``,
            which gets standardised elements. It is not registered either.

    Raises:
        ValueError: If a number is out of its range, a choice is unknown, or ``set_loss`` has a scaler of its own.
        TypeError: If ``encoder`` or ``set_loss`` cannot be called.

    Example:
        >>> import torch
        >>> from setpred import DSPNDecoder, DSPNLoss, HungarianLoss, PooledEncoder
        >>> encoder = PooledEncoder(in_channels=2, out_channels=16)
        >>> decoder = DSPNDecoder.paper(encoder, set_size=5, channels=2)
        >>> loss = DSPNLoss(encoder, HungarianLoss())
        >>> z, target = torch.randn(3, 16), torch.rand(3, 5, 2)
        >>> loss(decoder(z), target, z=z).shape
        torch.Size([])

    Source: Zhang et al. (NeurIPS 2019), equation 6 and section 3.2 (all steps).
    """

    def __init__(
        self,
        encoder: SetEncoder,
        set_loss: SetLoss,
        *,
        repr_weight: float = 0.1,
        repr_loss: Kind = "huber",
        steps: Literal["all", "last"] = "all",
        scaler: StandardScaler | None = None,
    ) -> None:
        super().__init__(scaler)
        for name, value in (("encoder", encoder), ("set_loss", set_loss)):
            if not callable(value):
                raise TypeError(f"`{name}` must be callable, got {value!r} ({type(value).__name__})")
        if isinstance(set_loss, ScaledLoss) and set_loss.scaler is not None:
            raise ValueError(
                "`set_loss` must have no scaler of its own: give it to DSPNLoss, which measures both terms with it"
            )
        check_at_least("repr_weight", repr_weight, 0)
        check_finite("repr_weight", repr_weight)
        check_choice("repr_loss", repr_loss, KINDS)
        check_choice("steps", steps, ("all", "last"))
        self._encoder = (encoder,)  # in a tuple, nn.Module does not register it
        self.set_loss = set_loss
        self.repr_weight = repr_weight
        self.repr_loss: Kind = repr_loss
        self.steps = steps

    def forward(
        self,
        prediction: SetPrediction,
        target: Tensor,
        target_mask: Tensor | None = None,
        *,
        z: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            prediction: What the decoder returned.
            target: Target elements, shape ``(B, M, C)``. The set loss says whether M may be more than the prediction's
                N; with ``z`` it may not.
            target_mask: Bool or float {0, 1}, shape ``(B, M)``; None means that all are present. Values of absent
                elements are not seen.
            z: What the decoder was given, shape ``(B, D)``; None leaves out the representation term.

        Returns:
            A scalar.

        Raises:
            ValueError: If a shape is wrong, or ``steps="all"`` and the prediction has no trajectory to train through.
            TypeError: If a dtype is wrong, or ``prediction`` is no :class:`setpred.SetPrediction`.
        """
        if not isinstance(prediction, SetPrediction):
            raise TypeError(f"`prediction` must be a SetPrediction, got {type(prediction).__name__}")
        check_shape("prediction.elements", prediction.elements, "B", "N", "C")
        batch, rows, channels = prediction.elements.shape
        check_soft_mask("prediction.mask", prediction.mask, (batch, rows))
        check_shape("target", target, batch, "M", channels)
        check_mask("target_mask", target_mask, target.shape[:2])
        if self.steps == "last":
            elements, mask = prediction.elements, prediction.mask
        else:
            if prediction.trajectory is None:
                raise ValueError(
                    "`prediction` must carry its trajectory for steps='all': decode with record=True, or use "
                    "steps='last' (in evaluation mode, and with differentiate='implicit', nothing is recorded)"
                )
            elements, mask = prediction.trajectory.elements, prediction.trajectory.mask
            if prediction.elements.requires_grad and not elements.requires_grad:
                raise ValueError(
                    "`prediction` must carry a differentiable trajectory for steps='all': "
                    "differentiate='implicit' records it detached; use steps='last'"
                )
        elements, target = self._scaled(elements, target, "prediction.elements")
        if target.shape[1] > rows and z is not None and self.repr_weight > 0:
            # The surplus may be absent, but to see that would wait for the device.
            raise ValueError(
                "`target` must have at most as many rows as `prediction` to be encoded, "
                f"got {target.shape[1]} and {rows}"
            )
        target, target_mask = as_encoded(target, target_mask, rows)
        loss = self.set_loss(elements, target, mask, target_mask)
        check_shape("set_loss(pred, target, pred_mask, target_mask)", loss)
        if z is None or self.repr_weight == 0:
            return loss
        encoded = encode(self._encoder[0], target, target_mask)
        check_shape("encoder(target, target_mask)", encoded, batch, "D")
        check_shape("z", z, *encoded.shape)
        return loss + self.repr_weight * representation_loss(encoded, z, kind=self.repr_loss)

    @override
    def extra_repr(self) -> str:
        return f"repr_weight={self.repr_weight}, repr_loss={self.repr_loss!r}, steps={self.steps!r}" + scaler_repr(self)
