"""Part d: how many scenes are rendered a second."""

import torch

from tests.cuda.measure import measure
from tests.cuda.part import Options, main, row

WANTED = 5000  # of 128 x 128


def run(options: Options) -> None:
    """Render batches of several sizes: what a data set is made in, what a training step takes."""
    from common.scenes import render_scenes  # the folder of the examples is on the path of every part

    pixels = 32 if options.quick else 128
    for batch in (2,) if options.quick else (1024, 100, 32):
        generator = torch.Generator(options.device).manual_seed(0)

        def render(batch: int = batch, generator: torch.Generator = generator) -> None:
            render_scenes(batch, size=pixels, generator=generator)

        cost = measure(render, 0.02 if options.quick else 3)
        rate = 1e3 * batch / cost.ms[1]
        row(
            f"scenes of {pixels} x {pixels}, {batch} at once",
            f"{rate:.4g} a second",
            beside="" if options.quick else f"wanted: {WANTED}",
            note=f"{cost}" + (f", {cost.memory}" if cost.memory else ""),
            rate=rate,
            ms=cost.ms,
            mib=cost.mib,
        )


if __name__ == "__main__":
    main(run)
