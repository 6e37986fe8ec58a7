"""Learning rates, averages, and what updates report, against plain formulas."""

import math
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from gspn_core.runs.errors import NonFiniteLossError, explaining_memory
from gspn_core.runs.training import (
    LearningRate,
    Meter,
    Termination,
    averaged,
    check_same_run,
    check_steps,
    loader_workers,
    make_accelerator,
    use_cpu,
)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "poly", "tanh"])
def test_learning_rates(schedule):
    rate = LearningRate(0.5, 0.1, schedule, 12, 4)
    assert [rate.at(step) for step in range(4)] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    rest = [rate.at(step) for step in range(4, 13)]
    assert rest[0] == pytest.approx(0.5, rel=1e-3)
    assert rest == sorted(rest, reverse=True)
    assert rest[-1] == pytest.approx(0.5 if schedule == "constant" else 0.1, abs=2e-3)
    half = {"cosine": 0.3, "linear": 0.3, "constant": 0.5, "poly": 0.1 + 0.4 * math.sqrt(0.5)}
    if schedule in half:
        assert rate.at(8) == pytest.approx(half[schedule])
    assert LearningRate(0.5, 0.1, schedule, 12, 0).at(0) == pytest.approx(0.5, rel=1e-3)


def test_groups_scale_the_learning_rate():
    one, two = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [one]}, {"params": [two], "lr_scale": 0.25}], lr=1.0)
    LearningRate(0.8, 0.0, "constant", 10, 0).set(optimizer, 3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize("warmup", [False, True])
def test_averages(warmup):
    """Parameters and running statistics; counters are copied."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    mean = averaged(model, 0.9, warmup=warmup)
    assert not mean.module.training and not any(p.requires_grad for p in mean.module.parameters())
    expected = {name: value.clone().double() for name, value in model.state_dict().items()}
    for count in range(1, 8):
        model(torch.randn(5, 2))
        with torch.no_grad():
            model[0].weight.add_(torch.randn(3, 2))
        mean.update_parameters(model)
        decay = min(0.9, (1 + count) / (10 + count)) if warmup else 0.9
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    assert int(mean.n_averaged) == 8
    for name, value in mean.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert mean.module[1].num_batches_tracked == model[1].num_batches_tracked == 7


def test_an_average_continues():
    model = nn.Linear(2, 2)
    mean, other = (averaged(model, 0.9, warmup=True) for _ in range(2))

    def update(average, seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            model.weight.normal_()
        average.update_parameters(model)

    for seed in range(3):
        update(mean, seed)
    other.module.load_state_dict(mean.module.state_dict())
    other.n_averaged.fill_(int(mean.n_averaged))
    update(mean, 3)
    update(other, 3)
    assert torch.equal(mean.module.weight, other.module.weight)


def test_what_updates_report(tmp_path):
    accelerator, rate = Accelerator(cpu=True), LearningRate(0.5, 0.1, "constant", 10, 0)
    meter = Meter(accelerator, ["loss", "norm"], 8, [[4.0, 1.0]])
    meter.add(torch.tensor([2.0, 3.0]))
    rows = meter.collect(2, rate, None)
    assert rows == [[4.0, 1.0], [2.0, 3.0]] == meter.collect(2, rate, None)
    assert meter.loss == 2.0 and meter.images_per_second > 0
    assert meter.take(rows) == {"loss": 3.0, "norm": 2.0}
    assert meter.collect(2, rate, None) == []
    for value in (1.0, math.inf, 1.0):
        meter.add(torch.tensor([value, 0.0]))
    message = r"the loss is inf at step 4 with learning rate 0\.5; last good checkpoint: .*step-2"
    with pytest.raises(NonFiniteLossError, match=message):
        meter.collect(5, rate, tmp_path / "step-2")


def test_another_run(tmp_path):
    before = {"lr": 1.0, "workers": 1, "the classes": ["a"]}
    check_same_run(tmp_path, before, {**before, "workers": 2, "new option": 3})
    with pytest.raises(ValueError, match=r"lr must be 1.0 to continue the run in .*, got 2.0; give another folder"):
        check_same_run(tmp_path, before, {**before, "lr": 2.0})
    with pytest.raises(ValueError, match="holds a run of another command or version, which had lr; give"):
        check_same_run(tmp_path, before, {"the classes": before["the classes"]})
    with pytest.raises(ValueError, match=r"the classes must be \['a'\] to continue"):
        check_same_run(tmp_path, before, {**before, "the classes": ["b"]})


def test_device_precision_and_loaders():
    assert use_cpu("cpu") and use_cpu("auto") is not torch.accelerator.is_available()
    with pytest.raises(ValueError, match="precision must be fp32 or bf16 on the CPU, got fp16"):
        make_accelerator("cpu", "fp16")
    assert make_accelerator("cpu", "fp32").device.type == "cpu"
    assert loader_workers(0) == 0 and loader_workers(1) == 1 and loader_workers(10_000) < 10_000


@pytest.mark.parametrize(
    "error", [MemoryError("all gone"), RuntimeError("can't allocate memory: 9 bytes"), torch.OutOfMemoryError("CUDA")]
)
def test_out_of_memory_says_what_saves_some(error):
    savers = {"--batch-size 1": True, "--compile": False}
    message = r"out of memory; what saves some: --batch-size 1 \((all|can|CUDA)"
    with pytest.raises(MemoryError, match=message), explaining_memory(savers):
        raise error
    with pytest.raises(MemoryError, match="what saves some: a smaller image_size"), explaining_memory({}):
        raise error
    with pytest.raises(RuntimeError, match="another"), explaining_memory({}):
        raise RuntimeError("another")


def test_fewer_steps_than_a_run_has_done(tmp_path):
    check_steps(tmp_path, 5, 5)
    with pytest.raises(ValueError, match=r"steps must be at least the 5 updates that the run in .* has done, got 4"):
        check_steps(tmp_path, 5, 4)


@pytest.mark.parametrize(
    "number,message,status",
    [(signal.SIGTERM, "terminated after 2 updates, which", 143), (signal.SIGINT, "interrupted after 2 updates", 130)],
)
def test_termination_is_noted_once_and_undone(number, message, status):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with Termination(make_accelerator("cpu")) as termination:
        assert not termination.asked(1)
        signal.raise_signal(number)
        assert termination.asked(2)
        error = termination.error(2)
        assert isinstance(error, KeyboardInterrupt) and str(error).startswith(message) and error.status == status
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one ends the process
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert before == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]


LOADING = """
import os, signal, subprocess, sys, time
from torch.utils.data import DataLoader
from gspn_core.runs.training import leave_signals

loader = iter(DataLoader(range(100), num_workers=1, worker_init_fn=leave_signals))
next(loader)
pid = loader._workers[0].pid
for name in ("INT", "TERM", "TERM"):
    subprocess.run(["kill", f"-{name}", str(pid)], check=True)  # by another process than this
    time.sleep(0.5)
    next(loader)
print(pid)
"""


def test_a_loaders_process_outlives_a_signal_and_not_the_run():
    done = subprocess.run([sys.executable, "-c", LOADING], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


FAILING = """
from torch.utils.data import DataLoader
from gspn_core.runs.training import leave_signals, loader_workers

class Data:
    def __len__(self):
        return 100

    def __getitem__(self, index):
        if index == WHERE:
            raise LookupError("no such image")
        return index

workers = loader_workers(1)
loader = iter(DataLoader(Data(), num_workers=workers, worker_init_fn=leave_signals, persistent_workers=True))
print(loader._workers[0].pid, flush=True)
while True:
    if next(loader) == 10:
        raise RuntimeError("the update fails")
"""


@pytest.mark.parametrize("where", [3, -1])
def test_an_error_does_not_leave_the_run_waiting_for_its_loader(where):
    """Whether it is raised where data are loaded, or by the main process."""
    code = FAILING.replace("WHERE", str(where))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "killed" not in done.stderr
    assert ("no such image" if where == 3 else "the update fails") in done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_termination_outside_the_main_thread_is_left_alone():
    seen = []

    def run():
        with Termination(make_accelerator("cpu")) as termination:
            seen.append(termination.asked(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]


def test_tf32_is_switched_on_and_not_off():
    before = torch.get_float32_matmul_precision()
    try:
        make_accelerator("cpu")
        assert torch.get_float32_matmul_precision() == before
        make_accelerator("cpu", tf32=True)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_models_are_refused(variable, monkeypatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"{variable} must not be set: several processes train with"):
        make_accelerator("cpu")
