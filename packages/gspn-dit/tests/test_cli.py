"""The command line: its options, where they come from, and what is said of mistakes."""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import yaml
from dit_cases import tiny_run

from gspn_core.runs import checkpoints
from gspn_core.runs.options import make, read_config, shipped_names, to_dict
from gspn_dit import checkpoint, cli
from gspn_dit.config import CONFIGS, TrainConfig


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_lists_every_option(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    module, _, name = cli.COMMANDS[command].options.partition(":")
    fields = dataclasses.fields(getattr(importlib.import_module(module), name))
    out = capsys.readouterr().out
    assert fields and all(f"--{field.name.replace('_', '-')}" in out for field in fields)


def test_help_and_version(capsys):
    for option in ("--help", "--version"):
        with pytest.raises(SystemExit) as ended:
            cli.main([option])
        assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in cli.COMMANDS) and "gspn-dit 0.1.0" in out


def test_every_shipped_configuration_is_valid():
    assert len(shipped_names(CONFIGS)) == 5
    for name in shipped_names(CONFIGS):
        config = make(TrainConfig, read_config(name, CONFIGS))
        assert make(TrainConfig, to_dict(config)) == config


def test_train_sample_and_evaluate(tmp_path, capsys):
    """Options come from a shipped file, from another and from the command line, the last one in force."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_run(str(tmp_path / "ignored"))))
    run_folder, samples = tmp_path / "run", tmp_path / "samples"
    configs = ("--config", "digits", "--config", file)
    code, out, _ = run(capsys, "train", *configs, "--out", run_folder, "--sample-every", "null", "--steps=4", "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 4
    saved = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert (saved["batch_size"], saved["hflip"], saved["out"]) == (8, 0.0, str(run_folder))
    assert not (tmp_path / "ignored").exists()
    options = ("--checkpoint", run_folder, "--out", samples, "--count", 12, "--sampler-steps", 2, "--no-progress")
    code, out, _ = run(capsys, "sample", *options, "--npz", "--classes", 3, 5)
    assert code == 0 and "images   12\n" in out
    assert json.loads((samples / "labels.json").read_text()) == [3, 5] * 6
    code, out, err = run(
        capsys,
        *("evaluate", "--samples", samples / "samples.npz", "--reference", "digits:0:50", "--no-progress"),
        *("--extractor", "timm:test_resnet", "--extractor-weights", tmp_path / "none", "--metrics", "fid"),
    )
    assert code == 2
    assert "extractor_weights: there is no file" in err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["train", "--config", "nothing"], "no configuration file 'nothing'; shipped are digits, imagenet256_b"),
        (["train", "--data", "no/folder", "--out", "x"], "no/folder"),
        (["sample", "--checkpoint", "nowhere"], "no checkpoint in 'nowhere'"),
        (["train", "--step", "3"], "unknown option '--step', did you mean '--steps'?"),
        (["train", "--lr", "-1"], "lr must be a number above 0, got -1"),
        (["sample"], "checkpoint"),
    ],
)
def test_mistakes(arguments, message, capsys):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("gspn-dit: error: ") and message in err and err.count("\n") == 1


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["paint"])
    assert ended.value.code == 2 and "paint" in capsys.readouterr().err


def test_interrupted(tmp_path):
    """Ctrl-C reaches the loader processes too; the run is saved, and one line says how to go on."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_run(str(tmp_path / "run"), steps=100_000, workers=1, checkpoint_every=1)))
    command = [sys.executable, "-m", "gspn_dit.cli", "train", "--config", str(file)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "run" / "checkpoints" / "index.json").is_file():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    state = checkpoints.read_state(checkpoint.locate(tmp_path / "run"), checkpoint.FORMAT)
    assert err.splitlines() == [
        "",
        "ends after this update, which is saved; Ctrl-C again ends at once",
        f"gspn-dit: interrupted after {state['step']} updates, which are saved; run the same command again to continue",
    ]


def test_installed_script():
    script = Path(sysconfig.get_path("scripts")) / "gspn-dit"
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "gspn-dit 0.1.0")
