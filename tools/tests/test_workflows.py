"""Workflows and pre-commit hooks: they parse, call sessions that exist, and name the versions of `nox -s lint`."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NOXFILE = (ROOT / "noxfile.py").read_text(encoding="utf-8")
SESSIONS = re.findall(r"@nox\.session\([^)]*\)\ndef (\w+)\(", NOXFILE)
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SHA = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")


def load(file):
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def constant(name):
    """Return the value of a constant of noxfile.py."""
    return next(
        ast.literal_eval(node.value)
        for node in ast.parse(NOXFILE).body
        if isinstance(node, ast.Assign)
        and [target.id for target in node.targets if isinstance(target, ast.Name)] == [name]
    )


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_there_are_workflows():
    assert [file.stem for file in WORKFLOWS] == ["docs", "release", "test", "wheels"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_calls_sessions_that_exist(file):
    called = []
    for step in steps(load(file)):
        for command in step.get("run", "").splitlines():
            if "nox -s" in command:
                called += command.partition("nox -s ")[2].partition(" --")[0].split()
    assert called
    assert [name for name in called if name not in SESSIONS] == []


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_is_pinned_and_has_few_rights(file):
    workflow = load(file)
    for step in steps(workflow):
        assert "uses" in step or "run" in step
        if "uses" in step:
            assert SHA.fullmatch(step["uses"]), f"{step['uses']}: not pinned to a commit"
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
    assert workflow["permissions"] == {}
    assert {"group", "cancel-in-progress"} <= workflow["concurrency"].keys()
    for name, job in workflow["jobs"].items():
        assert "timeout-minutes" in job, name
        writes = {right for right, level in job["permissions"].items() if level != "read"}
        assert writes <= {"docs": {"pages", "id-token"}, "release": {"id-token"}}.get(file.stem, set()), name


def test_releases_are_published_without_a_secret():
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    publish = yaml.safe_load(text)["jobs"]["publish"]
    assert publish["environment"] == "pypi" and publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in text and "password" not in str(publish)


def test_compatibility_runs_for_every_python_that_wheels_are_built_for():
    matrix = load(ROOT / ".github" / "workflows" / "wheels.yml")["jobs"]["compatibility"]["strategy"]["matrix"]
    assert tuple(matrix["python"]) == constant("PYTHONS")


def test_cibuildwheel_builds_the_same_pythons():
    text = (ROOT / "packages" / "gspn-core" / "pyproject.toml").read_text(encoding="utf-8")
    (built,) = re.findall(r'^build = "(.*)"$', text, re.MULTILINE)
    assert built.split() == [f"cp{version.replace('.', '')}-*" for version in constant("PYTHONS")]
    assert f'= "{constant("MANYLINUX")}"' in text and f"--plat {constant('MANYLINUX')}_x86_64" in text


def test_pre_commit_has_the_versions_of_lint():
    repositories = load(ROOT / ".pre-commit-config.yaml")["repos"]
    versions = {Path(item["repo"]).name: item["rev"] for item in repositories if item["repo"] != "local"}
    ours = dict(tool.split("==") for tool in constant("LINT_TOOLS"))
    assert versions == {"ruff-pre-commit": f"v{ours['ruff']}", "mirrors-clang-format": f"v{ours['clang-format']}"}
    (local,) = (item for item in repositories if item["repo"] == "local")
    for hook in local["hooks"]:
        script = hook["entry"].split()[1]
        assert (ROOT / script).is_file() and script in NOXFILE
