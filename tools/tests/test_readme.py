"""Every Python example of a README runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples():
    for file in (ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md"))):
        text = file.read_text()
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 2
            yield pytest.param(file, line, match[1], id=f"{file.relative_to(ROOT)}:{line}")


@pytest.mark.parametrize("file, line, code", list(examples()))
def test_example_runs(file, line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    padded = "\n" * (line - 1) + code  # so that a traceback names the README's own line
    exec(compile(padded, str(file), "exec"), {"__name__": "__main__"})


def test_the_readme_shows_operator_module_and_model():
    code = "\n".join(BLOCK.findall((ROOT / "README.md").read_text()))
    assert all(name in code for name in ("propagate(", "SpatialPropagation(", "timm.create_model("))


def test_links_lead_to_files():
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("packages/*/README.md")):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", file.read_text()):
            if "://" not in target:
                assert (file.parent / target).exists(), f"{file.relative_to(ROOT)} links to {target}"
