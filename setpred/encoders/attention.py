"""AttentionEncoder: elements attend to each other, then they are pooled."""

from __future__ import annotations  # torch.compile cannot evaluate the annotations of nested functions

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from setpred._checks import check_choice, check_count
from setpred.encoders.base import joined
from setpred.encoders.pool import POOLS, Pool, PoolName
from setpred.encoders.scaling import divisor

# Of the last layer. Both are fitted, so that the curvature of a fresh encoder is about 0.6.
POOLED_GAIN = 1.1
ATTENDED_GAIN = 0.65  # with pool="attention"
BRANCH = 0.5  # Of what a layer adds to the elements, over the square root of the number of layers.


class AttentionEncoder(nn.Module):
    r"""Set encoder whose elements attend to each other before they are pooled.

    .. math::
        X_0 &= W\,[y_i; m_i] + b, \qquad
        X_l = \mathrm{MAB}(X_{l-1}, X_{l-1}) \;\text{ or }\; \mathrm{MAB}(X_{l-1}, \mathrm{MAB}(I_l, X_{l-1})) \\
        R &= \operatorname{relu}(X_L W'' + b''), \qquad
        H(Y) = \tfrac{1}{\delta}\operatorname{pool}_i\,(R_i W' + b') \;\text{ or }\;
        \sqrt{1 + \textstyle\sum_j m_j}\; \mathrm{MAB}(s, R)\, W' + b' \\
        \mathrm{MAB}(X, Y) &= A + \operatorname{relu}(A W_f + b_f), \qquad A = X + \mathrm{Multihead}(X, Y, Y)

    with learned inducing points I, the divisor :math:`\delta` of conditioned encoders
    (:doc:`/concepts/inner_optimisation`) and, in the second form of H, with ``pool="attention"``, a learned query s.
    There is no layer normalisation: on nearly equal elements it multiplies small differences, and the curvature of the
    inner loss with them. In every head, the weight of element j for query i is

    .. math::
        a_{ij} = \frac{m_j \exp(m_j l_{ij})}{1 + \sum_k m_k \exp(m_k l_{ik})}, \qquad
        l_{ij} = \frac{\hat q_i \cdot \hat k_j}{\sqrt{d}}, \qquad \hat q = q \big/ \sqrt{1 + \lVert q \rVert^2 / d}

    **The mask** is a feature of each element, as in the other encoders, and the weight that it is attended to with. Its
    derivatives are continuous and bounded, also at 0, where an element may come back: the mask scales the logit too,
    and queries and keys have bounded norm, where :math:`\exp(l_{ij})` alone would make the step from absent to present
    as steep as it is large. With ``pool="attention"`` an absent element, of mask 0, changes nothing, nor does the
    number of rows that a set is padded to, and an empty set has a vector. Other pools take the rows of absent elements
    too, as in :class:`PooledEncoder`.

    **For decoding** keep ``pool="fspool"``: with ``"attention"`` decoders learn badly, since an element that changes
    nothing has no gradient by which it could come back (:doc:`/masks`).

    **Equal elements** matter: weights that sum to one would be the same for {a} and {a, a}. The 1 in the denominator,
    an element of logit and value 0, tells them apart, and the square root brings a growth with the size that does not
    fade. Except with FSPool, equal elements get equal gradients: start the descent from distinct ones, as
    ``init="learned"`` and ``"random"`` do (:doc:`/concepts/multisets`).

    Args:
        in_channels: Features C of an element, without the mask.
        out_channels: Size D of the representation.
        hidden_channels: Width of all layers, a multiple of ``heads``.
        layers: Number of layers of attention between the elements.
        heads: Number of heads of each attention.
        inducing_points: Number of learned points that stand between the elements, for time and memory that grow with N;
            None lets all attend to all, N^2.
        pool: ``"fspool"``, ``"sum"``, ``"mean"``, ``"max"``; ``"attention"``, that of a Set Transformer, in which a
            learned query attends to all elements; or a module ``(B, N, D) -> (B, D)``, which is never scaled.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a number is out of its range, ``hidden_channels`` is no multiple of ``heads``, or the pool is
            unknown.

    Example:
        >>> encoder = AttentionEncoder(in_channels=4, out_channels=64)
        >>> encoder(torch.rand(8, 10, 4)).shape
        torch.Size([8, 64])

    Source: Lee et al., Set Transformer (ICML 2019), section 3, without its layer normalisation; the element of value 0:
    ``add_zero_attn`` of `torch.nn.MultiheadAttention`. Mask, bounded norm, size and the other pools are ours.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int = 256,
        *,
        layers: int = 1,
        heads: int = 4,
        inducing_points: int | None = None,
        pool: PoolName | Literal["attention"] | nn.Module = "fspool",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("in_channels", in_channels)
        check_count("out_channels", out_channels)
        check_count("hidden_channels", hidden_channels)
        check_count("layers", layers)
        check_count("heads", heads)
        if inducing_points is not None:
            check_count("inducing_points", inducing_points)
        if hidden_channels % heads != 0:
            raise ValueError(f"`hidden_channels` must be a multiple of `heads`, got {hidden_channels} and {heads}")
        self.in_channels, self.out_channels, self.inducing_points = in_channels, out_channels, inducing_points
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed = nn.Linear(in_channels + 1, hidden_channels, **options)
        self.layers = nn.ModuleList(
            _SelfAttention(hidden_channels, heads, inducing_points, BRANCH * layers**-0.5, **options)
            for _ in range(layers)
        )
        self.feed = nn.Linear(hidden_channels, hidden_channels, **options)
        self.out = nn.Linear(hidden_channels, out_channels, **options)
        if isinstance(pool, nn.Module):
            self.pool = pool
        elif pool == "attention":
            self.pool = _AttentionPool(hidden_channels, heads, **options)
        else:
            check_choice("pool", pool, (*POOLS, "attention"))
            self.pool = Pool(pool, out_channels, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters; a pool of one's own is left alone."""
        attended = isinstance(self.pool, _AttentionPool)
        _draw(self.embed)
        _draw(self.feed, 2**0.5)
        _draw(self.out, ATTENDED_GAIN * (self.in_channels + 1) ** 0.25 if attended else POOLED_GAIN)
        nn.init.normal_(self.embed.bias, std=(self.in_channels + 1) ** -0.5)  # zeros would hide elements at 0
        for layer in self.layers:
            assert isinstance(layer, _SelfAttention)  # for mypy: nn.ModuleList forgets it
            layer.reset_parameters()
        if isinstance(self.pool, _AttentionPool | Pool):
            self.pool.reset_parameters()

    def forward(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode sets.

        Args:
            elements: Shape ``(B, N, in_channels)``, N >= 1.
            mask: Bool or float in [0, 1], shape ``(B, N)``; None means that all are present. Where a bool mask is
                False, elements may be anything, NaN included, and are taken for 0. Where a float one is 0, give zeros;
                with ``pool="attention"`` anything finite, which only the gradient of the mask depends on.

        Returns:
            Shape ``(B, out_channels)``.

        Raises:
            ValueError: If a shape is wrong.
            TypeError: If a dtype is wrong.
        """
        attended = isinstance(self.pool, _AttentionPool)
        x, presence = joined(elements, mask, self.in_channels)
        if mask is not None and mask.dtype == torch.bool:
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, presence)
        x = F.relu(self.feed(x))
        vector: Tensor = self.out(self.pool(x, presence)) if attended else self.pool(self.out(x))
        if isinstance(self.pool, Pool):
            size = presence.shape[1]
            vector = vector / divisor("conditioned", self.pool, size, size, self.in_channels + 1, self.out_channels)
        return vector

    @override
    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, inducing_points={self.inducing_points}"


class _AttentionPool(nn.Module):
    """PMA: a learned query, the seed, attends to elements (B, N, H), times a root of how many there are: (B, H)."""

    def __init__(
        self, channels: int, heads: int, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.seed = nn.Parameter(torch.empty(1, channels, device=device, dtype=dtype))
        self.attention = _Attention(channels, heads, 1.0, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.seed, std=self.seed.shape[1] ** -0.5)
        self.attention.reset_parameters()

    def forward(self, x: Tensor, presence: Tensor) -> Tensor:
        pooled: Tensor = self.attention(self.seed.expand(x.shape[0], -1, -1), x, presence).squeeze(1)
        return pooled * (1 + presence.sum(1, keepdim=True)).sqrt()


class _SelfAttention(nn.Module):
    """SAB, or with inducing points ISAB: elements (B, N, H) attend to each other."""

    def __init__(
        self,
        channels: int,
        heads: int,
        inducing_points: int | None,
        gain: float,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.points: nn.Parameter | None
        self.gather = None
        if inducing_points is None:
            self.register_parameter("points", None)
        else:
            self.points = nn.Parameter(torch.empty(inducing_points, channels, device=device, dtype=dtype))
            self.gather = _Attention(channels, heads, gain, device=device, dtype=dtype)
        self.spread = _Attention(channels, heads, gain, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        if self.points is not None:
            nn.init.normal_(self.points)
        for block in (self.gather, self.spread):
            if block is not None:
                block.reset_parameters()

    def forward(self, x: Tensor, presence: Tensor) -> Tensor:
        result: Tensor
        if self.points is None or self.gather is None:
            result = self.spread(x, x, presence)
        else:
            gathered = self.gather(self.points.expand(x.shape[0], -1, -1), x, presence)
            result = self.spread(x, gathered, presence.new_ones(gathered.shape[:2]))
        return result


class _Attention(nn.Module):
    """MAB: queries (B, Q, H) attend to elements (B, N, H) of which some are present, then each goes on by itself."""

    def __init__(
        self,
        channels: int,
        heads: int,
        gain: float,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.heads, self.gain = heads, gain
        self.query = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.key = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.value = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.out = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.feed = nn.Linear(channels, channels, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        for layer in (self.query, self.key, self.value):
            _draw(layer)
        _draw(self.out, self.gain)
        _draw(self.feed, min(self.gain, BRANCH))

    def forward(self, x: Tensor, y: Tensor, presence: Tensor) -> Tensor:
        def by_head(rows: Tensor) -> Tensor:
            return rows.view(*rows.shape[:2], self.heads, rows.shape[-1] // self.heads).transpose(1, 2)

        query, key, value = _bounded(by_head(self.query(x))), _bounded(by_head(self.key(y))), by_head(self.value(y))
        presence = presence[:, None, None]
        logits = query @ key.mT * (query.shape[-1] ** -0.5 * presence)
        shift = logits.detach().amax(-1, keepdim=True).clamp(min=0)  # changes no weight, only what exp() can hold
        weights = presence * (logits - shift).exp()
        weights = weights / (weights.sum(-1, keepdim=True) + (-shift).exp())
        x = x + self.out((weights @ value).transpose(1, 2).flatten(2))
        return x + F.relu(self.feed(x))


def _bounded(x: Tensor) -> Tensor:
    """Vectors (..., d) of norm below sqrt(d): small ones as they are."""
    return x * (1 + x.square().mean(-1, keepdim=True)).rsqrt()


def _draw(layer: nn.Linear, gain: float = 1.0) -> None:
    nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5)
    nn.init.zeros_(layer.bias)
