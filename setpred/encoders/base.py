"""What every set encoder is: the protocol, and what the encoders of this library share."""

from __future__ import annotations  # torch.compile cannot evaluate the annotations of nested functions

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as nn_module
from typing_extensions import override

from setpred._checks import check_choice, check_count, check_mask, check_shape
from setpred.encoders.fspool import FSPool
from setpred.encoders.pool import Pool, PoolName
from setpred.encoders.scaling import SCALINGS, Scaling, divisor, draw


@runtime_checkable
class SetEncoder(Protocol):
    """Anything that maps a batch of sets to a batch of vectors; decoders ask for nothing more.

    It is called as ``encoder(elements, mask)`` with elements ``(B, N, C)`` and a float mask ``(B, N)`` in [0, 1]
    (1 = present) or None (all present), and returns ``(B, D)``. To decode sets with it, it must

    - not depend on the order of the elements, nor on the other samples of the batch;
    - be differentiable twice (training differentiates its gradient). Before PyTorch 2.14, `torch.cdist` is not.

    An encoder may know its own gradient, which saves decoders PyTorch's autograd: a method ``vjp(elements, mask)`` that
    returns the vectors and, as `torch.func.vjp` does, a function from the gradient with respect to these, ``(B, D)``,
    to those with respect to elements and mask (None where there is no mask); or None in place of both where it does
    not know. Both must be differentiable. PooledEncoder and RelationEncoder have it. Where a subclass has another
    ``forward`` or ``__call__``, the inherited ``vjp`` is not used.

    Example:
        >>> def mean_encoder(elements, mask):
        ...     return elements.mean(1) if mask is None else (elements * mask.unsqueeze(-1)).mean(1)
        >>> isinstance(mean_encoder, SetEncoder)
        True

    Source: Zhang et al. (NeurIPS 2019), section 2 and Appendix A.
    """

    def __call__(self, elements: Tensor, mask: Tensor | None, /) -> Tensor:
        """Encode sets ``(B, N, C)`` with masks ``(B, N)`` into vectors ``(B, D)``."""
        ...


def parameter_dtype(encoder: object) -> torch.dtype | None:
    """Dtype of an encoder's first floating parameter, None if it has none: what it is given is cast to that."""
    for parameter in encoder.parameters() if isinstance(encoder, nn.Module) else ():
        if parameter.is_floating_point():
            return parameter.dtype
    return None


def encode(encoder: SetEncoder, elements: Tensor, mask: Tensor | None) -> Tensor:
    """Call an encoder with sets of any dtype."""
    dtype = parameter_dtype(encoder) or elements.dtype
    return encoder(elements.to(dtype), None if mask is None else mask.to(dtype))


Pull = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # gradient with respect to vectors to that of elements and mask

relu_backward = torch.ops.aten.threshold_backward.default  # (gradient, result, 0); masked_fill is 30 times slower

_LINEAR = nn.Linear.forward
_PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor)


def are_plain(*layers: nn.Module) -> bool:
    """Whether these layers do what `nn.Linear` does and no more, so that their products may be taken in another way.

    What lives in the call of a layer (adapters, hooks, parametrisations, quantisation) would be passed by.
    """
    for layer in layers:
        if (
            type(layer) is not nn.Linear
            or nn.Linear.forward is not _LINEAR
            or type(layer.weight) not in _PLAIN_TENSORS
            or type(layer.bias) not in _PLAIN_TENSORS
        ):
            return False
    return are_unhooked(*layers)


def are_unhooked(*modules: nn.Module) -> bool:
    """Whether a call of these modules is their class's forward and no more."""
    hooks = [
        nn_module._global_forward_pre_hooks,
        nn_module._global_forward_hooks,
        nn_module._global_backward_pre_hooks,
        nn_module._global_backward_hooks,
    ]
    for module in modules:
        if "forward" in module.__dict__:  # put in its place, as by accelerate
            return False
        hooks += [module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks]
    return not sum(map(len, hooks))  # PyTorch 2.7 does not compile any() here


def joined(elements: Tensor, mask: Tensor | None, channels: int) -> tuple[Tensor, Tensor]:
    """Check elements (B, N, channels) and their mask; return elements with the mask as a feature, and the mask."""
    check_shape("elements", elements, "B", "N", channels)
    batch, size, _ = elements.shape
    if size == 0:
        raise ValueError(
            f"`elements` must have at least one row; an empty set is rows of mask 0, got shape {tuple(elements.shape)}"
        )
    check_mask("mask", mask, (batch, size))
    presence = elements.new_ones(batch, size) if mask is None else mask.to(elements.dtype)
    return torch.cat([elements, presence.unsqueeze(-1)], -1), presence


class EncoderBase(nn.Module):
    """What PooledEncoder and RelationEncoder share: checks, the mask as a feature, pool, scaling, the size feature.

    Subclasses compute ``_rows``, the features of every row to pool, channel-major: (channels, B, rows), contiguous
    along the rows, as the sort in FSPool reads them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        pool: PoolName | nn.Module,
        *,
        scaling: Scaling,
        size_feature: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_count("in_channels", in_channels)
        check_count("out_channels", out_channels, 1 + int(size_feature))
        check_choice("scaling", scaling, SCALINGS)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.scaling: Scaling = scaling
        self.size_feature = size_feature
        self.row_channels = out_channels - int(size_feature)
        self.pool = pool if isinstance(pool, nn.Module) else Pool(pool, self.row_channels, device, dtype)

    def reset_parameters(self) -> None:
        """Draw new parameters, as ``scaling`` says; a pool of one's own is left alone."""
        for child in self.children():
            for layer in child.modules() if child is not self.pool else ():
                if isinstance(layer, nn.Linear):
                    draw(layer, self.scaling)
        if isinstance(self.pool, Pool):
            self.pool.reset_parameters()

    def _rows(self, x: Tensor) -> Tensor:
        """Map elements with their mask (B, N, C+1) to the rows to pool, (row_channels, B, rows)."""
        raise NotImplementedError

    def _rows_vjp(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """As ``_rows``, and its gradient: from that of the rows to that of x."""
        raise NotImplementedError

    def forward(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode sets.

        Args:
            elements: Shape ``(B, N, in_channels)``, N >= 1.
            mask: Bool or float in [0, 1], shape ``(B, N)``; None means that all are present. It is one more
                feature of each element: absent elements are not cut out, so give zeros in their place.

        Returns:
            Shape ``(B, out_channels)``.

        Raises:
            ValueError: If a shape is wrong.
            TypeError: If a dtype is wrong.
        """
        x, presence = joined(elements, mask, self.in_channels)
        rows = self._rows(x)
        vector: Tensor = self.pool(rows.movedim(0, -1))
        return self._finished(vector, presence, rows.shape[-1])

    def _finished(self, vector: Tensor, presence: Tensor, rows: int) -> Tensor:
        """Scale what came of the pool, and add the size."""
        size = presence.shape[1]
        if isinstance(self.pool, Pool):
            vector = vector / self._divisor(size, rows)
        if self.size_feature:
            vector = torch.cat([vector, self._size_factor(size) * presence.mean(1, keepdim=True)], 1)
        return vector

    def _divisor(self, size: int, rows: int) -> float:
        assert isinstance(self.pool, Pool)
        return divisor(self.scaling, self.pool, size, rows, self.in_channels + 1, self.row_channels)

    def _size_factor(self, size: int) -> float:
        return 2 * size**0.5 if self.scaling == "conditioned" else 4

    def _is_known(self, *layers: nn.Module) -> bool:
        """Whether a call of this encoder is no more than the library's own: layers, pool, and nothing around them."""
        pool = self.pool
        if type(pool) is not Pool or not are_plain(*layers) or not are_unhooked(self, pool):
            return False
        sort = pool.fspool
        return sort is None or (type(sort) is FSPool and sort.relaxed is None and are_unhooked(sort))

    def _vjp(self, elements: Tensor, mask: Tensor | None) -> tuple[Tensor, Pull]:
        """What a subclass returns from ``vjp`` if its layers are plain and the pool is the library's."""
        x, presence = joined(elements, mask, self.in_channels)
        size = presence.shape[1]
        rows, rows_pull = self._rows_vjp(x)
        assert isinstance(self.pool, Pool)
        pooled, pool_pull = self.pool.vjp(rows)
        scale = self._divisor(size, rows.shape[-1])

        def pull(grad: Tensor) -> tuple[Tensor, Tensor | None]:
            of_x = rows_pull(pool_pull(grad[:, : self.row_channels] / scale))
            of_mask = of_x[..., -1]
            if self.size_feature:
                of_mask = of_mask + grad[:, -1:] * (self._size_factor(size) / size)
            return of_x[..., :-1], None if mask is None else of_mask

        return self._finished(pooled, presence, rows.shape[-1]), pull

    @override
    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, size_feature={self.size_feature}, scaling={self.scaling!r}"
