"""Geometry of rendered scenes: the camera, and where its rays and the lights' meet spheres, cubes and cylinders.

Coordinates are CLEVR's, with the ground at z = 0. The components of vectors lie along the first dimension.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# A solid is a box, rounded: the set of b + s with |b_i| <= flat_i and s in the ellipsoid with half-axes curved_i.
CURVED = ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 0.0))  # sphere, cube, cylinder
FLAT = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0))
TANGENTS = (16 / 35, 16 / 35 / 1.5)  # of half the angles of view: 35 mm lens, sensor of 32 mm, picture of 3:2
BEVEL = 24.0  # greater is sharper


class Solids(NamedTuple):
    """N objects in each of B scenes."""

    centre: Tensor  # (3, B, N)
    radius: Tensor  # (B, N); half the edge of a cube, half the height of a cylinder
    angle: Tensor  # (B, N), about the vertical, in radians
    shape: Tensor  # (B, N), index into CURVED and FLAT
    mask: Tensor  # (B, N), bool


class Hits(NamedTuple):
    """Pairs of a ray and a solid that it enters."""

    ray: Tensor  # (H,), index into the rays, flattened
    solid: Tensor  # (H,), index into the solids, flattened
    distance: Tensor  # (H,)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Scalar product."""
    return (x * y).sum(0)


def turn(vector: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn vectors (3, ...) about the vertical, by an angle with this cosine and sine."""
    x, y, z = vector
    return torch.stack([cos * x - sin * y, sin * x + cos * y, z])


def camera_axes(eye: Tensor) -> Tensor:
    """Right, down and forward (B, 3, 3), as rows, of a camera at `eye` (3, B) that looks at the origin."""
    forward = F.normalize(-eye.T, dim=-1)
    up = eye.new_tensor([0, 0, 1]).expand_as(forward)
    right = F.normalize(torch.linalg.cross(forward, up), dim=-1)
    return torch.stack([right, torch.linalg.cross(forward, right), forward], 1)


def camera_rays(eye: Tensor, width: int, height: int, *, samples: int = 1) -> Tensor:
    """Unit directions (3, B, samples^2, height * width): through `samples`^2 places in each pixel, row by row."""
    place = (torch.arange(samples, device=eye.device).unsqueeze(-1) + 0.5) / samples
    x = ((torch.arange(width, device=eye.device) + place) * 2 / width - 1) * TANGENTS[0]
    y = ((torch.arange(height, device=eye.device) + place) * 2 / height - 1) * TANGENTS[1]
    x, y = x[None, :, None], y[:, None, :, None]  # (1, samples, 1, width) and (samples, 1, height, 1)
    grid = F.normalize(torch.stack(torch.broadcast_tensors(x, y, torch.ones_like(x))), dim=0)
    return torch.einsum("bji,jp->ibp", camera_axes(eye), grid.flatten(1)).unflatten(-1, (samples**2, -1))


def bounding_boxes(solids: Solids, eye: Tensor) -> Tensor:
    """Exact extents (B, N, 4) of the solids in the picture: x1, y1, x2, y2 in [0, 1], clipped, hidden parts included.

    A solid is the hull of eight ellipsoids: balls, discs, or the corners of a cube. The picture of one is a conic,
    whose tangents x = const and y = const are roots of a quadratic in its dual matrix.
    """
    # Rows: homogeneous coordinates in the picture, in [-1, 1], as linear functions of a point relative to the eye.
    camera = (camera_axes(eye) / eye.new_tensor([[TANGENTS[0]], [TANGENTS[1]], [1]])).unsqueeze(1)
    corners = torch.cartesian_prod(*[eye.new_tensor([-1, 1])] * 3).T[:, None, None] * _of(FLAT, solids).unsqueeze(-1)
    angle = solids.angle.unsqueeze(-1)
    corners = turn(corners, angle.cos(), angle.sin()) * solids.radius.unsqueeze(-1)  # (3, B, N, 8)
    centre = camera @ (solids.centre.unsqueeze(-1) + corners - eye[..., None, None]).movedim(0, 2)
    axes = camera * (_of(CURVED, solids) * solids.radius).movedim(0, 2).unsqueeze(-2)
    spread = axes @ axes.mT

    def dual(i: int, j: int) -> Tensor:
        return centre[..., i, :] * centre[..., j, :] - spread[..., i, j, None]

    ends = []
    for axis in (0, 1):
        middle, depth = dual(axis, 2), dual(2, 2)
        half = (middle.square() - dual(axis, axis) * depth).clamp(min=0).sqrt()
        ends += [((middle - half) / depth).amin(-1), ((middle + half) / depth).amax(-1)]
    left, right, top, bottom = ends
    boxes = torch.stack([left, top, right, bottom], -1) / 2 + 0.5
    return boxes.clamp(0, 1) * solids.mask.unsqueeze(-1)


def entries(solids: Solids, origin: Tensor, direction: Tensor) -> Hits:
    """All pairs of a ray and a solid in its way.

    Args:
        solids: The solids.
        origin: (3, B, K), outside of all solids: the rays of each of K pencils start from one point.
        direction: (3, B, K, P), of unit length.
    """
    _, _, K, P = direction.shape
    N = solids.mask.shape[1]
    # Only rays that pass near enough: of all pairs, one in some twenty.
    toward = solids.centre.unsqueeze(2) - origin.unsqueeze(-1)  # (3, B, K, N)
    reach = solids.radius * origin.new_tensor([1, math.sqrt(3), math.sqrt(2)])[solids.shape]
    least = (dot(toward, toward) - reach.square().unsqueeze(1)).clamp(min=0).sqrt()
    least = least.where(solids.mask.unsqueeze(1), torch.inf)
    along = (
        toward.movedim(0, -1).contiguous() @ direction.movedim(0, 2).contiguous()
    )  # several times faster than strided
    b, k, n, p = (along > least.unsqueeze(-1)).nonzero().unbind(-1)
    pencil, solid = b * K + k, b * N + n
    ray = pencil * P + p
    distance = entry_distance(solids, solid, -toward.flatten(1)[:, pencil * N + n], direction.flatten(1)[:, ray])
    hit = distance.isfinite()
    return Hits(ray[hit], solid[hit], distance[hit])


def entry_distance(solids: Solids, solid: Tensor, start: Tensor, course: Tensor) -> Tensor:
    """Distances (H,) at which rays enter solids; infinite where they miss.

    Args:
        solids: The solids.
        solid: (H,), index of the solid of each ray.
        start: (3, H), start of the ray relative to the centre of its solid.
        course: (3, H), unit direction of the ray.
    """
    flat = _of(FLAT, solids)
    table = [*_of(CURVED, solids)[1:], *flat.where(flat > 0, torch.inf)[1:]]
    table += [solids.angle.cos() / solids.radius, -solids.angle.sin() / solids.radius, 1 / solids.radius]
    round_xy, round_z, half_xy, half_z, cos, sin, scale = torch.stack(table).flatten(1)[:, solid]
    # A ray is inside between the last entry and the first exit of a quadric and three slabs, in the solid's own frame.
    (x, y, z), (u, v, w) = start, course
    x, y, z = cos * x - sin * y, sin * x + cos * y, scale * z
    u, v, w = cos * u - sin * v, sin * u + cos * v, scale * w
    a = (round_xy * (u * u + v * v) + round_z * w * w).clamp(min=1e-9)  # without a quadric, its ends are far away
    b = round_xy * (u * x + v * y) + round_z * w * z
    c = round_xy * (x * x + y * y) + round_z * z * z - 1
    root = (b * b - a * c).sqrt()  # NaN where the quadric is missed; then nothing below is true
    enter, leave = (-b - root) / a, (root - b) / a
    for offset, slope, half in ((x, u, half_xy), (y, v, half_xy), (z, w, half_z)):
        middle, width = -offset / slope, (half / slope).abs()
        enter, leave = torch.maximum(enter, middle - width), torch.minimum(leave, middle + width)
    return enter.where((enter < leave) & (enter > 0), torch.inf)


def nearest(hits: Hits, rays: int) -> Hits:
    """Only the nearest hit of each of `rays` rays."""
    depth = hits.distance.new_full((rays,), torch.inf).scatter_reduce_(0, hits.ray, hits.distance, "amin")
    first = hits.distance == depth[hits.ray]
    return Hits(hits.ray[first], hits.solid[first], hits.distance[first])


def normals(solids: Solids, solid: Tensor, point: Tensor) -> Tensor:
    """Outward unit normals (3, H) at points (3, H) on the surface of solids (H,), bevelled at the edges."""
    angle, radius = solids.angle.flatten()[solid], solids.radius.flatten()[solid]
    curved, flat = _of(CURVED, solids).flatten(1)[:, solid], _of(FLAT, solids).flatten(1)[:, solid]
    cos, sin = angle.cos(), angle.sin()
    x = turn(point - solids.centre.flatten(1)[:, solid], cos, -sin) / radius
    # Each face counts by a high power of how near it the point is: 1 on the face, little elsewhere.
    to_curved = dot(curved * x, x) ** (BEVEL / 2)
    to_flat = (flat * x).abs() ** BEVEL
    return turn(F.normalize(curved * x * to_curved + x.sign() * to_flat, dim=0), cos, sin)


def _of(table: tuple[tuple[float, ...], ...], solids: Solids) -> Tensor:
    """Rows of a table over shapes, (3, B, N)."""
    return solids.centre.new_tensor(table).T[:, solids.shape]
