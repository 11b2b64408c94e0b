"""Two commits beside each other: python -m tests.benchmarks --against COMMIT [--only TEXT] [--threshold RATIO].

Each commit has a process of its own; both do the same piece of work in turn, round after round, so that whatever slows
the machine slows both. A ratio is the time of the checkout, as it is on disk, over that of COMMIT: below 1 is faster.
The exit status is 1 if the median of any is above the threshold.

The works use no more of the library than what has long been there; what COMMIT cannot do shows as "-".
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Function = Callable[[], object]
ROOT = Path(__file__).parents[2]
ROUNDS = 15


def works() -> dict[str, Callable[[], Function]]:
    """Makers of what is timed, by name."""
    import torch

    import setpred
    from setpred import DSPNDecoder, PooledEncoder, RelationEncoder

    def decoding(encoder: torch.nn.Module, batch: int, size: int, channels: int, mode: str) -> Function:
        differentiate = "implicit" if mode == "implicit" else "unrolled"
        decoder = DSPNDecoder(encoder, 10, 1.0, set_size=size, channels=channels, differentiate=differentiate)
        z = torch.randn(batch, encoder.out_channels, requires_grad=True)

        def train() -> None:
            decoder(z, record=False).elements.square().sum().backward()

        def infer() -> None:
            with torch.no_grad():
                decoder.eval()(z)

        return infer if mode == "inference" else train

    def loss(name: str, rows: int) -> Function:
        module = getattr(setpred, name)()
        pred, target = torch.rand(32, rows, 18, requires_grad=True), torch.rand(32, rows, 18)
        return lambda: module(pred, target).backward()

    makers: dict[str, Callable[[], Function]] = {}
    for mode in ("unrolled", "implicit", "inference"):
        makers |= {
            f"small sets, 32 x 5 x 4: {mode}": lambda mode=mode: decoding(PooledEncoder(4, 256, 128), 32, 5, 4, mode),
            f"digits, 32 x 32 x 2: {mode}": lambda mode=mode: decoding(PooledEncoder(2, 128, 128), 32, 32, 2, mode),
            f"CLEVR, 32 x 10 x 18: {mode}": lambda mode=mode: decoding(RelationEncoder(18, 512, 512), 32, 10, 18, mode),
            f"MNIST, 32 x 342 x 2: {mode}": lambda mode=mode: decoding(PooledEncoder(2, 64, 256), 32, 342, 2, mode),
        }
    for name, rows in (("HungarianLoss", 10), ("ChamferLoss", 300), ("SinkhornLoss", 100)):
        makers[f"{name}, 32 x {rows} x 18"] = lambda name=name, rows=rows: loss(name, rows)
    return makers


def serve(root: str) -> None:
    """Do what standard input names, and answer with the seconds, or with an error: for the library in a folder."""
    sys.path.insert(0, root)
    import torch

    import setpred

    if not Path(setpred.__file__).is_relative_to(root):
        raise SystemExit(f"setpred comes from {setpred.__file__}, not from {root}")
    torch.manual_seed(0)
    made: dict[str, Function] = {}
    makers = works()
    for line in sys.stdin:
        name = line.rstrip("\n")
        try:
            if name not in made:
                made[name] = makers[name]()
                made[name]()
            start = time.perf_counter()
            made[name]()
            print(time.perf_counter() - start, flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)


class Server:
    """A process that does pieces of work with the library in a folder."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, "-P", __file__, str(root)]
        self.process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def time(self, name: str) -> float:
        """Seconds of a piece of work."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        try:
            return float(answer)
        except ValueError:
            raise RuntimeError(answer or "the process has ended") from None

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """The files of a commit in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], stdout=subprocess.PIPE, check=False)
        if archive.returncode != 0:
            raise SystemExit(f"git knows no commit {commit!r}")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder).resolve()


def compare(commit: str, only: str = "", threshold: float = 1.1, rounds: int = ROUNDS) -> int:
    """Print a table of ratios; return 1 if one is above the threshold, else 0."""
    import numpy as np

    names = [name for name in works() if only.lower() in name.lower()]
    if not names:
        raise SystemExit(f"no work has {only!r} in its name: {', '.join(works())}")
    worst = 0.0
    print(f"| work | ms | {commit}, ms | ratio (10 % to 90 %) |\n|---|---|---|---|")
    with checkout(commit) as before:
        servers = Server(ROOT), Server(before)
        try:
            for name in names:
                try:
                    times = np.array([[server.time(name) for server in servers] for _ in range(rounds)])
                except RuntimeError as error:
                    print(f"| {name} | - | - | {error} |", flush=True)
                    continue
                low, middle, high = np.quantile(times[:, 0] / times[:, 1], [0.1, 0.5, 0.9])
                now, then = 1e3 * np.median(times, 0)
                print(f"| {name} | {now:.4g} | {then:.4g} | {middle:.2f} ({low:.2f} to {high:.2f}) |", flush=True)
                worst = max(worst, middle)
        finally:
            for server in servers:
                server.close()
    print(f"\nlargest ratio {worst:.2f}, threshold {threshold:g}; {os.cpu_count()} cores, {rounds} rounds")
    return int(worst > threshold)


if __name__ == "__main__":
    serve(sys.argv[1])
