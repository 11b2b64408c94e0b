"""Rendered scenes like CLEVR's, with known truth: batched ray casting in plain PyTorch, on any device. They are not CLEVR."""

from typing import NamedTuple

import torch
from torch import Tensor

# The one-hot parts of a state in their order, as published; they follow the three coordinates.
ATTRIBUTES = {
    "material": ("rubber", "metal"),
    "color": ("cyan", "blue", "yellow", "purple", "red", "green", "gray", "brown"),
    "shape": ("sphere", "cube", "cylinder"),
    "size": ("large", "small"),
}


class Scenes(NamedTuple):
    """A batch of scenes (B, ...), or one scene without B. Boxes and states list the objects in the same order."""

    images: Tensor  # (B, 3, S, S), float32 in [0, 1]; the 3:2 picture is squeezed into a square, as published
    boxes: Tensor  # (B, N, 4), x1, y1, x2, y2 in [0, 1] of width and height, y downwards; 0 where absent
    states: Tensor  # (B, N, 18): coordinates / 3 (3), then one-hot of material (2), color (8), shape (3), size (2)
    mask: Tensor  # (B, N), bool, True = present; the present ones come first


def render_scenes(
    batch: int,
    *,
    size: int = 128,
    objects: tuple[int, int] = (3, 10),
    max_objects: int = 10,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Scenes:
    """Draw scenes as CLEVR's generator does and render them.

    Args:
        batch: Number of scenes B.
        size: Width and height S of the images in pixels.
        objects: Least and greatest number of objects in a scene; every number between is equally likely.
        max_objects: Rows N of boxes, states and mask.
        generator: Source of all random numbers; None is PyTorch's default generator of `device`.
        device: Where to render; None is the device of `generator`, or the default device.
    """
    raise NotImplementedError
