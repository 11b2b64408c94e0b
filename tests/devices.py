"""What a test has to know of the device that it runs on, which `tests/conftest.py` makes PyTorch's default."""

from functools import partial

import torch

ON_EVERY_DEVICE = ("functional", "encoders", "decoders", "losses", "metrics")  # folders


def here() -> torch.device:
    """Say where this test runs."""
    return torch.empty(0).device  # in 2.7, get_default_device() fails once a default was taken back


def autocast(dtype: torch.dtype, *, enabled: bool = True) -> torch.autocast:
    """Switch autocast on."""
    return torch.autocast(here().type, dtype, enabled)


def generator(seed: int) -> torch.Generator:
    """Make a source of random numbers."""
    return torch.Generator(here()).manual_seed(seed)


def random_state() -> torch.Tensor:
    """Read the state of the default source of random numbers."""
    return torch.cuda.get_rng_state() if here().type == "cuda" else torch.get_rng_state()


# On CUDA, numbers that are added up in one place by `scatter_add` and the like come in any order.
gradcheck = partial(torch.autograd.gradcheck, nondet_tol=1e-12)
gradgradcheck = partial(torch.autograd.gradgradcheck, nondet_tol=1e-12)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare results that are equal to the last digit, or on CUDA up to the order of sums."""
    if here().type == "cpu" or a.numel() == 0:
        return torch.equal(a, b)
    return bool((a - b).abs().max() <= 8 * torch.finfo(a.dtype).eps * b.abs().max())


def products_are_rounded_alike() -> bool:
    """Say whether a column of a matrix product is the same to the last digit whatever columns stand beside it.

    On the CPU with AVX-512 it is; with AVX2 not always, and cuBLAS takes other kernels for other sizes.
    """
    return here().type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"


# Largest differences between a sample alone and in a batch, where products are not rounded alike: what they make of a
# representation, and, relative to a set, what they make of a descent, in which a last digit may decide a rank.
ENCODED_ALIKE = {"cpu": 1e-4, "cuda": 1e-4}
DECODED_ALIKE = {"cpu": 1e-3, "cuda": 1e-2}
