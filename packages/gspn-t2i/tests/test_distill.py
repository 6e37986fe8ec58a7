"""Distillation: a step against formulas, continuation after SIGKILL bit for bit, processes, what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch.nn import functional as F

from gspn_t2i import GSPNAdapter, checkpoint, cli
from gspn_t2i.adapter import self_attentions
from gspn_t2i.conditions import collate
from gspn_t2i.config import DistillConfig, find, make
from gspn_t2i.distill import Distiller, NonFiniteLossError, distill
from gspn_t2i.logs import read_table
from gspn_t2i.objective import Objective, training_schedule

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Forty digits, 64 pixels wide and 32 high, with captions."""
    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    with (folder / "metadata.jsonl").open("w") as file:
        for index in range(40):
            pixels = np.round(data.images[index] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).resize((64, 32)).save(folder / f"{index}.png")
            row = {"file_name": f"{index}.png", "text": f"a handwritten {NAMES[data.target[index]]}"}
            file.write(json.dumps(row) + "\n")
    return folder


def options(pipeline, data, out, **changes):
    values = {"pipeline": str(pipeline), "data": str(data), "out": str(out), "size": [32, 64], "steps": 6}
    values |= {"warmup_steps": 2, "batch_size": 4, "workers": 0, "log_every": 2, "checkpoint_every": 3}
    values |= {"sample_every": 0, "ema_decay": 0.9, "lr": 1e-3, "progress": False, "tensorboard": False}
    return values | changes


def config(*places, **changes):
    return make(DistillConfig, options(*places) | changes)


def weights(run, name="model"):
    return load_file(checkpoint.latest(run / "checkpoints") / checkpoint.WEIGHTS[name])


def assert_same_run(run, other):
    folders = [checkpoint.latest(folder / "checkpoints") for folder in (run, other)]
    for name in (*checkpoint.WEIGHTS.values(), checkpoint.OPTIMIZER):
        ours, theirs = (load_file(folder / name) for folder in folders)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), (name, key)
    tables = [[row | {"images_per_second": ""} for row in read_table(folder / "log.csv")] for folder in (run, other)]
    assert tables[0] == tables[1] and len(tables[0]) == 3


@pytest.fixture(scope="session")
def whole(pipeline_folder, digits, tmp_path_factory):
    """A run left alone."""
    out = tmp_path_factory.mktemp("run") / "whole"
    prompts = {"sample_every": 3, "sample_prompts": ["a three", "a one", "a two"], "sample_steps": 2}
    summary = distill(config(pipeline_folder, digits, out, **prompts, tensorboard=True))
    return out, summary


def test_a_run(whole, pipeline_folder):
    out, summary = whole
    rows = read_table(out / "log.csv")
    assert (summary["steps"], summary["adapter"]) == (6, str(out / "adapter"))
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    # Linear to the peak in two updates, then a cosine over the other four, of which two are behind.
    assert [float(row["lr"]) for row in rows[:2]] == pytest.approx([1e-3, 1e-3 * (0.5 + 0.5 * np.cos(np.pi / 4))])
    for row in rows:
        total = float(row["noise"]) + 0.5 * float(row["teacher"]) + 0.5 * float(row["feature"])
        assert float(row["loss"]) == pytest.approx(total, rel=1e-5)
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    with Image.open(out / "samples" / "step-00000006.png") as page:
        assert page.size == (128, 64)
    assert yaml.safe_load((out / "config.yaml").read_text())["teacher_weight"] == 0.5
    # The adapter is that of the averaged weights, and mounts.
    adapter = GSPNAdapter.from_pretrained(out / "adapter")
    for key, value in weights(out, "ema").items():
        assert torch.equal(adapter.state_dict()[key], value)
    adapter.mount(DiffusionPipeline.from_pretrained(pipeline_folder).unet)
    # Mixers alone are saved.
    assert all(key.startswith("mixers.") for key in weights(out))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_step_is_the_plain_one(family, kind, digits, tmp_path, tmp_path_factory):
    """One update with recomputed activations and two micro-batches against a plain loop over two UNets."""
    assert cli.main(["tiny", "--family", family, "--out", str(tmp_path / "tiny")]) == 0
    file = tmp_path / "tiny" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": kind}))
    changes = {"accumulate": 2, "snr_gamma": 5.0, "gradient_checkpointing": True, "caption_dropout": 0.5}
    changes |= {"clip_grad": 0.01, "weight_decay": 0.1, "mirror": True}
    run = Distiller(config(tmp_path / "tiny", digits, tmp_path / "run", **changes))
    run.order.start = 0
    loaded = [[run.source[index] for index in indices] for indices, _ in zip(run.order, range(2), strict=False)]
    micro = [run._batch(collate(items), number) for number, items in enumerate(loaded)]
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "tiny")
    teacher, student = pipeline.unet, DiffusionPipeline.from_pretrained(tmp_path / "tiny").unet
    adapter = GSPNAdapter.for_unet(student)
    adapter.load_state_dict(run.adapter.state_dict())
    adapter.mount(student)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    outputs = {}
    for which, unet in (("t", teacher), ("s", student)):
        for name, module in self_attentions(unet).items():
            module.register_forward_hook(lambda m, i, o, key=(which, name): outputs.__setitem__(key, o))
    for batch, noise, times in micro:
        alpha = schedule.alphas_cumprod[times].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * batch.latents + (1 - alpha).sqrt() * noise
        added = None
        if family == "sdxl":
            assert batch.sizes.tolist() == [[32, 64, 0, 0, 32, 64]] * 4
            added = {"text_embeds": batch.embeddings.pooled, "time_ids": batch.sizes}
        given = {"encoder_hidden_states": batch.embeddings.states, "added_cond_kwargs": added}
        with torch.no_grad():
            t = teacher(noisy, times, **given).sample
        s = student(noisy, times, **given).sample
        snr = alpha / (1 - alpha)
        weight = torch.minimum(snr, torch.tensor(5.0)) / (snr + (kind == "v_prediction"))
        target = noise if kind == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * batch.latents
        layers = [F.mse_loss(outputs["s", name], outputs["t", name]) for name in adapter.config.layers]
        loss = (
            (weight * (s - target) ** 2).mean() + 0.5 * (weight * (s - t) ** 2).mean() + 0.5 * sum(layers) / len(layers)
        )
        (loss / 2).backward()
    parameters = dict(adapter.named_parameters())
    norm = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
    assert norm > 0.01
    expected = {}
    for name, p in parameters.items():
        gradient = p.grad * 0.01 / (norm + 1e-6)
        # AdamW's first update at half the peak learning rate.
        expected[name] = p.detach() * (1 - 5e-4 * 0.1) - 5e-4 * gradient / (gradient.abs() + 1e-8)
    total = run._update(iter([collate(items) for items in loaded]))
    assert total[-1].item() == pytest.approx(norm.item(), rel=1e-4)
    for name, p in run.adapter.named_parameters():
        # A gradient near zero has any sign.
        certain = parameters[name].grad.abs() > 1e-6
        torch.testing.assert_close(p[certain], expected[name][certain], rtol=1e-4, atol=2e-6)
    assert not run.student_taps.outputs and not run.teacher_taps.outputs


def test_student_and_teacher_share_all_but_the_mixers(pipeline_folder, digits, tmp_path):
    run = Distiller(config(pipeline_folder, digits, tmp_path / "run", keep_attention=["mid_block"]))
    ours, theirs = dict(run.student.named_parameters()), dict(run.teacher.named_parameters())
    shared = {name for name in ours if name in theirs and ours[name] is theirs[name]}
    mixers = {name for name, p in ours.items() if p.requires_grad}
    assert shared | mixers == set(ours) and not shared & mixers
    assert all(".attn1." in name and "mid_block" not in name for name in mixers)
    assert not any(p.requires_grad for p in theirs.values())
    assert all(type(module).__name__ == "Attention" for module in self_attentions(run.teacher).values())


def test_dropped_captions(pipeline_folder, digits, tmp_path):
    run = Distiller(config(pipeline_folder, digits, tmp_path / "run", caption_dropout=1.0))
    batch, _, _ = run._batch(collate([run.source[index] for index in range(4)]), 0)
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder)
    given = pipeline.encode_prompt("a", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    assert torch.equal(batch.embeddings.states, given[1].expand(4, -1, -1))
    if run.frozen.two_encoders:
        assert torch.equal(batch.embeddings.pooled, given[3].expand(4, -1)) and not given[3].any()


@pytest.mark.parametrize("pipeline_folder", ["sd15"], indirect=True)
def test_it_learns(pipeline_folder, digits, tmp_path):
    changes = {"steps": 80, "batch_size": 8, "lr": 3e-3, "log_every": 20, "caption_dropout": 0.0, "noise_weight": 0.0}
    distill(config(pipeline_folder, digits, tmp_path / "run", **changes, checkpoint_every=80))
    rows = read_table(tmp_path / "run" / "log.csv")
    assert float(rows[-1]["feature"]) < 0.5 * float(rows[0]["feature"])


@pytest.mark.parametrize("pipeline_folder", ["sd15"], indirect=True)
def test_continued_after_sigkill(whole, pipeline_folder, digits, tmp_path):
    """Killed at moments that come as they come, also while a checkpoint is written."""
    file = tmp_path / "options.yaml"
    values = options(pipeline_folder, digits, tmp_path / "run", checkpoint_every=1, keep_checkpoints=1)
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "gspn_t2i.cli", "distill", "--config", str(file)]
    log = tmp_path / "run" / "log.csv"
    # The last bits of sums depend on the threads.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not read_table(log):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "run", whole[0])


@pytest.mark.parametrize("pipeline_folder", ["sdxl"], indirect=True)
def test_two_processes_equal_one_with_twice_the_batch(whole, pipeline_folder, digits, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump(options(pipeline_folder, digits, tmp_path / "two", batch_size=2)))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "gspn_t2i.cli", "distill", "--config", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"steps": 6') == 1
    assert checkpoint.read_state(checkpoint.latest(tmp_path / "two" / "checkpoints"))["processes"] == 2
    one, two = weights(whole[0], "ema"), weights(tmp_path / "two", "ema")
    # AdamW turns rounding into sign where a gradient is near zero: a few weights differ by up to a step.
    differences = torch.cat([(one[key] - two[key]).abs().flatten() for key in one])
    assert differences.mean() < 2e-5
    for ours, theirs in zip(*(read_table(run / "log.csv") for run in (whole[0], tmp_path / "two")), strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-3)


@pytest.mark.parametrize("pipeline_folder", ["sdxl"], indirect=True)
def test_bfloat16(whole, pipeline_folder, digits, tmp_path):
    """In a process of its own: accelerate does not let the precision change within one."""
    file = tmp_path / "options.yaml"
    changes = {"precision": "bf16", "sample_every": 6, "sample_prompts": ["a one"], "sample_steps": 1}
    file.write_text(yaml.safe_dump(options(pipeline_folder, digits, tmp_path / "run", **changes)))
    command = [sys.executable, "-m", "gspn_t2i.cli", "distill", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "run").values())
    for ours, theirs in zip(*(read_table(run / "log.csv") for run in (whole[0], tmp_path / "run")), strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=0.02)


def test_another_start(whole, pipeline_folder, digits, tmp_path):
    run = Distiller(config(pipeline_folder, digits, tmp_path / "run", adapter=str(whole[0] / "adapter")))
    for key, value in weights(whole[0], "ema").items():
        assert torch.equal(run.adapter.state_dict()[key], value)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"resume": "never"}, "resume is 'never' but .* already holds a run"),
        ({"lr": 2e-3}, "lr must be 0.001 to continue the run in .*, got 0.002; give another folder as `out`"),
        ({"batch_size": 8}, r"images per update .* must be 4 to continue the run in .*, got 8"),
    ],
)
def test_another_run_in_the_folder(whole, pipeline_folder, digits, changes, message):
    with pytest.raises(ValueError, match=message):
        Distiller(config(pipeline_folder, digits, whole[0], **changes))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"size": [32, 60]}, r"size must be multiples of 8, got \(32, 60\)"),
        ({"warmup_steps": 6}, r"warmup_steps must be below steps \(6\), got 6"),
        ({"noise_weight": 0, "teacher_weight": 0, "feature_weight": 0}, "must be above 0, all are 0"),
        ({"pipeline": "no/such/pipeline"}, "no pipeline 'no/such/pipeline'"),
        ({"adapter": "no/such/adapter"}, "no adapter 'no/such/adapter'"),
        ({"data": "./nowhere"}, "no data set './nowhere': no folder"),
        ({"keep_attention": ["tail_block"]}, "keep_attention must be parts of the self-attentions' names"),
        ({"proxy": 2.0}, "proxy must be above 0 and at most 1, got 2.0"),
        ({"mixer": "attention"}, "mixer"),
        ({"text_column": "words"}, "text_column must be one of text for .*, got 'words'"),
    ],
)
def test_wrong_options(pipeline_folder, digits, changes, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        distill(config(pipeline_folder, digits, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_pipeline_that_predicts_images_is_refused():
    with pytest.raises(ValueError, match="prediction_type must be epsilon or v_prediction, got 'sample'"):
        training_schedule({"prediction_type": "sample"})


@pytest.mark.parametrize("kind,limit", [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_min_snr_weights_at_a_zero_terminal_snr(kind, limit):
    """Their limits, where the SNR itself is 0."""
    schedule = DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=True)
    weights = Objective(schedule, snr_gamma=5.0).time_weights(torch.tensor([999, 0]))
    assert weights[0] == limit and 0 < weights[1] < 1


def test_a_loss_that_is_no_number_stops_the_run(pipeline_folder, digits, tmp_path, monkeypatch):
    call = Objective.__call__

    def spoiled(self, *arguments):
        terms = call(self, *arguments)
        return terms | {"loss": terms["loss"] * torch.nan}

    monkeypatch.setattr(Objective, "__call__", spoiled)
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 1 .* last good checkpoint: none"):
        distill(config(pipeline_folder, digits, tmp_path / "run"))


@pytest.mark.parametrize("pipeline_folder", ["sd15"], indirect=True)
def test_out_of_memory_says_what_helps(pipeline_folder, digits, tmp_path, monkeypatch):
    run = Distiller(config(pipeline_folder, digits, tmp_path / "run"))
    backward = run.accelerator.backward

    def fail(loss):
        if run.step == 4:
            raise torch.OutOfMemoryError("tried to allocate much")
        backward(loss)

    monkeypatch.setattr(run.accelerator, "backward", fail)
    advice = "gradient_checkpointing true, precision bf16, a smaller batch_size with more accumulate"
    with pytest.raises(MemoryError, match=rf"what saves some: {advice}; last checkpoint: .*step-00000003 \(tried"):
        run.run()


def test_a_full_disk_leaves_the_last_checkpoint(pipeline_folder, digits, tmp_path, monkeypatch):
    run = Distiller(config(pipeline_folder, digits, tmp_path / "run"))
    save = checkpoint.save_file

    def full(tensors, path, metadata):
        if run.step == 6 and path.name == checkpoint.OPTIMIZER:
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*step-00000006.*No space left .*step-00000003"):
        run.run()
    last = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert checkpoint.read_state(last)["step"] == 3
    assert [path.name for path in last.parent.iterdir() if path.is_dir()] == ["step-00000003"]


def test_shipped_configurations():
    for name in ("sd15", "sdxl"):
        values = yaml.safe_load(Path(find(name)).read_text())
        made = make(DistillConfig, values | {"data": "captions"})
        assert (made.noise_weight, made.teacher_weight, made.feature_weight, made.lr) == (1.0, 0.5, 0.5, 1e-4)
    with pytest.raises(FileNotFoundError, match="no configuration file 'sd3'; shipped are digits, sd15, sdxl"):
        find("sd3")
