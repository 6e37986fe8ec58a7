"""Every Python and shell snippet of the READMEs, CONTRIBUTING and docs runs as it stands, or says why it does not."""

import re
from pathlib import Path

import pytest
import snippets
from snippets import ROOT, check_command, check_python, commands, run_python, run_shell, snippets_of

ALL = snippets.snippets()
LONG_TIMEOUT, TIMEOUT = 3600, 120  # seconds


def parameters(run):
    for snippet in ALL:
        if (snippet.mark != "not run") == run:
            marks = [pytest.mark.long] if snippet.mark == "long" else []
            yield pytest.param(snippet, id=snippet.name, marks=marks)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folder of a file's snippets."""
    made = {}

    def folder(file):
        if file not in made:
            made[file] = tmp_path_factory.mktemp(file.stem)
            snippets.prepare(made[file])
        return made[file]

    return folder


@pytest.mark.parametrize("snippet", list(parameters(run=True)))
def test_snippet_runs(snippet, folders, monkeypatch):
    folder = folders(snippet.file)
    if snippet.language == "python":
        monkeypatch.chdir(folder)
        run_python(snippet)
    else:
        for words in commands(snippet.code):
            check_command(words)
        print(run_shell(snippet, folder, LONG_TIMEOUT if snippet.mark else TIMEOUT))


@pytest.mark.parametrize("snippet", list(parameters(run=False)))
def test_snippet_that_is_not_run_is_right(snippet, capsys):
    if snippet.language == "python":
        check_python(snippet)
        return
    known = []
    for words in commands(snippet.code):
        try:
            known.append(check_command(words))
        except ValueError as error:
            pytest.fail(f"{snippet.name}: {' '.join(words)}: {error} {capsys.readouterr().err}")
    assert any(known), f"{snippet.name} has no command that can be checked"


# ---- the collection and the checks notice what they are for


def test_the_readme_shows_operator_module_and_model():
    code = "\n".join(s.code for s in ALL if s.file == ROOT / "README.md" and s.language == "python")
    assert all(name in code for name in ("propagate(", "SpatialPropagation(", "timm.create_model("))


def collect(text):
    return snippets_of(ROOT / "README.md", text)


def test_marks_are_read():
    fence = "```sh\ngspn-core info\n```\n"
    text = f"{fence}\n<!-- long -->\n{fence}\n<!-- not run: needs a GPU -->\n{fence}\n```text\nx\n```\n"
    assert [(s.line, s.mark, s.reason) for s in collect(text)] == [
        (2, "", ""),
        (7, "long", ""),
        (12, "not run", "needs a GPU"),
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- not run: -->\n```sh\nx\n```\n", "say why"),
        ("<!-- not run -->\n```python\nx\n```\n", "say why"),
        ("- list\n\n    ```sh\n    x\n    ```\n", "left margin"),
        ("```bash\nx\n```\n", "left margin"),
        ("```console\n$ x\n```\n", "left margin"),
    ],
)
def test_blocks_that_would_be_missed_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        collect(text)


def test_commands_are_found():
    code = 'A=1 gspn-core info \\\n  --json  # why\ncd x && pip install "a[b]==1.*" | tail -n 1\nx=$(f $(y)) z $(a)b\n'
    assert list(commands(code)) == [
        ["gspn-core", "info", "--json"],
        ["cd", "x"],
        ["pip", "install", "a[b]==1.*"],
        ["tail", "-n", "1"],
        ["z", "1b"],
    ]


@pytest.mark.parametrize(
    "command, known",
    [
        ("gspn-core info --json", "gspn-core"),
        ("gspn-vision train --config gspn2_nano_digits --out runs/digits", "gspn-vision"),
        ("gspn-vision train --help", "gspn-vision"),
        ("python -m gspn_core bench --list", "gspn_core"),
        ("torchrun --nproc_per_node 8 -m gspn_dit.cli train --config digits", "torchrun"),
        ("accelerate launch --num_processes 2 -m gspn_dit.cli train --config digits", "accelerate"),
        ("srun --nodes=2 torchrun --nnodes $N -m gspn_vision.cli train --data x", "srun"),
        ("python3 -m nox -s demo", "nox"),
        ("pip install ./packages/gspn-core", "pip"),
        ("python demos/vision_digits.py --out x", "demos/vision_digits.py"),
        ("ls -l", ""),
    ],
)
def test_right_commands(command, known):
    [words] = commands(command)
    assert check_command(words) == known


@pytest.mark.parametrize(
    "command",
    [
        "gspn-core info --jsno",
        "gspn-core measure",
        "gspn-vision train --rate 3",
        "gspn-vision trian",
        "gspn-vision trian --help",
        "gspn-vision train --config no_such_config",
        "gspn-dit sample",
        "gspn-t2i",
        "torchrun --processes 8 -m gspn_dit.cli train --config digits",
        "torchrun --nproc_per_node 8 -m gspn_dit.cli train --config digits --rate 3",
        "accelerate launch --processes 2 -m gspn_dit.cli train --config digits",
        "python3 -m nox -s demos",
        "pip install ./packages/gspn-cores",
        "python demos/vision_letters.py",
    ],
)
def test_wrong_commands(command):
    [words] = commands(command)
    with pytest.raises((ValueError, FileNotFoundError)):
        check_command(words)


def test_wrong_python_that_is_not_run():
    def snippet(code):
        return snippets.Snippet(Path("x"), 1, "python", code, "not run", "why")

    check_python(snippet("from gspn_core import propagate\nimport gspn_vision, anything_else\n"))
    for code in ("from gspn_core import propagat", "import gspn_core.nothing", "x ="):
        with pytest.raises((SyntaxError, ImportError, AttributeError)):
            check_python(snippet(code))


def test_links_lead_to_files():
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("packages/*/README.md")):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", file.read_text()):
            if "://" not in target:
                assert (file.parent / target).exists(), f"{file.relative_to(ROOT)} links to {target}"
