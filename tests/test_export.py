"""Exports: what ONNX Runtime and `torch.export` compute is what the model computes, at every batch size."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from setpred import (
    DSPNDecoder,
    GradientDescent,
    LSTMDecoder,
    MLPDecoder,
    PooledEncoder,
    RelationEncoder,
    SetPrediction,
    SlotDecoder,
    StandardScaler,
    TransformerDecoder,
)
from setpred.export import to_onnx, to_program
from tests.rules import paper_decoder, recipe

BATCHES = [1, 2, 7]  # the example has 3


class Detector(nn.Module):
    """A convolutional backbone and a decoder; also returns the vector."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 16),
        )
        self.decoder = decoder

    def forward(self, image: Tensor) -> tuple[Tensor, SetPrediction]:
        z = self.backbone(image)
        return z, self.decoder(z)


def decoder(name: str, make_encoder: type[nn.Module] = PooledEncoder, **options: object) -> DSPNDecoder:
    # Values are compared: no rows so nearly equal that rounding ranks them.
    settings = {"iters": 2, "set_size": 5, "channels": 2} | recipe(name) | options
    return getattr(DSPNDecoder, name)(make_encoder(2, 16, 16), **settings).eval()


def flat(result: Tensor | tuple) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result if part is not None for tensor in flat(part)]


def assert_equal(model: nn.Module, run: Callable[[Tensor], list], *shape: int) -> None:
    for size in BATCHES:
        x = torch.randn(size, *shape)
        with torch.no_grad():
            expected = flat(model(x))
        actual = run(x)
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(a), e, rtol=1e-5, atol=1e-6)


def in_onnx_runtime(path: Path) -> Callable[[Tensor], list]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


def fitted_scaler() -> StandardScaler:
    return StandardScaler(2).fit(torch.tensor([3.0, -1.0]) + torch.tensor([5.0, 0.2]) * torch.randn(99, 2))


# Half a minute each: one of each encoder and recipe; test_program goes through more.
@pytest.mark.parametrize(("make_encoder", "recipe"), [(PooledEncoder, "paper"), (RelationEncoder, "idspn")])
def test_onnx_runtime(make_encoder: type[nn.Module], recipe: str, tmp_path: Path) -> None:
    model = decoder(recipe, make_encoder)
    to_onnx(model, torch.randn(3, 16), tmp_path / "model.onnx")
    assert_equal(model, in_onnx_runtime(tmp_path / "model.onnx"), 16)


def test_onnx_runtime_of_a_network_without_masks(tmp_path: Path) -> None:
    model = Detector(decoder("paper", mask_clamp=None, scaler=fitted_scaler())).eval()
    model.backbone[1].running_mean.uniform_()  # a buffer
    program = to_onnx(model, torch.randn(1, 3, 9, 9), tmp_path / "model.onnx")
    assert [x.name for x in program.model.graph.inputs] == ["image"]
    assert [x.name for x in program.model.graph.outputs] == ["output_0", "output_1_elements", "output_1_mask"]
    assert_equal(model, in_onnx_runtime(tmp_path / "model.onnx"), 3, 9, 9)


@pytest.mark.parametrize(
    "options",
    [
        {"tol": 0.05},
        {"project": lambda elements, mask: (elements.clamp(0, 0.5), mask)},
        {"differentiate": "unrolled", "repr_loss": "huber", "lr": GradientDescent(1.0, 0.9, True, 0.01)},
        {"scaler": fitted_scaler(), "project": lambda elements, mask: (elements.clamp(0, 3), mask)},
        {"init": nn.Sequential(nn.Linear(16, 10), nn.Unflatten(1, (5, 2)))},
    ],
    ids=lambda options: next(iter(options)),
)
def test_program(options: dict[str, object]) -> None:
    model = decoder("idspn", **options)
    assert_equal(model, to_program(model, torch.randn(3, 16)).module(), 16)


def test_program_of_encoders_that_need_other_ways() -> None:
    """Attention; a pool by `max`; `len(x)`; a hook, which takes the way over `torch.autograd.grad`."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # Not of two features: its normalisation would make all elements alike, and rounding choose the maximum.
            self.attention = nn.TransformerEncoderLayer(4, 1, 8, batch_first=True)
            self.pooled = PooledEncoder(4, 16, 16, pool="max")
            self.pooled.register_full_backward_hook(lambda *_: None)

        def forward(self, elements: Tensor, mask: Tensor | None) -> Tensor:
            return self.pooled(self.attention(elements).reshape(len(elements), -1, 4), mask)

    model = paper_decoder(Encoder(), iters=2, lr=1.0, set_size=5, channels=4).eval()
    assert_equal(model, to_program(model, torch.randn(3, 16)).module(), 16)


@pytest.mark.parametrize("baseline", [MLPDecoder, LSTMDecoder, TransformerDecoder])
def test_program_of_the_baselines(baseline: type[nn.Module]) -> None:
    model = baseline(16, 5, 2, 8, scaler=fitted_scaler()).eval()
    assert_equal(model, to_program(model, torch.randn(3, 16)).module(), 16)


def test_onnx_runtime_of_a_transformer(tmp_path: Path) -> None:
    """From tokens and their mask; an output has another name than an input."""
    model = TransformerDecoder(16, 5, 2, 8, layers=2, heads=2, queries="top-n", scaler=fitted_scaler()).eval()
    program = to_onnx(model, (torch.randn(3, 4, 16), torch.ones(3, 4)), tmp_path / "model.onnx")
    assert [x.name for x in program.model.graph.inputs] == ["z", "mask"]
    assert [x.name for x in program.model.graph.outputs] == ["elements", "output_mask"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for size in BATCHES:
        tokens, mask = torch.randn(size, 4, 16), (torch.rand(size, 4) < 0.6).float()
        mask[0] = 0
        with torch.no_grad():
            expected = flat(model(tokens, mask))
        for a, e in zip(session.run(None, {"z": tokens.numpy(), "mask": mask.numpy()}), expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(a), e, rtol=1e-4, atol=1e-4)


class FromGiven(nn.Module):
    """Slots as an input: a graph draws numbers of its own."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.decoder = SlotDecoder(6, 5, 2, 8, **options)

    def forward(self, z: Tensor, present: Tensor, slots: Tensor) -> SetPrediction:
        return self.decoder(z, present, init=slots)


def slot_inputs(size: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(size, 4, 6), torch.rand(size, 4) < 0.7, torch.randn(size, 5, 8)


@pytest.mark.parametrize("attention", ["softmax", "sinkhorn", "mesh"])
def test_program_of_slots(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setpred.decoders.slot._TRANSPORT_ITERS", 4)  # in a graph they are unrolled
    model = FromGiven(attention=attention, iters=2, differentiate="implicit", scaler=fitted_scaler()).eval()
    program = to_program(model, slot_inputs(3)).module()
    for size in BATCHES:
        inputs = slot_inputs(size)
        torch.testing.assert_close(flat(program(*inputs)), flat(model(*inputs)), rtol=1e-5, atol=1e-5)


def test_onnx_runtime_of_slots(tmp_path: Path) -> None:
    model = FromGiven().eval()
    to_onnx(model, slot_inputs(3), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for size in BATCHES:
        inputs = slot_inputs(size)
        actual = session.run(None, {name: x.numpy() for name, x in zip(("z", "present", "slots"), inputs, strict=True)})
        for a, e in zip(actual, flat(model(*inputs)), strict=True):
            torch.testing.assert_close(torch.as_tensor(a), e, rtol=1e-5, atol=1e-5)


def test_a_program_draws_slots_for_every_batch_size() -> None:
    model = SlotDecoder(16, 5, 2, 8, tokens=4).eval()
    program = to_program(model, torch.randn(3, 16)).module()
    for size in BATCHES:
        z = torch.randn(size, 16)
        torch.manual_seed(0)
        one, mask = program(z)
        assert not torch.equal(one, program(z)[0])
        torch.manual_seed(0)
        torch.testing.assert_close((one, mask), tuple(model(z)[:2]), rtol=1e-5, atol=1e-5)


def test_several_inputs_and_a_trajectory() -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder("paper")

        def forward(self, z: Tensor, *starts: Tensor) -> dict[str, object]:
            return {"sets": self.decoder(z, init=starts, record=True)}

    model = Conditioned().eval()
    example = (torch.randn(3, 16), torch.rand(3, 5, 2), torch.rand(3, 5))
    program = to_program(model, example)
    inputs = (torch.randn(6, 16), torch.rand(6, 5, 2), torch.rand(6, 5))
    for a, e in zip(program.module()(*inputs), flat(model(*inputs)["sets"]), strict=True):
        torch.testing.assert_close(a, e)


class Reconstruction(nn.Module):
    """Sets in, sets out: input and output would have one name."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = PooledEncoder(2, 16, 16), MLPDecoder(16, 5, 2, 16)

    def forward(self, elements: Tensor, mask: Tensor) -> SetPrediction:
        return self.decoder(self.encoder(elements, mask))


def test_outputs_are_not_named_as_inputs(tmp_path: Path) -> None:
    model, path = Reconstruction().eval(), tmp_path / "model.onnx"
    elements, mask = torch.randn(3, 5, 2), torch.rand(3, 5)
    to_onnx(model, (elements, mask), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_inputs()] == ["elements", "mask"]
    assert [x.name for x in session.get_outputs()] == ["output_elements", "output_mask"]
    actual = session.run(None, {"elements": elements.numpy(), "mask": mask.numpy()})
    with torch.no_grad():
        for a, e in zip(actual, flat(model(elements, mask)), strict=True):
            torch.testing.assert_close(torch.as_tensor(a), e, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # PyTorch 2.10's own
def test_a_saved_program_is_the_same_and_has_the_models_parameters() -> None:
    model = decoder("paper", scaler=fitted_scaler())
    program = to_program(model, torch.randn(3, 16))
    assert program.state_dict.keys() == model.state_dict().keys()
    assert "scaler.location" in program.state_dict
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    z = torch.randn(4, 16)
    for a, e in zip(torch.export.load(file).module()(z), program.module()(z), strict=True):
        assert torch.equal(a, e)


def test_a_program_draws_random_starts_for_every_batch_size() -> None:
    model = DSPNDecoder.recommended(PooledEncoder(2, 16, 16), iters=2, set_size=5, channels=2).eval()
    program = to_program(model, torch.randn(3, 16)).module()
    for size in BATCHES:
        z = torch.randn(size, 16)
        torch.manual_seed(0)
        one, mask = program(z)[:2]
        other = program(z)[0]
        torch.manual_seed(0)
        expected = model(z)
        assert one.shape == (size, 5, 2)
        assert not torch.equal(one, other)
        torch.testing.assert_close((one, mask), tuple(expected[:2]), rtol=1e-3, atol=1e-3)


def test_exporting_leaves_model_and_modes_alone() -> None:
    model = decoder("idspn")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    built_in = len
    to_program(model, torch.randn(3, 16))
    assert len is built_in
    assert torch.is_grad_enabled()
    assert not torch.compiler.is_exporting()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


class Returning(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: x.sum(1) if x.shape[0] > 2 else x.mean(1), r"B.*2"),
        (lambda x: x / int(x.shape[0]), r"B = 6"),
        (lambda x: torch.stack([x[i] for i in range(len(x))]), r"B = 6"),
    ],
    ids=["branch", "int", "range"],
)
def test_refuses_what_depends_on_the_batch_size(function: Callable[[Tensor], object], found: str) -> None:
    with pytest.raises(ValueError, match=rf"`model` must compute the same for every batch size.*{found}"):
        to_program(Returning(function).eval(), torch.randn(3, 4))


@pytest.mark.parametrize(
    ("model", "example", "error", "match"),
    [
        (torch.sin, torch.randn(3), TypeError, "`model` must be a module"),
        (nn.Dropout(), torch.randn(3), ValueError, r"`model` must be in evaluation mode.*`model.eval\(\)`"),
        (nn.ReLU().eval(), np.ones(3), TypeError, "`example` must be a tensor or a tuple of tensors"),
        (nn.ReLU().eval(), (), TypeError, "`example` must be a tensor or a tuple of tensors"),
        (nn.ReLU().eval(), torch.randn(0, 4), ValueError, r"`example` must have one batch size.*\(0, 4\)"),
        (nn.ReLU().eval(), torch.tensor(1.0), ValueError, r"`example` must have one batch size.*\(\)"),
        (nn.Bilinear(2, 2, 2).eval(), (torch.ones(3, 2), torch.ones(4, 2)), ValueError, r"\(3, 2\), \(4, 2\)"),
        (Returning(lambda x: (x, "a")).eval(), torch.ones(3), TypeError, "`model` must return tensors.*'a'"),
    ],
)
def test_errors(model: object, example: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        to_program(model, example)


def test_without_the_onnx_packages() -> None:
    """The module imports, and the call says what to install."""
    code = (
        "import sys; sys.modules['onnx'] = sys.modules['onnxscript'] = None\n"
        "import torch, setpred.export\n"
        "try: setpred.export.to_onnx(torch.nn.ReLU().eval(), torch.ones(2))\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'setpred[export]'" in done.stdout


def test_a_program_compiled_ahead_of_time_is_loaded_from_its_file(tmp_path: Path) -> None:
    encoder = PooledEncoder(2, 8, 8, layers=1)
    decoder = DSPNDecoder.recommended(encoder, iters=1, eval_iters=2, set_size=3, channels=2, init="learned").eval()
    z, path = torch.randn(3, 8), str(tmp_path / "decoder.pt2")
    # [docs: ahead
    torch._inductor.aoti_compile_and_package(to_program(decoder, z), package_path=path)  # once: it compiles C++
    decode = torch._inductor.aoti_load_package(path)  # in any process, at once
    elements, mask = decode(z)
    # docs]
    torch.testing.assert_close((elements, mask), tuple(decoder(z)[:2]))
    z = torch.randn(7, 8)
    torch.testing.assert_close(tuple(decode(z)), tuple(decoder(z)[:2]))
