"""The losses behind set networks of other packages: DETR of transformers, and slot attention."""

import torch
from slot_attention import SlotAttention
from torch import Tensor, nn
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from setpred import HungarianLoss, on_channels, sum_costs
from setpred.functional import cross_entropy_cost


def detr() -> DetrForObjectDetection:
    """A tiny DETR with random weights: 6 queries, 3 classes."""
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=6,
        num_labels=3,
        dropout=0.0,
    )
    return DetrForObjectDetection(config)


# [docs: detr
loss = HungarianLoss(
    sum_costs(on_channels("l1", slice(0, 4), weight=5.0), on_channels(cross_entropy_cost, slice(4, 7))), presence="bce"
)


def detr_loss(model: nn.Module, images: Tensor, boxes: Tensor, classes: Tensor, mask: Tensor) -> Tensor:
    output = model(images)
    presence = 1 - output.logits.softmax(-1)[..., -1]  # the last class is "no object"
    pred = torch.cat([output.pred_boxes, output.logits[..., :-1]], -1)
    target = torch.cat([boxes, nn.functional.one_hot(classes, 3)], -1)
    return loss(pred, target, presence, mask)


# docs]


def test_detr_learns_with_the_hungarian_loss() -> None:
    model = detr()
    data = torch.rand(2, 3, 32, 32), torch.rand(2, 4, 4), torch.randint(3, (2, 4)), torch.rand(2, 4) < 0.8
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        value = detr_loss(model, *data)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]
    assert model.class_labels_classifier.weight.grad.any()
    assert next(model.bbox_predictor.parameters()).grad.any()


def test_slot_attention_learns_with_the_hungarian_loss() -> None:
    slots = SlotAttention(num_slots=5, dim=16, iters=2)
    embed, head = nn.Linear(3, 16), nn.Linear(16, 3)
    set_loss = HungarianLoss()
    x, target, mask = torch.rand(8, 9, 3), torch.rand(8, 5, 2), torch.rand(8, 5) < 0.6
    optimizer = torch.optim.Adam([*slots.parameters(), *embed.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        # [docs: slots
        elements, presence = head(slots(embed(x))).split([2, 1], -1)
        value = set_loss(elements, target, presence.squeeze(-1).sigmoid(), mask)
        # docs]
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for p in slots.parameters())
