"""Check that the packages of this repository have one version and pin each other to it.

    python tools/check_versions.py                  check, exit status 1 with one line per fault
    python tools/check_versions.py --set 0.2.0      write that version wherever one stands

Looked at are `packages/*/pyproject.toml` (`version`, and dependencies between our packages, which must be
`name==version`), `__version__` where a module writes it out, the README files (`name==version`), and CHANGELOG.md,
whose newest section must be that version's.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_NUMBER = r"\d+\.\d+\.\d+(?:(?:a|b|rc|\.dev)\d+)?"
_VERSION_LINE = re.compile(rf'^version = "({_NUMBER})"$', re.MULTILINE)
_MODULE_VERSION = re.compile(rf'^__version__ = "({_NUMBER})"$', re.MULTILINE)
_SECTION = re.compile(rf"^## \[({_NUMBER})\]", re.MULTILINE)


def packages(root: Path) -> dict[str, Path]:
    """Return the pyproject.toml of every package by its name."""
    return {path.parent.name: path for path in sorted(root.glob("packages/*/pyproject.toml"))}


def _requirement(names: list[str]) -> re.Pattern[str]:
    """Match a quoted dependency on one of ours: name, extras, and whatever constrains its version."""
    return re.compile(rf'"({"|".join(map(re.escape, names))})(\[[^\]]*\])?\s*([^"\s;]*[^";]*)[";]')


def _mention(names: list[str]) -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join(map(re.escape, names))})(\[[^\]]*\])?==({_NUMBER})")


def _modules(root: Path) -> list[Path]:
    return sorted(root.glob("packages/*/src/*/__init__.py"))


def _texts(root: Path) -> list[Path]:
    return [path for path in (root / "README.md", *sorted(root.glob("packages/*/README.md"))) if path.exists()]


def check(root: Path) -> list[str]:
    """Return a line for each fault."""
    files = packages(root)
    if not files:
        return [f"{root}: no packages/*/pyproject.toml"]
    names = list(files)
    faults: list[str] = []
    version: str | None = None
    for name, file in files.items():
        text, where = file.read_text(), file.relative_to(root)
        declared = _VERSION_LINE.findall(text)
        if len(declared) != 1:
            faults.append(f'{where}: one line of the form version = "1.2.3" is needed, found {len(declared)}')
            continue
        version = version or declared[0]
        if declared[0] != version:
            faults.append(f"{where}: version {declared[0]}, but {names[0]} has {version}")
        if f'name = "{name}"' not in text:
            faults.append(f"{where}: the package must be called {name}, as its folder is")
        dependencies = text.replace(f'name = "{name}"', "")
        for other, _, constraint in _requirement(names).findall(dependencies):
            if constraint.strip() != f"=={version}":
                faults.append(f"{where}: {other} must be pinned as {other}=={version}, got {other}{constraint}")
    if version is None:
        return faults
    for file in _texts(root):
        for name, _, mentioned in _mention(names).findall(file.read_text()):
            if mentioned != version:
                faults.append(f"{file.relative_to(root)}: names {name}=={mentioned}, the version is {version}")
    for file in _modules(root):
        for written in _MODULE_VERSION.findall(file.read_text()):
            if written != version:
                faults.append(f"{file.relative_to(root)}: __version__ is {written}, the version is {version}")
    changelog = root / "CHANGELOG.md"
    sections = _SECTION.findall(changelog.read_text()) if changelog.exists() else []
    if not sections or sections[0] != version:
        newest = sections[0] if sections else "none"
        faults.append(f"CHANGELOG.md: its newest section must be [{version}], got {newest}")
    return faults


def set_version(root: Path, version: str) -> list[Path]:
    """Write the version everywhere; return the files that changed. The newest section of CHANGELOG.md is renamed
    only where it is unreleased; after a release, add a section by hand first.
    """
    files = packages(root)
    names = list(files)
    changed = []
    for file in (*files.values(), *_modules(root), *_texts(root), root / "CHANGELOG.md"):
        if not file.exists():
            continue
        text = file.read_text()
        new = _mention(names).sub(lambda match: f"{match[1]}{match[2] or ''}=={version}", text)
        if file.name == "pyproject.toml":
            new = _VERSION_LINE.sub(f'version = "{version}"', new)
        elif file.suffix == ".py":
            new = _MODULE_VERSION.sub(f'__version__ = "{version}"', text)
        elif file.name == "CHANGELOG.md":
            new = re.sub(rf"^## \[{_NUMBER}\] - unreleased$", f"## [{version}] - unreleased", text, count=1, flags=re.M)
        if new != text:
            file.write_text(new)
            changed.append(file)
    return changed


def main(argv: list[str] | None = None) -> int:
    """Check or set the version."""
    parser = argparse.ArgumentParser(description="Check that all packages have one version and pin each other to it.")
    parser.add_argument("--set", metavar="X.Y.Z", dest="version", help="write this version wherever one stands")
    args = parser.parse_args(argv)
    if args.version is not None:
        if not re.fullmatch(_NUMBER, args.version):
            parser.error(f"--set must be a version such as 1.2.3, 1.2.3rc1 or 1.2.3.dev1, got {args.version!r}")
        for file in set_version(ROOT, args.version):
            print(f"wrote {file.relative_to(ROOT)}")
    faults = check(ROOT)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
