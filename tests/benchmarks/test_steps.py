"""Training step and inference at the paper's two shapes, beside bare matrix products of the same sizes.

pytest tests/benchmarks/test_steps.py
"""

import pytest
import torch

from tests.benchmarks.work import LAYERS, Clevr, ClevrPooled, Mnist, infer, products


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
