"""tools/check_versions.py on a small repository of its own."""

import importlib.util
from pathlib import Path

import pytest

CORE, VISION = "packages/gspn-core/pyproject.toml", "packages/gspn-vision/pyproject.toml"

_spec = importlib.util.spec_from_file_location("check_versions", Path(__file__).parents[1] / "check_versions.py")
assert _spec is not None
assert _spec.loader is not None
check_versions = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_versions)


def project(name, *dependencies):
    lines = "".join(f'  "{dependency}",\n' for dependency in dependencies)
    return f'[project]\nname = "{name}"\nversion = "0.1.0"\ndependencies = [\n{lines}]\n'


@pytest.fixture
def repository(tmp_path):
    core, vision = tmp_path / "packages/gspn-core", tmp_path / "packages/gspn-vision"
    core.mkdir(parents=True)
    vision.mkdir()
    (core / "pyproject.toml").write_text(project("gspn-core", "torch>=2.11"))
    (vision / "pyproject.toml").write_text(project("gspn-vision", "gspn-core==0.1.0", "timm>=1.0"))
    (vision / "src/gspn_vision").mkdir(parents=True)
    (vision / "src/gspn_vision/__init__.py").write_text('__version__ = "0.1.0"\n')
    (tmp_path / "README.md").write_text("pip install gspn-core==0.1.0 or packages/gspn-core\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [0.1.0] - unreleased\n\n- gspn-core==0.0.9 was private\n")
    return tmp_path


def replace(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_agreement_has_no_faults(repository):
    assert check_versions.check(repository) == []


@pytest.mark.parametrize(
    "file, old, new, fault",
    [
        (VISION, 'version = "0.1.0"', 'version = "0.2.0"', "version 0.2.0, but gspn-core has 0.1.0"),
        (VISION, "gspn-core==0.1.0", "gspn-core>=0.1.0", "must be pinned as gspn-core==0.1.0"),
        (VISION, "gspn-core==0.1.0", "gspn-core", "must be pinned as gspn-core==0.1.0"),
        (VISION, "gspn-core==0.1.0", "gspn-core==0.0.9", "got gspn-core==0.0.9"),
        (CORE, 'version = "0.1.0"', 'dynamic = ["version"]', "found 0"),
        (CORE, 'name = "gspn-core"', 'name = "gspn"', "must be called gspn-core"),
        ("packages/gspn-vision/src/gspn_vision/__init__.py", "0.1.0", "0.0.9", "__version__ is 0.0.9"),
        ("README.md", "gspn-core==0.1.0", "gspn-core==0.0.9", "names gspn-core==0.0.9"),
        ("CHANGELOG.md", "[0.1.0]", "[0.0.9]", "newest section must be [0.1.0], got 0.0.9"),
    ],
)
def test_each_fault_is_named(repository, file, old, new, fault):
    replace(repository / file, old, new)
    faults = check_versions.check(repository)
    assert len(faults) >= 1
    assert any(line.startswith(file) and fault in line for line in faults)


def test_setting_a_version_writes_it_everywhere(repository):
    changed = check_versions.set_version(repository, "0.2.0rc1")
    assert len(changed) == 5
    assert check_versions.check(repository) == []
    assert '"gspn-core==0.2.0rc1"' in (repository / "packages/gspn-vision/pyproject.toml").read_text()
    assert "gspn-core==0.0.9 was private" in (repository / "CHANGELOG.md").read_text()
    assert check_versions.set_version(repository, "0.2.0rc1") == []


def test_released_sections_keep_their_version(repository):
    replace(repository / "CHANGELOG.md", "unreleased", "2026-01-01")
    check_versions.set_version(repository, "0.2.0")
    assert check_versions.check(repository) == ["CHANGELOG.md: its newest section must be [0.2.0], got 0.1.0"]


def test_this_repository_agrees():
    assert check_versions.main([]) == 0


def test_an_unusable_version_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        check_versions.main(["--set", "one"])
    assert exit_.value.code == 2
    assert "got 'one'" in capsys.readouterr().err
