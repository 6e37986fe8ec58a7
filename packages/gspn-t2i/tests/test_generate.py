"""Drawing prompts: folders, continuation, several processes, and what is refused."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from gspn_t2i import GSPNAdapter, generate
from gspn_t2i.generate import GenerateConfig


def config(pipeline, out, **changes):
    values = {"prompt": "a three", "steps": 2, "progress": False, **changes}
    return GenerateConfig(pipeline=str(pipeline), out=str(out), **values)


def images(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="session")
def adapter_folder(pipeline_folder, tmp_path_factory):
    unet = DiffusionPipeline.from_pretrained(pipeline_folder).unet
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapter")
    GSPNAdapter.for_unet(unet).save_pretrained(folder)
    return str(folder)


def test_a_folder(pipeline_folder, adapter_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a five\n\n  a nine left of a one\n")
    options = {"adapter": adapter_folder, "prompt_file": str(tmp_path / "prompts.txt"), "images_per_prompt": 2}
    made = config(pipeline_folder, tmp_path / "out", **options, height=64, width=128)
    summary = generate.generate(made)
    assert (summary["images"], summary["drawn"]) == (6, 6)
    files = images(tmp_path / "out")
    assert list(files) == [f"{index:06d}.png" for index in range(6)]
    with Image.open(tmp_path / "out" / "000000.png") as image:
        assert image.size == (128, 64)
    # Image 3 is the second of the second prompt, drawn with seed + 3, as diffusers would.
    pipeline = generate.load_pipeline(str(pipeline_folder), adapter_folder, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 128, "num_inference_steps": 2, "guidance_scale": 7.5}
    expected = pipeline("a five", generator=torch.Generator().manual_seed(3), **options).images[0]
    with Image.open(tmp_path / "out" / "000003.png") as image:
        assert (np.asarray(image) == np.asarray(expected)).all()
    (tmp_path / "out" / "000004.png").unlink()
    assert generate.generate(made)["drawn"] == 1
    assert images(tmp_path / "out") == files
    with pytest.raises(ValueError, match="holds other images: seed was 0, is 1; give another folder"):
        generate.generate(GenerateConfig(**{**vars(made), "seed": 1}))


def test_batches(pipeline_folder, tmp_path, monkeypatch):
    options = {"prompt": ["a five", "a nine", "a one"], "images_per_prompt": 2, "negative_prompt": "blur", "steps": 1}
    generate.generate(config(pipeline_folder, tmp_path / "one", **options))
    made = config(pipeline_folder, tmp_path / "out", batch_size=4, **options)
    save, saved = generate.save_png, []

    def save_three(image, path):
        if len(saved) == 3:
            raise OSError("the disk is full")
        saved.append(path.name)
        save(image, path)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "save_png", save_three)
        with pytest.raises(OSError, match="the disk is full"):
            generate.generate(made)
    assert list(images(tmp_path / "out")) == saved == ["000000.png", "000001.png", "000002.png"]
    (tmp_path / "out" / "000001.png").unlink()
    assert generate.generate(made)["drawn"] == 4  # images 1, 3, 4 and 5 are one batch
    for name in images(tmp_path / "one"):
        with Image.open(tmp_path / "one" / name) as one, Image.open(tmp_path / "out" / name) as other:
            # In another batch a level may round otherwise.
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    # Another batch size continues the folder.
    (tmp_path / "out" / "000005.png").unlink()
    assert generate.generate(config(pipeline_folder, tmp_path / "out", batch_size=3, **options))["drawn"] == 1


def test_two_processes_draw_what_one_does(pipeline_folder, tmp_path):
    generate.generate(config(pipeline_folder, tmp_path / "one", images_per_prompt=3))
    file = tmp_path / "options.yaml"
    options = {"pipeline": str(pipeline_folder), "prompt": "a three", "steps": 2, "images_per_prompt": 3}
    file.write_text(yaml.safe_dump(options | {"out": str(tmp_path / "two"), "progress": False}))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    program = tmp_path / "program.py"
    program.write_text(
        "import accelerate\nfrom gspn_t2i import cli\n"
        f"assert cli.main(['generate', '--config', {str(file)!r}]) == 0\n"
        "assert accelerate.PartialState().num_processes == 2\n"
        "import torch\nassert not torch.distributed.is_initialized()\n"  # or its threads may abort the process
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"images": 3') == 1
    for name in ("000000.png", "000001.png", "000002.png"):
        with Image.open(tmp_path / "one" / name) as one, Image.open(tmp_path / "two" / name) as two:
            # With other threads a level may round otherwise.
            assert np.abs(np.asarray(one, int) - np.asarray(two, int)).max() <= 1


def test_large_images_are_decoded_in_tiles(pipeline_folder, tmp_path, monkeypatch):
    tiled = []
    for size, choice in ((64, "auto"), (1032, "auto"), (64, "on"), (1032, "off")):
        made = generate.Generation(config(pipeline_folder, tmp_path, height=size, width=1032, vae_tiling=choice))
        tiled.append(made.pipeline.vae.use_tiling)
    assert tiled == [False, True, True, False]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"prompt": None}, "prompt or prompt_file must be given, got neither"),
        ({"prompt": ["a", " "]}, "prompt must not be empty"),
        ({"prompt_file": "nothing.txt"}, "no prompt file 'nothing.txt'"),
        ({"pipeline": "no/such/pipeline"}, "no pipeline 'no/such/pipeline'"),
        ({"adapter": "no/such/adapter"}, "no adapter 'no/such/adapter'"),
        ({"height": 100}, "height must be a multiple of 8, got 100"),
        ({"width": 63}, "width must be a multiple of 8, got 63"),
        ({"offload": "model"}, "offload needs an accelerator to be useful, got 'model' on the CPU"),
    ],
)
def test_wrong_options(pipeline_folder, changes, message, tmp_path):
    values = vars(config(pipeline_folder, tmp_path / "out")) | changes
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        generate.generate(GenerateConfig(**values))
    assert not (tmp_path / "out").exists()


def test_an_empty_prompt_file(pipeline_folder, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"prompt_file must have a prompt in a line, '.*empty.txt' is empty"):
        generate.generate(config(pipeline_folder, tmp_path / "out", prompt_file=str(tmp_path / "empty.txt")))


@pytest.mark.parametrize(
    "options,advice",
    [
        ({}, "dtype bfloat16, vae_tiling on, offload model"),
        ({"batch_size": 2, "vae_tiling": "on"}, "batch_size 1, dtype bfloat16, offload model"),
    ],
)
def test_out_of_memory_says_what_helps(pipeline_folder, tmp_path, monkeypatch, options, advice):
    made = generate.Generation(config(pipeline_folder, tmp_path / "out", **options))

    def draw(*arguments, **options):
        raise torch.OutOfMemoryError("tried to allocate much")

    monkeypatch.setattr(type(made.pipeline), "__call__", draw)
    with pytest.raises(MemoryError, match=f"what saves some: {advice} "):
        made.run()
    assert not images(tmp_path / "out")
