"""Clouds of points on surfaces in three dimensions, a new one for every sample."""

import torch

from common.batches import Batch

POINTS = 64
SHAPES = (1.0, 2.0, torch.inf)  # octahedra, spheres and cubes are the unit spheres of these norms


def draw_clouds(count: int, generator: torch.Generator) -> Batch:
    """Random points on octahedra, spheres and cubes that are stretched along their axes, then turned.

    Half axes are uniform between 0.3 and 1, rotations uniform; the middle is 0.
    """
    points = torch.randn(count, POINTS, 3, generator=generator)
    shape = torch.randint(len(SHAPES), (count,), generator=generator)
    norms = torch.stack([torch.linalg.vector_norm(points, p, dim=-1) for p in SHAPES])
    points = points / norms[shape, torch.arange(count)].unsqueeze(-1)
    axes = 0.3 + 0.7 * torch.rand(count, 1, 3, generator=generator)
    # The Q of a normal matrix, with the signs of R's diagonal, is uniform; mirrored shapes are the same shapes.
    rotation, upper = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator))
    rotation = rotation * upper.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    return Batch(points * axes @ rotation, torch.ones(count, POINTS, dtype=torch.bool))
