"""Distillation: a run, a step against formulas, what is learnt, and wrong options."""

import json

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler, DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from t2i_cases import distill_config as config
from torch.nn import functional as F

from gspn_core.runs import checkpoints
from gspn_core.runs.files import read_tensors
from gspn_core.runs.logs import read_table
from gspn_core.runs.options import configs_folder, make, read_config
from gspn_t2i import GSPNAdapter, cli, tiny
from gspn_t2i.adapter import self_attentions
from gspn_t2i.config import DistillConfig
from gspn_t2i.distill import FORMAT, Distiller, distill
from gspn_t2i.objective import Objective, training_schedule
from gspn_t2i.student import AVERAGED, WEIGHTS


@pytest.fixture(scope="module")
def whole(sd15, digits, tmp_path_factory):
    """A run left alone: its folder, and its result."""
    out = tmp_path_factory.mktemp("run") / "whole"
    samples = {"sample_every": 3, "sample_prompts": ["a three", "a one", "a two"], "sampler_steps": 2}
    return out, distill(config(sd15, digits, out, **samples, tensorboard=True))


def test_a_run(whole, sd15):
    out, result = whole
    rows = read_table(out / "train.csv")
    assert (result["steps"], result["adapter"]) == (6, str(out / "adapter"))
    assert result["loss"] == float(rows[-1]["loss"])
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    # Linear to the peak in two updates, then a cosine over the other four, of which one is behind.
    quarter = 1e-6 + (1e-3 - 1e-6) * (1 + np.cos(np.pi / 4)) / 2
    assert [float(row["lr"]) for row in rows[:2]] == pytest.approx([1e-3, quarter])
    for row in rows:
        total = float(row["noise"]) + 0.5 * float(row["teacher"]) + 0.5 * float(row["feature"])
        assert float(row["loss"]) == pytest.approx(total, rel=1e-5)
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    with Image.open(out / "samples" / "step-00000006.png") as page:
        assert page.size == (128, 64)
    assert any((out / "tensorboard").iterdir())
    assert yaml.safe_load((out / "config.yaml").read_text())["teacher_weight"] == 0.5
    # The adapter is that of the averaged weights, and mounts; a checkpoint is one too.
    last = checkpoints.latest(out / "checkpoints")
    assert checkpoints.read_state(last, FORMAT)["averaged"] == 7
    plain, ema = read_tensors(last / WEIGHTS), read_tensors(last / AVERAGED)
    adapter = GSPNAdapter.from_pretrained(out / "adapter")
    assert all(torch.equal(value, ema[key]) for key, value in adapter.state_dict().items())
    assert not all(torch.equal(value, plain[key]) for key, value in ema.items())
    card = ModelCard.load(out / "adapter" / "README.md")
    assert card.data.pipeline_tag == "text-to-image" and card.data.eval_results[0].metric_value == result["loss"]
    adapter.mount(DiffusionPipeline.from_pretrained(sd15).unet)
    for variant, weights in ((None, plain), ("ema", ema)):
        stored = GSPNAdapter.from_pretrained(last, variant=variant).state_dict()
        assert stored.keys() == weights.keys() and all(torch.equal(stored[key], weights[key]) for key in stored)


@pytest.mark.parametrize("family,kind", [("sd15", "v_prediction"), ("sdxl", "epsilon")])
def test_a_step_is_the_plain_one(family, kind, digits, tmp_path):
    """One update with recomputed activations and two micro-batches against a plain loop over two UNets."""
    folder = tiny.write(family, tmp_path / "tiny")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": kind}))
    changes = {"accumulate": 2, "snr_gamma": 5.0, "gradient_checkpointing": True, "caption_dropout": 0.5}
    changes |= {"clip_grad": 0.01, "weight_decay": 0.1}
    run = Distiller(config(folder, digits, tmp_path / "run", **changes))
    loaded = [items for items, _ in zip(run.batches.load(0), range(2), strict=False)]
    micro = [run.batches.draw(items, 0, number) for number, items in enumerate(loaded)]
    pipeline = DiffusionPipeline.from_pretrained(folder)
    teacher, student = pipeline.unet, DiffusionPipeline.from_pretrained(folder).unet
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
        conditions = {"encoder_hidden_states": batch.embeddings.states, "added_cond_kwargs": added}
        with torch.no_grad():
            t = teacher(noisy, times, **conditions).sample
        s = student(noisy, times, **conditions).sample
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
    total = run._update(iter(loaded))
    assert total[-1].item() == pytest.approx(norm.item(), rel=1e-4)
    for name, p in run.adapter.named_parameters():
        # A gradient near zero has any sign.
        certain = parameters[name].grad.abs() > 1e-6
        torch.testing.assert_close(p[certain], expected[name][certain], rtol=1e-4, atol=2e-6)
    assert not run.student_taps.outputs and not run.teacher_taps.outputs


def test_student_and_teacher_share_all_but_the_mixers(sd15, digits, tmp_path):
    run = Distiller(config(sd15, digits, tmp_path / "run", keep_attention=["mid_block"]))
    ours, theirs = dict(run.student.named_parameters()), dict(run.teacher.named_parameters())
    shared = {name for name in ours if name in theirs and ours[name] is theirs[name]}
    mixers = {name for name, p in ours.items() if p.requires_grad}
    assert shared | mixers == set(ours) and not shared & mixers
    assert all(name.startswith("gspn_adapter.") and "mid_block" not in name for name in mixers)
    assert not any(p.requires_grad for p in theirs.values())
    assert all(type(module).__name__ == "Attention" for module in self_attentions(run.teacher).values())


def test_dropped_captions(pipeline_folder, digits, tmp_path):
    run = Distiller(config(pipeline_folder, digits, tmp_path / "run", caption_dropout=1.0))
    batch, _, _ = run.batches.draw(next(run.batches.load(0)), 0, 0)
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder)
    encoded = pipeline.encode_prompt("a", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    assert torch.equal(batch.embeddings.states, encoded[1].expand(4, -1, -1))
    if batch.embeddings.pooled is not None:
        assert torch.equal(batch.embeddings.pooled, encoded[3].expand(4, -1)) and not encoded[3].any()


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_mirrored_images(sd15, digits, tmp_path, hflip):
    run = Distiller(config(sd15, digits, tmp_path / "run", hflip=hflip))
    pixels, captions, sizes = next(run.batches.load(0))
    batch, _, _ = run.batches.draw((pixels, captions, sizes), 0, 0)
    mirrored = (pixels.flip(-1), captions, sizes)
    run.batches.config = config(sd15, digits, tmp_path / "run", hflip=1.0 - hflip)
    other, _, _ = run.batches.draw(mirrored, 0, 0)
    assert torch.equal(batch.latents, other.latents)


def test_it_learns(sd15, digits, tmp_path):
    changes = {"steps": 40, "batch_size": 8, "lr": 3e-3, "log_every": 10, "caption_dropout": 0.0, "noise_weight": 0.0}
    distill(config(sd15, digits, tmp_path / "run", **changes, checkpoint_every=40))
    rows = read_table(tmp_path / "run" / "train.csv")
    assert float(rows[-1]["feature"]) < 0.5 * float(rows[0]["feature"])


def test_another_start(whole, sd15, digits, tmp_path):
    adapter = GSPNAdapter.from_pretrained(whole[0] / "adapter")
    run = Distiller(config(sd15, digits, tmp_path / "run", start_from=str(whole[0] / "adapter"), ema_decay=None))
    assert run.average is None
    assert all(torch.equal(run.adapter.state_dict()[key], value) for key, value in adapter.state_dict().items())


def test_options_of_another_start(sd15, digits, tmp_path):
    """A run records those that the adapter was built with; one that asks for others is refused."""
    unet = DiffusionPipeline.from_pretrained(sd15).unet
    GSPNAdapter.for_unet(unet, mixer="gspn", proxy=0.5, chunk_size=None).save_pretrained(tmp_path / "adapter")
    start = {"start_from": str(tmp_path / "adapter")}
    for changes in ({}, {"mixer": "gspn"}, {"proxy": 0.5}, {"chunk_size": None}):
        run = Distiller(config(sd15, digits, tmp_path / "run", **start, **changes))
        assert (run.config.mixer, run.config.proxy, run.config.chunk_size) == ("gspn", 0.5, None)
        assert run.facts["options"]["mixer"] == "gspn"
    for name, value in {"proxy": 0.25, "chunk_size": 8, "init": "random", "keep_attention": ["mid_block"]}.items():
        with pytest.raises(ValueError, match=f"{name} is for a new adapter, start_from names one with"):
            Distiller(config(sd15, digits, tmp_path / "run", **start, **{name: value}))


def test_the_average_of_a_short_run_has_moved(sd15, digits, tmp_path):
    """By default, with a decay of 0.9999: most of the way from the start to the plain weights."""
    options = config(sd15, digits, tmp_path / "run", steps=30, checkpoint_every=30, ema_decay=0.9999)
    distiller = Distiller(options)
    start = {key: value.detach().clone() for key, value in distiller.adapter.named_parameters()}
    distiller.run()
    adapter = dict(GSPNAdapter.from_pretrained(tmp_path / "run" / "adapter").named_parameters())
    moved, way = (
        torch.stack([(there[key] - start[key]).norm() for key in start]).norm()
        for there in (adapter, dict(distiller.adapter.named_parameters()))
    )
    assert moved > 0.6 * way > 0


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"resume": "never"}, "resume is 'never' but .* already holds a run"),
        ({"lr": 2e-3}, "lr must be 0.001 to continue the run in .*, got 0.002; give another folder as `out`"),
        ({"batch_size": 8}, r"images per update .* must be 4 to continue the run in .*, got 8"),
    ],
)
def test_another_run_in_the_folder(whole, sd15, digits, changes, message):
    with pytest.raises(ValueError, match=message):
        Distiller(config(sd15, digits, whole[0], **changes))


def test_other_data_under_the_same_name(whole, sd15, digits, tmp_path):
    """Fewer images than before are refused; what the weights do not depend on may change."""
    (tmp_path / "data").mkdir()
    for file in digits.iterdir():
        (tmp_path / "data" / file.name).write_bytes(file.read_bytes())
    lines = (digits / "metadata.jsonl").read_text().splitlines(keepends=True)
    options = {"steps": 1, "warmup_steps": 0, "checkpoint_every": 1}
    first = distill(config(sd15, tmp_path / "data", tmp_path / "run", **options))
    assert (
        distill(config(sd15, tmp_path / "data", tmp_path / "run", **options, unreadable="skip"))["loss"]
        == first["loss"]
    )
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"the number of images must be 40 to continue the run in .*, got 39"):
        Distiller(config(sd15, tmp_path / "data", tmp_path / "run", **options))


def test_a_cache_as_data(sd15, digits, tmp_path):
    cache = tmp_path / "cache"
    Distiller(config(sd15, digits, tmp_path / "run", hflip=0.0, cache=str(cache)))
    assert len(Distiller(config(sd15, cache, tmp_path / "run", hflip=0.0)).batches.source) == 40
    for changes, message in [
        ({"hflip": 0.5}, "is a cache with mirrored False, must be True"),
        ({"hflip": 0.0, "image_size": 32}, "is a cache with image_size '32x64', must be '32x32'"),
        ({"cache": "another"}, "cache must be unset where data is a cache, got 'another'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Distiller(config(sd15, cache, tmp_path / "run", **changes))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"image_size": [32, 60]}, "image_size must be multiples of 8, got 32x60"),
        ({"betas": [0.9, 1.0]}, r"betas must be below 1, got \(0.9, 1.0\)"),
        ({"cache": "c", "random_crop": True}, "cache must be unset with buckets or random_crop"),
        ({"buckets": ["32x60"]}, "buckets must be multiples of 8, got 32x60"),
        ({"validate_every": 2}, "validate_every needs val_data or val_split, got 2 alone"),
        ({"val_split": "test"}, "val_split is for a validation, set validate_every; got 'test' alone"),
        ({"pipeline": "nowhere.safetensors"}, "no pipeline 'nowhere.safetensors': there is no such file"),
        ({"noise_weight": 0, "teacher_weight": 0, "feature_weight": 0}, "must be above 0, all are 0"),
        ({"precision": "fp16"}, "precision must be fp32 or bf16 on the CPU, got fp16"),
        ({"pipeline": "no/such/pipeline"}, "no pipeline 'no/such/pipeline'"),
        ({"start_from": "no/such/adapter"}, "no adapter 'no/such/adapter'"),
        ({"data": "./nowhere"}, "no data set './nowhere': no folder"),
        ({"keep_attention": ["tail_block"]}, "keep_attention: no self-attention name contains 'tail_block'"),
        ({"proxy": 2.0}, "proxy must be above 0 and at most 1, got 2.0"),
        ({"mixer": "attention"}, "mixer"),
        ({"text_column": "words"}, "text_column must be one of text for .*, got 'words'"),
    ],
)
def test_wrong_options(sd15, digits, changes, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        distill(config(sd15, digits, tmp_path / "run", **changes))
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


def test_shipped_configurations():
    folder = configs_folder(cli.__file__)
    outs = set()
    for name in ("sd15", "sdxl"):
        made = make(DistillConfig, read_config(name, folder) | {"data": "captions"})
        assert (made.noise_weight, made.teacher_weight, made.feature_weight, made.lr) == (1.0, 0.5, 0.5, 1e-4)
        outs.add(made.out)
    assert len(outs) == 2
    with pytest.raises(FileNotFoundError, match="no configuration file 'sd3'; shipped are sd15, sdxl"):
        read_config("sd3", folder)
