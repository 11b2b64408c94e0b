"""What the built site looks like, as far as a program can say."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, Page, browser, serve

SITE = Path(__file__).parents[2] / "docs" / "_build"
needs_the_site = pytest.mark.skipif(
    not (SITE / "index.html").exists(), reason="the site is not built: python -m sphinx -b html docs docs/_build"
)
# Wider than the window, and in nothing of the text that scrolls.
CUT = """[...document.querySelectorAll('[role=main] :is(table, pre, img, .math, .sig)')].filter((x) => {
  if (x.getBoundingClientRect().right <= innerWidth) return false
  for (let p = x; p.tagName != 'ARTICLE'; p = p.parentElement)
    if (/auto|scroll/.test(getComputedStyle(p).overflowX)) return false
  return true
}).map((x) => x.outerHTML.slice(0, 80))"""


@needs_the_site
def test_moving_pictures_are_light() -> None:
    sizes = {path.name: path.stat().st_size for path in (SITE / "_static").glob("*.webp")}
    assert len(sizes) == 2
    assert max(sizes.values()) < 300_000, sizes


@needs_the_site
def test_signatures_show_no_addresses() -> None:
    pages = list((SITE / "api" / "generated").glob("*.html"))
    assert pages
    assert [page.name for page in pages if re.search(r"\b0x[0-9a-f]{6,}", page.read_text())] == []


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    if not CHROMIUM:
        pytest.skip("no Chromium: apt-get install chromium")
    with serve(SITE) as url, browser() as opened:
        opened.send("Page.enable")
        opened.send("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=False)
        opened.url = url
        yield opened


@needs_the_site
def test_nothing_is_cut_on_a_phone(page: Page) -> None:
    fits = "(x) => x.scrollWidth <= x.clientWidth"
    for path in sorted(SITE.rglob("*.html")):
        page.open(f"{page.url}/{path.relative_to(SITE)}")
        assert page.evaluate(CUT) == [], path
        assert page.evaluate(f"[document.documentElement, ...document.querySelectorAll('.content')].every({fits})"), (
            path
        )
