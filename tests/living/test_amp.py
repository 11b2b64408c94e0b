"""Mixed precision: autocast in bfloat16 and float16, and the gradient scaler."""

import pytest
import torch

from tests.living.common import Network, gradients, make_batch

RECIPES = pytest.mark.parametrize("recipe", ["paper", "idspn"])


def grads(model: Network, dtype: torch.dtype | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = model.step(*make_batch())
    loss.backward()
    return loss.detach(), gradients(model)


@RECIPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_learns_as_float32(dtype: torch.dtype, recipe: str) -> None:
    model = Network(recipe, lr=1.0)
    loss, expected = grads(model, None)
    reduced, actual = grads(model, dtype)
    assert reduced.dtype == torch.float32
    torch.testing.assert_close(reduced, loss, rtol=0.02, atol=0)
    assert actual.keys() == expected.keys()
    # Rounded values rank differently where they are nearly equal, so the direction is what must be kept.
    flat = [torch.cat([g[name].flatten() for name in expected]) for g in (actual, expected)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.95
    for name, gradient in actual.items():
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype):
        elements, mask, _ = model.eval()(make_batch()[0])
    assert elements.dtype == mask.dtype == torch.float32  # carried in the encoder's dtype


@RECIPES
def test_gradient_scaler(recipe: str) -> None:
    model = Network(recipe, lr=1.0)
    _, expected = grads(model, torch.float16)
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model.step(*make_batch())
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    actual = gradients(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0.05, atol=1e-3)
    before = [p.clone() for p in model.parameters() if p.requires_grad]
    scaler.step(optimizer)
    scaler.update()
    assert not all(
        torch.equal(p, b) for p, b in zip((p for p in model.parameters() if p.requires_grad), before, strict=True)
    )
    assert scaler.get_scale() == 1024.0


def test_gradient_scaler_skips_what_overflows() -> None:
    model = Network(lr=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    before = [p.clone() for p in model.parameters()]
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model.step(*make_batch())
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**125
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
