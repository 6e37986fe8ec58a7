"""The command line: its options, where they come from, and what is said of mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dit_cases import tiny_run

from gspn_dit import cli
from gspn_dit.config import TrainConfig, find, make, presets_folder, to_dict

OPTIONS = {
    "extract": "batch_size config data device dtype image_column image_size label_column out precision progress "
    "shard_size split vae workers",
    "train": "accumulate batch_size checkpoint_every clip_grad compile config data device ema_decay ema_warmup "
    "gradient_checkpointing image_size keep_checkpoints label_dropout log_every lr min_lr mirror model objective out "
    "precision preset progress resume sample_count sample_every sample_guidance sample_steps seed split start_from "
    "steps tensorboard vae warmup_steps weight_decay workers batch_size",
    "sample": "batch_size checkpoint classes config count device grid guidance guidance_channels npz out precision "
    "progress sampler seed size steps vae weights",
    "evaluate": "batch_size config csv device extractor extractor_import extractor_kwargs extractor_mean "
    "extractor_size extractor_std extractor_weights inception_split json labels metrics neighbors "
    "precision_reference progress reference samples",
}


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", OPTIONS)
def test_options(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    words = {word.rstrip(",") for word in capsys.readouterr().out.split() if word.startswith("--")}
    # A list has a second form, --classes+, which adds to it.
    shown = {word[2:].rstrip("+") for word in words if not word.startswith("--print")} - {"help"}
    assert shown == set(OPTIONS[command].split())


def test_help_and_version(capsys):
    for option in ("--help", "--version"):
        with pytest.raises(SystemExit) as ended:
            cli.main([option])
        assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in OPTIONS) and "gspn-dit 0.1.0" in out


def test_every_shipped_configuration_is_valid():
    names = [path.stem for path in presets_folder().glob("*.yaml")]
    assert len(names) == 5
    for name in names:
        values = yaml.safe_load(Path(find(name)).read_text(encoding="utf-8"))
        config = make(TrainConfig, values)
        assert make(TrainConfig, to_dict(config)) == config
    shipped = str(presets_folder() / "digits.yaml")
    assert find("digits.yaml") == find("digits") == shipped
    assert Path(find("configs/digits.yaml")).samefile(shipped)


def test_train_sample_and_evaluate(tmp_path, capsys):
    """Options come from a shipped file, from another and from the command line, the last one in force."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_run(str(tmp_path / "ignored"))))
    run_folder, samples = tmp_path / "run", tmp_path / "samples"
    code, out, _ = run(
        capsys, "train", "--config", "digits", "--config", file, "--out", run_folder, "--sample-every", 0, "--steps=4"
    )
    assert code == 0
    assert json.loads(out)["steps"] == 4
    saved = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert (saved["batch_size"], saved["mirror"], saved["out"]) == (8, False, str(run_folder))
    assert not (tmp_path / "ignored").exists()
    options = ("--checkpoint", run_folder, "--out", samples, "--count", 12, "--steps", 2, "--progress", "false")
    code, out, _ = run(capsys, "sample", *options, "--npz", "true", "--classes", "[3, 5]")
    assert (code, json.loads(out)["images"]) == (0, 12)
    assert json.loads((samples / "labels.json").read_text()) == [3, 5] * 6
    code, out, err = run(
        capsys,
        *("evaluate", "--samples", samples / "samples.npz", "--reference", "digits:0:50", "--progress", "false"),
        *("--extractor", "timm:test_resnet", "--extractor-weights", tmp_path / "none", "--metrics", '["fid"]'),
    )
    assert code == 2
    assert "extractor_weights: there is no file" in err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["train", "--config", "nothing"], "no configuration file 'nothing'; shipped are digits, imagenet256_b"),
        (["train", "--data", "no/folder", "--out", "x"], "no/folder"),
        (["sample", "--checkpoint", "nowhere"], "no checkpoint in 'nowhere'"),
    ],
)
def test_mistakes(arguments, message, capsys):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("gspn-dit: error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["train", "--stepz", "3"], ["train", "--lr", "-1"], ["paint"]])
def test_mistakes_that_the_parser_sees(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert arguments[-1].lstrip("-") in capsys.readouterr().err or "lr" in arguments[1]


def test_installed_script():
    done = subprocess.run([sys.executable, "-m", "gspn_dit.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "gspn-dit 0.1.0")
