"""The command line: options, output, and the benchmark's refusal to report wrong kernels."""

import json
import re

import pytest
import torch

from gspn_core import _backend, bench, cli, info

OPTIONS = {
    (): {"--help", "--version"},
    ("info",): {"--help", "--json"},
    ("bench",): {"--help", "--json", "--quick", "--threads", "--repeats", "--filter"},
}
ROW = {"name", "shape", "unit", "ours", "versus", "other", "ratio", "ratio_of", "target", "met"}


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
    monkeypatch.setattr(cli, "info", lambda: {"a": {"b": True, "c": [], "d": None}, "threads": 1})
    assert cli.main(["info"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert lines == [["a.b", "yes"], ["a.c", "none"], ["a.d", "none"], ["threads", "1"]]


def test_bench_writes_rows_device_versions_and_date(capsys):
    threads = torch.get_num_threads()
    assert cli.main(["bench", "--quick", "--threads", "1", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"date", "device", "info", "settings", "rows"}
    assert result["info"]["threads"] == 1
    assert torch.get_num_threads() == threads
    assert result["settings"]["repeats"] == bench.QUICK.repeats
    names = [row["name"] for row in result["rows"]]
    assert len(set(names)) == len(names) == 22
    for row in result["rows"]:
        assert set(row) == ROW
        assert row["ours"] > 0
        assert row["other"] > 0
        assert row["ratio"] in (
            pytest.approx(row["ours"] / row["other"]),
            pytest.approx(row["other"] / row["ours"]),
        )
        assert row["target"] is None
        assert row["met"] is None


def test_bench_prints_a_table_and_writes_a_file(capsys, tmp_path):
    file = tmp_path / "result.json"
    assert cli.main(["bench", "--quick", "--filter", "saved memory", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # header, row, device and versions
    assert row["name"] in lines[1]
    assert row["ratio"] <= 1


def test_targets_are_compared_with_the_full_sizes_only():
    row = bench.Row(
        name="n", shape="s", unit="ms", ours=1, versus="v", other=9, ratio=9, ratio_of="other/ours",
        target=bench.Target(of="ratio", comparison=">=", value=10),
    )  # fmt: skip
    assert row.as_dict()["met"] is False
    assert row.as_dict()["target"] == {"of": "ratio", "comparison": ">=", "value": 10}
    assert bench.Target(of="ours", comparison="<=", value=1).met_by(row)
    assert bench.Settings().targets
    assert not bench.QUICK.targets


@pytest.mark.parametrize("case", [case.name for case in bench.CASES])
def test_wrong_kernels_get_no_figures(case, capsys, monkeypatch):
    forward = _backend.Kernels.forward

    def wrong(self, x, weights, lam, u, y, checkpoints):
        forward(self, x, weights, lam, u, y, checkpoints)
        y.select(-1, -1).add_(1e-3 * y.abs().max() + 1e-3)

    monkeypatch.setattr(_backend.Kernels, "forward", wrong)
    assert cli.main(["bench", "--quick", "--filter", case, "--json", "-"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no figures are reported" in captured.err


def test_wrong_gradients_get_no_figures(capsys, monkeypatch):
    backward = _backend.Kernels.backward

    def wrong(self, *args):
        backward(self, *args)
        args[-1][1].mul_(1.001)

    monkeypatch.setattr(_backend.Kernels, "backward", wrong)
    assert cli.main(["bench", "--quick", "--filter", "forward+backward"]) == 1
    assert capsys.readouterr().out == ""


def test_a_result_that_is_not_a_number_is_a_disagreement():
    with pytest.raises(bench.DisagreementError, match="off the reference's by nan"):
        bench._require_agreement("case", [torch.tensor([torch.nan])], [torch.ones(1)])


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "the following arguments are required: COMMAND"),
        (["measure"], "invalid choice: 'measure'"),
        (["bench", "--threads", "0"], "argument --threads: must be an integer of at least 1, got '0'"),
        (["bench", "--repeats", "many"], "argument --repeats: must be an integer of at least 1, got 'many'"),
        (["bench", "--filter", "no such case"], "no case contains 'no such case'; there are 'line_scan forward"),
        (["bench", "--json", "no/such/folder/f.json"], "--json must name a file in an existing folder, or be -"),
    ],
)
def test_user_errors_take_one_line_and_exit_with_2(argv, message, capsys):
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
