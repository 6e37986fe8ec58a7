"""A dataclass as a command line, YAML files and a record."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml
from jsonargparse.typing import PositiveFloat

from gspn_core.runs.options import (
    ImageSize,
    Precision,
    make,
    parse,
    parser_of,
    read_config,
    to_dict,
    to_yaml,
    warmup_of,
)


@dataclasses.dataclass(kw_only=True, frozen=True)
class Options:
    """Options of a test.

    Args:
        pipeline: a folder, or
            a name
        image_size: height and width
        sizes: several of them
        classes: numbers or names
        prompts: what to draw
        npz: write 100% of it
        scale: two numbers
        model_kwargs: arguments
        clip_grad: largest norm
        mean: per channel
        lr: a rate
        precision: of the forward passes
    """

    pipeline: str
    image_size: ImageSize | None = None
    sizes: tuple[ImageSize, ...] = (ImageSize(2, 3),)
    classes: list[int | str] | None = None
    prompts: list[str] = dataclasses.field(default_factory=list)
    npz: bool = False
    scale: tuple[float, float] = (0.5, 1.0)
    model_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    clip_grad: PositiveFloat | None = 1.0
    mean: tuple[float, ...] | None = None
    lr: PositiveFloat = 1e-3
    precision: Precision = "fp32"


def read(*words, shipped=None):
    return parse(Options, ["--pipeline", "x", *words], shipped=shipped)


@pytest.fixture
def shipped(tmp_path):
    (tmp_path / "small.yaml").write_text("image_size: 3x4\nscale: [0.1, 0.5]\nlr: 1e-4\nclip_grad: null\nnpz: true\n")
    (tmp_path / "wrong.yaml").write_text("image_siz: 3\n")
    (tmp_path / "scalar.yaml").write_text("prompts: a\n")
    return tmp_path


@pytest.mark.parametrize(
    "words,name,value",
    [
        (["--image-size", "224"], "image_size", ImageSize(224, 224)),
        (["--image-size=96x160"], "image_size", ImageSize(96, 160)),
        (["--sizes", "4", "5x6"], "sizes", (ImageSize(4, 4), ImageSize(5, 6))),
        (["--classes", "3", "cat"], "classes", [3, "cat"]),
        (["--classes", "3"], "classes", [3]),
        (["--prompts", "a: b, c", "[cat:dog:0.5]"], "prompts", ["a: b, c", "[cat:dog:0.5]"]),
        (["--npz"], "npz", True),
        (["--scale", "0.25", "2"], "scale", (0.25, 2.0)),
        (["--model-kwargs", "{depth: 2}"], "model_kwargs", {"depth": 2}),
        (["--clip-grad", "null"], "clip_grad", None),
        (["--mean", "null"], "mean", None),
        (["--classes=null"], "classes", None),
        (["--mean", "0.5"], "mean", (0.5,)),
        (["--precision", "bf16"], "precision", "bf16"),
    ],
)
def test_the_command_line(words, name, value):
    assert getattr(read(*words), name) == value


def test_files_and_the_command_line(shipped):
    options = read("--config", "small", "--no-npz", "--lr", "2", shipped=shipped)
    assert (options.image_size, options.scale, options.clip_grad) == (ImageSize(3, 4), (0.1, 0.5), None)
    assert (options.npz, options.lr) == (False, 2.0)
    other = shipped / "other.yml"
    other.write_text("lr: 5\n")
    assert read("--config", str(other), "--config=small", shipped=shipped).lr == 1e-4
    assert read("--config", "small", "--config", str(other), shipped=shipped).lr == 5
    assert read("--lr", "7", "--config", str(other), "--config", "small", shipped=shipped).lr == 7
    assert read_config("small", shipped)["npz"] is True


@pytest.mark.parametrize(
    "words,message",
    [
        (["--imag-size", "3"], "unknown option '--imag-size', did you mean '--image-size'?"),
        (["--opt", "sgd"], "unknown option '--opt'"),
        (["--learning-rate", "3", "--lr", "3"], "--learning-rate and --lr are one option, given twice$"),
        (["--lr", "3", "--lr", "3"], "--lr is given twice$"),
        (["--image", "3"], "unknown option '--image', did you mean '--image-size'"),
        (["--optimizer", "x"], "unknown option '--optimizer'$"),
        (["--qqq", "3"], "unknown option '--qqq'"),
        (["--height", "3"], "unknown option '--height', did you mean '--image-size'"),
        (["--config", "wrong"], "unknown option 'image_siz', did you mean 'image_size'?"),
        (["--config", "scalar"], r"prompts must be a list, such as \[a\], got 'a' in .*scalar\.yaml"),
        (["--config", "absent"], "no configuration file 'absent'; shipped are scalar, small, wrong"),
        (["--lr", "-1"], "^lr must be a number above 0, got -1$"),
        (["--lr", "x"], "^lr must be a number above 0, got x$"),
        (["--clip-grad", "-1"], "^clip_grad must be a number above 0, got -1$"),
        (["--precision", "fp8"], "^precision must be one of fp32, bf16, fp16, got fp8$"),
        (["--clip", "1"], "unknown option '--clip', did you mean '--clip-grad'"),
        (["--image-size", "3x"], "image_size: expected a side in pixels or HEIGHTxWIDTH, .*got '3x'"),
        (["--prompts", "a", "--prompts", "b"], "--prompts is given twice; a list is written as words"),
        (["--scale", "1"], "--scale: expected 2 arguments"),
        (["--precision", "no"], "precision"),
        (["--npz", "yes"], "'yes'"),
    ],
)
def test_mistakes(words, message, shipped):
    with pytest.raises((ValueError, FileNotFoundError), match=f"^.*{message}"):
        read(*words, shipped=shipped)


def test_what_must_be_given():
    with pytest.raises(ValueError, match="pipeline"):
        parse(Options, [])


def test_round_trips():
    options = read("--image-size", "2x5", "--mean", "0.1", "0.2", "--classes", "1", "cat")
    assert make(Options, to_dict(options)) == options
    assert make(Options, yaml.safe_load(to_yaml(options))) == options
    assert to_dict(options)["image_size"] == "2x5"


@pytest.mark.parametrize(
    "values,message",
    [
        ({"imag": 1}, "unknown option 'imag'"),
        ({"learning_rate": 1}, "unknown option 'learning_rate', did you mean 'lr'?"),
        ({"prompts": None}, "prompts must be a list, got None in the options"),
        ({"mean": 0.5}, r"mean must be a list, such as \[0\.5\], got 0\.5"),
        ({"json": True}, "unknown option 'json'"),
        ({"image_siz": 1}, "unknown option 'image_siz', did you mean 'image_size'?"),
        ({"lr": 0}, "lr must be a number above 0, got 0"),
        ({"lr": float("inf")}, "lr must be a finite number, got inf"),
        ({"scale": [1]}, "scale must be 2 values, got \\[1.0\\]"),
        ({"image_size": True}, "image_size: "),
        ({"image_size": [0, 3]}, "image_size: "),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ValueError, match=message):
        make(Options, {"pipeline": "x", **values})


def test_damaged_files(tmp_path):
    file = tmp_path / "bad.yaml"
    for text, message in (
        (b"- 1\n", "must be a mapping of options, got list"),
        (b"a: [1\n", "is not valid YAML"),
        (b"a: \xff", "bad.yaml is not valid YAML: it must be text in UTF-8"),
        (b"", "bad.yaml must be a mapping of options, it is empty"),
    ):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=message):
            read_config(str(file), None)


def test_sizes_are_values():
    assert ImageSize.parse([3, 4]) == ImageSize(3, 4) != (3, 4)
    assert {ImageSize(3, 4)} == {ImageSize(3, 4)}
    height, width = ImageSize(3, 4)
    assert (height, width, str(ImageSize(3, 4))) == (3, 4, "3x4")


def test_help(capsys):
    parser_of(Options).print_help()
    out = " ".join(capsys.readouterr().out.split())
    assert "--pipeline PIPELINE a folder, or a name" in out
    assert "--npz, --no-npz write 100% of it" in out
    assert "--classes CLASSES [CLASSES ...] numbers or names" in out


@pytest.mark.parametrize("warmup, total, expected", [(5, 300, 5), (100, 100, 10), (6250, 20, 2), (0, 1, 0)])
def test_a_warm_up_is_shorter_than_its_run(warmup, total, expected):
    assert warmup_of(warmup, total) == expected


def test_names_of_other_projects():
    """Are taken on the command line, where a command has the option."""
    read_ = read("--img-size", "32", "--learning_rate=0.5", "--max-grad-norm", "2", "--mixed-precision", "bf16")
    assert (read_.image_size, read_.lr, read_.clip_grad, read_.precision) == (ImageSize(32, 32), 0.5, 2, "bf16")
    assert read("--prompt", "a", "[cat:dog:0.5]").prompts == ["a", "[cat:dog:0.5]"]
