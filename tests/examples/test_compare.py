import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

import compare

pytestmark = pytest.mark.filterwarnings("default")


def test_learning_rates_are_tuned_on_validation_and_finished_runs_are_kept(tmp_path, capsys, monkeypatch):
    arguments = ["mnist_sets", "--decoders", "mlp", "--lrs", "0.001", "0.01", "--seeds", "1", "--seconds", "0.2"]
    arguments += ["--quick", "--validations", "2", "--out", str(tmp_path)]
    compare.main(arguments)
    results = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/result.json")}
    assert set(results) == {"mlp-lr0.001-seed0", "mlp-lr0.01-seed0"}
    best = min(results, key=lambda name: results[name]["best"]["score"])
    assert {name for name, result in results.items() if "test" in result} == {best}
    table = (tmp_path / "tables.md").read_text()
    assert f"{1000 * results[best]['test']['-']['chamfer']:.3f}" in table
    assert "scikit-learn's digits, not MNIST" in table
    assert (tmp_path / "curves.png").stat().st_size > 5_000
    capsys.readouterr()
    monkeypatch.setattr(compare.subprocess, "Popen", lambda *_, **__: pytest.fail("a finished run was started again"))
    compare.main(arguments)
    assert table in capsys.readouterr().out


def test_tuned_run_whose_weights_are_gone_is_trained_again(tmp_path):
    arguments = ["mnist_sets", "--decoders", "mlp", "--lrs", "0.01", "--seeds", "1", "--seconds", "0.2"]
    arguments += ["--quick", "--validations", "2", "--out", str(tmp_path)]
    run = tmp_path / "mlp-lr0.01-seed0"
    run.mkdir()
    (run / "result.json").write_text(json.dumps({"best": {"score": 1.0}}))
    compare.main(arguments)
    assert json.loads((run / "result.json").read_text())["test"]["-"]["chamfer"] > 0


def test_learning_rates_may_be_tuned_in_shorter_runs(tmp_path):
    arguments = ["mnist_sets", "--decoders", "mlp", "--lrs", "0.01", "--seeds", "2", "--seconds", "0.4"]
    arguments += ["--tune-seconds", "0.2", "--quick", "--validations", "2", "--out", str(tmp_path)]
    compare.main(arguments)
    results = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/result.json")}
    assert set(results) == {"mlp-lr0.01-seed0-0.2s", "mlp-lr0.01-seed0", "mlp-lr0.01-seed1"}
    assert {name for name, result in results.items() if "test" in result} == {"mlp-lr0.01-seed0", "mlp-lr0.01-seed1"}
    budgets = {
        path.parent.name: json.loads(path.read_text())["options"]["seconds"] for path in tmp_path.glob("*/config.json")
    }
    assert budgets == {"mlp-lr0.01-seed0-0.2s": 0.2, "mlp-lr0.01-seed0": 0.4, "mlp-lr0.01-seed1": 0.4}


def test_learning_rates_may_be_tuned_over_seeds(tmp_path, monkeypatch):
    arguments = ["mnist_sets", "--decoders", "mlp", "--lrs", "0.01", "0.03", "--seeds", "2", "--seconds", "9"]
    arguments += ["--tune-seeds", "2", "--out", str(tmp_path)]
    for lr, scores in {"0.01": (3.0, 2.0), "0.03": (1.0, 5.0)}.items():  # from seed 0 alone, 0.03 is the best
        for seed, score in enumerate(scores):
            run = tmp_path / f"mlp-lr{lr}-seed{seed}"
            run.mkdir()
            result = {"best": {"score": score, "eval_steps": "-"}, "data": "numbers", "step": 1}
            (run / "result.json").write_text(json.dumps(result | {"test": {"-": {"chamfer": score}}}))
            line = {"step": 1, "seconds": 9.0, "validation": {"-": {"chamfer": score}}}
            (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.setattr(compare.subprocess, "Popen", lambda *_, **__: pytest.fail("a finished run was started again"))
    compare.main(arguments)
    table = (tmp_path / "tables.md").read_text()
    assert [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]] == ["mlp", "2.5", "3"]
    assert "2500.000" in table


SMALL = ["mnist_sets", "--decoders", "mlp", "--lrs", "0.01", "--seeds", "1", "--seconds", "0.2", "--quick"]


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        compare.main(list(map(str, arguments)))
    return f"{error.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "1"], "compare.py gives the runs their --seed itself"),
        (["--lr", "1", "--steps", "9"], "compare.py gives the runs their --lr, --steps itself"),
        (["--no-test"], "compare.py gives the runs their --no-test itself"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--batch-size", "0"], "--batch-size: must be at least 1, got 0"),
        (["--eval-steps", "7"], "--eval-steps has no meaning with --decoder mlp"),
        (["--data", "nowhere"], "--data: there is no file nowhere/MNIST/raw/train-images-idx3-ubyte"),
        (["--seconds", "0"], "--seconds: must be positive"),
        (["--seeds", "0"], "--seeds: must be at least 1"),
        (["--jobs", "0"], "--jobs: must be at least 1"),
        (["--prefix", "nowhere/nice -n 10"], "--prefix: there is no program nowhere/nice"),
        (["--tables", "--jobs", "2"], "--tables trains nothing: leave out --jobs"),
        (["--tables", "--prefix", "nice"], "--tables trains nothing: leave out --prefix"),
    ],
)
def test_bad_command_lines_are_refused_before_any_training(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(compare.subprocess, "Popen", lambda *_, **__: pytest.fail("a run was started"))
    assert message in refused(capsys, *SMALL, "--out", tmp_path, *arguments)
    assert not list(tmp_path.iterdir())


def test_finished_runs_are_not_kept_with_other_options(tmp_path, capsys, monkeypatch):
    arguments = [*SMALL, "--out", str(tmp_path), "--validations", "2"]
    compare.main(arguments)
    monkeypatch.setattr(compare.subprocess, "Popen", lambda *_, **__: pytest.fail("a run was started"))
    compare.main(arguments)
    compare.main([*arguments, "--tables"])
    for changed, message in (
        (["--latent", "7"], "was made with --latent 256 (now 7)"),
        (["--validations", "3"], "was made with --validations 2 (now 3)"),
        (["--seconds", "0.3"], "was made with --seconds 0.2 (now 0.3)"),
        (["--seconds", "0.3", "--tables"], "was made with --seconds 0.2 (now 0.3)"),
    ):
        assert message in refused(capsys, *arguments, *changed)
    monkeypatch.setitem(compare.RECIPES["mnist_sets"], "mlp", "--width 9")
    assert "was made with --width 64 (now 9)" in refused(capsys, *arguments)


def test_scenes_belong_to_runs_without_data(tmp_path):
    """The recipes' number of rendered scenes is not given where there is CLEVR."""
    for part in ("images/train", "images/val", "scenes"):
        (tmp_path / part).mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / f"scenes/CLEVR_{split}_scenes.json").touch()
    for name in ("clevr_boxes", "clevr_state"):
        compare.main([name, "--seconds", "1", "--out", str(tmp_path / "out"), "--data", str(tmp_path), "--tables"])
        for extra, scenes in (([], ["--scenes", "30000"]), (["--data", "d"], [])):
            options = compare.argparse.Namespace(experiment=name, seconds=1, seeds=1, out=tmp_path)
            run = compare.Run("mlp", 0.1, 0, 1)
            arguments = compare.Comparison(options, extra).arguments(run)
            assert [word for word in arguments if word in ("--scenes", "30000")] == scenes


def test_failed_runs_fail_the_command(tmp_path, capsys):
    cost = ["--prefix", f"{sys.executable} -c 'raise SystemExit(3)'"]
    assert "1 runs failed" in refused(capsys, *SMALL, "--out", tmp_path, *cost)


def test_ctrl_c_lets_runs_save_and_leave_and_the_command_goes_on(tmp_path):
    arguments = ["mnist_sets", "--decoders", "mlp", "--lrs", "0.01", "--seeds", "2", "--seconds", "3600", "--jobs", "1"]
    command = [sys.executable, str(Path(compare.__file__)), *arguments, "--out", str(tmp_path), "--save-every", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoint = tmp_path / "mlp-lr0.01-seed0/last.pt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "\ninterrupted; the same command goes on\n"
    assert output == ""
    assert "stopped at step" in (tmp_path / "mlp-lr0.01-seed0/log.txt").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["mlp-lr0.01-seed0"]
