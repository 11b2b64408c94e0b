"""The networks before the decoders."""

import torch
from common.models import Refined, resnet34, resnet34_backbone

from setpred import DSPNDecoder, MLPDecoder, PooledEncoder, hungarian_loss


def test_resnet34_has_the_published_layers():
    network = resnet34()
    # 21,797,672 parameters with the classifier of 512 x 1,000 + 1,000.
    assert sum(parameter.numel() for parameter in network.parameters()) == 21_797_672 - 513_000
    images = torch.randn(2, 3, 64, 96)
    sizes = []
    for layer in network:
        images = layer(images)
        sizes.append(tuple(images.shape[1:]))
    assert sizes[3:] == [(64, 16, 24)] * 4 + [(128, 8, 12)] * 4 + [(256, 4, 6)] * 6 + [(512, 2, 3)] * 3
    convolutions = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert len([layer for layer in convolutions if layer.kernel_size != (1, 1)]) == 33  # and the classifier


def test_resnet34_starts_as_published():
    """Weights of variance 2 / fan out (He et al., ICCV 2015), so that gradients keep their size."""
    for layer in resnet34().modules():
        if isinstance(layer, torch.nn.Conv2d):
            fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
            assert abs(layer.weight.var().item() * fan_out / 2 - 1) < 0.1


def test_a_block_that_adds_nothing_passes_its_input_on():
    block = resnet34()[4].eval()
    block.convolutions[4].weight.data.zero_()
    x = torch.rand(2, 64, 5, 5)
    torch.testing.assert_close(block(x), x)


def test_backbone_gives_vectors():
    for size in (64, 128):
        assert resnet34_backbone(7)(torch.rand(2, 3, size, size)).shape == (2, 7)


def test_a_start_and_its_refinement_are_judged_both():
    torch.manual_seed(0)
    encoder = PooledEncoder(2, 8, 8)
    model = Refined(MLPDecoder(8, 4, 2, 8), DSPNDecoder.recommended(encoder, set_size=4, channels=2))
    target = torch.rand(3, 4, 2)
    z = encoder(target).detach()
    elements, mask, _ = model(z)
    assert elements.shape == (2, 3, 4, 2)
    hungarian_loss(elements, target, mask).backward()
    for part in (model.start, model.descent):
        assert any(parameter.grad.abs().max() > 0 for parameter in part.parameters())
    model.eval()
    start, end = model(z, refine=False), model(z)
    torch.testing.assert_close(start.elements, model.start(z).elements)
    loss = model.descent.representation_loss
    assert (loss(end, z) < loss(start, z)).all()
