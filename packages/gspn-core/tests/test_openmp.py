"""One OpenMP runtime runs in a process: torch's, which our extension shares."""

import re
import subprocess
import sys

import pytest
from operator_cases import EXTENSION

PROGRAM = """
import torch
from gspn_core import propagate

torch.set_num_threads(2)
x, logits = torch.randn(4, 16, 64, 64), torch.randn(4, 4, 1, 3, 64, 64)
propagate(x, logits)
torch.randn(512, 512) @ torch.randn(512, 512)
print(open("/proc/self/maps").read())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_is_loaded():
    info = EXTENSION.build_info()
    if not info["compiler"].startswith("GNU") or info["openmp"] is None:
        pytest.skip(f"the extension was built by {info['compiler']}, whose OpenMP runtime is not that of torch")
    command = [sys.executable, "-c", PROGRAM]
    maps = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    runtimes = set(re.findall(r"/\S*/lib[gi]?omp\d?(?:-\w+)?\.so\S*", maps))
    assert len(runtimes) == 1, runtimes
