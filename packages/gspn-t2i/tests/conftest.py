import os

# Waiting threads that spin slow each other down many times on a machine that does something else too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # fail at once, where a test names what does not exist

import json
import signal

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from sklearn.datasets import load_digits

from gspn_t2i import GSPNAdapter, tiny

torch.set_num_threads(1)  # the models are too small for more
# Some tests interrupt programs, which would ignore that where a shell has started the tests in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="session")
def sd15(tmp_path_factory):
    """The folder of a tiny pipeline. Not to be changed."""
    return tiny.write("sd15", tmp_path_factory.mktemp("pipelines") / "sd15")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """The folder of a tiny pipeline. Not to be changed."""
    return tiny.write("sdxl", tmp_path_factory.mktemp("pipelines") / "sdxl")


@pytest.fixture(scope="session", params=tiny.FAMILIES)
def pipeline_folder(request):
    """The folder of a tiny pipeline of each family. Not to be changed."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def adapter_folder(pipeline_folder, tmp_path_factory):
    """The folder of an untrained adapter for `pipeline_folder`."""
    unet = DiffusionPipeline.from_pretrained(pipeline_folder).unet
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapter")
    GSPNAdapter.for_unet(unet).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder of forty digits with captions, 64 pixels wide and 32 high. Not to be changed."""
    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    with (folder / "metadata.jsonl").open("w") as file:
        for index in range(40):
            pixels = np.round(data.images[index] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).resize((64, 32)).save(folder / f"{index}.png")
            row = {"file_name": f"{index}.png", "text": f"a handwritten {NAMES[data.target[index]]}"}
            file.write(json.dumps(row) + "\n")
    return folder
