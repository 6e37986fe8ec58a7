import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from vision_cases import TINY, tiny_run, write_images

from gspn_core.runs.options import make
from gspn_vision import checkpoint
from gspn_vision.config import TrainConfig
from gspn_vision.finetune import freeze, start_from, training_mode
from gspn_vision.models import build_model
from gspn_vision.train import Trainer, train

PLAIN = {"mixup": 0.0, "cutmix": 0.0, "ema_decay": None}


@pytest.fixture(scope="module")
def trained(training_folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    train(make(TrainConfig, {**tiny_run(training_folder), "out": str(run)}))
    return run


@pytest.fixture
def other_classes(tmp_path):
    return write_images(tmp_path / "other", {"left": 12, "right": 12})


def weights_of(run, stem="model"):
    return load_file(checkpoint.locate(run, "latest") / f"{stem}.safetensors")


def test_start_from_a_run_with_another_head(trained, other_classes, tmp_path):
    trainer = Trainer(
        make(TrainConfig, {**tiny_run(other_classes), "start_from": str(trained), "out": str(tmp_path / "run")})
    )
    before = load_file(checkpoint.locate(trained) / "ema.safetensors")
    own = trainer.bare_model.state_dict()
    assert own["head.fc.weight"].shape[0] == 2
    for name, tensor in before.items():
        if not name.startswith("head.fc"):
            assert torch.equal(own[name], tensor), name


def test_start_from_a_file(trained, tmp_path):
    weights = weights_of(trained)
    save_file(weights, tmp_path / "weights.safetensors")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}, tmp_path / "weights.pth")
    arguments = {"num_classes": 3, **TINY}
    for file in ("weights.safetensors", "weights.pth"):
        model = build_model("gspn2_nano", arguments)
        assert start_from(model, str(tmp_path / file)) == []
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "backbone.", "module.model."])
def test_start_from_weights_with_a_prefix(prefix, tmp_path):
    weights = build_model("gspn2_nano", {**TINY, "num_classes": 3}).state_dict()
    save_file({f"{prefix}{name}": tensor for name, tensor in weights.items()}, tmp_path / "weights.safetensors")
    model = build_model("gspn2_nano", {**TINY, "num_classes": 3})
    assert start_from(model, str(tmp_path / "weights.safetensors")) == []
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("channels", [1, 4])
def test_start_from_weights_of_other_channels(channels, tmp_path):
    """As timm adapts them: summed for one, repeated for more."""
    weights = build_model("gspn2_nano", {**TINY, "num_classes": 3}).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    model = build_model("gspn2_nano", {**TINY, "num_classes": 3, "in_chans": channels})
    start_from(model, str(tmp_path / "weights.safetensors"))
    colours = weights["stem.0.weight"]
    expected = colours.sum(1, keepdim=True) if channels == 1 else 0.75 * colours[:, [0, 1, 2, 0]]
    torch.testing.assert_close(model.stem[0].weight.detach(), expected)


def test_frozen_batch_norms_keep_their_statistics():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Sequential(torch.nn.BatchNorm2d(3)))
    model.training = False
    training_mode(model, ["1"])
    model(torch.randn(4, 3, 2, 2) + 5)
    assert model[0].running_mean.abs().min() > 0 and model[1][0].running_mean.abs().max() == 0


def test_start_from_errors(trained, tmp_path):
    model = build_model("gspn2_nano", {})
    with pytest.raises(ValueError, match="another model"):
        start_from(model, str(trained))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        start_from(model, "nowhere")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        start_from(model, str(tmp_path))
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        start_from(model, str(tmp_path / "broken.safetensors"))


def test_frozen_modules_stay(trained, training_folder, tmp_path):
    options = {**tiny_run(training_folder), **PLAIN, "start_from": str(trained), "freeze": ["stem", "stages.0"]}
    train(make(TrainConfig, {**options, "out": str(tmp_path / "run")}))
    before = load_file(checkpoint.locate(trained) / "ema.safetensors")
    after = weights_of(tmp_path / "run")
    frozen = [name for name in after if name.startswith(("stem.", "stages.0."))]
    assert frozen
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert not torch.equal(after["stages.1.blocks.0.ffn.fc1.weight"], before["stages.1.blocks.0.ffn.fc1.weight"])


def test_freeze_errors():
    model = build_model("gspn2_nano", {})
    with pytest.raises(ValueError, match="layer7"):
        freeze(model, ["layer7"])
    with pytest.raises(ValueError, match="nothing to train"):
        freeze(model, ["stem", "stages", "norm", "head"])


def test_layer_decay_lowers_early_learning_rates(training_folder, tmp_path):
    options = {**tiny_run(training_folder), "layer_decay": 0.5, "out": str(tmp_path / "run")}
    trainer = Trainer(make(TrainConfig, options))
    rates = {}
    trainer.lr.set(trainer.optimizer, 4)
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            rates[id(parameter)] = group["lr"]
    by_name = {name: rates[id(p)] for name, p in trainer.bare_model.named_parameters()}
    head, last, first = (by_name[f"{name}.weight"] for name in ("head.fc", "stages.3.blocks.0.ffn.fc1", "stem.0"))
    assert head > last > first > 0
    assert head == pytest.approx(trainer.lr.at(4))


def test_mesa_needs_averaged_weights():
    with pytest.raises(ValueError, match="ema_decay"):
        make(TrainConfig, {"mesa": 1.0, "ema_decay": None})


def test_mesa_is_the_divergence_from_the_averaged_model(training_folder, tmp_path):
    options = {**tiny_run(training_folder), "mesa": 2.0, "mesa_start": 0.0, "out": str(tmp_path / "run")}
    trainer = Trainer(make(TrainConfig, options))
    trainer.bare_model.eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = trainer.bare_model(images)
    assert trainer._sharpness(images, logits).item() == pytest.approx(0, abs=1e-6)  # no average yet but itself
    moved = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    p = F.softmax(trainer.ema.module(images), -1)
    expected = (p * (p.log() - moved.softmax(-1).log())).sum(-1).mean()
    torch.testing.assert_close(trainer._sharpness(images, moved), expected.detach())


def test_mesa_changes_what_is_learned_only_after_its_start(training_folder, tmp_path):
    def weights(name, **options):
        train(make(TrainConfig, {**tiny_run(training_folder), **options, "out": str(tmp_path / name)}))
        return weights_of(tmp_path / name)

    plain = weights("plain")
    late = weights("late", mesa=3.0, mesa_start=1.0)
    distilled = weights("distilled", mesa=3.0, mesa_start=0.5)
    assert all(torch.equal(late[name], plain[name]) for name in plain)
    assert not all(torch.equal(distilled[name], plain[name]) for name in plain)
