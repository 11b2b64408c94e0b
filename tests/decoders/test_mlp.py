"""MLPDecoder: its layers; what it shares with others is in test_baselines.py."""

import torch
import torch.nn.functional as F

from setpred import MLPDecoder


def test_layers_are_the_published_ones() -> None:
    decoder = MLPDecoder(6, 4, 2, 8)
    shapes = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
    assert shapes == {
        "input.weight": (8, 6),
        "input.bias": (8,),
        "hidden.weight": (8, 8),
        "hidden.bias": (8,),
        "output.weight": (4 * 3, 8),
        "output.bias": (4 * 3,),
    }
    assert MLPDecoder(6, 4, 2).hidden.weight.shape == (512, 512)


def test_equals_the_formula() -> None:
    decoder, z = MLPDecoder(6, 4, 2, 8, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    w = decoder.state_dict()
    hidden = (z @ w["input.weight"].T + w["input.bias"]).clamp(min=0)
    hidden = F.relu(hidden @ w["hidden.weight"].T + w["hidden.bias"])
    output = hidden @ w["output.weight"].T + w["output.bias"]
    elements, mask, trajectory = decoder(z)
    for slot in range(4):
        torch.testing.assert_close(elements[:, slot], output[:, 3 * slot : 3 * slot + 2])
        torch.testing.assert_close(mask[:, slot], (output[:, 3 * slot + 2] + 1).clamp(0, 1))
    assert trajectory is None
