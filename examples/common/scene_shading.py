"""Pictures of rendered scenes: three lamps with soft shadows, matt rubber, and metal that mirrors what is around it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from common.scene_geometry import Hits, camera_rays, dot, entries, entry_distance, nearest, normals
from common.scene_layout import Layout

SAMPLES = 2  # a side of a pixel
LAMP = 0.5  # half the edge of a lamp; each of the samples in a pixel sees another part of it
POWERS = (14.0, 5.0, 9.0)  # key, fill, back
SHADOWS = (True, False, True)
AMBIENT, GROUND, SKY = 0.14, 0.46, 0.08
COLORS = (  # CLEVR's, in the order of the states
    (41, 208, 208),
    (42, 75, 215),
    (255, 238, 51),
    (129, 38, 192),
    (173, 35, 35),
    (29, 105, 20),
    (87, 87, 87),
    (129, 74, 25),
)


def render(layout: Layout, size: int) -> Tensor:
    """Pictures (B, 3, size, size) in [0, 1]."""
    solids, eye = layout.solids, layout.eye.T
    sight = camera_rays(eye, size, size, samples=SAMPLES)
    rays = sight.shape[1:]
    seen = nearest(entries(solids, eye.unsqueeze(-1).expand(-1, -1, SAMPLES**2), sight), rays.numel())
    scene = seen.ray // rays[1:].numel()

    # The ground everywhere, then what stands before it. From here on, rays lie along one dimension, (3, R).
    sight = sight.flatten(1)
    start = eye.repeat_interleave(rays[1:].numel(), 1)
    point = start - sight * (start[2] / sight[2])
    toward = sight[:, seen.ray]
    surface = eye[:, scene] + seen.distance * toward
    normal = normals(solids, seen.solid, surface)
    point[:, seen.ray] = surface

    metal = layout.material.flatten()[seen.solid] == 1
    mirrored = toward - 2 * dot(toward, normal) * normal
    light = torch.full_like(point[0], AMBIENT)
    gloss = torch.zeros_like(seen.distance)
    part = torch.arange(SAMPLES, device=eye.device) * (2 * LAMP / (SAMPLES - 1)) - LAMP
    parts = F.pad(torch.cartesian_prod(part, part), (0, 1)).T.unsqueeze(1)  # (3, 1, samples)
    for lamp, power, shadows in zip(layout.lights.unbind(1), POWERS, SHADOWS, strict=True):
        source = lamp.T.unsqueeze(-1) + parts
        beam = point - source.repeat_interleave(rays[2], -1).flatten(1)
        distance = dot(beam, beam).sqrt()
        beam /= distance
        flux = power / distance.square()
        if shadows:
            blocked = entries(solids, source, beam.unflatten(1, rays))
            flux[blocked.ray[blocked.distance < 0.99 * distance[blocked.ray]]] = 0
        own = beam[:, seen.ray]
        facing = -beam[2]
        facing[seen.ray] = -dot(own, normal).clamp(max=0)
        light += flux * facing
        shine = -dot(own, mirrored).clamp(max=0)
        gloss += flux[seen.ray] * torch.where(metal, 6 * shine**100 + 0.3 * shine**10, 0.1 * shine**10)
    color = (GROUND * light).repeat(3, 1)
    tint = _tint(layout, seen.solid)
    own = tint * light[seen.ray]
    around = _mirror(layout, scene[metal], seen.solid[metal], surface[:, metal], mirrored[:, metal])
    own[:, metal] = 0.15 * own[:, metal] + 1.1 * tint[:, metal] * around
    color[:, seen.ray] = own + gloss
    return color.unflatten(1, rays).mean(2).clamp(0, 1).pow(1 / 2.2).movedim(0, 1).unflatten(-1, (size, size))


def _tint(layout: Layout, solid: Tensor) -> Tensor:
    return (torch.tensor(COLORS, device=solid.device) / 255).pow(1.5).T[:, layout.color.flatten()[solid]]


def _unshadowed(layout: Layout, scene: Tensor, point: Tensor, normal: Tensor) -> Tensor:
    """Light (H,) at points (3, H) with these normals."""
    total = torch.full_like(point[0], AMBIENT)
    for lamp, power in zip(layout.lights.unbind(1), POWERS, strict=True):
        beam = lamp[scene].T - point
        total += power * dot(beam, normal).clamp(min=0) / dot(beam, beam) ** 1.5
    return total


def _mirror(layout: Layout, scene: Tensor, solid: Tensor, point: Tensor, course: Tensor) -> Tensor:
    """What solids (H,) show (3, H) at these points, seen along these courses: other solids, the ground, or the sky."""
    solids = layout.solids
    N = solids.mask.shape[1]
    toward = solids.centre[:, scene] - point.unsqueeze(-1)  # (3, H, N)
    along = dot(toward, course.unsqueeze(-1))
    reach = 1.8 * solids.radius[scene]
    near = (along > 0) & (dot(toward, toward) - along.square() < reach.square()) & solids.mask[scene]
    h, n = near.nonzero().unbind(-1)
    other = scene[h] * N + n
    distance = entry_distance(solids, other, -toward[:, h, n], course[:, h])
    hit = distance.isfinite() & (other != solid[h])
    first = nearest(Hits(h[hit], other[hit], distance[hit]), len(scene))

    # The ground fades into the sky.
    fade = (-course[2] / 0.3).clamp(0, 1)
    up = torch.zeros_like(point)
    up[2] = 1
    ground = GROUND * _unshadowed(layout, scene, point - course * point[2] / course[2].clamp(max=-1e-3), up)
    color = torch.lerp(torch.full_like(fade, SKY), ground, fade).repeat(3, 1)
    surface = point[:, first.ray] + first.distance * course[:, first.ray]
    light = _unshadowed(layout, scene[first.ray], surface, normals(solids, first.solid, surface))
    color[:, first.ray] = _tint(layout, first.solid) * light
    return color
