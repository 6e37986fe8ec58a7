"""CONTRIBUTING names every session of nox."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_session_is_listed():
    sessions = re.findall(r"@nox\.session\([^)]*\)\ndef (\w+)\(", (ROOT / "noxfile.py").read_text(encoding="utf-8"))
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(sessions) > 10
    assert [name for name in sessions if f"`python3 -m nox -s {name}`" not in text] == []
