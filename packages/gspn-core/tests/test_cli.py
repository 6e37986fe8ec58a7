"""The command line: options, output, exit statuses."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

import gspn_core
from gspn_core import _backend, _command, _install, cli, info

BENCH = {"--help", "--threads", "--quick", "--repeats", "--filter", "--list", "--json", "--out"}
OPTIONS = {
    (): {"--help", "--version"},
    ("info",): {"--help", "--json"},
    ("bench",): BENCH | {"--progress", "--no-progress"},
}


@pytest.mark.parametrize("command", OPTIONS, ids=lambda command: " ".join(command) or "gspn-core")
def test_help_lists_exactly_these_options(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, "--help"])
    assert exit_.value.code == 0
    assert set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) == OPTIONS[command]


def test_info_as_json_is_info(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == info()


def test_info_as_a_table_names_every_value(capsys, monkeypatch):
    monkeypatch.setattr(gspn_core, "info", lambda: {"a": {"b": True, "c": [], "d": None}, "threads": 1})
    assert cli.main(["info"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert lines == [["a.b", "yes"], ["a.c", "none"], ["a.d", "none"], ["threads", "1"]]


@pytest.mark.parametrize(
    "programs, cudacxx, finds, row",
    [
        ((), None, "", "cpu"),
        (("nvcc",), None, "", "cpu"),
        ((), None, "xpu", "other"),
        (("nvidia-smi",), None, "", "nvidia"),
        ((), None, "cuda", "nvidia"),
        (("nvidia-smi", "nvcc"), None, "", "nvidia_nvcc"),
        (("nvidia-smi", "/cuda/nvcc"), "/cuda/nvcc", "cuda", "nvidia_nvcc"),
        (("nvidia-smi",), "/gone/nvcc", "cuda", "nvidia"),
    ],
)
def test_info_says_how_to_install_on_this_machine(programs, cudacxx, finds, row, monkeypatch):
    monkeypatch.setattr(_install.shutil, "which", lambda name: name if name in programs else None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: finds == "cuda")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: finds != "")
    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.delenv("CUDACXX", raising=False)
    if cudacxx:
        monkeypatch.setenv("CUDACXX", cudacxx)
    machine, commands, kernels = _install.ROWS[row]
    assert info()["install"] == {"machine": machine, "commands": list(commands), "kernels": kernels}


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "the following arguments are required: COMMAND"),
        (["measure"], "invalid choice: 'measure'"),
        (["bench", "--threads", "0"], "argument --threads: must be an integer of at least 1, got '0'"),
        (["bench", "--repeats", "many"], "argument --repeats: must be an integer of at least 1, got 'many'"),
        (["bench", "--filter", "no such case"], "no case contains 'no such case'; --list shows them"),
        (["bench", "--thread", "2"], "unrecognized arguments: --thread 2; did you mean --threads?"),
        (["info", "--jsno"], "unrecognized arguments: --jsno; did you mean --json?"),
        (["bench", "--json", "file"], "unrecognized arguments: file"),
    ],
)
def test_wrong_calls_take_one_line_and_exit_with_2(argv, message, capsys):
    try:
        code = cli.main(argv)
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_bench_needs_compiled_kernels(capsys, monkeypatch):
    monkeypatch.setattr(_backend, "extension", lambda: ImportError("not built"))
    assert cli.main(["bench"]) == 2
    assert "there are no compiled kernels to measure: not built" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, status, message",
    [
        (OSError(28, "No space left on device"), 1, "OSError: [Errno 28] No space left on device"),
        (MemoryError(), 1, "MemoryError: "),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_and_interrupts_take_one_line(error, status, message, capsys):
    def fail():
        raise error

    assert _command.guarded("program", fail) == status
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_as_a_module_a_closed_output_and_an_interrupt():
    """`python -m gspn_core` is `gspn-core`; nobody reading its output, or Ctrl-C, gives no traceback."""
    command = [sys.executable, "-m", "gspn_core"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*command, "info", "--json"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(["sh", "-c", '"$0" "$@" >&-', *command, "info"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "standard output is closed" in done.stderr
    program = subprocess.Popen(
        [*command, "bench", "--progress"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not program.stderr.read(1):
        pass
    program.send_signal(signal.SIGINT)
    output, errors = program.communicate(timeout=60)
    assert (program.returncode, output) == (130, "")
    assert "interrupted" in errors and "Traceback" not in errors
