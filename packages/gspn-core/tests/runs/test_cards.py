"""Model cards: the Hub reads them, and they tell no path of the machine."""

import dataclasses
from pathlib import Path

import torch
from huggingface_hub import ModelCard

from gspn_core.runs.cards import Figure, model_card, options_of, short


@dataclasses.dataclass(kw_only=True, frozen=True)
class Options:
    """Options of a run."""

    data: str
    lr: float = 0.1
    names: list[str] = dataclasses.field(default_factory=list)
    out: str | None = None


def test_the_hub_reads_a_card(tmp_path: Path) -> None:
    data = tmp_path / "secret" / "photos"
    data.mkdir(parents=True)
    figures = [Figure("top-1 (%)", "photos, val", "accuracy", 97.5)]
    text = model_card(
        "a-model",
        "A model.",
        made_by="gspn-vision train",
        config=Options(data=str(data), lr=0.2, out=str(tmp_path)),
        usage="import timm",
        library="timm",
        task="image-classification",
        tags=["timm"],
        figures=figures,
        versions={"timm": "1.0"},
    )
    assert str(tmp_path) not in text
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    assert card.data.tags == ["gspn", "timm"] and card.data.model_name == "a-model"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 97.5, "photos, val")
    assert "```yaml\ndata: photos\nlr: 0.2\n```" in card.text
    assert "`gspn-vision train` on " in card.text and f"torch {torch.__version__}, timm 1.0" in card.text
    assert "| top-1 (%) | photos, val | 97.5 |" in card.text


def test_a_card_without_figures_or_options(tmp_path: Path) -> None:
    config = dataclasses.replace(Options(data="x"), data="digits")
    text = model_card("m", "M.", made_by="x", config=config, usage="", library="timm", task="image-classification")
    card = ModelCard(text)
    assert not card.data.eval_results and "## Figures" not in text
    assert options_of(config) == "data: digits\n"


def test_paths_are_shortened_where_they_exist(tmp_path: Path) -> None:
    assert short(str(tmp_path)) == tmp_path.name
    assert short("torch/cifar10") == "torch/cifar10"
    assert short(["a", str(tmp_path)]) == ["a", tmp_path.name]
    assert short(3) == 3
