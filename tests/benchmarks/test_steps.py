"""Training step and inference at the paper's two shapes, beside bare matrix products of the same sizes.

pytest tests/benchmarks/test_steps.py
"""

from collections.abc import Callable

import pytest
import torch

from setpred import ChamferLoss, DSPNDecoder, DSPNLoss, HungarianLoss, PooledEncoder, RelationEncoder

BATCH = 32
Function = Callable[[], object]


class Clevr:
    """CLEVR state: sets of 10 x 18, relation encoder of 512, Hungarian loss on the last set + representation loss."""

    make_encoder: type[RelationEncoder | PooledEncoder] = RelationEncoder

    def __init__(self, differentiate: str) -> None:
        encoder = self.make_encoder(18, 512, 512)
        self.decoder = DSPNDecoder(encoder, set_size=10, channels=18, differentiate=differentiate)
        self.loss = DSPNLoss(encoder, HungarianLoss(), steps="last")
        self.z = torch.randn(BATCH, 512, requires_grad=True)
        self.target, self.mask = torch.rand(BATCH, 10, 18), torch.rand(BATCH, 10) < 0.7

    def train(self) -> None:
        self.decoder.zero_grad()
        prediction = self.decoder(self.z, record=False)
        self.loss(prediction, self.target, self.mask, z=self.z).backward()


class ClevrPooled(Clevr):
    """The same with three layers on each element instead of two on each pair."""

    make_encoder = PooledEncoder


class Mnist:
    """MNIST: sets of 342 x 2, three layers of 256 to 64, Chamfer loss over all steps (implicit: over the last)."""

    def __init__(self, differentiate: str) -> None:
        encoder = PooledEncoder(2, 64, 256)
        self.decoder = DSPNDecoder(encoder, set_size=342, channels=2, differentiate=differentiate)
        self.loss = DSPNLoss(encoder, ChamferLoss(), steps="all" if differentiate == "unrolled" else "last")
        self.mask = torch.rand(BATCH, 342) < 0.4
        self.target = torch.rand(BATCH, 342, 2) * self.mask.unsqueeze(-1)
        self.z = torch.randn(BATCH, 64)

    def train(self) -> None:
        self.decoder.zero_grad()
        z = self.decoder.encoder(self.target, self.mask)
        self.loss(self.decoder(z), self.target, self.mask).backward()


def infer(work: Clevr | Mnist) -> Function:
    def run() -> None:
        with torch.inference_mode():
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


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("differentiate", ["unrolled", "implicit"])
@pytest.mark.parametrize("work", [Clevr, ClevrPooled, Mnist])
def test_training_step(benchmark, work, differentiate) -> None:
    benchmark.group = f"{work.__name__}: training step"
    benchmark.pedantic(work(differentiate).train, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("work", [Clevr, ClevrPooled, Mnist])
def test_inference(benchmark, work) -> None:
    benchmark.group = f"{work.__name__}: inference"
    benchmark.pedantic(infer(work("unrolled")), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("work", LAYERS)
def test_bare_products_of_inference(benchmark, work) -> None:
    """The floor: 10 steps of every layer's product and its gradient with respect to the input."""
    benchmark.group = f"{work}: inference"
    benchmark.pedantic(products(work, 10, 0, 0), rounds=5, warmup_rounds=1)
