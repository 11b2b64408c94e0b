"""The converter of docs/migrating.md: setpred's modules compute what the published ones do.

The published forward passes are written out here as formulas over a state dict, in the published layout: sets
(B, C, N), masks (B, N), every layer a convolution of width 1.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from setpred import unpad_sets

PATH = Path(__file__).parents[2] / "docs" / "migrating" / "convert.py"
State = dict[str, Tensor]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


convert = load()


def layer(state: State, name: str, x: Tensor) -> Tensor:
    """A convolution of width 1 on (B, C, ...)."""
    weight = state[f"{name}.weight"].flatten(1)
    bias = state[f"{name}.bias"].view(-1, *[1] * (x.dim() - 2))
    return torch.einsum("oc,bc...->bo...", weight, x) + bias


def pool(weight: Tensor, x: Tensor) -> Tensor:
    """Feature by feature: sort, then weight rank k by the piecewise-linear function at k / (n - 1)."""
    pieces, n = weight.shape[1] - 1, x.shape[2]
    result = torch.zeros(x.shape[:2], dtype=x.dtype)
    ordered = x.sort(dim=2, descending=True).values
    for k in range(n):
        place = pieces * k / max(n - 1, 1)
        left = min(int(place), pieces - 1)
        value = weight[:, left] + (place - left) * (weight[:, left + 1] - weight[:, left])
        result = result + value * ordered[:, :, k]
    return result


def fs_encoder(state: State, x: Tensor, mask: Tensor) -> Tensor:
    x = torch.cat([x, mask.unsqueeze(1)], 1)
    x = layer(state, "conv.4", F.relu(layer(state, "conv.2", F.relu(layer(state, "conv.0", x)))))
    return pool(state["pool.weight"], x / x.shape[2])


def rnfs_encoder(state: State, x: Tensor, mask: Tensor) -> Tensor:
    x = torch.cat([x, mask.unsqueeze(1)], 1)
    n = x.shape[2]
    pairs = torch.stack([torch.cat([x[:, :, i], x[:, :, j]], 1) for i in range(n) for j in range(n)], 2)
    return pool(state["pool.weight"], layer(state, "conv.2", F.relu(layer(state, "conv.0", pairs))) / n / n)


def dspn(state: State, encoder, encoder_state: State, z: Tensor, iters: int, lr: float) -> tuple[Tensor, Tensor]:
    """The inner loss is a mean over batch and features, so that the step depends on the batch size."""
    x = state["starting_set"].repeat(len(z), 1, 1)
    mask = state["starting_mask"].repeat(len(z), 1).clamp(0, 1)
    for _ in range(iters):
        x, mask = x.requires_grad_(), mask.requires_grad_()
        gradients = torch.autograd.grad(F.smooth_l1_loss(encoder(encoder_state, x, mask), z), (x, mask))
        x, mask = x.detach() - lr * gradients[0], (mask.detach() - lr * gradients[1]).clamp(0, 1)
    return x, mask


def mlp(state: State, z: Tensor, set_size: int) -> tuple[Tensor, Tensor]:
    hidden = F.relu(layer(state, "model.2", F.relu(layer(state, "model.0", z))))
    output = layer(state, "model.4", hidden).view(len(z), -1, set_size)
    return output[:, :-1], output[:, -1]


def rnn(state: State, z: Tensor, set_size: int) -> tuple[Tensor, Tensor]:
    cell = layer(state, "lin", z)
    hidden, outputs = torch.zeros_like(cell), []
    for _ in range(set_size):  # the input is 0
        gates = hidden @ state["model.weight_hh_l0"].T + state["model.bias_ih_l0"] + state["model.bias_hh_l0"]
        into, forget, new, out = gates.chunk(4, 1)
        cell = forget.sigmoid() * cell + into.sigmoid() * new.tanh()
        hidden = out.sigmoid() * cell.tanh()
        outputs.append(layer(state, "out", hidden))
    output = torch.stack(outputs, 2)
    return output[:, :-1], output[:, -1]


C, D, H, N = 3, 6, 5, 4


def random_state(**shapes: tuple[int, ...]) -> State:
    return {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}


def encoder_state(kind: str) -> State:
    state = random_state(pool__weight=(D, 21))
    if kind == "FSEncoder":
        widths = {"conv.0": (H, C + 1, 1), "conv.2": (H, H, 1), "conv.4": (D, H, 1)}
    else:
        widths = {"conv.0": (H, 2 * C + 2, 1, 1), "conv.2": (D, H, 1, 1), "lin": (D, H)}
    for name, shape in widths.items():
        state |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    return state


def converted_encoder(kind: str, state: State, prefix: str = ""):
    if kind == "FSEncoder":
        return convert.pooled_encoder(state, prefix, in_channels=C)
    return convert.relation_encoder(state, prefix)


ENCODERS = {"FSEncoder": fs_encoder, "RNFSEncoder": rnfs_encoder}
EVERY_ENCODER = pytest.mark.parametrize("kind", ENCODERS)


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_fspool(n: int) -> None:
    state, x = random_state(weight=(C, 21)), torch.randn(2, C, n)
    torch.testing.assert_close(convert.fspool(state)(x.mT), pool(state["weight"], x))


@EVERY_ENCODER
def test_encoders(kind: str) -> None:
    state, x, mask = encoder_state(kind), torch.randn(2, C, N), torch.rand(2, N)
    ours = converted_encoder(kind, {f"set_encoder.{name}": value for name, value in state.items()}, "set_encoder.")
    torch.testing.assert_close(ours(x.mT, mask), ENCODERS[kind](state, x, mask))


@EVERY_ENCODER
def test_dspn_at_the_published_batch_size(kind: str) -> None:
    batch, lr, state = 7, 20.0, random_state(starting_set=(1, C, N), starting_mask=(1, N))
    encoder, z = encoder_state(kind), torch.randn(7, D)
    decoder = convert.dspn_decoder(state, converted_encoder(kind, encoder), iters=5, lr=lr, batch_size=batch)
    elements, mask, _ = decoder(z)
    expected, expected_mask = dspn(state, ENCODERS[kind], encoder, z, 5, lr)
    torch.testing.assert_close(elements, expected.mT)
    torch.testing.assert_close(mask, expected_mask)
    assert (elements - decoder(z, iters=1).elements).abs().max() > 1e-3, "the steps do something"


def test_dspn_trains_its_start() -> None:
    state = random_state(starting_set=(1, C, N), starting_mask=(1, N))
    encoder = converted_encoder("FSEncoder", encoder_state("FSEncoder"))
    decoder = convert.dspn_decoder(state, encoder)
    decoder(torch.randn(2, D)).elements.sum().backward()
    assert decoder.lr == 25
    assert decoder.init.elements.grad.abs().sum() > 0
    assert decoder.init.mask.grad.abs().sum() > 0


def test_mlp() -> None:
    state = {}
    for name, shape in {"model.0": (H, D), "model.2": (H, H), "model.4": ((C + 1) * N, H)}.items():
        state |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    z = torch.randn(8, D)
    elements, mask, _ = convert.mlp_decoder(state, set_size=N)(z)
    expected, expected_mask = mlp(state, z, N)
    torch.testing.assert_close(elements, expected.mT)
    torch.testing.assert_close(mask, expected_mask.clamp(0, 1))
    assert ((expected_mask > 0) & (expected_mask < 1)).any(), "some are not clamped"


def test_lstm() -> None:
    state = random_state(
        lin__weight=(H, D),
        lin__bias=(H,),
        model__weight_ih_l0=(4 * H, 1),
        model__weight_hh_l0=(4 * H, H),
        model__bias_ih_l0=(4 * H,),
        model__bias_hh_l0=(4 * H,),
        out__weight=(C + 1, H, 1),
        out__bias=(C + 1,),
    )
    state["out.bias"][-1] = 0.5  # among the masks that are not clamped
    z = torch.randn(8, D)
    elements, mask, _ = convert.lstm_decoder(state, set_size=N)(z)
    expected, expected_mask = rnn(state, z, N)
    torch.testing.assert_close(elements, expected.mT)
    torch.testing.assert_close(mask, expected_mask.clamp(0, 1))
    assert ((expected_mask > 0) & (expected_mask < 1)).any(), "some are not clamped"


def test_sized_encoder_is_refused() -> None:
    state = encoder_state("FSEncoder")
    with pytest.raises(ValueError, match=r"in_channels \+ 1 = 5 inputs, got 4: FSEncoderSized"):
        convert.pooled_encoder(state, in_channels=4)


@pytest.mark.parametrize("name", ["fspool", "relation_encoder"])
def test_wrong_prefix(name: str) -> None:
    with pytest.raises(ValueError, match=r"`state` must have the key 'net\..*weight', got x"):
        getattr(convert, name)({"x": torch.ones(1)}, "net.")


def test_a_whole_published_checkpoint_decodes() -> None:
    """The layout of `torch.load(log)["weights"]`: the set encoder stands in it twice."""
    encoder = encoder_state("RNFSEncoder")
    state = {f"set_encoder.{k}": v for k, v in encoder.items()}
    state |= {f"set_decoder.encoder.{k}": v for k, v in encoder.items()}
    state |= {f"set_decoder.{k}": v for k, v in random_state(starting_set=(1, C, N), starting_mask=(1, N)).items()}
    ours = convert.relation_encoder(state, "set_encoder.")
    decoder = convert.dspn_decoder(state, ours, "set_decoder.", lr=1.0, batch_size=1)
    z = ours(torch.rand(2, N, C), torch.ones(2, N))
    assert len(unpad_sets(*decoder(z)[:2])) == 2
