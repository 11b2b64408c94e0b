"""Rendered scenes: their truth agrees with the pictures."""

import pytest
import torch
from common.scene_geometry import Solids, bounding_boxes, camera_axes, camera_rays, entries, nearest
from common.scene_layout import Layout, draw_layouts
from common.scene_shading import render
from common.scenes import ATTRIBUTES, render_scenes
from torch import Tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SCENES = render_scenes(8, size=48, generator=generator())


def test_shapes_and_counts() -> None:
    assert SCENES.images.shape == (8, 3, 48, 48)
    assert SCENES.boxes.shape == (8, 10, 4)
    assert SCENES.states.shape == (8, 10, 18)
    assert SCENES.images.min() >= 0
    assert SCENES.images.max() <= 1
    counts = SCENES.mask.sum(1)
    assert ((counts >= 3) & (counts <= 10)).all()
    assert torch.equal(SCENES.mask, torch.arange(10) < counts.unsqueeze(1))
    few = render_scenes(32, size=4, objects=(2, 2), max_objects=3, generator=generator())
    assert (few.mask.sum(1) == 2).all()


def test_states_are_coordinates_and_one_hots() -> None:
    present = SCENES.states[SCENES.mask]
    position, *one_hots = present.split([3, *map(len, ATTRIBUTES.values())], -1)
    assert (position[:, :2].abs() <= 1).all()  # within 3 units of the middle
    assert (position[:, 2] > 0).all()  # standing on the ground
    for part in one_hots:
        assert torch.equal(part.sum(-1), torch.ones(len(part)))
    assert not SCENES.states[~SCENES.mask].any()
    assert not SCENES.boxes[~SCENES.mask].any()


LAYOUT = draw_layouts(torch.arange(32), (3, 10), 10)


def test_objects_keep_their_distance() -> None:
    offset = LAYOUT.centre.unsqueeze(1) - LAYOUT.centre.unsqueeze(2)
    pair = LAYOUT.mask.unsqueeze(1) & LAYOUT.mask.unsqueeze(2) & ~torch.eye(10, dtype=torch.bool)
    radius = LAYOUT.solids.radius
    apart = offset[..., :2].norm(dim=-1) - radius.unsqueeze(1) - radius.unsqueeze(2)
    assert apart[pair].min() > 0.25 - 1e-5
    # To the right and to the front as the camera sees them.
    right, _, forward = camera_axes(LAYOUT.eye.T).unbind(1)
    front = torch.nn.functional.normalize(forward[:, :2], dim=-1)
    for axis in (right[:, :2], front):
        assert (offset[..., :2] @ axis[:, None, :, None]).abs()[pair].min() > 0.4 - 1e-5


def sides(solids: Solids, solid: Tensor, point: Tensor) -> Tensor:
    """How far out points (3, H) are of their solids: less than 1 within, 1 on the surface. Written out by shape."""
    x, y, z = (point - solids.centre.flatten(1)[:, solid]) / solids.radius.flatten()[solid]
    angle = -solids.angle.flatten()[solid]
    x, y = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    sphere, cube = (x**2 + y**2 + z**2).sqrt(), torch.stack([x, y, z]).abs().amax(0)
    cylinder = torch.maximum((x**2 + y**2).sqrt(), z.abs())
    return torch.stack([sphere, cube, cylinder]).gather(0, solids.shape.flatten()[solid].unsqueeze(0))[0]


def test_rays_enter_where_they_first_are_within() -> None:
    solids, eye = LAYOUT.solids, LAYOUT.eye.T
    rays = camera_rays(eye, 24, 16)
    hits = entries(solids, eye.unsqueeze(-1), rays)
    scene = hits.ray // rays[0, 0].numel()
    toward = rays.flatten(1)[:, hits.ray]
    entry = eye[:, scene] + hits.distance * toward
    assert (sides(solids, hits.solid, entry) - 1).abs().max() < 1e-3
    assert sides(solids, hits.solid, entry - 1e-2 * toward).min() > 1
    within = sides(solids, hits.solid, entry + 1e-2 * toward) < 1
    assert within.float().mean() > 0.99  # a few rays only graze
    # All others stay outside wherever one looks.
    hit = torch.zeros(10, rays[0].numel(), dtype=torch.bool)
    hit[hits.solid % 10, hits.ray] = True
    n, ray = (~hit).nonzero().unbind(-1)
    scene = ray // rays[0, 0].numel()
    for distance in torch.linspace(4, 20, 60):
        out = sides(solids, scene * 10 + n, eye[:, scene] + distance * rays.flatten(1)[:, ray])
        assert out[LAYOUT.mask[scene, n]].min() > 1 - 1e-3


def test_boxes_are_the_extents_of_the_pixels() -> None:
    solids, eye = LAYOUT.solids, LAYOUT.eye.T
    boxes = bounding_boxes(solids, eye).flatten(0, 1)
    width, height = 300, 200
    hits = entries(solids, eye.unsqueeze(-1), camera_rays(eye, width, height))  # hidden parts too
    pixel = hits.ray % (width * height)
    x, y = (pixel % width + 0.5) / width, (pixel // width + 0.5) / height
    for solid in LAYOUT.mask.flatten().nonzero().squeeze(-1):
        mine = hits.solid == solid
        extents = torch.stack([x[mine].min(), y[mine].min(), x[mine].max(), y[mine].max()])
        spare = (boxes[solid] - extents) * torch.tensor([-width, -height, width, height])  # in pixels
        assert spare.min() > -0.01
        assert spare.max() < 3  # corners are thin


def test_every_object_is_seen() -> None:
    rays = camera_rays(LAYOUT.eye.T, 480, 320)
    seen = nearest(entries(LAYOUT.solids, LAYOUT.eye.T.unsqueeze(-1), rays), rays[0].numel())
    pixels = seen.solid.bincount(minlength=LAYOUT.mask.numel()).view(LAYOUT.mask.shape)
    assert not pixels[~LAYOUT.mask].any()
    assert pixels[LAYOUT.mask].min() > 100  # asked for about 200, counted in a small picture


def test_a_shadow_falls_on_the_ground_and_on_nothing_else() -> None:
    """A ball: the lit pixels of a scene without it are darker behind it, seen from the key lamp."""
    layout = Layout(*(x[:1, :1] if x.shape[1:2] == (10,) else x[:1] for x in LAYOUT))
    layout = layout._replace(centre=torch.tensor([[[0.0, 0.0, 0.7]]]), size=torch.tensor([[0]]))
    layout = layout._replace(shape=torch.tensor([[0]]), material=torch.tensor([[0]]))
    with_ball, without = render(layout, 64)[0], render(layout._replace(mask=~layout.mask), 64)[0]
    x1, y1, x2, y2 = (bounding_boxes(layout.solids, layout.eye.T)[0, 0] * 64).tolist()
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1] = False
    change = (with_ball - without).mean(0)[outside]
    assert change.max() < 1e-4
    assert (change < -0.05).sum() > 20
    # The ball itself is lit by the key lamp, which stands to the right of the camera, but for the ambient light.
    ball = with_ball.mean(0)[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1]
    assert ball.max() > 1.5 * ball.min()


def test_boxes_hold_colour() -> None:
    """Where an object is, the picture differs from the grey ground beside it."""
    scenes = render_scenes(24, size=64, objects=(3, 3), max_objects=3, generator=generator(2))
    gray = ATTRIBUTES["color"].index("gray")
    saturation = scenes.images.amax(1) - scenes.images.amin(1)
    outside = torch.ones(24, 64, 64, dtype=torch.bool)
    for b, i in scenes.mask.nonzero().tolist():
        x1, y1, x2, y2 = (scenes.boxes[b, i] * 64).tolist()
        assert 0 <= x1 < x2 <= 64
        assert 0 <= y1 < y2 <= 64
        rows, columns = slice(int(y1), int(y2) + 1), slice(int(x1), int(x2) + 1)
        outside[b, rows, columns] = False
        if not scenes.states[b, i, 5 + gray]:
            assert saturation[b, rows, columns].max() > 0.15
    assert saturation[outside].mean() < 0.02
    assert saturation[outside].max() < 0.5 * saturation[~outside].max()


def test_same_generator_same_scenes_whatever_the_batch() -> None:
    one = generator(3)
    parts = [render_scenes(n, size=48, generator=one) for n in (1, 3)]
    whole = render_scenes(4, size=48, generator=generator(3))
    for field in ("states", "mask", "boxes"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))
    # Rounding decides whether a ray at an edge hits.
    difference = (torch.cat([part.images for part in parts]) - whole.images).abs()
    assert (difference < 1e-3).float().mean() > 0.999
    again = render_scenes(4, size=48, generator=generator(3))
    assert torch.equal(again.images, whole.images)
    other = render_scenes(4, size=48, generator=generator(4))
    assert not torch.equal(other.states, whole.states)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objects": (3, 11)}, r"objects: expected 1 <= least <= greatest <= max_objects \(10\), got \(3, 11\)"),
        ({"objects": (0, 3)}, "objects: expected"),
        ({"size": 0}, "batch and size: expected at least 1, got 1 and 0"),
    ],
)
def test_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_scenes(1, **options)
