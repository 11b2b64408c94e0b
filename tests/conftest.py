"""Settings and fixtures of all tests."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.devices import ON_EVERY_DEVICE

# The tensors are tiny: more threads only wait for each other, ten times as long where the machine is busy.
torch.set_num_threads(1)
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # cuDNN's LSTM would round its products to ten bits

hypothesis.settings.register_profile("setpred", deadline=None, max_examples=50)
hypothesis.settings.register_profile("cuda", deadline=None, max_examples=10)  # oracles wait for it at every number
hypothesis.settings.load_profile("setpred")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("setpred")
    group.addoption(
        "--device",
        action="append",
        help="run the tests of functional, encoders, decoders, losses and metrics there; default: on the CPU, and on "
        "CUDA where there is one",
    )
    group.addoption("--shard", default="0/1", metavar="I/K", help="every K-th test, from the I-th on")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_only(reason): the test makes sense on the CPU only")
    if _devices(config) == ["cuda"]:
        hypothesis.settings.load_profile("cuda")


def _devices(config: pytest.Config) -> list[str]:
    return config.getoption("device") or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    devices = _devices(metafunc.config)
    if metafunc.definition.path.parent.name in ON_EVERY_DEVICE and devices != ["cpu"]:
        metafunc.parametrize("_device", devices, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def wanted(item: pytest.Item) -> bool:
        device = item.callspec.params.get("_device", "cpu") if hasattr(item, "callspec") else "cpu"
        return device in devices and (device == "cpu" or item.get_closest_marker("cpu_only") is None)

    devices = _devices(config)
    first, step = map(int, config.getoption("shard").split("/"))
    kept = [item for item in items if wanted(item)][first::step]
    config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    items[:] = kept


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make the device PyTorch's default, so that what a test makes is there; the CPU is so already."""
    if (device := getattr(request, "param", "cpu")) == "cpu":
        yield
    else:
        torch.set_default_device(device)
        yield
        torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
