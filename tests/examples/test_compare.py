import json

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
    monkeypatch.setattr(compare.subprocess, "run", lambda *_, **__: pytest.fail("a finished run was started again"))
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
    monkeypatch.setattr(compare.subprocess, "run", lambda *_, **__: pytest.fail("a finished run was started again"))
    compare.main(arguments)
    table = (tmp_path / "tables.md").read_text()
    assert [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]] == ["mlp", "2.5", "3"]
    assert "2500.000" in table
