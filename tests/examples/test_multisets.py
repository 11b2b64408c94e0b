import json

import pytest
import torch
from torch.autograd import gradcheck

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import multisets
from common.batches import Batch
from common.numbering import channels, draw_numbered, given_classes_loss, pair_loss, score_numbers
from common.numbering_models import to_simplex

from setpred import linear_assignment
from setpred.functional import cross_entropy_cost, euclidean_cost

pytestmark = pytest.mark.filterwarnings("default")

NUMBERERS = multisets.CONTESTANTS["numbering"]
SMALL = multisets.numbering(6, 2, 8)


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def sets(count=5, size=6, classes=2, seed=0):
    return draw_numbered(count, size, classes, torch.Generator().manual_seed(seed))


def shuffled(elements):
    return elements[:, torch.randperm(elements.shape[1])]


def test_elements_of_a_class_are_numbered_from_zero():
    elements, mask, _ = sets()
    assert mask.all()
    numbers, classes = (elements[..., part] for part in channels(elements))
    assert numbers.shape == (5, 6, 6)
    assert classes.shape == (5, 6, 2)
    for number, kind in zip(numbers.argmax(-1), classes.argmax(-1), strict=True):
        for k in range(2):
            assert number[kind == k].tolist() == list(range(int((kind == k).sum())))


def test_scores_are_of_multisets():
    target, mask, _ = sets()
    assert score_numbers(shuffled(3 * target - 1), mask, target, mask) == {"elements": 1, "sets": 1}
    wrong = target.clone()
    wrong[0, :2, :6] = torch.eye(6)[5]  # both elements of set 0 that come first get a number that there is not
    assert score_numbers(wrong, mask, target, mask) == pytest.approx({"sets": 4 / 5, "elements": 28 / 30})
    twice = target.clone()
    twice[0, 1] = twice[0, 0]  # a pair that is there, but once
    assert score_numbers(twice, mask, target, mask) == pytest.approx({"sets": 4 / 5, "elements": 29 / 30})


def test_sets_that_are_right_are_those_of_the_papers_accuracy():
    target, mask, _ = sets(40)
    numbers, classes = channels(target)
    torch.manual_seed(0)
    pred = shuffled(target)
    pred[..., numbers] += 0.3 * torch.randn(40, 6, 6)
    apart = 1e3 * (1 - pred[..., classes] @ target[..., classes].mT)
    matching = linear_assignment(cross_entropy_cost(pred[..., numbers], target[..., numbers]) + apart)
    wanted = target[..., numbers].argmax(-1).gather(1, matching)
    papers = (pred[..., numbers].argmax(-1) == wanted).all(1).float().mean().item()
    assert 0.1 < papers < 0.9
    assert score_numbers(pred, mask, target, mask)["sets"] == pytest.approx(papers)


def test_given_classes_are_matched_among_themselves():
    kinds, numbers = torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 2, 3])
    target = torch.cat([torch.eye(6)[numbers], torch.eye(2)[kinds]], 1).unsqueeze(0)
    mask = torch.ones(1, 6, dtype=torch.bool)
    loss = given_classes_loss(euclidean_cost)
    assert loss(shuffled(target), target, mask, mask) == 0
    exchanged = target.clone()
    exchanged[0, [1, 5], :6] = target[0, [5, 1], :6]  # right, had they the other class
    torch.testing.assert_close(loss(exchanged, target, mask, mask), torch.tensor(2 * 2**0.5 / 6))


def test_where_classes_are_predicted_they_are_charged():
    target, mask, _ = sets()
    assert pair_loss(100 * shuffled(target), target, mask, mask) < 1e-6
    logits = 100 * target
    logits[..., channels(target)[1]] = 0
    torch.testing.assert_close(pair_loss(logits, target, mask, mask), torch.tensor(2.0).log())


def test_simplex_projection_is_the_nearest_point():
    torch.manual_seed(0)
    rows = 2 * torch.randn(50, 7, dtype=torch.float64)
    nearest = to_simplex(rows)
    torch.testing.assert_close(nearest.sum(-1), torch.ones(50, dtype=torch.float64))
    assert nearest.min() == 0
    # Optimality: the gradient of the distance is least, and the same, wherever there is something.
    gradient = nearest - rows
    least = gradient.amin(-1, keepdim=True)
    torch.testing.assert_close(gradient.where(nearest > 0, least), least.expand_as(gradient))
    assert (gradient >= least).all()
    assert gradcheck(to_simplex, rows.requires_grad_())


def test_simplex_projection_ends_where_rounding_takes_back_what_was_left_out():
    row = torch.tensor([[1.8262605667114258, 2.8262603282928467, 1.8262605667114258]])  # without end, else
    torch.testing.assert_close(to_simplex(row), torch.tensor([[0.0, 1.0, 0.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["dspn", "idspn", "unrolled"])
def test_descent_parts_equal_elements_and_keeps_classes(name):
    torch.manual_seed(0)
    model = NUMBERERS[name].make(SMALL)
    batch = Batch(*sets()[:2])
    (elements, _, _), _ = model(batch)
    numbers, classes = channels(elements)
    assert torch.equal(elements[..., classes], batch.elements[..., classes])
    torch.testing.assert_close(elements[..., numbers].sum(-1), torch.ones(5, 6))
    assert not torch.equal(elements[:, 0, numbers], elements[:, 1, numbers])
    NUMBERERS[name].loss(elements, *batch[:1], *batch[1:2] * 2).backward()
    for part in (model.source, model.decoder.encoder):
        assert all(parameter.grad.abs().max() > 0 for parameter in part.parameters())


def test_self_attention_gives_equal_elements_equal_numbers():
    torch.manual_seed(0)
    batch = Batch(*sets()[:2])
    (elements, _, _), _ = NUMBERERS["attention"].make(SMALL)(batch)
    numbers, classes = channels(elements)
    same = batch.elements[..., classes] @ batch.elements[..., classes].mT == 1
    distance = torch.cdist(elements[..., numbers], elements[..., numbers])
    assert distance[same].max() < 1e-5 < distance[~same].min()


def test_order_of_the_elements_is_of_no_importance_to_those_that_see_tokens():
    batch = Batch(*sets()[:2])
    model = NUMBERERS["learned"].make(SMALL)
    torch.testing.assert_close(
        model(batch)[0].elements, model(batch._replace(elements=shuffled(batch.elements)))[0].elements
    )


def runs(out):
    return {path.stem: json.loads(path.read_text()) for path in (out / "runs").iterdir()}


def test_quick_run_is_gone_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(multisets, "RATES", (1e-3, 1e-2))
    arguments = ["--quick", "--tasks", "16x4-640", "random-8x2", "--decoders", "dspn", "lstm", "--seeds", "2"]
    multisets.main([*arguments, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert [line[0] for line in lines if not line[0].startswith("-")] == [
        *("decoder", "DSPN, recommended", "bidirectional LSTM"),
        *("decoder", "DSPN, recommended", "LSTM"),
    ]
    assert lines[0][:3] == ["decoder", "16x4-640: elements, %", "16x4-640: sets, %"]
    made = runs(tmp_path)
    for first, task, best in (("16x4-6400", "16x4-640", max), ("random-8x2", "random-8x2", min)):
        for name in ("dspn", "lstm"):
            tried = {run["lr"]: run["final"] for run in made.values() if (run["task"], run["decoder"]) == (first, name)}
            assert tried.keys() == {1e-3, 1e-2}
            chosen = best(tried, key=tried.get)
            assert f"{task}-{name}-lr{chosen:g}-seed1" in made
    assert len(made) == 2 * (2 + 2) + 2 * (2 + 1)
    run = made["random-8x2-lstm-lr0.01-seed0"]
    assert run["steps"] == multisets.QUICK_STEPS
    assert run["decoder settings"].startswith("LSTMDecoder(")
    assert (tmp_path / "multisets.md").read_text().split() == printed[printed.index("| decoder") :].split()

    gone = tmp_path / "runs/random-8x2-lstm-lr0.01-seed0.json"
    gone.unlink()
    started = []
    perform = multisets.perform
    monkeypatch.setattr(multisets, "perform", lambda run, options: started.append(run) or perform(run, options))
    multisets.main([*arguments, "--out", str(tmp_path)])
    assert started == [("random-8x2", "lstm", 0.01, 0)]
    assert json.loads(gone.read_text())["test"] == run["test"]  # the same seed, the same run


@pytest.mark.parametrize("task", ["64x8-640", "random-32x8"])
def test_every_decoder_has_a_quick_run(task, tmp_path):
    multisets.main(["--quick", "--tasks", task, "--seeds", "1", "--lr", "0.001", "--out", str(tmp_path)])
    assert {run["decoder"] for run in runs(tmp_path).values()} == multisets.contestants(task).keys()
    assert {(run["task"], run["lr"]) for run in runs(tmp_path).values()} == {(task, 0.001)}


def test_runs_take_processor_time_in_processes_of_their_own(tmp_path):
    arguments = ["--tasks", "random-8x2", "--decoders", "mlp", "--seeds", "1", "--workers", "2", "--lr", "0.001"]
    multisets.main([*arguments, "--seconds", "0.3", "--out", str(tmp_path)])
    (run,) = runs(tmp_path).values()
    assert 0.3 <= run["seconds"] < 2
    with pytest.raises(SystemExit, match="was made with another --seconds"):
        multisets.main([*arguments, "--seconds", "5", "--out", str(tmp_path)])


def test_report_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(multisets, "train", lambda _: pytest.fail("a training has begun"))
    multisets.main(["--report", "--out", str(tmp_path)])
    assert "nothing is finished" in capsys.readouterr().out


def test_mistakes_are_said(tmp_path, capsys):
    (tmp_path / "file").touch()
    for arguments in (["--tasks", "16x4"], ["--seconds", "0"], ["--seeds", "0"], ["--out", str(tmp_path / "file")]):
        with pytest.raises(SystemExit):
            multisets.main(["--quick", *arguments])
        assert capsys.readouterr().err
