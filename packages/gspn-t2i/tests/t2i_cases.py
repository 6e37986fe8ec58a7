"""What several test files share: tiny UNets of the two families, their inputs, options, and processes."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from gspn_core.runs.options import make
from gspn_t2i.config import DistillConfig
from gspn_t2i.tiny import make_unet


def _unet(family: str, seed: int, changes: dict[str, Any]) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return make_unet(family, **changes)


def sd_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A tiny UNet as of SD 1.5."""
    return _unet("sd15", seed, changes)


def sdxl_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A tiny UNet as of SDXL."""
    return _unet("sdxl", seed, changes)


UNETS = {"sd15": sd_unet, "sdxl": sdxl_unet}


def inputs(unet: UNet2DConditionModel, height: int = 8, width: int = 8, n: int = 2) -> dict[str, Any]:
    """What the UNet is called with."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    values: dict[str, Any] = {
        "sample": randn(n, 4, height, width),
        "timestep": torch.full((n,), 500),
        "encoder_hidden_states": randn(n, 7, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(n, -1)
        values["added_cond_kwargs"] = {"text_embeds": randn(n, 40), "time_ids": ids}
    return values


def run(unet: UNet2DConditionModel, **size: int) -> torch.Tensor:
    with torch.no_grad():
        return unet(**inputs(unet, **size)).sample


def same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal, bit for bit."""
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def distill_options(pipeline: Any, data: Any, out: Any, /, **changes: Any) -> dict[str, Any]:
    """Options of a short distillation, as of a YAML file."""
    values: dict[str, Any] = {"pipeline": str(pipeline), "data": str(data), "out": str(out), "image_size": "32x64"}
    values |= {"steps": 6, "warmup_steps": 2, "batch_size": 4, "workers": 0, "log_every": 2, "checkpoint_every": 3}
    values |= {"sample_every": None, "ema_decay": 0.9, "lr": 1e-3, "progress": False, "tensorboard": False}
    return values | changes


def distill_config(pipeline: Any, data: Any, out: Any, /, **changes: Any) -> DistillConfig:
    """The same as a dataclass."""
    return make(DistillConfig, distill_options(pipeline, data, out, **changes))


def environment() -> dict[str, str]:
    """Environment variables of a process of ours: the last bits of sums depend on the threads."""
    return os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def program(*words: Any) -> list[str]:
    """A command line of gspn-t2i, in a process of its own."""
    return [sys.executable, "-m", "gspn_t2i.cli", *map(str, words)]


def in_two_processes(*words: Any) -> subprocess.CompletedProcess[str]:
    """Run a command line of Python in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, *map(str, words)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def interrupt(command: list[str], begun: Callable[[], bool], number: int) -> tuple[int, str]:
    """Start a command, send its processes a signal when it has begun, and return its status and standard error."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and not begun():
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors
