"""Memory of DSPNDecoder: what grows with the number of steps, and what does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from setpred import GradientDescent, PooledEncoder
from tests.memory import peak_bytes
from tests.rules import paper_decoder


def training_step(iters: int, **options: Any) -> Callable[[], None]:
    decoder = paper_decoder(PooledEncoder(2, 32, 64), iters, **{"lr": 1.0, "set_size": 50, "channels": 2} | options)
    z = torch.randn(8, 32)
    return lambda: decoder(z).elements.square().sum().backward()


def inference(iters: int, **options: Any) -> Callable[[], None]:
    decoder = paper_decoder(PooledEncoder(2, 32, 64), iters, 1.0, set_size=50, channels=2).eval()
    z = torch.randn(8, 32)

    def run() -> None:
        with torch.no_grad():
            decoder(z, **options)

    return run


@pytest.mark.parametrize("options", [{}, {"anchor": 0.1, "lr": GradientDescent(25.0, 0.9, True, 1.0)}])
def test_of_an_implicit_training_step_does_not_grow(options: dict[str, Any]) -> None:
    few, many = (peak_bytes(training_step(iters, differentiate="implicit", **options)) for iters in (10, 40))
    assert many < 1.05 * few


def test_of_an_unrolled_training_step_grows_in_proportion() -> None:
    few, many = (peak_bytes(training_step(iters)) for iters in (10, 40))
    assert many > 3 * few


def test_of_a_checkpointed_training_step_grows_by_the_sets_alone() -> None:
    few, many = (peak_bytes(training_step(iters, checkpoint=True)) for iters in (10, 40))
    step = 4 * 8 * 50 * 3  # float32 elements and masks of a batch
    assert many - few < 3 * 30 * step  # kept, stacked, and their gradient
    assert many < peak_bytes(training_step(10)) / 4


def test_of_inference_does_not_grow() -> None:
    few, many = (peak_bytes(inference(iters)) for iters in (10, 40))
    assert many < 1.05 * few


def test_of_a_recorded_inference_grows_by_the_record_alone() -> None:
    few, many = (peak_bytes(inference(iters, record=True)) for iters in (10, 40))
    step = 4 * 8 * 50 * 3  # float32 elements and masks of a batch
    assert 30 * step < many - few < 2.5 * 30 * step  # kept, then stacked


def test_of_inference_in_chunks_grows_by_the_sets_alone() -> None:
    decoder = paper_decoder(PooledEncoder(2, 32, 64), 3, 1.0, set_size=50, channels=2).eval()

    def peak(batch: int) -> int:
        z = torch.randn(batch, 32)
        with torch.no_grad():
            return peak_bytes(lambda: decoder(z, chunk_size=8))

    few, many = peak(8), peak(80)
    sets = 4 * 50 * 3 * (80 - 8)  # float32 elements and masks
    assert many - few < 4 * sets  # initial, of each chunk, joined
    assert many < few + peak(16) / 2
