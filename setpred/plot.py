"""Pictures of a set on matplotlib's axes: its points, its boxes over an image, its descent; and of a diagnosis.

Each function draws on ``ax``, or on axes of a new figure, and returns them: limits, titles and files are matplotlib's.
What is less present is fainter. Tensors may lie on any device, in any floating dtype, and require gradients.

matplotlib is the extra ``plot``; it is imported only when something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from setpred._checks import check_mask, check_shape, check_tensor
from setpred.decoders import Diagnosis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_boxes", "draw_diagnosis", "draw_points", "draw_trajectory"]


def draw_points(elements: Tensor, mask: Tensor | None = None, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the points of a set, in the plane or in space, as opaque as they are present.

    Args:
        elements: Shape ``(N, 2)`` or ``(N, 3)``. A point that is not finite is not drawn.
        mask: Presence, bool or float in [0, 1], shape ``(N,)``; all present by default.
        ax: Where to draw, with ``projection="3d"`` for points in space.
        **style: Of matplotlib's ``Axes.scatter``: ``s``, ``color``, ``marker``, ``label`` and others.

    Returns:
        The axes.

    Raises:
        ValueError: If a shape is wrong, the mask is NaN somewhere, or ``ax`` has another number of dimensions.
        TypeError: If a dtype is wrong.
        ImportError: If matplotlib is not installed.

    Example:
        >>> from setpred import SetPrediction
        >>> elements, mask, _ = SetPrediction(torch.rand(8, 5, 2), torch.rand(8, 5))
        >>> ax = draw_points(elements[0], mask[0], color="black", s=9)
        >>> len(ax.collections[0].get_offsets())
        5
    """
    check_shape("elements", elements, "N", "C")
    opacity = _opacity(mask, elements)
    ax = _axes(ax, elements)
    points = _numbers(elements)
    kept = np.isfinite(points).all(1) if ax.name == "3d" else ...  # in space, `scatter` leaves others out
    ax.scatter(*points.T, **_faded(style, opacity, kept))
    ax.set_aspect("equal")
    return ax


def draw_trajectory(elements: Tensor, mask: Tensor | None = None, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the way of each element through the inner steps as a line, and a dot where it ends.

    Args:
        elements: A set's steps, ``prediction.trajectory.elements[:, b]`` of sample b: shape ``(T+1, N, 2)`` or
            ``(T+1, N, 3)``.
        mask: Presence at each step, ``prediction.trajectory.mask[:, b]``, shape ``(T+1, N)``. A line is as opaque as
            its element is present at the end.
        ax: Where to draw, with ``projection="3d"`` for points in space.
        **style: Of matplotlib's ``Axes.plot``: ``color`` (by default one for each element), ``linewidth`` and others.

    Returns:
        The axes.

    Raises:
        ValueError: If a shape is wrong, the mask is NaN somewhere, or ``ax`` has another number of dimensions.
        TypeError: If a dtype is wrong.
        ImportError: If matplotlib is not installed.

    Example:
        >>> from setpred import DSPNDecoder, PooledEncoder
        >>> decoder = DSPNDecoder(PooledEncoder(2, 16), iters=10, set_size=5, channels=2)
        >>> steps = decoder(torch.randn(3, 16), record=True).trajectory
        >>> ax = draw_trajectory(steps.elements[:, 0], steps.mask[:, 0])
        >>> len(ax.lines), len(ax.lines[0].get_xdata())
        (5, 11)
    """
    check_shape("elements", elements, "T+1", "N", "C")
    opacity = _opacity(mask, elements)
    ax = _axes(ax, elements)
    from matplotlib.cbook import normalize_kwargs
    from matplotlib.lines import Line2D

    shared = {"linewidth": 1.0, "marker": "o", "markersize": 4.0, "markevery": [-1], **normalize_kwargs(style, Line2D)}
    for i, path in enumerate(_numbers(elements).swapaxes(0, 1)):
        (line,) = ax.plot(*path.T, **shared)
        if opacity is not None and len(opacity) > 0:
            line.set_alpha(opacity[-1, i])
    ax.set_aspect("equal")
    return ax


def draw_boxes(
    boxes: Tensor,
    mask: Tensor | None = None,
    *,
    image: Tensor | None = None,
    normalized: bool = False,
    labels: Sequence[str] | None = None,
    ax: Axes | None = None,
    **style: Any,
) -> Axes:
    """Draw boxes as outlines, over an image or alone, as opaque as they are present; y points downwards.

    Args:
        boxes: Left, top, right, bottom, in pixels or whatever units the axes have, shape ``(N, 4)``; for other forms
            see :func:`setpred.functional.box_convert`.
        mask: Presence, bool or float in [0, 1], shape ``(N,)``; all present by default.
        image: What to draw under them: shape ``(3, H, W)``, ``(1, H, W)`` or ``(H, W)``, uint8 or floating in [0, 1].
        normalized: Whether boxes are in shares of the image's width and height instead of pixels.
        labels: Text for each box, in the colour of its outline.
        ax: Where to draw.
        **style: Of matplotlib's ``PolyCollection``, each one value or one for each box: ``edgecolors`` (by default one
            for each box), ``facecolors``, ``linewidths``, ``linestyles`` and others.

    Returns:
        The axes.

    Raises:
        ValueError: If a shape is wrong, the mask is NaN somewhere, ``normalized`` comes without an image, or there are
            not as many labels as boxes.
        TypeError: If a dtype is wrong.
        ImportError: If matplotlib is not installed.

    Example:
        >>> boxes = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.5, 0.2, 0.9, 0.8]])
        >>> ax = draw_boxes(boxes, image=torch.rand(3, 32, 48), normalized=True, labels=["cat", "dog"])
        >>> len(ax.images), [text.get_text() for text in ax.texts]
        (1, ['cat', 'dog'])
    """
    check_shape("boxes", boxes, "N", 4)
    opacity = _opacity(mask, boxes)
    if image is not None:
        if getattr(image, "dtype", None) != torch.uint8:
            check_tensor("image", image)
        if image.dim() not in (2, 3) or (image.dim() == 3 and image.shape[0] not in (1, 3)) or image.numel() == 0:
            raise ValueError(f"`image` must have shape (3, H, W), (1, H, W) or (H, W), got shape {tuple(image.shape)}")
    elif normalized:
        raise ValueError("`normalized` needs `image`, whose width and height it refers to")
    if labels is not None and len(labels) != len(boxes):
        raise ValueError(f"`labels` must hold one text for each of {len(boxes)} boxes, got {len(labels)}")
    ax = _axes(ax)
    from matplotlib.cbook import normalize_kwargs
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba_array

    edges = boxes.detach().cpu().double()
    if image is not None:
        height, width = image.shape[-2:]
        white = 255 if image.dtype == torch.uint8 else 1
        picture = image.detach().cpu().double().reshape(-1, height, width).movedim(0, -1) / white
        ax.imshow(picture.squeeze(-1).numpy(), "gray", vmin=0, vmax=1, extent=(0, width, height, 0))
        ax.set(xlim=(0, width), ylim=(height, 0))
        edges = edges * edges.new_tensor([width, height, width, height]) if normalized else edges
    elif not ax.yaxis_inverted():
        ax.invert_yaxis()
    corners = edges[:, [0, 1, 2, 1, 2, 3, 0, 3]].view(-1, 4, 2)
    style = normalize_kwargs(style, PolyCollection)
    if "color" in style:  # matplotlib's word for both
        style["facecolor"] = style["edgecolor"] = style.pop("color")
    colours = to_rgba_array([f"C{i}" for i in range(len(boxes))])
    shared: dict[str, Any] = {"facecolor": "none", "edgecolor": colours, "linewidth": 1.5, **style}
    outlines = PolyCollection(list(corners.numpy()), **_faded(shared, opacity))
    ax.add_collection(outlines)
    ax.autoscale_view()
    if len(outlines.get_edgecolor()) > 0:
        colours = np.resize(outlines.get_edgecolor(), colours.shape)
    for i, text in enumerate(() if labels is None else labels):
        left, top, right, bottom = edges[i].tolist()
        alpha = None if opacity is None else opacity[i]
        room = 0.0
        if image is not None and right > 0 and bottom > 0:  # where the box is seen, so is its label: inside if need be
            left, top, room = max(left, 0.0), max(top, 0.0), 0.1 * height
        va = "top" if top < room else "bottom"
        ax.text(left, top, text, color=colours[i, :3], alpha=alpha, fontsize="small", va=va, clip_on=True)
    ax.set_aspect("equal")
    return ax


def draw_diagnosis(diagnosis: Diagnosis, *, ax: Axes | None = None) -> Axes:
    """Draw what :meth:`setpred.DSPNDecoder.diagnose` found: how losses and errors fall, step by step.

    All are shares of what they are at the start, on a logarithmic axis: the representation loss up to T steps, the set
    error after 0, T, 2T and 4T steps, and, where they are not 0, the set error after T steps that start at the target,
    and the representation loss of the target itself. The title is what the verdicts begin with; print the diagnosis for
    all of them.

    Args:
        diagnosis: What was found.
        ax: Where to draw.

    Returns:
        The axes.

    Raises:
        TypeError: If it is no diagnosis.
        ImportError: If matplotlib is not installed.

    Example:
        >>> from setpred import DSPNDecoder, PooledEncoder
        >>> encoder = PooledEncoder(2, 16)
        >>> decoder, target = DSPNDecoder(encoder, lr=1e-9, set_size=5, channels=2), torch.randn(8, 5, 2)
        >>> draw_diagnosis(decoder.diagnose(encoder(target), target)).get_title(loc="left")
        'The descent does not move the set'
    """
    if not isinstance(diagnosis, Diagnosis):
        raise TypeError(f"`diagnosis` must be what `DSPNDecoder.diagnose` returns, got {type(diagnosis).__name__}")
    ax = _axes(ax)
    loss, error, last = diagnosis.loss, torch.tensor(diagnosis.set_error), diagnosis.steps[1]
    ax.plot((loss / loss[0]).numpy(), label="representation loss")
    ax.plot(diagnosis.steps, (error / error[0]).numpy(), "o-", label="set error")
    if diagnosis.target_error[1] > 0:
        ax.plot(last, diagnosis.target_error[1] / error[0].item(), "s", label="set error, begun at the target")
    if diagnosis.target_loss > 0:
        ax.axhline(diagnosis.target_loss / loss[0].item(), linestyle=":", label="representation loss of the target")
    ax.set(xlabel="inner step", ylabel="share of the start's", yscale="log")
    ax.set_title("\n".join(verdict.partition(":")[0] for verdict in diagnosis.verdicts), loc="left", fontsize="medium")
    ax.legend(fontsize="small")
    return ax


def _axes(ax: Axes | None, elements: Tensor | None = None) -> Axes:
    """Those given, or of a new figure; three-dimensional for elements of three channels."""
    channels = 2 if elements is None else elements.shape[-1]
    if channels not in (2, 3):
        raise ValueError(f"`elements` must have 2 or 3 channels to be drawn, got {channels}: choose some by slicing")
    projection = "3d" if channels == 3 else "rectilinear"
    if ax is None:
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError("`setpred.plot` needs matplotlib: pip install 'setpred[plot]'") from error
        return plt.figure().add_subplot(projection=projection)
    if (ax.name == "3d") != (channels == 3):
        raise ValueError(f"`ax` must have projection={projection!r} for what is drawn, got {ax.name!r}")
    return ax


def _numbers(elements: Tensor) -> Any:
    return elements.detach().cpu().double().numpy()


def _opacity(mask: Tensor | None, elements: Tensor) -> Any:
    check_mask("mask", mask, elements.shape[:-1])
    if mask is None:
        return None
    if bool(mask.isnan().any()):
        raise ValueError("`mask` must not be NaN")
    return _numbers(mask).clip(0, 1)


def _faded(style: dict[str, Any], opacity: Any, kept: Any = ...) -> dict[str, Any]:
    """A style of a collection, with an opacity for each of its members, of which some are kept."""
    from matplotlib.cbook import normalize_kwargs
    from matplotlib.collections import Collection
    from matplotlib.colors import to_rgba_array

    style = normalize_kwargs(style, Collection)
    if opacity is None or opacity.size == 0:
        return style
    hollow = _is_word(style.get("facecolor"), "none")
    if hollow:
        style.setdefault("edgecolor", "C0")
    for name in ("color", "facecolor", "edgecolor"):  # matplotlib wants as many colours as opacities
        if name in style and not _is_word(style[name], "none", "face"):
            style[name] = np.resize(to_rgba_array(style[name]), (len(opacity), 4))[kept]
            style[name][:, 3] = opacity[kept]
    return style | {"alpha": None if hollow else opacity[kept]}


def _is_word(colour: Any, *words: str) -> bool:
    return isinstance(colour, str) and colour.lower() in words
