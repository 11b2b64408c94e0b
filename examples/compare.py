"""Compare the decoders of an experiment: the same seconds for each, learning rates tuned alike, several seeds.

Each decoder is trained from seed 0 with each of the same learning rates. The one with the best validation score is
trained from the other seeds too, and only those runs are evaluated on the test split; --tune-seconds tunes in shorter
runs, --tune-seeds by the mean score over several seeds. Everything else that was chosen, in `RECIPES` below, was chosen
on validation splits. Runs go side by side, one thread each. What is finished is kept in --out and skipped when the
command is given again; what was cut short goes on.

    python examples/compare.py mnist_sets --seconds 600 --data DIR
    python examples/compare.py clevr_state --seconds 900
    python examples/compare.py clevr_boxes --seconds 900
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import common.requirements  # noqa: F401
from clevr_boxes import ClevrBoxes
from clevr_state import ClevrState
from common.arguments import changes, count, flags, parse_given, positive
from common.checkpoint import MetricsFile
from common.cli import BUDGET, CARRIED_OUT, make_parser, parse
from common.curves import draw_comparison
from common.decoders import DECODERS
from common.report import mean_and_spread, table
from mnist_sets import MnistSets

EXPERIMENTS = {experiment.name: experiment for experiment in (MnistSets(), ClevrState(), ClevrBoxes())}
# Options that each run is given here.
CHOSEN = ("decoder", "lr", "seed", *BUDGET, "threads", "device", "resume", "evaluate", "out", "test")
CLEVR = (
    "--schedule cosine --size 64 --max-objects 5 --backbone small --latent 256 --width 128 "
    "--validate-on 500 --validations 12"
)
SCENES = "--scenes 30000"
RECIPES = {
    "mnist_sets": {
        "all": "--schedule cosine --latent 256 --width 64 --batch-size 8 --validate-on 48 --validations 5",
        "dspn": "--batch-size 4 --inner-lr 3000 --eval-steps 10 20 30",
        # Evaluation goes to the minimum, which training never sees without --persistent.
        "idspn": "--batch-size 4 --inner-lr 1500 --inner-steps 10 --momentum 0.98 --anchor 0 --persistent 10 "
        "--eval-steps 10 20 30 100 400",
    },
    # Of few objects PooledEncoder decodes in half of RelationEncoder's time.
    "clevr_state": {"all": CLEVR, "without data": SCENES, "dspn": "--set-encoder pooled --inner-lr 300"},
    "clevr_boxes": {
        "all": CLEVR,
        "without data": SCENES,
        "dspn": "--set-encoder pooled --inner-lr 30 --loss-steps last",
    },
}
LEARNING_RATES = {
    "mnist_sets": [3e-3, 1e-2, 3e-2],
    "clevr_state": [3e-4, 1e-3, 3e-3],
    "clevr_boxes": [3e-4, 1e-3, 3e-3],
}
COLUMNS = {  # name of a score -> (heading, factor, digits)
    "mnist_sets": {"chamfer": ("Chamfer x 1000", 1000, 3)},
    "clevr_state": {
        **{f"AP{d}": (f"AP{d}", 100, 1) for d in ("inf", "1", "0.5", "0.25", "0.125")},
        "hungarian": ("Hungarian loss x 1000", 1000, 2),
    },
    "clevr_boxes": {
        **{f"AP{t}": (f"AP{t}", 100, 1) for t in (50, 60, 70, 80, 90)},
        "hungarian": ("Hungarian loss x 1000", 1000, 3),
    },
}


class Run(NamedTuple):
    """One training."""

    decoder: str
    lr: float
    seed: int
    seconds: float


class Comparison:
    """All runs of one experiment, in one directory."""

    def __init__(self, options: argparse.Namespace, extra: list[str]) -> None:
        self.options, self.extra = options, extra
        self.experiment = EXPERIMENTS[options.experiment]
        self.given = parse_given(make_parser(self.experiment), extra)
        self.out: Path = options.out or Path("out/compare") / options.experiment
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.seeds = range(options.seeds)
        self.interrupted = False
        self.failed = 0

    def directory(self, run: Run) -> Path:
        """Where a run lives."""
        shorter = "" if run.seconds == self.options.seconds else f"-{run.seconds:g}s"
        return self.out / f"{run.decoder}-lr{run.lr:g}-seed{run.seed}{shorter}"

    def result(self, run: Run) -> dict[str, Any] | None:
        """What came of a run, if it is finished."""
        path = self.directory(run) / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def arguments(self, run: Run) -> list[str]:
        """Command line of a run."""
        parts = ("all", run.decoder, *([] if "data" in self.given else ["without data"]))
        recipe = RECIPES[self.options.experiment]
        return [
            *shlex.split(" ".join(recipe.get(part, "") for part in parts)),
            *(f"--decoder {run.decoder} --lr {run.lr:g} --seed {run.seed} --threads 1 --device cpu").split(),
            *(f"--seconds {run.seconds:g} --out").split(),
            str(self.directory(run)),
            *self.extra,
        ]

    def check(self) -> None:
        """Refuse options that a run would refuse, and runs that were made with others."""
        if chosen := [name for name in self.given if name in CHOSEN]:
            raise SystemExit(f"compare.py gives the runs their {flags(chosen)} itself: see its --help")
        for decoder in self.options.decoders:
            final = [Run(decoder, lr, k, self.options.seconds) for lr in self.options.lrs for k in self.seeds]
            for run in {*final, *(run for runs in self.tuning(decoder).values() for run in runs)}:
                options, _ = parse(self.experiment, self.arguments(run))
                config = self.directory(run) / "config.json"
                if config.exists():
                    now = {name: value for name, value in vars(options).items() if name not in CARRIED_OUT}
                    if changed := changes(json.loads(config.read_text())["options"], now):
                        raise SystemExit(f"{config.parent} was made with {changed}: give another --out")

    def train(self, run: Run, *, test: bool) -> None:
        """Carry out a run, or what is left of it."""
        result, directory = self.result(run), self.directory(run)
        if self.interrupted or (result is not None and ("test" in result or not test)):
            return
        if result is not None and (directory / "best.pt").exists():  # tuned before: only the test is missing
            arguments = ["--evaluate", str(directory / "best.pt"), "--device", "cpu"]
        else:
            arguments = [*self.arguments(run), "--resume", *([] if test else ["--no-test"])]
        script = Path(__file__).with_name(f"{self.options.experiment}.py")
        command = [*shlex.split(self.options.prefix or ""), sys.executable, str(script), *arguments]
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "log.txt").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            self.processes.add(process)
            failed = process.wait() != 0
            self.processes.remove(process)
        self.failed += failed
        if not self.interrupted:
            print(f"{directory.name}: {f'failed, see {directory}/log.txt' if failed else 'done'}", flush=True)

    def train_side_by_side(self, runs: list[Run], *, test: bool) -> None:
        """Carry out runs; Ctrl-C lets those that have begun save and leave."""
        pool = ThreadPoolExecutor(self.options.jobs or os.cpu_count())
        try:
            list(pool.map(lambda run: self.train(run, test=test), runs))
        except KeyboardInterrupt:
            self.interrupted = True
            for process in list(self.processes):
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def train_all(self) -> None:
        """Tune, then train from all seeds; the decoders take turns, so that what is done is always comparable."""
        tuning = [self.tuning(decoder) for decoder in self.options.decoders]
        turns = [runs for lr in self.options.lrs for runs in zip(*(of[lr] for of in tuning), strict=True)]
        self.train_side_by_side([run for turn in turns for run in turn], test=False)
        tuned = [run for decoder in self.options.decoders if (run := self.tuned(decoder)) is not None]
        self.train_side_by_side([run._replace(seed=k) for k in self.seeds for run in tuned], test=True)

    def tuning(self, decoder: str) -> dict[float, list[Run]]:
        """List the runs that choose a decoder's learning rate, from several seeds each."""
        seeds, seconds = range(self.options.tune_seeds), self.options.tune_seconds
        return {lr: [Run(decoder, lr, seed, seconds) for seed in seeds] for lr in self.options.lrs}

    def tuning_scores(self, decoder: str) -> dict[float, float]:
        """Find the mean of the best validation scores for each learning rate that is through."""
        results = {lr: [self.result(run) for run in runs] for lr, runs in self.tuning(decoder).items()}
        return {lr: fmean(r["best"]["score"] for r in of if r) for lr, of in results.items() if None not in of}

    def tuned(self, decoder: str) -> Run | None:
        """Find the learning rate with the best score; as the run from seed 0 with all seconds."""
        scores = self.tuning_scores(decoder)
        if len(scores) < len(self.options.lrs):
            return None
        best = max if self.experiment.largest else min
        return Run(decoder, best(scores, key=lambda lr: scores[lr]), 0, self.options.seconds)

    def tested(self, decoder: str) -> dict[Run, dict[str, Any]]:
        """Find the runs with test scores, at the tuned learning rate."""
        tuned = self.tuned(decoder)
        runs = [] if tuned is None else [tuned._replace(seed=seed) for seed in self.seeds]
        results = {run: self.result(run) for run in runs}
        return {run: result for run, result in results.items() if result is not None and "test" in result}

    def source(self) -> str:
        """Name the data of the runs with test scores."""
        return "; ".join(sorted({r["data"] for d in self.options.decoders for r in self.tested(d).values()}))

    def draw(self) -> None:
        """Draw the validation curves of what is finished, of DSPN at the best number of inner steps each time."""
        score, best = self.experiment.selection, max if self.experiment.largest else min
        curves: dict[str, list[list[tuple[int, float, float]]]] = {}
        for decoder in self.options.decoders:
            for run in self.tested(decoder):
                lines = MetricsFile(self.directory(run) / "metrics.jsonl").read()
                points = [
                    (line["step"], line["seconds"], best(scores[score] for scores in line["validation"].values()))
                    for line in lines
                    if "validation" in line
                ]
                curves.setdefault(decoder, []).append(points)
        if curves:
            draw_comparison(curves, score, self.source(), self.out / "curves.png")

    def tables(self) -> str:
        """Make the tables of what is finished: tuning, and test scores over seeds."""
        experiment, tuning, rows = self.options.experiment, [], []
        columns, seconds = COLUMNS[experiment], self.options.tune_seconds
        for decoder in self.options.decoders:
            scores = self.tuning_scores(decoder)
            tuning.append([decoder, *(f"{scores[lr]:.3g}" if lr in scores else "-" for lr in self.options.lrs)])
            tested = self.tested(decoder)
            if not tested:
                continue
            lr, results = next(iter(tested)).lr, list(tested.values())
            for steps in results[0]["test"]:
                chosen = sum(r["best"]["eval_steps"] == steps for r in results)
                cells = [
                    mean_and_spread([factor * r["test"][steps][name] for r in results], digits)
                    for name, (_, factor, digits) in columns.items()
                ]
                trained = f"{sum(r['step'] for r in results) // len(results):,}"
                rows.append([decoder, steps, *cells, f"{chosen}/{len(results)}", f"{lr:g}", trained])
        header = ["decoder", "inner steps", *(heading for heading, _, _ in columns.values())]
        header += ["chosen on validation", "lr", "training steps"]
        return "\n\n".join(
            (
                table([f"validation score, {seconds:g} s, lr", *(f"{lr:g}" for lr in self.options.lrs)], tuning),
                f"{self.source()}, test split:\n\n{table(header, rows)}" if rows else "no test scores yet",
            )
        )


def main(arguments: list[str] | None = None) -> None:
    """Tune, train, and print the tables."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s EXPERIMENT --seconds S [options] [options of the experiment]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options go to the experiment's script: see its --help.",
        allow_abbrev=False,
    )
    parser.add_argument("experiment", choices=list(EXPERIMENTS), help="whose decoders are compared")
    runs = parser.add_argument_group("runs")
    runs.add_argument("--seconds", type=positive, required=True, metavar="S", help="training time of a run (required)")
    runs.add_argument(
        "--decoders", nargs="+", choices=DECODERS, default=list(DECODERS), help=f"(default: {' '.join(DECODERS)})"
    )
    runs.add_argument("--seeds", type=count, default=3, metavar="N", help="test 0..N-1 (default: %(default)s)")
    tuning = parser.add_argument_group("tuning of the learning rate")
    rates = "; ".join(f"{name} {' '.join(f'{lr:g}' for lr in lrs)}" for name, lrs in LEARNING_RATES.items())
    tuning.add_argument("--lrs", nargs="+", type=positive, metavar="LR", help=f"to choose from (default: {rates})")
    tuning.add_argument(
        "--tune-seconds", type=positive, metavar="S", help="training time of a run that tunes (default: --seconds)"
    )
    tuning.add_argument("--tune-seeds", type=count, default=1, metavar="N", help="0..N-1 (default: %(default)s)")
    how = parser.add_argument_group("how")
    how.add_argument("--out", type=Path, metavar="DIR", help="what is written (default: out/compare/EXPERIMENT)")
    how.add_argument("--jobs", type=count, metavar="N", help="runs side by side (default: as many as cores)")
    how.add_argument(
        "--prefix", metavar="WORDS", help="put before each command, such as 'nice -n 10' (default: nothing)"
    )
    how.add_argument("--tables", action="store_true", help="print the tables of what is finished, train nothing")
    options, extra = parser.parse_known_args(arguments)
    if options.tables and (unused := [name for name in ("jobs", "prefix") if getattr(options, name) is not None]):
        parser.error(f"--tables trains nothing: leave out {flags(unused)}")
    if options.prefix and shutil.which(shlex.split(options.prefix)[0]) is None:
        parser.error(f"--prefix: there is no program {shlex.split(options.prefix)[0]}")
    options.decoders = list(dict.fromkeys(options.decoders))
    options.lrs = list(dict.fromkeys(options.lrs or LEARNING_RATES[options.experiment]))
    options.tune_seconds = options.tune_seconds or options.seconds
    comparison = Comparison(options, extra)
    comparison.check()
    if not options.tables:
        try:
            comparison.train_all()
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on", file=sys.stderr)
            raise SystemExit(130) from None
    tables = comparison.tables()
    print(f"\n{tables}")
    comparison.out.mkdir(parents=True, exist_ok=True)
    (comparison.out / "tables.md").write_text(tables + "\n")
    comparison.draw()
    if comparison.failed:
        raise SystemExit(f"{comparison.failed} runs failed")


if __name__ == "__main__":
    main()
