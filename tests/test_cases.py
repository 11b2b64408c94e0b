"""Programs that once showed faults find none any more, where their folder is there."""

import runpy
from pathlib import Path

import pytest
import torch

CASES = sorted((Path(__file__).parents[2] / "shared/cases").glob("*.py"))


@pytest.mark.skipif(not CASES, reason="shared/cases is not there")
@pytest.mark.filterwarnings("ignore")  # of PyTorch's old quantisation and pruning
@pytest.mark.parametrize("case", CASES, ids=[case.stem for case in CASES])
def test_case(case: Path) -> None:
    torch._dynamo.reset()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(case), run_name="__main__")
    assert not end.value.code
    torch._dynamo.reset()
