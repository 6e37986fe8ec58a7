"""Two processes on a CPU."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from vision_cases import tiny_run

from gspn_core.runs.logs import read_table
from gspn_core.runs.options import make
from gspn_vision import checkpoint
from gspn_vision.config import TrainConfig
from gspn_vision.train import Trainer, train


def run_two(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "gspn_vision.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def runs(training_folder, tmp_path_factory):
    """The same training by one process, and by two with half the batch each."""
    folder = tmp_path_factory.mktemp("runs")
    options = tiny_run(training_folder) | {"mixup": 0, "cutmix": 0, "drop_rate": 0, "drop_path_rate": 0}
    options |= {"optimizer": "sgd", "lr": 1e-3, "checkpoint_every": 3, "log_every": 1}
    train(make(TrainConfig, {**options, "out": str(folder / "one")}))
    file = folder / "two.yaml"
    file.write_text(yaml.safe_dump({**options, "batch_size": 6, "out": str(folder / "two")}))
    done = run_two(["train", "--config", str(file), "--json"])
    assert done.returncode == 0, done.stderr
    return folder / "one", folder / "two", done


def test_two_processes_equal_one_with_twice_the_batch(runs):
    one, two = (checkpoint.locate(run, "latest") for run in runs[:2])
    states = [checkpoint.read_state(path) for path in (one, two)]
    assert [state["processes"] for state in states] == [1, 2]
    assert [state["step"] for state in states] == [8, 8]
    start = Trainer(make(TrainConfig, {**states[0]["config"], "out": str(runs[0] / "unused")})).bare_model.state_dict()
    for stem in ("model", "ema"):
        weights = [load_file(path / f"{stem}.safetensors") for path in (one, two)]
        # Rounding differs with the order of sums, and training amplifies it; the weights move by 500 times as much.
        torch.testing.assert_close(*weights, rtol=0, atol=2e-6)
        assert max((weights[0][key] - start[key]).abs().max() for key in start) > 1e-3


def test_results_are_written_once_and_for_all_processes(runs):
    one, two, done = runs
    for table in ("train.csv", "validation.csv"):
        rows = [read_table(run / table) for run in (one, two)]
        assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    # The training losses are means over all processes, and each validation image counts once.
    losses = [[float(row["loss"]) for row in read_table(run / "train.csv")] for run in (one, two)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    last = [read_table(run / "validation.csv")[-1] for run in (one, two)]
    assert float(last[0]["loss"]) == pytest.approx(float(last[1]["loss"]), rel=1e-4)
    assert done.stdout.count('"steps": 8') == 1


def test_validation_by_two_processes(runs, tmp_path):
    csv = tmp_path / "predictions.csv"
    command = ["validate", "--checkpoint", str(runs[0]), "--device", "cpu", "--batch-size", "7", "--out", str(csv)]
    done = run_two(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("48 images") == 1
    names = [line.split(",")[0] for line in csv.read_text().splitlines()[1:]]
    assert len(names) == 48
    assert names == sorted(names, key=lambda name: names.index(name))
    assert len(set(names)) == 48


def test_accelerate_launches_it_too(training_folder, tmp_path):
    """One process: on CPUs `accelerate launch` starts several through MPI alone, torchrun through gloo (above)."""
    file = tmp_path / "options.yaml"
    options = tiny_run(training_folder) | {"epochs": 1, "warmup_epochs": 0}
    file.write_text(yaml.safe_dump({**options, "out": str(tmp_path / "run")}))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "gspn_vision.cli"]
    command = [*launch, "train", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    state = checkpoint.read_state(checkpoint.locate(tmp_path / "run", "latest"))
    assert (state["processes"], state["step"]) == (1, 4)
