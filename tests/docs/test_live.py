"""The page "Live": what its graphs compute, and what the page shows in a browser, is what PyTorch computes."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from setpred import linear_assignment
from tests.browser import CHROMIUM, Page, browser, serve

DOCS = Path(__file__).parents[2] / "docs"
SITE = DOCS / "_build"
CLOSE = {"rtol": 0, "atol": 1e-4}
DOUBLE = {"dtype": torch.float64}


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("live", DOCS / "live.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


live = load()


def decoded(
    points: Tensor, mask: Tensor, start: Tensor, iters: int
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """DSPN's elements and masks after each step and losses before it, and what the MLP makes."""
    dspn, mlp = live.load("dspn"), live.load("mlp")
    with torch.no_grad():
        steps = dspn.decoder(dspn.encoder(points, mask), init=start, iters=iters, record=True).trajectory
        return steps.elements, steps.mask, steps.repr_loss, mlp(points, mask)[:2]


def test_onnx_runtime_takes_the_same_steps(tmp_path: Path) -> None:
    live.export(tmp_path)
    encoder, step, mlp = (
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("encoder", "step", "mlp")
    )
    points, mask = (x.double() for x in live.sample(20))
    start = 0.1 * torch.randn_like(points)
    elements, masks, losses, output = decoded(points, mask, start, 50)
    sets = {"elements": points.numpy(), "mask": mask.numpy()}
    for actual, expected in zip(mlp.run(None, sets), output, strict=True):
        torch.testing.assert_close(torch.as_tensor(actual), expected, **CLOSE)
    state = [start.numpy(), np.full(mask.shape, 0.5), np.zeros(start.shape), np.zeros(mask.shape)]
    names = [x.name for x in step.get_inputs()]
    (z,) = encoder.run(None, sets)
    for t in range(50):  # some sets are chaotic: of 200, roundings of 1e-16 are 3e-11 after 40 steps, 2e-4 after 80
        *state, loss = step.run(None, dict(zip(names, [*state, z], strict=True)))
        torch.testing.assert_close(torch.as_tensor(state[0]), elements[t + 1], **CLOSE)
        torch.testing.assert_close(torch.as_tensor(state[1]), masks[t + 1], **CLOSE)
        torch.testing.assert_close(torch.as_tensor(loss), losses[t], **CLOSE)


def test_the_runtime_has_its_licence_beside_it() -> None:
    (link,) = re.findall(r'href="(_static/live/LICENSE[^"]*)"', (DOCS / "live.md").read_text())
    licence = (DOCS / link).read_text()
    assert "Copyright (c) Microsoft Corporation" in licence
    for name in live.SHA256:  # by the name that it has in the site
        assert name in licence


@pytest.mark.parametrize("name", ["dspn", "mlp"])
def test_the_networks_are_trained(name: str) -> None:
    points, mask = (x.double() for x in live.sample(200))
    with torch.no_grad():
        presence = live.load(name)(points, mask).mask
    assert ((presence > 0.5).sum(1) == mask.sum(1)).double().mean() > 0.9


# In the browser.


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    if not CHROMIUM:
        pytest.skip("no Chromium: apt-get install chromium")
    if not (SITE / "live.html").exists():
        pytest.skip("the site is not built: python -m sphinx -b html docs docs/_build")
    with serve(SITE) as url, browser() as opened:
        opened.send("Page.enable")
        opened.url = f"{url}/live.html"
        yield opened


@pytest.fixture
def running(page: Page) -> Page:
    """The page, its networks loaded."""
    if not list((SITE / "_static" / "live").glob("ort*")):
        pytest.skip(f"the site was built without {live.RUNTIME}: no npm, or neither its registry nor its cache")
    page.open(page.url)
    page.wait("document.getElementById('live-decoder').state || document.getElementById('live-why').textContent")
    assert page.evaluate("document.getElementById('live-why').textContent") == ""
    return page


def state(page: Page) -> dict:
    """What the page shows, once it has come to rest."""
    page.wait("(({busy, shown}) => !busy && shown >= 40)(document.getElementById('live-decoder').state())")
    return json.loads(page.evaluate("JSON.stringify(document.getElementById('live-decoder').state())"))


def assert_is_what_pytorch_computes(now: dict) -> None:
    count = len(now["points"])
    points = torch.zeros(1, live.POINTS, 2, **DOUBLE)
    points[0, :count] = torch.tensor(now["points"], **DOUBLE)
    mask = (torch.arange(live.POINTS) < count).double().unsqueeze(0)
    start = torch.tensor(now["start"], **DOUBLE).view_as(points)
    frames = now["frames"]
    elements, masks, losses, output = decoded(points, mask, start, len(frames) - 1)
    for t, frame in enumerate(frames):
        torch.testing.assert_close(torch.tensor(frame["elements"], **DOUBLE).view_as(points), elements[t], **CLOSE)
        torch.testing.assert_close(torch.tensor(frame["mask"], **DOUBLE).view_as(mask), masks[t], **CLOSE)
        if "loss" in frame:
            assert frame["loss"] == pytest.approx(losses[t].item(), abs=1e-4, rel=1e-4)
    for name, expected in zip(("elements", "mask"), output, strict=True):
        torch.testing.assert_close(torch.tensor(now["mlp"][name], **DOUBLE).view_as(expected), expected, **CLOSE)


def test_the_page_decodes_as_pytorch_does(running: Page) -> None:
    now = state(running)
    assert now["shown"] == 40
    assert_is_what_pytorch_computes(now)
    verdicts = running.evaluate("[...document.querySelectorAll('#live-decoder output')].map((x) => x.textContent)")
    for verdict, shown in zip(verdicts, (now["frames"][40], now["mlp"]), strict=True):
        mask = torch.tensor(shown["mask"]) > 0.5
        if mask.sum() != len(now["points"]):
            assert verdict == f"{mask.sum()} points instead of {len(now['points'])}"
            continue
        found, points = torch.tensor(shown["elements"]).view(-1, 2)[mask], torch.tensor(now["points"])
        cost = torch.cdist(found, points).unsqueeze(0)
        off = cost.gather(2, linear_assignment(cost).unsqueeze(2)).mean().item()
        assert float(verdict.removeprefix("points off by ")) == pytest.approx(off, abs=6e-4)


def test_a_point_is_dragged_and_decoded_anew(running: Page) -> None:
    before = state(running)
    box = "document.querySelectorAll('.live-ring')[0].getBoundingClientRect()"
    running.evaluate("document.getElementById('live-decoder').scrollIntoView()")
    x, y = running.evaluate(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({box})")
    running.mouse("mousePressed", x, y)
    for i in range(5):
        running.mouse("mouseMoved", x + 5 * i, y + 10)
    running.mouse("mouseReleased", x + 20, y + 10)
    now = state(running)
    moved = np.array(now["points"]) - np.array(before["points"])
    assert (moved[0] > 0.02).all()
    assert (moved[1:] == 0).all()
    assert_is_what_pytorch_computes(now)


def test_points_are_added_and_moved_by_keys_and_steps_go_on(running: Page) -> None:
    before = state(running)
    for name in ("add", "step", "step"):
        running.evaluate(f"document.querySelector('[data-live={name}]').click()")
    running.evaluate("document.querySelectorAll('.live-ring')[1].focus()")
    running.send("Input.dispatchKeyEvent", type="keyDown", key="ArrowUp")
    now = state(running)
    assert len(now["points"]) == len(before["points"]) + 1
    assert now["shown"] == 42
    x, y = before["points"][1]
    assert now["points"][1] == pytest.approx([x, y - 0.05])
    assert_is_what_pytorch_computes(now)


def test_without_javascript_the_page_shows_the_film(page: Page) -> None:
    page.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.send("Page.navigate", url=page.url)
        page.wait("document.readyState == 'complete'")
        shown = "(image) => image.complete && image.naturalWidth > 0 && image.getBoundingClientRect().width > 0"
        page.wait(f"[...document.querySelectorAll('#live-instead img')].filter({shown}).length == 1")
        assert page.evaluate("getComputedStyle(document.getElementById('live-decoder')).display") == "none"
    finally:
        page.send("Emulation.setScriptExecutionDisabled", value=False)
