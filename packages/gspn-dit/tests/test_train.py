"""Training: one step against formulas, continuation after SIGKILL bit for bit, logs, and what is refused."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from dit_cases import tiny_run
from huggingface_hub import ModelCard
from PIL import Image
from plain import plain_forward, plain_noise_loss
from safetensors.torch import load_file, save_file

from gspn_core.runs import checkpoints
from gspn_core.runs.errors import NonFiniteLossError
from gspn_core.runs.logs import read_table
from gspn_core.runs.options import make
from gspn_core.runs.order import STEP, Order
from gspn_dit import GSPNDiTTransformer2DModel, checkpoint, train
from gspn_dit.config import EvaluateConfig, SampleConfig, TrainConfig
from gspn_dit.data import draw
from gspn_dit.evaluate import evaluate
from gspn_dit.sample import read_png, sample


def config(out, **changes):
    return make(TrainConfig, tiny_run(str(out), **changes))


def files(run):
    folder = checkpoints.latest(Path(run) / "checkpoints")
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_same_run(run, other):
    ours, theirs = files(run), files(other)
    assert ours.keys() == theirs.keys() and len(ours) == 3
    for name in ours:
        assert ours[name].keys() == theirs[name].keys()
        for key, value in ours[name].items():
            assert torch.equal(value, theirs[name][key]), (name, key)
    drop = "images_per_second"
    logs = [
        [{k: v for k, v in row.items() if k != drop} for row in read_table(Path(r) / "train.csv")] for r in (run, other)
    ]
    assert logs[0] == logs[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, train.train(config(out))


# ---- one step


@pytest.mark.parametrize("proxy", [None, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_step_is_the_plain_one(proxy, accumulate, tmp_path):
    """Data, corruption, loss, clipping, AdamW, schedule and average: two blocks, two steps, formulas in float64."""
    shape = {"hidden_size": 16, "num_layers": 2, "proxy_channels": proxy, "drop_path_rate": 0.0}
    options = {"model_kwargs": shape, "batch_size": 4, "accumulate": accumulate, "clip_grad": 0.05, "weight_decay": 0.1}
    trainer = train.Trainer(config(tmp_path, **options, lr=0.01, warmup_steps=0, steps=3, ema_warmup=False))
    with torch.no_grad():
        for layer in (trainer.bare_model.final.modulation, trainer.bare_model.final.proj):
            layer.weight.normal_(std=0.1)
    w = {name: p.detach().double().requires_grad_() for name, p in trainer.bare_model.named_parameters()}
    average = {name: p.detach().double() for name, p in trainer.ema.module.named_parameters()}
    moment = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in w.items()}
    order = list(Order(1797, 4, accumulate, 3, seed=0, rank=0, world_size=1))
    batches = iter([trainer.source[i] for i in batch] for batch in order)
    norms = []
    for step in range(2):
        losses = []
        for micro in range(accumulate):
            items, labels = zip(*next(batches), strict=True)
            images = range(4 * micro, 4 * micro + 4)
            draws = draw(trainer.objective, (1, 8, 8), images, hflip=0.5, dropout=0.1, seeds=(STEP, 0, step))
            x0 = torch.stack(items).double() / 127.5 - 1
            x0 = torch.stack([x.flip(-1) if flip else x for x, flip in zip(x0, draws.mirrored, strict=True)])
            labels = torch.tensor([10 if drop else label for label, drop in zip(labels, draws.dropped, strict=True)])
            abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[draws.times]
            abar = abar.view(-1, 1, 1, 1)
            noise = draws.noise.double()
            xt = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
            output = plain_forward(w, trainer.bare_model.config, xt, draws.times, labels)
            losses.append(plain_noise_loss(output, x0, noise, draws.times).mean())
        loss = torch.stack(losses).mean()
        gradients = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        norms.append(norm.item())
        # The cosine from lr to min_lr over 3 steps.
        lr = 0.01 if step == 0 else 1e-6 + (0.01 - 1e-6) * 0.5 * (1 + torch.tensor(torch.pi / 3).double().cos())
        for name, gradient in gradients.items():
            gradient = gradient * (0.05 / (norm + 1e-6)).clamp(max=1)
            m, v = moment[name]
            m.mul_(0.9).add_(0.1 * gradient)
            v.mul_(0.999).add_(0.001 * gradient**2)
            corrected = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            with torch.no_grad():
                w[name].mul_(1 - lr * 0.1).sub_(lr * m / (1 - 0.9 ** (step + 1)) / corrected)
                average[name] = 0.9 * average[name] + 0.1 * w[name]
    start = {name: p.clone() for name, p in trainer.bare_model.state_dict().items()}
    loaded = iter(train.loader(trainer.source, trainer.order, 0))
    totals = [trainer._update(loaded) for _ in range(2)]
    assert max(norms) > 0.05  # so that clipping acts
    assert [total[-1].item() for total in totals] == pytest.approx(norms, rel=1e-3)
    assert totals[1][0].item() == pytest.approx(loss.item(), rel=1e-3)
    for name, p in trainer.bare_model.named_parameters():
        # AdamW's first steps move every weight by about lr: where a gradient is near zero its sign is rounding's.
        difference = (p.double() - w[name]).abs()
        assert difference.mean() < 1e-4, name
        assert difference.median() < 1e-5, name
        assert (p - start[name]).abs().mean() > 1e-3, name
    for name, p in trainer.ema.module.named_parameters():
        assert (p.double() - average[name]).abs().mean() < 1e-4, name


# ---- runs


def test_a_run(whole):
    out, summary = whole
    assert (summary["steps"], summary["folder"]) == (6, str(out))
    rows = read_table(out / "train.csv")
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert summary["loss"] > 0 and all(float(row["gradient_norm"]) > 0 for row in rows)
    assert [float(rows[0]["lr"]), float(rows[-1]["lr"])] == pytest.approx([1e-3, 1.473e-4], rel=1e-3)
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    assert read_png(out / "samples" / "step-00000006.png").shape == (130, 130, 3)
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (saved["model"], saved["label_dropout"]) == ("GSPN2-S/2", 0.1)
    assert not list(out.rglob("*.tmp"))


def test_a_checkpoint_is_a_diffusers_model(whole):
    folder = checkpoint.locate(whole[0])
    for variant, stem in ((None, "model"), ("ema", "ema")):
        model = GSPNDiTTransformer2DModel.from_pretrained(folder, variant=variant)
        for name, value in load_file(folder / checkpoint.WEIGHTS[stem]).items():
            assert torch.equal(model.state_dict()[name], value)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers" and card.data.eval_results[0].metric_value == whole[1]["loss"]
    assert "after 6 updates" in card.text and 'variant="ema"' in card.text
    ours, state = checkpoint.load_model(whole[0])
    assert torch.equal(ours.class_embed.weight, model.class_embed.weight)
    assert (state["step"], state["class_names"]) == (6, [str(digit) for digit in range(10)])


def test_continued_after_an_exception(whole, tmp_path, monkeypatch):
    def save(*arguments, **options):
        if arguments[1] == 6:
            raise KeyboardInterrupt
        return saved(*arguments, **options)

    saved = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", save)
    with pytest.raises(KeyboardInterrupt):
        train.train(config(tmp_path / "run"))
    monkeypatch.undo()
    assert checkpoints.read_state(checkpoint.locate(tmp_path / "run"), checkpoint.FORMAT)["step"] == 3
    train.train(config(tmp_path / "run", log_every=2, workers=1))
    assert_same_run(tmp_path / "run", whole[0])


def test_continued_after_sigkill(whole, tmp_path):
    """Killed over and over at moments that come as they come, also while a checkpoint is written."""
    file = tmp_path / "options.yaml"
    file.write_text(
        yaml.safe_dump(tiny_run(str(tmp_path / "run"), checkpoint_every=1, sample_every=None, keep_checkpoints=1))
    )
    command = [sys.executable, "-m", "gspn_dit.cli", "train", "--config", str(file)]
    log = tmp_path / "run" / "train.csv"
    # The last bits of sums depend on the threads.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for wanted in (2, 4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if any(int(row["step"]) >= wanted for row in read_table(log)):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", whole[0])


def test_flow_matching(tmp_path):
    summary = train.train(config(tmp_path / "run", objective="flow", accumulate=2, compile=False, clip_grad=None))
    assert summary["steps"] == 6
    model, state = checkpoint.load_model(tmp_path / "run", "model")
    assert (model.out_channels, state["objective"]) == (1, "flow")


def test_savers_of_time_and_memory(tmp_path):
    """bfloat16, compiled blocks and recomputed activations train to about the same weights."""
    shape = {"hidden_size": 16, "num_layers": 2, "proxy_channels": 4, "drop_path_rate": 0.0}
    options = {"model_kwargs": shape, "sample_every": None, "lr": 1e-4, "min_lr": 1e-5}
    train.train(config(tmp_path / "plain", **options))
    savers = {"precision": "bf16", "compile": True, "gradient_checkpointing": True}
    # In a process of its own: accelerate does not let the precision change within one.
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump(tiny_run(str(tmp_path / "saving"), **options, **savers)))
    command = [sys.executable, "-m", "gspn_dit.cli", "train", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, saving = (read_table(tmp_path / name / "train.csv") for name in ("plain", "saving"))
    for ours, theirs in zip(saving, plain, strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=0.02)
    assert all(value.dtype == torch.float32 for value in files(tmp_path / "saving")["optimizer.safetensors"].values())


def test_it_learns(tmp_path):
    train.train(
        config(tmp_path / "run", steps=60, batch_size=32, lr=3e-3, log_every=10, sample_every=None, warmup_steps=5)
    )
    losses = [float(row["mse"]) for row in read_table(tmp_path / "run" / "train.csv")]
    assert losses[-1] < 0.5 * losses[0]


def test_fid_of_samples_during_training(tmp_path):
    """Is that of `sample` and `evaluate` with the same options, and leaves the weights as they are."""
    torch.manual_seed(0)
    kwargs = {"num_classes": 0, "in_chans": 1}
    save_file(timm.create_model("test_vit", **kwargs).state_dict(), tmp_path / "network.safetensors")
    network = {"extractor": "timm:test_vit", "extractor_weights": str(tmp_path / "network.safetensors")}
    network["extractor_kwargs"] = kwargs
    options = {"fid_every": 3, "fid_count": 70, "reference": "digits:0:80", "sample_every": None, **network}
    train.train(config(tmp_path / "measured", **options))
    train.train(config(tmp_path / "plain", sample_every=None))
    assert_same_run(tmp_path / "measured", tmp_path / "plain")
    rows = read_table(tmp_path / "measured" / "validation.csv")
    assert [row["step"] for row in rows] == ["3", "6"]
    drawn = {"count": 70, "sampler_steps": 2, "guidance": 4.0, "batch_size": 8, "progress": False, "device": "cpu"}
    sample(make(SampleConfig, {"checkpoint": str(tmp_path / "plain"), "out": str(tmp_path / "drawn"), **drawn}))
    found = evaluate(
        make(
            EvaluateConfig,
            {"samples": str(tmp_path / "drawn" / "images"), "reference": "digits:0:80", "metrics": ["fid"]}
            | {"device": "cpu", "progress": False, **network},
        )
    )
    assert float(rows[-1]["fid"]) == pytest.approx(found["fid"], rel=1e-4)
    with pytest.raises(ValueError, match="reference must be given to compute the FID of samples, got none"):
        train.train(config(tmp_path / "none", fid_every=3, **network))


def test_start_from_another_run(whole, tmp_path):
    trainer = train.Trainer(config(tmp_path / "run", start_from=str(whole[0])))
    averaged = load_file(checkpoint.locate(whole[0]) / checkpoint.WEIGHTS["ema"])
    assert torch.equal(trainer.bare_model.class_embed.weight, averaged["class_embed.weight"])
    with pytest.raises(
        ValueError, match=r"holds the weights of another model: class_embed.weight must be \(11, 24\), got \(11, 16\)"
    ):
        train.Trainer(
            config(tmp_path / "run", start_from=str(whole[0]), model_kwargs={"hidden_size": 24, "num_layers": 2})
        )


def test_more_classes_than_the_data_have(tmp_path):
    """Dropped labels train the class that guidance asks for, the last row of the table."""
    asked = []
    shape = {"hidden_size": 16, "num_layers": 0, "num_classes": 12}
    trainer = train.Trainer(config(tmp_path / "run", model_kwargs=shape, label_dropout=1.0, sample_every=None))
    embed = trainer.bare_model.class_embed
    embed.register_forward_pre_hook(lambda _, arguments: asked.append(arguments[0]))
    trainer.run()
    assert torch.cat(asked).unique().tolist() == [12]
    assert trainer.bare_model.class_embed.weight.shape == (13, 16)


def test_known_classes_are_kept_when_others_come(tmp_path):
    """Rows go with the names of their classes; new classes start afresh, the null class stays."""
    for name in ("3", "7", "cat"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "data" / name / "0.png")
    shape = {"hidden_size": 16, "num_layers": 2, "proxy_channels": 4}
    GSPNDiTTransformer2DModel(sample_size=8, in_channels=3, num_classes=10, **shape).save_pretrained(tmp_path / "model")
    before = load_file(tmp_path / "model" / checkpoint.WEIGHTS["model"])["class_embed.weight"]
    options = {"data": str(tmp_path / "data"), "image_size": 8, "model_kwargs": shape}
    trainer = train.Trainer(config(tmp_path / "run", start_from=str(tmp_path / "model"), **options))
    table = trainer.bare_model.class_embed.weight
    assert trainer.class_names == ["3", "7", "cat"] and table.shape == (4, 16)
    assert torch.equal(table[[0, 1, 3]], before[[3, 7, 10]])
    assert not any(torch.equal(table[2], row) for row in before)


def test_a_run_is_extended(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    summary = train.train(config(tmp_path / "run", steps=8, compile=False))
    assert (summary["steps"], summary["loss"]) == (8, float(read_table(tmp_path / "run" / "train.csv")[-1]["loss"]))
    finished = train.train(config(tmp_path / "run", steps=8))
    assert finished["loss"] == summary["loss"]


def test_sigterm_saves_a_checkpoint(tmp_path):
    """As clusters send it, to all processes, before they take the machine away; the run goes on from there."""
    file = tmp_path / "options.yaml"
    changes = {"steps": 100_000, "sample_every": None, "log_every": 1, "workers": 1}
    file.write_text(yaml.safe_dump(tiny_run(str(tmp_path / "run"), **changes)))
    file.write_text(file.read_text().replace("checkpoint_every: 3", "checkpoint_every: 1000000"))
    command = [sys.executable, "-m", "gspn_dit.cli", "train", "--config", str(file)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not read_table(tmp_path / "run" / "train.csv"):
        time.sleep(0.05)
    busy = config(tmp_path / "run", **changes, checkpoint_every=1_000_000)
    with pytest.raises(ValueError, match=rf"is being written by process {process.pid} on .*; wait for it"):
        train.train(busy)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    state = checkpoints.read_state(checkpoint.locate(tmp_path / "run"), checkpoint.FORMAT)
    assert (process.returncode, out) == (143, "")
    line = (
        f"gspn-dit: terminated after {state['step']} updates, which are saved; run the same command again to continue\n"
    )
    assert err == line
    assert read_table(tmp_path / "run" / "train.csv")[-1]["step"] == str(state["step"])  # not lost for the average


# ---- what is refused


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model": "GSPN-B/2"}, "model must be 'GSPN2-S/2' to continue the run in .*, got 'GSPN-B/2'"),
        ({"batch_size": 4}, r"images per update .* must be 8 to continue the run in .*, got 4"),
        ({"resume": "never"}, "resume is 'never' but .* already holds a run"),
        ({"lr": 0.5}, "lr must be 0.001 to continue the run"),
        ({"steps": 5}, "steps must be at least the 6 updates that the run in .* has done, got 5"),
    ],
)
def test_another_run_in_the_folder(whole, changes, message):
    with pytest.raises(ValueError, match=message):
        train.Trainer(config(whole[0], **changes))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model": "GSPN-M/2"}, "model must be one of GSPN-S/2"),
        ({"model_kwargs": {"hidden": 1}}, "model_kwargs {'hidden': 1} do not suit GSPN2-S/2: .*hidden"),
        ({"model_kwargs": {"in_channels": 3}}, "in_channels must be the 1 of the data, got 3"),
        ({"model": "GSPN2-S/4", "model_kwargs": {"patch_size": 3}}, "must divide 8 x 8, got 3"),
        ({"model_kwargs": {"num_classes": 9}}, "num_classes must be at least the 10 of the data, got 9"),
        ({"times": "logit_normal"}, "times and time_shift are of the objective flow, got logit_normal, 1.0"),
        ({"min_lr": 1.0}, r"min_lr must be at most lr \(0.001\), got 1.0"),
        ({"lr": 0}, "lr"),
        ({"batchsize": 3}, "batchsize"),
        ({"objective": "score"}, "objective"),
        ({"data": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_wrong_options(changes, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.Trainer(config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    def corrupt(self, x0, noise, t):
        return x0 * (float("nan") if trainer.step == 4 else 1.0)

    trainer = train.Trainer(config(tmp_path / "run"))
    monkeypatch.setattr(type(trainer.objective), "corrupt", corrupt)
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 5 with learning rate .*step-00000003"):
        trainer.run()


def test_a_full_disk_leaves_the_last_checkpoint(whole, tmp_path, monkeypatch):
    """On a file system where one checkpoint fits and two do not."""
    size = sum(path.stat().st_size for path in checkpoint.locate(whole[0]).iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={3 * size // 2}", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(OSError, match=r"cannot write .*step-00000006.*last good checkpoint: .*step-00000003"):
            train.train(config(disk / "run", sample_every=None))
        assert checkpoints.read_state(checkpoint.locate(disk / "run"), checkpoint.FORMAT)["step"] == 3
        assert [path.name for path in (disk / "run" / "checkpoints").iterdir() if path.is_dir()] == ["step-00000003"]
        # With room again the run goes on.
        os.system(f"mount -o remount,size=4m {disk}")
        train.train(config(disk / "run", sample_every=None))
        assert_same_run(disk / "run", whole[0])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_damaged_checkpoint_is_named(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    file = checkpoint.locate(run) / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"optimizer.safetensors is damaged"):
        train.Trainer(config(run))
