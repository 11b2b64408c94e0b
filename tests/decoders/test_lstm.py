"""LSTMDecoder: its layers; what it shares with others is in test_baselines.py."""

import torch

from setpred import LSTMDecoder


def test_layers_are_the_published_ones() -> None:
    decoder = LSTMDecoder(6, 4, 2, 8)
    shapes = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
    assert shapes == {
        "cell.weight": (8, 6),
        "cell.bias": (8,),
        "lstm.weight_ih_l0": (32, 1),
        "lstm.weight_hh_l0": (32, 8),
        "lstm.bias_ih_l0": (32,),
        "lstm.bias_hh_l0": (32,),
        "output.weight": (3, 8),
        "output.bias": (3,),
    }
    assert LSTMDecoder(6, 4, 2).cell.weight.shape == (512, 6)


def test_equals_the_formula() -> None:
    """The vector is the first cell state; hidden state and inputs are zeros; one element a step."""
    decoder, z = LSTMDecoder(6, 4, 2, 8, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    w = decoder.state_dict()
    cell, hidden = z @ w["cell.weight"].T + w["cell.bias"], torch.zeros(3, 8, dtype=torch.float64)
    elements, mask, trajectory = decoder(z)
    for step in range(4):
        gates = hidden @ w["lstm.weight_hh_l0"].T + w["lstm.bias_hh_l0"] + w["lstm.bias_ih_l0"]
        let_in, forget, candidate, let_out = gates.chunk(4, dim=1)
        cell = forget.sigmoid() * cell + let_in.sigmoid() * candidate.tanh()
        hidden = let_out.sigmoid() * cell.tanh()
        output = hidden @ w["output.weight"].T + w["output.bias"]
        torch.testing.assert_close(elements[:, step], output[:, :2])
        torch.testing.assert_close(mask[:, step], (output[:, 2] + 1).clamp(0, 1))
    assert trajectory is None
