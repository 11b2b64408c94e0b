"""Rendered scenes, not CLEVR: like it, with known truth, by batched ray casting in plain PyTorch on any device."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common.scene_geometry import bounding_boxes
from common.scene_layout import Layout, draw_layouts
from common.scene_shading import render

# Rays cast at once. On a CPU, what belongs to them should stay in its caches.
RAYS = {"cpu": 2**18, "cuda": 2**24}

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
    """Draw scenes as CLEVR's generator does, and render them.

    The generator gives one number a scene, and the scene is a function of that number alone: it does not depend on
    the batch, and two batches of 8 are a batch of 16. Rounding may differ, which shows in a few pixels at edges; from
    the same generator, another device renders the same scene in that sense too. Boxes are the exact extents
    of the whole objects, hidden parts included, clipped to the image.

    Args:
        batch: Number of scenes B.
        size: Width and height S of the images in pixels.
        objects: Least and greatest number of objects in a scene; every number between is equally likely.
        max_objects: Rows N of boxes, states and mask.
        generator: Source of all random numbers; None is PyTorch's default generator of `device`.
        device: Where to render; None is the device of `generator`, or the default device.
    """
    if not 1 <= objects[0] <= objects[1] <= max_objects:
        raise ValueError(f"objects: expected 1 <= least <= greatest <= max_objects ({max_objects}), got {objects}")
    if batch < 1 or size < 1:
        raise ValueError(f"batch and size: expected at least 1, got {batch} and {size}")
    source = device if generator is None else generator.device
    seeds = torch.randint(2**63 - 1, (batch,), generator=generator, device=source).to(device)
    chunk = max(1, RAYS.get(seeds.device.type, RAYS["cuda"]) // (2 * size) ** 2)
    layout = draw_layouts(seeds, objects, max_objects)
    images = torch.cat([render(Layout(*part), size) for part in zip(*(x.split(chunk) for x in layout), strict=True)])
    return Scenes(images, bounding_boxes(layout.solids, layout.eye.T), states(layout), layout.mask)


def states(layout: Layout) -> Tensor:
    """States (B, N, 18); 0 where absent."""
    parts = [F.one_hot(getattr(layout, name), len(values)) for name, values in ATTRIBUTES.items()]
    return torch.cat([layout.centre / 3, *parts], -1) * layout.mask.unsqueeze(-1)
