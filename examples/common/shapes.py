"""Pictures of circles and squares, and the set of what is in them."""

import torch
from torch import Tensor

from common.batches import Batch
from setpred.metrics import box_iou

SIZE = 64  # pixels
LEAST, MOST = 3, 6  # shapes in a picture
RADII = (0.07, 0.13)  # of a circle, or half a square's side; the picture is 1 wide
CHANNELS = 5  # x and y of the middle, radius, one-hot of circle and square
DRAWN_AT_ONCE = 200


def draw_shapes(count: int, generator: torch.Generator) -> Batch:
    """Pictures (S, 3, 64, 64), uint8, of shapes in random places and colours; later ones hide parts of earlier ones."""
    random = torch.rand(count, MOST, 7, generator=generator)
    radius = RADII[0] + (RADII[1] - RADII[0]) * random[..., 2:3]
    middle = radius + (1 - 2 * radius) * random[..., :2]  # the whole shape is in the picture
    is_square = random[..., 3:4] < 0.5
    present = torch.arange(MOST) < torch.randint(LEAST, MOST + 1, (count, 1), generator=generator)
    elements = torch.cat([middle, radius, ~is_square, is_square], -1) * present.unsqueeze(-1)
    parts = zip(elements.split(DRAWN_AT_ONCE), random[..., 4:].split(DRAWN_AT_ONCE), strict=True)
    return Batch(elements, present, torch.cat([_paint(*part) for part in parts]))


def _paint(elements: Tensor, colours: Tensor) -> Tensor:
    """Paint shapes (S, N, 5) of colours (S, N, 3) one over the other; edges are one pixel wide."""
    pixels = (torch.arange(SIZE) + 0.5) / SIZE
    canvas = torch.zeros(len(elements), 3, SIZE, SIZE)
    for shape, colour in zip(elements.unbind(1), colours.unbind(1), strict=True):
        x, y, radius, _, is_square = shape.unsqueeze(-1).unsqueeze(-1).unbind(1)  # (S, 1, 1) each
        dx, dy = (pixels - x).abs(), (pixels.unsqueeze(1) - y).abs()
        distance = torch.where(is_square > 0, torch.maximum(dx, dy), torch.hypot(dx, dy))
        cover = ((radius - distance) * SIZE + 0.5).clamp(0, 1) * (radius > 0)
        canvas.lerp_((0.3 + 0.7 * colour).unsqueeze(-1).unsqueeze(-1), cover.unsqueeze(1))
    return (canvas * 255).round().to(torch.uint8)


def shape_iou(pred: Tensor, target: Tensor) -> Tensor:
    """Intersection over union of the boxes around shapes (B, N, M), -inf where one is a circle and one a square."""
    boxes = [torch.cat([x[..., :2] - x[..., 2:3], x[..., :2] + x[..., 2:3]], -1) for x in (pred, target)]
    kinds = [x[..., 3:].argmax(-1) for x in (pred, target)]
    return box_iou(*boxes).masked_fill(kinds[0].unsqueeze(2) != kinds[1].unsqueeze(1), -torch.inf)
