import os

# Waiting threads that spin slow each other down many times on a machine that does something else too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # at once, where a test names what is not there

import pytest
import torch

from gspn_t2i import tiny

torch.set_num_threads(1)  # the models are too small for more


@pytest.fixture(scope="session", params=tiny.FAMILIES)
def pipeline_folder(request, tmp_path_factory):
    """A tiny pipeline of each family. Not to be changed."""
    return tiny.write(request.param, tmp_path_factory.mktemp("pipelines") / request.param)
