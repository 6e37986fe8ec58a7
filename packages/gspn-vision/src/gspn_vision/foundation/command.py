"""`gspn-vision convert`: a timm folder of a converted model, whose mixers are still random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.data import resolve_model_data_config

from gspn_core.runs.files import read_json

from ..checkpoint import CONFIG, load_model, locate, timm_config, write_model
from ..config import ConvertConfig
from ..data import Preprocessing
from ..models import build_model
from .build import CONVERSION, NAME
from .convert import blocks, convert, mixers


def run(config: ConvertConfig) -> dict[str, Any]:
    """Convert as configured.

    Raises:
        ValueError: neither a model nor a checkpoint is given, or both; or as `convert`.
    """
    if (config.model is None) == (config.checkpoint is None):
        raise ValueError(f"give either model or checkpoint, got {'neither' if config.model is None else 'both'}")
    wrong = sorted(set(config.mixer_kwargs) - set(CONVERSION[1:]))
    if wrong:
        raise ValueError(f"mixer_kwargs must be of {', '.join(CONVERSION[1:])}, got {', '.join(wrong)}")
    if config.checkpoint is not None:
        loaded = load_model(config.checkpoint, which=config.which, weights=config.weights)
        path = Path(config.checkpoint)
        folder = path.parent if path.is_file() else locate(path, config.which)
        base, kwargs = loaded.name, read_json(folder / CONFIG).get("model_args") or {}
        model: Any = loaded.model
        preprocessing, names = loaded.preprocessing, loaded.class_names
    else:
        base, kwargs = str(config.model), config.model_kwargs
        model = build_model(base, kwargs, pretrained=config.pretrained)
        data = resolve_model_data_config(model)
        channels, *size = data["input_size"]
        preprocessing = Preprocessing.from_timm({**model.pretrained_cfg, **data, "input_size": (channels, *size)})
        names = [str(number) for number in range(model.num_classes)]
    before = sum(p.numel() for p in model.parameters())
    convert(model, keep=config.keep, **config.mixer_kwargs)
    model.pretrained_cfg["architecture"] = NAME
    args = {**kwargs, "base": base, "keep": config.keep, **config.mixer_kwargs}
    write_model(Path(config.out), timm_config(model, args, names, preprocessing), model.state_dict())
    replaced = list(mixers(model))
    return {
        "out": config.out,
        "replaced": replaced,
        "kept": [f"{name}.attn" for name in blocks(model) if f"{name}.attn" not in replaced],
        "parameters_before": before,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def as_text(result: dict[str, Any]) -> str:
    """Return the result as readable lines."""
    return "\n".join(
        (
            f"replaced    {', '.join(result['replaced']) or 'none'}",
            f"kept        {', '.join(result['kept']) or 'none'}",
            f"parameters  {result['parameters_before']:,} before, {result['parameters']:,} now",
            f"{result['out']}: the mixers are random, train or distil them",
        )
    )
