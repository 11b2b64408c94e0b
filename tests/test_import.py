"""What `import setpred` brings with it."""

import subprocess
import sys

EXTRAS = ["sklearn", "matplotlib", "tqdm", "accelerate", "onnx", "onnxscript", "onnxruntime", "torch_linear_assignment"]
EXTRAS += ["lightning", "transformers", "huggingface_hub", "hypothesis", "pytest", "ot", "geomloss", "pycocotools"]

PROGRAM = """
import sys, torch, numpy, scipy
before = set(sys.modules)
import setpred, setpred.functional, setpred.metrics, setpred.export, setpred.plot
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""


def test_imports_no_extra() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    new = set(ran.stdout.split())
    assert "setpred" in new
    assert not new.intersection(EXTRAS)
