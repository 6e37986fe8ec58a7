"""The Python and shell snippets of the READMEs, CONTRIBUTING and docs: collecting, checking and running them.

A fenced block of ```python or ```sh is run by a test. A comment on the line before the fence says otherwise:

    <!-- long -->               run by `nox -s snippets` alone
    <!-- not run: reason -->    needs what a test does not have; its imports, commands and options are checked

The snippets of one file run in one temporary folder, in their order, so that a command finds what one before it wrote.
`demos`, `docs` and `packages` of the checkout are there, too, and a photograph, photo.jpg.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("python", "sh")
_FENCE = re.compile(r"^( *)(```+|~~~+)([^`\n]*)\n(.*?)^ *\2 *$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (long|not run)(?::(.*?))? *-->\n\Z")
# What the shell replaces: $(...) with two levels of parentheses inside, and variables.
_EXPANSION = re.compile(r"\$\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|\$\{?\w+\}?")
_SHELLS = ("bash", "shell", "console", "zsh", "py", "pycon", "python3")
_ENDS = frozenset(("&&", "||", ";", "|", "&", ">", ">>", "2>", "<", ")"))


class Snippet(NamedTuple):
    """One fenced block: where it stands, what it is, and whether and why it is not run with the others."""

    file: Path
    line: int
    language: str
    code: str
    mark: str = ""
    reason: str = ""

    @property
    def name(self) -> str:
        """Return its place as a test's name."""
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def files() -> list[Path]:
    """Return all files whose snippets are run."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    return [*found, *sorted(ROOT.glob("packages/*/README.md")), *sorted(ROOT.glob("docs/**/*.md"))]


def snippets_of(file: Path, text: str) -> list[Snippet]:
    """Return the snippets of a file.

    Raises:
        ValueError: a block could be missed, since it is indented or its language has another name, or lacks a reason.
    """
    found = []
    for match in _FENCE.finditer(text):
        indent, _, language, code = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        language = language.strip()
        if language in _SHELLS or (indent and language in LANGUAGES):
            raise ValueError(f"{file}:{line}: snippets are blocks of ```python or ```sh at the left margin")
        if language not in LANGUAGES:
            continue
        mark = _MARK.search(text, 0, match.start())
        reason = (mark[2] or "").strip() if mark else ""
        if mark and mark[1] == "not run" and not reason:
            raise ValueError(f"{file}:{line}: say why it is not run: <!-- not run: reason -->")
        found.append(Snippet(file, line + 1, language, code, mark[1] if mark else "", reason))
    return found


def snippets() -> list[Snippet]:
    """Return the snippets of all files."""
    return [snippet for file in files() for snippet in snippets_of(file, file.read_text(encoding="utf-8"))]


# ---- running


def prepare(folder: Path) -> None:
    """Put links to the checkout, and a photograph of scikit-learn's, into a folder that snippets run in."""
    from sklearn.datasets import __file__ as datasets

    shutil.copy(Path(datasets).parent / "images" / "china.jpg", folder / "photo.jpg")
    for name in ("demos", "docs", "packages"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name, target_is_directory=True)


def run_python(snippet: Snippet) -> None:
    """Run it in this process and folder; a traceback names the file's own line."""
    padded = "\n" * (snippet.line - 1) + snippet.code
    exec(compile(padded, str(snippet.file), "exec"), {"__name__": "__main__"})


def run_shell(snippet: Snippet, folder: Path, timeout: float) -> str:
    """Run it with the commands of this Python's environment and return its output.

    Raises:
        AssertionError: a command failed; with the output.
    """
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    command = ["bash", "-euo", "pipefail", "-c", snippet.code]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{snippet.name} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


# ---- checking what is not run


def check_python(snippet: Snippet) -> None:
    """Compile it and look up what it imports of our packages.

    Raises:
        SyntaxError, ImportError, AttributeError: it is wrong.
    """
    for node in ast.walk(ast.parse(snippet.code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gspn_"):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                getattr(module, name.name)
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("gspn_"):
                    importlib.import_module(name.name)


def commands(code: str) -> Iterator[list[str]]:
    """Yield the words of every command of a shell snippet; variables are replaced by 1, comments left out."""
    for line in code.replace("\\\n", " ").splitlines():
        line = _EXPANSION.sub("1", line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in _ENDS:
                words.append(word)
                continue
            while words and re.fullmatch(r"\w+=.*", words[0], re.DOTALL):  # variables of the environment
                words = words[1:]
            if words:
                yield words
            words = []


def check_command(words: list[str]) -> str:
    """Parse a command with its own parser; return the program that was known, or "" if it is none of those.

    Known are our programs, also as modules, the launchers torchrun, `accelerate launch` and srun around them, nox, and
    pip with folders of the checkout.

    Raises:
        ValueError: the command is wrong; the message says how.
    """
    program, rest = words[0], words[1:]
    if program in ("python", "python3") and rest[:1] == ["-m"]:
        program, rest = rest[1], rest[2:]
    if program == "srun":
        inner = next((i for i, word in enumerate(rest) if not word.startswith("-")), len(rest))
        return check_command(rest[inner:]) and program
    for launcher in (_torchrun, _accelerate):
        inside = launcher(program, rest)
        if inside is not None:
            return check_command(inside) and program
    if program == "nox":
        _check_nox(rest)
    elif program in ("pip", "pip3"):
        for word in rest:
            if word.startswith(".") and not (ROOT / word.partition("[")[0]).exists():
                raise ValueError(f"pip: there is no {word} in the checkout")
    elif re.fullmatch(r"gspn[-_]\w+(\.cli)?", program):
        _check_ours(program.removesuffix(".cli").replace("-", "_"), rest)
    elif program.startswith("gspn_"):
        importlib.import_module(program)
    elif program.endswith((".py", ".sh")) or (rest and rest[0].endswith(".py")):
        return _check_script(program if program.endswith((".py", ".sh")) else rest[0])
    else:
        return ""
    return program


def _parsed(program: str, parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except SystemExit as error:
        raise ValueError(f"{program}: its parser refuses the options (it printed why)") from error


def _torchrun(program: str, words: list[str]) -> list[str] | None:
    if program not in ("torchrun", "torch.distributed.run"):
        return None
    from torch.distributed.run import get_args_parser

    args = _parsed(program, lambda: get_args_parser().parse_args(words))
    prefix = ["python", "-m"] if args.module else ["python"]
    return [*prefix, args.training_script, *args.training_script_args]


def _accelerate(program: str, words: list[str]) -> list[str] | None:
    if program != "accelerate" or words[:1] != ["launch"]:
        return None
    from accelerate.commands.launch import launch_command_parser

    args = _parsed(program, lambda: launch_command_parser().parse_args(words[1:]))
    prefix = ["python", "-m"] if args.module else ["python"]
    return [*prefix, args.training_script, *args.training_script_args]


def _check_nox(words: list[str]) -> None:
    sessions = re.findall(r"@nox\.session\([^)]*\)\ndef (\w+)\(", (ROOT / "noxfile.py").read_text(encoding="utf-8"))
    named = words[words.index("-s") + 1 :] if "-s" in words else []
    for word in named[: named.index("--")] if "--" in named else named:
        if word not in sessions:
            raise ValueError(f"nox has no session {word!r}")


def _check_ours(package: str, words: list[str]) -> None:
    if "--help" in words or "--version" in words:
        if not words[0].startswith("-"):
            _command(package, words[0])
    elif package == "gspn_core":
        from gspn_core.cli import _parser

        _parsed("gspn-core", lambda: _parser().parse_args(words))
    else:
        from gspn_core.runs.options import configs_folder, parse

        if not words:
            raise ValueError(f"{package} needs a command")
        cli = importlib.import_module(f"{package}.cli")
        parse(_command(package, words[0]), words[1:], shipped=configs_folder(str(cli.__file__)))


def _command(package: str, name: str) -> Any:
    """Return the class of a command's options."""
    from gspn_core.runs.cli import _load

    listed: Any = importlib.import_module(f"{package}.cli")
    if package == "gspn_core":
        return None
    if name not in listed.COMMANDS:
        raise ValueError(f"{package} has no command {name!r}, only {', '.join(listed.COMMANDS)}")
    return _load(listed.COMMANDS[name].options)


def _check_script(name: str) -> str:
    folders = (ROOT, *(path.parent for path in ROOT.glob("packages/*/pyproject.toml")))
    if not any((folder / name).is_file() for folder in folders):
        raise ValueError(f"there is no script {name} in the checkout")
    return name
