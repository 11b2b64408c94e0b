"""One run of the panel: a decoder learns a task for a number of processor seconds, and is judged."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.batches import Batch
from common.models import EncodedImage, EncodedTarget, SetPredictor, SmallTokens, small_backbone
from common.tasks import Data, Draw, Task
from setpred import PooledEncoder, StandardScaler

LATENT, WIDTH = 128, 128  # size of the vector, hidden units of set encoders and of baselines
VALIDATIONS = 8
EVALUATION_BATCH = 100
FITTED_ON = 4096  # drawn samples that the scaler sees, where each is drawn anew
COLLAPSED = 1.5  # so many times as bad at the end as at the best validation,
LOST = 0.1  # and so much lost of what was learned: an error of 2e-5 after one of 1e-5 is no collapse
NOISE = 0.01  # of average precisions

MakeDecoder = Callable[[PooledEncoder, int, int], nn.Module]  # of set encoder, set size and channels


class Contestant(NamedTuple):
    """A decoder of the panel, the same for all tasks."""

    make: MakeDecoder
    # How it is evaluated: options of its forward, by what the table says of them. The first one selects.
    evaluations: Mapping[str, Mapping[str, Any]]
    of_tokens: MakeDecoder | None = None  # where it can: it decodes images from the places of their feature map


class Budget(NamedTuple):
    """How long a run trains."""

    seconds: float  # of the processor
    steps: int | None = None  # training steps instead

    def used(self, seconds: float, step: int) -> float:
        """The part that is used up."""
        return seconds / self.seconds if self.steps is None else step / self.steps


def make_model(task: Task, contestant: Contestant) -> SetPredictor:
    """Make the network; DSPN decodes an autoencoder's vector with the encoder that made it."""
    encoder = PooledEncoder(task.channels, LATENT, WIDTH)
    of_tokens = contestant.of_tokens if task.images else None
    make = of_tokens or contestant.make
    backbone = SmallTokens if of_tokens else small_backbone
    source = EncodedImage(backbone(LATENT)) if task.images else EncodedTarget(encoder)
    return SetPredictor(source, make(encoder, task.set_size, task.channels))


def batches(train: Batch | Draw, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Endless batches: new samples, or those of a data set in a new order each time."""
    while callable(train):
        yield train(size, generator)
    while True:
        for rows in torch.randperm(len(train.mask), generator=generator).split(size):
            yield Batch(*(None if part is None else part[rows] for part in train))


def fit_scaler(data: Data, channels: int) -> StandardScaler:
    """Learn the scale of the elements from training sets."""
    train = data.train
    sample = train(FITTED_ON, torch.Generator().manual_seed(0)) if callable(train) else train
    return StandardScaler(channels).fit(sample.elements, sample.mask)


@torch.inference_mode()
def evaluate(
    model: SetPredictor, scaler: StandardScaler, task: Task, data: Batch, options: Mapping[str, Any]
) -> dict[str, float]:
    """Score predictions in the users' coordinates; predictions that are not finite are as bad as can be."""
    model.eval()
    parts = zip(*(part.split(EVALUATION_BATCH) for part in data if part is not None), strict=True)
    predictions = [model(scaled(scaler, Batch(*part)), **options)[0][:2] for part in parts]
    model.train()
    elements, mask = map(torch.cat, zip(*predictions, strict=True))
    if not is_finite(elements, mask):
        return {name: 0.0 if figure.larger_is_better else math.inf for name, figure in task.figures.items()}
    return task.score(scaler.inverse(elements), mask, data.elements, data.mask)


def scaled(scaler: StandardScaler, batch: Batch) -> Batch:
    """Standardise the elements of a batch."""
    return batch._replace(elements=scaler(batch.elements, batch.mask))


def is_finite(*tensors: Tensor) -> bool:
    """Whether all values are finite."""
    return all(bool(x.isfinite().all()) for x in tensors)


def run_trial(
    task: Task, data: Data, contestant: Contestant, *, lr: float, seed: int, budget: Budget
) -> dict[str, Any]:
    """Make the network of a contestant, and let it learn; see `learn`."""
    torch.manual_seed(seed)
    model = make_model(task, contestant)
    return learn(task, data, model, contestant.evaluations, lr=lr, seed=seed, budget=budget)


def learn(
    task: Task,
    data: Data,
    model: SetPredictor,
    evaluations: Mapping[str, Mapping[str, Any]],
    *,
    lr: float,
    seed: int,
    budget: Budget,
) -> dict[str, Any]:
    """Train with Adam, its learning rate decayed along a cosine over the budget, and evaluate.

    Returns:
        Scores on validation and test data of the network at the end, by kind of evaluation; validation's `curve` of
        (step, seconds, score); and what became of the run.
    """
    scaler = fit_scaler(data, task.channels)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    taken = batches(data.train, task.batch_size, torch.Generator().manual_seed(seed))
    selection, figure = task.selection, task.figures[task.selection]
    selecting = next(iter(evaluations.values()))
    untrained = evaluate(model, scaler, task, data.validation, selecting)[selection]
    curve: list[tuple[int, float, float]] = []
    seconds, step, diverged = 0.0, 0, False
    while (used := budget.used(seconds, step)) < 1 and not diverged:
        start = time.process_time()  # of this process on all its threads: other work on the machine does not count
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * used))
        batch = scaled(scaler, next(taken))
        (elements, mask, _), _ = model(batch)
        if diverged := not is_finite(elements, mask):
            break
        optimizer.zero_grad()
        task.loss(elements, batch.elements, mask, batch.mask).backward()
        optimizer.step()
        seconds, step = seconds + time.process_time() - start, step + 1
        if budget.used(seconds, step) >= min((len(curve) + 1) / VALIDATIONS, 1):
            curve.append((step, seconds, evaluate(model, scaler, task, data.validation, selecting)[selection]))
    scores = {
        part: {name: evaluate(model, scaler, task, samples, options) for name, options in evaluations.items()}
        for part, samples in (("validation", data.validation), ("test", data.test))
    }
    final = next(iter(scores["validation"].values()))[selection]
    best = (max if figure.larger_is_better else min)([final, *(score for _, _, score in curve)])
    worse = best > COLLAPSED * final + NOISE if figure.larger_is_better else final > COLLAPSED * best
    lost = abs(best - final) > LOST * abs(best - untrained)
    return {
        "steps": step,
        "seconds": seconds,
        "parameters": model.count_parameters(),
        "curve": curve,
        **scores,
        "final": final,
        "best": best,
        "diverged": diverged,
        "collapsed": diverged or (worse and lost),
        "decoder settings": repr(model.decoder),
    }
