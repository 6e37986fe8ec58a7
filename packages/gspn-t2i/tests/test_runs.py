"""Runs of a distillation that are interrupted, continued, run in two processes, or fail."""

import json
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from t2i_cases import distill_config as config
from t2i_cases import distill_options as options
from t2i_cases import environment, in_two_processes, interrupt, program

from gspn_core.runs import checkpoints, files
from gspn_core.runs.errors import NonFiniteLossError
from gspn_core.runs.files import locked, read_tensors, write_tensors
from gspn_core.runs.logs import read_table
from gspn_t2i import cli
from gspn_t2i import distill as module
from gspn_t2i.conditions import Frozen
from gspn_t2i.distill import FORMAT, Distiller, distill
from gspn_t2i.objective import Objective
from gspn_t2i.student import AVERAGED, WEIGHTS


@pytest.fixture(scope="module")
def whole(sd15, digits, tmp_path_factory):
    """The folder of a run left alone."""
    out = tmp_path_factory.mktemp("run") / "whole"
    distill(config(sd15, digits, out))
    return out


def write_options(path, *places, **changes):
    path.write_text(yaml.safe_dump(options(*places, **changes)))
    return path


def assert_same_run(run, other, rows=3):
    """The newest checkpoints are equal, and the last rows of the logs."""
    folders = [checkpoints.latest(folder / "checkpoints") for folder in (run, other)]
    for name in (WEIGHTS, AVERAGED, checkpoints.OPTIMIZER):
        ours, theirs = (read_tensors(folder / name) for folder in folders)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), (name, key)
    states = [checkpoints.read_state(folder, FORMAT) for folder in folders]
    assert states[0].keys() == states[1].keys()
    assert all(states[0][key] == states[1][key] for key in ("step", "averaged", "optimizer", "pending", "data"))
    tables = [[row | {"images_per_second": ""} for row in read_table(folder / "train.csv")] for folder in (run, other)]
    assert tables[0][-1] == tables[1][-1] and len(tables[1]) == 3
    assert rows < 3 or tables[0] == tables[1]


def test_continued_after_sigkill(whole, sd15, digits, tmp_path):
    """Killed at a moment that comes as it comes, also while a checkpoint is written."""
    file = write_options(
        tmp_path / "options.yaml", sd15, digits, tmp_path / "run", checkpoint_every=1, keep_checkpoints=1
    )
    command = program("distill", "--config", file)
    status, _ = interrupt(command, lambda: bool(read_table(tmp_path / "run" / "train.csv")), signal.SIGKILL)
    assert status == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(sd15, digits, tmp_path, number):
    """The run is saved, also where processes load data; one line and 128 plus the signal's number."""
    changes = {"steps": 100_000, "checkpoint_every": 100_000, "log_every": 1, "workers": 2}
    file = write_options(tmp_path / "options.yaml", sd15, digits, tmp_path / "run", **changes)
    status, errors = interrupt(
        program("distill", "--config", file), lambda: len(read_table(tmp_path / "run" / "train.csv")) > 1, number
    )
    step = Distiller(config(sd15, digits, tmp_path / "run", **changes)).step
    what = "interrupted" if number == signal.SIGINT else "terminated"
    line = f"gspn-t2i: {what} after {step} updates, which are saved; run the same command again to continue"
    assert (status, errors.splitlines()[-1]) == (128 + number, line)
    assert step > 0 and "Traceback" not in errors


def test_a_run_is_extended_where_all_has_moved(sd15, digits, tmp_path, capsys):
    """To the weights of the longer run, of which nothing is repeated; other content is refused, and fewer steps."""
    changes = {"lr_schedule": "constant"}
    distill(config(sd15, digits, tmp_path / "whole", **changes))
    distill(config(sd15, digits, tmp_path / "run", **changes, steps=3))
    pipeline, data = shutil.copytree(sd15, tmp_path / "pipeline"), shutil.copytree(digits, tmp_path / "data")
    assert capsys.readouterr().err.count("updates of") == 0
    distill(config(pipeline, data, tmp_path / "run", **changes, progress=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole", rows=2)
    told = capsys.readouterr().err
    assert f"40 images from {data}; 6 updates of 4 images, from update 3 on; to {tmp_path / 'run'}" in told
    with pytest.raises(ValueError, match=r"steps must be at least the 6 updates that the run in .* has done, got 5"):
        Distiller(config(pipeline, data, tmp_path / "run", **changes, steps=5))
    file = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    weights = read_tensors(file)
    weights["quant_conv.bias"] += 1
    write_tensors(file, weights)
    with pytest.raises(ValueError, match=r"the pipeline \(SHA-256\) must be '\w+' to continue the run in .*"):
        Distiller(config(pipeline, data, tmp_path / "run", **changes, steps=7))
    (data / "3.png").write_bytes((data / "4.png").read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"the data \(SHA-256\) must be '\w+' to continue the run in .*"):
        Distiller(config(sd15, data, tmp_path / "run", **changes, steps=7))


def test_a_trial_of_a_few_updates_warms_up_for_a_tenth(sd15, digits, tmp_path):
    run = Distiller(config(sd15, digits, tmp_path / "run", steps=20, warmup_steps=1_000, betas=[0.8, 0.95]))
    assert run.lr.warmup_steps == 2
    assert run.optimizer.param_groups[0]["betas"] == (0.8, 0.95)


def test_a_folder_that_another_process_writes(sd15, digits, tmp_path, capsys):
    file = write_options(tmp_path / "options.yaml", sd15, digits, tmp_path / "run")
    with locked(tmp_path / "run"):
        assert cli.main(["distill", "--config", str(file)]) == 2
    assert "is being written by process" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_adam_in_8_bits(sd15, digits, tmp_path, monkeypatch):
    """Through bitsandbytes, here one whose moments have 32 bits."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="use_8bit_adam needs bitsandbytes: pip install bitsandbytes"):
        Distiller(config(sd15, digits, tmp_path / "run", use_8bit_adam=True))

    class AdamW8bit(torch.optim.AdamW):
        def state_dict(self):  # as the real one hides its moments
            state = super().state_dict()
            return state | {"state": {key: {"hidden": value} for key, value in state["state"].items()}}

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=AdamW8bit))
    changes = {"use_8bit_adam": True, "lr_schedule": "constant"}
    distill(config(sd15, digits, tmp_path / "run", **changes, steps=3))
    distill(config(sd15, digits, tmp_path / "run", **changes))
    distill(config(sd15, digits, tmp_path / "whole", **changes))
    assert_same_run(tmp_path / "run", tmp_path / "whole", rows=2)


def test_two_processes_equal_one_with_twice_the_batch(sdxl, digits, tmp_path):
    distill(config(sdxl, digits, tmp_path / "one"))
    file = write_options(tmp_path / "options.yaml", sdxl, digits, tmp_path / "two", batch_size=2)
    done = in_two_processes("-m", "gspn_t2i.cli", "distill", "--config", file, "--json")
    assert json.loads(done.stdout)["steps"] == 6
    one, two = (read_tensors(checkpoints.latest(tmp_path / name / "checkpoints") / AVERAGED) for name in ("one", "two"))
    # AdamW turns rounding into sign where a gradient is near zero: a few weights differ by up to a step.
    differences = torch.cat([(one[key] - two[key]).abs().flatten() for key in one])
    assert differences.mean() < 2e-5
    tables = (read_table(tmp_path / name / "train.csv") for name in ("one", "two"))
    for ours, theirs in zip(*tables, strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-3)


@pytest.fixture
def another_precision():
    """accelerate does not let the precision change within a process, unless it forgets the last one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_bfloat16(whole, sd15, digits, tmp_path, another_precision):
    changes = {"precision": "bf16", "sample_every": 6, "sample_prompts": ["a one"], "sampler_steps": 1}
    distill(config(sd15, digits, tmp_path / "run", **changes))
    weights = read_tensors(checkpoints.latest(tmp_path / "run" / "checkpoints") / WEIGHTS)
    assert all(value.dtype == torch.float32 for value in weights.values())
    for ours, theirs in zip(*(read_table(run / "train.csv") for run in (whole, tmp_path / "run")), strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=0.02)


def test_the_loss_scale_of_float16_is_continued(sd15, digits, tmp_path, monkeypatch):
    """With the scaler of an accelerator on the CPU: powers of two change nothing."""
    make = module.make_accelerator

    def scaled(*arguments, **options):
        accelerator = make(*arguments, **options)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=4)
        return accelerator

    distill(config(sd15, digits, tmp_path / "plain", clip_grad=None))
    monkeypatch.setattr(module, "make_accelerator", scaled)
    distill(config(sd15, digits, tmp_path / "run", clip_grad=None))
    plain, run = (
        read_tensors(checkpoints.latest(tmp_path / name / "checkpoints") / WEIGHTS) for name in ("plain", "run")
    )
    assert all(torch.allclose(run[key], value, atol=1e-6) for key, value in plain.items())
    restored = Distiller(config(sd15, digits, tmp_path / "run", clip_grad=None)).accelerator.scaler.state_dict()
    assert (restored["scale"], restored["_growth_tracker"]) == (16.0, 2)


def test_as_many_checkpoints_as_asked_for(sd15, digits, tmp_path):
    changes = {"steps": 12, "checkpoint_every": 1, "keep_checkpoints": 4}
    distill(config(sd15, digits, tmp_path / "run", **changes))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir())
    assert names == [f"step-{step:08d}" for step in (9, 10, 11, 12)]


@pytest.mark.parametrize("cached", [False, True])
def test_unreadable_images(sd15, digits, tmp_path, capsys, cached):
    """Stop the run, or are skipped by one that continues it: each is named once."""
    data = shutil.copytree(digits, tmp_path / "data")
    broken = [data / f"{number}.png" for number in (7, 8, 30)]
    for file in broken:
        file.write_bytes(b"no image")
    words = ["--pipeline", sd15, "--data", data, "--out", tmp_path / "run", "--image-size", "32x64", "--steps", 12]
    words += ["--warmup-steps", 0, "--batch-size", 4, "--workers", 0, "--checkpoint-every", 1, "--no-progress"]
    words += ["--no-tensorboard", *(["--cache", tmp_path / "cache"] if cached else [])]
    assert cli.main(["distill", *map(str, words)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("gspn-t2i: error: cannot read image ") and errors.count("\n") == 1
    assert cli.main(["distill", *map(str, words), "--unreadable", "skip"]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert sorted(errors) == sorted(f"skipped: cannot read image {str(file)!r}: not an image" for file in broken)
    if not cached:
        whole = tmp_path / "left-alone"
        words[5] = whole
        assert cli.main(["distill", *map(str, words), "--unreadable", "skip"]) == 0
        ours, theirs = (
            read_tensors(checkpoints.latest(run / "checkpoints") / WEIGHTS) for run in (tmp_path / "run", whole)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_loss_that_is_not_finite_stops_the_run(sd15, digits, tmp_path, monkeypatch):
    call = Objective.__call__

    def spoiled(self, *arguments):
        terms = call(self, *arguments)
        return terms | {"loss": terms["loss"] * torch.nan}

    monkeypatch.setattr(Objective, "__call__", spoiled)
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 1 .* last good checkpoint: none"):
        distill(config(sd15, digits, tmp_path / "run"))


def test_out_of_memory_says_what_helps(sd15, digits, tmp_path, monkeypatch):
    run = Distiller(config(sd15, digits, tmp_path / "run"))

    def fail(loss):
        raise torch.OutOfMemoryError("tried to allocate much")

    advice = "--gradient-checkpointing, --precision bf16, a smaller --batch-size with more --accumulate"
    for cause, said in ((fail, "tried"), (lambda loss: torch.empty(10**16), ".*can't allocate memory")):
        monkeypatch.setattr(run.accelerator, "backward", cause)
        with pytest.raises(MemoryError, match=rf"what saves some: {advice} \({said}"):
            run.run()


def test_a_cache_that_does_not_fit(sd15, digits, tmp_path, monkeypatch, capsys):
    """On the disk, or in memory: status 1 and one line."""
    words = ["distill", "--config", str(write_options(tmp_path / "options.yaml", sd15, digits, tmp_path / "run"))]
    words += ["--cache", str(tmp_path / "cache")]

    def full(*arguments):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        assert cli.main(words) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("gspn-t2i: error: cannot write ") and "No space left" in errors and errors.count("\n") == 1
    monkeypatch.setattr(Frozen, "moments", lambda self, pixels: torch.empty(10**16))
    assert cli.main(words) == 1
    errors = capsys.readouterr().err
    assert "what saves some: --batch-size 1, --precision bf16" in errors and errors.count("\n") == 1


def test_latents_that_are_not_finite_are_not_cached(sd15, digits, tmp_path, monkeypatch):
    moments = Frozen.moments

    def spoiled(self, pixels):
        values = moments(self, pixels)
        values[-1, 0, 0, 0] = torch.inf
        return values

    monkeypatch.setattr(Frozen, "moments", spoiled)
    with pytest.raises(ValueError, match="moments of image 3 are not finite; try another precision"):
        Distiller(config(sd15, digits, tmp_path / "run", cache=str(tmp_path / "cache")))
    assert not list((tmp_path / "cache").glob("shard-*"))


def test_a_full_disk_leaves_the_last_checkpoint(sd15, digits, tmp_path, monkeypatch, capsys):
    store = checkpoints.store_tensors

    def full(path, tensors):
        if "step-00000006" in str(path) and path.name == checkpoints.OPTIMIZER:
            raise OSError(28, "No space left on device")
        store(path, tensors)

    monkeypatch.setattr(checkpoints, "store_tensors", full)
    file = write_options(tmp_path / "options.yaml", sd15, digits, tmp_path / "run")
    assert cli.main(["distill", "--config", str(file)]) == 1
    errors = capsys.readouterr().err
    assert "No space left on device; last good checkpoint: " in errors and errors.count("\n") == 1
    last = checkpoints.latest(tmp_path / "run" / "checkpoints")
    assert checkpoints.read_state(last, FORMAT)["step"] == 3
    assert [path.name for path in last.parent.iterdir() if path.is_dir()] == ["step-00000003"]
