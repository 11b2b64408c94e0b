"""The decoders that the scripts choose from, each with its set encoder's scaling and the loss that it is trained by."""

import argparse
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from common.arguments import count, fraction, positive
from common.batches import Batch
from setpred import (
    DSPNDecoder,
    DSPNLoss,
    GradientDescent,
    LSTMDecoder,
    MLPDecoder,
    PooledEncoder,
    RelationEncoder,
    SetPrediction,
    StandardScaler,
)
from setpred.encoders.scaling import Scaling

PUBLISHED: dict[str, Scaling] = {"dspn": "dspn", "idspn": "idspn"}  # the papers' recipes, and how encoders are scaled
DESCENT = ("recommended", *PUBLISHED)
DECODERS = (*DESCENT, "mlp", "lstm")
EVAL_STEPS = {"recommended": [20, 40, 80], "dspn": [10, 20, 30], "idspn": [10, 20, 40]}
SetLoss = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
Loss = Callable[[SetPrediction, Batch, Tensor], Tensor]  # (prediction, batch, z) -> scalar


def add_decoder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what describes the decoder; None leaves a value to its recipe."""
    group = parser.add_argument_group("decoder")
    group.add_argument(
        "--decoder",
        choices=DECODERS,
        default="recommended",
        help="DSPN as the library recommends it, or as one of its papers has it (dspn, idspn), or a baseline "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--inner-steps",
        type=count,
        metavar="T",
        help="steps of the inner descent in training (dspn, default: 10; recommended, default: 10; idspn, default: 20)",
    )
    group.add_argument(
        "--inner-lr", type=positive, metavar="LR", help="its learning rate (dspn, default: 25; idspn, default: 1)"
    )
    group.add_argument(
        "--momentum",
        type=fraction,
        metavar="M",
        help="its momentum (dspn, default: 0; idspn, Nesterov's, default: 0.9)",
    )


def make_encoder(options: argparse.Namespace, kind: str, channels: int) -> nn.Module:
    """Make the set encoder of the decoder's recipe: the papers' inner learning rates belong to their own scalings."""
    scaling = PUBLISHED.get(options.decoder, "conditioned")
    if kind == "relation":
        return RelationEncoder(channels, options.latent, options.width, scaling=scaling)
    layers = 2 if options.decoder == "idspn" else 3
    return PooledEncoder(channels, options.latent, options.width, layers=layers, scaling=scaling)


def make_scaler(options: argparse.Namespace, channels: int) -> StandardScaler | None:
    """Make what standardises the elements, fitted when the training begins; the papers took them as they are."""
    return None if options.decoder in PUBLISHED else StandardScaler(channels)


def make_decoder(
    options: argparse.Namespace, encoder: nn.Module, scaler: StandardScaler | None, *, set_size: int, channels: int
) -> nn.Module:
    """Make the decoder that the options ask for; the baselines have nothing to do with the encoder."""
    if options.decoder == "mlp":
        return MLPDecoder(options.latent, set_size, channels, options.width, scaler=scaler)
    if options.decoder == "lstm":
        return LSTMDecoder(options.latent, set_size, channels, options.width, scaler=scaler)
    changes: dict[str, Any] = {} if options.inner_steps is None else {"iters": options.inner_steps}
    if options.decoder == "recommended":
        return DSPNDecoder.recommended(encoder, set_size=set_size, channels=channels, scaler=scaler, **changes)
    if options.decoder == "dspn":
        changes["lr"] = GradientDescent(options.inner_lr or 25.0, options.momentum or 0.0)
        return DSPNDecoder.paper(encoder, set_size=set_size, channels=channels, **changes)
    momentum = 0.9 if options.momentum is None else options.momentum
    changes["lr"] = GradientDescent(options.inner_lr or 1.0, momentum, nesterov=momentum > 0, grad_clip=10.0)
    return DSPNDecoder.idspn(encoder, set_size=set_size, channels=channels, **changes)


def evaluation_work(options: argparse.Namespace, decoder: nn.Module) -> float:
    """Estimate the work of evaluating a sample, as a multiple of the work of training on it once.

    Two thirds of training are the backward pass, but for implicit differentiation, which has one for all inner steps.
    """
    if options.decoder not in DESCENT:
        return 1 / 3
    forward = 1.0 if decoder.differentiate == "implicit" else 1 / 3
    return forward * max(options.eval_steps) / decoder.iters


def make_loss(
    options: argparse.Namespace,
    encoder: nn.Module,
    set_loss: SetLoss,
    scaler: StandardScaler | None,
    *,
    repr_weight: float,
) -> Loss:
    """Make the outer loss: DSPN's is over all inner steps, with the representation term; the others' is of the result.

    An autoencoder has a `repr_weight` of 0: its vector is the target's representation anyway.
    """
    dspn = options.decoder == "dspn"
    loss = DSPNLoss(
        encoder, set_loss, repr_weight=repr_weight if dspn else 0.0, steps="all" if dspn else "last", scaler=scaler
    )
    return lambda prediction, batch, z: loss(prediction, batch.elements, batch.mask, z=z)
