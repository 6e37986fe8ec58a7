import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from vision_cases import TINY

from gspn_vision import checkpoint


class Crash(BaseException):
    """Stands for the process being killed."""


FILE_OPERATIONS = [
    (os, "replace"),
    (os, "fsync"),
    (os, "open"),
    (os, "unlink"),
    (os, "rmdir"),
    (os, "mkdir"),
    (Path, "write_text"),
    (checkpoint, "save_file"),
]


def crash_at(monkeypatch, number: int) -> list[str]:
    """Let the file operation of a number raise, having written half of what it was to write."""
    done: list[str] = []

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


def write(folder: Path, step: int, best: int) -> None:
    tensors = {"model": {"w": torch.full((3,), float(step))}, "optimizer": {"m": torch.full((2,), float(step))}}
    state = {"format": "gspn-vision 1", "step": step}
    checkpoint.save(folder, f"step-{step:04d}", tensors, state, best=f"step-{best:04d}", keep=1)


def read(folder: Path, which: str) -> int:
    """Return the step of a checkpoint, having made sure that all of it belongs together."""
    found = checkpoint.locate(folder, which)
    step = checkpoint.read_state(found)["step"]
    assert checkpoint.read_tensors(found, "model")["w"].tolist() == [step] * 3
    assert checkpoint.read_tensors(found, "optimizer")["m"].tolist() == [step] * 2
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
            assert {"replace", "fsync", "unlink", "rmdir", "write_text", "save_file"} <= set(done)
            break
        # The run goes on and the leftovers disappear.
        write(folder, 3, best=3)
        assert (read(folder, "latest"), read(folder, "best")) == (3, 3)
        assert sorted(p.name for p in folder.iterdir()) == ["index.json", "step-0003"]
        shutil.rmtree(folder)
    else:
        pytest.fail("saving never completed")
    assert outcomes == {(2, 1), (3, 3)}


def test_old_checkpoints_are_pruned_and_the_best_kept(tmp_path):
    for step in range(1, 7):
        tensors = {"model": {"w": torch.zeros(1)}}
        checkpoint.save(tmp_path, f"step-{step:04d}", tensors, {}, best="step-0002" if step > 1 else None, keep=3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["index.json", "step-0002", "step-0004", "step-0005", "step-0006"]


def test_nothing_is_pickled(tmp_path):
    write(tmp_path, 1, best=1)
    files = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["index.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def test_locate(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.locate(tmp_path)
    write(tmp_path / "checkpoints", 1, best=1)
    write(tmp_path / "checkpoints", 2, best=1)
    one, two = (tmp_path / "checkpoints" / name for name in ("step-0001", "step-0002"))
    assert checkpoint.locate(tmp_path) == checkpoint.locate(tmp_path / "checkpoints") == one
    assert checkpoint.locate(tmp_path, "latest") == checkpoint.locate(two) == two


def test_damaged_and_foreign_files(tmp_path):
    write(tmp_path, 1, best=1)
    folder = tmp_path / "step-0001"
    (folder / "model.safetensors").write_bytes(b"damage")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        checkpoint.read_tensors(folder, "model")
    with pytest.raises(FileNotFoundError, match=r"no ema\.safetensors in the checkpoint"):
        checkpoint.read_tensors(folder, "ema")
    (folder / "state.json").write_text(json.dumps({"epoch": 1}))
    with pytest.raises(ValueError, match="is not a gspn-vision checkpoint"):
        checkpoint.read_state(folder)


def test_a_checkpoint_of_another_model():
    model = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"x is a checkpoint of another model: bias must be \(3,\), got nothing"):
        checkpoint.load_weights(model, {"weight": torch.zeros(3, 2)}, "x")
    with pytest.raises(ValueError, match=r"another model: weight must be \(3, 2\), got \(4, 2\)"):
        checkpoint.load_weights(model, {"weight": torch.zeros(4, 2), "bias": torch.zeros(3)}, "x")


def test_unknown_models_and_arguments():
    with pytest.raises(ValueError, match=r"unknown model 'gspn3_nano'; perhaps one of .*gspn2?_nano"):
        checkpoint.build_model("gspn3_nano", {})
    with pytest.raises(ValueError, match=r"model_kwargs do not suit gspn_nano: .*windows"):
        checkpoint.build_model("gspn_nano", {"windows": 3})


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor", "lamb"])
def test_optimizer_state_survives(name, tmp_path):
    """Packed, stored and unpacked, an optimizer goes on exactly as if nothing had happened."""

    def steps(optimizer, model, first):
        for step in range(first, first + 3):
            torch.manual_seed(step)
            loss = model(torch.randn(2, 1, 32, 32)).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        torch.manual_seed(0)
        model = checkpoint.build_model("gspn2_nano", {**TINY, "in_chans": 1, "num_classes": 2})
        return model, create_optimizer_v2(model, name, lr=1e-2, weight_decay=0.1)

    model, optimizer = fresh()
    steps(optimizer, model, 0)
    tensors, packed = checkpoint.pack_optimizer(optimizer)
    safetensors.torch.save_file(tensors, tmp_path / "optimizer.safetensors")
    other, continued = fresh()
    other.load_state_dict(model.state_dict())
    loaded = safetensors.torch.load_file(tmp_path / "optimizer.safetensors")
    checkpoint.unpack_optimizer(continued, loaded, json.loads(json.dumps(packed)))
    steps(optimizer, model, 3)
    steps(continued, other, 3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_optimizers_with_other_state_are_refused():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = {"history": [torch.zeros(1)]}
    with pytest.raises(ValueError, match="cannot store the state of SGD: history is a list"):
        checkpoint.pack_optimizer(optimizer)
