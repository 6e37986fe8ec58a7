"""`gspn-vision convert`: a timm folder of a converted model, whose mixers are still random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gspn_core.runs.files import check_replaceable

from ..checkpoint import MODEL_FILES, card_of, write_model
from ..config import ConvertConfig
from .convert import blocks, mixers
from .vision import converted, open_model


def run(config: ConvertConfig) -> dict[str, Any]:
    """Convert as configured.

    Raises:
        ValueError, FileNotFoundError: as `convert`, or as `open_model`.
    """
    out = Path(config.out)
    check_replaceable(out, MODEL_FILES)
    vision = open_model(config)
    before = sum(p.numel() for p in vision.model.parameters())
    vision = converted(vision, config.kept(), config.mixer_kwargs)
    replaced = list(mixers(vision.model))
    about = f"Its mixers ({', '.join(replaced) or 'none'}) are random, all other weights those of the model before."
    card = card_of(vision.model, vision.name, "convert", config, about)
    write_model(out, vision.config(), vision.model.state_dict(), card)
    return {
        "out": config.out,
        "replaced": replaced,
        "kept": [f"{name}.attn" for name in blocks(vision.model) if f"{name}.attn" not in replaced],
        "parameters_before": before,
        "parameters": sum(p.numel() for p in vision.model.parameters()),
    }


def as_text(result: dict[str, Any]) -> str:
    """Return the result as readable lines."""
    return "\n".join(
        (
            f"replaced    {', '.join(result['replaced']) or 'none'}",
            f"kept        {', '.join(result['kept']) or 'none'}",
            f"parameters  {result['parameters_before']:,} before, {result['parameters']:,} now",
            f"{result['out']}: the mixers are random, distil them with gspn-vision distill --start-from",
        )
    )
