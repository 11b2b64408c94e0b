"""The four decoders that the examples compare, with the losses that they are trained by."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from common.arguments import count, fraction, not_negative, positive
from common.batches import Batch
from setpred import DSPNDecoder, DSPNLoss, GradientDescent, LSTMDecoder, MLPDecoder, SetPrediction

DECODERS = ("dspn", "idspn", "mlp", "lstm")
DESCENT = ("dspn", "idspn")
SetLoss = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
Loss = Callable[[SetPrediction, Batch, Tensor], Tensor]  # (prediction, batch, z) -> scalar


def add_decoder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what describes the decoder; None leaves a value to the recipe of the decoder's paper."""
    group = parser.add_argument_group("decoder")
    group.add_argument("--decoder", choices=DECODERS, default="dspn", help="default: %(default)s")
    group.add_argument(
        "--inner-steps",
        type=count,
        metavar="T",
        help="steps of the inner descent in training (dspn, default: 10; idspn, default: 20)",
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
    group.add_argument(
        "--anchor",
        type=not_negative,
        metavar="W",
        help="weight of the pull towards the initial set (idspn; default: 0.1)",
    )
    group.add_argument(
        "--loss-steps",
        choices=["all", "last"],
        help="which inner steps the set loss is averaged over (dspn; default: all)",
    )
    group.add_argument(
        "--persistent",
        type=count,
        metavar="K",
        help="keep K descents under way, each of which goes on for K training steps, so that an epoch's steps see a "
        "K-th of the data (idspn; default: 1)",
    )


def evaluation_descent(options: argparse.Namespace, decoder: nn.Module) -> dict[str, GradientDescent]:
    """Attributes of the decoder that evaluation changes."""
    changes = {"lr": options.eval_inner_lr, "momentum": options.eval_momentum}
    changes = {name: value for name, value in changes.items() if value is not None}
    return {"lr": replace(decoder.lr, **changes)} if changes else {}


def make_decoder(
    options: argparse.Namespace, encoder: nn.Module, *, latent: int, set_size: int, channels: int, width: int
) -> nn.Module:
    """Make the decoder that the options ask for; the baselines have nothing to do with the encoder."""
    if options.decoder == "mlp":
        return MLPDecoder(latent, set_size, channels, width)
    if options.decoder == "lstm":
        return LSTMDecoder(latent, set_size, channels, width)
    changes: dict[str, Any] = {} if options.inner_steps is None else {"iters": options.inner_steps}
    if options.decoder == "dspn":
        changes["lr"] = GradientDescent(options.inner_lr or 25.0, options.momentum or 0.0)
        return DSPNDecoder.paper(encoder, set_size=set_size, channels=channels, **changes)
    momentum = 0.9 if options.momentum is None else options.momentum
    changes["lr"] = GradientDescent(options.inner_lr or 1.0, momentum, nesterov=momentum > 0, grad_clip=10.0)
    changes |= {"init": "learned", "anchor": 0.1 if options.anchor is None else options.anchor}
    return DSPNDecoder.idspn(encoder, set_size=set_size, channels=channels, **changes)


def evaluation_work(options: argparse.Namespace, decoder: nn.Module) -> float:
    """Estimate the work of evaluating a sample, as a multiple of the work of training on it once.

    Two thirds of training are the backward pass, but for implicit differentiation, which has one for all inner steps.
    """
    forward = 1.0 if options.decoder == "idspn" else 1 / 3
    return forward * max(options.eval_steps) / decoder.iters if options.decoder in DESCENT else forward


def make_loss(options: argparse.Namespace, encoder: nn.Module, set_loss: SetLoss, *, repr_weight: float) -> Loss:
    """Make the outer loss: DSPN's is over all inner steps, with the representation term; the others' is of the result.

    An autoencoder has a `repr_weight` of 0: its vector is the target's representation anyway.
    """
    dspn = options.decoder == "dspn"
    loss = DSPNLoss(
        encoder,
        set_loss,
        repr_weight=repr_weight if dspn else 0.0,
        steps=(options.loss_steps or "all") if dspn else "last",
    )
    return lambda prediction, batch, z: loss(prediction, batch.elements, batch.mask, z=z)
