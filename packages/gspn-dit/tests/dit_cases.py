"""What several test files share: a tiny model and a tiny run."""

from typing import Any

import torch

from gspn_dit import GSPNDiTTransformer2DModel

SHAPE: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "num_layers": 2,
    "num_classes": 5,
}


def tiny_model(seed: int = 0, **changes: Any) -> GSPNDiTTransformer2DModel:
    """A model whose output is not zero, as it is after initialisation."""
    torch.manual_seed(seed)
    model = GSPNDiTTransformer2DModel(**{**SHAPE, "drop_path_rate": 0.0, **changes})
    with torch.no_grad():
        for layer in (model.final.modulation, model.final.proj):
            layer.weight.normal_(std=0.1)
    return model.eval()


def inputs(n: int = 2, channels: int = 4, height: int = 8, width: int = 8, seed: int = 1) -> tuple[torch.Tensor, ...]:
    """Latents, times and classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, height, width, generator=generator)
    t = torch.randint(1000, (n,), generator=generator)
    return x, t, torch.randint(5, (n,), generator=generator)


def tiny_run(out: str, **changes: Any) -> dict[str, Any]:
    """Options of a run of 6 updates on digits, with everything random switched on."""
    return {
        "model": "GSPN2-S/2",
        "model_kwargs": {"hidden_size": 16, "num_layers": 2, "proxy_channels": 4, "drop_path_rate": 0.3},
        "data": "digits",
        "out": out,
        "steps": 6,
        "batch_size": 8,
        "lr": 1e-3,
        "warmup_steps": 2,
        "ema_decay": 0.9,
        "workers": 0,
        "checkpoint_every": 3,
        "log_every": 2,
        "sample_every": 3,
        "sample_count": 4,
        "sampler_steps": 2,
        "tensorboard": False,
        "progress": False,
        **changes,
    }
