"""Rendered scenes: their truth agrees with the pictures."""

import pytest
import torch
from common.scenes import ATTRIBUTES, render_scenes


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


def test_objects_keep_their_distance() -> None:
    large = render_scenes(64, size=4, generator=generator(1))
    place = large.states[..., :2] * 3
    distance = (place.unsqueeze(1) - place.unsqueeze(2)).norm(dim=-1)
    radius = torch.where(large.states[..., 16] > 0, 0.7, 0.35)
    apart = distance - radius.unsqueeze(1) - radius.unsqueeze(2)
    pair = large.mask.unsqueeze(1) & large.mask.unsqueeze(2) & ~torch.eye(10, dtype=torch.bool)
    assert apart[pair].min() > 0.2  # CLEVR's least distance is 0.25


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
    parts = [render_scenes(n, size=16, generator=one) for n in (1, 3)]
    whole = render_scenes(4, size=16, generator=generator(3))
    for field in ("states", "mask", "boxes"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))
    # Rounding decides whether a ray at an edge hits: few pixels, in pictures this small, differ.
    difference = (torch.cat([part.images for part in parts]) - whole.images).abs()
    assert difference.mean() < 0.01
    assert (difference < 1e-4).float().mean() > 0.85
    again = render_scenes(4, size=16, generator=generator(3))
    assert torch.equal(again.images, whole.images)
    other = render_scenes(4, size=16, generator=generator(4))
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
