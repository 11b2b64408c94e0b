"""The training engine of the examples: one loop with budgets, checkpoints, resumption, metrics and evaluation.

Devices, processes and data sharding are `accelerate`'s. A run lives in one directory and may be killed at any moment:

    config.json       options, versions, machine
    last.pt, best.pt  checkpoints; `best` by the validation score
    metrics.jsonl     training loss and validation scores
    result.json       what came of it; on the test split, of the best checkpoint
"""

import argparse
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, gather_object, set_seed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from tqdm import tqdm

import setpred
from common.arguments import plain
from common.batches import Batch, Stream
from common.checkpoint import MetricsFile, load, load_origin, save, write_json
from common.cli import Described, parse
from common.curves import draw_curves
from common.decoders import DESCENT, Loss, evaluation_work
from common.models import SetPredictor

LOG_EVERY = 20  # steps
EVALUATION_BATCH = 100
FITTED_ON = 512  # samples of the training data that a scaler sees
VALIDATIONS = 20  # the most, unless their number is given
SHARE = 0.1  # of the training's work that they may be

Scores = dict[str, dict[str, float]]  # inner steps, or "-" for a decoder without, -> name -> value


class Predictions(NamedTuple):
    """Predictions and targets of a whole split, on the CPU."""

    elements: Tensor  # (S, N, C)
    mask: Tensor  # (S, N)
    target: Tensor  # (S, N, C)
    target_mask: Tensor  # (S, N), bool


class Experiment(Described, Protocol):
    """What the engine is told about an experiment."""

    selection: str  # the validation score that checkpoints, and inner steps in evaluation, are selected by
    largest: bool  # whether large values of it are good

    def training_data(self, options: argparse.Namespace) -> tuple[Dataset[Batch] | Stream, Dataset[Batch]]:
        """Load what is trained on, and what validates: settings and checkpoints are chosen on it."""
        ...

    def test_data(self, options: argparse.Namespace) -> Dataset[Batch]:
        """Load what results come from, disjoint from both."""
        ...

    def build(self, options: argparse.Namespace) -> tuple[SetPredictor, Loss]:
        """Make the model and its loss."""
        ...

    def score(self, predictions: Predictions) -> dict[str, float]:
        """Evaluate predictions."""
        ...

    def source(self, options: argparse.Namespace) -> str:
        """Say what the data is, in tables and pictures."""
        ...

    def report(self, scores: Scores, options: argparse.Namespace) -> str:
        """Make the tables of the scores on the test split."""
        ...

    def draw(self, model: SetPredictor, batch: Batch, options: argparse.Namespace) -> None:
        """Draw predictions for a few test samples into `options.out`."""
        ...


class Progress:
    """How much of the budget is used; the time is that of training steps."""

    def __init__(self, options: argparse.Namespace, batches_per_epoch: int | None) -> None:
        self.steps, self.budget = options.steps, options.seconds
        if options.epochs is not None:
            assert batches_per_epoch is not None  # a stream has no epochs: the experiment has refused them
            self.steps = math.ceil(options.epochs * batches_per_epoch)

    def __call__(self, step: int, seconds: float) -> float:
        """Fraction of the budget, 1 at its end."""
        used = step / self.steps if self.steps is not None else seconds / self.budget
        return min(used, 1.0)


class _Interrupts:
    """Ctrl-C and termination ask the loop to save and leave after the step; a second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.asked, self.process = False, os.getpid()
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if os.getpid() == self.process:  # not one that loads data
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Validations:
    """When to validate: at even parts of the budget.

    If their number was not given, a part passes without one where they would come to more than a share of the
    training's work by then; the last one never does. Work is counted, not timed, so that a resumed run validates where
    an undisturbed one does.
    """

    def __init__(self, number: int | None, cost: float, done: int) -> None:
        self.parts, self.cost, self.done = number or VALIDATIONS, 0.0 if number else cost, done
        self.part = 0  # that has begun

    def begin(self, used: float) -> bool:
        """Tell whether a fraction of the budget begins another part."""
        before, self.part = self.part, int(used * self.parts + 1e-9)
        return self.part > before

    def due(self, used: float, step: int) -> bool:
        """Tell whether to validate, and count it."""
        due = self.begin(used) and (used >= 1 or (self.done + 1) * self.cost <= SHARE * step)
        self.done += due
        return due


def run(experiment: Experiment, arguments: list[str] | None = None) -> None:
    """Train and evaluate, as the command line says."""
    try:
        _run(experiment, arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _run(experiment: Experiment, arguments: list[str] | None) -> None:
    options, checkpoint = parse(experiment, arguments)
    _claim(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    accelerator = Accelerator(
        cpu=options.device == "cpu",
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=options.seed, non_blocking=True),
        log_with="tensorboard" if options.tensorboard else None,
        project_dir=options.out,
    )
    if options.device == "cuda" and accelerator.device.type != "cuda":
        raise SystemExit("--device cuda: this PyTorch finds no CUDA device")
    set_seed(options.seed)
    try:
        model, loss = experiment.build(options)
    except ValueError as error:  # of the library, which knows the ranges of its arguments
        raise SystemExit(str(error)) from None
    with accelerator.main_process_first():  # what is cached is made once
        train, validation = (None, None) if options.evaluate else experiment.training_data(options)
        test = experiment.test_data(options) if options.test else None
    for part, data in (("train", train), ("validate", validation), ("test", test)):
        if isinstance(data, Dataset) and len(data) == 0:
            raise SystemExit(f"{experiment.source(options)}: no samples to {part} on")
    if checkpoint is None:
        _train(experiment, options, accelerator, model, loss, train, validation)
        checkpoint = load(options.out / "best.pt")
    accelerator.unwrap_model(model).to(accelerator.device).load_state_dict(checkpoint["model"])
    _finish(experiment, options, accelerator, model, test, checkpoint)
    accelerator.end_training()


def _claim(options: argparse.Namespace) -> None:
    """Make the run's directory; one that holds a run is taken only to go on, or if it was only --quick."""
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out: {error}") from None
    if options.evaluate is not None or options.resume or not (out / "last.pt").exists():
        return
    if not load_origin(out / "last.pt")[1]["quick"]:
        raise SystemExit(f"{out} holds a run already: go on with --resume, or give another --out")
    for name in ("last.pt", "best.pt", "metrics.jsonl", "result.json"):
        (out / name).unlink(missing_ok=True)


def _train(
    experiment: Experiment,
    options: argparse.Namespace,
    accelerator: Accelerator,
    model: SetPredictor,
    loss: Loss,
    train: Any,
    validation: Any,
) -> None:
    """Train to the end of the budget; leave the program if asked to before."""
    out, main = options.out, accelerator.is_main_process
    last = out / "last.pt"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=options.lr)
    state: dict[str, Any] = {
        "experiment": experiment.name,
        "options": plain(vars(options)),
        "step": 0,
        "seconds": 0.0,
        "running_loss": 0.0,  # sum since the last line of metrics
        "running_steps": 0,
        "validations": 0,  # done
        "best": None,
    }
    rng = None
    if options.resume and last.exists():
        checkpoint = load(last)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        rng = checkpoint["rng"]
        state |= {name: checkpoint[name] for name in state if name != "options"}
        if main and state["best"] is not None and state["best"]["step"] == state["step"]:
            _save_best(state, model, out)  # the kill may have come between the two files
    else:
        if options.resume:
            accelerator.print(f"nothing to resume in {out}: this is a new run")
        if model.decoder.scaler is not None:
            model.decoder.scaler.fit((batch.elements, batch.mask) for batch in _first(train, options.batch_size))
    metrics = MetricsFile(out / "metrics.jsonl")
    if main:
        write_json(out / "config.json", _config(experiment, options, accelerator, model))
        metrics.rewind(state["step"])
    accelerator.wait_for_everyone()
    if options.tensorboard:
        accelerator.init_trackers("tensorboard")

    compiled = accelerator.device.type == "cuda" if options.compile is None else options.compile
    if compiled and options.decoder in DESCENT:
        model.decoder.compile()
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    loader = None
    if isinstance(train, Dataset):
        loader = accelerator.prepare(_make_loader(train, options, accelerator, training=True))
        if len(loader) == 0:
            raise SystemExit(f"--batch-size {options.batch_size} is more than the training data, {len(train)} samples")
    progress = Progress(options, None if loader is None else len(loader))
    batches = _batches(accelerator, train, loader, state["step"])
    on_one_thread = accelerator.device.type == "cpu" and torch.get_num_threads() == 1 and options.workers == 0
    clock = time.process_time if on_one_thread else time.perf_counter
    if options.validate_on is not None:
        validation = Subset(validation, range(min(options.validate_on, len(validation))))
    samples_a_step = options.batch_size * accelerator.num_processes
    cost = evaluation_work(options, model.decoder) * len(validation) / samples_a_step  # in training steps
    validations = Validations(options.validations, cost, state["validations"])
    validations.begin(progress(state["step"], state["seconds"]))
    validation = accelerator.prepare(_make_loader(validation, options, accelerator, training=False))
    wrapped.train()
    interrupts = _Interrupts()
    saved = time.monotonic()
    running = torch.tensor(state["running_loss"], device=accelerator.device)
    if rng is not None:
        _set_rng(rng[accelerator.process_index])

    def save_last() -> None:
        state["running_loss"] = running.item()
        rngs = gather_object([_get_rng()])
        if main:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rngs}
            save(last, state | parts)

    bar = tqdm(
        desc=f"{experiment.name} {options.decoder}",
        total=progress.steps,
        initial=state["step"],
        unit="step",
        disable=not accelerator.is_local_main_process,
        mininterval=0.5,
    )
    stopped = False
    with bar:
        while True:
            step = state["step"]
            used, due, stopped = _agree(
                accelerator,
                progress(step, state["seconds"]),
                time.monotonic() - saved > options.save_every,
                interrupts.asked,
            )
            if validations.due(used, step):
                state["validations"] = validations.done
                scores = evaluate(experiment, options, accelerator, model, validation)
                wrapped.train()
                steps, score = select(experiment, scores)
                better = state["best"] is None or _is_better(experiment, score, state["best"]["score"])
                if better:
                    state["best"] = {"step": step, "score": score, "eval_steps": steps, "validation": scores}
                if main:
                    metrics.append({"step": step, "seconds": state["seconds"], "validation": scores})
                    bar.write(
                        f"step {step}: validation {experiment.selection} {score:.6g}{' (best)' if better else ''}"
                    )
                accelerator.log({f"validation/{name}": value for name, value in scores[steps].items()}, step=step)
                save_last()
                if better and main:
                    _save_best(state, model, out)
                saved = time.monotonic()
            elif due or stopped or used >= 1:
                save_last()
                saved = time.monotonic()
            if used >= 1 or stopped:
                break

            start = clock()
            lr = options.lr * (1 if options.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * used)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = next(batches)
            prediction, z = wrapped(batch)
            value = loss(prediction, batch, z)
            optimizer.zero_grad()
            accelerator.backward(value)
            optimizer.step()
            running += value.detach()
            state["step"] += 1
            state["running_steps"] += 1
            if state["step"] % LOG_EVERY == 0:
                mean = running.item() / state["running_steps"]
                if not math.isfinite(mean):
                    raise SystemExit(f"the loss is {mean} at step {state['step']}: try a smaller --lr")
                state["running_steps"] = 0
                running.zero_()
            state["seconds"] += clock() - start
            if state["step"] % LOG_EVERY == 0:
                if main:
                    metrics.append({"step": state["step"], "seconds": state["seconds"], "loss": mean, "lr": lr})
                accelerator.log({"train/loss": mean, "train/lr": lr}, step=state["step"])
                bar.set_postfix(loss=f"{mean:.5f}", done=f"{used:.0%}", refresh=False)
            bar.update()
    interrupts.restore()
    if stopped and used < 1:
        accelerator.print(f"stopped at step {state['step']}, saved in {last}; go on with --resume")
        accelerator.end_training()
        raise SystemExit(130)


def _agree(accelerator: Accelerator, used: float, due: bool, stop: bool) -> tuple[float, bool, bool]:
    """Let all processes decide alike: time and signals reach each of them at other moments."""
    if accelerator.num_processes > 1:
        decision = torch.tensor([used, due, stop], dtype=torch.float64, device=accelerator.device)
        used, due, stop = accelerator.gather(decision).view(-1, 3).amax(0).tolist()
    return used, bool(due), bool(stop)


def _batches(accelerator: Accelerator, train: Any, loader: Any, k: int) -> Iterator[Batch]:
    """Training batches from the k-th on, epoch after epoch; the order is a function of seed and epoch."""
    if loader is None:
        while True:
            yield train.batch(k * accelerator.num_processes + accelerator.process_index, accelerator.device)
            k += 1
    while True:
        epoch, done = divmod(k, len(loader))
        loader.set_epoch(epoch)
        rest = accelerator.skip_first_batches(loader, done) if done else loader
        for batch in rest:
            yield batch
            k += 1


def _first(train: Dataset[Batch] | Stream, size: int) -> Iterator[Batch]:
    """Take the first samples of the training data, enough to learn their scale from."""
    if isinstance(train, Dataset):
        few = Subset(train, range(min(FITTED_ON, len(train))))
        return iter(DataLoader(few, batch_size=EVALUATION_BATCH, collate_fn=_collate))
    return (train.batch(k, torch.device("cpu")) for k in range(max(FITTED_ON // size, 1)))


def _collate(items: Batch | list[Batch]) -> Batch:
    """Make a batch of items, unless the data set has taken it in one piece."""
    return items if isinstance(items, Batch) else default_collate(items)


def _make_loader(
    data: Dataset[Batch], options: argparse.Namespace, accelerator: Accelerator, *, training: bool
) -> DataLoader[Batch]:
    return DataLoader(
        data,
        batch_size=options.batch_size if training else EVALUATION_BATCH,
        shuffle=training,
        drop_last=training,
        num_workers=options.workers,
        persistent_workers=options.workers > 0 and training,
        pin_memory=accelerator.device.type == "cuda",
        collate_fn=_collate,
        generator=torch.Generator(),  # the loader's own draws leave the training's random state alone
    )


@torch.inference_mode()
def evaluate(
    experiment: Experiment,
    options: argparse.Namespace,
    accelerator: Accelerator,
    model: SetPredictor,
    loader: DataLoader[Batch],
) -> Scores:
    """Score a split after each number of inner steps, from the same random starts each time."""
    model.eval()
    collected: dict[str, list[Predictions]] = {}
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(cuda):  # the training goes on as if nothing had been drawn here
        torch.manual_seed(0)
        for batch in loader:
            if options.decoder in DESCENT:
                kept = {str(steps): prediction for steps, prediction in model.after(batch, options.eval_steps).items()}
            else:
                kept = {"-": model(batch)[0][:2]}
            for steps, prediction in kept.items():
                parts = accelerator.gather_for_metrics((*prediction, batch.elements, batch.mask))
                collected.setdefault(steps, []).append(Predictions(*(part.cpu() for part in parts)))
    return {
        steps: experiment.score(Predictions(*map(torch.cat, zip(*parts, strict=True))))
        for steps, parts in collected.items()
    }


def select(experiment: Experiment, scores: Scores) -> tuple[str, float]:
    """Find the number of inner steps with the best score, and that score."""
    best = max if experiment.largest else min
    steps = best(scores, key=lambda steps: scores[steps][experiment.selection])
    return steps, scores[steps][experiment.selection]


def _is_better(experiment: Experiment, score: float, than: float) -> bool:
    return score > than if experiment.largest else score < than


def _finish(
    experiment: Experiment,
    options: argparse.Namespace,
    accelerator: Accelerator,
    model: SetPredictor,
    test: Dataset[Batch] | None,
    checkpoint: Mapping[str, Any],
) -> None:
    """Write the result; with a test split, its scores and pictures too."""
    result = {
        "experiment": experiment.name,
        "data": experiment.source(options),
        "decoder": options.decoder,
        "parameters": model.count_parameters(),
        **{name: checkpoint[name] for name in ("step", "seconds", "best")},
    }
    if test is not None:
        loader = _make_loader(test, options, accelerator, training=False)
        scores = evaluate(experiment, options, accelerator, model, accelerator.prepare(loader))
        result["test"] = scores
        accelerator.print(f"\n{experiment.source(options)}, test split, {options.decoder} at step {checkpoint['step']}")
        accelerator.print(experiment.report(scores, options))
    if not accelerator.is_main_process:
        return
    write_json(options.out / "result.json", result)
    curves = MetricsFile(options.out / "metrics.jsonl").read()
    if curves:
        draw_curves(curves, experiment.selection, experiment.source(options), options.out / "curves.png")
    if test is not None:
        batch = next(iter(loader))
        few = Batch(*(None if part is None else part[:5].to(accelerator.device) for part in batch))
        model.eval()
        with torch.inference_mode():
            experiment.draw(model, few, options)
    accelerator.print(f"written to {options.out}: {', '.join(sorted(p.name for p in options.out.iterdir()))}")


def _save_best(state: Mapping[str, Any], model: SetPredictor, out: Path) -> None:
    names = ("experiment", "options", "step", "seconds", "best")
    save(out / "best.pt", {name: state[name] for name in names} | {"model": model.state_dict()})


def _config(
    experiment: Experiment, options: argparse.Namespace, accelerator: Accelerator, model: SetPredictor
) -> dict[str, Any]:
    cuda = accelerator.device.type == "cuda"
    return {
        "experiment": experiment.name,
        "data": experiment.source(options),
        "options": plain(vars(options)),
        "parameters": model.count_parameters(),
        "versions": {"setpred": setpred.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }


def _get_rng() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_rng(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
