"""Checkpoints: whole ones in force at every moment, and weights and optimizers that come back to the bit."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from gspn_core.runs import checkpoints, files
from gspn_core.runs.errors import NonFiniteLossError
from gspn_core.runs.files import read_tensors

WEIGHTS = "model.safetensors"


class Crash(BaseException):
    """Stands for the process being killed."""


FILE_OPERATIONS = [
    *((os, name) for name in ("replace", "fsync", "open", "unlink", "rmdir", "mkdir")),
    (Path, "write_text"),
    (files, "save_file"),
]


def crash_at(monkeypatch, number):
    """Let the file operation of a number raise, having written half of what it was to write."""
    done = []

    def guard(owner, name):
        original = getattr(owner, name)

        def operation(*args, **kwargs):
            done.append(name)
            if len(done) == number:
                if name == "write_text":
                    original(args[0], args[1][: len(args[1]) // 2], **kwargs)
                if name == "save_file":
                    args[1].write_bytes(b"half")
                raise Crash
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, operation)

    for owner, name in FILE_OPERATIONS:
        guard(owner, name)
    return done


def write(folder, step, best, keep=1):
    tensors = {WEIGHTS: {"w": torch.full((3,), float(step))}, checkpoints.OPTIMIZER: {"m": torch.full((2,), step)}}
    texts, state = {"config.json": json.dumps({"step": step})}, {"format": "test 1", "step": step}
    checkpoints.save(folder, step, tensors, texts, state, keep=keep, best=best and checkpoints.name_of(best))


def read(folder, which):
    """Return the step of a checkpoint, having made sure that all of it belongs together."""
    found = checkpoints.locate(folder, "config.json", which)
    step = checkpoints.read_state(found, "test 1")["step"]
    assert read_tensors(found / WEIGHTS)["w"].tolist() == [step] * 3
    assert read_tensors(found / checkpoints.OPTIMIZER)["m"].tolist() == [step] * 2
    assert json.loads((found / "config.json").read_text()) == {"step": step}
    return step


def test_a_crash_between_any_two_file_operations_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    outcomes = set()
    for number in range(1, 200):
        folder = tmp_path / str(number)
        write(folder, 1, best=1)
        write(folder, 2, best=1)
        with monkeypatch.context() as patch:
            done = crash_at(patch, number)
            try:
                write(folder, 3, best=3)
                completed = True
            except Crash:
                completed = False
        found = (read(folder, "latest"), read(folder, "best"))
        assert found in {(2, 1), (3, 3)}  # both pointers move at once
        outcomes.add(found)
        if completed:
            assert len(done) < number
            assert {"replace", "fsync", "rmdir", "write_text", "save_file"} <= set(done)
            break
        # The run goes on and the leftovers disappear.
        write(folder, 3, best=3)
        assert (read(folder, "latest"), read(folder, "best")) == (3, 3)
        assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["step-00000003"]
        shutil.rmtree(folder)
    else:
        pytest.fail("saving never completed")
    assert outcomes == {(2, 1), (3, 3)}


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 10])
def test_as_many_are_kept_as_asked_for_and_the_best(tmp_path, keep):
    for step in range(1, 13):
        write(tmp_path, step, best=min(step, 2), keep=keep)
    kept = sorted(int(path.name.removeprefix("step-")) for path in tmp_path.iterdir() if path.is_dir())
    assert kept == sorted({2, *range(13 - keep, 13)})


def test_only_checkpoints_are_removed(tmp_path):
    for name in ("backup", "zz-mine", "step-1"):
        (tmp_path / name).mkdir()
    (tmp_path / ".step-00000002.tmp").mkdir()
    for step in (1, 2, 3):
        write(tmp_path, step, best=None, keep=2)
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == ["backup", "step-00000002", "step-00000003", "step-1", "zz-mine"]


def test_a_removed_checkpoint_is_named(tmp_path):
    write(tmp_path / "checkpoints", 1, best=None, keep=2)
    write(tmp_path / "checkpoints", 2, best=None, keep=2)
    shutil.rmtree(checkpoints.latest(tmp_path / "checkpoints"))
    message = r"step-00000002 has been removed; to go on from an older checkpoint, name it in .*index\.json"
    with pytest.raises(FileNotFoundError, match=message):
        checkpoints.latest(tmp_path / "checkpoints")
    with pytest.raises(FileNotFoundError, match=message):
        checkpoints.locate(tmp_path, "config.json")
    (tmp_path / "checkpoints" / "index.json").write_text('{"latest": "step-00000001"}')
    assert read(tmp_path, "latest") == 1


def test_nothing_is_pickled(tmp_path):
    write(tmp_path, 1, best=None)
    found = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert found == ["config.json", "index.json", WEIGHTS, checkpoints.OPTIMIZER, "state.json"]
    assert checkpoints.read_index(tmp_path) == {"latest": "step-00000001"}


def test_locate(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoints.locate(tmp_path, "config.json")
    write(tmp_path / "checkpoints", 1, best=1)
    write(tmp_path / "checkpoints", 2, best=1)
    one, two = (tmp_path / "checkpoints" / checkpoints.name_of(step) for step in (1, 2))
    for path in (tmp_path, tmp_path / "checkpoints"):
        assert checkpoints.locate(path, "config.json") == two == checkpoints.latest(tmp_path / "checkpoints")
        assert checkpoints.locate(path, "config.json", "best") == one
    assert checkpoints.locate(one, "config.json") == one


def test_foreign_files(tmp_path):
    write(tmp_path, 1, best=None)
    folder = checkpoints.latest(tmp_path)
    with pytest.raises(ValueError, match="must be a checkpoint of the format 'other 2', got 'test 1'"):
        checkpoints.read_state(folder, "other 2")
    (folder / "state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no state\.json in .*; there is no older checkpoint: remove "):
        checkpoints.read_state(folder, "other 2")
    shutil.copytree(folder, tmp_path / "model")
    assert checkpoints.read_state(tmp_path / "model", "other 2") == {}
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged: .*; remove it, and the newest checkpoint"):
        checkpoints.latest(tmp_path)


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors"])
@pytest.mark.parametrize("content", ["{", "[]", None])
def test_a_damaged_file_says_the_way_on(tmp_path, name, content):
    def read():
        if name == "state.json":
            return checkpoints.read_state(folder, "test 1")
        return read_tensors(folder / name)

    for step, way in ((1, "there is no older checkpoint: remove "), (2, "to go on from an older checkpoint, name it")):
        write(tmp_path, step, best=None, keep=2)
        folder = checkpoints.latest(tmp_path)
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_text(content)
        with pytest.raises((ValueError, FileNotFoundError), match=rf"{name} (is damaged: .*|in .*); {way}"):
            read()


@pytest.mark.parametrize("content", ["[]", "{}", '"x"', '{"latest": 3}', '{"best": "step-00000001"}'])
def test_an_index_that_names_nothing_is_damaged(tmp_path, content):
    write(tmp_path, 1, best=None)
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json is damaged: it .*; remove it, and the newest checkpoint"):
        checkpoints.latest(tmp_path)


def test_weights_of_another_model():
    model = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"x holds the weights of another model: bias must be \(3,\), got absent"):
        checkpoints.load_weights(model, {"weight": torch.zeros(3, 2)}, "x")
    with pytest.raises(ValueError, match=r"another model: weight must be \(3, 2\), got \(4, 2\)"):
        checkpoints.load_weights(model, {"weight": torch.zeros(4, 2), "bias": torch.zeros(3)}, "x")
    checkpoints.load_weights(model, {"weight": torch.ones(3, 2), "bias": torch.ones(3)}, "x")
    assert model.weight.eq(1).all()


class Counting(torch.optim.Optimizer):
    """Keeps a tensor for each group, as LAMB does, and moves weights at a rate of 0 too, as MADGRAD does."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr})

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                group["step"] = group.get("step", torch.zeros(())) + 1
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        start = self.state[parameter].setdefault("start", parameter.clone())
                        parameter.copy_(0.5 * start + parameter / (1 + group["step"]) - group["lr"] * parameter.grad)


def make_optimizer(name, model):
    rows = [{"params": [model[0].weight], "lr": 0.02, "lr_scale": 0.5}, {"params": [model[0].bias, model[2].weight]}]
    kinds = {
        "adamw": lambda: torch.optim.AdamW(rows, lr=0.01, betas=(0.8, 0.9), amsgrad=True),
        "sgd": lambda: torch.optim.SGD(rows, lr=0.01, momentum=0.9, nesterov=True),
        "plain sgd": lambda: torch.optim.SGD(rows, lr=0.01),
        "adafactor": lambda: torch.optim.Adafactor(rows, lr=0.01),
        "counting": lambda: Counting(rows, lr=0.01),
        "rmsprop": lambda: torch.optim.RMSprop(rows, lr=0.01, momentum=0.5),
    }
    return kinds[name]()


@pytest.mark.parametrize("name", ["adamw", "sgd", "plain sgd", "adafactor", "rmsprop", "counting"])
def test_an_optimizer_goes_on_as_if_nothing_had_happened(name, tmp_path):
    """Also with groups of their own rates, and with parameters that are not trained."""

    def fresh():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        model[2].bias.requires_grad_(False)
        return model, make_optimizer(name, model)

    def steps(model, optimizer, first):
        for step in range(first, first + 3):
            torch.manual_seed(step)
            model(torch.randn(5, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = fresh()
    steps(model, optimizer, 0)
    tensors, values = checkpoints.optimizer_state(model, optimizer)
    checkpoints.save(tmp_path, 3, {checkpoints.OPTIMIZER: tensors}, {}, {"optimizer": values}, keep=1)
    other, continued = fresh()
    other.load_state_dict(model.state_dict())
    stored = json.loads((checkpoints.latest(tmp_path) / "state.json").read_text())
    checkpoints.restore_optimizer(other, continued, checkpoints.latest(tmp_path), stored["optimizer"])
    assert [group["lr"] for group in continued.param_groups] == [group["lr"] for group in optimizer.param_groups]
    steps(model, optimizer, 3)
    steps(other, continued, 3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_with_other_state_is_refused():
    model = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight] = {"history": [torch.zeros(1)]}
    with pytest.raises(ValueError, match=r"the state of SGD cannot be stored: .*list"):
        checkpoints.optimizer_state(model, optimizer)


def test_a_lost_index_is_made_good(tmp_path):
    """The newest whole checkpoint counts, and the next one is written beside it instead of over everything."""
    write(tmp_path, 1, None, keep=3)
    write(tmp_path, 2, None, keep=3)
    (tmp_path / "index.json").unlink()
    (tmp_path / ".step-00000009.tmp").mkdir()
    assert checkpoints.latest(tmp_path).name == "step-00000002"
    assert read(tmp_path, "latest") == 2
    write(tmp_path, 3, None, keep=3)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [checkpoints.name_of(step) for step in (1, 2, 3)]


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("file", [WEIGHTS, checkpoints.OPTIMIZER])
def test_what_is_not_finite_is_not_saved(value, file, tmp_path):
    write(tmp_path, 1, None)
    tensors = {file: {"w": torch.tensor([1.0, value]), "count": torch.tensor(3)}}
    with pytest.raises(NonFiniteLossError, match=rf"w of {file} is not finite at step 2; last good checkpoint: .*1$"):
        checkpoints.save(tmp_path, 2, tensors, {}, {}, keep=1)
    assert read(tmp_path, "latest") == 1
