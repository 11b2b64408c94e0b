"""Pictures: what stands on the axes is what was given."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from torch import Tensor

import setpred
from setpred import DSPNDecoder, PolyakDescent, PooledEncoder, StandardScaler
from setpred.plot import draw_boxes, draw_diagnosis, draw_points, draw_trajectory


@pytest.fixture(autouse=True)
def no_window_and_no_figure_is_left() -> Iterator[None]:
    plt.switch_backend("agg")
    yield
    plt.close("all")


def axes(channels: int = 2) -> Axes:
    return plt.figure().add_subplot(projection="3d" if channels == 3 else "rectilinear")


def drawn(ax: Axes) -> Tensor:
    """The points of the one scatter, (N, C)."""
    (points,) = ax.collections
    where = getattr(points, "_offsets3d", None)
    return torch.tensor(points.get_offsets() if where is None else list(zip(*where, strict=True)))


@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_points(channels: int, dtype: torch.dtype) -> None:
    elements = torch.rand(5, channels, dtype=dtype, requires_grad=True)
    mask = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5], dtype=dtype, requires_grad=True)  # beyond [0, 1] is clamped
    ax = axes(channels)
    assert draw_points(elements, mask, ax=ax, label="five", s=9) is ax
    torch.testing.assert_close(drawn(ax), elements.detach().double())
    (points,) = ax.collections
    assert points.get_alpha().tolist() == [0, 0, 0.5, 1, 1]
    assert (points.get_label(), points.get_sizes().tolist()) == ("five", [9])
    ax.figure.canvas.draw()


def test_a_bool_mask_and_none() -> None:
    ax = draw_points(torch.rand(3, 2), torch.tensor([True, False, True]))
    assert ax.collections[0].get_alpha().tolist() == [1, 0, 1]
    assert draw_points(torch.rand(3, 2), alpha=0.3).collections[0].get_alpha() == 0.3  # the user's own
    assert ax.get_aspect() == 1


@pytest.mark.parametrize("channels", [2, 3])
def test_hollow_points_fade_too(channels: int) -> None:
    mask = torch.tensor([0.25, 1.0])
    style = {"facecolors": "none", "edgecolors": "red"} | ({"depthshade": False} if channels == 3 else {})
    ax = draw_points(torch.rand(2, channels), mask, **style)
    ax.figure.canvas.draw()
    (points,) = ax.collections
    assert sorted(points.get_edgecolor().tolist()) == [[1, 0, 0, 0.25], [1, 0, 0, 1]]
    assert len(points.get_facecolor()) == 0


def test_new_axes_each_time() -> None:
    assert draw_points(torch.rand(3, 2)).figure is not draw_points(torch.rand(3, 2)).figure
    assert draw_points(torch.rand(3, 3)).name == "3d"


@pytest.mark.parametrize("channels", [2, 3])
def test_trajectory(channels: int) -> None:
    decoder = DSPNDecoder(PooledEncoder(channels, 16), iters=7, set_size=4, channels=channels)
    _, mask, steps = decoder(torch.randn(3, 16), record=True)
    ax = axes(channels)
    assert draw_trajectory(steps.elements[:, 1], steps.mask[:, 1], ax=ax) is ax
    lines = [line.get_data_3d() if channels == 3 else line.get_data() for line in ax.lines]
    paths = torch.tensor([[list(coordinate) for coordinate in line] for line in lines])  # (N, C, T+1)
    torch.testing.assert_close(paths.permute(2, 0, 1), steps.elements[:, 1].detach().double())
    assert [line.get_alpha() for line in ax.lines] == mask[1].tolist()
    assert len({line.get_color() for line in ax.lines}) == 4
    assert {(line.get_marker(), *line.get_markevery()) for line in ax.lines} == {("o", -1)}
    ax.figure.canvas.draw()


def test_trajectory_in_a_style() -> None:
    ax = draw_trajectory(torch.rand(6, 3, 2), color="black", linewidth=3, alpha=0.7)
    assert {(line.get_color(), line.get_linewidth(), line.get_alpha()) for line in ax.lines} == {("black", 3, 0.7)}


BOXES = torch.tensor([[0.0, 0.25, 0.5, 0.5], [0.25, 0.0, 1.0, 0.75]])


def corners(ax: Axes) -> list[list[list[float]]]:
    return [path.vertices[:4].tolist() for path in ax.collections[0].get_paths()]


@pytest.mark.parametrize("shape", [(3, 8, 16), (1, 8, 16), (8, 16)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_boxes_over_an_image(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    image = torch.randint(256, shape, dtype=torch.uint8) if dtype == torch.uint8 else torch.rand(shape, dtype=dtype)
    image = image.mT.contiguous().mT  # not contiguous
    ax = draw_boxes(BOXES, torch.tensor([0.5, 1.0]), image=image, normalized=True, labels=["a", "b"])
    assert corners(ax)[0] == [[0, 2], [8, 2], [8, 4], [0, 4]]
    assert corners(ax)[1] == [[4, 0], [16, 0], [16, 6], [4, 6]]
    (picture,) = ax.images
    assert picture.get_extent() == [0, 16, 8, 0]
    shown = torch.as_tensor(picture.get_array().data, dtype=torch.float64)
    white = 255 if dtype == torch.uint8 else 1
    expected = image.double().movedim(0, -1).squeeze(-1) if len(shape) == 3 else image.double()
    torch.testing.assert_close(shown, expected / white)
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 16), (8, 0))
    assert ax.collections[0].get_edgecolor().tolist() == [list(to_rgba("C0", 0.5)), list(to_rgba("C1", 1.0))]
    texts = [(text.get_text(), text.get_position(), text.get_alpha(), to_rgba(text.get_color())) for text in ax.texts]
    assert texts == [("a", (0, 2), 0.5, to_rgba("C0")), ("b", (4, 0), 1, to_rgba("C1"))]
    ax.figure.canvas.draw()


def test_boxes_alone() -> None:
    ax = draw_boxes(BOXES, facecolors=["red", "blue"], edgecolors="black", linestyles=["-", "--"], alpha=0.5)
    draw_boxes(BOXES[:0], ax=ax)  # a second set; y stays downwards
    assert corners(ax)[0] == [[0, 0.25], [0.5, 0.25], [0.5, 0.5], [0, 0.5]]
    assert ax.collections[0].get_facecolor().tolist() == [list(to_rgba("red", 0.5)), list(to_rgba("blue", 0.5))]
    assert ax.yaxis_inverted()
    assert ax.get_xlim()[0] <= 0
    assert ax.get_xlim()[1] >= 1
    ax.figure.canvas.draw()


FADING = torch.tensor([0.25, 0.75])


@pytest.mark.parametrize("name", ["edgecolors", "edgecolor", "ec", "color"])
@pytest.mark.parametrize("colour", ["red", ["red"], ["red", "blue"]])
def test_outlines_of_any_colours_fade_and_their_labels_have_them(name: str, colour: Any) -> None:
    ax = draw_boxes(BOXES, FADING, labels=["a", "b"], **{name: colour})
    second = "blue" if len(colour) == 2 else "red"
    ax.figure.canvas.draw()
    assert ax.collections[0].get_edgecolor().tolist() == [[1, 0, 0, 0.25], list(to_rgba(second, 0.75))]
    faces = ax.collections[0].get_facecolor().tolist()
    assert faces == ([[1, 0, 0, 0.25], list(to_rgba(second, 0.75))] if name == "color" else [])
    assert [to_rgba(text.get_color()) for text in ax.texts] == [to_rgba("red"), to_rgba(second)]


@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize(
    "style", [{"color": ["red"]}, {"facecolor": "none", "ec": ["red"]}, {"fc": ["red"], "ec": "face"}]
)
def test_one_colour_for_all_points_fades(channels: int, style: dict[str, Any]) -> None:
    depth = {"depthshade": False} if channels == 3 else {}
    ax = draw_points(torch.tensor([[0.0] * channels, [1.0] * channels]), FADING, alpha=0.1, **style, **depth)
    ax.figure.canvas.draw()
    assert sorted(ax.collections[0].get_edgecolor().tolist()) == [[1, 0, 0, 0.25], [1, 0, 0, 0.75]]


@pytest.mark.parametrize(
    "style", [{}, {"color": ["red", "green", "blue"]}, {"facecolors": "none", "edgecolors": "red"}]
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_point_in_space_that_is_not_finite_is_left_out(style: dict[str, Any], bad: float) -> None:
    elements = torch.tensor([[0.0, 0.0, 0.0], [bad, 0.0, 0.0], [1.0, 1.0, 1.0]])
    ax = draw_points(elements, torch.tensor([0.25, 0.5, 0.75]), depthshade=False, **style)
    ax.figure.canvas.draw()
    assert drawn(ax).tolist() == [[0, 0, 0], [1, 1, 1]]
    colours = ax.collections[0].get_edgecolor().tolist()
    assert sorted(colour[3] for colour in colours) == [0.25, 0.75]
    if "color" in style:
        assert colours == [[1, 0, 0, 0.25], [0, 0, 1, 0.75]]


def test_short_names_of_styles() -> None:
    ax = draw_trajectory(torch.rand(6, 3, 2), c="black", lw=3, ms=2)
    assert {(line.get_color(), line.get_linewidth(), line.get_markersize()) for line in ax.lines} == {("black", 3, 2)}
    assert draw_boxes(BOXES, lw=3).collections[0].get_linewidth() == [3]


@pytest.mark.parametrize("top", [-3.0, 0.0, 0.5, 40.0])
def test_the_label_of_a_box_is_in_the_image(top: float) -> None:
    image = torch.rand(3, 48, 64)
    ax = draw_boxes(torch.tensor([[-5.0, top, 20.0, top + 9]]), image=image, labels=["seen"])
    ax.figure.canvas.draw()
    text, frame = ax.texts[0].get_window_extent(), ax.get_window_extent()
    assert frame.x0 <= text.x0 < text.x1 <= frame.x1
    assert frame.y0 <= text.y0 < text.y1 <= frame.y1


def test_a_box_outside_of_the_image_changes_nothing() -> None:
    ax = draw_boxes(
        torch.tensor([[70.0, 60.0, 90.0, 80.0], [-9.0, -9.0, -1.0, -1.0]]), image=torch.rand(48, 64), labels="ab"
    )
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 64), (48, 0))
    ax.figure.canvas.draw()
    frame = ax.get_window_extent()
    assert not any(text.get_window_extent().overlaps(frame) for text in ax.texts)


def diagnosis(**options: Any) -> setpred.Diagnosis:
    torch.manual_seed(0)
    encoder = PooledEncoder(2, 16, 16)
    decoder = DSPNDecoder(encoder, iters=5, set_size=5, channels=2, **options)
    target = torch.randn(8, 5, 2)
    with torch.no_grad():
        return decoder.diagnose(encoder(target) + 0.1, target)


def test_diagnosis() -> None:
    found = diagnosis(lr=0.5)
    ax = draw_diagnosis(found)
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    loss = found.loss / found.loss[0]
    assert lines["representation loss"].tolist() == loss.tolist()
    assert lines["set error"].tolist() == pytest.approx([error / found.set_error[0] for error in found.set_error])
    assert list(lines["set error, begun at the target"]) == pytest.approx([found.target_error[1] / found.set_error[0]])
    own = lines["representation loss of the target"]
    assert list(own) == pytest.approx([found.target_loss / float(found.loss[0])] * 2)
    assert ax.lines[1].get_xdata().tolist() == [0, 5, 10, 20]
    assert ax.get_title(loc="left").splitlines() == [verdict.split(":")[0] for verdict in found.verdicts]
    assert ax.get_yscale() == "log"
    ax.figure.canvas.draw()


def test_a_diagnosis_without_what_a_logarithm_has_no_place_for() -> None:
    found = diagnosis(lr=1e-9)
    ax = draw_diagnosis(found._replace(target_loss=0.0))
    assert found.target_error[1] == 0
    assert [line.get_label() for line in ax.lines] == ["representation loss", "set error"]
    assert ax.get_title(loc="left").startswith("The descent does not move the set")


def test_a_diagnosis_of_nothing_and_of_one_blown_up() -> None:
    decoder = DSPNDecoder(PooledEncoder(2, 16), set_size=5, channels=2)
    ax = draw_diagnosis(decoder.diagnose(torch.full((3, 16), torch.nan), torch.rand(3, 5, 2)))
    assert ax.get_title(loc="left").startswith("NaN or infinity in `z`")
    ax.figure.canvas.draw()
    draw_diagnosis(diagnosis(lr=1e9)).figure.canvas.draw()


@pytest.mark.parametrize("draw", [draw_points, draw_trajectory, draw_boxes])
def test_empty_sets(draw: Any) -> None:
    shape = {draw_points: (0, 2), draw_trajectory: (6, 0, 2), draw_boxes: (0, 4)}[draw]
    for mask in (None, torch.rand(shape[:-1])):
        draw(torch.rand(shape), mask).figure.canvas.draw()


@pytest.mark.parametrize("channels", [2, 3])
def test_no_step_is_no_line_and_one_a_dot(channels: int) -> None:
    for steps in (0, 1):
        ax = draw_trajectory(torch.rand(steps, 3, channels), torch.rand(steps, 3))
        ax.figure.canvas.draw()
        assert [len(line.get_data_3d()[0]) if channels == 3 else len(line.get_xdata()) for line in ax.lines] == [
            steps
        ] * 3


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: draw_points(torch.rand(1, 5, 2)), ValueError, r"`elements` must have shape \(N, C\)"),
        (lambda: draw_points(torch.rand(5, 4)), ValueError, "`elements` must have 2 or 3 channels to be drawn, got 4"),
        (lambda: draw_points(torch.rand(5, 2), torch.rand(4)), ValueError, r"`mask` must have shape \(5,\)"),
        (
            lambda: draw_points(torch.rand(5, 2), torch.tensor([1, 1, 1, 1, torch.nan])),
            ValueError,
            "`mask` must not be",
        ),
        (lambda: draw_points(torch.ones(5, 2, dtype=torch.long)), TypeError, "`elements` must have a floating dtype"),
        (lambda: draw_points(torch.rand(5, 3), ax=axes()), ValueError, "`ax` must have projection='3d'"),
        (lambda: draw_points(torch.rand(5, 2), ax=axes(3)), ValueError, "`ax` must have projection='rectilinear'"),
        (lambda: draw_trajectory(torch.rand(5, 2)), ValueError, r"`elements` must have shape \(T\+1, N, C\)"),
        (lambda: draw_trajectory(torch.rand(6, 5, 2), torch.rand(5)), ValueError, r"`mask` must have shape \(6, 5\)"),
        (lambda: draw_boxes(torch.rand(5, 2)), ValueError, r"`boxes` must have shape \(N, 4\)"),
        (lambda: draw_boxes(BOXES, normalized=True), ValueError, "`normalized` needs `image`"),
        (lambda: draw_boxes(BOXES, labels=["a"]), ValueError, "`labels` must hold one text for each of 2 boxes, got 1"),
        (lambda: draw_boxes(BOXES, image=torch.rand(8, 8, 3)), ValueError, r"`image` must have shape \(3, H, W\)"),
        (lambda: draw_boxes(BOXES, image=torch.rand(3, 0, 8)), ValueError, r"`image` must have shape .* \(3, 0, 8\)"),
        (lambda: draw_boxes(BOXES, image=torch.ones(8, 8).long()), TypeError, "`image` must have a floating dtype"),
        (lambda: draw_boxes(BOXES, image="cat.png"), TypeError, "`image` must be a tensor"),
        (lambda: draw_boxes(BOXES, ax=axes(3)), ValueError, "`ax` must have projection='rectilinear'"),
        (lambda: draw_diagnosis("all is well"), TypeError, "`diagnosis` must be what `DSPNDecoder.diagnose` returns"),
    ],
)
def test_errors(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_without_matplotlib() -> None:
    """The module imports, and a call says what to install."""
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch, setpred.plot\n"
        "try: setpred.plot.draw_points(torch.rand(3, 2))\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'setpred[plot]'" in done.stdout


def test_a_scaler_s_decoder_is_drawn_in_users_coordinates() -> None:
    scaler = StandardScaler(2).fit(100 + torch.rand(50, 2))
    decoder = DSPNDecoder(PooledEncoder(2, 16), 3, PolyakDescent(), set_size=4, channels=2, scaler=scaler)
    elements, _, steps = decoder(torch.randn(1, 16), record=True)
    ax = draw_trajectory(steps.elements[:, 0])
    ends = torch.tensor([[line.get_xdata()[-1], line.get_ydata()[-1]] for line in ax.lines])
    torch.testing.assert_close(ends, elements[0].detach().double())
