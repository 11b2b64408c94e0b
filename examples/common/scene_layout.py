"""What stands where in a rendered scene: the sampling and rejection rules of CLEVR's generator, many scenes at once."""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from common.scene_geometry import Solids, camera_axes, camera_rays, entries, nearest

RADII = (0.7, 0.35)  # large, small
EXTENT = 3.0  # centres lie within this of the origin, along x and y
GAP = 0.25  # between two objects, both taken as balls
MARGIN = 0.4  # between two centres, to the right and to the front each
TRIES = 150  # places tried for an object before the scene is begun anew
CAMERA, CAMERA_JITTER = (7.48, -6.51, 5.34), 0.5
LIGHTS, LIGHT_JITTER = ((6.4, -2.9, 4.3), (-4.7, -4.0, 3.0), (-1.1, 2.7, 5.8)), 1.0  # key, fill, back
VIEW, VISIBLE = (96, 64), 8  # of the pixels of such a picture an object shows at least these, 200 of CLEVR's 480 x 320
ROUNDS = 100


class Layout(NamedTuple):
    """B scenes of up to N objects; shape, material, color and size are indices into their names."""

    centre: Tensor  # (B, N, 3)
    angle: Tensor  # (B, N), in radians
    shape: Tensor  # (B, N)
    material: Tensor  # (B, N)
    color: Tensor  # (B, N)
    size: Tensor  # (B, N)
    mask: Tensor  # (B, N), bool
    eye: Tensor  # (B, 3)
    lights: Tensor  # (B, 3, 3)

    @property
    def solids(self) -> Solids:
        """What rays hit."""
        return Solids(self.centre.movedim(-1, 0), radii(self.size), self.angle, self.shape, self.mask)


def radii(size: Tensor) -> Tensor:
    """Radius of each size."""
    return torch.tensor(RADII, device=size.device)[size]


def uniform(seeds: Tensor, stream: int, *shape: int) -> Tensor:
    """Random numbers (B, *shape) in [0, 1), a function of each seed (B,) and the stream alone (SplitMix64)."""

    def shift(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)  # zeros come in, not the sign

    x = torch.arange(stream << 16, (stream << 16) + prod(shape), device=seeds.device) * -7046029254386353131
    x = x + seeds.unsqueeze(-1)
    x = (x ^ shift(x, 30)) * -4658895280553007687
    x = (x ^ shift(x, 27)) * -7723592293110705685
    return (shift(x ^ shift(x, 31), 40).float() * 2**-24).unflatten(-1, shape)


def draw_layouts(seeds: Tensor, objects: tuple[int, int], max_objects: int) -> Layout:
    """Draw one scene a seed (B,), a function of that seed alone.

    The number of objects, the camera and the lights are drawn once; the objects anew until all have found a place and
    all are seen.
    """
    low, high = objects
    count = low + (uniform(seeds, 0, 1) * (high - low + 1)).long()
    mask = torch.arange(max_objects, device=seeds.device) < count
    eye = _jitter(CAMERA, CAMERA_JITTER, uniform(seeds, 1, 3))
    lights = _jitter(LIGHTS, LIGHT_JITTER, uniform(seeds, 2, 3, 3))
    layout = None
    todo = torch.arange(len(seeds), device=seeds.device)
    for stream in range(3, 3 + ROUNDS):
        proposal, placed = _propose(seeds[todo], stream, mask[todo], eye[todo], lights[todo])
        if layout is None:
            layout = proposal
        else:
            for old, new in zip(layout, proposal, strict=True):
                old[todo] = new
        accepted = placed.clone()
        accepted[placed] = _all_seen(Layout(*(x[placed] for x in proposal)))
        todo = todo[~accepted]
        if not len(todo):
            return layout
    raise ValueError(f"objects: expected so few that they find a place, got {objects}: {ROUNDS} attempts failed")


def _jitter(around: tuple, by: float, random: Tensor) -> Tensor:
    return torch.tensor(around, device=random.device) + by * (2 * random - 1)


def _propose(seeds: Tensor, stream: int, mask: Tensor, eye: Tensor, lights: Tensor) -> tuple[Layout, Tensor]:
    """Objects one after the other, each at the first of its places that is clear; and (B,), whether all had one."""
    N = mask.shape[1]
    random = uniform(seeds, stream, N, 5 + 2 * TRIES)
    options = torch.tensor([3, 2, 8, 2], device=seeds.device)
    shape, material, color, size = (random[..., :4] * options).long().unbind(-1)
    radius = radii(size)
    places = (2 * random[..., 5:].unflatten(-1, (TRIES, 2)) - 1) * EXTENT
    # Looked at from above with the camera at the bottom: to the right and to the front.
    right = camera_axes(eye.T)[:, None, None, 0]  # it is horizontal
    x, y = places.unbind(-1)
    u, v = x * right[..., 0] + y * right[..., 1], x * right[..., 1] - y * right[..., 0]
    scene = torch.arange(len(seeds), device=seeds.device)
    chosen = torch.zeros(len(seeds), N, dtype=torch.long, device=seeds.device)
    placed = torch.ones(len(seeds), dtype=torch.bool, device=seeds.device)
    for n in range(1, N):
        before = scene.unsqueeze(-1), torch.arange(n, device=seeds.device), chosen[:, :n]
        du, dv = u[:, n].unsqueeze(-1) - u[before].unsqueeze(1), v[:, n].unsqueeze(-1) - v[before].unsqueeze(1)
        room = (radius[:, :n] + radius[:, n, None] + GAP).square().unsqueeze(1)
        clear = (du.abs() >= MARGIN) & (dv.abs() >= MARGIN) & (du.square() + dv.square() >= room)
        free = clear.all(-1)  # (B, TRIES)
        chosen[:, n] = free.byte().argmax(-1)  # the first of the greatest
        placed &= free.any(-1) | ~mask[:, n]
    ground = places[scene.unsqueeze(-1), torch.arange(N, device=seeds.device), chosen]
    centre = torch.cat([ground, radius.unsqueeze(-1)], -1)
    return Layout(centre, random[..., 4] * 2 * torch.pi, shape, material, color, size, mask, eye, lights), placed


def _all_seen(layout: Layout) -> Tensor:
    """Whether every object shows (B,) enough pixels, looked at in a small picture."""
    rays = camera_rays(layout.eye.T, *VIEW)
    hits = nearest(entries(layout.solids, layout.eye.T.unsqueeze(-1), rays), rays[0].numel())
    pixels = torch.bincount(hits.solid, minlength=layout.mask.numel()).view_as(layout.mask)
    return ((pixels >= VISIBLE) | ~layout.mask).all(-1)
