"""Part b: training steps that never wait for the GPU, each checked by PyTorch's own switch for that."""

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from setpred import (
    ChamferLoss,
    DSPNDecoder,
    DSPNLoss,
    HungarianLoss,
    MLPDecoder,
    PooledEncoder,
    RelationEncoder,
    SinkhornLoss,
    TransformerDecoder,
)
from tests.cuda.part import Options, main, row

STEPS = 10
BATCH, SIZE, CHANNELS, LATENT = 32, 10, 18, 128
MATCHER = "torch_linear_assignment"
Step = Callable[[], object]


def training_step(decoder: nn.Module, loss: Callable[..., Tensor]) -> Step:
    """Make a step as in a training loop: network, decoder, loss, backward, clipping, optimiser."""
    network = nn.Sequential(nn.Linear(64, LATENT), nn.ReLU(), nn.Linear(LATENT, LATENT))
    parameters = [p for p in [*network.parameters(), *decoder.parameters()] if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    x, target = torch.randn(BATCH, 64), torch.rand(BATCH, SIZE, CHANNELS)
    mask = torch.rand(BATCH, SIZE) < 0.7
    total = torch.zeros(())

    def step() -> None:
        z = network(x)
        value = loss(decoder(z), target, mask, z)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        total.add_(value.detach())  # the mean loss is read after the loop

    return step


def cases() -> Iterator[tuple[str, Step]]:
    """Every decoder and every loss at least once; presence="bce" waits, to see its masks."""
    losses = {
        "Chamfer": ChamferLoss(),
        "Chamfer, presence none": ChamferLoss(presence="none"),
        "Sinkhorn": SinkhornLoss(iters=10),
        "Hungarian": HungarianLoss(),
    }

    def dspn(preset: str, encoder: nn.Module, set_loss: nn.Module, steps: str) -> Step:
        decoder = getattr(DSPNDecoder, preset)(encoder, iters=4, set_size=SIZE, channels=CHANNELS)
        loss = DSPNLoss(encoder, set_loss, steps=steps)
        return training_step(decoder, lambda found, target, mask, z: loss(found, target, mask, z=z))

    for name, set_loss in losses.items():
        yield f"DSPN, all steps, {name}", dspn("paper", RelationEncoder(CHANNELS, LATENT, 64), set_loss, "all")
        yield f"iDSPN, {name}", dspn("idspn", PooledEncoder(CHANNELS, LATENT, 64), set_loss, "last")
        yield (
            f"MLP, {name}",
            training_step(
                MLPDecoder(LATENT, SIZE, CHANNELS),
                lambda found, target, mask, z, loss=set_loss: loss(found.elements, target, found.mask, mask),
            ),
        )
        yield (
            f"Transformer, all layers, {name}",
            training_step(
                TransformerDecoder(LATENT, SIZE, CHANNELS, 64, layers=2, queries="top-n"),
                lambda found, target, mask, z, loss=set_loss: loss(
                    found.trajectory.elements, target, found.trajectory.mask, mask
                ),
            ),
        )


@contextmanager
def debugging(mode: str) -> Iterator[None]:
    """What PyTorch does about a wait for the GPU: "default", "warn" or "error"."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def matcher_aside(waits: list[str]) -> Iterator[None]:
    """Let the matcher wait, which checks its costs and its result, and count its waits; nothing else may."""
    import torch_linear_assignment as package

    original = package.batch_linear_assignment

    @wraps(original)
    def counted(cost: Tensor) -> Tensor:
        with warnings.catch_warnings(record=True) as caught, debugging("warn"):
            warnings.simplefilter("always")
            result = original(cost)
        waits.extend(str(warning.message) for warning in caught)
        return result

    package.batch_linear_assignment = counted
    try:
        yield
    finally:
        package.batch_linear_assignment = original


def run(options: Options) -> None:
    """Run each step a few times, the first ones unwatched: libraries are loaded, kernels compiled."""
    with torch.device(options.device):  # not while they run: Adam would count its steps on the GPU, and wait for them
        steps = list(cases())
    on_cuda, has_matcher = options.device == "cuda", find_spec(MATCHER) is not None
    if on_cuda and not has_matcher:
        row(
            "matcher on the GPU", f"{MATCHER} is not there", note="steps with a Hungarian loss wait for SciPy; left out"
        )
    for name, step in steps:
        hungarian = "Hungarian" in name
        if on_cuda and hungarian and not has_matcher:
            continue
        for _ in range(1 if options.quick else 3):
            step()
        if not on_cuda:
            row(name, "runs", note="on the CPU nothing is waited for")
            continue
        torch.cuda.synchronize()
        waits: list[str] = []
        try:
            if hungarian:
                with matcher_aside(waits), debugging("error"):
                    for _ in range(STEPS):
                        step()
            else:
                with debugging("error"):
                    for _ in range(STEPS):
                        step()
        except RuntimeError as error:
            row(name, "waits", note=str(error).splitlines()[0][:200])
            log_waits(step)
            continue
        note = f"{len(waits) / STEPS:g} a step inside of {MATCHER}, for its own checks" if hungarian else ""
        row(name, f"no wait in {STEPS} steps", note=note, waits_of_the_matcher=len(waits))


def log_waits(step: Step) -> None:
    """Print where the step waits."""
    with warnings.catch_warnings(), debugging("warn"):
        warnings.simplefilter("always")
        warnings.showwarning = lambda *_: traceback.print_stack(limit=12, file=sys.stdout)
        step()


if __name__ == "__main__":
    main(run)
