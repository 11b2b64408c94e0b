"""One compiled piece of work, in a process of its own: python -m tests.cuda.compiled WORK MODE HOW [--quick].

It compiles at once, says so, and waits until its input is closed; then it measures, while nothing else runs.
"""

import argparse
import json
import sys
import time

import torch

from tests.benchmarks.work import infer
from tests.cuda.measure import measure
from tests.cuda.works import HOW, WORKS, image_step, work_classes

READY = "READY "
RESULT = "RESULT "


def main() -> None:
    """Compile, wait, measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("mode", choices=["unrolled", "implicit", "inference"])
    parser.add_argument("how", choices=HOW)
    parser.add_argument("--device", required=True)
    parser.add_argument("--budget", type=float, required=True, help="seconds of measuring")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.device(arguments.device):
        work = work_classes(arguments.quick)[arguments.work]("implicit" if arguments.mode == "implicit" else "unrolled")
    options = {"backend": "aot_eager"} if arguments.quick else {"mode": arguments.how}
    work.decoder.compile(**options)
    function = infer(work) if arguments.mode == "inference" else work.train
    start = time.perf_counter()
    function()
    compiling = time.perf_counter() - start
    function(), function()  # CUDA graphs are warmed up, then recorded
    # These keep their memory: it is that of the process.
    kept = arguments.how == "reduce-overhead" and arguments.device == "cuda"
    reserved = torch.cuda.max_memory_reserved() / 2**20 if kept else None
    functions = {"work": function}
    if arguments.work == "Clevr" and arguments.mode != "inference":
        for precision in ("fp32", "bf16"):
            functions[precision] = image_step(
                work.decoder, work, bf16=precision == "bf16", quick=arguments.quick, device=arguments.device
            )
            functions[precision]()  # what must be compiled anew is so now
    print(f"{READY}{compiling:.1f}", flush=True)
    sys.stdin.read()
    costs = {name: measure(function, arguments.budget)._asdict() for name, function in functions.items()}
    if reserved is not None:
        costs["work"]["mib"] = reserved
    print(RESULT + json.dumps(costs), flush=True)


if __name__ == "__main__":
    main()
