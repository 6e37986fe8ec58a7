"""What the documentation states twice agrees with the code: no build is needed."""

import importlib
import re

import timm
import yaml
from snippets import ROOT

from gspn_core import _install

DOCS = ROOT / "docs"
PACKAGES = ("gspn_core", "gspn_vision", "gspn_dit", "gspn_t2i")


def test_the_table_of_installing_is_that_of_gspn_core_info():
    assert _install.as_markdown() in (DOCS / "install.md").read_text(encoding="utf-8"), _install.as_markdown()


def documented():
    """Return the names of the API reference, with members that a page names."""
    names = set()
    for page in DOCS.glob("api/*.md"):
        text = page.read_text(encoding="utf-8")
        for name, members in re.findall(
            r"^::: ([\w.]+)(?:\n    options:\n      members: \[(.*)\])?", text, re.MULTILINE
        ):
            names |= {name, *(f"{name}.{member.strip()}" for member in members.split(",") if member)}
    return names


def test_everything_public_is_in_the_reference():
    names, missing = documented(), []
    modules = [*PACKAGES, "gspn_vision.foundation", "gspn_vision.models"]
    objects = {id(lookup(name)) for name in names}
    for module in map(importlib.import_module, modules):
        public = [name for name in module.__all__ if name != "__version__"]
        missing += [f"{module.__name__}.{name}" for name in public if id(getattr(module, name)) not in objects]
    assert missing == []


def lookup(name):
    """Return what a dotted name of the reference is; an error if there is no such thing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def test_every_timm_model_is_named():
    import gspn_vision  # noqa: F401  (registers them)

    text = (DOCS / "api" / "vision.md").read_text(encoding="utf-8")
    table = text.partition("## timm models")[2].partition("```")[0]
    ours = {name for name in timm.list_models() if name.startswith(("gspn", "cgspn"))}
    assert len(ours) > 8 and set(re.findall(r"`(c?gspn\w*)`", table)) == ours


def pages(nav):
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from [value] if isinstance(value, str) else pages(value)


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = sorted(pages(config["nav"]))
    assert named == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_images_are_small():
    images = [path for path in DOCS.rglob("*") if path.suffix in (".png", ".jpg", ".svg")]
    assert len(images) >= 4 and sum(path.stat().st_size for path in images) < 400_000
    text = "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    assert [path.name for path in images if path.name not in text] == []


def test_what_is_cited_has_the_version_of_the_packages():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == importlib.import_module("gspn_core").__version__
    assert citation["license"] == "Apache-2.0"
    identifiers = {reference["title"]: reference["identifiers"] for reference in citation["references"]}
    assert len(identifiers) == 3 and all(entry[0]["value"].startswith("arXiv:") for entry in identifiers.values())


def test_forms_for_issues_are_complete():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yml") if path.stem != "config"]
    assert len(forms) == 2
    for form in forms:
        assert {"name", "description", "body"} <= set(form)
        assert all(
            field["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes") for field in form["body"]
        )
