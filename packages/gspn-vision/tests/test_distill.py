"""`gspn-vision distill`: converted models that learn from models with attention."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_distributed import run_two
from test_train import Killed
from torch import Tensor, nn
from torch.nn import functional as F

from gspn_core.runs import checkpoints
from gspn_core.runs.errors import StoppedError
from gspn_core.runs.logs import read_table
from gspn_core.runs.options import make
from gspn_vision import checkpoint
from gspn_vision.cli import main
from gspn_vision.config import DistillConfig
from gspn_vision.foundation import blocks, convert, mixers
from gspn_vision.foundation.distill import Distiller, distill
from gspn_vision.foundation.objective import Recorder, difference, enlarged, parts_of
from gspn_vision.foundation.vision import from_name

KWARGS = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 3, "img_size": 16, "patch_size": 4}
KWARGS |= {"reg_tokens": 2, "mlp_ratio": 2}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A timm folder of a small ViT with a class and two register tokens."""
    torch.manual_seed(0)
    vision = from_name("vit_tiny_patch16_224", KWARGS)
    for block in vision.model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.2)  # so that it does attend
    folder = tmp_path_factory.mktemp("teacher") / "model"
    checkpoint.write_model(folder, vision.config(), vision.model.state_dict())
    return str(folder)


@pytest.fixture
def options(teacher: str, training_folder: Path, tmp_path: Path) -> dict:
    """Options of a run of 4 updates of stage 1 and 4 of stage 2, with everything random switched on."""
    options = {"teacher": teacher, "data": str(training_folder), "out": str(tmp_path / "run"), "workers": 0}
    options |= {"steps": 8, "align_steps": 4, "batch_size": 12, "log_every": 3, "ema_decay": 0.9, "adapters": True}
    return options | {"kl_weight": 0.1, "keep": [1], "warmup_steps": 1, "progress": False, "tensorboard": False}


def run(options: dict, **changed: object) -> dict:
    return distill(make(DistillConfig, {**options, **changed}))


def weights(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """Assert that two runs ended with the same bits and the same tables, but for speeds."""
    a, b = (checkpoint.locate(folder, "latest") for folder in (one, other))
    assert a.name == b.name
    for stem in ("model", "ema", "optimizer", "adapters"):
        left, right = load_file(a / f"{stem}.safetensors"), load_file(b / f"{stem}.safetensors")
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left), stem
    tables = [read_table(folder / "train.csv") for folder in (one, other)]
    for row in tables[0] + tables[1]:
        row.pop("images_per_second")
    assert tables[0] == tables[1] and tables[0]


def test_a_run(options: dict, tmp_path: Path) -> None:
    result = run(options)
    rows = read_table(tmp_path / "run" / "train.csv")
    assert [(row["step"], row["stage"]) for row in rows] == [("3", "1"), ("4", "1"), ("6", "2"), ("8", "2")]
    assert [float(row["block_loss"]) > 0 for row in rows] == [False, False, True, True]
    assert float(rows[1]["lr"]) == pytest.approx(1e-6 + (2e-3 - 1e-6) / 4)  # cosine of the last of 3 after the warm-up
    model = timm.create_model(f"local-dir:{result['model']}", pretrained=True)
    assert list(mixers(model)) == ["blocks.0.attn", "blocks.2.attn"]
    assert sum(p.numel() for p in model.parameters()) == result["parameters"]
    newest = checkpoint.locate(tmp_path / "run", "latest")
    averages = load_file(newest / "ema.safetensors")
    assert all(torch.equal(value, averages[name]) for name, value in model.state_dict().items())
    # The classifier is the teacher's, and what is before it has learned.
    before, after = weights(options["teacher"]), weights(newest)
    changed = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in before.keys() - changed} == {"head", "norm", "blocks"}
    assert {name for name in before if name not in changed and name not in after} == {
        f"blocks.{n}.attn.{part}" for n in (0, 2) for part in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
    }
    assert checkpoint.load_model(tmp_path / "run").class_names == ["0", "1", "2"]
    card = ModelCard.load(Path(result["model"]) / "README.md")
    assert "blocks.0.attn, blocks.2.attn" in card.text and card.data.eval_results[0].metric_value == result["loss"]
    assert run(options)["steps"] == 8 and checkpoint.locate(tmp_path / "run", "latest") == newest


def test_stage_1_trains_mixers_alone_and_each_for_itself(options: dict, tmp_path: Path) -> None:
    distiller = Distiller(make(DistillConfig, {**options, "steps": 4, "keep": []}))
    start = {name: value.clone() for name, value in distiller.student.model.state_dict().items()}
    distiller.run()
    end = distiller.student.model.state_dict()
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed == {name for name in start if ".attn." in name}
    # The input of each mixer is the teacher's, whatever the mixers before it do.
    images = torch.randn(2, 3, 16, 16)
    distiller.teacher.model.forward_features(images)
    record = distiller.recorder.take()
    terms = distiller.trained(images, record, images)
    last = difference(
        mixers(distiller.student.model)["blocks.2.attn"](record.inputs[2], grid=(4, 4)), record.mixed[2], parts_of(3)
    )
    gradient = torch.autograd.grad(terms["loss"], mixers(distiller.student.model)["blocks.2.attn"].up.weight)[0]
    alone = torch.autograd.grad(last / 3, mixers(distiller.student.model)["blocks.2.attn"].up.weight)[0]
    torch.testing.assert_close(gradient, alone)


@pytest.mark.parametrize("update", [2, 4, 7])
def test_an_interrupted_run_ends_with_the_same_bits(
    options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int
) -> None:
    """Stopped within an update of either stage, between them too, with checkpoints every 2 and rows left open."""
    options |= {"batch_size": 6, "accumulate": 2, "checkpoint_every": 2}
    run(options, out=str(tmp_path / "whole"), checkpoint_every=100)
    step = Distiller._update

    def interrupted(self: Distiller, batches: object) -> Tensor:
        report = step(self, batches)
        if self.step > update:
            raise Killed
        return report

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "_update", interrupted)
        with pytest.raises(Killed):
            run(options)
    torch.manual_seed(update)  # generators are in no particular state when a run is continued
    assert run(options, workers=1 if update == 2 else 0)["steps"] == 8
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_sigterm_saves_and_the_run_goes_on(options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(options, out=str(tmp_path / "whole"))
    step = Distiller._update

    def terminated(self: Distiller, batches: object) -> Tensor:
        report = step(self, batches)
        if self.step == 5:
            signal.raise_signal(signal.SIGTERM)
        return report

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "_update", terminated)
        with pytest.raises(StoppedError, match="after 5 updates"):
            run(options)
    run(options)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_two_processes_equal_one_with_twice_the_batch(options: dict, tmp_path: Path) -> None:
    options |= {"lr": 1e-4, "align_lr": 1e-4}
    start = Distiller(make(DistillConfig, options)).student
    checkpoint.write_model(tmp_path / "start", start.config(), start.model.state_dict())
    run(options, out=str(tmp_path / "one"))
    file = tmp_path / "two.json"
    file.write_text(json.dumps({**options, "batch_size": 6}))
    done = run_two(["distill", "--config", str(file), "--json"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"steps": 8') == 1
    one, two = weights(tmp_path / "one" / "model"), weights(tmp_path / "run" / "model")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-5, msg=name)
    assert (one["blocks.0.attn.up.weight"] - weights(tmp_path / "start")["blocks.0.attn.up.weight"]).abs().max() > 2e-4


def test_the_loss_falls_and_the_student_comes_nearer(options: dict, tmp_path: Path) -> None:
    options |= {"steps": 60, "align_steps": 30, "lr": 2e-3, "align_lr": 5e-3, "log_every": 10, "augment": False}
    distiller = Distiller(make(DistillConfig, {**options, "adapters": False, "kl_weight": 0.0, "keep": []}))
    images = torch.stack([distiller.student.preprocessing.transform()(distiller.source[i][0]) for i in range(0, 48, 3)])

    def error() -> float:
        with torch.no_grad():
            theirs = distiller.teacher.model.forward_features(images)
            return difference(distiller.student.model.forward_features(images), theirs, parts_of(3)).item()

    before = error()
    distiller.run()
    rows = [float(row["loss"]) for row in read_table(tmp_path / "run" / "train.csv")]
    assert rows[2] < 0.5 * rows[0] and rows[5] < 0.8 * rows[3]
    assert error() < 0.3 * before


@pytest.mark.parametrize(
    "changed",
    [
        {"loss": "last", "adapters": False},
        {"gradient_checkpointing": True},
        {"precision": "bf16", "ema_decay": None},
        {"align_steps": 0, "adapters": False},
        {"align_steps": 2, "steps": 2},
        {"mixer_kwargs": {"prefix": "drop"}},
    ],
)
def test_runs_with(options: dict, changed: dict) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # or it keeps the precision of the first run
    try:
        assert 0 < run(options, **{"steps": 4, "align_steps": 2, **changed})["loss"] < 100
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_recomputing_changes_nothing(options: dict, tmp_path: Path) -> None:
    run(options, out=str(tmp_path / "plain"))
    run(options, gradient_checkpointing=True)
    for name, value in weights(tmp_path / "plain" / "model").items():
        torch.testing.assert_close(weights(tmp_path / "run" / "model")[name], value, rtol=0, atol=1e-5)


def test_a_larger_student_learns_from_enlarged_features(options: dict, tmp_path: Path) -> None:
    """The curriculum: the student of one size is the teacher, and the start, of the next."""
    first = run(options, steps=2, align_steps=1)["model"]
    changed = {
        "teacher": first,
        "image_size": "24x32",
        "teacher_image_size": 16,
        "keep": [],
        "out": str(tmp_path / "2"),
    }
    distiller = Distiller(make(DistillConfig, {**options, **changed}))
    assert distiller.grids == ((4, 4), (6, 8))
    model = checkpoint.load_model(distiller.run()["model"])
    assert model.preprocessing.size == (24, 32) and len(mixers(model.model)) == 2
    assert model.model(torch.randn(1, 3, 24, 32)).shape == (1, 3)


def test_a_curriculum(options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equals its runs by hand; and a second call finds all done."""
    curriculum = {"steps": 4, "align_steps": 2, "adapters": False}
    result = run(options, **curriculum, curriculum=[16, "24x32"])
    assert result["steps"] == 2 and result["model"] == str(tmp_path / "run" / "model")
    first = run(options, **curriculum, out=str(tmp_path / "1"))
    hand = {"teacher": first["model"], "keep": [], "image_size": "24x32", "teacher_image_size": 16, "align_steps": 0}
    run(options, **{**curriculum, **hand, "steps": 2}, out=str(tmp_path / "2"))
    got, expected = (weights(tmp_path / name / "model") for name in ("run", "2"))
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert checkpoint.load_model(result["model"]).preprocessing.size == (24, 32)
    monkeypatch.delattr(Distiller, "_update")  # or it would go on
    assert run(options, **curriculum, curriculum=[16, "24x32"])["model"] == result["model"]


def test_any_images_serve(options: dict, training_folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in sorted((training_folder / "train" / "red").iterdir())[:5]:
        (flat / file.name).write_bytes(file.read_bytes())
    distiller = Distiller(make(DistillConfig, {**options, "data": str(flat)}))
    assert len(distiller.source) == 5
    assert len(Distiller(make(DistillConfig, {**options, "split": "val"})).source) == 48
    assert len(Distiller(make(DistillConfig, {**options, "data": "digits"})).source) == 1437
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        Distiller(make(DistillConfig, {**options, "data": str(tmp_path / "none")}))


def test_begins_with_a_converted_model(options: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = str(tmp_path / "start")
    assert main(["convert", "--checkpoint", options["teacher"], "--keep", "0", "--out", start]) == 0
    distiller = Distiller(make(DistillConfig, {**options, "keep": [], "start_from": start}))
    own = distiller.student.model.state_dict()
    assert list(mixers(distiller.student.model)) == ["blocks.1.attn", "blocks.2.attn"]
    assert all(torch.equal(value, own[name]) for name, value in weights(start).items())
    words = [f"--{name.replace('_', '-')}={value}" for name, value in {**options, "start_from": start}.items()]
    kept = [word for word in words if not word.startswith(("--adapters", "--progress", "--tensorboard"))]
    assert main(["distill", *kept, "--no-progress"]) == 2
    assert "keep must not be given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keep": [1.0]}, "keep must leave a block"),
        ({"keep": [3]}, r"keep must be indices of 3 blocks, .*, got \[3\]"),
        ({"keep": ["each", 2]}, "keep must be indices .*, got 'each 2'"),
        ({"mixer_kwargs": None}, "mixer_kwargs must be a mapping, .* got null"),
        ({"align_steps": 9}, "align_steps must be at most steps"),
        ({"mixer_weight": 0.0, "block_weight": 0.0}, "mixer_weight or block_weight"),
        ({"crop_scale": [1.0, 0.5]}, "crop_scale must be"),
        ({"curriculum": [16, 16]}, "curriculum must be different sizes"),
        ({"curriculum": [16, 24], "image_size": 16}, "image_size must not be given with curriculum"),
        ({"curriculum": [16, 24], "align_steps": 8}, "align_steps must be less than steps"),
        ({"mixer_kwargs": {"width": 3}}, "mixer_kwargs must be of"),
        ({"pretrained": True}, "pretrained must not be given"),
        ({"teacher": "resnet18"}, "teacher must be .* nothing to replace"),
        ({"teacher": "vit_tiny"}, "teacher must be a timm model"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(options, **changed)
    assert not (tmp_path / "run").exists()


def test_another_teacher_does_not_continue_a_run(options: dict, tmp_path: Path) -> None:
    run(options, steps=2, align_steps=1)
    other = tmp_path / "other"
    vision = from_name("vit_tiny_patch16_224", KWARGS)
    checkpoint.write_model(other, vision.config(), vision.model.state_dict())
    with pytest.raises(ValueError, match="the teacher"):
        run(options, align_steps=1, teacher=str(other))
    with pytest.raises(ValueError, match="align_steps must be 1"):
        run(options, align_steps=2)
    assert run(options, align_steps=1, steps=4)["steps"] == 4
    other_dim = from_name("vit_tiny_patch16_224", {**KWARGS, "embed_dim": 16})
    checkpoint.write_model(tmp_path / "narrow", other_dim.config(), other_dim.model.state_dict())
    convert(vision.model)
    start = vision._replace(name="cgspn", kwargs={**KWARGS, "base": "vit_tiny_patch16_224"})
    vision.model.pretrained_cfg["architecture"] = "cgspn"
    checkpoint.write_model(tmp_path / "start", start.config(), vision.model.state_dict())
    with pytest.raises(ValueError, match="as many channels"):
        run(options, keep=[], teacher=str(tmp_path / "narrow"), start_from=str(tmp_path / "start"), resume="never")


def test_difference_is_relative_to_the_teachers_features_and_weighs_parts_alike() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(3, 6, 8), torch.randn(3, 6, 8)
    value = difference(student, teacher, [slice(None)], 0.3)
    scaled = [(x / teacher.var((1, 2), correction=0, keepdim=True).sqrt()) for x in (student, teacher)]
    kl = F.kl_div(scaled[0].log_softmax(-1), scaled[1].softmax(-1), reduction="none").sum(-1).mean()
    torch.testing.assert_close(value, (scaled[0] - scaled[1]).square().mean() + 0.3 * kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        difference(9 * student, 9 * teacher, parts_of(2)), difference(student, teacher, parts_of(2))
    )
    halves = [difference(student[:, part], teacher[:, part], [slice(None)]) for part in (slice(0, 2), slice(2, None))]
    torch.testing.assert_close(difference(student, teacher, parts_of(2)), sum(halves) / 2)
    alone = [difference(student[i : i + 1], teacher[i : i + 1], parts_of(2), 0.3) for i in range(3)]
    torch.testing.assert_close(difference(student, teacher, parts_of(2), 0.3), sum(alone) / 3)
    assert difference(teacher, teacher, parts_of(2), 0.3) == pytest.approx(0, abs=1e-6)


def test_features_are_enlarged_on_the_grid() -> None:
    rows = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 3, 2)
    x = torch.cat([torch.full((1, 1, 2), 9.0), rows.flatten(1, 2)], dim=1)
    out = enlarged(x, 1, (4, 3), (8, 3))
    assert torch.equal(out[:, :1], x[:, :1]) and out.shape == (1, 1 + 24, 2)
    torch.testing.assert_close(out[0, 1::3, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))
    assert enlarged(x, 1, (4, 3), (4, 3)) is x


def test_a_record_is_of_attention_and_block() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **KWARGS).eval()
    recorder = Recorder(model)
    x = torch.randn(1, 3, 16, 16)
    out = model.forward_features(x)
    record = recorder.take()
    torch.testing.assert_close(model.norm(record.made[-1]), out)
    torch.testing.assert_close(model.blocks[1].norm1(record.made[0]), record.inputs[1])
    torch.testing.assert_close(model.blocks[1].attn(record.inputs[1]), record.mixed[1])
    assert len(blocks(model)) == len(record.made) == 3
    recorder.kinds = ("made",)
    model.forward_features(x)
    again = recorder.take()
    assert again.inputs == again.mixed == () and torch.equal(again.made[2], record.made[2])
    recorder.clear()
    recorder.remove()
    model.forward_features(x)
    with pytest.raises(KeyError):
        recorder.take()


def test_options_are_recorded(options: dict, tmp_path: Path) -> None:
    run(options, steps=2, align_steps=1)
    state = checkpoints.read_state(checkpoint.locate(tmp_path / "run", "latest"), checkpoint.FORMAT)
    names = {field.name for field in dataclasses.fields(DistillConfig)}
    assert names == set(state["config"])


def test_what_does_not_decay(options: dict) -> None:
    """timm's choice for the student, as position embeddings, and the class token."""
    distiller = Distiller(make(DistillConfig, {**options, "align_steps": 0}))
    distiller._enter(2)
    decayed = {id(p) for group in distiller.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in distiller.trained.named_parameters() if id(p) in decayed}
    assert not names & {"student.pos_embed", "student.cls_token", "student.reg_token"}
    assert "student.blocks.0.attn.down.weight" in names


def test_lost_adapters_are_missed(options: dict, tmp_path: Path) -> None:
    run(options)
    (checkpoint.locate(tmp_path / "run", "latest") / "adapters.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapters\.safetensors"):
        run(options, steps=10)


def test_folders_of_something_else_are_refused(options: dict, teacher: str, tmp_path: Path) -> None:
    run(options, steps=2, align_steps=1)
    with pytest.raises(ValueError, match="holds a run without curriculum"):
        run(options, curriculum=[16, 24])
    done = str(tmp_path / "c")
    run(options, steps=4, align_steps=2, curriculum=[16, 24], out=done)
    assert checkpoint.load_model(done).preprocessing.size == (24, 24)
    with pytest.raises(ValueError, match="holds a run with curriculum"):
        run(options, out=done)
    with pytest.raises(ValueError, match="steps was 4, is 6"):
        run(options, steps=6, align_steps=2, curriculum=[16, 24], out=done)
    with pytest.raises(ValueError, match="curriculum: image_size must be a multiple of the patches"):
        run(options, curriculum=[16, 18], out=str(tmp_path / "d"))
    assert not (tmp_path / "d").exists()
    with pytest.raises(ValueError, match="out must be another folder than teacher"):
        run(options, out=teacher)
    with pytest.raises(ValueError, match="teacher must have attention"):
        run(options, teacher=f"{done}/model", keep=[], out=str(tmp_path / "e"))


def test_dropped_prefix_tokens_are_not_compared_after_mixers(options: dict) -> None:
    distiller = Distiller(make(DistillConfig, {**options, "align_steps": 0, "mixer_kwargs": {"prefix": "drop"}}))
    distiller._enter(2)
    assert [len(parts) for parts in distiller.trained.mixer_parts] == [1, 2, 1]  # block 1 keeps its attention
