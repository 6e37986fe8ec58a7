"""Drawing prompts: folders, continuation, several processes, and what is refused."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from t2i_cases import in_two_processes, interrupt, program

from gspn_core.runs.errors import WriteError
from gspn_core.runs.files import locked
from gspn_core.runs.options import ImageSize
from gspn_t2i import GSPNAdapter, cli, generate, pipelines
from gspn_t2i.config import GenerateConfig
from gspn_t2i.pipelines import is_tiled, load_pipeline, own_size


def config(pipeline, out, **changes):
    values = {"prompts": ["a three"], "sampler_steps": 2, "progress": False, **changes}
    return GenerateConfig(pipeline=str(pipeline), out=str(out), **values)


def images(out):
    return {path.name: path.read_bytes() for path in sorted((out / "images").glob("*.png"))}


def levels(file):
    with Image.open(file) as image:
        return np.asarray(image, int)


def test_a_folder(pipeline_folder, adapter_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a five\n\n  a nine left of a one\n")
    options = {"adapter": adapter_folder, "prompt_file": str(tmp_path / "prompts.txt"), "images_per_prompt": 2}
    drawing = config(pipeline_folder, tmp_path / "out", **options, image_size=ImageSize(64, 128))
    result = generate.generate(drawing)
    assert (result["images"], result["drawn"]) == (6, 6)
    files = images(tmp_path / "out")
    assert list(files) == [f"{index:06d}.png" for index in range(6)]
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["image_size"] == "64x128"
    # Image 3 is the second of the second prompt, drawn with seed + 3, as diffusers would.
    pipeline = load_pipeline(str(pipeline_folder), adapter_folder, torch.float32)
    assert own_size(pipeline) == ImageSize(64, 64)
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 128, "num_inference_steps": 2, "guidance_scale": 7.5}
    expected = pipeline("a five", generator=torch.Generator().manual_seed(3), **options).images[0]
    assert (levels(tmp_path / "out" / "images" / "000003.png") == np.asarray(expected)).all()
    (tmp_path / "out" / "images" / "000004.png").unlink()
    assert generate.generate(drawing)["drawn"] == 1
    assert images(tmp_path / "out") == files
    with pytest.raises(ValueError, match="results of other settings: seed was 0, is 1; give another folder"):
        generate.generate(GenerateConfig(**{**vars(drawing), "seed": 1}))


def test_a_folder_grows(sd15, tmp_path):
    """By prompts, or by images of one prompt; not to other images or fewer."""
    first = config(sd15, tmp_path / "out", prompts=["a five", "a nine"], sampler_steps=1)
    generate.generate(first)
    files = images(tmp_path / "out")
    more = config(sd15, tmp_path / "out", prompts=["a five", "a nine", "a one"], sampler_steps=1)
    assert generate.generate(more)["drawn"] == 1
    assert {name: images(tmp_path / "out")[name] for name in files} == files
    for changes in ({"prompts": ["a five", "a one"]}, {"images_per_prompt": 2}, {}):
        other = GenerateConfig(**{**vars(first), **changes})
        with pytest.raises(
            ValueError, match=r"prompts must begin with what the 3 results in .* were made of, got others"
        ):
            generate.generate(other)
    one = {"prompts": ["a five"], "sampler_steps": 1}
    assert generate.generate(config(sd15, tmp_path / "one", **one))["drawn"] == 1
    assert generate.generate(config(sd15, tmp_path / "one", **one, images_per_prompt=2))["drawn"] == 1


@pytest.mark.parametrize("command", ["generate", "upscale"])
def test_other_weights_in_the_same_place(sd15, tmp_path, command, capsys):
    """Are told from those that images were drawn with; the same weights may be moved. Another process is refused."""
    adapter = GSPNAdapter.for_unet(DiffusionPipeline.from_pretrained(sd15).unet)
    adapter.save_pretrained(tmp_path / "adapter")
    words = [command, "--pipeline", str(sd15), "--out", str(tmp_path / "out"), "--sampler-steps", "3", "--no-progress"]
    words += ["--prompts", "a five"] if command == "generate" else ["--prompt", "a five", "--scale", "2"]
    name = ["--adapter", str(tmp_path / "adapter")]
    with locked(tmp_path / "out"):
        assert cli.main([*words, *name]) == 2
    assert "is being written by process" in capsys.readouterr().err
    assert cli.main([*words, *name]) == 0
    shutil.copytree(tmp_path / "adapter", tmp_path / "moved")
    with torch.no_grad():
        next(adapter.parameters()).add_(1)
    adapter.save_pretrained(tmp_path / "adapter")
    assert cli.main([*words, *name]) == 2
    assert "results of other settings: weights_sha256 was" in capsys.readouterr().err
    assert cli.main([*words, "--adapter", str(tmp_path / "moved"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["drawn"] == 0


def test_half_precision_where_there_is_an_accelerator(sd15, tmp_path, monkeypatch):
    assert pipelines.precision_of(config(sd15, tmp_path)) == "fp32"
    monkeypatch.setattr(pipelines, "use_cpu", lambda device: device == "cpu")
    assert pipelines.precision_of(config(sd15, tmp_path)) == "fp16"
    assert pipelines.precision_of(config(sd15, tmp_path, device="cpu")) == "fp32"
    assert pipelines.precision_of(config(sd15, tmp_path, precision="bf16")) == "bf16"


def test_the_bar_shows_steps(sd15, tmp_path, capsys):
    drawing = config(sd15, tmp_path / "out", sampler_steps=3, progress=True)
    generate.generate(drawing)
    shown = capsys.readouterr().err
    assert "step 1 of 3" in shown and "step 3 of 3" in shown and "1/1" in shown


def test_batches(sd15, tmp_path, monkeypatch):
    options = {"prompts": ["a five", "a nine", "a one"], "images_per_prompt": 2, "negative_prompt": "blur"}
    options |= {"sampler_steps": 1}
    generate.generate(config(sd15, tmp_path / "one", **options))
    drawing = config(sd15, tmp_path / "out", batch_size=4, **options)
    save, saved = generate.save_png, []

    def save_three(image, path):
        if len(saved) == 3:
            raise WriteError("the disk is full")
        saved.append(path.name)
        save(image, path)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "save_png", save_three)
        with pytest.raises(WriteError, match="the disk is full"):
            generate.generate(drawing)
    assert list(images(tmp_path / "out")) == saved == ["000000.png", "000001.png", "000002.png"]
    (tmp_path / "out" / "images" / "000001.png").unlink()
    assert generate.generate(drawing)["drawn"] == 4  # images 1, 3, 4 and 5 are one batch
    for name in images(tmp_path / "one"):
        one, other = (levels(tmp_path / run / "images" / name) for run in ("one", "out"))
        assert np.abs(one - other).max() <= 1  # in another batch a level may round otherwise
    # Another batch size continues the folder.
    (tmp_path / "out" / "images" / "000005.png").unlink()
    assert generate.generate(config(sd15, tmp_path / "out", batch_size=3, **options))["drawn"] == 1


def test_two_processes_draw_what_one_does(sd15, tmp_path):
    generate.generate(config(sd15, tmp_path / "one", images_per_prompt=3))
    file = tmp_path / "options.yaml"
    options = {"pipeline": str(sd15), "prompts": ["a three"], "sampler_steps": 2, "images_per_prompt": 3}
    file.write_text(yaml.safe_dump(options | {"out": str(tmp_path / "two"), "progress": False}))
    (tmp_path / "program.py").write_text(
        "import accelerate\nfrom gspn_t2i import cli\n"
        f"assert cli.main(['generate', '--json', '--config', {str(file)!r}]) == 0\n"
        "assert accelerate.PartialState().num_processes == 2\n"
        "import torch\nassert not torch.distributed.is_initialized()\n"  # its threads can abort interpreter exit
    )
    done = in_two_processes(tmp_path / "program.py")
    result = json.loads(done.stdout)  # of one process alone
    assert (result["images"], result["drawn"]) == (3, 3)
    for name in ("000000.png", "000001.png", "000002.png"):
        one, two = (levels(tmp_path / run / "images" / name) for run in ("one", "two"))
        assert np.abs(one - two).max() <= 1  # with other threads a level may round otherwise


def test_ctrl_c(sd15, tmp_path):
    """One line and status 130; the images that are there are whole."""
    words = ("--pipeline", sd15, "--prompts", "a three", "--sampler-steps", 1, "--images-per-prompt", 100_000)
    command = program("generate", *words, "--out", tmp_path / "out", "--no-progress")
    status, errors = interrupt(command, lambda: bool(images(tmp_path / "out")), signal.SIGINT)
    assert (status, errors) == (130, "gspn-t2i: interrupted; run the same command again to continue\n")
    for name in images(tmp_path / "out"):
        assert levels(tmp_path / "out" / "images" / name).shape == (64, 64, 3)


def test_a_full_disk(sd15, tmp_path, monkeypatch, capsys):
    def full(self, path, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    words = ("--pipeline", str(sd15), "--prompts", "a three", "--sampler-steps", "1", "--no-progress")
    assert cli.main(["generate", *words, "--out", str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("gspn-t2i: error: cannot write ") and "No space left" in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    "side,choice,tiled", [(1024, "auto", False), (1032, "auto", True), (64, "always", True), (1032, "never", False)]
)
def test_large_images_are_decoded_in_tiles(side, choice, tiled):
    assert is_tiled(choice, ImageSize(side, 1024)) == tiled


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"prompts": []}, "prompts or prompt_file must be set, got neither"),
        ({"prompts": ["a", " "]}, "prompts must not be empty"),
        ({"prompt_file": "nothing.txt"}, "no prompt file 'nothing.txt'"),
        ({"pipeline": "no/such/pipeline"}, "no pipeline 'no/such/pipeline'"),
        ({"adapter": "no/such/adapter"}, "no adapter 'no/such/adapter'"),
        ({"image_size": ImageSize(100, 64)}, "image_size must be multiples of 8, got 100x64"),
        ({"offload": "model"}, "offload needs an accelerator to be useful, got 'model' on the CPU"),
    ],
)
def test_wrong_options(sd15, changes, message, tmp_path):
    values = vars(config(sd15, tmp_path / "out")) | changes
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        generate.generate(GenerateConfig(**values))
    assert not (tmp_path / "out").exists()


def test_an_empty_prompt_file(sd15, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"prompt_file must have a prompt in a line, '.*empty.txt' is empty"):
        generate.generate(config(sd15, tmp_path / "out", prompt_file=str(tmp_path / "empty.txt")))


@pytest.mark.parametrize(
    "options,advice",
    [
        ({}, "--precision bf16, --vae-tiling always"),
        ({"batch_size": 2, "vae_tiling": "always"}, "--batch-size 1, --precision bf16"),
    ],
)
def test_out_of_memory_says_what_helps(sd15, tmp_path, monkeypatch, options, advice):
    generation = generate.Generation(config(sd15, tmp_path / "out", **options))
    assert generation.pipeline.vae.use_tiling == ("vae_tiling" in options)

    def draw(*arguments, **options):
        raise torch.OutOfMemoryError("tried to allocate much")

    monkeypatch.setattr(type(generation.pipeline), "__call__", draw)
    with pytest.raises(MemoryError, match=rf"what saves some: {advice} \("):
        generation.run()
    assert not images(tmp_path / "out")
