"""What is timed: training steps and inference at the paper's two shapes, matrix products, losses written literally."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from setpred import ChamferLoss, DSPNDecoder, DSPNLoss, HungarianLoss, PooledEncoder, RelationEncoder

BATCH = 32
Function = Callable[[], object]


class Clevr:
    """CLEVR state: sets of 10 x 18, relation encoder of 512, Hungarian loss on the last set + representation loss."""

    make_encoder: type[RelationEncoder | PooledEncoder] = RelationEncoder
    batch, size, channels, width, latent, iters = BATCH, 10, 18, 512, 512, 10

    def __init__(self, differentiate: str) -> None:
        encoder = self.make_encoder(self.channels, self.latent, self.width, scaling="dspn")
        self.decoder = DSPNDecoder.paper(
            encoder, iters=self.iters, set_size=self.size, channels=self.channels, differentiate=differentiate
        )
        self.loss = DSPNLoss(encoder, HungarianLoss(), steps="last")
        self.z = torch.randn(self.batch, self.latent, requires_grad=True)
        self.mask = torch.rand(self.batch, self.size) < 0.7
        self.target = torch.rand(self.batch, self.size, self.channels)

    def train(self) -> None:
        self.decoder.zero_grad()
        self.z.grad = None
        prediction = self.decoder(self.z, record=False)
        self.loss(prediction, self.target, self.mask, z=self.z).backward()


class ClevrPooled(Clevr):
    """The same with three layers on each element instead of two on each pair."""

    make_encoder = PooledEncoder


class Mnist:
    """MNIST: sets of 342 x 2, three layers of 256 to 64, Chamfer loss over all steps (implicit: over the last)."""

    batch, size, channels, width, latent, iters = BATCH, 342, 2, 256, 64, 10

    def __init__(self, differentiate: str) -> None:
        encoder = PooledEncoder(self.channels, self.latent, self.width, scaling="dspn")
        self.decoder = DSPNDecoder.paper(
            encoder, iters=self.iters, set_size=self.size, channels=self.channels, differentiate=differentiate
        )
        self.loss = DSPNLoss(encoder, ChamferLoss(), steps="all" if differentiate == "unrolled" else "last")
        self.mask = torch.rand(self.batch, self.size) < 0.4
        self.target = torch.rand(self.batch, self.size, self.channels) * self.mask.unsqueeze(-1)
        self.z = torch.randn(self.batch, self.latent)

    def train(self) -> None:
        self.decoder.zero_grad()
        z = self.decoder.encoder(self.target, self.mask)
        self.loss(self.decoder(z), self.target, self.mask).backward()


def infer(work: Clevr | Mnist, mode: Callable[[], AbstractContextManager[object]] = torch.inference_mode) -> Function:
    def run() -> None:
        with mode():
            work.decoder.eval()(work.z)

    return run


# (rows out, rows in, columns) of the encoder's layers.
LAYERS = {
    "Clevr": [(1024, 19, BATCH * 10), (512, 512, BATCH * 100)],
    "ClevrPooled": [(512, 19, BATCH * 10), *[(512, 512, BATCH * 10)] * 2],
    "Mnist": [(256, 3, BATCH * 342), (256, 256, BATCH * 342), (64, 256, BATCH * 342)],
}


def products(work: str, inner: int, double: int, encodings: int) -> Function:
    """Bare `torch.mm` of the shapes in an encoder's layers.

    An inner step is a product forward and one back to its input. Where it is differentiated there are four more, two
    of them for the weights. Encoding a set and differentiating that is three.
    """
    operands = [
        (torch.randn(out, inn), torch.randn(inn, columns), torch.randn(out, columns))
        for out, inn, columns in LAYERS[work]
    ]

    def run() -> None:
        for weight, x, grad in operands:
            for _ in range(inner + double + encodings):
                torch.mm(weight, x)
                torch.mm(weight.t(), grad)
            for _ in range(2 * double + encodings):
                torch.mm(grad, x.t())

    return run


def wait() -> None:
    """Let the GPU finish what it was given, if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(function: Function) -> float:
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def huber_by_broadcasting(pred: Tensor, target: Tensor) -> Tensor:
    x, y = torch.broadcast_tensors(pred.unsqueeze(-2), target.unsqueeze(-3))
    return torch.nn.functional.smooth_l1_loss(x, y, reduction="none").mean(-1)


def chamfer_by_broadcasting(pred: Tensor, target: Tensor) -> Tensor:
    cost = huber_by_broadcasting(pred, target)
    return (cost.min(-1).values.mean(-1) + cost.min(-2).values.mean(-1)).mean()
