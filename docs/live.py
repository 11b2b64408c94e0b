"""The networks of the page "Live", as ONNX models, and the runtime that runs them there.

Two autoencoders of sets of 1 to 8 points in the plane: an encoder with the recommended decoder, and an encoder with an
MLP. Their weights are in docs/live.pt; in the page, a step of the descent is a graph, so that each can be looked at and
more can follow.

    python docs/live.py            # writes what the page loads into docs/_static/live
    python docs/live.py --train    # trains anew, writes docs/live.pt: about 4 minutes on one core
"""

import argparse
import gzip
import hashlib
import subprocess
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setpred import DSPNDecoder, HungarianLoss, MLPDecoder, PooledEncoder
from setpred.export import to_onnx
from setpred.functional import Gradient, StepRule

HERE = Path(__file__).parent
WEIGHTS, FOLDER = HERE / "live.pt", HERE / "_static" / "live"
RUNTIME = "onnxruntime-web@1.30.0"
SHA256 = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
POINTS, LATENT, HIDDEN = 8, 64, 64
STEPS = {"dspn": 2500, "mlp": 40000}  # the MLP for more than twice the time


class Autoencoder(nn.Module):
    """Points, through a vector and back."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.encoder = PooledEncoder(2, LATENT, HIDDEN)
        self.decoder: nn.Module = (
            DSPNDecoder.recommended(self.encoder, set_size=POINTS, channels=2)
            if name == "dspn"
            else MLPDecoder(LATENT, POINTS, 2, 2 * HIDDEN)
        )

    def forward(self, elements: Tensor, mask: Tensor) -> Any:
        """Encode and decode."""
        return self.decoder(self.encoder(elements, mask))


def sample(count: int) -> tuple[Tensor, Tensor]:
    """Sets of 1 to 8 points, anywhere in the square from -1 to 1."""
    mask = (torch.arange(POINTS) < torch.randint(1, POINTS + 1, (count, 1))).float()
    return (2 * torch.rand(count, POINTS, 2) - 1) * mask.unsqueeze(2), mask


def train() -> dict[str, Any]:
    """Train both, and measure them on sets that they have not seen."""
    loss, result = HungarianLoss(), {}
    for name, steps in STEPS.items():
        torch.manual_seed(0)
        model, start = Autoencoder(name), time.process_time()
        optimizer = torch.optim.Adam(model.parameters(), 0.005)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            points, mask = sample(64)
            elements, presence, _ = model(points, mask)
            value = loss(elements, points, presence, mask)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
        seconds = time.process_time() - start
        torch.manual_seed(1)
        points, mask = sample(2000)
        with torch.inference_mode():
            elements, presence, _ = model.eval()(points, mask)
        there = presence > 0.5
        right = there.sum(1) == mask.sum(1)
        far = elements.masked_fill(~there.unsqueeze(2), 1e3)  # matched with nothing
        square = 2 * HungarianLoss("mse", presence="none")(far[right], points[right], target_mask=mask[right])
        print(
            f"{name}: {steps} steps, {seconds:.0f} s of processor time; 2,000 new sets: loss "
            f"{loss(elements, points, presence, mask):.6f}, number right in {right.float().mean():.1%}, "
            f"there points off by {square.sqrt():.4f} (root of the mean square)",
            flush=True,
        )
        result[name] = model.state_dict()
    return result


class Resumed:
    """A rule of steps that begins in a given state and keeps its last, so that a descent can be taken apart."""

    def __init__(self, rule: StepRule, state: Any) -> None:
        self.rule, self.state = rule, state

    def init(self, y: tuple[Tensor, ...]) -> Any:
        """The given state."""
        return self.state

    def step(self, y: tuple[Tensor, ...], gradient: Gradient, state: Any) -> tuple[tuple[Tensor, ...], Any]:
        """The rule's step."""
        y, self.state = self.rule.step(y, gradient, state)
        return y, self.state


class Step(nn.Module):
    """One step of a decoder's descent: from a set, the velocities that led there and a vector, to the next ones."""

    def __init__(self, decoder: DSPNDecoder) -> None:
        super().__init__()
        self.decoder, self.rule = decoder, decoder.lr

    def forward(
        self, elements: Tensor, mask: Tensor, velocity: Tensor, mask_velocity: Tensor, z: Tensor
    ) -> dict[str, Tensor]:
        """Take one step; the loss is that of the set before it."""
        resumed = Resumed(self.rule, (velocity, mask_velocity))
        self.decoder.lr = resumed
        elements, mask, steps = self.decoder(z, iters=1, init=(elements, mask), record=True)
        velocity, mask_velocity = resumed.state
        return {
            "next_elements": elements,
            "next_mask": mask,
            "next_velocity": velocity,
            "next_mask_velocity": mask_velocity,
            "loss": steps.repr_loss[0],
        }


def load(name: str) -> Autoencoder:
    """Load a trained autoencoder, in float64: in float32, rounding decides ranks in the pool, and steps part ways.

    PyTorch's exporter rounds the numbers in the code to float32, whatever they are multiplied with; so they are here.
    """
    model = Autoencoder(name)
    model.load_state_dict(torch.load(WEIGHTS, weights_only=True)[name])
    model = model.eval().double()
    divisor = rounded(model.encoder._divisor(POINTS, POINTS))
    model.encoder._divisor = lambda size, rows: divisor
    if isinstance(model.decoder, DSPNDecoder):
        model.decoder.lr = replace(model.decoder.lr, momentum=rounded(model.decoder.lr.momentum))
    return model


def rounded(number: float) -> float:
    """The nearest float32."""
    return torch.tensor(number, dtype=torch.float32).item()


def export(folder: Path = FOLDER) -> None:
    """Write encoder.onnx, step.onnx and mlp.onnx."""
    dspn, mlp = load("dspn"), load("mlp")
    elements, mask, z = torch.zeros(1, POINTS, 2), torch.ones(1, POINTS), torch.zeros(1, LATENT)
    for name, model, example in (
        ("encoder", dspn.encoder, (elements, mask)),
        ("mlp", mlp, (elements, mask)),
        ("step", Step(dspn.decoder).eval(), (elements, mask, elements, mask, z)),
    ):
        to_onnx(model, tuple(x.double() for x in example), folder / f"{name}.onnx")


def fetch_runtime(folder: Path = FOLDER) -> None:
    """Put ONNX Runtime Web there, from the npm registry or npm's cache; without them, say so and leave it out."""
    with tempfile.TemporaryDirectory() as work:
        pack = ["npm", "pack", "--prefer-offline", "--fetch-retries=0", f"--pack-destination={work}", RUNTIME]
        try:
            subprocess.run(pack, check=True, capture_output=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"live: {RUNTIME} is not to be had, the page will show the animation instead: {error}")
            return
        with tarfile.open(next(Path(work).glob("*.tgz"))) as package:
            contents = {name: package.extractfile(f"package/dist/{name}").read() for name in SHA256}
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != SHA256[name]:
            raise RuntimeError(f"{RUNTIME}: {name} is not the file whose SHA-256 is in docs/live.py")
        # A quarter of the size; the page unpacks it. Servers that pack by themselves often leave WebAssembly alone.
        packed = name.endswith(".wasm")
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content, mtime=0) if packed else content)


def render(folder: Path = FOLDER, *, only_if_older: bool = False) -> None:
    """Write what the page loads beside live.js."""
    exported = folder / "step.onnx"  # the last that is written
    changed = max(path.stat().st_mtime for path in (Path(__file__), WEIGHTS))
    if not (only_if_older and exported.exists() and exported.stat().st_mtime > changed):
        export(folder)
    if not all(list(folder.glob(f"{name}*")) for name in SHA256):
        fetch_runtime(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true", help="train anew")
    if parser.parse_args().train:
        torch.set_num_threads(1)
        torch.save(train(), WEIGHTS)
    render()
