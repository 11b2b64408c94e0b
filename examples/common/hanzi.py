"""Chinese characters: an image of each, and the set of its strokes."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.batches import Batch

FILE = "hanzi/strokes.npz"
STROKES = 12  # the most
POINTS = 5  # along the middle of a stroke, evenly spaced, from where the brush begins to where it ends


def load_characters(root: Path) -> Batch:
    """Read images (S, 3, 64, 64), uint8, and strokes (S, 12, 10): x1, y1, ..., x5, y5 in [0, 1], y downwards."""
    path = root / FILE
    try:
        with np.load(path) as file:
            images, strokes, counts = (torch.from_numpy(file[name]) for name in ("images", "strokes", "counts"))
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"--data: {path} cannot be read: {error}") from None
    present = torch.arange(STROKES) < counts.unsqueeze(1)
    return Batch(strokes.float(), present, images.unsqueeze(1).expand(-1, 3, -1, -1))


def stroke_distance(pred: Tensor, target: Tensor) -> Tensor:
    """Distance of strokes (B, N, 10) and (B, M, 10) for all pairs (B, N, M): the mean of their points' distances.

    The unit is the image's width. A stroke has a direction: the one that ends where the other begins is not near.
    """
    pairs = pred.unsqueeze(2) - target.unsqueeze(1)
    return pairs.unflatten(-1, (POINTS, 2)).norm(dim=-1).mean(-1)
