"""The main of every command: what it prints, and its exit statuses; and that the operator imports none of it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from gspn_core.runs import cli
from gspn_core.runs.cli import Command
from gspn_core.runs.errors import NonFiniteLossError, WriteError


@dataclasses.dataclass(kw_only=True, frozen=True)
class Options:
    """Options.

    Args:
        count: a number
    """

    count: int = 3


def work(options):
    """Return a result, or raise what the test asks for."""
    if options.count in ERRORS:
        raise ERRORS[options.count][0]
    return {"count": options.count, "nothing": None, "folder": "x", "share": 2 / 3}


def each(options):
    """Yield results one by one, and fail at the fourth."""
    for count in range(options.count):
        if count == 3:
            raise ValueError("four are too many")
        yield {"count": count}


def as_text(result):
    return f"counted {result['count']}"


ERRORS = {
    10: (ValueError("count must be small"), 2),
    11: (FileNotFoundError("no file"), 2),
    12: (ImportError("no module"), 2),
    13: (NonFiniteLossError("the loss is nan"), 1),
    14: (WriteError("cannot write x: No space left"), 1),
    15: (MemoryError("out of memory"), 1),
    16: (RuntimeError("can't allocate memory: 9 bytes"), 1),
    17: (ValueError("Caught in a loader process\nTraceback ...\nValueError: the last line"), 2),
}
Unreachable = type("ConnectError", (Exception,), {"__module__": "httpx2._exceptions"})
ERRORS[18] = (Unreachable("Name or service not known"), 2)
NAME = __name__
COMMANDS = {
    "work": Command(f"{NAME}:Options", f"{NAME}:work", "do the work", resumable=True),
    "each": Command(f"{NAME}:Options", f"{NAME}:each", "one by one", text=f"{NAME}:as_text", items="counts"),
    "count": Command(f"{NAME}:Options", f"{NAME}:work", "count", text=f"{NAME}:as_text"),
}


def call(capsys, *words):
    code = cli.run("tool", "A tool.", "1.2.3", COMMANDS, argv=list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_results(capsys):
    assert call(capsys, "work") == (0, "count   3\nfolder  x\nshare   0.666667\n", "")
    code, out, _ = call(capsys, "work", "--json", "--count", "4")
    assert code == 0 and json.loads(out) == {"count": 4, "nothing": None, "folder": "x", "share": 2 / 3}
    assert call(capsys, "count", "--count=5") == (0, "counted 5\n", "")


def test_results_one_by_one(capsys):
    """Each is shown when it is there, so that an error loses none of those before it."""
    assert call(capsys, "each", "--count", "2") == (0, "counted 0\ncounted 1\n", "")
    code, out, _ = call(capsys, "each", "--count", "2", "--json")
    assert code == 0 and json.loads(out) == {"counts": [{"count": 0}, {"count": 1}]}
    code, out, error = call(capsys, "each", "--count", "9")
    assert (code, out) == (2, "counted 0\ncounted 1\ncounted 2\n")
    assert error == "tool: error: four are too many\n"


def test_only_the_main_process_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert call(capsys, "work") == (0, "", "")


def test_json_has_no_nan():
    assert cli._finite({"loss": float("nan"), "rows": [(1.0, float("inf")), "x"]}) == {
        "loss": None,
        "rows": [[1.0, None], "x"],
    }


@pytest.mark.parametrize("count", ERRORS)
def test_errors(capsys, count):
    code, out, err = call(capsys, "work", "--count", str(count))
    assert (code, out) == (ERRORS[count][1], "")
    assert err == f"tool: error: {str(ERRORS[count][0]).splitlines()[-1]}\n"


def test_a_fault_of_ours_is_a_traceback(capsys, monkeypatch):
    monkeypatch.setitem(ERRORS, 18, (RuntimeError("a fault"), None))
    with pytest.raises(RuntimeError, match="a fault"):
        call(capsys, "work", "--count", "18")


def test_interrupted(capsys, monkeypatch):
    monkeypatch.setitem(ERRORS, 19, (KeyboardInterrupt(), 130))
    assert call(capsys, "work", "--count", "19") == (
        130,
        "",
        "tool: interrupted; run the same command again to continue\n",
    )
    assert call(capsys, "count", "--count", "19") == (130, "", "tool: interrupted\n")


def test_mistakes(capsys):
    assert call(capsys, "work", "--cuont", "3")[::2] == (
        2,
        "tool: error: unknown option '--cuont', did you mean '--count'?\n",
    )
    assert call(capsys, "work", "--count", "many")[0] == 2


@pytest.mark.parametrize(
    "words,status,shown",
    [
        (["--help"], 0, "do the work"),
        (["--version"], 0, "tool 1.2.3"),
        (["work", "--help"], 0, "--count COUNT"),
        ([], 2, "COMMAND"),
        (["paint"], 2, "paint"),
    ],
)
def test_help_and_version(capsys, words, status, shown):
    with pytest.raises(SystemExit) as ended:
        call(capsys, *words)
    captured = capsys.readouterr()
    assert ended.value.code == status and shown in captured.out + captured.err


PROGRAM = """
import dataclasses, sys, time
from gspn_core.runs import cli

@dataclasses.dataclass(kw_only=True, frozen=True)
class Options:
    '''Options.

    Args:
        lines: to print
    '''
    lines: int = 0

def work(options):
    if options.lines < 0:
        print("ready", flush=True)
        time.sleep(60)
    return {str(number): "x" * 100 for number in range(options.lines)}

if __name__ == "__main__":
    command = cli.Command("__main__:Options", "__main__:work", "work", resumable=True)
    sys.exit(cli.run("tool", "", "1", {"work": command}))
"""


@pytest.fixture
def program(tmp_path):
    file = tmp_path / "tool.py"
    file.write_text(textwrap.dedent(PROGRAM))
    return [sys.executable, str(file), "work"]


def test_a_closed_output(program):
    """As of `tool work | head -1`."""
    process = subprocess.Popen([*program, "--lines", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (0, b"")
    process.stderr.close()


def test_ctrl_c(program):
    process = subprocess.Popen([*program, "--lines", "-1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "tool: interrupted; run the same command again to continue\n"


def test_the_operator_imports_none_of_it():
    code = (
        "import sys, gspn_core, gspn_core.cli; "
        "print(sorted(set(sys.modules) & {'accelerate', 'jsonargparse', 'safetensors', 'tensorboard', 'yaml'}), "
        "[name for name in sys.modules if name.startswith('gspn_core.runs')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] []\n"
