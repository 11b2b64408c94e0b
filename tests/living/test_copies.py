"""Copies: deepcopy, pickle, recomputed activations, compile, ensembles by vmap, the Hub."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from setpred import DSPNDecoder, PooledEncoder, SetPrediction
from tests.living.common import C, D, N, Network, gradients, make_batch

RECIPES = pytest.mark.parametrize("recipe", ["paper", "idspn"])


@RECIPES
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_apart(copied: object, recipe: str) -> None:
    model = Network(recipe)
    model.step(*make_batch()).backward()  # copied with gradients, after use
    other = copied(model)
    x = make_batch()[0]
    assert torch.equal(other(x).elements, model(x).elements)
    assert other.loss._encoder[0] is other.decoder.encoder  # still shared
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    assert not torch.equal(other(x).elements, model(x).elements)


def test_checkpointing_every_inner_step() -> None:
    """Recomputed in the backward pass: the same gradients."""
    # [docs: checkpoint
    model = Network("paper", checkpoint=True)
    # docs]
    plain = Network("paper")
    plain.load_state_dict(model.state_dict())
    model.step(*make_batch()).backward()
    plain.step(*make_batch()).backward()
    actual, expected = gradients(model), gradients(plain)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)


@RECIPES
def test_checkpointing_the_whole_decoder_by_pytorch(recipe: str) -> None:
    model = Network(recipe)
    z = model.backbone(make_batch()[0]).detach().requires_grad_()
    parameters = [z, *(p for p in model.decoder.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(model.decoder(z).elements.square().sum(), parameters)
    elements = checkpoint(model.decoder, z, use_reentrant=False).elements
    torch.testing.assert_close(torch.autograd.grad(elements.square().sum(), parameters), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at z's
@RECIPES
def test_compiling_the_decoder_of_a_network(recipe: str) -> None:
    torch._dynamo.reset()
    model = Network(recipe)
    x, target, mask = make_batch()
    expected = model.step(x, target, mask)
    # [docs: compile
    model.decoder.compile(fullgraph=True, backend="aot_eager")
    # docs]
    torch.testing.assert_close(model.step(x, target, mask), expected)
    torch._dynamo.reset()


@RECIPES
def test_an_ensemble_by_vmap(recipe: str) -> None:
    # [docs: vmap
    decoders = [Network(recipe).decoder.eval() for _ in range(3)]
    parameters, buffers = stack_module_state(decoders)

    def decode(parameters: dict[str, Tensor], buffers: dict[str, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        elements, mask, _ = functional_call(decoders[0], (parameters, buffers), (z,))
        return elements, mask

    z = torch.randn(5, D)
    elements, mask = vmap(decode, in_dims=(0, 0, None))(parameters, buffers, z)  # (3, 5, N, C) and (3, 5, N)
    # docs]
    assert elements.shape == (3, 5, N, C)
    for i, decoder in enumerate(decoders):
        torch.testing.assert_close(elements[i], decoder(z).elements, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mask[i], decoder(z).mask, rtol=1e-4, atol=1e-5)
    elements.square().sum().backward()
    decoders[0](z).elements.square().sum().backward()
    weight = "encoder.layers.0.weight"
    single = decoders[0].get_parameter(weight).grad
    assert single.any()
    torch.testing.assert_close(parameters[weight].grad[0], single, rtol=1e-3, atol=1e-4)


# [docs: hub
class HubNetwork(nn.Module, PyTorchModelHubMixin):
    def __init__(self, in_channels: int, set_size: int, iters: int = 10) -> None:
        super().__init__()
        self.backbone = nn.Linear(in_channels, 16)
        self.decoder = DSPNDecoder.paper(PooledEncoder(2, 16, 16), set_size=set_size, channels=2, iters=iters)

    def forward(self, x: Tensor) -> SetPrediction:
        return self.decoder(self.backbone(x))

    # docs]


def test_hub_saves_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read at import
    model = HubNetwork(3, set_size=5, iters=4).eval()
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    other = HubNetwork.from_pretrained(tmp_path)
    assert other.decoder.iters == 4
    x = torch.rand(2, 3)
    assert torch.equal(other(x).elements, model(x).elements)
