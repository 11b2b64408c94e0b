"""Which encoder to decode with: python -m tests.benchmarks.encoders writes the table of docs/choosing.md.

Sets of 1 to 8 random points in the plane are turned into vectors of 64 features by a PooledEncoder, whatever the
decoder's own encoder is, and back by the recommended decoder. Every run trains for the same seconds of one core, and is
tested on sets of the same seed.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import override

from setpred import AttentionEncoder, DSPNDecoder, HungarianLoss, PooledEncoder, RelationEncoder
from setpred.encoders.base import joined

SIZE, CHANNELS, FEATURES, WIDTH, BATCH, TESTED = 8, 2, 64, 64, 32, 1000


class Cutting(PooledEncoder):
    """One whose rows are times the mask, so that absent elements do not count."""

    @override
    def forward(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        x, presence = joined(elements, mask, self.in_channels)
        rows = self._rows(x) * presence
        return self._finished(self.pool(rows.movedim(0, -1)), presence, rows.shape[-1])


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    **{
        f'`PooledEncoder`, `pool="{pool}"`': lambda pool=pool: PooledEncoder(CHANNELS, FEATURES, WIDTH, pool=pool)
        for pool in ("fspool", "sum", "max")
    },
    "`PooledEncoder`, rows times the mask": lambda: Cutting(CHANNELS, FEATURES, WIDTH),
    "`RelationEncoder`": lambda: RelationEncoder(CHANNELS, FEATURES, WIDTH),
    "`AttentionEncoder`": lambda: AttentionEncoder(CHANNELS, FEATURES, WIDTH),
    "`AttentionEncoder`, `inducing_points=4`": lambda: AttentionEncoder(CHANNELS, FEATURES, WIDTH, inducing_points=4),
    '`AttentionEncoder`, `pool="attention"`': lambda: AttentionEncoder(CHANNELS, FEATURES, WIDTH, pool="attention"),
}


def sets(count: int) -> tuple[Tensor, Tensor]:
    """Draw sets (B, N, C) and their masks."""
    mask = torch.arange(SIZE) < torch.randint(1, SIZE + 1, (count, 1))
    return torch.rand(count, SIZE, CHANNELS) * mask.unsqueeze(-1), mask


def run(make: Callable[[], nn.Module], lr: float, seed: int, seconds: float) -> tuple[float, int]:
    """Train a decoder with such an encoder; return its error on test sets, and the number of training steps."""
    torch.manual_seed(1000)
    tested = sets(TESTED)
    torch.manual_seed(seed)
    encoder, loss = PooledEncoder(CHANNELS, FEATURES, WIDTH), HungarianLoss()
    decoder = DSPNDecoder.recommended(make(), set_size=SIZE, channels=CHANNELS)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr)
    steps, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        elements, mask = sets(BATCH)
        optimizer.zero_grad()
        loss(decoder(encoder(elements, mask)), elements, target_mask=mask).backward()
        optimizer.step()
        steps += 1
    decoder.eval()
    with torch.no_grad():
        elements, mask = tested
        return loss(decoder(encoder(elements, mask)), elements, target_mask=mask).item(), steps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.encoders")
    parser.add_argument("--seconds", type=float, default=30, help="of the processor, a run (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="of Adam, for all (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="0..N-1 (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run(ENCODERS["`AttentionEncoder`"], options.lr, 0, 0.1)  # what PyTorch does but once is not the first row's
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, PyTorch {torch.__version__}, {options.seconds:g} s, ", end="")
    print(f"lr {options.lr:g}\n\n| encoder | error x 1000, by seed | training steps |\n|---|---|---|")
    for name, make in ENCODERS.items():
        found = [run(make, options.lr, seed, options.seconds) for seed in range(options.seeds)]
        errors = ", ".join(f"{1000 * error:.2f}" for error, _ in found)
        print(f"| {name} | {errors} | {sum(steps for _, steps in found) // len(found):,} |", flush=True)


if __name__ == "__main__":
    main()
