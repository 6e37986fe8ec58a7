"""Model cards: README.md beside every saved model, in the format of the Hugging Face Hub.

A card says what the model is, how it was made, with which options and figures, and how to load it. It names no path of
the machine: of a folder or file among the options its last part alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData

from .options import to_dict

CARD = "README.md"


class Figure(NamedTuple):
    """A figure of a model: what it is, of which data, its name for the Hub ("accuracy"), and its value."""

    name: str
    data: str
    metric: str
    value: float


def short(value: Any) -> Any:
    """Return an option as a card shows it: of a path that exists its last part."""
    if isinstance(value, str) and ("/" in value or "\\" in value) and Path(value).exists():
        return Path(value).name
    if isinstance(value, list):
        return [short(item) for item in value]
    return value


def options_of(config: Any) -> str:
    """Return, as YAML, the options of a configuration that differ from their defaults, but `out`."""
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    changed = {
        name: short(value)
        for name, value in to_dict(config).items()
        if name != "out" and (name not in defaults or defaults[name] != getattr(config, name))
    }
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True, width=1000) if changed else ""


def model_card(
    title: str,
    summary: str,
    *,
    made_by: str,
    config: Any,
    usage: str,
    library: str,
    task: str,
    tags: Sequence[str] = (),
    figures: Sequence[Figure] = (),
    versions: Mapping[str, str] | None = None,
) -> str:
    """Return a card.

    Args:
        title: of the model.
        summary: what it is, a sentence or more.
        made_by: the command, such as "gspn-vision train".
        config: its options, a dataclass.
        usage: how the model is loaded, Python.
        library: that loads it, as the Hub names it, such as "timm".
        task: as the Hub names it, such as "image-classification".
        tags: for the Hub, beside "gspn".
        figures: measured on the model.
        versions: of packages, beside torch.
    """
    results = [
        EvalResult(
            task_type=task,
            dataset_type=figure.data,
            dataset_name=figure.data,
            metric_type=figure.metric,
            metric_name=figure.name,
            metric_value=figure.value,
        )
        for figure in figures
    ]
    header = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        tags=["gspn", *tags],
        model_name=title,
        eval_results=results or None,
    ).to_yaml()
    made = {"torch": torch.__version__, **(versions or {})}
    with_versions = ", ".join(f"{name} {version}" for name, version in made.items())
    lines = [
        "---",
        header.strip(),
        "---",
        "",
        f"# {title}",
        "",
        summary,
        "",
        "## Use",
        "",
        "```python",
        usage,
        "```",
        "",
    ]
    lines += [
        "## How it was made",
        "",
        f"By `{made_by}` on {datetime.now(timezone.utc):%Y-%m-%d}, with {with_versions}.",
    ]
    options = options_of(config)
    lines += ["These options differ from the defaults:", "", "```yaml", options.strip(), "```", ""] if options else [""]
    if figures:
        lines += ["## Figures", "", "| figure | data | value |", "|---|---|---|"]
        lines += [f"| {figure.name} | {figure.data} | {figure.value:.6g} |" for figure in figures]
        lines.append("")
    return "\n".join(lines)
