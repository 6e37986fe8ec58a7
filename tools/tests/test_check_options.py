"""The glossary holds for all commands, and its check notices what it is for."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import check_options
import pytest
import yaml
from check_options import Entry, Option, check

ENTRIES = {
    "out": Entry("text", "varies", ("output",)),
    "seed": Entry("integer from 0", "0", ()),
    "npz": Entry("switch", "false", ()),
}
OPTIONS = [
    Option("one", "out", "text", "x"),
    Option("two", "out", "text", "null"),
    Option("one", "seed", "integer from 0", "0"),
    Option("two", "seed", "integer from 0", "0"),
    Option("one", "npz", "switch", "false"),
    Option("two", "top", "integer from 1", "5"),
]


def test_all_commands_agree_with_the_glossary():
    assert check_options.main() == 0


def test_agreement():
    assert check(OPTIONS, ENTRIES, {"top"}) == []


@pytest.mark.parametrize(
    "place,changes,fault",
    [
        (1, {"name": "output"}, "two: output must be called out"),
        (3, {"name": "random_seed"}, "two: random_seed is not in the glossary"),
        (3, {"default": "1"}, "two: the default of seed must be 0, is 1"),
        (4, {"kind": "text"}, "one: npz must be of type 'switch', is 'text'"),
        (5, {"name": "k"}, "glossary: no command has top"),
        (0, {"name": "top"}, "glossary: top is in several commands: give it a row"),
    ],
)
def test_a_command_that_differs_is_named(place, changes, fault):
    options = [*OPTIONS]
    options[place] = options[place]._replace(**changes)
    assert fault in check(options, ENTRIES, {"top"})


# ---- help


@pytest.mark.parametrize("program", ["gspn_core", "gspn_vision", "gspn_dit", "gspn_t2i"])
def test_help_answers_at_once_and_shows_lists_by_an_example(program):
    """Of every command: in less than 2 s of CPU time, and without importing torch."""
    listing = f"from {program}.cli import main; main(['--help'])"
    listed = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True).stdout
    commands = re.findall(r"^    (\w+)  ", listed, re.MULTILINE)
    assert len(commands) >= 2
    code = (
        "import sys, time, importlib\nmain = importlib.import_module(sys.argv[1] + '.cli').main\ntry:\n"
        "    main([sys.argv[2], '--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules\nassert time.process_time() < 2"
    )
    for command in commands:
        done = subprocess.run([sys.executable, "-c", code, program, command], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), command
        text = " ".join(done.stdout.split())
        for name in re.findall(r"(--[\w-]+) \w+ \[\w+ \.\.\.\]", done.stdout.partition("options:")[2]):
            assert program == "gspn_core" or f"such as {name} " in text, (command, name)


# ---- documented commands


def documented():
    """Yield the words of every command of ours in the READMEs."""
    for file in (check_options.ROOT / "README.md", *sorted(check_options.ROOT.glob("packages/*/README.md"))):
        text = file.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^(?:    )?(?:torchrun .*? -m )?(gspn[-_]\w+(?:\.cli)? \w+.*)$", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            yield file, [words[0].replace("_", "-").removesuffix(".cli"), *words[1:]]


def package_of(words):
    return words[0].replace("-", "_")


def test_documented_commands_are_right():
    """Every option exists and takes what it is given; nothing is run."""
    from importlib import import_module

    from gspn_core.cli import _parser
    from gspn_core.runs.cli import _load
    from gspn_core.runs.options import configs_folder, parse

    commands = [words for _, words in documented() if "--help" not in words]
    assert len(commands) > 20
    for words in commands:
        if words[0] == "gspn-core":
            _parser().parse_args([word for word in words[1:] if word != "NAME"])
            continue
        cli = import_module(f"{package_of(words)}.cli")
        parse(_load(cli.COMMANDS[words[1]].options), words[2:], shipped=configs_folder(str(cli.__file__)))


def test_no_two_documented_commands_write_to_one_place():
    outs: dict[Path, set[tuple[str, str]]] = {}
    for _, words in documented():
        if words[1] in ("train", "distill", "extract", "sample", "generate", "upscale"):
            out = words[words.index("--out") + 1] if "--out" in words else None
            if out is None and "--config" in words:
                name = words[words.index("--config") + 1]
                file = check_options.ROOT / "packages" / words[0] / "configs" / f"{name}.yaml"
                out = yaml.safe_load(file.read_text()).get("out")
            if out is not None:
                outs.setdefault(Path(out), set()).add((words[0], words[1]))
    assert outs and all(len(commands) == 1 for commands in outs.values()), outs


def test_shipped_configurations_write_to_places_of_their_own():
    outs = [
        yaml.safe_load(file.read_text()).get("out")
        for file in sorted(check_options.ROOT.glob("packages/*/configs/*.yaml"))
    ]
    outs = [out for out in outs if out is not None]
    assert len(outs) == len(set(outs)) > 5


def test_names_of_other_projects_stand_for_options():
    from gspn_core.runs.aliases import OURS

    options = {
        option.name
        for package in ("gspn_vision", "gspn_dit", "gspn_t2i")
        for option in check_options.options_of(package)
    }
    assert set(OURS.values()) <= options
