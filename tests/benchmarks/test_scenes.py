"""Rendered scenes: images a second, at the size of the small settings and at the paper's.

pytest tests/benchmarks/test_scenes.py
"""

import pytest
import torch
from common.scenes import render_scenes


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("threads", [1, 2])
def test_render(benchmark, size, threads) -> None:
    torch.set_num_threads(threads)
    batch, generator = 64, torch.Generator().manual_seed(0)
    benchmark.group = f"{batch} scenes at {size}x{size}"
    benchmark.pedantic(lambda: render_scenes(batch, size=size, generator=generator), rounds=5, warmup_rounds=1)
    benchmark.extra_info["images a second"] = batch / benchmark.stats.stats.median


def test_render_on_cuda(benchmark) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    batch, generator = 1024, torch.Generator("cuda").manual_seed(0)

    def run() -> None:
        render_scenes(batch, generator=generator, device="cuda")
        torch.cuda.synchronize()

    benchmark.group = f"{batch} scenes at 128x128"
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
    benchmark.extra_info["images a second"] = batch / benchmark.stats.stats.median
