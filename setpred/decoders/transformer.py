"""TransformerDecoder: queries become elements by attention to each other and to what is decoded."""

import math
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from setpred._checks import (
    check_choice,
    check_count,
    check_mask,
    check_number,
    check_shape,
    check_tensor,
    in_transform,
)
from setpred.decoders._queries import QUERIES
from setpred.decoders.direct import DirectDecoder, relative
from setpred.functional._precision import common_dtype
from setpred.scaler import StandardScaler
from setpred.sets import SetPrediction, Trajectory


class TransformerDecoder(DirectDecoder):
    r"""Decode vectors or tokens into sets by attention: the decoder of DETR.

    N queries :math:`X_0` pass L layers, each of self-attention of the elements, attention to the tokens and an MLP of
    each element, and become sets by one linear map W:

    .. math:: X_l = \operatorname{layer}_l(X_{l-1}, \operatorname{tokens}), \qquad
              \hat Y_l = W \operatorname{LayerNorm}(X_l)

    No layer sees an order: permuting the queries permutes the elements. A vector is decoded as one token. The layers
    are `torch.nn.TransformerDecoderLayer`, with MLPs of four times the width.

    Every layer predicts a set: DETR's auxiliary loss is a set loss of the trajectory. The mask predicts the size too,
    as its sum: none has to be predicted first, and none given.

    Args:
        in_channels: Size D of the vectors or tokens.
        set_size: Largest number of elements N.
        channels: Features C of an element, without the mask.
        hidden_channels: Width of the layers, a multiple of ``heads``.
        layers: Number of layers L; DETR has 6 of width 256.
        heads: Number of attention heads.
        queries: :math:`X_0`: ``"learned"``, N parameters (DETR); ``"random"``, standard normal, drawn at each call
            (TSPN); or ``"top-n"``, of 2N learned reference points those whose learned angles have the largest cosines
            with an angle made of the vector, or of the mean token, each scaled and shifted by its cosine (Top-N).
        norm_first: Whether a layer normalises what its parts are given, which learns at larger learning rates, or each
            sum of theirs (DETR).
        dropout: Probability of zeroing in the layers, while training.
        mask_clamp: Range of the predicted mask; None predicts no mask (sets of fixed size).
        scaler: Standardises elements: the decoder works in its coordinates, and returns elements in the users'; see
            :class:`setpred.StandardScaler`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a number is out of its range, ``queries`` is unknown, ``hidden_channels`` is no multiple of
            ``heads``, or ``scaler`` has other channels.

    Example:
        >>> from setpred import HungarianLoss
        >>> decoder = TransformerDecoder(32, set_size=30, channels=2, hidden_channels=64, layers=3)
        >>> tokens = torch.randn(8, 49, 32)  # of a feature map: feature_map.flatten(2).mT
        >>> elements, mask, steps = decoder(tokens)
        >>> elements.shape, mask.shape, steps.elements.shape
        (torch.Size([8, 30, 2]), torch.Size([8, 30]), torch.Size([3, 8, 30, 2]))
        >>> target, target_mask = torch.rand(8, 30, 2), torch.rand(8, 30) < 0.5
        >>> loss = HungarianLoss()(steps.elements, target, steps.mask, target_mask)  # a mean over layers

    Source: Carion et al., End-to-End Object Detection with Transformers (ECCV 2020); ``norm_first``: Xiong et al., On
    Layer Normalization in the Transformer Architecture (ICML 2020); random queries: Kosiorek, Kim, Rezende, Conditional
    Set Generation with Transformers (2020); Top-N: Vignac and Frossard, Top-N: Equivariant Set and Graph Generation
    without Exchangeability (ICLR 2022).
    """

    def __init__(
        self,
        in_channels: int,
        set_size: int,
        channels: int,
        hidden_channels: int = 256,
        *,
        layers: int = 6,
        heads: int = 8,
        queries: Literal["learned", "random", "top-n"] = "learned",
        norm_first: bool = True,
        dropout: float = 0.0,
        mask_clamp: tuple[float, float] | None = (0.0, 1.0),
        scaler: StandardScaler | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, set_size, channels, hidden_channels, mask_clamp=mask_clamp, scaler=scaler)
        check_count("layers", layers)
        check_count("heads", heads)
        check_choice("queries", queries, QUERIES)
        if hidden_channels % heads != 0:
            raise ValueError(f"`hidden_channels` must be a multiple of `heads`, got {hidden_channels} and {heads}")
        check_number("dropout", dropout)
        if not 0 <= dropout <= 1:
            raise ValueError(f"`dropout` must lie in [0, 1], got {dropout!r}")
        # They are where elements start. DETR starts from zeros instead, and adds its queries to what attends: of one
        # token, all elements would then stay alike.
        self.queries = QUERIES[queries](set_size, hidden_channels, device=device, dtype=dtype)
        self.input = nn.Linear(in_channels, hidden_channels, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                hidden_channels,
                heads,
                4 * hidden_channels,
                dropout,
                batch_first=True,
                norm_first=norm_first,
                device=device,
                dtype=dtype,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden_channels, device=device, dtype=dtype)
        self.output = nn.Linear(hidden_channels, self.out_channels, device=device, dtype=dtype)
        self.reset_parameters()

    @override
    def reset_parameters(self) -> None:
        """Draw new parameters: matrices of layers after Xavier, their biases 0; maps by `nn.Linear`; queries normal."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()
        for name, parameter in self.layers.named_parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.queries.reset_parameters()

    def forward(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        *,
        record: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> SetPrediction:
        """Decode vectors or tokens into sets.

        Args:
            z: Vectors ``(B, in_channels)``, or S >= 1 tokens of each sample, ``(B, S, in_channels)``.
            mask: Which tokens are present, bool or float in [0, 1], shape ``(B, S)``; None means that all are. What
                absent tokens hold is not seen; a token of mask 0.5 weighs half. A sample of which all are absent is
                decoded from a token of zeros.
            record: Whether to keep every layer's sets as the trajectory; by default in training mode only.
            generator: Source of random queries.

        Returns:
            The last layer's sets, with those of all layers, shape ``(L, B, N, C)``, if recorded; masks in
            ``mask_clamp``.

        Raises:
            ValueError: If a shape is wrong, or vectors come with a mask.
            TypeError: If a dtype is wrong.
        """
        z, weight = self._entered(z, mask)
        tokens = self.input(z)
        mean, bias = tokens.mean(1), None
        if weight is not None:
            mean = (weight.unsqueeze(-1) * tokens).sum(1) / weight.sum(1, keepdim=True)
            absent = weight == 0
            bias = weight.masked_fill(absent, 1).log().masked_fill(absent, -math.inf).to(tokens.dtype)
        elements = self.queries(mean.to(self.norm.weight.dtype), generator)
        transformed = not torch.compiler.is_compiling() and in_transform()
        # Without gradients, `nn.MultiheadAttention` has a kernel of its own, which neither vmap nor torch.compile of
        # PyTorch 2.7 knows; a mask keeps it from that.
        aside = transformed or (torch.compiler.is_compiling() and not torch.is_grad_enabled())
        no_mask = elements.new_zeros(self.set_size, self.set_size) if aside else None
        steps = []
        # Fused attention has neither vmap nor forward mode.
        with sdpa_kernel(SDPBackend.MATH) if transformed else nullcontext():
            for layer in self.layers:
                elements = layer(elements, tokens, no_mask, memory_key_padding_mask=bias)
                steps.append(elements)
        if not (self.training if record is None else record):
            return self._as_prediction(self.output(self.norm(elements)))
        sets, masks, _ = self._as_prediction(self.output(self.norm(torch.stack(steps))))
        return SetPrediction(sets[-1], masks[-1], Trajectory(sets, masks))

    def _entered(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, S, D), zero where absent, and their weights (B, S) if there is a mask, not all zero."""
        check_tensor("z", z)
        if z.dim() != 3:
            check_shape("z", z, "B", self.in_channels)
            if mask is not None:
                raise ValueError("`mask` must be None where `z` is a vector of each sample, got one: it is of tokens")
            return z.unsqueeze(1), None
        check_shape("z", z, "B", "S", self.in_channels)
        check_mask("mask", mask, z.shape[:2])
        if z.shape[1] == 0:
            raise ValueError(f"`z` must have at least one token; none is one of mask 0, got shape {tuple(z.shape)}")
        if mask is None or len(z) == 0:  # `nn.MultiheadAttention` takes no mask of an empty batch
            return z, None
        weight = mask.to(common_dtype(mask))
        absent = weight == 0
        weight = weight.masked_fill(absent.all(1, keepdim=True), 1)
        return z.masked_fill(absent.unsqueeze(-1), 0), relative(weight)
