import json
import os
import signal
import types
import warnings
from types import MappingProxyType

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from common.batches import Batch, InMemory
from common.checkpoint import MetricsFile, load, save
from common.decoders import evaluation_work
from common.engine import run
from common.models import SetPredictor

from setpred import MLPDecoder, SetPrediction, hungarian_loss

SAMPLES, SIZE, CHANNELS = 40, 3, 2


class Toy:
    """Sets that a linear map of an image makes; an epoch has ten steps."""

    name = "toy"
    lr = 0.01
    selection = "hungarian"
    largest = False
    evaluated = ("few",)
    quick = MappingProxyType({"width": 2})

    def __init__(self, after_step=None, stream=False):
        self.after_step, self.stream, self.calls, self.drawn, self.read = after_step, stream, 0, 0, []

    def add_arguments(self, parser):
        parser.add_argument("--width", type=int, default=4)
        parser.add_argument("--few", action="store_true")

    def check(self, options, given):
        pass

    def set_size(self, options):
        return SIZE

    def all_data(self):
        generator = torch.Generator().manual_seed(7)
        batch = Batch(
            torch.rand(SAMPLES, SIZE, CHANNELS, generator=generator),
            torch.rand(SAMPLES, SIZE, generator=generator) < 0.7,
            torch.rand(SAMPLES, 3, 2, 2, generator=generator),
        )
        return InMemory(batch)

    def training_data(self, options):
        self.read.append("training")
        data = self.all_data()
        return types.SimpleNamespace(batch=self.stream_batch) if self.stream else data, data.first(8)

    def test_data(self, options):
        self.read.append("test")
        return self.all_data().first(3 if options.few else 12)

    def stream_batch(self, k, device):
        generator = torch.Generator().manual_seed(k)
        return Batch(
            torch.rand(4, SIZE, CHANNELS, generator=generator), torch.ones(4, SIZE), torch.full((4, 12), (k % 9) / 9)
        )

    def build(self, options):
        source = Source()
        model = SetPredictor(source, MLPDecoder(12, SIZE, CHANNELS, options.width))

        def loss(prediction: SetPrediction, batch: Batch, z: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            noise = torch.rand(())  # whoever resumes must go on in the same random sequence
            value = hungarian_loss(prediction.elements, batch.elements, prediction.mask, batch.mask) * (1 + 0.1 * noise)
            if self.after_step is not None:
                value = self.after_step(self.calls, value)
            return value

        return model, loss

    def score(self, predictions):
        elements, mask, target, target_mask = predictions
        return {"hungarian": hungarian_loss(elements, target, mask, target_mask).item()}

    def source(self, options):
        return "toy data"

    def report(self, scores, options):
        return str(scores)

    def draw(self, model, batch, options):
        self.drawn += 1


class Source(nn.Module):
    def forward(self, batch):
        return batch.images.flatten(1)


@pytest.fixture(autouse=True)
def _as_a_script():
    """In a script, a library's warning is no error."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        threads = torch.get_num_threads()
        yield
        torch.set_num_threads(threads)


def start(out, *arguments, experiment=None):
    arguments = ["--decoder", "mlp", "--device", "cpu", "--batch-size", "4", "--out", str(out), *map(str, arguments)]
    run(experiment or Toy(), arguments)
    return json.loads((out / "result.json").read_text())


def interrupt_at(step):
    def after_step(calls, value):
        if calls == step:
            os.kill(os.getpid(), signal.SIGINT)
        return value

    return after_step


def weights(out, name="last.pt"):
    return torch.load(out / name, weights_only=True)["model"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("step", [3, 10, 24])
def test_ctrl_c_saves_and_a_resumed_run_ends_like_an_undisturbed_one(tmp_path, step, stream):
    budget = ["--steps", 30, "--validations", 3]
    expected = start(tmp_path / "a", *budget, experiment=Toy(stream=stream))
    with pytest.raises(SystemExit) as left:
        start(tmp_path / "b", *budget, experiment=Toy(interrupt_at(step), stream=stream))
    assert left.value.code == 130
    assert load(tmp_path / "b/last.pt")["step"] == step
    found = start(tmp_path / "b", *budget, "--resume", experiment=Toy(stream=stream))
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    torch.testing.assert_close(weights(tmp_path / "b"), weights(tmp_path / "a"), rtol=0, atol=0)


def test_best_checkpoint_is_the_one_with_the_best_validation_score(tmp_path):
    result = start(tmp_path, "--steps", 60, "--validations", 6, "--lr", 0.3)
    lines = [line for line in MetricsFile(tmp_path / "metrics.jsonl").read() if "validation" in line]
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    best = min(lines, key=lambda line: line["validation"]["-"]["hungarian"])
    assert (result["step"], result["best"]["validation"]) == (best["step"], best["validation"])
    assert load(tmp_path / "best.pt")["step"] == best["step"]


def test_best_checkpoint_is_written_again_if_the_kill_came_before_it(tmp_path):
    budget = ["--steps", 20, "--validations", 1]
    start(tmp_path, *budget)
    last = load(tmp_path / "last.pt")
    assert last["best"]["step"] == last["step"] == 20
    (tmp_path / "best.pt").unlink()
    start(tmp_path, *budget, "--resume")
    torch.testing.assert_close(weights(tmp_path, "best.pt"), weights(tmp_path), rtol=0, atol=0)


def test_run_leaves_its_configuration_metrics_and_pictures(tmp_path):
    experiment = Toy()
    result = start(tmp_path, "--epochs", 2, "--seed", 3, "--validations", 2, experiment=experiment)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["options"]["seed"] == 3
    assert config["versions"]["torch"] == torch.__version__
    assert load(tmp_path / "last.pt")["step"] == 20  # two epochs of ten steps
    assert set(result["test"]["-"]) == {"hungarian"}
    assert experiment.drawn == 1
    assert (tmp_path / "curves.png").stat().st_size > 5_000


def test_no_test_leaves_the_test_split_alone(tmp_path):
    experiment = Toy()
    assert "test" not in start(tmp_path, "--steps", 2, "--no-test", experiment=experiment)
    assert experiment.drawn == 0


def test_evaluate_reads_the_test_split_alone(tmp_path):
    start(tmp_path, "--steps", 2)
    experiment = Toy()
    run(experiment, ["--evaluate", str(tmp_path / "best.pt"), "--device", "cpu"])
    assert experiment.read == ["test"]
    experiment = Toy()
    start(tmp_path / "tuning", "--steps", 2, "--no-test", experiment=experiment)
    assert experiment.read == ["training"]


def test_evaluating_something_else_leaves_the_result_of_the_run_alone(tmp_path):
    trained = start(tmp_path, "--steps", 5)
    evaluate = ["--evaluate", str(tmp_path / "best.pt"), "--device", "cpu"]
    run(Toy(), [*evaluate, "--few"])
    assert json.loads((tmp_path / "result.json").read_text()) == trained
    other = json.loads((tmp_path / "evaluation/result.json").read_text())
    assert other["test"] != trained["test"]
    run(Toy(), [*evaluate, "--workers", "0"])  # how, not what
    assert json.loads((tmp_path / "result.json").read_text()) == trained


def test_split_without_samples_is_an_error(tmp_path):
    class Empty(Toy):
        def test_data(self, options):
            return self.all_data().first(0)

    with pytest.raises(SystemExit, match="toy data: no samples to test on"):
        start(tmp_path, "--steps", 2, experiment=Empty())


def test_evaluate_gives_the_figures_of_the_training_run(tmp_path):
    trained = start(tmp_path / "a", "--steps", 5, "--width", 6)
    run(Toy(), ["--evaluate", str(tmp_path / "a/best.pt"), "--device", "cpu", "--out", str(tmp_path / "b")])
    assert json.loads((tmp_path / "b/result.json").read_text()) == trained


def test_budget_in_seconds_ends(tmp_path):
    start(tmp_path, "--seconds", 0.05, "--threads", 1, "--schedule", "cosine", "--validations", 2)
    assert load(tmp_path / "last.pt")["seconds"] >= 0.05
    assert len([line for line in MetricsFile(tmp_path / "metrics.jsonl").read() if "validation" in line]) == 2


def test_existing_run_is_not_written_over(tmp_path):
    start(tmp_path, "--steps", 2)
    with pytest.raises(SystemExit, match="holds a run already"):
        start(tmp_path, "--steps", 2)


def test_resuming_with_other_options_is_an_error(tmp_path):
    start(tmp_path, "--steps", 2)
    with pytest.raises(SystemExit, match=r"--lr 0.01 \(now 0.02\)"):
        start(tmp_path, "--steps", 2, "--resume", "--lr", 0.02)


def test_what_is_not_given_again_is_as_it_was_when_resumed(tmp_path):
    start(tmp_path / "a", "--steps", 10, "--width", 6, "--lr", 0.02)
    start(tmp_path / "b", "--steps", 5, "--width", 6, "--lr", 0.02)
    run(Toy(), ["--out", str(tmp_path / "b"), "--resume", "--steps", "10", "--device", "cpu"])
    torch.testing.assert_close(weights(tmp_path / "b"), weights(tmp_path / "a"), rtol=0, atol=0)
    assert load(tmp_path / "b/last.pt")["options"]["batch_size"] == 4
    run(Toy(), ["--out", str(tmp_path / "b"), "--resume", "--epochs", "2", "--device", "cpu"])  # another kind of budget
    assert load(tmp_path / "b/last.pt")["step"] == 20
    assert [load(tmp_path / "b/last.pt")["options"][name] for name in ("epochs", "steps", "seconds")] == [2, None, None]


def test_quick_writes_over_quick_and_over_nothing_else(tmp_path):
    start(tmp_path / "quick", "--quick")
    first = (tmp_path / "quick/last.pt").stat().st_mtime_ns
    start(tmp_path / "quick", "--quick", "--steps", 6)
    assert (tmp_path / "quick/last.pt").stat().st_mtime_ns > first
    lines = MetricsFile(tmp_path / "quick/metrics.jsonl").read()
    assert [line["step"] for line in lines if "validation" in line] == [3, 6]  # of the second alone
    start(tmp_path / "real", "--steps", 2)
    with pytest.raises(SystemExit, match="holds a run already"):
        start(tmp_path / "real", "--quick")
    with pytest.raises(SystemExit):
        start(tmp_path / "quick", "--quick", experiment=Toy(interrupt_at(1)))
    left = {path.name for path in (tmp_path / "quick").iterdir()}
    assert left == {"last.pt", "config.json", "metrics.jsonl", "curves.png"}  # no result of another run
    start(tmp_path / "quick", "--steps", 2)  # a quick run holds nothing of worth
    with pytest.raises(SystemExit, match="holds a run already"):
        start(tmp_path / "quick", "--quick")


def test_out_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(SystemExit, match=f"--out: .*{out}"):
            start(out, "--steps", 2)


@pytest.mark.parametrize("step", [24, 41])
def test_validations_are_a_small_share_of_the_work(tmp_path, step):
    """One is 8 samples in batches of 4, without a backward pass: 2/3 of a step, and the k-th waits for 20/3 k steps."""
    start(tmp_path / "a", "--steps", 60)
    lines = [line for line in MetricsFile(tmp_path / "a/metrics.jsonl").read() if "validation" in line]
    assert [line["step"] for line in lines] == [9, 15, 21, 27, 36, 42, 48, 54, 60]
    with pytest.raises(SystemExit):
        start(tmp_path / "b", "--steps", 60, experiment=Toy(interrupt_at(step)))
    start(tmp_path / "b", "--steps", 60, "--resume")
    again = [line for line in MetricsFile(tmp_path / "b/metrics.jsonl").read() if "validation" in line]
    assert [line["validation"] for line in again] == [line["validation"] for line in lines]
    # The last one always, however short the training; and never more than twenty.
    start(tmp_path / "c", "--steps", 3)
    assert [line["step"] for line in MetricsFile(tmp_path / "c/metrics.jsonl").read()] == [3]
    start(tmp_path / "d", "--steps", 600, "--validate-on", 1)
    lines = [line for line in MetricsFile(tmp_path / "d/metrics.jsonl").read() if "validation" in line]
    assert len(lines) == 20


def test_work_of_an_evaluation_is_counted_in_inner_steps():
    for name, differentiate, work in (("dspn", "unrolled", 40 / 3), ("idspn", "implicit", 40), ("mlp", None, 1 / 3)):
        options = types.SimpleNamespace(decoder=name, eval_steps=[10, 400])
        decoder = types.SimpleNamespace(iters=10, differentiate=differentiate)
        assert evaluation_work(options, decoder) == pytest.approx(work)


def test_ctrl_c_outside_of_the_training_is_one_line(tmp_path, capsys):
    class Slow(Toy):
        def training_data(self, options):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as left:
        start(tmp_path, "--steps", 2, experiment=Slow())
    assert left.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_second_ctrl_c_leaves_at_once(tmp_path, capsys):
    def twice(calls, value):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return value

    with pytest.raises(SystemExit) as left:
        start(tmp_path, "--steps", 9, "--validations", 1, experiment=Toy(twice))
    assert left.value.code == 130
    errors = capsys.readouterr().err
    assert "stopping after this step; Ctrl-C again stops at once" in errors
    assert errors.endswith("\ninterrupted\n")
    assert not (tmp_path / "last.pt").exists()


def test_argument_that_the_library_refuses_is_one_line_before_any_data(tmp_path):
    class Refused(Toy):
        def build(self, options):
            raise ValueError("`momentum` must be smaller")

    experiment = Refused()
    with pytest.raises(SystemExit, match="`momentum` must be smaller"):
        start(tmp_path, "--steps", 2, experiment=experiment)
    assert experiment.read == []


def test_budget_may_grow_when_resumed(tmp_path):
    start(tmp_path / "a", "--steps", 10)
    start(tmp_path / "a", "--steps", 20, "--resume")
    start(tmp_path / "b", "--steps", 20)
    torch.testing.assert_close(weights(tmp_path / "a"), weights(tmp_path / "b"), rtol=0, atol=0)


def test_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(SystemExit, match="the loss is nan at step 20: try a smaller --lr"):
        start(tmp_path, "--steps", 60, experiment=Toy(lambda calls, value: value * torch.nan if calls == 20 else value))


def test_checkpoint_of_another_experiment_is_an_error(tmp_path):
    save(tmp_path / "best.pt", {"experiment": "other", "options": {}, "model": {}})
    with pytest.raises(SystemExit, match="is of other, not toy"):
        run(Toy(), ["--evaluate", str(tmp_path / "best.pt")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--seconds", "nan"], "--seconds: must be positive and finite, got nan"),
        (["--epochs", "inf"], "--epochs: must be positive and finite, got inf"),
        (["--steps", "x"], "--steps: invalid int value: 'x'"),
        (["--seed", "-1"], "--seed: must be at least 0"),
        (["--momentum", "1"], "--momentum: must be at least 0 and less than 1"),
        (["--steps", "1", "--seconds", "1"], "not allowed with"),
        (["--inner-lr", "1"], "--inner-lr has no meaning with --decoder mlp"),
        (["--eval-steps", "0", "10"], "--eval-steps: must be at least 1"),
        (["--eval-steps", "10"], "--eval-steps has no meaning with --decoder mlp"),
        (["--batch-size", "41", "--steps", "1"], "--batch-size 41 is more than the training data"),
    ],
)
def test_bad_command_lines(tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        start(tmp_path, *arguments)
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_metrics_of_a_killed_run_are_read_without_the_broken_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    metrics = MetricsFile(path)
    assert [line["step"] for line in metrics.read()] == [1, 2, 3]
    metrics.rewind(2)
    metrics.append({"step": 3, "again": True})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'


def test_checkpoint_is_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save(path, {"step": 1})

    def die(state, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        save(path, {"step": 2})
    assert load(path) == {"step": 1}
