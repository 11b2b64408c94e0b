import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import panel
from common import clouds, hanzi, processes, shapes, squares, trial
from common.batches import Batch
from common.tasks import TASKS, Sources
from common.trial import Budget, Contestant, run_trial

from setpred import MLPDecoder, SetPrediction, StandardScaler

pytestmark = pytest.mark.filterwarnings("default")

WITHOUT_FILES = ["digits", "squares", "clouds", "shapes", "boxes", "states"]


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def results(out):
    return {path.stem: json.loads(path.read_text()) for path in (out / "runs").glob("*.json")}


def table_of(out):
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (out / "panel.md").read_text().splitlines()]
    return [lines[0], *lines[2:]]


def forbidden(*_, **__):
    pytest.fail("a finished run was started again")


def test_quick_run_of_all_tasks_without_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(panel, "RATES", dict.fromkeys(panel.RATES, (1e-3,)))
    arguments = ["--quick", "--data", str(tmp_path / "nowhere"), "--cache", str(tmp_path / "cache"), "--seeds", "1"]
    panel.main([*arguments, "--decoders", "mlp", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"mnist is left out: there is no {tmp_path}/nowhere/mnist10k/MNIST/raw/train-images-idx3-ubyte" in printed
    assert "strokes is left out" in printed
    assert results(tmp_path).keys() == {f"{task}-mlp-lr0.001-seed0" for task in WITHOUT_FILES}
    assert [row[0] for row in table_of(tmp_path)[1:] if row[0]] == WITHOUT_FILES
    assert (tmp_path / "panel.png").stat().st_size > 20_000
    assert list((tmp_path / "cache/rendered").iterdir())


@pytest.mark.parametrize(("decoder", "from_tokens"), [("transformer", True), ("slots", True), ("dspn", False)])
def test_images_are_decoded_from_places_where_the_decoder_can(decoder, from_tokens):
    torch.manual_seed(0)
    task = TASKS["shapes"]
    model = trial.make_model(task, panel.CONTESTANTS[decoder])
    images = torch.rand(2, 3, 64, 64)
    prediction, z = model(Batch(torch.empty(2, 0, 0), torch.empty(2, 0), images))
    assert z.shape == ((2, 16, trial.LATENT) if from_tokens else (2, trial.LATENT))
    assert prediction.elements.shape == (2, task.set_size, task.channels)


@pytest.mark.parametrize(
    ("decoder", "made"),
    [("transformer", "TransformerDecoder("), ("slots", "SlotDecoder("), ("refined", "Refined(")],
)
def test_quick_run_of_the_others(tmp_path, monkeypatch, decoder, made):
    monkeypatch.setattr(panel, "RATES", dict.fromkeys(panel.RATES, (1e-3,)))
    panel.main(["--quick", "--tasks", "squares", "--decoders", decoder, "--seeds", "1", "--out", str(tmp_path)])
    (run,) = results(tmp_path).values()
    assert run["steps"] == panel.QUICK_STEPS
    assert run["decoder settings"].startswith(made)


def test_quick_run_is_gone_on_with(tmp_path, monkeypatch):
    arguments = ["--quick", "--tasks", "squares", "shapes", "--decoders", "mlp", "dspn", "--seeds", "2"]
    arguments += ["--cache", str(tmp_path), "--out", str(tmp_path)]
    panel.main(arguments)
    made = results(tmp_path)
    for task in ("squares", "shapes"):
        for decoder in ("mlp", "dspn"):
            own = [run for run in made.values() if (run["task"], run["decoder"]) == (task, decoder)]
            first = {run["lr"]: run["final"] for run in own if run["seed"] == 0}
            assert tuple(sorted(first)) == panel.RATES[panel.kind(task)]
            best = max(first, key=first.get) if task == "shapes" else min(first, key=first.get)
            assert [run["lr"] for run in own if run["seed"] == 1] == [best]
            assert len({run["decoder settings"] for run in own}) == 1
    assert table_of(tmp_path)[0] == ["task", "", "MLP", "DSPN", "DSPN, 80 steps", "DSPN, 4 starts"]

    text = (tmp_path / "panel.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(panel, "run_trial", forbidden)
        panel.main(arguments)
    assert (tmp_path / "panel.md").read_text() == text
    gone = tmp_path / "runs/squares-mlp-lr0.003-seed0.json"
    before = json.loads(gone.read_text())
    gone.unlink()
    started = []
    monkeypatch.setattr(panel, "run_trial", lambda *a, **k: started.append(k["lr"]) or run_trial(*a, **k))
    panel.main(arguments)
    assert started == [0.003]
    assert json.loads(gone.read_text())["test"] == before["test"]  # the same seed, the same run


def test_runs_take_processor_time_in_processes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(panel, "RATES", dict.fromkeys(panel.RATES, (1e-3,)))
    arguments = ["--tasks", "squares", "--decoders", "mlp", "--seeds", "1", "--seconds", "0.3", "--workers", "2"]
    panel.main([*arguments, "--out", str(tmp_path)])
    (run,) = results(tmp_path).values()
    assert 0.3 <= run["seconds"] < 2
    assert run["steps"] > 3
    assert run["curve"][-1] == [run["steps"], run["seconds"], run["final"]]


def test_failed_runs_fail_the_command(tmp_path, monkeypatch):
    process = SimpleNamespace(start=lambda: None, join=lambda: None, exitcode=1)
    context = SimpleNamespace(Process=lambda **_: process)
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda _: context)
    with pytest.raises(SystemExit, match="3 runs failed"):
        panel.main(["--tasks", "squares", "--decoders", "mlp", "--out", str(tmp_path)])


def test_ctrl_c_ends_runs_and_the_command(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    ended = []
    child = SimpleNamespace(terminate=lambda: ended.append(True))
    monkeypatch.setattr(processes.ThreadPoolExecutor, "map", interrupted)
    monkeypatch.setattr(processes.multiprocessing, "active_children", lambda: [child])
    with pytest.raises(SystemExit, match="the same command goes on"):
        panel.main(["--tasks", "squares", "--decoders", "mlp", "--out", str(tmp_path)])
    assert ended == [True]


def write_run(out, task, decoder, lr, seed, *, final, test, steps=10, collapsed=False):
    run = panel.Run(task, decoder, lr, seed)
    run.file(out).parent.mkdir(exist_ok=True)
    ways = panel.CONTESTANTS[decoder].evaluations
    names = TASKS[task].figures
    scores = {way: dict.fromkeys(names, test + k) for k, way in enumerate(ways)}
    result = run._asdict() | {
        "budget": {"seconds": panel.SECONDS[panel.kind(task)], "steps": None},
        "steps": steps,
        "parameters": 1234,
        "curve": [[1, 1.0, 2 * final], [steps, 9.0, final]],
        "final": final,
        "test": scores,
        "collapsed": collapsed,
    }
    run.file(out).write_text(json.dumps(result))


def test_report_shows_test_scores_of_what_is_best_on_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(panel, "run_trial", forbidden)
    for lr, final, test in ((1e-3, 3.0, 0.1), (3e-3, 1.0, 0.2), (1e-2, math.inf, 0.0)):  # 1e-2 diverged
        write_run(tmp_path, "digits", "mlp", lr, 0, final=final, test=test)
        write_run(tmp_path, "digits", "dspn", lr, 0, final=1 / final if final < 9 else 9.0, test=test / 2)
    write_run(tmp_path, "digits", "mlp", 3e-3, 1, final=9.0, test=0.4, steps=20, collapsed=True)
    for lr, final in ((3e-4, 0.2), (1e-3, 0.5), (3e-3, 0.1)):
        write_run(tmp_path, "boxes", "mlp", lr, 0, final=final, test=final)  # average precision: larger is better
    write_run(tmp_path, "boxes", "dspn", 3e-4, 0, final=0.9, test=0.9)  # not all learning rates yet
    panel.main(["--report", "--decoders", "dspn", "mlp", "lstm", "transformer", "--out", str(tmp_path)])
    rows = table_of(tmp_path)
    assert rows[0] == ["task", "", "DSPN", "DSPN, 80 steps", "DSPN, 4 starts", "MLP", "LSTM", "transformer"]
    assert rows[1] == [
        "digits",
        "Hungarian error x 1e4",
        "**500.000**",
        "10500.000",
        "20500.000",
        "3000.000 ± 1414.214",
        "-",
        "-",
    ]
    assert rows[2:6] == [
        ["", "learning rate", "0.001", "", "", "0.003", "-", "-"],
        ["", "training steps", "10", "", "", "15", "-", "-"],
        ["", "parameters", "1,234", "", "", "1,234", "-", "-"],
        ["", "seeds, collapsed", "1, 0", "", "", "2, 1", "-", "-"],
    ]
    assert rows[6] == ["boxes", "mean AP, %", "-", "-", "-", "50.0", "-", "-"]
    assert (tmp_path / "panel.png").exists()


def test_curves_are_in_the_units_of_the_table(tmp_path, monkeypatch):
    for lr in panel.RATES["image"]:
        write_run(tmp_path, "boxes", "mlp", lr, 0, final=0.25, test=0.2)
    drawn = []
    monkeypatch.setattr(panel, "draw_panel", lambda panels, path: drawn.append(panels))
    panel.main(["--report", "--out", str(tmp_path)])
    assert drawn == [{"boxes": ("mean AP, %", False, {"MLP": [[(1, 1.0, 50.0), (10, 9.0, 25.0)]]})}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "colours"], "argument --tasks: invalid choice: 'colours'"),
        (["--decoders", "gan"], "argument --decoders: invalid choice: 'gan'"),
        (["--seeds", "0"], "--seeds: must be at least 1"),
        (["--seconds", "0"], "--seconds: must be positive"),
        (["--workers", "0"], "--workers: must be at least 1"),
        (["--out", __file__], "Not a directory"),
        (["--cache", __file__], "File exists"),
        (["--tasks", "mnist", "--data", "nowhere"], "no task is left"),
    ],
)
def test_bad_command_lines_are_refused_before_any_training(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(panel, "train", forbidden)
    with pytest.raises(SystemExit) as error:
        panel.main(["--out", str(tmp_path), *arguments])
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_results_of_another_budget_are_refused(tmp_path, monkeypatch):
    write_run(tmp_path, "digits", "mlp", 1e-3, 0, final=1.0, test=1.0)
    monkeypatch.setattr(panel, "run_trial", forbidden)
    monkeypatch.setattr(panel, "train", lambda _: 0)
    panel.main(["--tasks", "digits", "--out", str(tmp_path)])
    for changed in (["--seconds", "7"], ["--quick"]):
        with pytest.raises(SystemExit, match=r"lr0\.001-seed0\.json was made with another --seconds or --quick"):
            panel.main(["--tasks", "digits", "--out", str(tmp_path), *changed])
    panel.main(["--tasks", "squares", "--seconds", "7", "--out", str(tmp_path)])  # of another task


class Exact(nn.Module):
    """Predicts what is asked for, in the coordinates of the scaler."""

    def forward(self, batch, **options):
        return SetPrediction(batch.elements, batch.mask.float()), None


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_exact_predictions_have_the_best_score(name, tmp_path):
    task = TASKS[name]
    data = task.load(Sources(tmp_path, tmp_path, quick=True))
    scaler = trial.fit_scaler(data, task.channels)
    for part in data[1:]:
        assert part.elements.shape[1:] == (task.set_size, task.channels)
        assert (part.images is not None) == task.images
        score = trial.evaluate(Exact(), scaler, task, part, {})
        assert score.keys() == task.figures.keys()
        for key, figure in task.figures.items():
            assert score[key] == pytest.approx(1 if figure.larger_is_better else 0, abs=1e-5)


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_predictions_that_are_not_finite_have_the_worst_score(name, tmp_path):
    task = TASKS[name]
    data = task.load(Sources(tmp_path, tmp_path, quick=True))

    class Broken(Exact):
        def forward(self, batch, **options):
            return SetPrediction(batch.elements, batch.mask * torch.nan), None

    score = trial.evaluate(Broken(), StandardScaler(task.channels), task, data.test, {})
    assert set(score.values()) == {0.0 if task.images else math.inf}


def mlp(encoder, size, channels):
    return MLPDecoder(trial.LATENT, size, channels, 8)


def test_learning_rate_goes_along_a_cosine_over_the_seconds_used(monkeypatch, tmp_path):
    clock = iter(range(1000))
    monkeypatch.setattr(trial.time, "process_time", lambda: float(next(clock)))  # each step takes a second
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *a: rates.append(self.param_groups[0]["lr"]) or step(self, *a)
    )
    data = TASKS["squares"].load(Sources(tmp_path, None, quick=True))
    contestant = Contestant(mlp, {"as it is": {}, "again": {}})
    result = run_trial(TASKS["squares"], data, contestant, lr=0.1, seed=0, budget=Budget(4.0))
    assert rates == pytest.approx([0.1, 0.05 * (1 + math.sqrt(0.5)), 0.05, 0.05 * (1 - math.sqrt(0.5))])
    assert (result["steps"], result["seconds"]) == (4, 4.0)
    assert [point[:2] for point in result["curve"]] == [(k, float(k)) for k in (1, 2, 3, 4)]
    assert result["test"].keys() == {"as it is", "again"}
    assert not result["diverged"]


def test_a_run_that_diverges_ends_and_has_the_worst_score(tmp_path):
    class Breaks(MLPDecoder):
        def forward(self, z):
            elements, mask, _ = super().forward(z)
            calls.append(self.training)
            return SetPrediction(elements * (torch.nan if sum(calls) > 6 else 1), mask)

    calls = []
    data = TASKS["squares"].load(Sources(tmp_path, None, quick=True))
    contestant = Contestant(lambda encoder, size, channels: Breaks(trial.LATENT, size, channels, 8), {"": {}})
    result = run_trial(TASKS["squares"], data, contestant, lr=0.1, seed=0, budget=Budget(1.0, steps=100))
    assert result["diverged"]
    assert result["collapsed"]
    assert result["final"] == result["test"][""]["mean"] == math.inf
    assert result["steps"] == 6


@pytest.mark.parametrize(
    ("name", "before", "final", "collapsed"),
    [
        ("squares", [0.5, 0.4, 0.1], 0.16, True),
        ("squares", [0.5, 0.4, 0.1], 0.14, False),
        ("squares", [0.5, 4e-5, 1e-5], 3e-5, False),  # hardly anything of what was learned is lost
        ("shapes", [0.0, 0.1, 0.3], 0.19, True),
        ("shapes", [0.0, 0.1, 0.3], 0.2, False),
        ("shapes", [0.0, 0.009, 0.009], 0.0, False),  # noise
    ],
)
def test_a_run_that_ends_much_worse_than_its_best_has_collapsed(tmp_path, monkeypatch, name, before, final, collapsed):
    task = TASKS[name]
    scores = iter([*before, final, 0.0])  # untrained, on the way, at the end; the last one is of the test
    monkeypatch.setattr(trial, "evaluate", lambda *_: {task.selection: next(scores)})
    data = task.load(Sources(tmp_path, None, quick=True))
    result = run_trial(task, data, Contestant(mlp, {"": {}}), lr=0.1, seed=0, budget=Budget(1.0, steps=2))
    assert result["collapsed"] == collapsed
    assert result["final"] == final


def test_batches_go_through_all_data_in_a_new_order_each_time():
    data = Batch(torch.arange(10.0).view(10, 1, 1), torch.ones(10, 1, dtype=torch.bool))
    taken = trial.batches(data, 4, torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(taken).elements.flatten() for _ in range(3)]) for _ in range(2)]
    assert all(epoch.sort().values.tolist() == list(range(10)) for epoch in epochs)
    assert not epochs[0].equal(epochs[1])


def test_error_of_a_square_is_that_of_its_nearest_matching():
    angles = torch.tensor([0.3, 1.0, 2.0])
    truth = squares.squares(angles)
    turn = 0.2
    turned = squares.squares(angles + turn)
    chord = 2 * math.sin(turn / 2)
    errors = squares.corner_errors(turned.elements[:, [2, 0, 3, 1]], turned.mask.float(), truth.elements)
    torch.testing.assert_close(errors, torch.full((3, 4), chord))
    next_corner = squares.squares(angles + math.pi / 2)  # the same set
    torch.testing.assert_close(
        squares.corner_errors(next_corner.elements, truth.mask.float(), truth.elements), torch.zeros(3, 4)
    )
    diagonal = squares.squares(angles + math.pi / 4)  # as far as a square can be
    worst = squares.corner_errors(diagonal.elements, truth.mask.float(), truth.elements)
    torch.testing.assert_close(worst, torch.full((3, 4), 2 * math.sin(math.pi / 8)))


def test_error_of_a_square_is_of_each_corner_by_itself():
    truth = squares.squares(torch.tensor([0.0]))
    moved = truth.elements.clone()
    moved[0, 2] += torch.tensor([0.3, 0.4])
    score = squares.score_squares(moved, truth.mask.float(), truth.elements, truth.mask)
    assert score == pytest.approx({"worst": 0.5, "mean": 0.125})
    absent = truth.mask.float()
    absent[0, 1] = 0.4  # counts as in the middle
    assert squares.score_squares(truth.elements, absent, truth.elements, truth.mask) == pytest.approx(
        {"worst": 1.0, "mean": 0.25}
    )


def test_grid_of_squares_has_every_angle_once():
    grid = squares.grid_of_squares(90, offset=0.5)
    angle = torch.atan2(grid.elements[..., 1], grid.elements[..., 0]).remainder(math.pi / 2).median(1).values
    torch.testing.assert_close(angle.rad2deg(), torch.arange(90) + 0.5, rtol=0, atol=1e-3)


def test_clouds_are_on_the_surfaces_of_stretched_and_turned_shapes():
    cloud = clouds.draw_clouds(300, torch.Generator().manual_seed(3)).elements
    assert cloud.shape == (300, clouds.POINTS, 3)
    x, y, z = cloud.unbind(-1)
    quadrics = torch.stack([x * x, y * y, z * z, x * y, x * z, y * z], -1).double()
    ones = torch.ones(300, clouds.POINTS, 1).double()
    fit = torch.linalg.lstsq(quadrics, ones).solution
    off = (quadrics @ fit - ones).square().mean((1, 2)).sqrt()
    ellipsoids = off < 1e-4  # a third of them; the others are far from it
    assert 70 < ellipsoids.sum() < 130
    assert (off[~ellipsoids] > 0.02).all()
    form = torch.stack([fit[..., i, 0] * (1 if i < 3 else 0.5) for i in (0, 3, 4, 3, 1, 5, 4, 5, 2)], -1)
    axes = torch.linalg.eigvalsh(form.view(-1, 3, 3)[ellipsoids]) ** -0.5
    assert axes.min() > 0.3 - 1e-3
    assert axes.max() < 1 + 1e-3
    assert axes.std() > 0.1


@pytest.mark.parametrize("is_square", [False, True])
def test_boxes_of_shapes_are_where_their_pixels_are(is_square):
    x, y, radius = 0.37, 0.6, 0.121
    element = torch.tensor([[[x, y, radius, not is_square, is_square]]])
    image = shapes._paint(element, torch.ones(1, 1, 3))[0, 0].float() / 255
    rows, columns = image.nonzero().unbind(1)
    edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / shapes.SIZE
    box = torch.tensor([x - radius, y - radius, x + radius, y + radius])
    assert (edges - box).abs().max() <= 1.01 / shapes.SIZE
    area = 4 * radius**2 if is_square else math.pi * radius**2
    assert image.mean().item() == pytest.approx(area, rel=0.03)


def test_drawn_shapes_are_in_the_picture_and_later_ones_in_front():
    data = shapes.draw_shapes(300, torch.Generator().manual_seed(0))
    assert data.images.shape == (300, 3, 64, 64)
    assert data.images.dtype == torch.uint8
    assert set(data.mask.sum(1).tolist()) == {3, 4, 5, 6}
    assert not data.elements[~data.mask].any()
    present = data.elements[data.mask]
    assert (present[:, 3:].sum(1) == 1).all()
    assert (present[:, :2] - present[:, 2:3] >= 0).all()
    assert (present[:, :2] + present[:, 2:3] <= 1).all()
    element = torch.tensor([[[0.5, 0.5, 0.1, 1, 0], [0.5, 0.5, 0.1, 0, 1]]])
    image = shapes._paint(element, torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]]))
    assert image[0, :, 32, 32].tolist() == [round(255 * 0.3), round(255 * 0.3), 255]


def test_shapes_of_another_kind_are_never_near():
    target = torch.tensor([[[0.5, 0.5, 0.1, 1.0, 0.0]]])
    pred = torch.tensor([[[0.5, 0.5, 0.1, 0.6, 0.4], [0.5, 0.5, 0.1, 0.4, 0.6], [0.6, 0.5, 0.1, 0.9, 0.0]]])
    torch.testing.assert_close(shapes.shape_iou(pred, target)[0, :, 0], torch.tensor([1.0, -math.inf, 1 / 3]))


def write_characters(root, count):
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 13, count).astype(np.uint8)
    strokes = generator.random((count, 12, 10)) * (np.arange(12) < counts[:, None])[..., None]
    path = root / hanzi.FILE
    path.parent.mkdir()
    images = np.arange(count, dtype=np.uint8)[:, None, None].repeat(64, 1).repeat(64, 2)
    np.savez(path, images=images, strokes=strokes.astype(np.float16), counts=counts)
    return counts, strokes


def test_characters_are_read_and_split(tmp_path):
    counts, strokes = write_characters(tmp_path, 1003)
    data = TASKS["strokes"].load(Sources(tmp_path, None))
    for part, rows in (
        (data.test, slice(0, 500)),
        (data.validation, slice(500, 1000)),
        (data.train, slice(1000, None)),
    ):
        assert part.mask.sum(1).tolist() == counts[rows].tolist()
        np.testing.assert_allclose(part.elements, strokes[rows], atol=1e-3)
        assert part.images.shape[1:] == (3, 64, 64)
        assert part.images[:, 0, 0, 0].tolist() == [k % 256 for k in range(1003)[rows]]
    arguments = ["--tasks", "strokes", "--decoders", "mlp", "--seeds", "1", "--quick", "--data", str(tmp_path)]
    panel.main([*arguments, "--out", str(tmp_path / "out")])
    assert len(results(tmp_path / "out")) == 3


def test_characters_that_cannot_be_read_are_said(tmp_path):
    write_characters(tmp_path, 5)
    (tmp_path / hanzi.FILE).write_bytes(b"PK no archive")
    with pytest.raises(SystemExit, match=r"--data: .*strokes\.npz cannot be read"):
        panel.main(["--tasks", "strokes", "--data", str(tmp_path), "--out", str(tmp_path / "out")])


def literal_distance(a, b):
    pairs = zip(a.view(5, 2).tolist(), b.view(5, 2).tolist(), strict=True)
    return sum(math.hypot(x - u, y - v) for (x, y), (u, v) in pairs) / 5


def literal_precision(elements, score, target, target_mask, threshold):
    """Each prediction may be right about its nearest stroke, once; then precision over recall, best to the right."""
    judged = []
    for i in range(len(elements)):
        strokes = target[i][target_mask[i]]
        taken = set()
        for j in score[i].argsort(descending=True).tolist():
            distances = [literal_distance(elements[i, j], stroke) for stroke in strokes]
            nearest = min(range(len(distances)), key=distances.__getitem__)
            right = distances[nearest] <= threshold and nearest not in taken
            if right:
                taken.add(nearest)
            judged.append((score[i, j].item(), right))
    judged.sort(reverse=True)
    hits = [sum(right for _, right in judged[: k + 1]) for k in range(len(judged))]
    precision = [hit / (k + 1) for k, hit in enumerate(hits)]
    return sum(max(precision[k:]) for k, (_, right) in enumerate(judged) if right) / target_mask.sum().item()


def test_average_precision_of_strokes_is_the_literal_one():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(7, 6, 10, generator=generator)
    target_mask = torch.arange(6) < torch.randint(1, 7, (7, 1), generator=generator)
    noise = torch.randn(7, 6, 10, generator=generator) * torch.rand(7, 6, 1, generator=generator)
    elements = (target + 0.15 * noise)[:, torch.randperm(6, generator=generator)]
    score = torch.rand(7, 6, generator=generator)
    scores = TASKS["strokes"].score(elements, score, target, target_mask)
    thresholds = {"AP0.2": 0.2, "AP0.1": 0.1, "AP0.05": 0.05, "AP0.025": 0.025}
    wanted = {name: literal_precision(elements, score, target, target_mask, t) for name, t in thresholds.items()}
    assert len(set(wanted.values())) == 4
    assert scores == pytest.approx({"mean": sum(wanted.values()) / 4, **wanted})


def test_strokes_have_a_direction():
    stroke = torch.tensor([0.0, 0.0, 0.1, 0.0, 0.2, 0.0, 0.3, 0.0, 0.4, 0.0])
    other = stroke + torch.tensor([0.0, 0.5]).repeat(5)
    backwards = other.view(5, 2).flip(0).flatten()
    elements, target = torch.stack([stroke + 0.04, backwards])[None], torch.stack([other, stroke])[None]
    here = torch.ones(1, 2, dtype=torch.bool)
    distance = hanzi.stroke_distance(elements, target)[0]
    shifted = math.hypot(0.04, 0.04)
    torch.testing.assert_close(distance[0, 1], torch.tensor(shifted))
    torch.testing.assert_close(distance[1, 0], torch.tensor(0.24))  # 0.4, 0.2, 0, 0.2, 0.4
    scores = TASKS["strokes"].score(elements, torch.tensor([[0.9, 0.8]]), target, here)
    assert scores == pytest.approx({"mean": 0.25, "AP0.2": 0.5, "AP0.1": 0.5, "AP0.05": 0, "AP0.025": 0})
