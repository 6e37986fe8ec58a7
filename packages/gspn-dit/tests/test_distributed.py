"""Two processes on a CPU train as one does with twice the batch."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from dit_cases import tiny_run
from safetensors.torch import load_file

from gspn_core.runs import checkpoints
from gspn_core.runs.logs import read_table
from gspn_core.runs.options import make
from gspn_dit import checkpoint, train
from gspn_dit.config import TrainConfig


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    shape = {"hidden_size": 16, "num_layers": 2, "proxy_channels": 4, "drop_path_rate": 0.0}
    options = tiny_run("", model_kwargs=shape, sample_count=2)
    train.train(make(TrainConfig, options | {"out": str(tmp_path / "one")}))
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(options | {"out": str(tmp_path / "two"), "batch_size": 4}))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "gspn_dit.cli", "train", "--config", str(file), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"steps": 6') == 1
    folders = [checkpoint.locate(tmp_path / name) for name in ("one", "two")]
    states = [checkpoints.read_state(folder, checkpoint.FORMAT) for folder in folders]
    assert [state["processes"] for state in states] == [1, 2]
    one, two = (load_file(folder / checkpoint.WEIGHTS["ema"]) for folder in folders)
    # AdamW turns rounding into sign where a gradient is near zero: a few weights differ by up to a step.
    differences = torch.cat([(one[key] - two[key]).abs().flatten() for key in one])
    assert differences.mean() < 2e-6
    first, second = (read_table(tmp_path / name / "train.csv") for name in ("one", "two"))
    assert [row["step"] for row in first] == [row["step"] for row in second] == ["2", "4", "6"]
    for ours, theirs in zip(first, second, strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-4)
